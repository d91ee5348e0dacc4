"""What a merge keeps of each expert, counted and weighed, for reports.

The paper's objective (arXiv 2502.12217, equation 6) says what a layer loses: with the merged task
vector δ_M, expert k's output error is predicted as Σ_ij h_kj (δ_M − δ_k)²_ij, which is Σ s_k where
the base is left, and 0 where the expert's element is. That takes a layer's inputs for independent;
where more is known of them, ``kernels.output_error`` has a better prediction. All of this runs on
a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mergekit_obim.kernels.backend import array
from mergekit_obim.kernels.blocks import Block, blocks, scratch
from mergekit_obim.kernels.iterative import keep_count
from mergekit_obim.kernels.objective import h_of
from mergekit_obim.kernels.scores import Candidate, task_vector, working_dtype
from mergekit_obim.kernels.selection import FREE


@dataclass
class Tally:
    """Sums over positions, which add up over tensors, all float64.

    Attributes:
        owned: How many positions each expert has, and last the base, [K + 1].
        saliency: Σ s_k of expert k (row) over the positions that each expert, and last the
            base, has (column), [K, K + 1]. Where no position has an owner, all is in the last.
        error: The output error that is predicted for each expert, [K]: Σ h_k (δ_M − δ_k)², or
            what stands in its place.
        correlated: What correlated inputs add to each expert's error at the base's weights, which
            is Σ s_k without them, [K]; it may be negative.
        sums: Σ δ_k, [K].
        products: Σ δ_j δ_k, [K, K].
        merged: Σ δ_M δ_k of each expert, and last Σ δ_M², [K + 1].
    """

    owned: np.ndarray
    saliency: np.ndarray
    error: np.ndarray
    correlated: np.ndarray
    sums: np.ndarray
    products: np.ndarray
    merged: np.ndarray

    @classmethod
    def zero(cls, experts: int) -> Tally:
        """Return the tally of no positions, to add others to.

        Args:
            experts: K.
        """
        return cls(
            np.zeros(experts + 1),
            np.zeros((experts, experts + 1)),
            np.zeros(experts),
            np.zeros(experts),
            np.zeros(experts),
            np.zeros((experts, experts)),
            np.zeros(experts + 1),
        )

    def at_base(self) -> np.ndarray:
        """Return the output error that is predicted for each expert at the base's weights, [K]."""
        at_base: np.ndarray = np.array([row.sum() for row in self.saliency]) + self.correlated
        return at_base


def tally(
    candidates: Sequence[Candidate],
    owner: torch.Tensor | None,
    scales: Sequence[float],
    merged_tensor: torch.Tensor | None = None,
) -> Tally:
    """Count and weigh what one tensor's merge keeps.

    Args:
        candidates: The K experts' tensors; their criterion says what h is, 1 if it has none.
        owner: uint8, of the tensors' shape: whose element a position takes, ``FREE`` for the base.
            None if no position has an owner.
        scales: What each expert's δ is multiplied by where it is taken.
        merged_tensor: θ_M, where there is no owner to tell it by.
    """
    # Within a block of 2¹⁸ positions sums are taken in the working dtype, which leaves about six
    # digits, more than a report shows; over blocks they are taken in float64.
    total = Tally.zero(len(candidates))
    base = candidates[0].base
    dtype = working_dtype(base.dtype)

    def rows(name: str, count: int, size: int) -> np.ndarray:
        matrix: np.ndarray = array(scratch(name, count * size, dtype, base.device))
        return matrix.reshape(count, size)

    for block in blocks(base.shape, base.device):
        start = block.of(base)
        shape, size = start.shape, start.numel()
        # [K + 1, size] each; the last row of δ and s is the merged tensor's, of mask the base's.
        delta, s, mask = (rows(f"tally {name}", len(candidates) + 1, size) for name in "dsm")
        spare, ones = rows("tally spare", 2, size)
        ones[...] = 1
        owned = np.array(FREE) if owner is None else array(block.of(owner)).reshape(-1)
        merged, squares = delta[-1], s[-1]  # δ_M and its square
        merged[...] = 0
        for k, candidate in enumerate(candidates):
            task_vector(block.of(candidate.expert), start, torch.from_numpy(delta[k]))
            mask[k] = owned == k
            np.multiply(delta[k], mask[k], out=spare)
            if scales[k] != 1:
                spare *= scales[k]
            merged += spare
        mask[-1] = owned == FREE
        if merged_tensor is not None:
            task_vector(block.of(merged_tensor), start, torch.from_numpy(merged))
        np.multiply(merged, merged, out=squares)
        columns = squares.reshape(shape).sum(0).reshape(-1)
        total.owned += [np.count_nonzero(row) for row in mask]
        for k, candidate in enumerate(candidates):
            h = h_of(candidate.criterion, delta[k].reshape(shape), block, base.shape)
            # torch broadcasts a row seven times as fast as numpy.
            torch.mul(
                torch.from_numpy(delta[k]).view(shape),
                torch.as_tensor(h),
                out=torch.from_numpy(spare).view(shape),
            )
            np.multiply(delta[k], spare, out=s[k])
            # Products of vectors, one by one: a matrix product of few rows took twice as long.
            by_owner = np.array([float(s[k] @ row) for row in mask])
            total.saliency[k] += by_owner
            total.sums[k] += float(delta[k] @ ones)
            total.products[k, : k + 1] += [float(delta[k] @ delta[other]) for other in range(k + 1)]
            total.merged[k] += float(delta[k] @ merged)
            # Σ h (δ_M − δ)² = Σ h δ_M² − 2 Σ h δ δ_M + Σ s: products of what is at hand. δ_M² is
            # the same for all experts, so with one h for all rows its sum over them will do.
            error = by_owner.sum() - 2 * float(spare @ merged)
            if isinstance(h, np.ndarray) and h.strides[0] == 0:  # the same h in each row
                total.error[k] += error + float(columns @ h[0].reshape(-1))
            else:
                total.error[k] += error + float((squares.reshape(shape) * h).sum())
        total.merged[-1] += float(merged @ merged)
    total.products += np.tril(total.products, -1).T
    # What should be 0 may be a little less, by rounding.
    np.maximum(total.error, 0, out=total.error)
    return total


def claim_counts(candidates: Sequence[Candidate], densities: Sequence[float]) -> np.ndarray:
    """Count the experts that would claim each position of a small tensor if they were alone.

    Args:
        candidates: The K experts' tensors, [n].
        densities: n_k, the share of all positions that an expert may claim.

    Returns:
        int [n], 0 … K; a position with 2 or more is contested.
    """
    n = candidates[0].base.numel()
    wanted = np.zeros(n, dtype=int)
    for candidate, density in zip(candidates, densities, strict=True):
        wanted[_ranked(candidate)[: keep_count(density, n)]] += 1
    return wanted


def _ranked(candidate: Candidate) -> np.ndarray:
    """Return positions from the best; ties go to the lowest index, what scores zero is left out."""
    scores = array(candidate.scores(Block((slice(0, candidate.base.numel()),), 0)))
    best: np.ndarray = np.argsort(-scores, kind="stable")[: np.count_nonzero(scores)]
    return best


def outcomes(
    candidates: Sequence[Candidate],
    scales: Sequence[float],
    settings: Iterable[tuple[Sequence[float], Sequence[int]]],
) -> Iterator[Tally]:
    """Assign and tally a small tensor's positions under many settings.

    Each gives what :func:`~mergekit_obim.kernels.iterative.iterative_owners` and :func:`tally`
    would. The scores are sorted once for all settings, where a large tensor is never sorted.

    Args:
        candidates: The K experts' tensors, [n].
        scales: What each expert's δ is multiplied by where it is taken.
        settings: Pairs of densities n_k and a merging order.

    Yields:
        A tally for each setting.
    """
    n = candidates[0].base.numel()
    whole = Block((slice(0, n),), 0)
    delta, h = np.zeros((len(candidates), n)), np.ones((len(candidates), n))
    ranked = [_ranked(candidate) for candidate in candidates]  # a few positions: sorting is cheap
    for k, candidate in enumerate(candidates):
        delta[k] = array(task_vector(candidate.expert, candidate.base))
        h[k] = h_of(candidate.criterion, delta[k], whole, candidate.base.shape)
    s = h * delta**2
    taken = np.append(delta * np.asarray(scales)[:, None], np.zeros((1, n)), axis=0)
    sums, products = delta.sum(1), delta @ delta.T
    base, here = len(candidates), np.arange(n)
    for densities, order in settings:
        owner = np.full(n, base)
        for k in order:
            free = ranked[k][owner[ranked[k]] == base]
            owner[free[: keep_count(densities[k], n)]] = k
        mask = (owner == np.arange(base + 1)[:, None]).astype(float)
        change = taken[owner, here]
        error = (h * (change - delta) ** 2).sum(1)
        merged = np.append(delta @ change, change @ change)
        yield Tally(mask.sum(1), s @ mask.T, error, np.zeros(base), sums, products, merged)
