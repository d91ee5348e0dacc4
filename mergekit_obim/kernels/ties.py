"""TIES with its trimming ranked by saliency: the paper's TIES+OBM (section 3.3, table 3).

Sign election and disjoint mean are those of TIES (Yadav et al. 2023, arXiv 2306.01708,
section 4), in the form that mergekit's ``ties`` gives them.

:func:`merge_obm_sign` is Optimal Brain Merging, the OBIM group's later method (arXiv 2603.01416),
in which the saliencies vote: trim every task vector by saliency, elect each position's sign by
σ = sign(Σ_k s_k · sign(δ_k)), and merge what agrees. Where TIES lets the largest movement decide,
here the most salient one does. How the agreeing values are merged is TIES' disjoint mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mergekit_obim.kernels.blocks import Block, blocks
from mergekit_obim.kernels.iterative import keep_count
from mergekit_obim.kernels.merging import scaled_sum
from mergekit_obim.kernels.scores import Candidate, task_vector
from mergekit_obim.kernels.selection import all_free, claim_top


def trim(candidate: Candidate, density: float) -> torch.Tensor:
    """Select the top share of one task vector, TIES' first step.

    Args:
        candidate: The expert's tensor, with what ranks its positions.
        density: The share of all positions to keep.

    Returns:
        bool, of the tensor's shape: whether a position is kept.

    Raises:
        UnscorableError: A score is not finite.
    """
    # An expert that has the tensor to itself claims positions as in iterative merging.
    kept = all_free(candidate.base)
    claim_top(kept, 0, keep_count(density, kept.numel()), candidate)
    return kept == 0


def merge_ties(
    candidates: Sequence[Candidate],
    densities: Sequence[float],
    weights: Sequence[float],
    scale: float,
    normalize: bool = True,
) -> torch.Tensor:
    """Merge by TIES: trim, elect signs, take the disjoint mean.

    With τ_k = weight_k · trimmed δ_k: σ = sign(Σ_k τ_k), 0 counting as +; the merged task
    vector is Σ τ_k / Σ weight_k over the k whose τ_k has the sign σ.

    Args:
        candidates: The K experts' tensors, with what ranks their positions.
        densities: The share of each task vector that trimming keeps.
        weights: weight_k.
        scale: λ, on the merged task vector.
        normalize: Divide by the sum of the weights; otherwise the agreeing τ_k are summed.

    Returns:
        A new contiguous tensor of the base's shape and dtype.

    Raises:
        UnscorableError: An expert's score is not finite.
    """
    return _merge_trimmed(
        candidates, densities, weights, scale, normalize, lambda _block, _k, _kept, tau: tau
    )


def merge_obm_sign(
    candidates: Sequence[Candidate],
    densities: Sequence[float],
    weights: Sequence[float],
    scale: float,
    normalize: bool = True,
) -> torch.Tensor:
    """Merge by OBM: trim, let the saliencies elect signs, take the disjoint mean.

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
        A new contiguous tensor of the base's shape and dtype.

    Raises:
        UnscorableError: An expert's score is not finite.
    """

    def ballot(block: Block, k: int, kept: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        votes = candidates[k].scores(block).masked_fill_(~kept, 0)
        # A negative weight turns τ's sign, and so the vote; it must not turn it back.
        return votes.mul_(abs(weights[k])).copysign_(tau)

    return _merge_trimmed(candidates, densities, weights, scale, normalize, ballot)


def _merge_trimmed(
    candidates: Sequence[Candidate],
    densities: Sequence[float],
    weights: Sequence[float],
    scale: float,
    normalize: bool,
    ballot: Callable[[Block, int, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Merge by TIES, whatever the experts vote with.

    Args:
        candidates, densities, weights, scale, normalize: As for :func:`merge_ties`.
        ballot: Called with a block, k, the block of k's mask and τ_k there: returns k's votes, of
            the block's shape and τ_k's dtype, their sign that of τ_k.

    Returns:
        A new contiguous tensor of the base's shape and dtype.
    """
    base = candidates[0].base
    kept = [
        trim(candidate, density) for candidate, density in zip(candidates, densities, strict=True)
    ]
    merged = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    for block in blocks(base.shape, base.device):
        trimmed = trimmed_vectors(block, candidates, kept, weights)
        # One after the other: how a reduction is ordered depends on the block's shape.
        vote = torch.zeros_like(trimmed[0])
        for k, (mask, tau) in enumerate(zip(kept, trimmed, strict=True)):
            vote += ballot(block, k, block.of(mask), tau)
        total = disjoint_mean(trimmed, vote >= 0, weights, normalize)
        block.of(merged).copy_(scaled_sum(block.of(base), total, scale))
    return merged


def trimmed_vectors(
    block: Block,
    candidates: Sequence[Candidate],
    kept: Sequence[torch.Tensor],
    weights: Sequence[float],
) -> list[torch.Tensor]:
    """Return every τ_k in a block: weight_k · δ_k where k's mask is set, else 0.

    Args:
        block: A block of the tensors' shape.
        candidates: The K experts' tensors.
        kept: Their masks, bool, of the tensors' shape.
        weights: weight_k.

    Returns:
        K tensors of the block's shape, in the working dtype.
    """
    return [
        task_vector(block.of(c.expert), block.of(c.base))
        .masked_fill_(~block.of(mask), 0)
        .mul_(weight)
        for c, mask, weight in zip(candidates, kept, weights, strict=True)
    ]


def disjoint_mean(
    trimmed: Sequence[torch.Tensor],
    positive: torch.Tensor,
    weights: Sequence[float],
    normalize: bool,
) -> torch.Tensor:
    """Average the τ_k that have the elected sign, TIES' last step.

    Args:
        trimmed: τ_k, of one shape; used up.
        positive: bool, of the same shape: whether + was elected.
        weights: weight_k.
        normalize: Divide by the sum of the agreeing weights.

    Returns:
        The merged task vector, in τ_k's dtype; 0 where none agrees.
    """
    total = torch.zeros_like(trimmed[0])
    divisor = torch.zeros_like(total)
    for tau, weight in zip(trimmed, weights, strict=True):
        agrees = torch.where(positive, tau > 0, tau < 0)  # what was trimmed, 0, never does
        total += tau.mul_(agrees)
        divisor += agrees.to(divisor.dtype).mul_(weight)
    if normalize:
        total /= divisor.masked_fill_(divisor == 0, 1)
    return total
