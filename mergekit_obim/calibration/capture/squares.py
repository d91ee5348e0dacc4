"""Sums of squares of activations: exact enough, fast, and shared among those who see one input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mergekit_obim.calibration.capture.weights import (
    Weight,
    layout_of,
    offset_of,
    reference,
    storage_of,
)
from mergekit_obim.errors import CalibrationError

# Squares are taken in pieces of about 1 MiB, which stay in a CPU's cache: in float32 that costs
# less than half of squaring everything at once. Accelerators want few large kernels instead.
_CHUNK_ELEMENTS = {"cpu": 2**18}
_CHUNK_ELEMENTS_ELSEWHERE = 2**24
# Inputs whose sums are remembered: q, k and v see one input, gate and up another.
_SHARED_INPUTS = 4
# On accelerators, reading a flag back waits for the device: so flags are read in groups.
_FLAGS_PER_CHECK = 256


class Squares:
    """Sums the squares of activations in float32 (float64 for float64), and checks them.

    Args:
        model: Gives the model's name, for messages.
    """

    def __init__(self, model: Callable[[], str]) -> None:
        self._model = model
        # Input -> its sum; the reference keeps the storage's address unique.
        self._sums: dict[tuple[Any, ...], tuple[StorageWeakRef, Tensor]] = {}
        self._flags: list[tuple[str, Tensor]] = []

    def sum(
        self,
        weight: Weight,
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

        Raises:
            CalibrationError: On CPUs, if a square is not finite; elsewhere it may be told later.
        """
        key = (storage_of(x), offset_of(x), layout_of(x), x.dtype)
        if normalise is None and key in self._sums:
            return self._sums[key][1]
        total = _sum(x, normalise)
        self.check(weight, total)
        if normalise is None:
            self._sums[key] = (reference(x), total)
            if len(self._sums) > _SHARED_INPUTS:
                del self._sums[next(iter(self._sums))]
        return total

    def each(self, weight: Weight, groups: Sequence[Tensor]) -> Tensor:
        """The same for several x [rows, n] of their own, any of which may be empty.

        Returns:
            [groups, n].
        """
        totals = torch.stack([_sum(x) for x in groups])
        self.check(weight, totals)
        return totals

    def check(self, weight: Weight, total: Tensor) -> None:
        """Note whether a sum is finite; see :meth:`raise_if_not_finite`."""
        self._flags.append((weight.name, torch.isfinite(total).all()))
        if total.device.type == "cpu" or len(self._flags) >= _FLAGS_PER_CHECK:
            self.raise_if_not_finite()

    def raise_if_not_finite(self) -> None:
        flags, self._flags = self._flags, []
        for name, finite in flags:
            if not finite.item():
                raise CalibrationError(
                    f"{self._model()}: the input of {name} is not finite (or its squares are not, "
                    "in float32); run the pre-pass with --dtype float32 or bfloat16, and check "
                    "the model and this calibration data"
                )

    def forget(self, storage: int) -> None:
        """Its contents have changed."""
        for known in [k for k in self._sums if k[0] == storage]:
            del self._sums[known]

    def clear(self) -> None:
        self._sums.clear()
        self._flags.clear()


def accumulation_dtype(x: Tensor) -> torch.dtype:
    # bf16 squares would be wrong by 4e-4, and fp16 ones overflow.
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sum(x: Tensor, normalise: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    dtype = accumulation_dtype(x)
    elements = _CHUNK_ELEMENTS.get(x.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    total = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
    for chunk in torch.split(x, max(1, elements // max(1, x.shape[1]))):
        chunk = chunk.to(dtype)
        if normalise is not None:
            chunk = normalise(chunk)
        total += (chunk * chunk).sum(0)
    return total
