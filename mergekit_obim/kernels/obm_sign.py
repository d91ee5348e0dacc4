"""Optimal Brain Merging with a sign election that the saliencies vote in.

The OBIM group's later method (arXiv 2603.01416): trim every task vector by saliency, elect
each position's sign by σ = sign(Σ_k s_k · sign(δ_k)), and merge what agrees. Where TIES (and
``ties_obm``) lets the largest movement decide, here the most salient one does. How the
agreeing values are merged is TIES' disjoint mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_obim.kernels.blocks import Block
from mergekit_obim.kernels.scores import Candidate
from mergekit_obim.kernels.ties import merge_trimmed


def merge_obm_sign(
    candidates: Sequence[Candidate],
    densities: Sequence[float],
    weights: Sequence[float],
    scale: float,
    normalize: bool = True,
) -> torch.Tensor:
    """Trim, let the saliencies elect signs, take the disjoint mean.

    With τ_k = weight_k · trimmed δ_k: σ = sign(Σ_k |weight_k| · s_k · sign(τ_k)), over the
    positions that k kept, 0 counting as +; the merged task vector is Σ τ_k / Σ weight_k over
    the k whose τ_k has the sign σ. Ranked by magnitude, s_k = |δ_k|, this is TIES.

    Args:
        candidates: The K experts' tensors, with what ranks their positions; their scores
            are added up, so they need a common scale.
        densities: The share of each task vector that trimming keeps.
        weights: weight_k.
        scale: λ, on the merged task vector.
        normalize: Divide by the sum of the weights; otherwise the agreeing τ_k are summed.

    Returns:
        A new tensor like the base.

    Raises:
        UnscorableError: An expert's score is not finite.
    """

    def ballot(block: Block, k: int, kept: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        votes = candidates[k].scores(block).masked_fill_(~kept, 0)
        return votes.mul_(abs(weights[k])).copysign_(tau)

    return merge_trimmed(candidates, densities, weights, scale, normalize, ballot)
