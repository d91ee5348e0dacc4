"""A slow reference for Σ over a run of what h is the mean of, for every weight of any model.

It works on another level than the capture: on the functions that modules call, with autograd.
Activations are cut from their history, so whatever requires a gradient is a function of weights
alone. Where a function meets both, it is called once more on the squared activations: the
gradient of its output's sum is then Σ x² for each weight *element*, whatever became of the weight
before (a transpose, a slice, a cast). On ones instead of squares, it is how often the element is
used. Look-ups are followed to where their rows are used, for the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_BILINEAR = {
    *(F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__),
    *(torch.bmm, Tensor.bmm, torch.mm, Tensor.mm),
    *(torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__),
    *(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.addmm, Tensor.addmm, torch.einsum),
    *(getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)),
}
_SUMS = {
    *(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
}
_NORMS = {F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm}
_SCALINGS = {
    *(torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__),
    *(torch.div, Tensor.div, Tensor.__truediv__, F.dropout, Tensor.to, Tensor.type, Tensor.float),
    *(Tensor.view, Tensor.reshape, Tensor.unsqueeze, Tensor.expand, Tensor.permute),
    *(Tensor.clone, Tensor.contiguous, Tensor.squeeze, Tensor.__getitem__),
}


class SquareGradients(TorchFunctionMode):
    """Context manager around forwards that run under it with gradients on.

    Attributes:
        totals: Parameter name -> float64 tensor of its shape, Σ of the squares each element met.
        counts: How often each element was used; an embedding's rows count every look-up.
        unknown: Names of parameters that met another function.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters = {id(p): (name, p) for name, p in model.named_parameters()}
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.unknown: dict[str, str] = {}
        self._seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = list(_tensors((args, kwargs)))
        made_of_weights = [t for t in found if t.requires_grad]
        if not made_of_weights or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        rows = [t for t in made_of_weights if hasattr(t, "_looked_up")]
        others = [t for t in found if t.is_floating_point() and t.ndim and not t.requires_grad]
        if rows:
            if len(made_of_weights) == 1 and not others:
                out = func(*args, **kwargs)
                if func in _SCALINGS:
                    out._looked_up = rows[0]._looked_up
                if func in _SCALINGS or not isinstance(out, Tensor):  # a shape or the like
                    return out
            for t in rows:
                self._flush(t)
            args, kwargs = _replace((args, kwargs), lambda t: _cut(t, rows))
            return self.__torch_function__(func, types, args, kwargs)
        is_lookup = func in (F.embedding, torch.embedding) or (
            func in (Tensor.__getitem__, Tensor.index_select, torch.index_select)
            and any(t.dtype == torch.int64 and t.ndim for t in found)
        )
        if is_lookup:
            out = func(*args, **kwargs)
            ids = next(t for t in found if t.dtype in (torch.int64, torch.int32))
            out._looked_up = (made_of_weights[0], ids)
            return out
        if not others:  # a function of weights alone
            return func(*args, **kwargs)
        self._measure(func, args, kwargs)
        args, kwargs = _replace((args, kwargs), lambda t: t.detach() if t.requires_grad else t)
        with torch.no_grad():
            return func(*args, **kwargs)

    def _flush(self, rows: Tensor) -> None:
        table, ids = rows._looked_up
        if any(rows._looked_up is seen for seen in self._seen):
            return  # one look-up that is used in several places (T5's positions)
        self._seen.append(rows._looked_up)
        (gradient,) = torch.autograd.grad(rows.sum(), table, retain_graph=True)
        counts = torch.bincount(ids.flatten() % len(table), minlength=len(table)).double()
        counts = counts[:, None].expand(table.shape)
        name, _ = self.parameters[id(table)]
        # (scale · count)² / count; a row that was not looked up has a count of zero.
        total = gradient.double().square() / counts.clamp(min=1)
        self._add(name, total, torch.full(table.shape, float(ids.numel())))

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        self.totals[name] = self.totals.get(name, torch.zeros(())) + total.double()
        self.counts[name] = self.counts.get(name, torch.zeros(())) + count.double()

    def _measure(self, func: Any, args: Any, kwargs: Any) -> None:
        for squared, sums in ((True, self.totals), (False, self.counts)):
            make = (lambda t: t.double().square()) if squared else _ones
            if func in _NORMS:
                out = _norm(func, args, kwargs, make)
            elif func in _BILINEAR or func in _SUMS:
                wide = torch.float32 if "grouped" in getattr(func, "__name__", "") else None
                again = _replace(
                    (args, kwargs), lambda t, make=make, wide=wide: _prepared(t, make, wide)
                )
                out = _out_of_place(func)(*again[0], **again[1])
            else:
                out = func(*_replace(args, torch.clone), **_replace(kwargs, torch.clone))
                for name, _ in self._leaves(out):
                    self.unknown.setdefault(name, getattr(func, "__name__", str(func)))
                return
            for name, gradient in self._leaves(out):
                sums[name] = sums.get(name, torch.zeros(())) + gradient.double()

    def _leaves(self, out: Any) -> Iterator[tuple[str, Tensor]]:
        out = [t for t in _tensors(out) if t.requires_grad]
        if not out:
            return
        leaves = list(self.parameters.values())
        total = sum(t.double().sum() for t in out)
        gradients = torch.autograd.grad(
            total, [p for _, p in leaves], retain_graph=True, allow_unused=True
        )
        for (name, _), gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                yield name, gradient


def _ones(x: Tensor) -> Tensor:
    ones = torch.ones_like(x, dtype=torch.float64)
    if x.ndim == 3:  # llama4's experts see rows of zeros for the tokens that are not theirs
        ones = ones * (x != 0).any(-1, keepdim=True)
    return ones


def _prepared(t: Tensor, make: Callable[[Tensor], Tensor], wide: torch.dtype | None) -> Tensor:
    if not t.is_floating_point():
        return t
    t = t.double() if t.requires_grad else make(t)
    return t.to(wide) if wide else t


def _norm(func: Any, args: Any, kwargs: Any, make: Callable[[Tensor], Tensor]) -> Tensor:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    if "rms" in func.__name__:
        names = ("input", "normalized_shape", "weight", "eps")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, shape, eps = given["input"].double(), given["normalized_shape"], given.get("eps", 1e-5)
    if "rms" in func.__name__:
        eps = torch.finfo(given["input"].dtype).eps if given.get("eps") is None else eps
        normed = F.rms_norm(x, shape, None, eps)
    else:
        normed = F.layer_norm(x, shape, None, None, eps)
    out = make(normed)
    if given.get("weight") is not None:
        out = out * given["weight"].double()
    return out if given.get("bias") is None else out + given["bias"].double()


def _out_of_place(func: Any) -> Any:
    in_place = {Tensor.mul_: torch.mul, Tensor.__imul__: torch.mul}
    in_place |= {Tensor.add_: torch.add, Tensor.__iadd__: torch.add}
    return in_place.get(func, func)


def _cut(t: Tensor, rows: list[Tensor]) -> Tensor:
    return t.detach() if any(t is row for row in rows) else t


def _replace(values: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return tree_map(lambda v: function(v) if isinstance(v, Tensor) else v, values)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
