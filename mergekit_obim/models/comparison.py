"""Whether models can be merged with each other, by their configurations and tokenizers.

The check, the pre-pass and the merge all ask here, and so use the same words.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from mergekit.common import ModelPath

from mergekit_obim.errors import quoted
from mergekit_obim.models.configs import (
    architecture_fault,
    config_faults,
    head_faults,
    vocabulary_weights,
)
from mergekit_obim.models.faults import model_fault
from mergekit_obim.models.opened import Access, OpenModel, local_folder
from mergekit_obim.models.tokens import Vocabulary, is_spare, read_vocabulary, token_faults
from mergekit_obim.recipe.faults import Fault

# Rows to read, where two tokenizers contradict each other, to see whether it matters.
_MOST_ROWS = 64


def comparison_faults(
    base: OpenModel | None,
    experts: Sequence[OpenModel],
    *,
    aligned: bool,
    access: Access,
) -> list[Fault]:
    """Compare the configurations and the tokenizers of models that are to be merged.

    Nothing is downloaded. Of the weights, only those vocabulary rows are read that two tokenizers
    disagree on.

    Args:
        base: The base; None if it is not on this machine.
        experts: The experts, which are also compared with each other.
        aligned: Whether the recipe has ``tokenizer`` or ``tokenizer_source``, so that mergekit
            brings vocabulary rows into one order by their tokens.
        access: How models are read, and whether a tokenizer's own code may run.
    """
    # The commands open the models in different orders; sorted, they all print the same messages.
    experts = sorted(experts, key=lambda model: model.label)
    models = [*([base] if base else []), *experts]
    architectures = [model.config.architectures or [] for model in models]
    known = [names[0] for names in architectures if len(names) == 1]
    found = [architecture_fault(model.label, model.config, known) for model in models]
    faults = [fault for fault in found if fault]
    if faults:
        return faults  # the settings of unknown architectures cannot be compared
    if base:
        kind = base.config.architectures
        alike = [model for model in experts if model.config.architectures == kind]
        for model in alike:
            faults += config_faults(model.label, model.config, base.label, base.config)
        stored = {model.label: model.loader.index.tensor_paths.keys() for model in (base, *alike)}
        faults += head_faults(base.label, base.config, stored)
    faults += _vocabulary_faults(models, base, aligned=aligned, access=access)
    return faults


def _vocabulary_faults(
    models: Sequence[OpenModel], base: OpenModel | None, *, aligned: bool, access: Access
) -> Iterator[Fault]:
    """Compare what the tokenizers make of each number, unless mergekit aligns rows by tokens.

    An adapter's own tokens are warned of in either case, as mergekit does not look at them.
    """
    sizes = [getattr(m.config.get_text_config(), "vocab_size", None) for m in models]
    rows = min((size for size in sizes if size), default=None)
    known: dict[str, Vocabulary] = {}
    adapters: dict[str, str] = {}
    for model in models:
        label, reference = model.label, model.reference
        try:
            own = _read(reference.lora, rows, access) if reference.lora else None
            known |= {label: own} if own else {}
            if aligned and not own:
                continue
            others = _read(reference.model, rows, access)
        except Exception as error:  # whatever transformers raises at broken or foreign files
            why = f"can't be loaded: {quoted(error)}"
            if "trust_remote_code" in str(error):
                why = "comes with code of its own: if you trust that, give --trust-remote-code"
            if not aligned and label not in known:
                line = f"model {label}: its tokens were not compared, as its tokenizer {why}"
                yield model_fault("warning", line)
            continue
        if others and not own:
            known[label] = others
        elif own and others and not all(map(is_spare, dict(own.items() - others.items()))):
            adapters[label] = (
                f"model {label}: the adapter {reference.lora} has other tokens than "
                f"{reference.model}, and mergekit's tokenizer option looks at the latter's "
                "only; merge the adapter into it, and save its tokenizer with the result"
            )
    if not aligned:
        opened = {model.label: model for model in models}

        def differ(one: str, other: str, numbers: Collection[int]) -> bool:
            return _rows_differ(opened[one], opened[other], sorted(numbers)[:_MOST_ROWS])

        faults = list(token_faults(known, base.label if base else "the base", differ))
        yield from faults
        told = [label for label in adapters if any(label in fault.message for fault in faults)]
        adapters = {label: adapters[label] for label in told}
    for line in adapters.values():
        yield model_fault("warning", line)


def _read(place: ModelPath, rows: int | None, access: Access) -> Vocabulary | None:
    """Read the tokens of the rows that every model has, as only those are merged."""
    folder = local_folder(place, access.transformers_cache)
    if folder is None:
        return None
    found = read_vocabulary(folder, trust_remote_code=access.trust_remote_code)
    if found and rows and max(found.values()) >= rows:
        return {token: number for token, number in found.items() if number < rows}
    return found


def _rows_differ(one: OpenModel, other: OpenModel, numbers: Sequence[int]) -> bool:
    """Return whether any vocabulary weight differs in these rows; True if none is known."""
    weights = {w.name for w in vocabulary_weights(one.config) if w.vocabulary_axis == 0}
    both = weights.intersection(one.names, other.names)
    differ = not both
    for name in both:
        pair = [model.load(name) for model in (one, other)]
        index = torch.tensor([n for n in numbers if n < min(len(tensor) for tensor in pair)])
        differ |= not torch.equal(*(tensor[index].float() for tensor in pair))
    for model in (one, other):
        model.loader.flush()
    return differ
