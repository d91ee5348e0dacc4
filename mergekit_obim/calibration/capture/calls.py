"""What a handler is given, one aten operation, and what it gives back."""

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
    """What one operation adds to a weight's h.

    Attributes:
        weight: The weight that was used.
        row: The kind of use, after the rows of the package's table: kinds have their own counts.
        total: The sum of squares, float32 or float64, which broadcasts against the weight (or
            against one expert's entry of it).
        rows: How many rows it is the sum over; of all experts of a fused weight int64 [experts].
        expert: The only expert that this is about, if it is one.
        products: Of a linear layer, where a sketch is measured, computes Σ x (xᵀΩ), [in, r] or
            [experts, in, r]. Weights that see one input share the memory of `total`.
    """

    weight: Weight
    row: str
    total: Tensor
    rows: int | Tensor
    expert: int | None = None
    products: Callable[[], Tensor] | None = None


@dataclass
class Lookup:
    """Rows that were looked up in an embedding, until it is seen at what scale they are used.

    Attributes:
        weight: The embedding's.
        counts: How often each row was looked up, int64 [vocab].
        rows: How many look-ups that are.
        scale: The factor at which they were counted; None before that.
    """

    weight: Weight
    counts: Tensor
    rows: int
    scale: float | None = None


@dataclass
class Call:
    """One aten operation, with the views of weights among its arguments.

    Attributes:
        op: The operation, a torch OpOverloadPacket such as ``aten.mm``.
        args, kwargs: Its arguments.
        out: Its result.
        views: By the id of an argument, the weights that it shows.
        lookups: Arguments that are rows of an embedding, with the scale that they have so far.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    views: dict[int, list[View]] = field(default_factory=dict)
    lookups: list[tuple[Tensor, Lookup, float]] = field(default_factory=list)

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor among the arguments."""
        return tensors_in((*self.args, *self.kwargs.values()))

    def view(self, tensor: object, *, expert: bool = False) -> View | None:
        """Return the weight that an argument shows whole, if it shows one and nothing else.

        Args:
            tensor: An argument of the operation.
            expert: Whether one expert's entry of a fused weight counts as well.
        """
        # Weights that share memory show in the same tensor: which of them is meant, nobody knows.
        views = self.views.get(id(tensor), [])
        if len(views) != 1 or views[0].axes is None:
            return None
        return views[0] if expert or views[0].expert is None else None

    def is_data(self, value: object) -> bool:
        """Return whether an argument is a real tensor that shows no weight: an activation."""
        return isinstance(value, Tensor) and id(value) not in self.views and not value.is_complex()

    def pair(
        self, a: object, b: object, *, expert: bool = False
    ) -> tuple[View, Tensor, bool] | None:
        """Tell weight and activations apart among two arguments.

        Returns:
            The weight, the activations, and whether the weight is on the right; None if not
            exactly one of the two is a weight.
        """
        left, right = self.view(a, expert=expert), self.view(b, expert=expert)
        if right is not None and isinstance(a, Tensor) and self.is_data(a):
            return right, a, True
        if left is not None and isinstance(b, Tensor) and self.is_data(b):
            return left, b, False
        return None


Handler = Callable[[Squares, Call], Iterator["Use | Lookup"]]
