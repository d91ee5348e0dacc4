"""The names and layouts under which mergekit may ask for a module's parameter.

transformers 5 renames tensors while it loads a checkpoint (GPT-NeoX ``embed_out`` →
``lm_head``, BERT ``gamma`` → ``weight``, a missing base-model prefix), while mergekit's
``LoadTensor`` looks for the name of its architecture definition, its aliases and its tied names
among the checkpoint's own. A saliency file that holds both names, where they differ, serves both.

Loading also fuses: the experts of most mixtures are stored one by one and become one parameter.
mergekit fuses them too where its definition says so, and asks for single ones elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

# What a dim of size 1 is expanded to before transformers' rules split it, by the number of tensors
# that were concatenated along it: 2 for gate and up, 3 for q, k and v. 12 serves both.
_STAND_IN = 12
# The number of an expert in a stored name: `mlp.experts.3.gate_proj.weight`.
EXPERT_NUMBER = re.compile(r"(?<=experts\.)\d+(?=\.)")


def weight_names(model: PreTrainedModel, sources: Sources) -> dict[str, tuple[str, ...]]:
    """Return every name that a weight has, in the module and in the checkpoint.

    Tensors that loading fuses, splits or transposes have another layout: see :func:`stored_parts`.

    Args:
        model: The model, loaded from that checkpoint.
        sources: What :func:`sources_of` returns for the names that the checkpoint stores.

    Returns:
        Parameter name (a tied one once, as in ``named_parameters()``) -> its names: the
        module's first, then those that the checkpoint has for it or for what it is tied to.
    """
    first_name = first_names(model)
    names = {name: [name] for name in dict.fromkeys(first_name.values())}
    for name, stored in sources.renamed.items():
        parameter = first_name.get(name)
        if parameter is not None:
            names[parameter] += [own for own in stored if own not in names[parameter]]
    return {parameter: tuple(known) for parameter, known in names.items()}


def first_names(model: PreTrainedModel) -> dict[str, str]:
    """Map every name of every parameter to its first one, which tied parameters share."""
    first = {id(p): name for name, p in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def stored_parts(
    model: PreTrainedModel, parameter: str, h: Tensor, shapes: Callable[[str], torch.Size | None]
) -> dict[str, Tensor]:
    """Split a parameter's h into those of the stored tensors that it was loaded from.

    transformers' own rules for saving take h apart as they would the weight. For them, dims along
    which h does not change are given a few entries each, and taken to one again afterwards.

    Args:
        model: The model, loaded from that checkpoint.
        parameter: The parameter's name.
        h: The parameter's h, of a shape that broadcasts against it.
        shapes: Gives the shape of a tensor that the checkpoint stores, None if it does not.

    Returns:
        Stored name -> h, which broadcasts against the stored tensor. Empty if the rules cannot be
        applied: then mergekit cannot take the weight apart either.
    """
    weight = model.get_parameter(parameter)
    sizes = [
        full if full == size else _STAND_IN
        for size, full in zip(h.shape, weight.shape, strict=True)
    ]
    try:
        pieces = revert_weight_conversion(model, {parameter: h.expand(sizes)})
    except Exception:  # whatever an operation makes of a tensor of another size
        return {}
    parts: dict[str, Tensor] = {}
    elements = 0
    for stored, piece in pieces.items():
        shape = shapes(stored)
        if shape is None or piece.ndim != len(shape):
            return {}
        elements += math.prod(shape)
        for dim, size in enumerate(shape):
            one = piece.narrow(dim, 0, 1)
            if piece.shape[dim] != size and torch.equal(one.expand_as(piece), piece):
                piece = one
        if any(own not in (1, size) for own, size in zip(piece.shape, shape, strict=True)):
            return {}
        parts[stored] = piece.contiguous()
    # If there are more elements than the weight has, a stored tensor also holds other parameters.
    return parts if elements == weight.numel() else {}


def under_all_names(
    model: PreTrainedModel,
    parameter: str,
    h: Tensor,
    names: Sequence[str],
    shapes: Callable[[str], torch.Size | None],
) -> dict[str, Tensor]:
    """Return a parameter's h by every name that a merge may ask for it by.

    Args:
        model: The model, loaded from the checkpoint.
        parameter: The parameter's name.
        h: Its h, of a shape that broadcasts against it.
        names: What :func:`weight_names` has for it.
        shapes: Gives the shape of a tensor that the checkpoint stores, None if it does not.
    """
    found = dict.fromkeys(names, h)
    # Loading fused, split or transposed what the checkpoint stores, and a merge reads that.
    if all(shapes(name) is None for name in names):
        found |= stored_parts(model, parameter, h, shapes)
    return found


@dataclass(frozen=True)
class Conversion:
    """Stored tensors that loading fuses, splits or transposes into parameters.

    Attributes:
        targets: The parameters' names.
        sources: The stored tensors, by the pattern of transformers' rule that each one matches;
            ``*`` in it stands for the number of an expert.
    """

    targets: tuple[str, ...]
    sources: Mapping[str, list[str]]

    def missing(self, count: int) -> list[str]:
        """Name the stored tensors that would make the sources complete.

        Args:
            count: How many experts there are.

        Returns:
            Names as the checkpoint would have them; the rule's pattern if no such tensor is stored.
        """
        missing = []
        for pattern, names in self.sources.items():
            if not names:
                missing.append(pattern)
            elif "*" in pattern:
                wanted = [
                    EXPERT_NUMBER.sub(str(number), names[0], count=1) for number in range(count)
                ]
                missing += [name for name in wanted if name not in names]
        return missing


@dataclass(frozen=True)
class Sources:
    """The stored tensors that a model's parameters and buffers are loaded from.

    Attributes:
        renamed: Name in the model -> the stored tensors that are loaded into it unchanged.
        conversions: The tensors that change their layout as they are loaded.
        unused: The stored tensors that nothing is loaded from.
    """

    renamed: dict[str, list[str]]
    conversions: list[Conversion]
    unused: list[str]


def sources_of(model: PreTrainedModel, checkpoint_names: Collection[str]) -> Sources:
    """Follow transformers' own rules for loading from stored names to names in the model.

    The steps are those of its ``convert_and_load_state_dict_in_model``.

    Args:
        model: The model; on the meta device will do.
        checkpoint_names: The names of the tensors that its checkpoint stores.
    """
    module_names, first = model.state_dict(), first_names(model)
    if {first[name] for name in checkpoint_names if name in first} == set(first.values()):
        # Every parameter is stored under its own name, as in most checkpoints: the rules, hundreds
        # of regular expressions that take transformers 0.4 s to compile, would change nothing.
        own = [name for name in checkpoint_names if name in module_names]
        unused = [name for name in checkpoint_names if name not in module_names]
        return Sources({name: [name] for name in own}, [], unused)
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = model.base_model_prefix
    found = Sources({}, [], [])
    by_targets: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for stored in sorted(checkpoint_names, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, module_names)
        # As transformers does: a name that the model has should not have been renamed.
        if name not in module_names and stored in module_names:
            name, pattern = rename_source_key(stored, [], [], prefix, module_names)
        if name not in module_names:
            found.unused.append(stored)
        elif pattern is None:
            found.renamed.setdefault(name, []).append(stored)
        else:
            rule = rule_of[pattern]
            main, *_ = rule.target_patterns
            targets = tuple(name.replace(main, target) for target in rule.target_patterns)
            matched = by_targets.setdefault(targets, {p: [] for p in rule.source_patterns})
            matched[pattern].append(stored)
    found.conversions.extend(Conversion(*item) for item in by_targets.items())
    return found
