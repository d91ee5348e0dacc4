"""What the handlers are given, one aten operation, and what they give back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_obim.calibration.capture.squares import Squares
from mergekit_obim.calibration.capture.weights import View, Weight, tensors_in

aten = torch.ops.aten


class Use(NamedTuple):
    """What one operation adds to a weight's h: a sum of squares and how many rows it is over."""

    weight: Weight
    row: str  # of the table, so that terms of different kinds keep their own counts
    total: Tensor  # broadcasts against the weight, or against one expert's
    rows: int | Tensor  # of a whole fused weight: int64 [experts]
    expert: int | None = None  # the only one that this is about


@dataclass
class Lookup:
    """Rows that were looked up in an embedding, until it is seen at what scale they are used."""

    weight: Weight
    counts: Tensor  # int64 [vocab]
    rows: int
    scale: float | None = None  # at which they were counted


@dataclass
class Call:
    """One aten operation, with the views of weights among its arguments."""

    op: Any  # the OpOverloadPacket
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    views: dict[int, list[View]] = field(default_factory=dict)  # id of the argument -> views
    lookups: list[tuple[Tensor, Lookup, float]] = field(default_factory=list)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor among the arguments."""
        return tensors_in((*self.args, *self.kwargs.values()))

    def view(self, tensor: object, *, expert: bool = False) -> View | None:
        """The one whole weight, or also one `expert`'s, that this argument shows, if it does."""
        views = self.views.get(id(tensor), [])
        if len(views) != 1 or views[0].axes is None:
            return None
        return views[0] if expert or views[0].expert is None else None

    def is_data(self, value: object) -> bool:
        return isinstance(value, Tensor) and id(value) not in self.views and not value.is_complex()

    def pair(
        self, a: object, b: object, *, expert: bool = False
    ) -> tuple[View, Tensor, bool] | None:
        """(weight, data, weight is on the right), if exactly one of the two is a weight."""
        left, right = self.view(a, expert=expert), self.view(b, expert=expert)
        if right is not None and isinstance(a, Tensor) and self.is_data(a):
            return right, a, True
        if left is not None and isinstance(b, Tensor) and self.is_data(b):
            return left, b, False
        return None


Handler = Callable[[Squares, Call], Iterator["Use | Lookup"]]
