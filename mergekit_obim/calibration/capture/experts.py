"""Handlers of the operations that use a weight per expert, fused into one parameter.

h is per expert, over the rows routed to it: each expert is a linear layer of its own (row
"experts" of the table in the package's docstring). Experts that are run one by one, on slices of
the parameter, are for the handlers of whole weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mergekit_obim.calibration.capture import dense
from mergekit_obim.calibration.capture.calls import Call, Handler, Use, aten
from mergekit_obim.calibration.capture.squares import Squares
from mergekit_obim.calibration.capture.weights import View


def _use(
    squares: Squares, view: View, axis: int | None, groups: Sequence[Tensor], rows: Tensor
) -> Use:
    """Return a fused weight's use.

    Args:
        squares: Sums up.
        view: The weight.
        axis: The parameter's dim that the input features are along.
        groups: Each expert's rows, [rows, in].
        rows: How many rows each expert had, int64 [experts].
    """
    total = squares.each(view.weight, groups)
    products = partial(squares.products_of_each, groups) if squares.columns else None
    shape = view.spread({0: total.shape[0], axis: total.shape[1]})
    return Use(view.weight, f"linear {axis}", total.view(shape), rows, None, products)


def on_grouped_mm(squares: Squares, call: Call) -> Iterator[Use]:
    """Handle ``_grouped_mm(x, W, offs)``.

    x is [rows, in], sorted by expert, W [experts, in, out], and offs [experts] where each expert's
    rows end. Rows past the last offset belong to no expert.
    """
    x, w, offs, *_ = (*call.args, call.kwargs.get("offs"))
    view = call.view(w)
    if view is None or not call.is_data(x) or not isinstance(offs, Tensor) or x.ndim != 2:
        return
    assert view.axes is not None
    if len(view.weight.shape) != 3 or len(view.axes) != 3 or view.axes[0] not in (0, None):
        return
    ends = offs.tolist()  # waits for the device; how the rows are split has to be known here
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    groups = x[: ends[-1]].split(counts)
    rows = torch.tensor(counts, device="cpu")
    yield _use(squares, view, view.axes[1], groups, rows)


def on_bmm(squares: Squares, call: Call) -> Iterator[Use]:
    """Handle ``bmm(x, W)`` with an expert for each entry of the batch.

    x is [experts, rows, in]; rows of zeros are those that were routed elsewhere, and do not count.
    """
    found = call.pair(call.args[0], call.args[1])
    if found is None or found[0].axes is None or found[0].axes[0] != 0:
        yield from dense.on_mm(squares, call)
        return
    view, x, weight_is_right = found
    assert view.axes is not None
    axis = view.axes[1] if weight_is_right else view.axes[2]
    x = x if weight_is_right else x.mT
    rows = (x != 0).any(-1).sum(-1).cpu()
    yield _use(squares, view, axis, x.unbind(0), rows)


HANDLERS: dict[Any, Handler] = {
    aten.bmm: on_bmm,
    # transformers' own, for where torch has none; registered only once its models are imported.
    "transformers.grouped_mm_fallback": on_grouped_mm,
}
if hasattr(aten, "_grouped_mm"):  # not before torch 2.8
    HANDLERS[aten._grouped_mm] = on_grouped_mm
