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
        alike = [
            model for model in experts if model.config.architectures == base.config.architectures
        ]
        for model in alike:
            faults += config_faults(model.label, model.config, base.label, base.config)
        stored = {model.label: model.loader.index.tensor_paths.keys() for model in (base, *alike)}
        faults += head_faults(base.label, base.config, stored)
    vocabularies = _Vocabularies(models, access)
    faults += vocabularies.aligned() if aligned else vocabularies.mixed(base)
    return faults


class _Vocabularies:
    """The vocabularies of the models of one recipe.

    Args:
        models: The base, if it is on this machine, and the experts.
        access: How models are read, and whether a tokenizer's own code may run.
    """

    def __init__(self, models: Sequence[OpenModel], access: Access) -> None:
        self.models = {model.label: model for model in models}
        self._access = access
        sizes = [getattr(m.config.get_text_config(), "vocab_size", None) for m in models]
        self._rows = min((size for size in sizes if size), default=None)

    def mixed(self, base: OpenModel | None) -> Iterator[Fault]:
        """Yield what is wrong if rows are mixed by their numbers, mergekit's default."""
        known: dict[str, Vocabulary] = {}
        for label, model in self.models.items():
            places = (model.reference.lora, model.reference.model)
            try:
                found = next(filter(None, (self._read(place) for place in places if place)), None)
            except Exception as error:  # whatever transformers raises at broken or foreign files
                why = f"can't be loaded: {quoted(error)}"
                if "trust_remote_code" in str(error):
                    why = "comes with code of its own: if you trust that, give --trust-remote-code"
                line = f"model {label}: its tokens were not compared, as its tokenizer {why}"
                yield model_fault("warning", line)
                continue
            if found:
                known[label] = found
        faults = list(token_faults(known, base.label if base else "the base", self._differ))
        yield from faults
        for label, line in self._own_tokenizers():
            if any(label in fault.message for fault in faults):
                yield model_fault("warning", line)

    def aligned(self) -> Iterator[Fault]:
        """Yield what is wrong if mergekit aligns rows by tokens, which ignores adapters' tokens."""
        for _, line in self._own_tokenizers():
            yield model_fault("warning", line)

    def _own_tokenizers(self) -> Iterator[tuple[str, str]]:
        """Yield the label and a warning for each adapter with other tokens than its model."""
        for label, model in self.models.items():
            reference = model.reference
            try:
                own = self._read(reference.lora) if reference.lora else None
                others = self._read(reference.model) if own else None
            except Exception:  # `mixed` warns of it
                continue
            if own and others and not all(map(is_spare, dict(own.items() - others.items()))):
                yield (
                    label,
                    f"model {label}: the adapter {reference.lora} has other tokens than "
                    f"{reference.model}, and mergekit's tokenizer option looks at the latter's "
                    "only; merge the adapter into it, and save its tokenizer with the result",
                )

    def _read(self, place: ModelPath) -> Vocabulary | None:
        folder = local_folder(place, self._access.transformers_cache)
        if folder is None:
            return None
        found = read_vocabulary(folder, trust_remote_code=self._access.trust_remote_code)
        if found and self._rows and max(found.values()) >= self._rows:
            # Rows that not every model has are not merged, so their tokens do not matter.
            return {token: number for token, number in found.items() if number < self._rows}
        return found

    def _differ(self, one: str, other: str, numbers: Collection[int]) -> bool:
        return _rows_differ(self.models[one], self.models[other], sorted(numbers)[:_MOST_ROWS])


def _rows_differ(one: OpenModel, other: OpenModel, numbers: Sequence[int]) -> bool:
    """Return whether any vocabulary weight differs in these rows; True if none is known."""
    names = {
        weight.name for weight in vocabulary_weights(one.config) if weight.vocabulary_axis == 0
    }
    if not names:
        return True
    both = [
        name
        for name in names
        if all(name in model.loader.index.tensor_paths for model in (one, other))
    ]
    differ = not both
    for name in both:
        pair = [model.load(name) for model in (one, other)]
        index = torch.tensor([n for n in numbers if n < min(len(tensor) for tensor in pair)])
        differ |= not torch.equal(*(tensor[index].float() for tensor in pair))
    for model in (one, other):
        model.loader.flush()
    return differ
