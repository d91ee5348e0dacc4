"""One expert's saliency in memory, and the files that it is read from and written to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from mergekit_obim.api.arguments import PathLike
from mergekit_obim.errors import SaliencyFileError, told_as
from mergekit_obim.recipe.faults import nearest
from mergekit_obim.saliency import file as saliency_file
from mergekit_obim.saliency.file import SaliencyFile, SaliencyMetadata


@dataclass(frozen=True, eq=False, repr=False)
class ExpertSaliency(Mapping[str, Tensor]):
    """The saliency of one expert: a mapping from the name of each scored weight to its scores.

    Attributes:
        tensors: Per weight, h (the mean square of its input, which broadcasts against the
            weight) or in dense form δ²·h (of the weight's own shape); float32, on the CPU.
        metadata: What a saliency file says beside that: the model, what it was measured on,
            which weights are unscored and why.
        products: The entries of the file that ``metadata.gram`` names: sketches of the layers'
            Gram matrices, or the matrices.

    Example:
        >>> import torch
        >>> from mergekit_obim.api import ExpertSaliency
        >>> from mergekit_obim.saliency.file import SaliencyMetadata
        >>> metadata = SaliencyMetadata(form="factored", model="./math")
        >>> ExpertSaliency({"layer.weight": torch.ones(1, 4)}, metadata)
        <saliency of ./math: 1 tensor, factored>
    """

    tensors: Mapping[str, Tensor]
    metadata: SaliencyMetadata
    products: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        left = len(self.metadata.unscored)
        return (
            f"<saliency of {self.metadata.model}: {len(self)} tensor{'s' * (len(self) != 1)}, "
            f"{self.metadata.form}{f', {left} unscored' if left else ''}>"
        )


def read_saliency(path: PathLike) -> ExpertSaliency:
    """Read a saliency file whole into memory, and check every value of it.

    Args:
        path: The file, as ``obim-saliency``, :func:`write_saliency` or another tool wrote it. A
            dense file is as large as the model: :func:`merge` also takes its path.

    Raises:
        SaliencyNotFoundError: There is no such file.
        SaliencyFileError: It is not what format 1 asks for; the message says in what.

    Example:
        >>> import mergekit_obim, tempfile, torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> scores = {"layer.weight": torch.tensor([[1.0, 4.0, 0.0, 2.0]])}
        >>> path = mergekit_obim.write_saliency(
        ...     f"{folder.name}/math.safetensors", scores, model="./math"
        ... )
        >>> saliency = mergekit_obim.read_saliency(path)
        >>> saliency["layer.weight"]
        tensor([[1., 4., 0., 2.]])
        >>> saliency.metadata.model
        './math'
        >>> folder.cleanup()
    """
    file = SaliencyFile(path)
    file.check_values()
    # Copies, as what the file maps must not be written to.
    products = file.metadata.gram.entries if file.metadata.gram else ()
    return ExpertSaliency(
        {name: file[name].clone() for name in file.shapes},
        file.metadata,
        {name: file[name].clone() for name in products},
    )


def write_saliency(path: PathLike, tensors: Mapping[str, Tensor], **metadata: Any) -> Path:
    """Write a saliency file, whole or not at all, from measured scores or from your own.

    Args:
        path: Where to write, named ``….safetensors``; its folder is made if needed.
        tensors: What :func:`measure` returned, or scores of your own: per weight a tensor that
            is finite, not negative, and broadcasts against the weight (``form="factored"``, h) or
            has its shape (``form="dense"``, δ²·h or any other score).
        metadata: The keys of the file's metadata by name (``docs/saliency_format.md`` lists
            them). They replace those of what was measured; scores of your own need ``model``.

    Returns:
        The path.

    Raises:
        SaliencyFileError: The model is not named, a key is not known, or a tensor is not what a
            saliency is; nothing is written then.

    Example:
        >>> import mergekit_obim, tempfile, torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> fisher = {"layer.weight": torch.rand(2, 4)}  # one score for each element
        >>> path = mergekit_obim.write_saliency(
        ...     f"{folder.name}/math.safetensors", fisher, model="./math", form="dense"
        ... )
        >>> path.name
        'math.safetensors'
        >>> folder.cleanup()
    """
    path = Path(path)
    for key in metadata:
        if key not in SaliencyMetadata.model_fields:
            near = nearest(key, SaliencyMetadata.model_fields)
            hint = f"did you mean {near!r}?" if near else "docs/saliency_format.md lists them"
            raise SaliencyFileError(f"{path}: unknown metadata key {key!r} ({hint})")
    known = tensors.metadata.model_dump() if isinstance(tensors, ExpertSaliency) else {}
    if "model" not in {**known, **metadata}:
        raise SaliencyFileError(f"{path}: say which model was scored: model='…'")
    try:
        header = SaliencyMetadata.model_validate({"form": "factored", **known, **metadata})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SaliencyFileError(f"{path}: metadata {place}: {first['msg']}") from error
    entries = dict(tensors)
    if isinstance(tensors, ExpertSaliency):
        entries |= tensors.products
    shapes = {name: tuple(tensor.shape) for name, tensor in entries.items()}
    with told_as(SaliencyFileError, f"{path}: cannot be written", OSError):
        saliency_file.write_saliency(path, shapes, entries.__getitem__, header)
    return path
