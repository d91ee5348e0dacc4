"""Under which names mergekit may ask for a module's parameter.

transformers 5 renames tensors while it loads a checkpoint (GPT-NeoX ``embed_out`` →
``lm_head``, BERT ``gamma`` → ``weight``, a missing base-model prefix), while mergekit's
``LoadTensor`` looks for the name of its architecture definition, its aliases and its tied names
among the checkpoint's own. A saliency file that holds both names, where they differ, serves both.
"""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


def weight_names(
    model: PreTrainedModel, checkpoint_names: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """Every name that a weight goes by, in the module and in the checkpoint.

    The checkpoint's names are mapped forward by transformers' own loading rules. Tensors that
    loading fuses, splits or transposes have another layout, so they keep the module's name only.

    Args:
        model: The model, loaded from that checkpoint.
        checkpoint_names: The tensors that the checkpoint stores, buffers included.

    Returns:
        Parameter name (a tied one once, as in ``named_parameters()``) -> its names: the
        module's first, then those that the checkpoint has for it or for what it is tied to.
    """
    first_name = {id(p): name for name, p in model.named_parameters()}
    names = {name: [name] for name in first_name.values()}
    parameter_of = {
        name: first_name[id(p)] for name, p in model.named_parameters(remove_duplicate=False)
    }
    for stored, renamed in _renamed(model, checkpoint_names).items():
        parameter = parameter_of.get(renamed)
        if parameter is not None and stored not in names[parameter]:
            names[parameter].append(stored)
    return {parameter: tuple(known) for parameter, known in names.items()}


def _renamed(model: PreTrainedModel, checkpoint_names: Collection[str]) -> dict[str, str]:
    """Checkpoint name -> module name, where loading changes the name at most.

    The same steps as transformers' ``convert_and_load_state_dict_in_model``.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix, module_names = model.base_model_prefix, model.state_dict()
    renamed = {}
    for stored in sorted(checkpoint_names, key=dot_natural_key):
        name, converted = rename_source_key(stored, renamings, converters, prefix, module_names)
        if name not in module_names and stored in module_names:
            name, converted = rename_source_key(stored, [], [], prefix, module_names)
        if converted is None:
            renamed[stored] = name
    return renamed
