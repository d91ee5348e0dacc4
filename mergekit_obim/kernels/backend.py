"""The array library behind a tensor: numpy on a CPU, torch on other devices.

On one core torch compares into a mask, finds its positions and selects by it 4 to 20 times
slower than numpy: 1.1 ns against 0.1 an element for ``scores > x``, 5 against 0.4 for
bfloat16 ``where``. Operators and many functions are called the same in both, so most of a
kernel is written once, on what :func:`array` gives; here is what the two call differently.
Everything gives the same bits on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mergekit_obim.kernels.blocks import scratch

# What is only copied is seen as integers of its size; numpy does not know bfloat16 anyway.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Array = Any  # a numpy array for what is on a CPU, a tensor for what is elsewhere
Mask = Any  # the same, of bool


def _uses_numpy(device: torch.device) -> bool:
    return device.type == "cpu"


def namespace(device: torch.device) -> Any:
    """Return the library whose functions take what :func:`array` gives: numpy or torch."""
    return np if _uses_numpy(device) else torch


def array(tensor: torch.Tensor) -> Array:
    """Return the tensor as an operand: a numpy view of it on a CPU, itself elsewhere."""
    return tensor.numpy() if _uses_numpy(tensor.device) else tensor


def bits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the signed integer dtype that has a dtype's size."""
    return _INTEGERS[dtype.itemsize]


def bits(tensor: torch.Tensor) -> Array:
    """Return the tensor's bits as signed integers of its elements' size, without a copy."""
    return array(tensor.view(bits_dtype(tensor.dtype)))


def count_nonzero(mask: Mask) -> int:
    """Return how many positions of a mask are set."""
    return int(np.count_nonzero(mask) if isinstance(mask, np.ndarray) else mask.count_nonzero())


def all_finite(values: Array) -> bool:
    """Return whether no value is NaN or infinite."""
    return bool((np if isinstance(values, np.ndarray) else torch).isfinite(values).all())


def flatnonzero(mask: Mask) -> Array:
    """Return where a mask [n] is set, as rising int32 indices."""
    if not isinstance(mask, np.ndarray):
        return mask.nonzero().view(-1).int()
    if len(mask) % 8:
        return np.flatnonzero(mask).astype(np.int32)
    # Eight positions at a time first, seen as one int64: few are set, and so whole eights are
    # skipped in one comparison, which takes half the time of one by one.
    eights = mask.view(np.int64)
    some = np.flatnonzero(eights != 0).astype(np.int32)
    inside = np.flatnonzero(eights[some].view(np.bool_)).astype(np.int32)
    where = some[inside >> 3]  # the eight that each is in …
    where <<= 3
    inside &= 7  # … and its place in it
    where |= inside
    return where


def relabel(labels: Array, where: Mask, old: int, new: int) -> None:
    """Set ``labels[where] = new`` for uint8 labels that are all ``old`` there.

    Args:
        labels: uint8; changed in place.
        where: A mask of the same shape, which is used up.
        old: What the labels are where the mask is set.
        new: What they become.
    """
    # A bool is a byte of 0 or 1: times (old ^ new) it is what to flip, or nothing. Indexing by the
    # mask would branch at every position.
    changes = where.view(labels.dtype)
    changes *= old ^ new
    labels ^= changes


def label(labels: Array, where: Mask, new: int) -> None:
    """Set ``labels[where] = new`` for uint8 labels of any value, in place."""
    if not isinstance(where, np.ndarray):
        labels.masked_fill_(where, new)
        return
    changes = labels ^ np.uint8(new)
    changes *= where
    labels ^= changes


def select(target: torch.Tensor, value: torch.Tensor, where: Mask) -> None:
    """Set ``target[where] = value[where]``, in place and bit for bit.

    Args:
        target: Any dtype and strides.
        value: Of the same shape and dtype.
        where: A mask of the same shape.
    """
    if not isinstance(where, np.ndarray):
        torch.where(where, value, target, out=target)
        return
    into, source = bits(target), bits(value)
    # target ^ (target ^ source) · mask: the source's bits where the mask is, without a
    # branch, which a random mask would mispredict half of the time.
    memory = scratch("changes", target.numel(), bits_dtype(target.dtype), target.device)
    changes = np.bitwise_xor(into, source, out=array(memory.view(target.shape)))
    changes *= where
    into ^= changes


def sort_descending(values: torch.Tensor) -> torch.Tensor:
    """Return values [n] sorted, highest first."""
    if not _uses_numpy(values.device):
        return values.sort(descending=True).values
    return torch.from_numpy(np.sort(values.numpy())).flip(0)


def kth_largest(values: Sequence[Array], k: int) -> tuple[float, int]:
    """Find the k-th largest of all values, counted from 1.

    Args:
        values: Arrays [n] of one floating dtype, together at least k values.
        k: Which; 0 means none.

    Returns:
        The value, and by how many more than k values are at least that: ties at the threshold.
        For k = 0 infinity, and 0.
    """
    if k == 0:
        return float("inf"), 0
    every = torch.cat([torch.as_tensor(part) for part in values])
    if _uses_numpy(every.device):
        # numpy's partition is vectorised and works in place; torch's kthvalue copies and
        # took five times as long.
        array(every).partition(len(every) - k)
        threshold = float(every[len(every) - k])
    else:
        threshold = float(every.kthvalue(len(every) - k + 1).values)
    return threshold, count_nonzero(array(every) >= threshold) - k


def order_statistics(values: torch.Tensor, ranks: tuple[int, int]) -> tuple[float, float]:
    """Return the values [n] at two places of their ascending order.

    Args:
        values: Finite numbers; on a CPU they are reordered in place.
        ranks: The two places, counted from 0.
    """
    if _uses_numpy(values.device):
        array(values).partition(ranks)
    else:
        values = values.sort().values
    low, high = ranks
    return float(values[low]), float(values[high])


def bincount(digits: Array, size: int) -> Array:
    """Return how often each of 0 … size − 1 occurs among integers [n], int64 [size]."""
    if isinstance(digits, np.ndarray):
        return np.bincount(digits, minlength=size)
    return digits.bincount(minlength=size)
