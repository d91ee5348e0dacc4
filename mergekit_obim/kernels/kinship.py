"""How alike task vectors are: the measures of model kinship (arXiv 2410.12613, section 3).

All of them follow from sums, squares and products of pairs, which one pass over the weights gives
and which add up over tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergekit_obim.errors import UnscorableError
from mergekit_obim.kernels.blocks import blocks, scratch


@dataclass(frozen=True)
class Moments:
    """Sums over positions, of the base and the K task vectors, which add up over tensors.

    Row 0 is θ_B, row k is δ_k = θ_k − θ_B. All are float64 and on the CPU: float32's seven digits
    would not do for differences of sums over 10⁹ positions.

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
        """Return the moments of no positions, to add others to.

        Args:
            experts: K.
        """
        rows = experts + 1
        sums = torch.zeros(rows, dtype=torch.float64)
        return cls(0.0, sums, torch.zeros(rows, rows, dtype=torch.float64))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.sums + other.sums, self.products + other.products
        )

    def scaled(self, factor: float) -> Moments:
        """Return the moments of ``factor`` times as many positions, to extrapolate a sample."""
        return Moments(self.count * factor, self.sums * factor, self.products * factor)

    def pearson(self) -> torch.Tensor:
        """Return Pearson's correlation of each two task vectors, [K, K]; NaN if one is constant."""
        sums = self.sums[1:]
        return _normalised(self.products[1:, 1:] - torch.outer(sums, sums) / self.count)

    def cosine(self) -> torch.Tensor:
        """Return the cosine of each two task vectors, signed, [K, K]; NaN where one is 0."""
        return _normalised(self.products[1:, 1:])

    def euclidean(self) -> torch.Tensor:
        """Return the distance ‖δ_i − δ_j‖ of each two task vectors, [K, K]."""
        products = self.products[1:, 1:]
        squares = products.diagonal()
        # Of equal vectors rounding may leave a little less than 0.
        return (squares[:, None] + squares[None] - 2 * products).clamp(min=0).sqrt()

    def relative_sizes(self) -> torch.Tensor:
        """Return ‖δ_k‖ / ‖θ_B‖ of each task vector, [K]."""
        squares = self.products.diagonal()
        return (squares[1:] / squares[0]).sqrt()


def _normalised(products: torch.Tensor) -> torch.Tensor:
    size = products.diagonal().clamp(min=0).sqrt()
    cosines = (products / torch.outer(size, size)).clamp(-1, 1)  # rounding may exceed them
    cosines.diagonal()[size > 0] = 1.0
    return cosines


def moments(experts: Sequence[torch.Tensor], base: torch.Tensor) -> Moments:
    """Compute the moments of one tensor, block by block, in float64.

    Args:
        experts: θ_k, K tensors of any shape, strides and floating dtype.
        base: θ_B, of the same shape and device.

    Raises:
        UnscorableError: A weight is not a finite number.
    """
    total = Moments.zero(len(experts))
    for block in blocks(base.shape, base.device):
        start = block.of(base)
        size = start.numel()
        rows = scratch("kinship", (len(experts) + 1) * size, torch.float64, base.device)
        rows = rows.view(-1, size)  # [K + 1, size]
        rows[0].view(start.shape).copy_(start)
        for k, expert in enumerate(experts, 1):
            rows[k].view(start.shape).copy_(block.of(expert))
            rows[k] -= rows[0]
        total += Moments(size, rows.sum(1).cpu(), (rows @ rows.T).cpu())
    # A NaN or an infinity anywhere is in a square, and stays in the sums: one look at the end.
    if not bool(total.products.isfinite().all()):
        raise UnscorableError("a weight is not a finite number")
    return total
