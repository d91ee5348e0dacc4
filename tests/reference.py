"""The method once more, slow and plain, written from its formulas and not from the kernels.

Everything is flat numpy in float32 (float64 for float64 weights), which is the arithmetic that
the method asks for; ranking is a Python sort of exact numbers, element by element. A factored
saliency is h, to be multiplied by δ²; a dense one is the scores themselves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

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

    With neither h nor dense it is ranked by |δ|.
    """

    tensor: torch.Tensor
    density: float | None = None
    weight: float = 1.0
    h: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    barred: bool = False


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
    trimmed = []
    for expert in experts:
        delta = task_vector(expert.tensor, base)
        count = keep_count(expert, len(experts), base.numel())
        kept = np.zeros_like(delta)
        for position in best_positions(scores(expert, base), count):
            kept[position] = delta[position] * dtype(expert.weight)
        trimmed.append(kept)
    merged = flat(base, dtype)
    for i in range(base.numel()):
        total = dtype(0)
        for kept in trimmed:
            total += kept[i]
        sign = 1 if total >= 0 else -1
        mean, divisor = dtype(0), dtype(0)
        for kept, expert in zip(trimmed, experts, strict=True):
            if np.sign(kept[i]) == sign:
                mean += kept[i]
                divisor += dtype(expert.weight)
        if normalize and divisor != 0:
            mean /= divisor
        merged[i] += mean * dtype(lambda_)
    return torch.from_numpy(merged).to(base.dtype).reshape(base.shape)
