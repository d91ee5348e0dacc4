"""Adding up what the operations of a run say of one weight, and the mean of it: h."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_obim.calibration.capture.calls import Use

# An expert that saw fewer rows than this takes the mean over all of its layer's. A mean of n
# squares is off by about √(2/n): by a quarter at 32, while features differ by factors.
FEWEST_ROWS = 32


@dataclass
class Term:
    """The sum over every operation of one kind.

    Attributes:
        total: Float64, broadcasts against the weight. Of a weight that is used expert by
            expert, its first dim are the experts.
        rows: How many rows it is the sum over; int64 [experts] where each has its own.
    """

    total: Tensor
    rows: int | Tensor

    @classmethod
    def like(cls, use: Use) -> Term:
        """A term that such uses can be added to."""
        # Metal has no float64; its sums of float32 stay float32.
        dtype = torch.float32 if use.total.device.type == "mps" else torch.float64
        shape = list(use.total.shape)
        if use.expert is not None:
            shape.insert(0, use.weight.shape[0])
        total = torch.zeros(shape, dtype=dtype, device=use.total.device)
        if use.expert is None and not isinstance(use.rows, Tensor):
            return cls(total, 0)
        return cls(total, torch.zeros(shape[0], dtype=torch.int64, device="cpu"))

    def add(self, use: Use) -> None:
        if self.total.device != use.total.device:  # the state was loaded from a checkpoint
            self.total = self.total.to(use.total.device)
        if use.expert is None:
            self.total += use.total
            self.rows = self.rows + use.rows
        else:
            assert isinstance(self.rows, Tensor)
            self.total[use.expert] += use.total
            self.rows[use.expert] += use.rows

    def all_rows(self) -> int:
        return int(self.rows.sum()) if isinstance(self.rows, Tensor) else self.rows

    def experts(self) -> tuple[int, ...]:
        """How many rows each expert saw; empty if they are not told apart."""
        return tuple(self.rows.tolist()) if isinstance(self.rows, Tensor) else ()

    def mean(self) -> Tensor:
        """h, float32 on the CPU."""
        if not isinstance(self.rows, Tensor):
            return (self.total / self.rows).to("cpu", torch.float32)
        total = self.total.cpu()
        rows = self.rows.view(-1, *[1] * (total.ndim - 1))
        pooled = total.sum(0) / rows.sum()
        return torch.where(rows < FEWEST_ROWS, pooled, total / rows.clamp(min=1)).float()

    def copy(self) -> Term:
        """The same sum, that does not change when this one is added to."""
        rows = self.rows.clone() if isinstance(self.rows, Tensor) else self.rows
        return Term(self.total.clone(), rows)

    @classmethod
    def from_state(cls, total: Tensor, rows: int | list[int]) -> Term:
        on_cpu = torch.tensor(rows, device="cpu") if isinstance(rows, list) else rows
        return cls(total.clone(), on_cpu)
