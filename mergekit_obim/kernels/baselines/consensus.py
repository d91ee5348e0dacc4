"""Consensus Task Arithmetic: the sum of the task vectors, where enough experts need it.

Wang et al. 2024, "Localizing Task Information for Improved Model Merging and Compression"
(arXiv 2405.07813): TALL masks and the consensus over them, as in the authors' code
(github.com/nik-dim/tall_masks, src/utils/tallmask_utils.py, generate_task_masks and
construct_consensus_mask).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mergekit_obim.errors import UnscorableError
from mergekit_obim.kernels.backend import all_finite, array, select
from mergekit_obim.kernels.blocks import blocks
from mergekit_obim.kernels.merging import scaled_sum
from mergekit_obim.kernels.scores import task_vector


def merge_consensus(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    thresholds: Sequence[float],
    min_agreement: int,
    scale: float,
) -> torch.Tensor:
    """Sum the task vectors at the positions that at least ``min_agreement`` experts need.

    With τ_t = weight_t · δ_t and τ_MTL = Σ_t τ_t, expert t needs the positions of its TALL
    mask, M_t = 1[|τ_t| > λ_t · |τ_MTL − τ_t|]. The merged tensor is
    θ_B + λ · 1[Σ_t M_t ≥ min_agreement] ⊙ τ_MTL.

    Args:
        base: θ_B, any shape and floating dtype.
        experts: θ_t, same shape, dtype and device each.
        weights: weight_t.
        thresholds: λ_t, not negative; a higher one makes a smaller mask.
        min_agreement: 0 keeps everything, which is Task Arithmetic; 1 drops what no expert
            needs, 2 what only one does; with more than there are experts all is the base's.
        scale: λ, on the merged task vector.

    Returns:
        A new contiguous tensor of the base's shape and dtype.

    Raises:
        UnscorableError: A task vector is not finite.
    """
    merged = torch.empty(base.shape, dtype=base.dtype, device=base.device).copy_(base)
    for block in blocks(base.shape, base.device):
        start = block.of(base)
        # A NaN or an infinity shows in the sum, so that one look finds it for all experts.
        with np.errstate(invalid="ignore", over="ignore"):
            vectors = [
                task_vector(block.of(expert), start).mul_(weight)
                for expert, weight in zip(experts, weights, strict=True)
            ]
            total = torch.zeros_like(vectors[0])
            for tau in vectors:
                total += tau
        if not all_finite(array(total)):
            raise UnscorableError("the task vector is not finite")
        agreement = array(torch.zeros_like(total, dtype=torch.int32))
        for tau, threshold in zip(map(array, vectors), thresholds, strict=True):
            agreement += abs(tau) > abs(array(total) - tau) * threshold
        select(block.of(merged), scaled_sum(start, total, scale), agreement >= min_agreement)
    return merged
