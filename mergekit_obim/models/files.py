"""The weight files of a checkpoint: their headers, and what keeps them from being read.

Nothing but headers is read here, so a whole checkpoint of hundreds of shards takes milliseconds
(``.bin`` files a little more: their tensors are mapped, not loaded).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from mergekit.io.lazy_tensor_loader import ShardedTensorIndex
from safetensors import SafetensorError, safe_open
from transformers.modeling_utils import str_to_torch_dtype

from mergekit_obim.errors import one_line
from mergekit_obim.models.faults import first_few

# A checkout without `git lfs pull` has such a text in place of every large file.
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorHeader:
    """What the header of a weight file says about one tensor.

    Attributes:
        dtype: As safetensors names it: ``BF16``, ``F8_E4M3``, ``I32``.
        shape: Its shape.
        file: The file that holds it, relative to the checkpoint's folder.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str


# What safetensors abbreviates; `.bin` files have torch's own dtypes.
_SHORT = {dtype: name for name, dtype in str_to_torch_dtype.items()}


def read_headers(index: ShardedTensorIndex) -> tuple[dict[str, TensorHeader], list[str]]:
    """Read the header of every file that a checkpoint's index names.

    Args:
        index: mergekit's index of the checkpoint.

    Returns:
        The headers of all tensors that the index lists and the files hold; and for every file
        that cannot be used a phrase that says why, and what to do.
    """
    headers: dict[str, TensorHeader] = {}
    faults = []
    for shard in index.shards:
        try:
            held = file_headers(Path(index.base_path, shard.filename), shard.filename)
        except UnreadableFileError as error:
            faults.append(str(error))
            continue
        missing = [name for name in shard.contained_keys if name not in held]
        if missing:
            faults.append(
                f"{shard.filename} does not hold {first_few(missing)}, which the index says it "
                "does: the index and the files are of two different models; get them from one place"
            )
        headers |= {name: held[name] for name in shard.contained_keys if name in held}
    return headers, faults


def why_unreadable(folder: Path, *names: str) -> list[str]:
    """Return what is wrong with the weight files of a folder that mergekit cannot open.

    Args:
        folder: The folder.
        names: The files to look at beside those that mergekit looks for itself.
    """
    faults = []
    for name in ("model.safetensors", "pytorch_model.bin", *names):
        path = folder / name
        if path.is_symlink() or path.is_file():
            try:
                file_headers(path, name)
            except UnreadableFileError as error:
                faults.append(str(error))
    return faults


class UnreadableFileError(Exception):
    """A weight file cannot be used; the message says why, and what to do."""


def file_headers(path: Path, name: str) -> Mapping[str, TensorHeader]:
    """Read the headers of all tensors in one weight file, ``.safetensors`` or ``.bin``.

    Args:
        path: The file.
        name: What to call it in messages, and in the headers.

    Raises:
        UnreadableFileError: The file is missing, cut short, or only a Git LFS pointer.
    """
    again = "get the file again"
    if not path.is_file():
        single = path.with_name("model.safetensors")
        if single.is_file():
            # Left behind when the shards were joined; transformers reads the single file.
            again += f", or delete {single.name}.index.json to have {single.name} read"
        raise UnreadableFileError(f"{name} is missing; {again}")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UnreadableFileError(
                f"{name} is only a Git LFS pointer to the weights; run `git lfs pull` there"
            )
    try:
        return dict(_safetensors(path, name) if path.suffix == ".safetensors" else _bin(path, name))
    except Exception as error:  # torch.load raises whatever a broken pickle makes it raise
        kind = "safetensors" if isinstance(error, SafetensorError) else "weight"
        raise UnreadableFileError(
            f"{name} is not a whole {kind} file ({one_line(error)}); it may have been cut short: "
            f"{again}"
        ) from error


def _safetensors(path: Path, name: str) -> Iterator[tuple[str, TensorHeader]]:
    # Opening compares the file's size with what its header asks for.
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            part = file.get_slice(key)
            yield key, TensorHeader(part.get_dtype(), tuple(part.get_shape()), name)


def _bin(path: Path, name: str) -> Iterator[tuple[str, TensorHeader]]:
    try:
        state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except RuntimeError:  # a file of torch before 1.6 cannot be mapped
        state = torch.load(path, map_location="meta", weights_only=True)
    for key, tensor in state.get("state_dict", state).items():
        if isinstance(tensor, torch.Tensor):
            dtype = _SHORT.get(tensor.dtype, str(tensor.dtype))
            yield key, TensorHeader(dtype, tuple(tensor.shape), name)
