"""Reading what an expert's saliency file holds for a tensor, in the form that the merge needs."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Hashable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.merge_methods.base import TensorEntry
from mergekit.options import MergeOptions

from mergekit_obim.errors import SaliencyFileError
from mergekit_obim.kernels.nystrom import nystrom_factor
from mergekit_obim.kernels.regmean_gram import Gram, Layers, input_last
from mergekit_obim.kernels.scores import GivenScores, Saliency
from mergekit_obim.saliency.file import SaliencyFile
from mergekit_obim.saliency.imatrix import SUFFIXES as IMATRIX_SUFFIXES
from mergekit_obim.saliency.locate import locate, open_saliency, state_of

LOG = logging.getLogger("mergekit_obim")
_LOCK = threading.Lock()


def stored_scores(
    entry: TensorEntry, parameters: Mapping[str, Any]
) -> Saliency | GivenScores | None:
    """Read the saliency of an expert's tensor from the expert's saliency file.

    Args:
        entry: The expert's tensor, as mergekit's planner gave it.
        parameters: The task's planned parameters: for each expert its tensor's name, its
            `saliency` setting and what becomes of the rows of its vocabulary.

    Returns:
        The saliency on the tensor's device: h, which broadcasts against the tensor, or δ²·h of
        the tensor's shape; None where the file has no entry for it.

    Raises:
        SaliencyNotFoundError: The expert has no saliency file.
        SaliencyFileError: The file is damaged, or its entry does not fit the tensor.
    """
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
    """Open the saliency file of an expert, whose values are all checked the first time.

    Args:
        model: The expert's reference.
        setting: The recipe's `saliency` for it; None where it sets none.

    Raises:
        SaliencyNotFoundError: There is no such file.
        SaliencyFileError: The file is damaged.
    """
    try:
        # The merge asks once for each tensor of each expert, and a look at the Hub takes a while.
        path = _locate(setting, str(model), os.getcwd())
        if path.suffix not in IMATRIX_SUFFIXES:
            return open_saliency(path)
        with _LOCK:  # merge methods are called from several threads
            return _imatrix_of(path, state_of(path), model)
    except SaliencyFileError as error:
        raise SaliencyFileError(f"model {model}: {error.message}") from error


@lru_cache(maxsize=64)
def _locate(setting: str | None, model: str, working_directory: str) -> Path:
    """Find an expert's file; both names may be paths relative to the working directory."""
    # mergekit's own cache for the Hub, if it is mergekit that runs: only then has it a cache.
    tasks = sys.modules.get("mergekit.io.tasks")
    cache_dir = tasks.LoaderCache().hf_cache_dir if tasks else None
    return locate(setting, model, cache_dir=cache_dir)


@lru_cache(maxsize=64)
def _imatrix_of(path: Path, state: tuple[int, ...] | None, model: Hashable) -> SaliencyFile:
    """Read an imatrix as an expert's saliency, with the warnings that go with it."""
    from mergekit.io.tasks import LoaderCache

    from mergekit_obim.models.imatrix import imatrix_saliency
    from mergekit_obim.models.opened import open_model

    if not isinstance(model, ModelReference):
        raise SaliencyFileError(
            f"{path}: an imatrix is only read for a model that is a folder or on the Hub: write a "
            "saliency file of it with `obim-saliency --from-imatrix`"
        )
    cache = LoaderCache()
    access = MergeOptions(
        transformers_cache=cache.hf_cache_dir,
        lora_merge_cache=cache.lora_cache_dir,
        trust_remote_code=cache.trust_remote_code,
    )
    place = Path(model.model.path)
    if place.is_file():  # one of mergekit-pytorch's, beside its configuration
        model = ModelReference(model=ModelPath(path=str(place.parent)))
    file = imatrix_saliency(path, open_model(model, access), access)
    for warning in file.warnings():
        LOG.warning(warning)
    return file


def check_shape(
    file: SaliencyFile,
    name: str,
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    model: Hashable,
) -> None:
    """Refuse an entry that does not fit the weight that it is said to score.

    Args:
        file: The expert's saliency file.
        name: The name of the entry.
        shape: The shape of the entry.
        weight: The shape of the expert's tensor.
        model: The expert's reference, for the message.

    Raises:
        SaliencyFileError: A dense entry has not the weight's shape, or a factored one does not
            broadcast against it.
    """
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


def has_gram(file: SaliencyFile, name: str) -> bool:
    """Return whether a file has a sketch or the whole of the Gram matrix of a weight's inputs."""
    gram = file.metadata.gram
    return gram is not None and name in gram.inputs


def input_axis(h: tuple[int, ...], weight: tuple[int, ...]) -> int | None:
    """Return the axis of a weight along which an h of input features runs.

    Args:
        h: The shape of an entry that broadcasts against the weight.
        weight: The weight's.

    Returns:
        −1 for [out, in] or [experts, out, in], −2 where the last two are swapped, and None where h
        does not run along one of them alone.
    """
    padded = (1,) * (len(weight) - len(h)) + h
    if len(weight) in (2, 3):
        for axis, other in ((-1, -2), (-2, -1)):
            if padded[axis] == weight[axis] and padded[other] == 1:
                return axis
    return None


def stored_layers(
    file: SaliencyFile, name: str, h: torch.Tensor, shape: torch.Size, axis: int
) -> Layers:
    """Return what a saliency file knows of the inputs of each layer that a weight holds.

    Args:
        file: The expert's saliency file.
        name: The weight's name there.
        h: Its entry.
        shape: The weight's.
        axis: The axis of its input features.

    Returns:
        Gives the Gram matrix of a layer, by its number: that of the expert in a mixture, else 0.
    """
    count = shape[0] if len(shape) == 3 else 1
    diagonals = input_last(h.expand(*shape[:-2], *h.shape[-2:]), axis)[:, 0]

    def stack(found: torch.Tensor) -> torch.Tensor:
        return found.expand(count, *found.shape[-2:])

    if not has_gram(file, name):
        return lambda index: Gram(diagonals[index])
    sketch = file.sketch(name)
    if sketch is not None and sketch.shape[-1] < shape[axis]:
        sketches = stack(sketch)
        return lambda index: Gram(
            diagonals[index], nystrom_factor(sketches[index], diagonals[index])
        )

    # Of a single layer the matrix is read when it is needed, and not kept; of a mixture all the
    # experts' are in one entry.
    @lru_cache(maxsize=int(count > 1))
    def matrices() -> torch.Tensor:
        whole = file.gram(name) if sketch is None else sketch  # with all columns, Ω is the identity
        assert whole is not None  # has_gram
        return stack(whole)

    return lambda index: Gram(diagonals[index], full=lambda: matrices()[index])


def known_inputs(
    model: Hashable, parameters: Mapping[str, Any], h: torch.Tensor, shape: torch.Size
) -> tuple[int, Layers, str] | None:
    """Return what an expert's saliency file knows of a weight's inputs beside h.

    Args:
        model: The expert's reference.
        parameters: The task's planned parameters.
        h: The weight's entry.
        shape: The weight's.

    Returns:
        The axis of the weight's input features, what is known of each layer's inputs, and
        whether that is a ``sketch`` of the Gram matrix or the ``gram`` matrix itself; None if it
        is h alone.
    """
    file = saliency_of(model, parameters["saliency"][model])
    name, gram = parameters["tensor_name"][model], file.metadata.gram
    axis = input_axis(tuple(h.shape), tuple(shape))
    if gram is None or name not in gram.inputs or axis is None:
        return None
    sketched = gram.columns != "full" and gram.columns < shape[axis]
    return axis, stored_layers(file, name, h, shape, axis), "sketch" if sketched else "gram"
