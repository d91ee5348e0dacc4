"""Sums over activations: the Σ x_j² of the paper's equation 6 (arXiv 2502.12217), and Σ x (xᵀΩ).

They are exact enough, fast, and computed once for all the weights that see one input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

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
from mergekit_obim.kernels.gram import draw_test_matrix

# How many columns of each layer's G Ω are measured: none, some, or G itself.
Columns = int | Literal["full"]

# Squares are taken in pieces of 1 MiB of float32, which stay in a CPU's cache: that costs less than
# half of squaring everything at once. Accelerators want few large kernels instead.
_CHUNK_ELEMENTS = {"cpu": 2**18}
_CHUNK_ELEMENTS_ELSEWHERE = 2**24
# Inputs whose sums are remembered: q, k and v see one input, gate and up another. Uses of one input
# follow each other, so a few will do.
_SHARED_INPUTS = 4
# On accelerators, reading a flag back waits for the device: so flags are read in groups.
_FLAGS_PER_CHECK = 256


class Squares:
    """Sums squares of activations in float32 (float64 for float64) and sees that they are finite.

    Args:
        model: Returns the model's name, for messages.

    Attributes:
        columns: How many columns :meth:`products` has; 0 where none are wanted.
    """

    def __init__(self, model: Callable[[], str]) -> None:
        self._model = model
        self.columns: Columns = 0
        # Input -> its sum; the reference keeps the storage's address unique.
        self._sums: _Sums = {}
        self._products: _Sums = {}
        self._flags: list[tuple[str, Tensor]] = []

    def sum(
        self,
        weight: Weight,
        x: Tensor,
        normalise: Callable[[Tensor], Tensor] | None = None,
        *,
        with_products: bool = False,
    ) -> Tensor:
        """Return Σ x² over the rows, each row passed through `normalise` first.

        Args:
            weight: The weight whose operation has x as its input, for the message if x is not
                finite.
            x: [rows, n], any real dtype; a view of the activations.
            normalise: A row-wise function of a chunk [some rows, n], float32 (float64).
            with_products: Whether :meth:`products` of x will be asked for: a sketch is summed up in
                the same walk, which spares reading and converting x again.

        Returns:
            [n], float32, or float64 for float64 activations. It is shared among all that ask for
            the same plain x, and not to be written to.

        Raises:
            CalibrationError: On CPUs, if a square is not finite; elsewhere it may be told later.
        """
        # The same place in the same storage is the same input, as long as nothing was written there
        # (`forget`) and the storage lives (the reference).
        key = _place(x)
        if normalise is None and key in self._sums:
            return self._sums[key][1]
        if with_products and self.columns != "full":  # which not every weight's are wanted of
            total, products = sums(x, None, self.columns)
            _keep(self._products, key, x, products)
        else:
            total = sum_of_squares(x, normalise)
        self.check(weight, total)
        if normalise is None:
            _keep(self._sums, key, x, total)
        return total

    def products(self, x: Tensor) -> Tensor:
        """Return Σ x (xᵀΩ) over the rows, the sum that a sketch of the Gram matrix is the mean of.

        It is finite wherever Σ x² is, up to an overflow that :meth:`check` sees in the sum.

        Args:
            x: [rows, n], any real dtype; a view of the activations, whose :meth:`sum` was asked
                for before.

        Returns:
            [n, r], float32 (float64); one tensor for all that ask for the same x.
        """
        key = _place(x)
        if key not in self._products:
            _keep(self._products, key, x, sum_of_products(x, self.columns))
        return self._products[key][1]

    def each(self, weight: Weight, groups: Sequence[Tensor]) -> Tensor:
        """Return Σ x² over the rows of each of several inputs, as of experts.

        Args:
            weight: The weight whose operation has them as its inputs.
            groups: Tensors [rows, n] with any number of rows, also none.

        Returns:
            [groups, n], float32 (float64).

        Raises:
            CalibrationError: As for :meth:`sum`.
        """
        totals = torch.stack([sum_of_squares(x) for x in groups])
        self.check(weight, totals)
        return totals

    def products_of_each(self, groups: Sequence[Tensor]) -> Tensor:
        """Return Σ x (xᵀΩ) over the rows of each of several inputs, [groups, n, r]."""
        return torch.stack([sum_of_products(x, self.columns) for x in groups])

    def check(self, weight: Weight, total: Tensor) -> None:
        """Note whether a sum is finite, and sooner or later raise if it is not.

        Raises:
            CalibrationError: On CPUs, if it is not; elsewhere when the flags are read.
        """
        # All of a sum of squares is finite exactly if all that went into it was, and did not
        # overflow: one look at n numbers instead of rows · n.
        self._flags.append((weight.name, torch.isfinite(total).all()))
        if total.device.type == "cpu" or len(self._flags) >= _FLAGS_PER_CHECK:
            self.raise_if_not_finite()

    def raise_if_not_finite(self) -> None:
        """Read the flags that were noted.

        Raises:
            CalibrationError: A sum was not finite; the message names the model and the weight.
        """
        flags, self._flags = self._flags, []
        for name, finite in flags:
            if not finite.item():
                raise CalibrationError(
                    f"{self._model()}: the input of {name} is not finite (or its squares are not, "
                    "in float32); run the pre-pass with --dtype float32 or bfloat16, and check "
                    "the model and this calibration data"
                )

    def forget(self, storage: int) -> None:
        """Forget the sums of inputs in a storage whose contents have changed."""
        for kept in (self._sums, self._products):
            for known in [k for k in kept if k[0] == storage]:
                del kept[known]

    def clear(self) -> None:
        """Forget all sums and flags; those of a pass that failed say nothing of the next."""
        self._sums.clear()
        self._products.clear()
        self._flags.clear()


_Sums = dict[tuple[Any, ...], tuple[StorageWeakRef, Tensor]]


def _place(x: Tensor) -> tuple[Any, ...]:
    return (storage_of(x), offset_of(x), layout_of(x), x.dtype)


def _keep(sums: _Sums, key: tuple[Any, ...], x: Tensor, total: Tensor) -> None:
    sums[key] = (reference(x), total)
    if len(sums) > _SHARED_INPUTS:
        del sums[next(iter(sums))]


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which squares of x are taken: float32, or float64 for float64."""
    # bf16 squares would be wrong by up to 4e-3 each, and a sum of them stops growing at 256 times
    # one; fp16 overflows from activations of 256 on, which language models have.
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sum_of_squares(x: Tensor, normalise: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return Σ_t x_tj², the diagonal of X Xᵀ (equation 6), of which h_j is the mean over t.

    Args:
        x: [rows, n], any real dtype.
        normalise: A row-wise function of a chunk [some rows, n], which its result replaces.

    Returns:
        [n], of the :func:`accumulation_dtype`.
    """
    return sums(x, normalise, 0)[0]


def sum_of_products(x: Tensor, columns: Columns) -> Tensor:
    """Return Σ_t x_t (x_tᵀ Ω), which is X Xᵀ Ω: some columns' worth of equation 6's X Xᵀ.

    Args:
        x: [rows, n], any real dtype.
        columns: r; where it is not less than n, or ``full``, Ω is the identity.

    Returns:
        [n, min(r, n)], of the :func:`accumulation_dtype`.
    """
    return sums(x, None, columns, squares=False)[1]


def sums(
    x: Tensor,
    normalise: Callable[[Tensor], Tensor] | None,
    columns: Columns,
    *,
    squares: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return :func:`sum_of_squares` and :func:`sum_of_products`, in one walk over x.

    Args:
        x: [rows, n], any real dtype.
        normalise: A row-wise function of a chunk.
        columns: r; 0 for no products.
        squares: Whether the squares are wanted.

    Returns:
        [n], and [n, min(r, n)].
    """
    n, dtype = x.shape[1], accumulation_dtype(x)
    width = n if columns == "full" else min(n, columns)
    omega = _test_matrix(n, width, dtype, x.device) if 0 < width < n else None
    elements = _CHUNK_ELEMENTS.get(x.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    total = torch.zeros(n, dtype=dtype, device=x.device)
    products = torch.zeros(n, width, dtype=dtype, device=x.device)
    for chunk in torch.split(x, max(1, elements // max(1, n))):
        chunk = chunk.to(dtype)
        if normalise is not None:
            chunk = normalise(chunk)
        if squares:
            total += (chunk * chunk).sum(0)
        if columns:
            products.addmm_(chunk.mT, chunk if omega is None else chunk @ omega)
    return total, products


@lru_cache(maxsize=64)  # a model's layers have a few widths
def _test_matrix(n: int, columns: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return draw_test_matrix(n, columns).to(device, dtype)
