"""Model kinship (arXiv 2410.12613): how alike models are as fine-tunes of one base.

Measured on the task vectors of all tensors that the models have in common, tensor by tensor, in
float64 sums.
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

from mergekit_obim.errors import ObimError, RecipeError, UnscorableError, one_line
from mergekit_obim.kernels.kinship import Moments, moments
from mergekit_obim.models.adapters import merged
from mergekit_obim.models.checkpoint import tensor_of
from mergekit_obim.models.layers import block_of
from mergekit_obim.recipe.references import written_in_two_ways

# Files are let go of after so many bytes were read, as their pages count as this process's.
_OPEN_BYTES = 1 << 28


@dataclass
class Kinship:
    """How alike models are.

    Attributes:
        base: The base's reference.
        models: The models' references.
        total: Over all tensors that were compared.
        layers: By block, and ``outside`` for what is in none.
        skipped: Tensors of the base that were not compared, and why.
    """

    base: str
    models: list[str]
    total: Moments
    layers: dict[str, Moments] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self, *, layers: bool) -> dict[str, Any]:
        """In types that JSON has."""
        found = {
            "base": self.base,
            "models": self.models,
            "elements": int(self.total.count),
            **measures(self.total),
            "relative_size": matrix(self.total.relative_sizes()[None])[0],
            "skipped": self.skipped,
        }
        if layers:
            found["layers"] = {
                place: {"elements": int(part.count), **measures(part)}
                for place, part in self.layers.items()
            }
        return found


def measures(part: Moments) -> dict[str, list[list[float | None]]]:
    """The three measures of each two models."""
    return {
        "pearson": matrix(part.pearson()),
        "cosine": matrix(part.cosine()),
        "euclidean": matrix(part.euclidean()),
    }


def matrix(values: torch.Tensor) -> list[list[float | None]]:
    """A matrix for JSON, which has no NaN."""
    return [[None if x != x else x for x in row] for row in values.tolist()]


def measure(models: Sequence[str], base: str, options: MergeOptions) -> Kinship:
    """Read every model once.

    Args:
        models: Two or more references, as recipes have them.
        base: What they were fine-tuned from.
        options: mergekit's, on how models are read.

    Raises:
        RecipeError: A model cannot be read, or they have nothing in common.
        UnscorableError: A weight is not a finite number.
    """
    if len(models) < 2:
        raise RecipeError("kinship is between models: name two or more")
    if len(set(models)) < len(models) or base in models:
        twice = next(m for m in (*models, base) if [*models, base].count(m) > 1)
        raise RecipeError(
            f"model {twice}: is named twice; name each model once, and the base apart"
        )
    if line := written_in_two_ways([*models, base]):
        raise RecipeError(line)
    start = _open(base, options)
    experts = [_open(model, options) for model in models]
    found = Kinship(base, list(models), Moments.zero(len(models)))
    read = 0
    for name in tqdm(
        start.index.tensor_paths, desc="Comparing", unit="tensor", disable=options.quiet
    ):
        weight = tensor_of(start, name)
        own = [
            tensor_of(expert, name) if name in expert.index.tensor_paths else None
            for expert in experts
        ]
        reason = _incomparable(weight, own, models)
        if reason:
            found.skipped[name] = reason
            continue
        tensors = [tensor for tensor in own if tensor is not None]
        try:
            part = moments(tensors, weight)
        except UnscorableError as error:
            raise UnscorableError(
                f"tensor {name}: {error.message} in one of {base}, {', '.join(models)}; get a "
                "sound copy of that checkpoint"
            ) from error
        block = block_of(name)
        place = f"{block[0]}.{block[1]}" if block else "outside"
        found.layers[place] = found.layers.get(place, Moments.zero(len(models))) + part
        found.total += part
        read += weight.nbytes * (len(models) + 1)
        if read >= _OPEN_BYTES:
            for loader in (start, *experts):
                loader.flush()
            read = 0
    if not found.total.count:
        first = next(iter(found.skipped.items()), ("", "it has no tensors"))
        raise RecipeError(
            f"{', '.join(models)} have no tensor in common with the base {base} "
            f"({': '.join(first)}): name the base that they were fine-tuned from"
        )
    return found


def _open(model: str, options: MergeOptions) -> LazyTensorLoader:
    try:
        reference = merged(
            ModelReference.parse(model), options.lora_merge_cache, options.trust_remote_code
        )
        return reference.lazy_loader(cache_dir=options.transformers_cache, lazy_unpickle=False)
    except ObimError:
        raise
    except Exception as error:  # mergekit and the Hub raise many kinds
        raise RecipeError(
            f"model {model}: cannot be read: {one_line(error)}; write a folder or a Hugging Face "
            "name"
        ) from error


def _incomparable(
    weight: torch.Tensor, own: Sequence[torch.Tensor | None], models: Sequence[str]
) -> str | None:
    """Why a tensor is left out, if it is."""
    if not weight.is_floating_point():
        return "it holds no weights"
    for model, tensor in zip(models, own, strict=True):
        if tensor is None:
            return f"{model} has none of that name"
        if tensor.shape != weight.shape:
            return f"{model}'s is {list(tensor.shape)}, the base's {list(weight.shape)}"
    return None
