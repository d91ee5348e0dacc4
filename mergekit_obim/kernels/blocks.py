"""Walking over tensors of one shape in cache-sized parts, whatever their strides.

Merging is bound by memory: each weight is read once and a few operations are done on it. A chain
of operations on whole tensors would write every intermediate result to main memory and read it
back; on blocks that fit the caches it reads each input once and writes each output once.

Nothing here depends on how the parts are cut: a kernel that uses it gives the same bits for
every block size.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# Elements in a block: a few float32 temporaries of 1 MiB each stay within a core's L2 cache. With
# fewer elements the calls take longer than the work.
CPU_BLOCK = 1 << 18
# A GPU keeps nothing in a cache between launches; it wants few, large ones.
DEVICE_BLOCK = 1 << 25
# Of rows that are multiplied by a matrix: with fewer at a time, that would be most of what is read.
_FEWEST_ROWS = 32
_TIMES_BY_SQUARE = 4  # blocks at once, where each is multiplied by a matrix of d × d


@dataclass(frozen=True)
class Block:
    """A run of elements that follow each other in flat (row-major) order.

    Attributes:
        index: ``tensor[index]`` is the block, always a view and never a copy.
        start: The flat index of its first element.
    """

    index: tuple[int | slice | None, ...]
    start: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the block of a tensor, as a view whose own flat order is the tensor's."""
        return tensor[self.index]

    def positions(self, shape: torch.Size, device: torch.device) -> torch.Tensor:
        """Return the flat indices of the block's elements.

        Args:
            shape: The whole tensor's shape.
            device: Where the result is to be.

        Returns:
            int64, of the block's shape.
        """
        # Indexing a meta tensor gives the block's shape without any memory.
        like = torch.empty((), device="meta").expand(shape)[self.index]
        return torch.arange(self.start, self.start + like.numel(), device=device).view(like.shape)


@dataclass(frozen=True)
class Positions:
    """Scattered elements of a tensor.

    Attributes:
        flat: Their flat indices, int64 [n].
    """

    flat: torch.Tensor

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of the elements of a tensor at these positions, [n]."""
        if tensor.is_contiguous():
            return tensor.view(-1).index_select(0, self.flat)
        # `reshape(-1)` would copy the whole tensor, and an h that is expanded to the weight's
        # shape would become as large as the weight. So flat indices are turned into places in
        # memory, axis by axis from the last, and those are selected.
        places, flat, last = torch.zeros_like(self.flat), self.flat, 0
        for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            places += flat % size * stride
            flat = flat // size
            last += (size - 1) * stride
        return tensor.as_strided((last + 1,), (1,)).index_select(0, places)

    def positions(self, shape: torch.Size, device: torch.device) -> torch.Tensor:
        """Return the flat indices themselves, int64 [n]."""
        return self.flat


Part = Block | Positions


def blocks(shape: torch.Size, device: torch.device, limit: int | None = None) -> Iterator[Block]:
    """Cut a shape into blocks, in flat order.

    Leading axes are walked one index at a time until what is left of the tensor is small
    enough to be cut along its first axis, so a block is always a plain view.

    Args:
        shape: Of the tensors to walk over; one with no elements has no blocks.
        device: Where they are, which decides the usual size of a block.
        limit: The most elements in a block, instead of the usual number; a last axis that is
            longer is cut too.

    Yields:
        Blocks that together cover every element once.
    """
    limit = limit or (CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK)
    if 0 in shape:
        return
    axis = 0
    while axis < len(shape) - 1 and math.prod(shape[axis + 1 :]) > limit:
        axis += 1
    row = math.prod(shape[axis + 1 :])
    if not shape:
        yield Block((None,), 0)  # adds an axis: numpy makes a scalar of an array without one
        return
    step = max(1, limit // row)
    start = 0
    for flat in range(math.prod(shape[:axis])):
        leading: list[int] = []
        for size in reversed(shape[:axis]):
            flat, index = divmod(flat, size)
            leading.insert(0, index)
        for first in range(0, shape[axis], step):
            last = min(first + step, shape[axis])
            yield Block((*leading, slice(first, last)), start)
            start += (last - first) * row


def row_blocks(matrix: torch.Tensor, *, by_square: bool = False) -> Iterator[slice]:
    """Cut a matrix into blocks of whole rows, for what multiplies them by another matrix.

    Args:
        matrix: [rows, columns], of any strides.
        by_square: Whether that has as many columns as rows: it is large, so blocks are, too.

    Yields:
        Slices of rows that together cover each once.
    """
    rows, width = matrix.shape
    limit = CPU_BLOCK if matrix.device.type == "cpu" else DEVICE_BLOCK
    limit *= _TIMES_BY_SQUARE if by_square else 1
    step = max(_FEWEST_ROWS, limit // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class _Kept(threading.local):
    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype], torch.Tensor] = {}


_KEPT = _Kept()


def scratch(name: str, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return memory for what does not outlive a block.

    On a CPU it is this thread's own, and the same each time for a name and dtype: whoever asks
    next for that name overwrites it. Fresh memory from the system costs more than what is done
    in it, as every page of it has to be mapped and zeroed. A GPU's allocator keeps memory by
    itself.

    Args:
        name: What it is for; names that are in use at the same time must differ.
        size: How many elements.
        dtype: Of the elements.
        device: Where.

    Returns:
        [size], contiguous; its contents are arbitrary.
    """
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    kept = _KEPT.memory.get((name, dtype))
    if kept is None or len(kept) < size:
        kept = torch.empty(max(size, CPU_BLOCK), dtype=dtype, device=device)
        _KEPT.memory[name, dtype] = kept
    return kept[:size]


def scratch_like(name: str, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return :func:`scratch` memory in the shape and the order of dims of a matrix.

    Laid out as the matrix is, so that neither copying nor multiplying goes across memory.

    Args:
        name: What it is for.
        matrix: [rows, columns], contiguous or the transpose of what is.
        dtype: Of the elements.

    Returns:
        Of the matrix's shape; its contents are arbitrary.
    """
    kept = scratch(name, matrix.numel(), dtype, matrix.device)
    if matrix.stride(0) < matrix.stride(1):
        return kept.view(matrix.shape[::-1]).T
    return kept.view(matrix.shape)


_LOCK = threading.Lock()
_INSIDE: Counter[int] = Counter()  # thread -> how many uses of `one_thread` it is within
_before = 1  # how many threads torch had when the first of them began


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch's operations on a CPU to the calling thread, as every merge does.

    Shared by two threads, operations on a block gained next to nothing, and took ten times
    as long wherever another process used the cores: each half waits for the slower one.
    Uses may be nested, and may overlap in several threads; after the last of them torch has as
    many threads as before the first.
    """
    global _before
    thread = threading.get_ident()
    with _LOCK:
        # torch has this number for each thread, which begins with what any thread set last, as
        # soon as it asks: with the 1 of others that are in here. So it is asked in each, before it
        # is set, and what the first of them was told is what all restore.
        found = torch.get_num_threads()
        _before = _before if _INSIDE else found
        _INSIDE[thread] += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE[thread] -= 1
            if not _INSIDE[thread]:
                del _INSIDE[thread]
                torch.set_num_threads(_before)
