"""How alike task vectors are: the measures of model kinship (arXiv 2410.12613, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergekit_obim.errors import UnscorableError
from mergekit_obim.kernels.blocks import blocks, scratch


@dataclass(frozen=True)
class Moments:
    """Sums over positions, which add up over tensors, of the base and the K task vectors.

    Row 0 is θ_B, row k is δ_k = θ_k − θ_B. All float64, on the CPU.

    Attributes:
        count: The number of positions.
        sums: Σ of each row, [K + 1].
        products: Σ of each two rows' product, [K + 1, K + 1].
    """

    count: float
    sums: torch.Tensor
    products: torch.Tensor

    @classmethod
    def zero(cls, experts: int) -> Moments:
        """Of no position."""
        rows = experts + 1
        sums = torch.zeros(rows, dtype=torch.float64)
        return cls(0.0, sums, torch.zeros(rows, rows, dtype=torch.float64))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.sums + other.sums, self.products + other.products
        )

    def scaled(self, factor: float) -> Moments:
        """As of ``factor`` times the positions: for sums over a sample."""
        return Moments(self.count * factor, self.sums * factor, self.products * factor)

    def pearson(self) -> torch.Tensor:
        """Pearson's correlation of each two task vectors, [K, K]; NaN where one is constant."""
        sums = self.sums[1:]
        return _normalised(self.products[1:, 1:] - torch.outer(sums, sums) / self.count)

    def cosine(self) -> torch.Tensor:
        """The cosine of each two task vectors, with its sign, [K, K]; NaN where one is 0."""
        return _normalised(self.products[1:, 1:])

    def euclidean(self) -> torch.Tensor:
        """‖δ_i − δ_j‖ of each two task vectors, [K, K]."""
        products = self.products[1:, 1:]
        squares = products.diagonal()
        return (squares[:, None] + squares[None] - 2 * products).clamp(min=0).sqrt()

    def relative_sizes(self) -> torch.Tensor:
        """‖δ_k‖ / ‖θ_B‖ of each task vector, [K]."""
        squares = self.products.diagonal()
        return (squares[1:] / squares[0]).sqrt()


def _normalised(products: torch.Tensor) -> torch.Tensor:
    size = products.diagonal().clamp(min=0).sqrt()
    cosines = (products / torch.outer(size, size)).clamp(-1, 1)
    cosines.diagonal()[size > 0] = 1.0
    return cosines


def moments(experts: Sequence[torch.Tensor], base: torch.Tensor) -> Moments:
    """Sums over one tensor's positions, block by block, in float64.

    Args:
        experts: The K experts' tensors, of any shape, strides and floating dtype.
        base: θ_B, of the same shape and device.

    Raises:
        UnscorableError: A weight is not a finite number.
    """
    total = Moments.zero(len(experts))
    for block in blocks(base.shape, base.device):
        start = block.of(base)
        size = start.numel()
        rows = scratch("kinship", (len(experts) + 1) * size, torch.float64, base.device)
        rows = rows.view(-1, size)
        rows[0].view(start.shape).copy_(start)
        for k, expert in enumerate(experts, 1):
            rows[k].view(start.shape).copy_(block.of(expert))
            rows[k] -= rows[0]
        total += Moments(size, rows.sum(1).cpu(), (rows @ rows.T).cpu())
    if not bool(total.products.isfinite().all()):
        raise UnscorableError("a weight is not a finite number")
    return total
