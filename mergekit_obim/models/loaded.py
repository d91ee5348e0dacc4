"""Checking after loading that the model in memory is the one on disk.

Loading goes through rules for names, layouts, ties and files that mergekit does not share. What
they made of a checkpoint is compared with the stored tensors, by the few values of each that its
fingerprint holds, so that no measurement is of other weights than those that will be merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mergekit_obim.errors import CheckpointError
from mergekit_obim.models.completeness import missing_tensors
from mergekit_obim.models.faults import first_few
from mergekit_obim.models.names import Sources, sources_of
from mergekit_obim.models.opened import OpenModel
from mergekit_obim.saliency.fingerprint import Fingerprint, matches


def check_loaded(
    model: PreTrainedModel, opened: OpenModel, prints: Mapping[str, Fingerprint]
) -> Sources:
    """Make sure that every parameter holds the values that its checkpoint stores.

    Args:
        model: The model as transformers loaded it, in any dtype and on any device; weights that
            accelerate keeps on the CPU or on disk are looked at there.
        opened: The checkpoint that it was loaded from.
        prints: The fingerprints of its stored tensors.

    Returns:
        The stored tensors that each parameter was loaded from.

    Raises:
        CheckpointError: A parameter was not loaded, or holds other values; the message names the
            tensors and the likely reason.
    """
    sources = sources_of(model, opened.names)
    if missing := missing_tensors(model, opened, sources):
        raise CheckpointError(f"model {opened.label}: {missing}")
    differing = list(_differing(model, sources, prints))
    if differing:
        raise CheckpointError(
            f"model {opened.label}: transformers loaded other values than mergekit reads of "
            f"{first_few(differing)}: look in {opened.folder} for a second set of weights or an "
            "adapter, and move it away"
        )
    return sources


def _differing(
    model: PreTrainedModel, sources: Sources, prints: Mapping[str, Fingerprint]
) -> Iterator[str]:
    """Yield the stored tensors whose values are not those of the model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, stored in sources.renamed.items():
        known = [own for own in stored if own in prints]
        if name not in parameters or not known:
            continue  # a buffer, or integers
        value = _value(model, name)
        # Of two stored tensors for one parameter, transformers takes one.
        if not any(matches(prints[own], value) for own in known):
            yield known[0]
    compared = set()
    for conversion in sources.conversions:
        rule = tuple(conversion.sources)
        if rule in compared:
            continue  # taking layers apart copies them: the first shows how all were put together
        compared.add(rule)
        values = {name: _value(model, name) for name in conversion.targets if name in parameters}
        for own, piece in revert_weight_conversion(model, values).items():
            if own in prints and not matches(prints[own], piece):
                yield own


def _value(model: nn.Module, name: str) -> Tensor:
    """Return a parameter's value, wherever accelerate keeps it."""
    parameter = model.get_parameter(name)
    if not parameter.is_meta:
        return parameter
    owner, _, own = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        weights = getattr(one, "weights_map", None)
        if weights is not None:
            value: Tensor = weights[own]
            return value
    raise CheckpointError(
        f"parameter {name} was not loaded at all; give --device-map with more --max-memory"
    )
