"""Measure h, the curvature of each weight's own operation, while a model runs forward.

The paper scores a linear layer by its output error, whose Hessian is 2 X Xᵀ (arXiv 2502.12217,
equation 6): all that is needed of a calibration run is E[x_j²] of each layer's input. This module
takes the same objective to every operation that is linear in its weight.

Weights are not found by their module's class, since models use them in too many ways (Conv1D,
``x @ W.T``, ``1 + w``, bare parameters). Instead a dispatch mode watches every aten operation
and recognises a weight by where it lies in memory: its storage, offset and strides, so also when
transposed, reshaped by dims of size one, cast, or shifted by a constant. One handler per family of
operations then yields what the operation says about h; each handler cites its row of this table:

    ============  ======================  ======================================================
    row           operation               h, shaped to broadcast against the weight
    ============  ======================  ======================================================
    Linear        x Wᵀ, W [out, in]       E[x_j²], [1, in]
    Conv1D        x W, W [in, out]        E[x_j²], [in, 1]
    embedding     one-hot(token) W        relative frequency · scale², [vocab, 1]
    norm gain     γ ⊙ x̂                   E[x̂_j²], [d]
    bias          + b                     1, [1]
    tied          several of these        the sum of the terms, each with its own count
    ============  ======================  ======================================================

A wrong number is worse than none: a weight that meets an operation without a handler, or a
handler that cannot account for it, is named in :meth:`CurvatureCapture.unscored` and gets no h,
whatever else it did. A further kind of weight (experts, convolutions) is a further handler.

What stays out of sight: kernels that do not go through PyTorch's dispatcher (their weights are
"never used"), and weights that were combined or cast before the capture began.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mergekit_obim.errors import CalibrationError

aten = torch.ops.aten

# Squares are taken in pieces of about 1 MiB, which stay in a CPU's cache: in float32 that costs
# less than half of squaring everything at once. Accelerators want few large kernels instead.
_CHUNK_ELEMENTS = {"cpu": 2**18}
_CHUNK_ELEMENTS_ELSEWHERE = 2**24
# Inputs whose sums are remembered: q, k and v see one input, gate and up another.
_SHARED_INPUTS = 4
# On accelerators, reading a flag back waits for the device: so flags are read in groups.
_FLAGS_PER_CHECK = 256


@dataclass(frozen=True)
class Curvature:
    """What a calibration run measured for one parameter.

    Attributes:
        h: float32 on the CPU, shaped to broadcast against the parameter: Linear [1, in],
            Conv1D [in, 1], embedding [vocab, 1], embedding tied to a head [vocab, d], norm gain
            [d], bias [1].
        rows: How many rows (tokens) h is the mean of; of tied terms, the largest.
    """

    h: Tensor
    rows: int


class _Weight(NamedTuple):
    """Where a parameter, or a tensor equal to it plus a constant, lies within its storage."""

    name: str
    shape: torch.Size  # the parameter's
    offset: int
    layout: tuple[tuple[int, int], ...]  # (size, stride) of each dim
    axes: tuple[int | None, ...] | None  # the parameter's dim behind each dim; None: opaque

    def axes_of(self, tensor: Tensor) -> tuple[int | None, ...] | None:
        """The parameter's dim behind each of the tensor's dims, if that shows the whole weight.

        Dims of size one and expanded dims have none: (1, 0) for Wᵀ, (None, 0) for γ[None].
        """
        if self.axes is None or _offset(tensor) != self.offset:
            return None
        left = {at: axis for at, axis in zip(self.layout, self.axes, strict=True) if at[0] > 1}
        axes = []
        for at in _layout(tensor):
            real = at[0] > 1 and at[1] > 0
            if real and at not in left:
                return None
            axes.append(left.pop(at) if real else None)
        return None if left else tuple(axes)

    def overlaps(self, tensor: Tensor) -> bool:
        start, stop = _extent(_offset(tensor), _layout(tensor))
        first, last = _extent(self.offset, self.layout)
        return start < last and first < stop


class _View(NamedTuple):
    """A tensor that shows a whole weight (axes) or only a part or function of it (None)."""

    weight: _Weight
    axes: tuple[int | None, ...] | None


class _Use(NamedTuple):
    """What one operation adds to a weight's h: a sum of squares and how many rows it is over."""

    weight: _Weight
    row: str  # of the table, so that terms of different kinds keep their own counts
    total: Tensor  # broadcasts against the weight
    rows: int


@dataclass
class _Term:
    total: Tensor  # float64
    rows: int = 0


@dataclass
class _Lookup:
    """Rows that were looked up in an embedding, until it is seen at what scale they are used."""

    weight: _Weight
    counts: Tensor  # int64 [vocab]
    rows: int
    scale: float | None = None  # at which they were counted


class _Passing(NamedTuple):
    """What is known of a tensor that the forward made; the reference keeps its address unique."""

    storage: StorageWeakRef
    weights: list[_Weight]
    lookup: tuple[_Lookup, float] | None  # and the scale so far


@dataclass
class _Call:
    """One aten operation, with the views of weights among its arguments."""

    op: Any  # the OpOverloadPacket
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    views: dict[int, list[_View]] = field(default_factory=dict)  # id of the argument -> views
    lookups: list[tuple[Tensor, _Lookup, float]] = field(default_factory=list)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor among the arguments."""
        return _tensors((*self.args, *self.kwargs.values()))

    def view(self, tensor: object) -> _View | None:
        """The one whole weight that this argument shows, if it does."""
        views = self.views.get(id(tensor), [])
        return views[0] if len(views) == 1 and views[0].axes is not None else None

    def is_data(self, value: object) -> bool:
        return isinstance(value, Tensor) and id(value) not in self.views and not value.is_complex()

    def pair(self, a: object, b: object) -> tuple[_View, Tensor, bool] | None:
        """(weight, data, weight is on the right), if exactly one of the two is a weight."""
        left, right = self.view(a), self.view(b)
        if right is not None and isinstance(a, Tensor) and self.is_data(a):
            return right, a, True
        if left is not None and isinstance(b, Tensor) and self.is_data(b):
            return left, b, False
        return None


Handler = Callable[["CurvatureCapture", _Call], Iterator["_Use | _Lookup"]]


class CurvatureCapture(TorchDispatchMode):
    """Context manager around forwards: ``with CurvatureCapture(model) as capture: model(…)``.

    It turns gradients off; the caller puts the model in eval mode, and passes batches without
    padding, since every row counts. Sums are kept on the activations' devices, squared in float32
    (float64 for float64 activations) and added up over batches in float64. It may be entered
    again, to go on counting.

    Args:
        model: The model; its parameters must not move to another device meanwhile.
        skip_logits: Measure the output head's input, but return logits of width zero instead of
            a [tokens, vocab] product. Tried first on a single token, twice: where it would change
            any other number, or break the forward, logits are built as usual.

    Raises:
        CalibrationError: From within the forward, on CPUs as soon as the input of a weight's
            operation is not finite; the message names the weight.
    """

    def __init__(self, model: nn.Module, *, skip_logits: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._head = _skippable_head(model) if skip_logits else None
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        self._terms: dict[str, dict[str, _Term]] = defaultdict(dict)
        self._unaccounted: dict[str, str] = {}
        self._parameters: dict[int, list[_Weight]] = {}  # by storage
        self._passing: dict[int, _Passing] = {}  # by storage, while inside the context
        # Input -> its sum; the reference keeps the storage's address unique.
        self._sums: dict[tuple[Any, ...], tuple[StorageWeakRef, Tensor]] = {}
        self._flags: list[tuple[str, Tensor]] = []
        self._stack = ExitStack()

    @property
    def skips_logits(self) -> bool:
        return self._head is not None

    @property
    def tied(self) -> dict[str, tuple[str, ...]]:
        """The other names of each parameter that has several: first name -> further names."""
        first = {id(p): name for name, p in self._model.named_parameters()}
        others: dict[str, tuple[str, ...]] = {}
        for name, p in self._model.named_parameters(remove_duplicate=False):
            if name != first[id(p)]:
                others[first[id(p)]] = (*others.get(first[id(p)], ()), name)
        return others

    def __enter__(self) -> CurvatureCapture:
        self._parameters = {}
        for name, p in self._model.named_parameters():
            weight = _weight_at(name, p.shape, p, tuple(range(p.ndim)))
            self._parameters.setdefault(_storage(p), []).append(weight)
        with ExitStack() as stack:
            # inference_mode hides the operations inside composite ones; no_grad does not.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            if self._head is not None:
                stack.callback(_restore_forward, self._head, vars(self._head).get("forward"))
                self._head.forward = self._measured_head  # type: ignore[method-assign,assignment]
            super().__enter__()  # type: ignore[no-untyped-call]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, exc_type: Any, exc: Any, tb: Any) -> None:
        super().__exit__(exc_type, exc, tb)  # type: ignore[no-untyped-call]
        self._stack.close()
        self._passing.clear()
        self._sums.clear()
        if exc_type is None:
            self._check_finite()
        self._flags.clear()

    def curvatures(self) -> dict[str, Curvature]:
        """h of each measured parameter, in the model's order; a tied weight once (`tied`)."""
        measured = {}
        for name in self._shapes:
            terms = [t for t in self._terms.get(name, {}).values() if t.rows > 0]
            if not terms or name in self._unaccounted:
                continue
            h = (terms[0].total / terms[0].rows).to("cpu", torch.float32)
            for term in terms[1:]:
                h = h + (term.total / term.rows).to("cpu", torch.float32)
            measured[name] = Curvature(h=h, rows=max(term.rows for term in terms))
        return measured

    def unscored(self) -> dict[str, str]:
        """Every other parameter, with the reason why it has no h."""
        reasons = {}
        for name in self._shapes:
            terms = self._terms.get(name, {})
            if name in self._unaccounted:
                reasons[name] = self._unaccounted[name]
            elif not terms:
                reasons[name] = "never used in the calibration run"
            elif not any(term.rows for term in terms.values()):
                reasons[name] = "no token reached it in the calibration run"
        return reasons

    def state(self) -> dict[str, Any]:
        """Everything counted so far, as dicts of tensors (float64, CPU), ints and strings."""
        terms = {
            f"{row}:{name}": term
            for name, by_row in self._terms.items()
            for row, term in by_row.items()
        }
        return {
            "totals": {key: term.total.cpu() for key, term in terms.items()},
            "rows": {key: term.rows for key, term in terms.items()},
            "unaccounted": dict(self._unaccounted),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave for the same model."""
        self._terms.clear()
        for key, total in state["totals"].items():
            row, _, name = key.partition(":")
            self._terms[name][row] = _Term(total.clone(), state["rows"][key])
        self._unaccounted = dict(state["unaccounted"])

    # -- watching operations ------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        call = _Call(func.overloadpacket, args, kwargs, out)
        for tensor in call.tensors():
            self._recognise(tensor, call)
        writes = func._schema.is_mutable
        if writes:
            self._forget_written(func, call)
        if call.op in _METADATA_ONLY or not (call.views or call.lookups):
            return out
        if not writes and _shares_storage(call):
            return out  # a view, recognised again when it is used
        if call.views:
            self._account(call)
        for tensor, lookup, scale in call.lookups:
            self._follow(call, tensor, lookup, scale)
        return out

    def _recognise(self, tensor: Tensor, call: _Call) -> None:
        key = _storage(tensor)
        passing = self._passing.get(key)
        known = passing.weights if passing is not None else self._parameters.get(key, ())
        views = [_View(w, w.axes_of(tensor)) for w in known if w.overlaps(tensor)]
        if views:
            call.views[id(tensor)] = views
        if passing is not None and passing.lookup is not None:
            call.lookups.append((tensor, *passing.lookup))

    def _account(self, call: _Call) -> None:
        """Add what the operation says of its weights; name those it says nothing of."""
        if (source := _copied(call)) is not None:
            copy = _weight_at(source.weight.name, source.weight.shape, call.out, source.axes)
            self._remember(call.out, [copy])
            return
        accounted = set()
        for use in _HANDLERS.get(call.op, _unknown)(self, call):
            accounted.add(use.weight.name)
            if isinstance(use, _Lookup):
                self._remember(call.out, [], (use, 1.0))
            else:
                self._add(use)
        views = [view for several in call.views.values() for view in several]
        for view in views:
            if view.axes is None or view.weight.name not in accounted:
                self._unaccounted.setdefault(view.weight.name, _why(call, view))
        # What is made of weights alone is no activation: a later handler must not take it for one.
        if not accounted and all(id(t) in call.views or t.ndim == 0 for t in call.tensors()):
            for made in _tensors((call.out,)):
                opaque = [_weight_at(w.name, w.shape, made, None) for w, _ in views]
                self._remember(made, opaque)

    def _remember(
        self,
        tensor: Tensor,
        weights: list[_Weight],
        lookup: tuple[_Lookup, float] | None = None,
    ) -> None:
        self._passing = {k: p for k, p in self._passing.items() if not _expired(p.storage)}
        self._passing[_storage(tensor)] = _Passing(_reference(tensor), weights, lookup)

    def _forget_written(self, func: Any, call: _Call) -> None:
        """A tensor that was written to is no longer the copy, the rows or the input it was.

        (Version counters cannot tell: views made under a dispatch mode have their own.)
        """
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = call.args[i] if i < len(call.args) else call.kwargs.get(argument.name)
            for tensor in _tensors((written,)):
                for view in call.views.get(id(tensor), ()):
                    self._unaccounted.setdefault(view.weight.name, "changed while the model ran")
                key = _storage(tensor)
                self._passing.pop(key, None)
                for known in [k for k in self._sums if k[0] == key]:
                    del self._sums[known]

    def _measured_head(self, x: Tensor) -> Tensor:
        """Stands in for the output head's forward: counts its input, builds no logits."""
        assert self._head is not None
        call = _Call(aten.linear, (x, self._head.weight, self._head.bias), {}, None)
        for parameter in self._head.parameters(recurse=False):
            self._recognise(parameter, call)
        for use in _on_linear(self, call):
            self._add(use)
        return x.new_empty((*x.shape[:-1], 0))

    # -- counting -----------------------------------------------------------------------------

    def _add(self, use: _Use) -> None:
        terms = self._terms[use.weight.name]
        if use.row not in terms:
            # Metal has no float64; its sums of float32 stay float32.
            dtype = torch.float32 if use.total.device.type == "mps" else torch.float64
            terms[use.row] = _Term(torch.zeros_like(use.total, dtype=dtype))
        term = terms[use.row]
        if term.total.device != use.total.device:  # the state was loaded from a checkpoint
            term.total = term.total.to(use.total.device)
        term.total += use.total
        term.rows += use.rows

    def squares(
        self,
        weight: _Weight,
        x: Tensor,
        normalise: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Σ over the rows of x², each row passed through `normalise` first.

        Args:
            weight: Who asks, for the message if x is not finite.
            x: [rows, n], any real dtype; a view of the activations.
            normalise: Row-wise function of a float32 (float64) chunk.

        Returns:
            [n], float32, or float64 for float64 activations. Shared among all that ask for the
            same plain x: not to be written to.
        """
        key = (_storage(x), _offset(x), _layout(x), x.dtype)
        if normalise is None and key in self._sums:
            return self._sums[key][1]
        # bf16 squares would be wrong by 4e-4, and fp16 ones overflow.
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        elements = _CHUNK_ELEMENTS.get(x.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
        total = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
        for chunk in torch.split(x, max(1, elements // max(1, x.shape[1]))):
            chunk = chunk.to(dtype)
            if normalise is not None:
                chunk = normalise(chunk)
            total += (chunk * chunk).sum(0)
        self._flags.append((weight.name, torch.isfinite(total).all()))
        if x.device.type == "cpu" or len(self._flags) >= _FLAGS_PER_CHECK:
            self._check_finite()
        if normalise is None:
            self._sums[key] = (_reference(x), total)
            if len(self._sums) > _SHARED_INPUTS:
                del self._sums[next(iter(self._sums))]
        return total

    def _check_finite(self) -> None:
        flags, self._flags = self._flags, []
        for name, finite in flags:
            if not finite.item():
                model = getattr(self._model, "name_or_path", "") or type(self._model).__name__
                raise CalibrationError(
                    f"{model}: the input of {name} is not finite (or its squares are not, in "
                    "float32); run the pre-pass with --dtype float32 or bfloat16, and check the "
                    "model and this calibration data"
                )

    def _follow(self, call: _Call, tensor: Tensor, lookup: _Lookup, scale: float) -> None:
        """See how an embedding's output is used: scaled or copied, or for good."""
        factor = _scalar_factor(call, tensor)
        if factor is not None:
            self._remember(call.out, [], (lookup, scale * factor))
            return
        # Positions are looked up once and added to every sequence of the batch.
        own = math.prod(size for size, stride in _layout(tensor) if stride)
        spread = call.op in _BROADCASTING and own > 0
        self._count(lookup, scale, times=max(1, call.out.numel() // own) if spread else 1)

    def _count(self, lookup: _Lookup, scale: float, times: int) -> None:
        """Row "embedding" of the table: frequency, times scale² for a scaled embedding."""
        weight = lookup.weight
        if lookup.scale is None:
            lookup.scale = scale
            shape = (-1,) + (1,) * (len(weight.shape) - 1)
            total = lookup.counts.double() * (scale * scale * times)
            self._add(_Use(weight, "embedding", total.view(shape), lookup.rows * times))
        elif not math.isclose(lookup.scale, scale):
            self._unaccounted.setdefault(weight.name, "its rows are used at several scales")


# -- one handler per family of operations ------------------------------------------------------


def _unknown(capture: CurvatureCapture, call: _Call) -> Iterator[_Use]:
    """Any other operation says nothing."""
    yield from ()


def _product(capture: CurvatureCapture, call: _Call, a: object, b: object) -> Iterator[_Use]:
    """Rows "Linear" and "Conv1D": a weight times activations, from either side.

    For x W the rows of x are summed over; W x is (xᵀ Wᵀ)ᵀ. A 3-D product counts if it takes the
    same weight for every entry of the batch.
    """
    if (found := call.pair(a, b)) is None:
        return
    view, x, weight_is_right = found
    assert view.axes is not None
    if len(view.axes) == 3 and view.axes[0] is not None:
        return  # a weight of its own per entry: experts
    axis = view.axes[-2] if weight_is_right else view.axes[-1]
    x = x if weight_is_right else x.mT
    yield _linear_use(capture, view.weight, axis, x)


def _linear_use(capture: CurvatureCapture, weight: _Weight, axis: int | None, x: Tensor) -> _Use:
    """h along the parameter's dim `axis`, from x [..., in]."""
    x = x.reshape(-1, x.shape[-1])
    shape = [1] * len(weight.shape)
    if axis is not None:  # None: an input of one feature
        shape[axis] = x.shape[1]
    return _Use(weight, f"linear {axis}", capture.squares(weight, x).view(shape), x.shape[0])


def _has_rows(view: _View, x: Tensor) -> bool:
    """Whether x spans the weight and has rows besides.

    Activations do. Without rows x may be a mask, a factor or an update, and the result a weight.
    """
    assert view.axes is not None
    kept = sum(axis is not None for axis in view.axes)
    return x.ndim > kept and x.numel() >= math.prod(view.weight.shape)


def _bias_use(weight: _Weight, added_to: int) -> _Use:
    """Row "bias": h = 1. `added_to` is the element count of the sum."""
    rows = added_to // max(1, math.prod(weight.shape))
    total = torch.full((1,) * len(weight.shape), float(rows), dtype=torch.float64, device="cpu")
    return _Use(weight, "bias", total, rows)


def _on_mm(capture: CurvatureCapture, call: _Call) -> Iterator[_Use]:
    """mm, bmm: ``(a, b)``."""
    yield from _product(capture, call, call.args[0], call.args[1])


def _on_addmm(capture: CurvatureCapture, call: _Call) -> Iterator[_Use]:
    """addmm, baddbmm: ``(bias, a, b, *, beta, alpha)``; scaled ones are left alone."""
    if call.kwargs.get("beta", 1) != 1 or call.kwargs.get("alpha", 1) != 1:
        return
    bias = call.view(call.args[0])
    if bias is not None and _has_rows(bias, call.out):
        yield _bias_use(bias.weight, call.out.numel())
    yield from _product(capture, call, call.args[1], call.args[2])


def _on_linear(capture: CurvatureCapture, call: _Call) -> Iterator[_Use]:
    """linear: ``(x, weight, bias)``, where it is not decomposed, and for the skipped head."""
    x, w, b = (*call.args, None)[:3]
    view = call.view(w)
    if view is None or view.axes is None or not call.is_data(x):
        return
    yield _linear_use(capture, view.weight, view.axes[-1], x)
    if (bias := call.view(b)) is not None:
        yield _bias_use(bias.weight, x.numel() // max(1, x.shape[-1]) * w.shape[0])


def _on_embedding(capture: CurvatureCapture, call: _Call) -> Iterator[_Lookup]:
    """Row "embedding": ``embedding(W, ids)``, ``index_select(W, 0, ids)``, ``index(W, [ids])``."""
    table, indices = call.args[0], call.args[1]
    if call.op is aten.index_select:
        indices = call.args[2] if call.args[1] == 0 else None
    elif call.op is aten.index:
        indices = indices[0] if len(indices) == 1 else None
    view = call.view(table)
    if view is None or not call.is_data(indices) or indices.dtype not in _INDEX_DTYPES:
        return
    assert view.axes is not None
    if table.shape == view.weight.shape and all(a in (None, i) for i, a in enumerate(view.axes)):
        rows = view.weight.shape[0]
        counts = torch.bincount(indices.flatten() % rows, minlength=rows)  # -1 is the last
        yield _Lookup(view.weight, counts, indices.numel())


def _on_mul(capture: CurvatureCapture, call: _Call) -> Iterator[_Use]:
    """Row "norm gain": γ ⊙ x̂, and any weight that scales activations elementwise."""
    if (found := call.pair(call.args[0], call.args[1])) is None or not _has_rows(*found[:2]):
        return
    view, x, _ = found
    assert view.axes is not None
    missing = call.out.ndim - len(view.axes)
    kept = sorted((a, missing + d) for d, a in enumerate(view.axes) if a is not None)
    dims = [dim for _, dim in kept]
    spread = [d for d in range(call.out.ndim) if d not in dims]
    x = x.expand(call.out.shape).permute(*spread, *dims)
    shape = [1] * len(view.weight.shape)
    for axis, _ in kept:
        shape[axis] = view.weight.shape[axis]
    x = x.reshape(-1, math.prod(shape))
    yield _Use(view.weight, "gain", capture.squares(view.weight, x).view(shape), x.shape[0])


def _on_add(capture: CurvatureCapture, call: _Call) -> Iterator[_Use]:
    """Row "bias": ``x + b``."""
    found = call.pair(call.args[0], call.args[1])
    if found is None or call.kwargs.get("alpha", 1) != 1:
        return
    if _has_rows(*found[:2]):
        yield _bias_use(found[0].weight, call.out.numel())


def _on_norm(capture: CurvatureCapture, call: _Call) -> Iterator[_Use]:
    """Rows "norm gain" and "bias": ``native_layer_norm(x, shape, γ, β, eps)``,
    ``_fused_rms_norm(x, shape, γ, eps)``. x̂ is made again, in float32."""
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
        total = capture.squares(view.weight, rows, normalise).view(view.weight.shape)
        yield _Use(view.weight, "gain", total, rows.shape[0])
    if rest and (bias := call.view(rest[0])) is not None:
        yield _bias_use(bias.weight, x.numel())


_HANDLERS: dict[Any, Handler] = {
    aten.mm: _on_mm,
    aten.bmm: _on_mm,
    aten.addmm: _on_addmm,
    aten.baddbmm: _on_addmm,
    aten.linear: _on_linear,
    aten.embedding: _on_embedding,
    aten.index_select: _on_embedding,
    aten.index: _on_embedding,
    aten.mul: _on_mul,
    aten.add: _on_add,
    aten.add_: _on_add,
    aten.native_layer_norm: _on_norm,
}
if hasattr(aten, "_fused_rms_norm"):  # not before torch 2.8
    _HANDLERS[aten._fused_rms_norm] = _on_norm
_INDEX_DTYPES = (torch.int64, torch.int32)
_METADATA_ONLY = {
    *(aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like),
    *(aten.rand_like, aten.randn_like),
    *(aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty_strided),
    *(aten.sym_size, aten.sym_stride, aten.sym_numel, aten.sym_storage_offset),
}
_COPIES = {aten._to_copy, aten.clone}
_SCALINGS = {aten.mul, aten.mul_, aten.div, aten.div_}
_BROADCASTING = {aten.add, aten.add_, aten.sub, aten.sub_, aten.mul, aten.mul_}
_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.linear}


def _copied(call: _Call) -> _View | None:
    """The weight that the result equals, up to a constant and a cast: W.to(…), 1 + W (Gemma)."""
    shifted = call.op is aten.add and not isinstance(call.args[1], Tensor)
    if not shifted and call.op not in _COPIES:
        return None
    view = call.view(call.args[0])
    whole = view is not None and call.out.numel() == math.prod(view.weight.shape)
    return view if whole and call.out.is_floating_point() else None


def _scalar_factor(call: _Call, tensor: Tensor) -> float | None:
    """The number that this operation multiplies the looked-up rows by, if that is all it does."""
    if call.op in _COPIES:
        return 1.0
    if call.op not in _SCALINGS:
        return None
    divided = call.op in (aten.div, aten.div_)
    other = call.args[1] if call.args[0] is tensor else call.args[0]
    if divided and (call.args[0] is not tensor or "rounding_mode" in call.kwargs):
        return None
    if isinstance(other, Tensor):
        if other.ndim > 0 or not call.is_data(other):
            return None
        other = other.item()
    return float(1 / other if divided else other)


def _why(call: _Call, view: _View) -> str:
    """The reason to give for a weight that no handler accounted for."""
    operation = str(call.op).replace(".default", "")
    if call.op is aten.convolution:
        return "convolutions are not measured yet"
    product = call.op in _PRODUCTS or "grouped_mm" in operation
    if len(view.weight.shape) == 3 and (product or view.axes is None):
        return "fused experts are not measured yet"
    if view.axes is None:
        return f"used in parts or combined with others, not as a whole ({operation})"
    return f"no linear form is known for its operation ({operation})"


# -- tensors, storages, modules ----------------------------------------------------------------


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _storage(tensor: Tensor) -> int:
    """The storage's identity. It is unique while a StorageWeakRef, or a tensor, holds it."""
    return int(tensor.untyped_storage()._cdata)


def _reference(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _expired(reference: StorageWeakRef) -> bool:
    return bool(reference.expired())


def _shares_storage(call: _Call) -> bool:
    """Whether the result is a view of an argument (or the argument itself, written to)."""
    storages = {_storage(t) for t in _tensors((call.out,))}
    return any(_storage(t) in storages for t in call.tensors())


def _offset(tensor: Tensor) -> int:
    return int(tensor.storage_offset())


def _layout(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """(size, stride) of each dim."""
    return tuple(zip(tensor.shape, tensor.stride(), strict=True))


def _extent(offset: int, layout: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """First element and one past the last, within the storage."""
    return offset, offset + 1 + sum((size - 1) * stride for size, stride in layout)


def _weight_at(
    name: str, shape: torch.Size, tensor: Tensor, axes: tuple[int | None, ...] | None
) -> _Weight:
    return _Weight(name, shape, _offset(tensor), _layout(tensor), axes)


def _restore_forward(module: nn.Module, forward: Any) -> None:
    del module.forward
    if forward is not None:
        module.forward = forward


def _skippable_head(model: nn.Module) -> nn.Linear | None:
    """The output head, if a forward without its logits gives every parameter the same numbers."""
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return None
    token = torch.zeros((1, 1), dtype=torch.int64, device=next(model.parameters()).device)
    states = []
    for skipped in (None, head):
        capture = CurvatureCapture(model)
        capture._head = skipped
        try:
            with capture:
                model(input_ids=token)
        except Exception:  # whatever it was: then the logits are built, and the run will tell
            return None
        states.append(capture.state())
    full, without = states
    same = all(full[key] == without[key] for key in ("rows", "unaccounted")) and all(
        torch.equal(total, without["totals"][key]) for key, total in full["totals"].items()
    )
    return head if same else None
