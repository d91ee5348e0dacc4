"""RegMean with diagonal Gram matrices: the mean of the experts, weighted by h.

RegMean (Jin et al. 2023, arXiv 2212.09849) merges a linear layer as
W = (Σ_k G_k)⁻¹ Σ_k G_k W_k, with the Gram matrix G_k = X_kᵀ X_k of expert k's inputs. A
saliency file has the diagonal of G_k, as a mean over tokens: h_k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_obim.kernels.blocks import blocks
from mergekit_obim.kernels.merging import scaled_sum
from mergekit_obim.kernels.objective import objective
from mergekit_obim.kernels.scores import Candidate


def merge_regmean(
    candidates: Sequence[Candidate], weights: Sequence[float], scale: float
) -> torch.Tensor:
    """Merge by θ_M = θ_B + λ · Σ_k w_k h_k δ_k / Σ_k w_k h_k.

    With λ = 1 that is Σ w_k h_k θ_k / Σ w_k h_k, RegMean's formula for diagonal G_k. It minimises
    the objective of ``kernels.objective`` over all c, where ``least_error`` chooses among the
    experts' own values. Where all w_k h_k are 0 nothing was measured: there it is the mean weighted
    by w_k alone, and the base where these are 0 too.

    Args:
        candidates: The K experts' tensors; their criterion says what h is.
        weights: w_k, not negative.
        scale: λ, on the merged task vector.

    Returns:
        A new contiguous tensor of the base's shape and dtype.

    Raises:
        UnscorableError: A task vector or its h is not finite.
    """
    base = candidates[0].base
    merged = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    for block in blocks(base.shape, base.device):
        curvature, linear, deltas = objective(block, candidates, weights)
        unmeasured = curvature == 0  # as in the rows of tokens that no calibration data has
        if unmeasured.any():
            # Added up in the working dtype, as h · w is elsewhere.
            total = torch.zeros((), dtype=torch.as_tensor(linear).dtype, device=base.device)
            for weight, delta in zip(weights, deltas, strict=True):
                total += weight
                linear[unmeasured] += delta[unmeasured] * weight
            curvature[unmeasured] = float(total) or 1.0
        linear /= curvature
        block.of(merged).copy_(scaled_sum(block.of(base), torch.as_tensor(linear), scale))
    return merged
