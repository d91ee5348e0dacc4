"""The dispatch mode that watches a forward pass, operation by operation.

It finds the weights among an operation's arguments, has a handler say what the operation means for
them, and enters that in the ledger. Beside parameters it follows what the forward makes of them: a
copy, a cast or ``1 + W`` counts as the weight itself, rows of an embedding are followed until they
are used, and anything else that is made of a weight bars it from a score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mergekit_obim.calibration.capture import convolutions, dense, experts
from mergekit_obim.calibration.capture.calls import Call, Handler, Lookup, Use, aten
from mergekit_obim.calibration.capture.ledger import Curvature, Ledger
from mergekit_obim.calibration.capture.squares import Columns, Squares
from mergekit_obim.calibration.capture.weights import (
    View,
    Weight,
    expired,
    layout_of,
    offset_of,
    reference,
    storage_of,
    tensors_in,
)


class _Passing(NamedTuple):
    """What is known of a tensor that the forward made.

    Attributes:
        storage: Keeps the storage's address from being used again.
        weights: The weights that it shows.
        lookup: The rows of an embedding that it has, and their scale so far.
    """

    storage: StorageWeakRef
    weights: list[Weight]
    lookup: tuple[Lookup, float] | None


class CurvatureCapture(TorchDispatchMode):
    """Measures h of a model's parameters: ``with CurvatureCapture(model) as capture: model(…)``.

    It turns gradients off; the caller puts the model in eval mode, and passes batches without
    padding, since every row counts. Sums are kept on the activations' devices, squared in float32
    (float64 for float64 activations) and added up over batches in float64. It may be entered
    again, to go on counting; what an error ends counts for nothing.

    Attributes:
        ledger: What has been counted. After a forward that failed it is another object, of what had
            been counted before.

    Args:
        model: The model; its parameters must not move to another device meanwhile, unless it is
            accelerate that brings offloaded ones in and out.
        skip_logits: Measure the output head's input, but return logits of width zero instead of
            a [tokens, vocab] product. Tried first on a single token, twice: where it would change
            any other number, or break the forward, logits are built as usual.
        columns: How many columns of G Ω to measure of each linear layer's input beside h, G its
            Gram matrix (``kernels.gram``); ``full`` is G itself.
        budget: With ``full``, the most bytes of memory to use for it; see :class:`Ledger`.
        done: With ``full``, weights whose G has been measured.

    Raises:
        CalibrationError: From within the forward, on CPUs as soon as the input of a weight's
            operation is not finite; the message names the weight.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        skip_logits: bool = False,
        columns: Columns = 0,
        budget: float = math.inf,
        done: Iterable[str] = (),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        # Asked once: bringing offloaded weights in and out unties those that are tied.
        self._first_name = _first_names(model)
        # Modules with a fused weight [experts, …], and how many: a 2-D parameter beside it that has
        # as many rows is a bias per expert.
        self._fused = {
            (name.rpartition(".")[0], shape[0])
            for name, shape in self._shapes.items()
            if len(shape) == 3
        }
        self._new_ledger = partial(Ledger, tuple(self._shapes), budget, frozenset(done))
        self.ledger = self._new_ledger()
        self._before: Ledger | None = None  # to go back to, if the forward fails
        self._parameters: dict[int, list[Weight]] = {}  # by storage
        self._references: list[StorageWeakRef] = []  # keep their addresses unique
        self._passing: dict[int, _Passing] = {}  # by storage
        self._squares = Squares(lambda: getattr(model, "name_or_path", "") or type(model).__name__)
        self._stack = ExitStack()
        self._head = _skippable_head(model, self) if skip_logits else None
        self._squares.columns = columns  # only now: the trial needs none

    @property
    def skips_logits(self) -> bool:
        """Whether the output head's logits are left out."""
        return self._head is not None

    @property
    def tied(self) -> dict[str, tuple[str, ...]]:
        """By the first name of each parameter that has several, its further names."""
        others: dict[str, tuple[str, ...]] = {}
        for name, first in self._first_name.items():
            if name != first:
                others[first] = (*others.get(first, ()), name)
        return others

    def __enter__(self) -> CurvatureCapture:
        self._parameters = self._weights_of(self._model)
        self._references = [reference(p) for p in self._model.parameters()]
        # What is entered here is left in __exit__; if entering fails, at once.
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                hook = getattr(module, "_hf_hook", None)
                if any(getattr(own, "offload", False) for own in getattr(hook, "hooks", [hook])):
                    assert hook is not None
                    stack.callback(vars(hook).pop, "pre_forward", None)
                    hook.pre_forward = partial(self._brought_in, name, hook.pre_forward)
            # inference_mode hides the operations inside composite ones; no_grad does not.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            if self._head is not None:
                stack.callback(_restore_forward, self._head, vars(self._head).get("forward"))
                self._head.forward = self._measured_head  # type: ignore[method-assign,assignment]
            super().__enter__()  # type: ignore[no-untyped-call]
            self._stack = stack.pop_all()
        self._before = self.ledger.snapshot()
        return self

    def __exit__(self, exc_type: Any, exc: Any, tb: Any) -> None:
        super().__exit__(exc_type, exc, tb)  # type: ignore[no-untyped-call]
        self._stack.close()
        finished = False
        try:
            if exc_type is None:
                self._squares.raise_if_not_finite()
                finished = True
        finally:
            self._squares.clear()
            if not finished:
                assert self._before is not None
                self.ledger = self._before
                self._passing.clear()
            # Else it stays: what a model makes of its weights and keeps, it makes only once.
            self._before = None

    def curvatures(self) -> dict[str, Curvature]:
        """Return h of each measured parameter, in the model's order, a tied one once (`tied`)."""
        return self.ledger.curvatures()

    def unscored(self) -> dict[str, str]:
        """Return every other parameter, with the reason why it has no h."""
        return self.ledger.unscored()

    def _is_per_expert(self, name: str) -> bool:
        """Return whether a parameter may hold a weight per expert, or a bias beside such a one."""
        shape, module = self._shapes[name], name.rpartition(".")[0]
        return len(shape) == 3 or (len(shape) == 2 and (module, shape[0]) in self._fused)

    def _weights_of(self, module: nn.Module, prefix: str = "") -> dict[int, list[Weight]]:
        """Return where a module's parameters lie, by storage; each once, under its first name."""
        found: dict[int, list[Weight]] = {}
        for name, p in module.named_parameters(prefix, remove_duplicate=False):
            name = self._first_name[name]
            weight = Weight(name, p.shape, offset_of(p), layout_of(p), tuple(range(p.ndim)))
            weight = weight._replace(per_expert=self._is_per_expert(name))
            beside = found.setdefault(storage_of(p), [])
            if weight not in beside:
                beside.append(weight)
        return found

    def _brought_in(
        self, name: str, bring_in: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """Stand in for accelerate's hook, which brings a module's offloaded weights in.

        They lie elsewhere each time, so where is noted as soon as they are there.
        """
        result = bring_in(module, *args, **kwargs)
        lying = self._weights_of(module, name)
        for parameter in module.parameters():
            if not parameter.is_meta:
                key = storage_of(parameter)
                self._remember(parameter, [*self._parameters.get(key, ()), *lying[key]])
        return result

    def reset(self) -> None:
        """Start anew: nothing was counted, and nothing is known of what a forward left."""
        self.ledger = self._new_ledger()
        self._passing.clear()

    # -- watching operations ------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        call = Call(func.overloadpacket, args, kwargs, out)
        for tensor in call.tensors():
            self._recognise(tensor, call)
        # Only now is what was written to forgotten: rows of an embedding that are scaled in place
        # are still to be followed.
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

    def _recognise(self, tensor: Tensor, call: Call) -> None:
        """Note in the call which weights, or rows of an embedding, an argument of it shows."""
        # What the forward made comes first: it may lie in a parameter's own storage, where an
        # offloaded weight is brought in.
        key = storage_of(tensor)
        passing = self._passing.get(key)
        known = passing.weights if passing is not None else self._parameters.get(key, ())
        views = [view for w in known if (view := w.view(tensor)) is not None]
        if views:
            call.views[id(tensor)] = views
        if passing is not None and passing.lookup is not None:
            call.lookups.append((tensor, *passing.lookup))

    def _account(self, call: Call) -> None:
        """Enter what the operation says of its weights; bar those it says nothing of."""
        if (source := _copied(call)) is not None:
            self._remember(call.out, [source.weight.moved(call.out, source.axes)])
            return
        accounted = set()
        handler = HANDLERS.get(call.op) or HANDLERS.get(str(call.op))
        for use in handler(self._squares, call) if handler else ():
            accounted.add(use.weight.name)
            if isinstance(use, Lookup):
                self._remember(call.out, [], (use, 1.0))
            else:
                self.ledger.add(use)
        views = [view for several in call.views.values() for view in several]
        for view in views:
            if view.axes is None or view.weight.name not in accounted:
                self.ledger.refuse(view.weight.name, _why(call, view))
        # What is made of weights alone is no activation: a later handler must not take it for one.
        if not accounted and all(id(t) in call.views or t.ndim == 0 for t in call.tensors()):
            for made in tensors_in((call.out,)):
                self._remember(made, [view.weight.moved(made, None) for view in views])

    def _remember(
        self,
        tensor: Tensor,
        weights: list[Weight],
        lookup: tuple[Lookup, float] | None = None,
    ) -> None:
        """Note what a tensor that the forward made is, for as long as its storage lives."""
        self._passing = {k: p for k, p in self._passing.items() if not expired(p.storage)}
        self._passing[storage_of(tensor)] = _Passing(reference(tensor), weights, lookup)

    def _forget_written(self, func: Any, call: Call) -> None:
        """Forget what is known of tensors that an operation wrote to.

        They are no longer the copy, the rows or the input that they were. (Version counters cannot
        tell: views made under a dispatch mode have their own.)
        """
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = call.args[i] if i < len(call.args) else call.kwargs.get(argument.name)
            for tensor in tensors_in((written,)):
                for view in call.views.get(id(tensor), ()):
                    self.ledger.refuse(view.weight.name, "changed while the model ran")
                key = storage_of(tensor)
                self._passing.pop(key, None)
                self._squares.forget(key)

    def _measured_head(self, x: Tensor) -> Tensor:
        """Stand in for the output head's forward: count its input x, build no logits.

        Returns:
            [..., 0]: a [tokens, vocab] product would take most of the memory of a pass, and nothing
            after it has a weight.
        """
        assert self._head is not None
        call = Call(aten.linear, (x, self._head.weight, self._head.bias), {}, None)
        for parameter in self._head.parameters(recurse=False):
            self._recognise(parameter, call)
        for use in dense.on_linear(self._squares, call):
            self.ledger.add(use)
        return x.new_empty((*x.shape[:-1], 0))

    # -- counting -----------------------------------------------------------------------------

    def _follow(self, call: Call, tensor: Tensor, lookup: Lookup, scale: float) -> None:
        """See how an embedding's output is used: follow it if it is scaled or copied, or count."""
        factor = _scalar_factor(call, tensor)
        if factor is not None:
            self._remember(call.out, [], (lookup, scale * factor))
            return
        # Positions are looked up once and added to every sequence of the batch.
        own = math.prod(size for size, stride in layout_of(tensor) if stride)
        spread = call.op in _BROADCASTING and own > 0
        self._count(lookup, scale, times=max(1, call.out.numel() // own) if spread else 1)

    def _count(self, lookup: Lookup, scale: float, times: int) -> None:
        """Count rows of an embedding, row "embedding" of the table: frequency · scale².

        An embedding times a constant (Gemma's √d) is a look-up of one-hot rows times that constant.
        What is looked up per expert is a bias: h = 1 over the rows of each.
        """
        weight = lookup.weight
        if weight.per_expert:
            whole = View(weight, (None, None))
            self.ledger.add(dense.bias_use(whole, lookup.rows * math.prod(weight.shape)))
            return
        if lookup.scale is None:
            lookup.scale = scale
            shape = (-1,) + (1,) * (len(weight.shape) - 1)
            total = lookup.counts.double() * (scale * scale * times)
            self.ledger.add(Use(weight, "embedding", total.view(shape), lookup.rows * times))
        elif not math.isclose(lookup.scale, scale):
            self.ledger.refuse(weight.name, "its rows are used at several scales")


HANDLERS: dict[Any, Handler] = {
    **dense.HANDLERS,
    **experts.HANDLERS,
    **convolutions.HANDLERS,
}
# They take a tensor for its shape and dtype, and read nothing of it.
_METADATA_ONLY = {
    *(aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like),
    *(aten.rand_like, aten.randn_like),
    *(aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty_strided),
    *(aten.sym_size, aten.sym_stride, aten.sym_numel, aten.sym_storage_offset),
}
_COPIES = {aten._to_copy, aten.clone}
_SCALINGS = {aten.mul, aten.mul_, aten.div, aten.div_}
_BROADCASTING = {aten.add, aten.add_, aten.sub, aten.sub_, aten.mul, aten.mul_}


def _copied(call: Call) -> View | None:
    """Return the weight that the result equals, up to a constant and a cast.

    W.to(…) and 1 + W (Gemma's norms) do: δ is the same for them, and so is h. 0.5 · W does not.
    """
    shifted = call.op is aten.add and not isinstance(call.args[1], Tensor)
    if not shifted and call.op not in _COPIES:
        return None
    view = call.view(call.args[0])
    whole = view is not None and call.out.numel() == math.prod(view.weight.shape)
    return view if whole and call.out.is_floating_point() else None


def _scalar_factor(call: Call, tensor: Tensor) -> float | None:
    """Return the number that an operation multiplies looked-up rows by, if that is all it does."""
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


def _why(call: Call, view: View) -> str:
    """Return the reason to give for a weight that no handler accounted for."""
    operation = str(call.op).replace(".default", "")
    if call.op is aten.index and view.weight.per_expert and call.args[1][0] is not None:
        return "each token gets a copy of its experts; set experts_implementation: grouped_mm"
    if view.axes is None:
        return f"used in parts or combined with others, not as a whole ({operation})"
    return f"no linear form is known for its operation ({operation})"


# -- tensors, storages, modules ----------------------------------------------------------------


def _shares_storage(call: Call) -> bool:
    """Return whether the result is a view of an argument (or the argument itself, written to)."""
    storages = {storage_of(t) for t in tensors_in((call.out,))}
    return any(storage_of(t) in storages for t in call.tensors())


def _restore_forward(module: nn.Module, forward: Any) -> None:
    """Undo the replacing of a module's forward; accelerate may have replaced it before."""
    del module.forward
    if forward is not None:
        module.forward = forward


def _first_names(model: nn.Module) -> dict[str, str]:
    """Return, by each name of a parameter, its first one; tied parameters have several."""
    first = {id(p): name for name, p in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def input_device(model: nn.Module) -> torch.device:
    """Return where a model wants its input; of one that accelerate has spread, its first device."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return next(model.parameters()).device if device is None else torch.device(device)


def _skippable_head(model: nn.Module, capture: CurvatureCapture) -> nn.Linear | None:
    """Return the output head, if a forward without its logits gives all parameters the same sums.

    A custom head, or logits that meet another weight (a temperature, a copy mechanism), would not:
    so both are tried, on one token.
    """
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return None
    token = torch.zeros((1, 1), dtype=torch.int64, device=input_device(model))
    states = []
    for skipped in (None, head):
        capture._head = skipped
        try:
            with capture:
                model(input_ids=token)
        except Exception:  # whatever it was: then the logits are built, and the run will tell
            return None
        states.append(capture.ledger.state())
        capture.reset()
    full, without = states
    same = all(full[key] == without[key] for key in ("rows", "unaccounted")) and all(
        torch.equal(total, without["totals"][key]) for key, total in full["totals"].items()
    )
    return head if same else None
