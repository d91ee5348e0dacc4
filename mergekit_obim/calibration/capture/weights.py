"""Recognising a weight by where it lies in memory: its storage, offset and strides.

A tensor object says nothing, since each ``W.t()`` and each slice is a new one. Its storage, its
offset there, and the size and stride of each dim say exactly which elements it shows, and in which
order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Weight(NamedTuple):
    """Where a parameter, or a tensor equal to it plus a constant, lies within its storage.

    Attributes:
        name: The parameter's.
        shape: The parameter's.
        offset: The index of its first element in the storage.
        layout: The size and stride, in elements, of each dim.
        axes: The parameter's dim behind each dim, or None for a dim of size one; None for all of
            what is made of the parameter and is not equal to it.
        per_expert: Whether it holds a weight or bias per expert, along its dim 0.
    """

    name: str
    shape: torch.Size
    offset: int
    layout: tuple[tuple[int, int], ...]
    axes: tuple[int | None, ...] | None
    per_expert: bool = False

    def moved(self, tensor: Tensor, axes: tuple[int | None, ...] | None) -> Weight:
        """Return the same weight as it lies in a tensor, whose dims are these axes of it."""
        return self._replace(offset=offset_of(tensor), layout=layout_of(tensor), axes=axes)

    def view(self, tensor: Tensor) -> View | None:
        """Return what a tensor of the same storage shows of it; None if it shows nothing."""
        at, layout = offset_of(tensor), layout_of(tensor)
        start, stop = _extent(at, layout)
        first, last = _extent(self.offset, self.layout)
        if start >= last or first >= stop:
            return None  # elsewhere in the storage, which several parameters may share
        if self.axes is None:
            return View(self, None)
        if at == self.offset and (axes := _match(layout, self.layout, self.axes)) is not None:
            return View(self, axes)
        # It overlaps the weight but is not the whole of it: better no score than a wrong one.
        return self._entry(at, layout) or View(self, None)

    def _entry(self, at: int, layout: tuple[tuple[int, int], ...]) -> View | None:
        """Return the view of one expert's weight, if the layout is that of one."""
        if not self.per_expert or self.axes is None or 0 not in self.axes:
            return None
        # W[e] begins e strides of dim 0 further on, and its other dims are those of W.
        first = self.axes.index(0)
        experts, stride = self.layout[first]
        expert, beside = divmod(at - self.offset, stride)
        if beside or not 0 <= expert < experts:
            return None
        rest = [(own, axis) for own, axis in zip(self.layout, self.axes, strict=True) if axis != 0]
        axes = _match(layout, [own for own, _ in rest], [axis for _, axis in rest])
        return None if axes is None else View(self, axes, expert)


class View(NamedTuple):
    """What a tensor shows of a weight: all of it, one expert's entry, or something else.

    Attributes:
        weight: The weight.
        axes: The weight's dim behind each of the tensor's: (1, 0) for Wᵀ, (None, 0) for γ[None],
            (2, 1) for W[e]ᵀ. Dims of size one and expanded dims have none. None instead of all of
            them: only a part or a function of the weight.
        expert: The one whose entry of a fused weight it shows whole, if it is one.
    """

    weight: Weight
    axes: tuple[int | None, ...] | None
    expert: int | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of what it shows, in the parameter's order of dims."""
        return self.weight.shape if self.expert is None else self.weight.shape[1:]

    def spread(self, sizes: Mapping[int | None, int]) -> list[int]:
        """Return a shape that broadcasts against what it shows.

        Args:
            sizes: By the parameter's dim, its size in that shape; dims that are not named have 1.
        """
        shape = [sizes.get(axis, 1) for axis in range(len(self.weight.shape))]
        return shape if self.expert is None else shape[1:]


def _match(
    found: Iterable[tuple[int, int]],
    layout: Iterable[tuple[int, int]],
    axes: Iterable[int | None],
) -> tuple[int | None, ...] | None:
    """Return the axis behind each of the found dims, if they are all of the layout's."""
    # Dims of size one may have any stride and come and go with reshapes, so only others count.
    left = {at: axis for at, axis in zip(layout, axes, strict=True) if at[0] > 1}
    matched = []
    for at in found:
        real = at[0] > 1 and at[1] > 0  # a stride of 0 is an expanded dim
        if real and at not in left:
            return None
        matched.append(left.pop(at) if real else None)
    return None if left else tuple(matched)


def _extent(offset: int, layout: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the first element and one past the last, within the storage."""
    return offset, offset + 1 + sum((size - 1) * stride for size, stride in layout)


def offset_of(tensor: Tensor) -> int:
    """Return the index of a tensor's first element in its storage."""
    return int(tensor.storage_offset())


def layout_of(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """Return the size and stride of each dim."""
    return tuple(zip(tensor.shape, tensor.stride(), strict=True))


def storage_of(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage.

    It is an address, so it is unique only while a tensor or a :func:`reference` holds the storage:
    the next temporary may get the memory of the last.
    """
    return int(tensor.untyped_storage()._cdata)


def reference(tensor: Tensor) -> StorageWeakRef:
    """Return what keeps a storage's identity from being used again, but not its memory."""
    return StorageWeakRef(tensor.untyped_storage())


def expired(reference: StorageWeakRef) -> bool:
    """Return whether a storage has gone, so that nothing can show it any more."""
    return bool(reference.expired())


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield every strided tensor among values, also within lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
