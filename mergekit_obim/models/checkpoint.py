"""Reading a checkpoint's tensors, and the names under which mergekit looks for a weight there.

mergekit describes a weight by a ``WeightInfo``: its name in the architecture's definition, aliases
that older checkpoints use, and the names of the weights that it may be tied to.
"""

from __future__ import annotations

from pathlib import Path

import torch
from mergekit.architecture import WeightInfo
from mergekit.io import LazyTensorLoader

from mergekit_obim.errors import CheckpointError, quoted

# The pages of a safetensors file that were touched count as the process's memory while it is open.
_MAPPED_BYTES = 2**26


def tensor_of(loader: LazyTensorLoader, name: str) -> torch.Tensor:
    """Read a tensor that the checkpoint is known to have, lazily where its file allows that.

    Raises:
        KeyError: The checkpoint has no tensor of that name.
        CheckpointError: The tensor's file has gone, or is not what it was.
    """
    try:
        tensor = loader.get_tensor(name)
    except KeyError:
        raise
    except Exception as error:  # safetensors, torch and the system have kinds of their own
        file = Path(loader.index.base_path, loader.index.tensor_paths[name])
        raise CheckpointError(
            f"{file}: tensor {name} cannot be read: {quoted(error)}; get the file again"
        ) from error
    assert tensor is not None  # it raises before
    return tensor


def possible_names(info: WeightInfo) -> tuple[str, ...]:
    """Return the names that mergekit loads a weight by; the first that is stored counts."""
    return (info.name, *(info.aliases or ()), *(info.tied_names or ()))


def stored_name(loader: LazyTensorLoader, info: WeightInfo) -> str | None:
    """Return the name under which a checkpoint stores a weight, None if it does not store it."""
    paths = loader.index.tensor_paths
    return next((name for name in possible_names(info) if name in paths), None)


def scored_names(loader: LazyTensorLoader, info: WeightInfo) -> tuple[str, ...]:
    """Return the names to look a weight's saliency up by, in the order in which they count.

    A head that the checkpoint stores itself must not be ranked by the saliency of the embeddings,
    which it would otherwise be tied to.
    """
    tied = info.tied_names or ()
    stored = stored_name(loader, info)
    by_itself = stored is not None and stored not in tied
    return tuple(name for name in possible_names(info) if not (by_itself and name in tied))


class StreamingReader:
    """Reads a checkpoint's tensors one after another without keeping its files in memory.

    The file is closed, and opened again for the next tensor, whenever this checkpoint's share of
    64 MiB has been read. Files that are not safetensors stay open until the end: they are loaded
    whole, and would be loaded whole again.

    Args:
        loader: The checkpoint.
        of: How many checkpoints are read side by side, and share the 64 MiB.
    """

    def __init__(self, loader: LazyTensorLoader, of: int = 1) -> None:
        self.loader = loader
        self._limit = _MAPPED_BYTES // of
        self._mapped = 0

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor, which may still share memory with the open file."""
        if self._mapped > self._limit and self.loader.index.tensor_paths[name].endswith("tensors"):
            self.close()
        tensor = tensor_of(self.loader, name)
        self._mapped += tensor.nbytes
        return tensor

    def close(self) -> None:
        """Close the file that is open; the next tensor opens it again."""
        self.loader.flush()
        self._mapped = 0
