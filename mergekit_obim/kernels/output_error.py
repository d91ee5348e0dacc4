"""What a layer's output loses by other weights than an expert's, correlated inputs included.

The paper's objective (arXiv 2502.12217, equation 6), taken at any weights W in the place of the
base's: with d = W − θ_k, and G = E[x xᵀ] of the layer's inputs in expert k's own model,

    E[‖d x‖²] = Σ_rows d G dᵀ.

``kernels.tally`` takes the inputs for independent, which leaves Σ_ij h_j d²_ij of it. Here G is the
whole matrix, where that is known, or Ĝ = L + diag(h − diag L), with Nyström's L = U Uᵀ
(``kernels.nystrom``), whose diagonal is never more than h:

    Σ_rows d Ĝ dᵀ = ‖d U‖² + Σ_ij (h_j − Σ_c U²_jc) d²_ij.

Neither term is negative, so nothing is lost where they are small beside Σ_ij h_j d²_ij.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_obim.kernels.blocks import row_blocks, scratch_like
from mergekit_obim.kernels.regmean_gram import Gram, Layers, input_last
from mergekit_obim.kernels.scores import working_dtype


def output_errors(
    expert: torch.Tensor, ends: Sequence[torch.Tensor], axis: int, known: Layers
) -> list[float]:
    """Predict the squared error of a layer's output, per token of the expert's calibration data.

    Args:
        expert: θ_k, [out, d] or [layers, out, d] (the experts of a mixture, whose errors are added
            up), or with the last two swapped; any strides and floating dtype.
        ends: The W, of the same shape, dtype and device.
        axis: Which axis the input features are: −1, or −2 where they are swapped.
        known: What is known of the inputs of each layer.

    Returns:
        Σ_rows d Ĝ dᵀ of each W. Within a block sums are taken in the working dtype, over blocks in
        float64.
    """
    own = input_last(expert, axis)
    others = [input_last(end, axis) for end in ends]
    totals = [0.0] * len(ends)
    for index in range(len(own) if own.numel() else 0):
        form = _QuadraticForm(known(index), expert.device, working_dtype(expert.dtype))
        for number, other in enumerate(others):
            totals[number] += form.error(other[index], own[index])
    return totals


class _QuadraticForm:
    """Σ_rows d Ĝ dᵀ of one layer."""

    def __init__(self, gram: Gram, device: torch.device, dtype: torch.dtype):
        self.dtype = dtype
        self.whole = gram.full().to(device, dtype) if gram.full else None
        self.factor: torch.Tensor | None = None
        self.rest = gram.h.to("cpu", torch.float64)
        if gram.factor is not None and self.whole is None:
            self.factor = gram.factor.to(device, dtype)
            # √h is the longest that a row of U can be, but for rounding.
            self.rest = (self.rest - gram.factor.square().sum(1)).clamp(min=0)

    def error(self, weights: torch.Tensor, expert: torch.Tensor) -> float:
        """Return the error by other weights than the expert's, both [out, d]."""
        squares = torch.zeros_like(self.rest)  # Σ d² of each feature
        total = 0.0
        for part in row_blocks(expert, by_square=self.whole is not None):
            value = expert[part]
            d = scratch_like("output error", value, self.dtype)
            d.copy_(weights[part]).sub_(value)
            if self.whole is not None:
                total += float((d @ self.whole).mul_(d).sum())
                continue
            if self.factor is not None:
                total += float((d @ self.factor).square_().sum())
            squares += d.square_().sum(0).to("cpu", torch.float64)
        if self.whole is None:
            total += float(squares @ self.rest)
        # Of a matrix that is stored in 16 bits rounding may leave a little less than 0.
        return max(0.0, total)
