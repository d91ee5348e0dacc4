"""Recognising a weight by where it lies in memory: its storage, offset and strides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    per_expert: bool = False  # whether it holds a weight or bias per expert, along its dim 0

    def moved(self, tensor: Tensor, axes: tuple[int | None, ...] | None) -> Weight:
        """The same weight, lying where the tensor does."""
        return self._replace(offset=offset_of(tensor), layout=layout_of(tensor), axes=axes)

    def view(self, tensor: Tensor) -> View | None:
        """What the tensor shows of it; None if it shows nothing."""
        at, layout = offset_of(tensor), layout_of(tensor)
        start, stop = _extent(at, layout)
        first, last = _extent(self.offset, self.layout)
        if start >= last or first >= stop:
            return None
        if self.axes is None:
            return View(self, None)
        if at == self.offset and (axes := _match(layout, self.layout, self.axes)) is not None:
            return View(self, axes)
        return self._entry(at, layout) or View(self, None)

    def _entry(self, at: int, layout: tuple[tuple[int, int], ...]) -> View | None:
        """The view of one expert's weight, if it is one."""
        if not self.per_expert or self.axes is None or 0 not in self.axes:
            return None
        first = self.axes.index(0)
        experts, stride = self.layout[first]
        expert, beside = divmod(at - self.offset, stride)
        if beside or not 0 <= expert < experts:
            return None
        rest = [(own, axis) for own, axis in zip(self.layout, self.axes, strict=True) if axis != 0]
        axes = _match(layout, [own for own, _ in rest], [axis for _, axis in rest])
        return None if axes is None else View(self, axes, expert)


class View(NamedTuple):
    """A tensor that shows a whole weight (axes) or only a part or function of it (None).

    Dims of size one and expanded dims have no axis: (1, 0) for Wᵀ, (None, 0) for γ[None]. Where
    `expert` is set, it shows that one's entry of a fused weight whole: (2, 1) for W[e]ᵀ.
    """

    weight: Weight
    axes: tuple[int | None, ...] | None
    expert: int | None = None

    @property
    def shape(self) -> torch.Size:
        """Of what it shows, in the parameter's order of dims."""
        return self.weight.shape if self.expert is None else self.weight.shape[1:]

    def spread(self, sizes: Mapping[int | None, int]) -> list[int]:
        """A shape that broadcasts against what it shows: these sizes of the parameter's dims."""
        shape = [sizes.get(axis, 1) for axis in range(len(self.weight.shape))]
        return shape if self.expert is None else shape[1:]


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
