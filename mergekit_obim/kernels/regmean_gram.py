"""RegMean with more of the Gram matrices than their diagonals.

RegMean (Jin et al. 2023, arXiv 2212.09849) asks for the W that comes nearest to the outputs of all
experts on their own inputs. With D = W − θ_B it is the least of

    Σ_k w_k tr((D − δ_k) Ĝ_k (D − δ_k)ᵀ),   which is where   Σ_k w_k (D − δ_k) Ĝ_k = 0.

``kernels.regmean`` cuts G_k = E[x xᵀ] to its diagonal h_k. Here its other elements count too, times
s, the ``shrink`` (RegMean's α, its section 4.2):

    Ĝ_k = s L_k + diag(a_k),   a_k = h_k − s diag L_k,

where L_k is G_k itself or Nyström's approximation U_k U_kᵀ (``kernels.nystrom``). The diagonal is
h_k in either case.

By Woodbury's identity, no matrix of d × d is needed for L_k = U_k U_kᵀ. Let

    a = Σ_k w_k a_k,   V_k = √(w_k s) U_k,   V = [V_1 … V_K],   A = diag(a) + V Vᵀ = Σ_k w_k Ĝ_k,
    E = Σ_k w_k a_k δ_k / a,   the mean weighted by what no sketch explains.

Then Σ_k w_k δ_k Ĝ_k = E diag(a) + Σ_k δ_k V_k V_kᵀ, and taking E A from both sides of
D A = Σ_k w_k δ_k Ĝ_k leaves (D − E) A = Σ_k (δ_k − E) V_k V_kᵀ = Q Vᵀ, so that

    D = E + Q C,   Q = [(δ_1 − E) V_1 … (δ_K − E) V_K],   C = Vᵀ A⁻¹ = (I + Vᵀ (V / a))⁻¹ (V / a)ᵀ.

Per element that is two multiplications by a matrix of as many columns as all the sketches have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mergekit_obim.errors import UnscorableError
from mergekit_obim.kernels.blocks import row_blocks, scratch, scratch_like
from mergekit_obim.kernels.gram import draw_test_matrix
from mergekit_obim.kernels.merging import scaled_sum
from mergekit_obim.kernels.nystrom import nystrom_factor
from mergekit_obim.kernels.scores import working_dtype

# The least share of h that a_k is taken for: with a shrink of 1 nothing may be left of it, and a
# is what E is divided by.
_LEAST_REST = 1e-6
# Up to so many input features the systems with full matrices are solved in float64.
_FLOAT64_FEATURES = 1024
_TASK_VECTOR_COLUMNS = 32


@dataclass(frozen=True)
class Gram:
    """What is known of an expert's Gram matrix G = E[x xᵀ] of one layer's inputs.

    Attributes:
        h: Its diagonal, [d].
        factor: U of :func:`~mergekit_obim.kernels.nystrom.nystrom_factor`, [d, r], float64 on the
            CPU; None where only the diagonal is known, or ``full`` is given.
        full: Gives G itself, [d, d], when it is asked; None otherwise. It is called once.
    """

    h: torch.Tensor
    factor: torch.Tensor | None = None
    full: Callable[[], torch.Tensor] | None = None


# Gives what is known of the inputs of a layer, by the layer's number in a stack of them.
Layers = Callable[[int], Gram]


@dataclass(frozen=True)
class _Solution:
    """D = E + Q C of one layer, but for the task vectors; d-wide rows throughout.

    Attributes:
        shares: w_k a_k / a, [K, d].
        columns: The V_k, [d, r_k] each; r_k may be 0.
        rows: C, [Σ r_k, d].
    """

    shares: torch.Tensor
    columns: list[torch.Tensor]
    rows: torch.Tensor


def merge_regmean_layers(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    axis: int,
    layers: Sequence[Layers],
    weights: Sequence[float],
    shrink: float,
    scale: float,
) -> torch.Tensor:
    """Merge a layer's weight, or those of a mixture's experts, each by itself.

    Args:
        base: θ_B, [out, d] or [layers, out, d], or with the last two swapped.
        experts: θ_k, of the same shape, dtype and device.
        axis: Which axis the input features are: −1, or −2 where they are swapped.
        layers: What is known of each expert's inputs.
        weights: w_k, not negative.
        shrink: s, from 0 to 1.
        scale: On the merged task vector.

    Returns:
        A new contiguous tensor of the base's shape and dtype.

    Raises:
        UnscorableError: A task vector, a sketch or a Gram matrix is not finite.
    """
    merged = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    into, start = input_last(merged, axis), input_last(base, axis)
    ends = [input_last(expert, axis) for expert in experts]
    for index in range(len(start) if start.numel() else 0):
        grams = [known(index) for known in layers]
        tensors = [end[index] for end in ends]
        merge_regmean_gram(start[index], tensors, grams, weights, shrink, scale, into[index])
    return merged


def input_last(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Return a weight as [layers, out, d], a view; see :func:`merge_regmean_layers`."""
    stack = weight if weight.ndim == 3 else weight[None]
    return stack if axis == -1 else stack.mT


def merge_regmean_gram(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    grams: Sequence[Gram],
    weights: Sequence[float],
    shrink: float,
    scale: float,
    merged: torch.Tensor,
) -> None:
    """Merge one layer by θ_M = θ_B + scale · D; see the head of this module for D.

    Features that no expert has seen (Σ_k w_k h_k = 0) get the mean weighted by w_k alone, and the
    base's weights where these are 0 too, as in ``kernels.regmean``.

    If any G_k is full, the system is solved by Cholesky's decomposition of the d × d matrix A,
    scaled to a diagonal of 1, in float64 for up to 1,024 features and in float32 for more. With a
    shrink of 1 it may be singular. Then it is solved with the greatest shrink 1 − ε that is safe:
    ε begins at the root of the dtype's precision, and grows until the squares of the
    decomposition's diagonal, which are what a feature has that the features before it do not
    explain, are at least ε / 2.

    Args:
        base: θ_B, [out, d], of any strides and floating dtype. A transposed view will do for the
            layers that store [d, out].
        experts: θ_k, of the same shape, dtype and device.
        grams: What is known of each expert's G_k.
        weights: w_k, not negative.
        shrink: s, from 0 to 1.
        scale: On the merged task vector.
        merged: Where the result goes: like ``base``.

    Raises:
        UnscorableError: A task vector, a sketch or a Gram matrix is not finite.
    """
    if any(gram.full for gram in grams):
        _merge_full(base, experts, grams, weights, shrink, scale, merged)
        return
    solution = _solve(grams, weights, shrink)
    device, dtype = base.device, working_dtype(base.dtype)
    shares = solution.shares.to(device, dtype)
    columns = [v.to(device, dtype) for v in solution.columns]
    rows = solution.rows.to(device, dtype)
    ends = torch.tensor([0, *(v.shape[1] for v in columns)]).cumsum(0).tolist()
    for part in row_blocks(base):
        deltas, mean = _deltas_and_mean(part, base, experts, shares)
        projected = scratch("Q", len(mean) * len(rows), dtype, device).view(len(mean), len(rows))
        for k, (delta, v) in enumerate(zip(deltas, columns, strict=True)):
            if v.shape[1]:
                torch.mm(delta.sub_(mean), v, out=projected[:, ends[k] : ends[k + 1]])
        _check_finite(projected if len(rows) else mean)
        mean.addmm_(projected, rows)
        merged[part].copy_(scaled_sum(base[part], mean, scale))


def _solve(grams: Sequence[Gram], weights: Sequence[float], shrink: float) -> _Solution:
    """Do the algebra of r × r matrices, in float64 on the CPU."""
    rests, columns = [], []
    for gram, weight in zip(grams, weights, strict=True):
        h = gram.h.to("cpu", torch.float64)
        u = h.new_empty(len(h), 0) if gram.factor is None or not weight else gram.factor
        rest = torch.maximum(h - shrink * u.square().sum(1), max(1 - shrink, _LEAST_REST) * h)
        rests.append(rest * weight)
        columns.append(u * (weight * shrink) ** 0.5)
    shares, total = _shares(rests, weights)
    v = torch.cat(columns, 1)
    over = v / total[:, None]
    core = torch.eye(v.shape[1], dtype=v.dtype) + v.T @ over
    rows = torch.cholesky_solve(over.T, torch.linalg.cholesky(core))
    return _Solution(shares, columns, rows)


def _shares(
    parts: Sequence[torch.Tensor], weights: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each of the parts [d] over their sum, and the sum, which is never 0.

    Where all parts are 0 the weights take their place, and where these are 0 too, each share is.
    """
    stacked = torch.stack(list(parts))
    unseen = stacked.sum(0) == 0
    stacked[:, unseen] = torch.tensor(weights, dtype=stacked.dtype)[:, None]
    total = stacked.sum(0)
    total[total == 0] = 1
    return stacked / total, total


def _merge_full(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    grams: Sequence[Gram],
    weights: Sequence[float],
    shrink: float,
    scale: float,
    merged: torch.Tensor,
) -> None:
    # With E the mean weighted by the whole of h, D = E + s Σ_k w_k (δ_k − E) O_k A⁻¹, O_k being
    # G_k without its diagonal: in Σ_k w_k (δ_k − E) diag(h_k) nothing is left of that.
    device = base.device
    dtype = torch.float64 if base.shape[1] <= _FLOAT64_FEATURES else working_dtype(base.dtype)
    hs = [gram.h.to("cpu", torch.float64) * w for gram, w in zip(grams, weights, strict=True)]
    shares, total = _shares(hs, weights)
    shares, scaling = shares.to(device, dtype), total.rsqrt().to(device, dtype)
    sums = torch.zeros(base.shape[1], base.shape[1], dtype=dtype, device=device)
    pulls = torch.zeros(base.shape, dtype=dtype, device=device)
    for k, (gram, weight) in enumerate(zip(grams, weights, strict=True)):
        off = _off_diagonal(gram, dtype, device) if weight else None
        if off is None:
            continue
        off *= weight
        sums += off
        for part in row_blocks(base, by_square=True):
            deltas, mean = _deltas_and_mean(part, base, experts, shares)
            pulls[part].addmm_(deltas[k].sub_(mean), off)
        del off
    _check_finite(pulls)
    _check_finite(sums)
    sums *= scaling[:, None]
    sums *= scaling
    shrink, lower = _decompose(sums, shrink)
    del sums
    for part in row_blocks(base, by_square=True):
        _, mean = _deltas_and_mean(part, base, experts, shares)
        pull = (pulls[part] * scaling).T
        mean.add_(torch.cholesky_solve(pull, lower).T.mul_(scaling), alpha=shrink)
        _check_finite(mean)
        merged[part].copy_(scaled_sum(base[part], mean, scale))


def _off_diagonal(gram: Gram, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """Return what is known of G outside its diagonal, in memory of its own."""
    if gram.full:
        off = gram.full().to(device, dtype, copy=True)
    elif gram.factor is not None:
        u = gram.factor.to(device, dtype)
        off = u @ u.T
    else:
        return None
    off.fill_diagonal_(0)
    return off


def _decompose(off: torch.Tensor, shrink: float) -> tuple[float, torch.Tensor]:
    """Return the shrink that is safe, and Cholesky's factor of I + shrink · ``off``.

    Args:
        off: The off-diagonal elements, of a matrix whose diagonal is 1; [d, d].
        shrink: The shrink that is asked for.
    """
    rest = max(1 - shrink, torch.finfo(off.dtype).eps ** 0.5)
    while True:
        matrix = off * (1 - rest)
        matrix.diagonal().fill_(1)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed and float(lower.diagonal().min()) ** 2 >= rest / 2:
            return 1 - rest, lower
        rest *= 4


def _deltas_and_mean(
    part: slice, base: torch.Tensor, experts: Sequence[torch.Tensor], shares: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the δ_k of a block of rows, and E; in memory that the next block is going to use."""
    start = base[part]
    mean, deltas = scratch_like("E", start, shares.dtype), []
    for k, (expert, share) in enumerate(zip(experts, shares, strict=True)):
        delta = scratch_like(f"delta {k}", start, shares.dtype)
        deltas.append(delta.copy_(expert[part]).sub_(start))
        if k:
            mean.addcmul_(deltas[k], share)
        else:
            torch.mul(deltas[k], share, out=mean)
    return deltas, mean


def _check_finite(values: torch.Tensor) -> None:
    if not values.isfinite().all():
        raise UnscorableError("the task vector or the Gram matrix of its inputs is not finite")


def task_vector_layers(
    base: torch.Tensor, experts: Sequence[torch.Tensor], axis: int
) -> list[Layers]:
    """Return what task vectors themselves tell of their layers' inputs, without any data.

    A gradient step of a layer is g xᵀ, a sum of its inputs x, so δᵀ δ is large where the inputs
    were: it takes the place of G = E[x xᵀ], scaled to a mean diagonal of 1 for every expert. It is
    sketched as G is, with 32 columns, or with d where the sketches of all experts together would
    have no fewer. An expert that does not differ from its base tells nothing: its G is I.

    Source: covariance matrices from differences of weights, arXiv 2604.01329, and ACE-Merging,
    arXiv 2603.02945, which scale and damp them in ways of their own.

    Args:
        base: As in :func:`merge_regmean_layers`, like the other arguments.
        experts: θ_k.
        axis: The axis of the input features.
    """
    start, features = input_last(base, axis), base.shape[axis]
    few = len(experts) * _TASK_VECTOR_COLUMNS < features
    omega = draw_test_matrix(features, _TASK_VECTOR_COLUMNS if few else features)

    def layers_of(expert: torch.Tensor) -> Layers:
        end = input_last(expert, axis)
        return lambda index: _task_vector_gram(start[index], end[index], omega)

    return [layers_of(expert) for expert in experts]


def _task_vector_gram(base: torch.Tensor, expert: torch.Tensor, omega: torch.Tensor) -> Gram:
    ones = torch.ones(1, base.shape[1], dtype=working_dtype(base.dtype), device=base.device)
    omega = omega.to(ones)
    h = torch.zeros(base.shape[1], dtype=torch.float64, device=base.device)
    sketch = torch.zeros(omega.shape, dtype=torch.float64, device=base.device)
    for part in row_blocks(base):
        (delta,), _ = _deltas_and_mean(part, base, [expert], ones)
        sketch += delta.T @ (delta @ omega)
        h += delta.square().sum(0)
    mean = float(h.mean())
    if mean == 0:
        return Gram(torch.ones_like(h))
    h /= mean
    return Gram(h, nystrom_factor(sketch / mean, h))
