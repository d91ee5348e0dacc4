"""Handlers of the operations that use a whole weight at once: products, look-ups, norms, sums.

Each cites its row of the table in the package's docstring. A handler yields what it is sure of. It
yields nothing where it is not: the weight is then named as unscored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_obim.calibration.capture.calls import Call, Handler, Lookup, Use, aten
from mergekit_obim.calibration.capture.squares import Squares
from mergekit_obim.calibration.capture.weights import View


def _product(squares: Squares, call: Call, a: object, b: object) -> Iterator[Use]:
    """Handle rows "Linear" and "Conv1D", a weight times activations, from either side.

    For x W the rows of x are summed over; W x is (xᵀ Wᵀ)ᵀ. A 3-D product counts if it takes the
    same weight for every entry of the batch.
    """
    if (found := call.pair(a, b, expert=True)) is None:
        return
    view, x, weight_is_right = found
    assert view.axes is not None
    if len(view.axes) == 3 and view.axes[0] is not None:
        return  # a weight of its own per entry: experts
    # The input's dim is what is summed over: W's last but one on the right, its last on the left.
    axis = view.axes[-2] if weight_is_right else view.axes[-1]
    x = x if weight_is_right else x.mT
    yield linear_use(squares, view, axis, x)


def linear_use(squares: Squares, view: View, axis: int | None, x: Tensor) -> Use:
    """Return a linear layer's use of its weight: Σ x² of each input feature (equation 6).

    Args:
        squares: Sums them.
        view: The weight.
        axis: The parameter's dim that the input features are along; None for a single feature.
        x: Activations [..., in].
    """
    x = x.reshape(-1, x.shape[-1])
    sketched = bool(squares.columns) and axis is not None
    total = squares.sum(view.weight, x, with_products=sketched)
    total = total.view(view.spread({axis: x.shape[1]}))
    products = partial(squares.products, x) if sketched else None
    return Use(view.weight, f"linear {axis}", total, x.shape[0], view.expert, products)


def _has_rows(view: View, x: Tensor) -> bool:
    """Return whether x spans the weight and has rows besides, as activations do.

    Without rows x may be a mask, a factor or an update, and the result a weight.
    """
    assert view.axes is not None
    kept = sum(axis is not None for axis in view.axes)
    return x.ndim > kept and x.numel() >= math.prod(view.shape)


def bias_use(view: View, added_to: int) -> Use:
    """Return a bias's use, row "bias": its input is always 1, so h = 1.

    Args:
        view: The bias.
        added_to: How many elements the sum has that it was added to.
    """
    rows = added_to // max(1, math.prod(view.shape))
    total = torch.full(view.spread({}), float(rows), dtype=torch.float64, device="cpu")
    return Use(view.weight, "bias", total, rows, view.expert)


def on_mm(squares: Squares, call: Call) -> Iterator[Use]:
    """Handle mm and bmm: ``(a, b)``."""
    yield from _product(squares, call, call.args[0], call.args[1])


def on_addmm(squares: Squares, call: Call) -> Iterator[Use]:
    """Handle addmm and baddbmm: ``(bias, a, b, *, beta, alpha)``; scaled ones are left alone."""
    if call.kwargs.get("beta", 1) != 1 or call.kwargs.get("alpha", 1) != 1:
        return
    bias = call.view(call.args[0], expert=True)
    if bias is not None and _has_rows(bias, call.out):
        yield bias_use(bias, call.out.numel())
    yield from _product(squares, call, call.args[1], call.args[2])


def on_linear(squares: Squares, call: Call) -> Iterator[Use]:
    """Handle linear: ``(x, weight, bias)``, where torch keeps it whole, and for a skipped head."""
    x, w, b = (*call.args, None)[:3]
    view = call.view(w)
    if view is None or view.axes is None or not call.is_data(x):
        return
    yield linear_use(squares, view, view.axes[-1], x)
    if (bias := call.view(b)) is not None:
        yield bias_use(bias, x.numel() // max(1, x.shape[-1]) * w.shape[0])


def on_embedding(squares: Squares, call: Call) -> Iterator[Lookup]:
    """Handle row "embedding": a look-up is a product with one-hot rows, whose squares are counts.

    ``embedding(W, ids)``, ``index_select(W, 0, ids)``, ``index(W, [ids])``. The scale at which rows
    are used is not known yet, so what is yielded is a :class:`Lookup`.
    """
    table, indices = call.args[0], call.args[1]
    if call.op is aten.index_select:
        indices = call.args[2] if call.args[1] == 0 else None
    elif call.op is aten.index:
        indices = indices[0] if len(indices) == 1 else None
    view = call.view(table)
    if view is None or not call.is_data(indices) or indices.dtype not in _INDEX_DTYPES:
        return
    if len(view.weight.shape) > 2:
        return  # what is looked up are weights again
    assert view.axes is not None
    if table.shape == view.weight.shape and all(a in (None, i) for i, a in enumerate(view.axes)):
        rows = view.weight.shape[0]
        counts = torch.bincount(indices.flatten() % rows, minlength=rows)  # -1 is the last
        yield Lookup(view.weight, counts, indices.numel())


def on_mul(squares: Squares, call: Call) -> Iterator[Use]:
    """Handle row "norm gain": γ ⊙ x̂, and any weight that scales activations elementwise."""
    if (found := call.pair(call.args[0], call.args[1])) is None or not _has_rows(*found[:2]):
        return
    view, x, _ = found
    assert view.axes is not None
    # Broadcasting aligns dims from the last. Those that the weight has go last in x, in the order
    # of the weight's own axes; over all others, where γ is the same, x² is summed.
    missing = call.out.ndim - len(view.axes)
    kept = sorted((a, missing + d) for d, a in enumerate(view.axes) if a is not None)
    dims = [dim for _, dim in kept]
    spread = [d for d in range(call.out.ndim) if d not in dims]
    x = x.expand(call.out.shape).permute(*spread, *dims)
    shape = view.spread({axis: view.weight.shape[axis] for axis, _ in kept})
    x = x.reshape(-1, math.prod(shape))
    yield Use(view.weight, "gain", squares.sum(view.weight, x).view(shape), x.shape[0])


def on_add(squares: Squares, call: Call) -> Iterator[Use]:
    """Handle row "bias": ``x + b``."""
    found = call.pair(call.args[0], call.args[1], expert=True)
    if found is None or call.kwargs.get("alpha", 1) != 1:
        return
    if _has_rows(*found[:2]):
        yield bias_use(found[0], call.out.numel())


def on_norm(squares: Squares, call: Call) -> Iterator[Use]:
    """Handle rows "norm gain" and "bias" of norms that are one operation.

    ``native_layer_norm(x, shape, γ, β, eps)``, ``_fused_rms_norm(x, shape, γ, eps)``. γ's input is
    x̂ and not x, and x̂ never leaves the operation: it is made again, in float32.
    """
    x, shape, gain, *rest, eps = call.args
    view = call.view(gain)
    if not call.is_data(x) or (view is not None and gain.shape != view.weight.shape):
        return
    n = math.prod(shape)
    if call.op is aten.native_layer_norm:
        normalise = partial(F.layer_norm, normalized_shape=(n,), eps=eps)
    else:
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        normalise = partial(F.rms_norm, normalized_shape=(n,), eps=eps)
    if view is not None:
        rows = x.reshape(-1, n)
        total = squares.sum(view.weight, rows, normalise).view(view.weight.shape)
        yield Use(view.weight, "gain", total, rows.shape[0])
    if rest and (bias := call.view(rest[0])) is not None:
        yield bias_use(bias, x.numel())


HANDLERS: dict[Any, Handler] = {
    aten.mm: on_mm,
    aten.bmm: on_mm,
    aten.addmm: on_addmm,
    aten.baddbmm: on_addmm,
    aten.linear: on_linear,
    aten.embedding: on_embedding,
    aten.index_select: on_embedding,
    aten.index: on_embedding,
    aten.mul: on_mul,
    aten.add: on_add,
    aten.add_: on_add,
    aten.native_layer_norm: on_norm,
}
if hasattr(aten, "_fused_rms_norm"):  # not before torch 2.8
    HANDLERS[aten._fused_rms_norm] = on_norm
_INDEX_DTYPES = (torch.int64, torch.int32)
