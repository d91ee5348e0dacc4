"""Recognising a weight by where it lies in memory: its storage, offset and strides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Weight(NamedTuple):
    """Where a parameter, or a tensor equal to it plus a constant, lies within its storage."""

    name: str
    shape: torch.Size  # the parameter's
    offset: int
    layout: tuple[tuple[int, int], ...]  # (size, stride) of each dim
    axes: tuple[int | None, ...] | None  # the parameter's dim behind each dim; None: opaque

    def view(self, tensor: Tensor) -> View | None:
        """What the tensor shows of it; None if it shows nothing."""
        at, layout = offset_of(tensor), layout_of(tensor)
        start, stop = _extent(at, layout)
        first, last = _extent(self.offset, self.layout)
        if start >= last or first >= stop:
            return None
        axes = None
        if self.axes is not None and at == self.offset:
            axes = _match(layout, self.layout, self.axes)
        return View(self, axes)


class View(NamedTuple):
    """A tensor that shows a whole weight (axes) or only a part or function of it (None).

    Dims of size one and expanded dims have no axis: (1, 0) for Wᵀ, (None, 0) for γ[None].
    """

    weight: Weight
    axes: tuple[int | None, ...] | None


def weight_at(
    name: str, shape: torch.Size, tensor: Tensor, axes: tuple[int | None, ...] | None
) -> Weight:
    """The weight of that name, lying where the tensor does."""
    return Weight(name, shape, offset_of(tensor), layout_of(tensor), axes)


def _match(
    found: Iterable[tuple[int, int]],
    layout: Iterable[tuple[int, int]],
    axes: Iterable[int | None],
) -> tuple[int | None, ...] | None:
    """The axis behind each of the found dims, if they are all of the layout's."""
    left = {at: axis for at, axis in zip(layout, axes, strict=True) if at[0] > 1}
    matched = []
    for at in found:
        real = at[0] > 1 and at[1] > 0
        if real and at not in left:
            return None
        matched.append(left.pop(at) if real else None)
    return None if left else tuple(matched)


def _extent(offset: int, layout: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """First element and one past the last, within the storage."""
    return offset, offset + 1 + sum((size - 1) * stride for size, stride in layout)


def offset_of(tensor: Tensor) -> int:
    return int(tensor.storage_offset())


def layout_of(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """(size, stride) of each dim."""
    return tuple(zip(tensor.shape, tensor.stride(), strict=True))


def storage_of(tensor: Tensor) -> int:
    """The storage's identity. It is unique while a StorageWeakRef, or a tensor, holds it."""
    return int(tensor.untyped_storage()._cdata)


def reference(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def expired(reference: StorageWeakRef) -> bool:
    return bool(reference.expired())


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Every strided tensor among the values, also within lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
