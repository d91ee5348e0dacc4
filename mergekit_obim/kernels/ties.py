"""TIES with its trimming ranked by saliency: the paper's TIES+OBM (section 3.3, table 3).

Sign election and disjoint mean are those of TIES (Yadav et al. 2023, arXiv 2306.01708,
section 4), in the form that mergekit's ``ties`` gives them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_obim.kernels.blocks import blocks
from mergekit_obim.kernels.exclusive import keep_count
from mergekit_obim.kernels.masked import empty
from mergekit_obim.kernels.merging import scaled_sum
from mergekit_obim.kernels.scores import Candidate, task_vector
from mergekit_obim.kernels.selection import claim_top, nobodys


def trim(candidate: Candidate, density: float) -> torch.Tensor:
    """TIES' first step: a bool mask of the top share of one task vector."""
    kept = nobodys(candidate.base)
    claim_top(kept, 0, keep_count(density, kept.numel()), candidate)
    return kept == 0


def merge_ties(
    candidates: Sequence[Candidate],
    densities: Sequence[float],
    weights: Sequence[float],
    scale: float,
    normalize: bool = True,
) -> torch.Tensor:
    """Trim, elect signs, take the disjoint mean.

    With τ_k = weight_k · trimmed δ_k: σ = sign(Σ_k τ_k), 0 counting as +; the merged task
    vector is Σ τ_k / Σ weight_k over the k whose τ_k has the sign σ.

    Args:
        candidates: The K experts' tensors, with what ranks their positions.
        densities: The share of each task vector that trimming keeps.
        weights: weight_k.
        scale: λ, on the merged task vector.
        normalize: Divide by the sum of the weights; otherwise the agreeing τ_k are summed.

    Returns:
        A new tensor like the base.
    """
    base = candidates[0].base
    kept = [
        trim(candidate, density) for candidate, density in zip(candidates, densities, strict=True)
    ]
    merged = empty(base.shape, base.dtype, base.device)
    for block in blocks(base.shape, base.device):
        start = block.of(base)
        trimmed = [
            task_vector(block.of(c.expert), start).masked_fill_(~block.of(mask), 0).mul_(weight)
            for c, mask, weight in zip(candidates, kept, weights, strict=True)
        ]
        # One after the other: how a reduction is ordered depends on the block's shape.
        vote = torch.zeros_like(trimmed[0])
        for tau in trimmed:
            vote += tau
        positive = vote >= 0
        total = torch.zeros_like(vote)
        divisor = torch.zeros_like(total)
        for tau, weight in zip(trimmed, weights, strict=True):
            agrees = torch.where(positive, tau > 0, tau < 0)
            total += tau.mul_(agrees)
            divisor += agrees.to(divisor.dtype).mul_(weight)
        if normalize:
            total /= divisor.masked_fill_(divisor == 0, 1)
        block.of(merged).copy_(scaled_sum(start, total, scale))
    return merged
