"""Inspecting a recipe's models before the work of a command begins.

`obim-saliency --check`, the pre-pass and the merge find the same faults and describe them in the
same words; they differ in which of them end the command.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_obim.errors import AdapterError, ObimError
from mergekit_obim.models.adapters import look_up
from mergekit_obim.models.comparison import comparison_faults
from mergekit_obim.models.completeness import completeness
from mergekit_obim.models.faults import model_fault
from mergekit_obim.models.opened import Access, OpenModel, local_folder, open_config, open_model
from mergekit_obim.models.quantised import quantised
from mergekit_obim.recipe.faults import Fault, fault_of


@dataclass
class Opened:
    """The models of a recipe, as far as they are on this machine.

    Attributes:
        models: The models that could be opened.
        absent: The models whose weights are not on this machine yet, with the reason.
        faults: An error for each model that is on this machine but could not be opened.
    """

    models: dict[ModelReference, OpenModel] = field(default_factory=dict)
    absent: dict[ModelReference, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    @property
    def readable(self) -> dict[ModelReference, OpenModel]:
        """The open models whose files can all be read."""
        return {reference: model for reference, model in self.models.items() if model.is_readable}


def open_models(
    references: Collection[ModelReference], access: Access, *, fetch: bool = False
) -> Opened:
    """Open a recipe's models, and note those that cannot be opened.

    Args:
        references: The models; they are opened in the order of their names.
        access: How models are read.
        fetch: Whether to download what is not on this machine, and to merge adapters.
    """
    opened = Opened()
    for reference in sorted(references, key=str):
        if not fetch and (reason := absent(reference, access)):
            opened.absent[reference] = reason
            continue
        try:
            opened.models[reference] = open_model(reference, access)
        except ObimError as error:
            opened.faults.append(fault_of(error, "model"))
    return opened


def inspect_absent(reference: ModelReference, access: Access) -> Iterator[Fault]:
    """Look at the configuration of a model whose weights are not on this machine.

    Raises:
        CheckpointError: The configuration cannot be read either.
    """
    yield from quantised(str(reference), open_config(reference, access), None)


def absent(reference: ModelReference, access: Access) -> str:
    """Return why a model's weights are not on this machine yet; empty if they are."""
    if reference.lora:
        if not access.lora_merge_cache:
            return ""  # opening it raises the error
        try:
            return look_up(reference, access.lora_merge_cache).rebuild_reason or ""
        except AdapterError:
            return "it has not been merged"  # the check of adapters says why
    here = local_folder(reference.model, access.transformers_cache)
    return "" if here else "has not been downloaded yet"


def is_aligned(config: MergeConfiguration) -> bool:
    """Return whether a recipe makes mergekit align the models' vocabularies."""
    return config.tokenizer is not None or config.tokenizer_source is not None


def inspect_models(
    models: Mapping[ModelReference, OpenModel],
    base: ModelReference | None,
    access: Access,
    *,
    aligned: bool,
    merging: bool = True,
    any_architecture: bool = False,
) -> Iterator[Fault]:
    """Inspect each model by itself, and compare each expert with the base.

    Args:
        models: The models that are on this machine.
        base: The base, if the recipe has one for all experts.
        access: How models are read.
        aligned: Whether the recipe has mergekit align the vocabularies.
        merging: Whether the merge is next, and not the pre-pass.
        any_architecture: Whether different architectures may be mixed (``--allow-crimes``).
    """
    for reference, model in models.items():
        yield from model.faults()
        found = list(quantised(model.label, model.config, model.headers))
        yield from found
        if not found:  # a quantised model's tensors have other names
            yield from completeness(model, access, is_base=reference == base, merging=merging)
    start = models.get(base) if base else None
    experts = [model for reference, model in models.items() if reference != base]
    if start and not any_architecture:
        for model in experts:
            yield from _inspect_beside(model, start, aligned=aligned, merging=merging)
    yield from comparison_faults(start, experts, aligned=aligned, access=access)


def _inspect_beside(
    model: OpenModel, base: OpenModel, *, aligned: bool, merging: bool
) -> Iterator[Fault]:
    """Compare an expert's architecture and tensor shapes with the base's."""
    own, wanted = ((m.config.architectures or [""])[0] for m in (model, base))
    if own == wanted:
        yield from _compare_shapes(model, base, aligned=aligned)
    elif own and wanted and model.reference.override_architecture is None:
        # The expert's saliency is the same, whichever base it is merged with later.
        yield model_fault(
            "error" if merging else "warning",
            f"model {model.label}: is a {own}, but the base {base.label} a {wanted}: experts have "
            "to be fine-tunes of the base; leave it out, or merge it with the base that it was "
            "trained from",
        )


def _compare_shapes(model: OpenModel, base: OpenModel, *, aligned: bool) -> Iterator[Fault]:
    shapes = {
        name: (list(header.shape), list(base.headers[name].shape))
        for name, header in model.headers.items()
        if name in base.headers and header.shape != base.headers[name].shape
    }
    sizes = [getattr(m.config.get_text_config(), "vocab_size", None) for m in (model, base)]

    def differ_in_tokens(name: str, own: list[int], wanted: list[int]) -> bool:
        """Return whether a tensor has a row per token, and they differ in the number of rows."""
        if own[1:] != wanted[1:] or not own:
            return False
        return [own[0], wanted[0]] == sizes or "embed" in name or "lm_head" in name

    tokens = {name: both for name, both in shapes.items() if differ_in_tokens(name, *both)}
    if tokens and not aligned:
        name = next((name for name in tokens if "embed" in name), next(iter(tokens)))
        shape, base_shape = tokens[name]
        yield model_fault(
            "error",
            f"model {model.label}: has another vocabulary than the base {base.label}: {name} is "
            f"{shape}, the base's {base_shape}; add `tokenizer: {{source: base}}` to the recipe, "
            "or `{source: union}` to keep every model's tokens",
        )
    others = [name for name in shapes if name not in tokens]
    if others:
        shape, base_shape = shapes[others[0]]
        more = f", and {len(others) - 1} more tensors differ" if others[1:] else ""
        yield model_fault(
            "error",
            f"model {model.label}: tensor {others[0]} is {shape}, but {base_shape} in the base "
            f"{base.label}{more}: it is not a fine-tune of this base; set base_model to the "
            "model that it was trained from",
        )
