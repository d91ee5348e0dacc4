"""The method once more, slow and plain, written from its formulas and not from the kernels.

Everything is flat numpy in float32 (float64 for float64 weights), which is the arithmetic that
the method asks for; ranking is a Python sort of exact numbers, element by element. A factored
saliency is h, to be multiplied by δ²; a dense one is the scores themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mergekit_obim.kernels.gram import draw_test_matrix

BASE = -1
"""The owner of a position that no expert claims."""


@dataclass
class Expert:
    """One expert's tensor and what ranks its positions.

    Attributes:
        tensor: Its weight; any floating dtype and strides.
        density: Share of all positions; None means 1/K.
        weight: Scale of its task vector.
        h: Factored saliency, broadcastable against the weight.
        dense: Dense saliency, of the weight's shape up to broadcasting.
        barred: Whether it may claim nothing at all (`unscored: base`).
        mask_threshold: λ_t of its TALL mask.

    With neither h nor dense it is ranked by |δ|.
    """

    tensor: torch.Tensor
    density: float | None = None
    weight: float = 1.0
    h: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    barred: bool = False
    mask_threshold: float = 0.4


def arithmetic_dtype(dtype: torch.dtype) -> type[np.floating]:
    """Method, decisions: "in float32 (float64 for float64 inputs)"."""
    return np.float64 if dtype == torch.float64 else np.float32


def flat(tensor: torch.Tensor, dtype: type[np.floating]) -> np.ndarray:
    wide = torch.float64 if dtype is np.float64 else torch.float32
    return tensor.detach().to(wide).contiguous().reshape(-1).numpy().copy()


def task_vector(expert: torch.Tensor, base: torch.Tensor) -> np.ndarray:
    """Equation 1."""
    dtype = arithmetic_dtype(base.dtype)
    return flat(expert, dtype) - flat(base, dtype)


def scores(expert: Expert, base: torch.Tensor) -> np.ndarray:
    """δ² · h after equations 5 and 6, the file's own scores, or |δ|."""
    dtype = arithmetic_dtype(base.dtype)
    delta = task_vector(expert.tensor, base)
    if expert.dense is not None:
        return flat(expert.dense.expand(base.shape), dtype) * (delta != 0)
    if expert.h is not None:
        with np.errstate(over="ignore", under="ignore"):
            return delta * delta * flat(expert.h.expand(base.shape), dtype)
    return np.abs(delta)


def keep_count(expert: Expert, experts: int, numel: int) -> int:
    if expert.barred:
        return 0
    density = 1 / experts if expert.density is None else expert.density
    return round(density * numel)


def best_positions(
    ranking: np.ndarray, count: int, taken: set[int] | frozenset[int] = frozenset()
) -> list[int]:
    """The untaken positions of highest score, the lowest index first among equals, never a 0."""
    candidates = [i for i, s in enumerate(ranking.tolist()) if s > 0 and i not in taken]
    candidates.sort(key=lambda i: (-ranking[i].item(), i))
    return candidates[:count]


def layer_index(name: str, blocks: int) -> int:
    """0 before the blocks, the block's own number, the number of blocks after them."""
    if number := re.search(r"\.(\d+)\.", name):
        return int(number.group(1))
    return 0 if "embed" in name else blocks


def merging_order(experts: int, layer: int) -> list[int]:
    """Section 3.2: every layer's list is the previous one's, rotated left by one."""
    order = list(range(experts))
    for _ in range(layer):
        order = [*order[1:], order[0]]
    return order


def owners(base: torch.Tensor, experts: Sequence[Expert], order: Sequence[int]) -> list[int]:
    """Algorithm 1: who claims each position of the flattened tensor."""
    owner = [BASE] * base.numel()
    claimed: set[int] = set()
    for k in order:
        count = keep_count(experts[k], len(experts), base.numel())
        for position in best_positions(scores(experts[k], base), count, claimed):
            owner[position] = k
            claimed.add(position)
    return owner


def merge_owned(
    base: torch.Tensor, experts: Sequence[Expert], owner: Sequence[int], lambda_: float = 1.0
) -> torch.Tensor:
    """Equation 8: bit for bit where nothing is scaled, else one rounding to the base's dtype."""
    dtype = arithmetic_dtype(base.dtype)
    merged = base.detach().contiguous().reshape(-1).clone()
    wide_base = flat(base, dtype)
    for k, expert in enumerate(experts):
        positions = [i for i, who in enumerate(owner) if who == k]
        if not positions:
            continue
        scale = expert.weight * lambda_
        if scale == 1:
            merged[positions] = expert.tensor.detach().contiguous().reshape(-1)[positions]
            continue
        moved = wide_base + dtype(scale) * task_vector(expert.tensor, base)
        merged[positions] = torch.from_numpy(moved)[positions].to(base.dtype)
    return merged.reshape(base.shape)


def obim(
    base: torch.Tensor,
    experts: Sequence[Expert],
    *,
    layer: int = 0,
    order: str = "rotation",
    lambda_: float = 1.0,
) -> torch.Tensor:
    """OBM + IM of one tensor."""
    merging = merging_order(len(experts), layer if order == "rotation" else 0)
    return merge_owned(base, experts, owners(base, experts, merging), lambda_)


def ties_obm(
    base: torch.Tensor,
    experts: Sequence[Expert],
    *,
    lambda_: float = 1.0,
    normalize: bool = True,
) -> torch.Tensor:
    """TIES as mergekit does it: trim (here by score), elect the sum's sign, disjoint mean."""
    dtype = arithmetic_dtype(base.dtype)
    trimmed = trim(base, experts)
    votes = np.zeros(base.numel(), dtype)
    for tau in trimmed:
        votes += tau
    return disjoint_mean(base, experts, trimmed, votes, lambda_, normalize)


def obm_sign(
    base: torch.Tensor,
    experts: Sequence[Expert],
    *,
    lambda_: float = 1.0,
    normalize: bool = True,
) -> torch.Tensor:
    """The same, but each expert votes with its score and its sign."""
    dtype = arithmetic_dtype(base.dtype)
    trimmed = trim(base, experts)
    votes = np.zeros(base.numel(), dtype)
    for expert, tau in zip(experts, trimmed, strict=True):
        votes += np.sign(tau) * scores(expert, base) * dtype(abs(expert.weight))
    return disjoint_mean(base, experts, trimmed, votes, lambda_, normalize)


def trim(base: torch.Tensor, experts: Sequence[Expert]) -> list[np.ndarray]:
    """weight · δ at the best positions of each expert, 0 elsewhere."""
    trimmed = []
    for expert in experts:
        delta = task_vector(expert.tensor, base)
        count = keep_count(expert, len(experts), base.numel())
        kept = np.zeros_like(delta)
        for position in best_positions(scores(expert, base), count):
            kept[position] = delta[position] * delta.dtype.type(expert.weight)
        trimmed.append(kept)
    return trimmed


def disjoint_mean(
    base: torch.Tensor,
    experts: Sequence[Expert],
    trimmed: Sequence[np.ndarray],
    votes: np.ndarray,
    lambda_: float,
    normalize: bool,
) -> torch.Tensor:
    """What agrees with the vote, averaged and added to the base."""
    dtype = arithmetic_dtype(base.dtype)
    merged = flat(base, dtype)
    for i in range(base.numel()):
        sign = 1 if votes[i] >= 0 else -1
        mean, divisor = dtype(0), dtype(0)
        for kept, expert in zip(trimmed, experts, strict=True):
            if np.sign(kept[i]) == sign:
                mean += kept[i]
                divisor += dtype(expert.weight)
        if normalize and divisor != 0:
            mean /= divisor
        merged[i] += mean * dtype(lambda_)
    return rounded(merged, base)


def rounded(merged: np.ndarray, base: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(merged).to(base.dtype).reshape(base.shape)


# --- the objective of the merged weights --------------------------------------------------


def curvature(
    expert: Expert, base: torch.Tensor, dtype: type[np.floating], delta: np.ndarray
) -> np.ndarray:
    """h: as stored, s / δ² of a dense file (0 where δ is), or 1."""
    if expert.h is not None:
        return flat(expert.h.expand(base.shape), dtype)
    if expert.dense is None:
        return np.ones(base.numel(), dtype)
    h = np.zeros(base.numel(), dtype)
    squared = delta * delta
    known = squared != 0
    h[known] = flat(expert.dense.expand(base.shape), dtype)[known] / squared[known]
    return h


@dataclass
class Objective:
    """Σ_k a_k (c − δ_k)² = A c² − 2 B c + const at every position of the flattened tensor.

    Attributes:
        deltas: δ_k.
        weights: a_k = w_k h_k.
        a, b: A = Σ a_k and B = Σ a_k δ_k, summed in the recipe's order.
    """

    deltas: list[np.ndarray]
    weights: list[np.ndarray]
    a: np.ndarray
    b: np.ndarray

    def cost(self, c: np.ndarray, stretch: float = 1.0) -> np.ndarray:
        return (self.a * c - self.b.dtype.type(2 * stretch) * self.b) * c

    def error(self, c: np.ndarray) -> np.ndarray:
        """The sum itself, constant included."""
        return sum(a * (c - d) ** 2 for a, d in zip(self.weights, self.deltas, strict=True))


def objective(
    base: torch.Tensor, experts: Sequence[Expert], dtype: type[np.floating] | None = None
) -> Objective:
    """In the method's arithmetic unless told otherwise."""
    dtype = dtype or arithmetic_dtype(base.dtype)
    a, b = np.zeros(base.numel(), dtype), np.zeros(base.numel(), dtype)
    deltas, weights = [], []
    for expert in experts:
        delta = flat(expert.tensor, dtype) - flat(base, dtype)
        weight = curvature(expert, base, dtype, delta) * dtype(expert.weight)
        a += weight
        b += weight * delta
        deltas.append(delta)
        weights.append(weight)
    return Objective(deltas, weights, a, b)


def least_error_owners(objective: Objective, stretch: float = 1.0) -> list[int]:
    """The cheapest of 0 and every δ_k; the base first among equals, then the recipe's order."""
    costs = [objective.cost(delta, stretch).tolist() for delta in objective.deltas]
    owner = []
    for i in range(len(objective.a)):
        best, who = 0.0, BASE
        for k, cost in enumerate(costs):
            if cost[i] < best:
                best, who = cost[i], k
        owner.append(who)
    return owner


def comparable(experts: Sequence[Expert]) -> list[Expert]:
    """One without saliency makes the whole tensor one by magnitude; the barred are left out."""
    present = [e for e in experts if not e.barred]
    if all(e.h is not None or e.dense is not None for e in present):
        return present
    return [replace(e, h=None, dense=None) for e in present]


def least_error(
    base: torch.Tensor, experts: Sequence[Expert], *, lambda_: float = 1.0, stretch: float = 1.0
) -> torch.Tensor:
    """obim with `assignment: least_error`, of one tensor."""
    present = comparable(experts)
    if not present:
        return base
    owner = least_error_owners(objective(base, present), stretch)
    return merge_owned(base, [replace(e, weight=1.0) for e in present], owner, lambda_)


def nearest(
    base: torch.Tensor,
    experts: Sequence[Expert],
    *,
    lambda_: float = 1.0,
    stretch: float | np.ndarray,
) -> torch.Tensor:
    """obim with `assignment: nearest`, of one tensor; by cosines if it gets a matrix of them."""
    stretch = stretch_to_one(experts, stretch) if isinstance(stretch, np.ndarray) else stretch
    return least_error(base, experts, lambda_=lambda_, stretch=stretch)


def cosines(
    base: Mapping[str, torch.Tensor], experts: Sequence[Mapping[str, torch.Tensor]]
) -> np.ndarray:
    """Of every two task vectors, over all tensors together."""
    rows = [[(e[name].double() - base[name].double()).flatten() for name in base] for e in experts]
    deltas = torch.stack([torch.cat(row) for row in rows]).numpy()
    unit = deltas / np.sqrt((deltas**2).sum(1, keepdims=True))
    return np.asarray(unit @ unit.T)


def stretch_to_one(experts: Sequence[Expert], cosine: np.ndarray) -> float:
    """What makes the weighted mean of unit vectors with these cosines a unit vector."""
    w = np.array([0.0 if e.barred else e.weight for e in experts])
    return round(float(w.sum() / np.sqrt(w @ cosine @ w)), 4) if w.any() else 1.0


def regmean_diag(
    base: torch.Tensor,
    experts: Sequence[Expert],
    *,
    lambda_: float = 1.0,
    stretch: float | np.ndarray = 1.0,
) -> torch.Tensor:
    """Σ w h θ / Σ w h, times the stretch; the mean by w alone where that is 0 / 0."""
    stretch = stretch_to_one(experts, stretch) if isinstance(stretch, np.ndarray) else stretch
    present = comparable(experts)
    dtype = arithmetic_dtype(base.dtype)
    merged = flat(base, dtype)
    o = objective(base, present)
    for i in range(base.numel()) if present else ():
        top, bottom = o.b[i], o.a[i]
        if bottom == 0:
            bottom = dtype(0)
            for delta, expert in zip(o.deltas, present, strict=True):
                top += delta[i] * dtype(expert.weight)
                bottom += dtype(expert.weight)
        if bottom != 0:
            merged[i] += top / bottom * dtype(lambda_ * stretch)
    return rounded(merged, base)


def gram_estimate(gram: torch.Tensor, shrink: float, columns: int | None) -> torch.Tensor:
    """Ĝ of RegMean: G's diagonal, and its other elements, or those of L, times the shrink.

    Args:
        gram: G, float64 [d, d].
        shrink: s.
        columns: Of the sketch; 0 for the diagonal alone, None for G itself.
    """
    low = gram if columns is None else torch.zeros_like(gram)
    if columns:
        omega = draw_test_matrix(len(gram), columns).double()
        sketch = gram @ omega
        low = sketch @ torch.linalg.pinv(omega.T @ sketch, hermitian=True, rtol=1e-9) @ sketch.T
    estimate = shrink * low
    estimate.diagonal().copy_(gram.diagonal())
    return estimate


def regmean(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    grams: Sequence[torch.Tensor],
    weights: Sequence[float],
    scale: float = 1.0,
) -> torch.Tensor:
    """θ_B + scale · D, Σ w_k (D − δ_k) Ĝ_k = 0, in float64, of weights [out, in]."""
    deltas = [expert.double() - base.double() for expert in experts]
    matrix = sum(w * g for w, g in zip(weights, grams, strict=True))
    pulls = sum(w * d @ g for w, d, g in zip(weights, deltas, grams, strict=True))
    return base.double() + scale * torch.linalg.solve(matrix, pulls.T).T


# --- baselines ----------------------------------------------------------------------------


def consensus_ta(
    base: torch.Tensor,
    experts: Sequence[Expert],
    *,
    min_agreement: int = 2,
    lambda_: float = 1.0,
) -> torch.Tensor:
    """Wang et al. 2024: Task Arithmetic where enough TALL masks are set."""
    dtype = arithmetic_dtype(base.dtype)
    vectors = [task_vector(e.tensor, base) * dtype(e.weight) for e in experts]
    total = np.zeros(base.numel(), dtype)
    for tau in vectors:
        total += tau
    agreement = np.zeros(base.numel(), int)
    for tau, expert in zip(vectors, experts, strict=True):
        agreement += np.abs(tau) > np.abs(total - tau) * dtype(expert.mask_threshold)
    start = flat(base, dtype)
    return rounded(
        np.where(agreement >= min_agreement, start + total * dtype(lambda_), start), base
    )


def pcb(base: torch.Tensor, experts: Sequence[Expert], *, lambda_: float = 1.0) -> torch.Tensor:
    """Du et al. 2024, after their pcb.py, over one tensor; where it would divide 0 by 0, 0."""
    if not base.numel():
        return base.clone()
    dtype, size, count = arithmetic_dtype(base.dtype), base.numel(), len(experts)

    def normalize(x: np.ndarray, low: float, high: float) -> np.ndarray:
        shifted = np.clip(x, low, high) - dtype(low)
        return shifted / dtype(high - low) if high > low else shifted

    deltas = [task_vector(e.tensor, base) for e in experts]
    bounds, total = [], np.zeros(size, dtype)
    for delta in deltas:
        ordered = sorted(np.abs(delta).tolist())
        bounds.append((ordered[int(size * 0.01)], ordered[max(int(size * 0.99 - 1), 0)]))
        total += np.sign(delta) * normalize(np.abs(delta), *bounds[-1])
    top, bottom = np.zeros(size, dtype), np.zeros(size, dtype)
    for expert, delta, bound in zip(experts, deltas, bounds, strict=True):
        density = 0.1 if expert.density is None else expert.density
        if not density:
            continue
        normal = normalize(np.abs(delta), *bound)
        # exp(K x) / exp(K), as the kernel has it: what follows only looks at ratios.
        intra = torch.from_numpy((normal * normal - 1) * dtype(count)).exp().numpy()
        balance = intra * torch.from_numpy(delta * total).tanh().numpy()
        ordered = sorted(balance.tolist())
        share = normalize(balance, ordered[min(int(size * (1 - density)), size - 1)], ordered[-1])
        top += np.clip(np.abs(delta), *bound) * np.sign(delta) * share * dtype(expert.weight)
        bottom += share
    merged = flat(base, dtype) + top / np.maximum(bottom, dtype(1e-12)) * dtype(lambda_)
    return rounded(merged, base)
