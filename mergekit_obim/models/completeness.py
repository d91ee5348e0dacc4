"""Whether a checkpoint has every tensor of its model, and of mergekit's definition of the model.

transformers initialises missing parameters at random, and mergekit takes the embeddings for a
missing head, both with a log message at most. The model is built without memory (on torch's meta
device), and its parameters are traced back to stored tensors by transformers' own rules for
loading, so that fused experts are looked at one by one.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain
from math import prod

import torch
from mergekit.architecture import WeightInfo, arch_info_for_config
from mergekit.common import get_auto_cls
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mergekit_obim.models.checkpoint import possible_names
from mergekit_obim.models.faults import first_few, model_fault
from mergekit_obim.models.files import TensorHeader
from mergekit_obim.models.names import Sources, first_names, sources_of
from mergekit_obim.models.opened import Access, OpenModel
from mergekit_obim.recipe.faults import Fault

# Buffers that old checkpoints store and models compute themselves: attention masks, and the
# frequencies of rotary embeddings. Leaving them out of a merge loses nothing.
_BUFFERS = (".attn.bias", "masked_bias", "inv_freq", "position_ids")


def completeness(
    model: OpenModel, access: Access, *, is_base: bool, merging: bool
) -> Iterator[Fault]:
    """Find tensors that a checkpoint lacks, and those of a base that a merge would leave out.

    Args:
        model: The model; tensors of unreadable files count as there, as its index lists them.
        access: Whether code that comes with the model may run; without it, if the model needs
            that, only what mergekit knows of its architecture is compared.
        is_base: Whether the merged model will have this one's tensors, and no others.
        merging: Whether mergekit is to merge now; before the pre-pass, what it cannot merge is
            only a warning, as other tools may.

    Yields:
        An error that names the missing tensors, or a warning that names the dropped ones.
    """
    found = traced(model, access)
    if found and (missing := missing_tensors(found[0], model, found[1])):
        yield model_fault("error", f"model {model.label}: {missing}")
    elif missing := _missing_in_plan(model, found):
        severe = merging or not found
        yield model_fault("error" if severe else "warning", f"model {model.label}: {missing}")
    elif is_base:
        yield from _dropped(model, found)


# Tracing the tensors of a large mixture takes a second, and the models of a recipe mostly have the
# same configuration and tensor names. One entry is enough, and keeps only one model's modules.
Traced = tuple[PreTrainedModel, Sources]
_TRACED: dict[tuple[str, tuple[str, ...]], Traced] = {}


def traced(model: OpenModel, access: Access) -> Traced | None:
    """Build a model on the meta device, and trace its stored tensors; None if it cannot be built.

    Its parameters are tied as its configuration says.
    """
    key = (model.config.to_json_string(), tuple(model.names))
    if key not in _TRACED:
        _TRACED.clear()
        built: PreTrainedModel | None = None
        # Model code can raise anything. The caller then compares with mergekit's definition alone.
        with suppress(Exception), torch.device("meta"), no_init_weights():
            kind = get_auto_cls((model.config.architectures or [""])[0])
            made: PreTrainedModel = kind.from_config(
                copy.deepcopy(model.config), trust_remote_code=access.trust_remote_code
            )
            made.tie_weights()
            built = made
        if built is None:
            return None
        _TRACED[key] = built, sources_of(built, model.names)
    return _TRACED[key]


def missing_tensors(model: PreTrainedModel, opened: OpenModel, sources: Sources) -> str:
    """Return a message on parameters that the checkpoint does not store whole; empty without any.

    Args:
        model: The model, on the meta device or loaded.
        opened: Its checkpoint.
        sources: What :func:`sources_of` returns for both.
    """
    complete = _complete_parameters(model, sources, opened.headers)
    missing: list[str] = []
    for conversion in sources.conversions:
        if complete.isdisjoint(conversion.targets):
            count = model.state_dict()[conversion.targets[0]].shape[0]
            missing += conversion.missing(count) or conversion.targets
    # Of a fused parameter whose experts are stored in part, the missing ones were named above.
    started = {target for conversion in sources.conversions for target in conversion.targets}
    first = first_names(model)
    loaded = {first[name] for name in complete | started if name in first}
    # transformers lists parameters that published checkpoints lack for good reason.
    excused = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing += [
        name
        for name in dict.fromkeys(first.values())
        if name not in loaded and not any(pattern.search(name) for pattern in excused)
    ]
    if not missing:
        return ""
    what = f"has no tensor {first_few(missing)}"
    prefixed = (name for name in sources.unused if name.endswith(f".{missing[-1]}"))
    if prefix := next(prefixed, "").removesuffix(missing[-1]):
        return (
            f"{what}: they are stored as {prefix}…: rename the tensors without {prefix!r}, as "
            "saving the model instead of its wrapper does"
        )
    if missing == ["lm_head.weight"]:
        return (
            f"{what}, and its config.json does not say tie_word_embeddings: true: get the missing "
            "tensor, or say so in config.json if the head is the embedding"
        )
    return f"{what}: the checkpoint is not complete, or config.json is another model's"


def _missing_in_plan(model: OpenModel, traced: Traced | None) -> str:
    """Return a message on tensors that mergekit needs and will not find; empty without any."""
    there = set(model.names)
    if traced:
        there |= _complete_parameters(*traced, model.headers)
    ties = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    missing = [
        info.name
        for info in planned_tensors(model.config)
        if not info.optional
        and there.isdisjoint({info.name, *(info.aliases or ()), *((info.tied_names or ()) * ties)})
    ]
    if not missing:
        return ""
    if not traced:
        return f"has no tensor {first_few(missing)}: the checkpoint is not complete"
    return (
        f"mergekit cannot merge a {(model.config.architectures or ['model like it'])[0]}: it asks "
        f"for {first_few(missing)}, which such models do not have; mergekit-pytorch merges them "
        "file by file"
    )


def planned_tensors(config: PretrainedConfig) -> list[WeightInfo]:
    """List the tensors of mergekit's own definition of an architecture; empty if it has none."""
    with suppress(Exception):  # mergekit raises anything at a configuration that lacks a key
        info = arch_info_for_config(config)
        return list(info.all_weights(config)) if info else []
    return []


def _complete_parameters(
    model: PreTrainedModel, sources: Sources, headers: Mapping[str, TensorHeader]
) -> set[str]:
    """Return the parameters and buffers of which every part is stored."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    complete = set(sources.renamed)
    for conversion in sources.conversions:
        parts = list(chain.from_iterable(conversion.sources.values()))
        unknown = not all(part in headers for part in parts)  # in a file that cannot be read
        there = sum(prod(headers[part].shape) for part in parts if part in headers)
        wanted = sum(prod(shapes[target]) for target in conversion.targets if target in shapes)
        if unknown or there >= wanted:
            complete |= set(conversion.targets)
    return complete


def _dropped(model: OpenModel, traced: Traced | None) -> Iterator[Fault]:
    """Yield a warning that names the tensors of a base that mergekit will leave out."""
    read = {name for info in planned_tensors(model.config) for name in possible_names(info)}
    # Stored name -> the names it is loaded into: mergekit may plan the tensor under either.
    made_of: dict[str, set[str]] = defaultdict(set)
    if traced:
        built, sources = traced
        read = read or set(built.state_dict())
        for name, stored in sources.renamed.items():
            for own in stored:
                made_of[own].add(name)
        for conversion in sources.conversions:
            for own in chain.from_iterable(conversion.sources.values()):
                made_of[own].update(conversion.targets)
    left = [
        name
        for name, header in model.headers.items()
        if not read & {name, *made_of[name]}
        and header.dtype.startswith(("F", "BF"))
        and not name.endswith(_BUFFERS)
    ]
    if read and left:
        yield model_fault(
            "warning",
            f"{len(left)} tensors of the base {model.label} will not be in the merged model, as "
            f"mergekit does not know them: {first_few(left, 5)}",
        )
