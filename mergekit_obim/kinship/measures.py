"""Model kinship (arXiv 2410.12613): how similar models are as fine-tunes of one base.

The measures compare task vectors, over all tensors that the models have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader
from mergekit.options import MergeOptions
from tqdm import tqdm

from mergekit_obim.errors import CheckpointError, RecipeError, UnscorableError
from mergekit_obim.kernels.blocks import one_thread
from mergekit_obim.kernels.kinship import Moments, moments
from mergekit_obim.models.checkpoint import StreamingReader
from mergekit_obim.models.files import read_headers
from mergekit_obim.models.layers import block_of
from mergekit_obim.models.opened import open_checkpoint
from mergekit_obim.recipe.references import written_in_two_ways


@dataclass
class Kinship:
    """How similar a set of models are as fine-tunes of one base.

    Attributes:
        base: The reference of the base model.
        models: The references of the K models.
        total: Sums over all compared tensors, from which every measure follows.
        layers: The same sums by block (``model.layers.3``); ``outside`` is for tensors that
            belong to no block.
        skipped: For each of the base's tensors that was not compared, the reason.
    """

    base: str
    models: list[str]
    total: Moments
    layers: dict[str, Moments] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self, *, layers: bool) -> dict[str, Any]:
        """Return the measures as JSON-able types; ``layers`` adds those of each block."""
        found = {
            "base": self.base,
            "models": self.models,
            "elements": int(self.total.count),
            **pairwise(self.total),
            "relative_size": matrix(self.total.relative_sizes()[None])[0],
            "skipped": self.skipped,
        }
        if layers:
            found["layers"] = {
                place: {"elements": int(part.count), **pairwise(part)}
                for place, part in self.layers.items()
            }
        return found


def pairwise(part: Moments) -> dict[str, list[list[float | None]]]:
    """Return the three measures by name, each a K × K matrix as :func:`matrix` writes it."""
    return {
        "pearson": matrix(part.pearson()),
        "cosine": matrix(part.cosine()),
        "euclidean": matrix(part.euclidean()),
    }


def matrix(values: torch.Tensor) -> list[list[float | None]]:
    """Return a matrix as nested lists, with None for NaN, which JSON does not have."""
    return [[None if x != x else x for x in row] for row in values.tolist()]


def measure(models: Sequence[str], base: str, options: MergeOptions) -> Kinship:
    """Compare models, reading each of them once, tensor by tensor.

    Args:
        models: Two or more model references, as recipes have them.
        base: The model that they were fine-tuned from.
        options: mergekit's options, which say how models are read.

    Raises:
        RecipeError: A model cannot be read, or the models have no tensor in common.
        UnscorableError: A weight is not a finite number.
    """
    if len(models) < 2:
        raise RecipeError("kinship is between models: name two or more")
    if len(set(models)) < len(models) or base in models:
        twice = next(m for m in (*models, base) if [*models, base].count(m) > 1)
        raise RecipeError(f"model {twice}: is named twice; name each model once, and not the base")
    if line := written_in_two_ways([*models, base]):
        raise RecipeError(line)
    found = Kinship(base, list(models), Moments.zero(len(models)))
    start, *experts = (
        StreamingReader(_open(model, options), of=len(models) + 1) for model in (base, *models)
    )
    names = start.loader.index.tensor_paths
    # Every block is one small matrix product. Two threads took ten times as long over it as one.
    with one_thread():
        for name in tqdm(names, desc="Comparing", unit="tensor", disable=options.quiet):
            weight = start.load(name)
            own = [
                expert.load(name) if name in expert.loader.index.tensor_paths else None
                for expert in experts
            ]
            reason = _incomparable(weight, own, models)
            if reason:
                found.skipped[name] = reason
                continue
            try:
                part = moments([tensor for tensor in own if tensor is not None], weight)
            except UnscorableError as error:
                raise UnscorableError(
                    f"tensor {name}: {error.message} in one of {base}, {', '.join(models)}; "
                    "download that checkpoint again"
                ) from error
            block = block_of(name)
            place = f"{block[0]}.{block[1]}" if block else "outside"
            found.layers[place] = found.layers.get(place, Moments.zero(len(models))) + part
            found.total += part
    if not found.total.count:
        first = next(iter(found.skipped.items()), ("", "it has no tensors"))
        raise RecipeError(
            f"{', '.join(models)} have no tensor in common with the base {base} "
            f"({': '.join(first)}): name the base that they were fine-tuned from"
        )
    return found


def _open(model: str, options: MergeOptions) -> LazyTensorLoader:
    _, loader = open_checkpoint(ModelReference.parse(model), options)
    _, faults = read_headers(loader.index)
    if faults:
        raise CheckpointError(f"model {model}: {'; '.join(faults)}")
    return loader


def _incomparable(
    weight: torch.Tensor, own: Sequence[torch.Tensor | None], models: Sequence[str]
) -> str | None:
    """Return why a tensor is left out; None if all models have it, in the base's shape."""
    if not weight.is_floating_point():
        return "it holds no weights"
    for model, tensor in zip(models, own, strict=True):
        if tensor is None:
            return f"{model} has none of that name"
        if tensor.shape != weight.shape:
            return f"{model}'s is {list(tensor.shape)}, the base's {list(weight.shape)}"
    return None
