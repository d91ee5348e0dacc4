"""Reading a checkpoint's tensors, also one after another to look at a few values of each."""

from __future__ import annotations

import torch
from mergekit.io import LazyTensorLoader

# The pages of a safetensors file that were touched count as the process's memory while it is open.
_MAPPED_BYTES = 2**26


def tensor_of(loader: LazyTensorLoader, name: str) -> torch.Tensor:
    """A tensor that the checkpoint is known to have.

    Raises:
        KeyError: It has not.
    """
    tensor = loader.get_tensor(name)
    assert tensor is not None  # it raises before
    return tensor


class Skim:
    """Lets go of a checkpoint's file whenever its share of 64 MiB was read.

    Args:
        loader: The checkpoint. Files that are not safetensors are kept until the end: they are
            loaded whole, and would be again.
        of: How many checkpoints are read side by side.
    """

    def __init__(self, loader: LazyTensorLoader, of: int = 1) -> None:
        self.loader = loader
        self._limit = _MAPPED_BYTES // of
        self._mapped = 0

    def load(self, name: str) -> torch.Tensor:
        if self._mapped > self._limit and self.loader.index.tensor_paths[name].endswith("tensors"):
            self.close()
        tensor = tensor_of(self.loader, name)
        self._mapped += tensor.nbytes
        return tensor

    def close(self) -> None:
        self.loader.flush()
        self._mapped = 0
