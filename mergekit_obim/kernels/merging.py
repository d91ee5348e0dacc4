"""Writing the merged tensor: equations 2 and 8 of the paper (arXiv 2502.12217)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_obim.kernels.backend import array, select
from mergekit_obim.kernels.blocks import blocks
from mergekit_obim.kernels.scores import task_vector, working_dtype


def merge_owned(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    owner: torch.Tensor,
    scales: Sequence[float],
) -> torch.Tensor:
    """Merge by an assignment: θ_M = θ_B + Σ_k scale_k · m_k ⊙ δ_k (equation 8).

    Where scale_k is 1 the expert's element itself is copied, bit for bit: θ_B + (θ_k − θ_B)
    would be rounded. Otherwise the sum is computed in float32 (float64 for float64
    inputs) and rounded once.

    Args:
        base: θ_B, any shape and floating dtype.
        experts: θ_k, same shape, dtype and device each.
        owner: uint8, of the same shape: which expert's element goes where, other values
            for the base's.
        scales: λ · weight_k per expert.

    Returns:
        A new contiguous tensor of the base's shape and dtype.
    """
    merged = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    for block in blocks(base.shape, base.device):
        part = block.of(merged).copy_(block.of(base))
        owned = array(block.of(owner))
        for k, (expert, scale) in enumerate(zip(experts, scales, strict=True)):
            value = block.of(expert)  # in the checkpoint's own dtype: nothing is rounded
            if scale != 1:
                start = block.of(base)
                value = scaled_sum(start, task_vector(value, start), scale)
            # Each expert's block is read whole: its positions are scattered, and reading only
            # them would fetch nearly every cache line all the same.
            select(part, value, owned == k)
    return merged


def scaled_sum(base: torch.Tensor, delta: torch.Tensor, scale: float) -> torch.Tensor:
    """Return θ_B + scale · δ (equation 2), rounded once to the base's dtype.

    Args:
        base: θ_B, any shape and floating dtype.
        delta: δ, same shape, in the :func:`~mergekit_obim.kernels.scores.working_dtype`; used up.
        scale: λ, times what else scales δ.
    """
    # A multiplication and an addition of their own, never a fused one, which rounds once less on
    # some devices.
    return delta.mul_(scale).add_(base.to(working_dtype(base.dtype))).to(base.dtype)
