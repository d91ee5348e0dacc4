"""The stored saliency of one expert's tensor, as the merge needs it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable, Mapping
from typing import Any

from mergekit.merge_methods.base import TensorEntry

from mergekit_obim.errors import SaliencyFileError
from mergekit_obim.kernels.scores import GivenScores, Saliency
from mergekit_obim.saliency.file import SaliencyFile
from mergekit_obim.saliency.locate import locate, open_saliency


def stored_scores(
    entry: TensorEntry, parameters: Mapping[str, Any]
) -> Saliency | GivenScores | None:
    """What the expert's saliency file holds for a planned tensor; None if it has no entry."""
    name = parameters["tensor_name"][entry.id]
    file = saliency_of(entry.id, parameters["saliency"][entry.id])
    if name is None or name not in file:
        return None
    values = file[name]
    rows = parameters["vocabulary_rows"][entry.id]
    if rows is not None:
        values = rows.apply(values)
    check_shape(file, name, tuple(values.shape), tuple(entry.tensor.shape), entry.id)
    values = values.to(entry.tensor.device)
    return GivenScores(values) if file.metadata.form == "dense" else Saliency(values)


def saliency_of(model: Hashable, setting: str | None) -> SaliencyFile:
    """The saliency file of an expert, checked whole when it is first opened."""
    try:
        return open_saliency(_locate(setting, str(model)))
    except SaliencyFileError as error:
        raise SaliencyFileError(f"model {model}: {error.message}") from error


@functools.cache
def _locate(setting: str | None, model: str) -> Any:
    tasks = sys.modules.get("mergekit.io.tasks")
    cache_dir = tasks.LoaderCache().hf_cache_dir if tasks else None
    return locate(setting, model, cache_dir=cache_dir)


def check_shape(
    file: SaliencyFile,
    name: str,
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    model: Hashable,
) -> None:
    """Refuse an entry that does not fit the weight it is said to score."""
    if file.metadata.form == "dense":
        fits = shape == weight
    else:
        fits = len(shape) <= len(weight) and all(
            size in (1, full) for size, full in zip(reversed(shape), reversed(weight), strict=False)
        )
    if not fits:
        rule = (
            "must have the shape of" if file.metadata.form == "dense" else "must broadcast against"
        )
        raise SaliencyFileError(
            f"{file.path}: the {file.metadata.form} saliency of {name}, {list(shape)}, {rule} "
            f"the weight of model {model}, {list(weight)}; was it measured on this model?"
        )
