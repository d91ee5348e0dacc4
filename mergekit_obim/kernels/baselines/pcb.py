"""PCB-Merging: parameters compete within and between the experts.

Du et al. 2024, "Parameter Competition Balancing for Model Merging" (NeurIPS 2024,
arXiv 2410.02396), in the form of the authors' code (github.com/duguodong7/pcb-merging,
vision_source_code/pcb.py): its steps ``intra``, ``inter``, ``balancing`` and ``scale``, with
its clipping and its exp and tanh.

The original ranks and normalises over the whole model, flattened. This does so over each
tensor, which is all that a merge method sees: a tensor in which little changed gets as large
a share as one in which much did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mergekit_obim.errors import UnscorableError
from mergekit_obim.kernels.backend import array, order_statistics
from mergekit_obim.kernels.blocks import Block, blocks
from mergekit_obim.kernels.merging import scaled_sum
from mergekit_obim.kernels.scores import task_vector, working_dtype

# The share of the smallest and of the largest |δ| that is clipped.
_CLIP = 0.01


def merge_pcb(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    densities: Sequence[float],
    weights: Sequence[float],
    scale: float,
) -> torch.Tensor:
    """Merge by how well each parameter does in both competitions.

    Per expert i, with norm(x) = (x − min x) / (max x − min x), 0 where all x are equal:
    A_i = |δ_i|, clipped at its 1 % and 99 % quantiles; intra = exp(K · norm(A_i)²);
    inter = tanh(δ_i ⊙ Σ_j sign(δ_j) ⊙ norm(A_j)); S_i = norm(intra ⊙ inter, clipped from
    below at the quantile that leaves the top r_i). The merged task vector is
    Σ_i weight_i · sign(δ_i) ⊙ A_i ⊙ S_i / max(Σ_i S_i, 1e-12).

    Computed with exp(K · (norm(A_i)² − 1)), which gives the same S_i, as norm takes factors out.
    The last bits of exp and tanh differ between devices.

    Args:
        base: θ_B, any shape and floating dtype.
        experts: θ_i, same shape, dtype and device each, K of them.
        densities: r_i; with 0 the expert takes no part in the mean.
        weights: weight_i (the paper's λ_i).
        scale: λ, on the merged task vector.

    Returns:
        A new contiguous tensor of the base's shape and dtype.

    Raises:
        UnscorableError: A task vector is not finite.
    """
    merged = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    size, dtype = base.numel(), working_dtype(base.dtype)
    if not size:
        return merged
    values, total = torch.zeros(2, size, dtype=dtype, device=base.device).unbind()
    parts = list(blocks(base.shape, base.device))

    # Four passes, as each needs quantiles or a sum over all that the one before computes. What is
    # needed again is computed again: to keep it would take K float32 tensors.
    bounds = []
    for expert in experts:
        for block in parts:
            _at(block, base, values).copy_(_moved(block, base, expert).abs_())
        if not math.isfinite(float(array(values).max())):
            raise UnscorableError("the task vector is not finite")
        # Indices into the sorted values, as the original has them.
        ranks = int(size * _CLIP), max(int(size * (1 - _CLIP) - 1), 0)
        bounds.append(order_statistics(values, ranks))
    for expert, bound in zip(experts, bounds, strict=True):
        for block in parts:
            delta = _moved(block, base, expert)
            _at(block, base, total).add_(_normal(delta.abs(), *bound).copysign_(delta))

    def balance(block: Block, delta: torch.Tensor, bound: tuple[float, float]) -> torch.Tensor:
        """Return intra ⊙ inter of one expert in a block."""
        # exp(K · x²) overflows float32 from K = 89 experts on; divided by exp(K) it cannot.
        count = len(experts)
        intra = _normal(delta.abs(), *bound).square_().sub_(1).mul_(count).exp_()
        return intra.mul_(_at(block, base, total).mul(delta).tanh_())

    limits = []
    for expert, density, bound in zip(experts, densities, bounds, strict=True):
        for block in parts:
            delta = _moved(block, base, expert)
            _at(block, base, values).copy_(balance(block, delta, bound))
        first = min(int(size * (1 - density)), size - 1)
        limits.append(order_statistics(values, (first, size - 1)))
    for block in parts:
        start = block.of(base)
        top = torch.zeros(start.shape, dtype=dtype, device=base.device)
        divisor = torch.zeros_like(top)
        for expert, density, weight, bound, limit in zip(
            experts, densities, weights, bounds, limits, strict=True
        ):
            if not density:
                continue
            delta = _moved(block, base, expert)
            share = _normal(balance(block, delta, bound), *limit)
            divisor += share
            clipped = delta.abs().clamp_(*bound).mul_(delta.sign())
            top += clipped.mul_(share).mul_(weight)
        block.of(merged).copy_(scaled_sum(start, top.div_(divisor.clamp_(min=1e-12)), scale))
    return merged


def _moved(block: Block, base: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    return task_vector(block.of(expert), block.of(base))


def _at(block: Block, base: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """Return a block's part of what is stored flat, [N], as a view of the block's shape."""
    shape = block.of(base).shape
    return flat[block.start : block.start + shape.numel()].view(shape)


def _normal(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Clip values to low … high and spread that over 0 … 1, or 0 if it is one point, in place."""
    values.clamp_(low, high).sub_(low)
    return values.div_(high - low) if high > low else values
