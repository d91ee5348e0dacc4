"""The handler of convolutions: row "convolution" of the table in the package's docstring."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mergekit_obim.calibration.capture.calls import Call, Handler, Use, aten
from mergekit_obim.calibration.capture.dense import bias_use
from mergekit_obim.calibration.capture.squares import Squares, accumulation_dtype


def on_convolution(squares: Squares, call: Call) -> Iterator[Use]:
    """Handle a convolution of any number of dims.

    ``convolution(x, W, bias, stride, padding, dilation, transposed, output_padding, groups)``. A
    kernel position is a linear layer on what it meets at every output position: h is the mean
    of its square over these, per input channel. Padding is met as zero.
    """
    x, w, bias, *geometry = call.args
    view = call.view(w)
    if view is not None and call.is_data(x):
        axes = [axis for axis in view.axes or () if axis is not None]
        if axes != sorted(axes):
            return  # no model was seen to convolve with a transposed weight
        total = squares_met(x, w.shape, call.out.shape, geometry)
        squares.check(view.weight, total)
        shape = view.spread(dict(zip(view.axes or (), total.shape, strict=True)))
        rows = call.out.numel() // max(1, call.out.shape[1])
        yield Use(view.weight, "convolution", total.view(shape), rows)
    if (bias_view := call.view(bias)) is not None:
        yield bias_use(bias_view, call.out.numel())


def squares_met(
    x: Tensor, weight_shape: torch.Size, out_shape: torch.Size, geometry: list[Any]
) -> Tensor:
    """Sum, over the output positions, the squared input that each kernel position meets.

    It is the gradient of Σ conv(x², W) with respect to W, which torch computes for any stride,
    padding and dilation without an array of patches. It is the same for every output channel of a
    group: so a kernel of one output channel per group has it all.

    Args:
        x: [batch, channels, …], any real dtype.
        weight_shape: [out, in / groups, …]; of a transposed convolution [in, out / groups, …].
        out_shape: [batch, out, …].
        geometry: As the operation has them: stride, padding, dilation, transposed,
            output_padding, groups.

    Returns:
        Float32 (float64 for float64 x), which broadcasts against the weight: [1, in, …]; of several
        groups [out, in / groups, …]; of a transposed one [in, 1, …].
    """
    transposed, groups = geometry[3], geometry[5]
    x = x.to(accumulation_dtype(x)).square()
    narrow = list(weight_shape)
    narrow[1 if transposed else 0] = 1 if transposed else groups
    kernel = x.new_zeros(narrow)
    ones = x.new_ones((x.shape[0], groups, *out_shape[2:]))
    _, total, _ = aten.convolution_backward(ones, x, kernel, None, *geometry, [False, True, False])
    if groups > 1 and not transposed:
        total = total.repeat_interleave(weight_shape[0] // groups, 0)
    result: Tensor = total
    return result


HANDLERS: dict[Any, Handler] = {aten.convolution: on_convolution}
