"""Mapping merged vocabulary rows to each expert's own, under mergekit's tokenizer options."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_obim.methods.planning import PlannedInput
from mergekit_obim.methods.saliency import saliency_of
from mergekit_obim.models.checkpoint import stored_name, tensor_of


@dataclass(frozen=True)
class VocabularyRows:
    """The rows that mergekit's tokenizer options take from one expert's tensor.

    Attributes:
        axis: The vocabulary axis of the tensor.
        rows: For each row of the merged tensor, the expert's row; −1 if the expert has none.
    """

    axis: int
    rows: tuple[int, ...]

    def apply(self, h: torch.Tensor) -> torch.Tensor:
        """Reorder h by the merged vocabulary; rows that the expert does not have score 0."""
        if h.shape[self.axis] == 1:
            return h
        rows = torch.tensor(self.rows, device=h.device)
        h = h.index_select(self.axis, rows.clamp(min=0)).movedim(self.axis, 0)
        h[rows < 0] = 0
        return h.movedim(0, self.axis)


def vocabulary_rows(task: Any, weight: Any, i: PlannedInput, name: str) -> VocabularyRows | None:
    """Return how the tokenizer options will reorder the rows of an expert's tensor; None if not.

    Args:
        task: mergekit's task that gathers the tensor's inputs.
        weight: The output tensor, as mergekit describes it.
        i: The expert.
        name: The name that the expert's saliency of the tensor is stored under.

    Only a saliency that is stored per token needs it. The tokenizer task is run here once more than
    mergekit runs it: the rows have to be known before the merge starts.
    """
    from mergekit.tokenizer import PermutedVocabulary
    from mergekit.tokenizer.truncate import TruncatedVocabulary

    if (
        not isinstance(task, PermutedVocabulary | TruncatedVocabulary)
        or i.parameters["criterion"] != "saliency"
        or i.weight is None
    ):
        return None
    file = saliency_of(i.model, i.parameters["saliency"])
    axis = weight.vocabulary_axis
    shape = file.shapes.get(name, ())
    padded = (1,) * (i.weight.ndim - len(shape)) + tuple(shape)
    if padded[axis] == 1:
        return None
    if isinstance(task, TruncatedVocabulary):
        from mergekit.io.tasks import LoaderCache

        sizes = []
        for model, info in task.gather_tensors.weight_info.items():
            loader = LoaderCache().get(model)
            if stored := stored_name(loader, info):
                sizes.append(tensor_of(loader, stored).shape[axis])
        return VocabularyRows(axis, tuple(range(min(sizes))))
    info = _tokenizer_info(task.tokenizer_task)
    size = len(info.tokenizer.get_vocab())
    multiple = task.pad_to_multiple_of
    if multiple:
        size = -(-size // multiple) * multiple
    rows = [-1] * size
    forced = {token for token, config in (task.tokens or {}).items() if config.force}
    for token, index in info.tokenizer.get_vocab().items():
        if token not in forced:
            rows[index] = info.permutations[i.model][index]
    return VocabularyRows(axis, tuple(rows))


@functools.lru_cache(maxsize=4)
def _tokenizer_info(task: Any) -> Any:
    return task.execute()
