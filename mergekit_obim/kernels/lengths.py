"""How much shorter than the task vectors their mean is, and the cosines that this follows from.

The mean of K vectors of one length with mean pairwise cosine ρ is shorter than each of them by
s(ρ) = √(K / (1 + (K − 1) ρ)): √K if they are unrelated, 1 if they are the same. This is not in the
paper. The cosines are those over a whole model, of which a sample of each tensor is read, in 16
runs of neighbours: enough runs for a standard error by the jackknife (Quenouille 1956, Tukey 1958),
which leaves out one run of every tensor at a time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch

from mergekit_obim.errors import UnscorableError
from mergekit_obim.kernels.blocks import Positions

# 64 Ki weights of a tensor: some 130 kB of a bfloat16 checkpoint. A run is 8 kB, two pages.
RUNS = 16
RUN_LENGTH = 1 << 12


def stretch_to_one(weights: Sequence[float], cosines: torch.Tensor) -> float:
    """Return the factor that gives the weighted mean of vectors of one length that length.

    That is γ = Σ w_k / √(wᵀ C w), which is s(ρ) where all weights and all cosines are alike.

    Args:
        weights: w_k, not negative, [K].
        cosines: C, of each two vectors, float64 [K, K].

    Returns:
        γ; 1 where all weights are 0, and infinity where the vectors cancel.
    """
    w = torch.tensor(weights, dtype=torch.float64)
    total, square = float(w.sum()), float(w @ cosines @ w)
    if not total:
        return 1.0
    return total / math.sqrt(square) if square > 0 else math.inf


def products(base: torch.Tensor, experts: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    """Estimate the inner products of one tensor's task vectors, in runs that add up to them.

    A tensor of up to 64 Ki elements is read whole, and its products are shared out evenly. Of a
    larger one a run is read in each sixteenth of its flat order, at a place that depends on its
    name and size alone.

    Args:
        base: θ_B, of any shape, floating dtype, strides and device.
        experts: θ_k, K tensors like it.
        name: The tensor's name.

    Returns:
        float64 [16, K, K], on the CPU: of each run Σ δ_i δ_j, times how much larger the tensor is
        than its sample. Such estimates add up over tensors.

    Raises:
        UnscorableError: A weight is not a finite number.
    """
    size, count = base.numel(), RUNS * RUN_LENGTH
    whole = size <= count
    positions = torch.arange(size) if whole else _positions(size, name)
    start, *own = (
        Positions(positions.to(t.device)).of(t.detach()).cpu().double() for t in (base, *experts)
    )
    deltas = torch.stack([expert - start for expert in own])  # [K, n]
    if whole:
        found = (deltas @ deltas.T / RUNS).expand(RUNS, -1, -1)
    else:
        runs = deltas.view(len(own), RUNS, RUN_LENGTH).transpose(0, 1)  # [16, K, n / 16]
        found = runs @ runs.mT * (size / count)
    if not bool(found.isfinite().all()):
        raise UnscorableError("a weight is not a finite number")
    return found


def _positions(size: int, name: str) -> torch.Tensor:
    """Return the flat indices of the sample of a tensor, int64 [65,536], run by run."""
    # This generator gives the same numbers in every version of Python and on every machine.
    chance = random.Random(f"{name} {size}").random
    # Which run belongs to which part of the tensor changes from tensor to tensor: what differs
    # between first and last rows everywhere would otherwise count as an error of the sample.
    first = int(chance() * RUNS)
    starts = []
    for run in range(RUNS):
        part = (first + run) % RUNS
        low, high = size * part // RUNS, size * (part + 1) // RUNS
        starts.append(low + int(chance() * (high - low - RUN_LENGTH + 1)))
    return (torch.tensor(starts)[:, None] + torch.arange(RUN_LENGTH)).view(-1)


def cosines(products: torch.Tensor) -> torch.Tensor:
    """Return the cosine of each two vectors; 0 with others for a vector of zeros.

    Args:
        products: Their inner products, [..., K, K].

    Returns:
        [..., K, K], with ones on the diagonal.
    """
    sizes = products.diagonal(dim1=-2, dim2=-1).sqrt()
    lengths = sizes[..., :, None] * sizes[..., None, :]
    found = torch.where(lengths > 0, products / lengths, 0).clamp(-1, 1)  # rounding may exceed it
    found.diagonal(dim1=-2, dim2=-1).fill_(1)
    return found


def mean_cosine(runs: torch.Tensor) -> tuple[float, float]:
    """Return ρ, the mean cosine over all pairs of task vectors, and its standard error.

    Args:
        runs: What :func:`products` gave, added up over tensors, [16, K, K] with K of 2 or more.

    Returns:
        ρ, and its standard error by the jackknife, which is 0 but for rounding if all tensors were
        read whole.
    """
    total = runs.sum(0)
    each = _mean_off_diagonal(cosines((total - runs) * RUNS / (RUNS - 1)))
    variance = (RUNS - 1) / RUNS * (each - each.mean()).square().sum()
    return float(_mean_off_diagonal(cosines(total))), float(variance.sqrt())


def _mean_off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    size = matrix.shape[-1]
    return (matrix.sum((-2, -1)) - size) / (size * (size - 1))
