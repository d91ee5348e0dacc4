"""What an assignment of positions keeps of each expert, counted and weighed. On a CPU.

The paper's objective (equation 6) says what a layer loses: with the merged task vector δ_M,
expert k's output error is predicted as Σ_ij h_kj (δ_M − δ_k)²_ij, which is Σ s_k where the
base is left, and 0 where the expert's element is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mergekit_obim.kernels.blocks import blocks, scratch
from mergekit_obim.kernels.exclusive import keep_count, unclaimed
from mergekit_obim.kernels.masked import array
from mergekit_obim.kernels.objective import h_of
from mergekit_obim.kernels.scores import Candidate, task_vector, working_dtype
from mergekit_obim.kernels.selection import FREE, claim_top


@dataclass
class Tally:
    """Sums over positions, which add up over tensors; float64.

    Attributes:
        owned: How many positions each expert has, and last the base, [K + 1].
        saliency: Σ s_k of expert k (row) over the positions that each expert, and last the
            base, has (column), [K, K + 1].
        error: Σ h_k (δ_M − δ_k)² of each expert, [K].
        sums: Σ δ_k, [K].
        products: Σ δ_j δ_k, [K, K].
    """

    owned: np.ndarray
    saliency: np.ndarray
    error: np.ndarray
    sums: np.ndarray
    products: np.ndarray

    @classmethod
    def zero(cls, experts: int) -> Tally:
        """Of no position."""
        return cls(
            np.zeros(experts + 1),
            np.zeros((experts, experts + 1)),
            np.zeros(experts),
            np.zeros(experts),
            np.zeros((experts, experts)),
        )


def tally(candidates: Sequence[Candidate], owner: torch.Tensor, scales: Sequence[float]) -> Tally:
    """Count and weigh one tensor's assignment.

    Within a block of 2¹⁸ positions sums are taken in the working dtype, which leaves about six
    digits; then in float64.

    Args:
        candidates: The K experts' tensors; their criterion says what h is, 1 if it has none.
        owner: uint8, of the tensors' shape: whose element a position takes, ``FREE`` for the base.
        scales: What each expert's δ is multiplied by where it is taken.
    """
    total = Tally.zero(len(candidates))
    base = candidates[0].base
    dtype = working_dtype(base.dtype)

    def rows(name: str, count: int, size: int) -> np.ndarray:
        matrix: np.ndarray = array(scratch(name, count * size, dtype, base.device))
        return matrix.reshape(count, size)

    for block in blocks(base.shape, base.device):
        start = block.of(base)
        size = start.numel()
        delta, s = (
            rows("tally delta", len(candidates), size),
            rows("tally s", len(candidates), size),
        )
        mask = rows("tally mask", len(candidates) + 1, size)
        merged, spare = rows("tally merged", 2, size)
        owned = array(block.of(owner)).reshape(-1)
        merged[...] = 0
        for k, candidate in enumerate(candidates):
            task_vector(block.of(candidate.expert), start, torch.from_numpy(delta[k]))
            np.equal(owned, k, out=mask[k], casting="unsafe")
            np.multiply(delta[k], mask[k], out=spare)
            if scales[k] != 1:
                spare *= scales[k]
            merged += spare
        np.equal(owned, FREE, out=mask[-1], casting="unsafe")
        for k, candidate in enumerate(candidates):
            shape = start.shape
            h = h_of(candidate.criterion, delta[k].reshape(shape), block, base.shape)
            np.multiply(delta[k], delta[k], out=s[k])
            s[k].reshape(shape)[...] *= h
            np.subtract(merged, delta[k], out=spare)
            spare *= spare
            spare.reshape(shape)[...] *= h
            total.error[k] += spare.sum()
        total.owned += mask.sum(1, dtype=np.float64)
        total.saliency += s @ mask.T
        total.sums += delta.sum(1)
        total.products += delta @ delta.T
    return total


def contested(
    candidates: Sequence[Candidate],
    densities: Sequence[float],
    order: Sequence[int],
    owner: torch.Tensor,
) -> np.ndarray:
    """Who got the positions that two or more experts wanted.

    An expert wants the n_k·N positions of highest score, as if it were alone.

    Args:
        candidates: The K experts' tensors.
        densities: n_k.
        order: The merging order.
        owner: What came of it.

    Returns:
        How many each expert has of these positions, and last the base, int64 [K + 1].
    """
    flat = array(owner.view(-1))
    wishes = np.zeros(len(flat), dtype=np.uint8)
    for k, candidate in enumerate(candidates):
        if k == order[0]:  # Nobody was in its way.
            wishes += flat == k
            continue
        alone = unclaimed(candidates)
        claim_top(alone, k, keep_count(densities[k], len(flat)), candidate)
        wishes += array(alone.view(-1)) == k
    labels = np.bincount(flat[wishes > 1], minlength=FREE + 1)
    return np.append(labels[: len(candidates)], labels[FREE])
