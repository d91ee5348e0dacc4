"""Sketches and Gram matrices of a run, as they go into the saliency file beside h.

A sketch is a few megabytes, and is a by-product of the run. The Gram matrices of all layers may be
larger than memory: as many are added up in one run over the data as there is room for, written to
the disk, and the next run adds up the next ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from mergekit_obim.calibration.capture import Columns, CurvatureCapture, Ledger, input_device
from mergekit_obim.calibration.data.tokens import TokenSequence
from mergekit_obim.calibration.memory import gram_budget
from mergekit_obim.calibration.passes import run_through
from mergekit_obim.calibration.ranks import Ranks
from mergekit_obim.calibration.resume import Checkpoint
from mergekit_obim.errors import SaliencyFileError, one_line
from mergekit_obim.kernels.gram import pack_triangle


@dataclass
class Products:
    """What a run measured of the layers' inputs beside h.

    Attributes:
        columns: r; ``full`` for Gram matrices.
        seen_by: By the first parameter to see an input, all parameters that see it.
        shapes: By the same, the shape of what was measured: [in, r] or [experts, in, r]; of a
            matrix, which is packed (``kernels.gram.pack_triangle``), [… in (in + 1) / 2].
    """

    columns: Columns
    seen_by: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    _read: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)

    def entry(self, first: str) -> str:
        """Return the name of the saliency file's entry for an input, by the first to see it."""
        return f"{'gram' if self.columns == 'full' else 'sketch'}/{first}"

    def read(self, parameter: str) -> torch.Tensor:
        """Return what was measured of the input that a parameter is the first to see."""
        return self._read[parameter]()

    def add_sketches(self, ledger: Ledger) -> None:
        """Add all sketches of a run, which stay in memory."""
        for first, names in ledger.products().items():
            sketch = ledger.mean_products(first)
            self._add(first, names, sketch.shape, partial(torch.Tensor.detach, sketch))

    def add_matrices(self, ledger: Ledger, path: Path) -> None:
        """Add the Gram matrices of a run, which are written to a file for the time being.

        Raises:
            SaliencyFileError: The file cannot be written.
        """
        found = ledger.products()
        packed = {first: pack_triangle(ledger.mean_products(first)) for first in found}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(packed, path)
        except OSError as error:
            raise SaliencyFileError(
                f"{path}: the Gram matrices so far cannot be saved: {one_line(error)}"
            ) from error
        for first, names in found.items():
            self._add(first, names, packed[first].shape, partial(_stored, path, first))

    def _add(
        self,
        first: str,
        names: tuple[str, ...],
        shape: torch.Size,
        read: Callable[[], torch.Tensor],
    ) -> None:
        self.seen_by[first], self.shapes[first], self._read[first] = names, shape, read


def _stored(path: Path, name: str) -> torch.Tensor:
    """Read one tensor of a file, and keep nothing of it."""
    with safe_open(str(path), framework="pt", device="cpu") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def run_with_products(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    *,
    columns: Columns,
    checkpoint: Checkpoint,
    ranks: Ranks,
    **how: Any,
) -> tuple[CurvatureCapture, Products]:
    """Run a model over its data, as often as it takes to measure what is asked for beside h.

    Args:
        model, sequences, ranks: As for :func:`~.passes.run_through`, as is ``how``.
        columns: How many columns of the Gram matrices to measure; 0 for h alone.
        checkpoint: The first run's checkpoint.

    Returns:
        The first run's capture, which has h, and what was measured beside it, which of several
        processes the first one has.

    Raises:
        SaliencyFileError: Gram matrices cannot be written to the disk.
        Exception: Whatever :func:`~.passes.run_through` raises.
    """
    run = partial(run_through, model, sequences, columns=columns, ranks=ranks, **how)
    products = Products(columns)
    if columns != "full":
        capture = run(checkpoint=checkpoint)
        products.add_sketches(capture.ledger)
        return capture, products
    # The same in all processes, so that all of them measure the same matrices in each run.
    budget = min(ranks.all_gather(gram_budget(input_device(model))))
    captures: list[CurvatureCapture] = []
    done: set[str] = set()
    while not captures or captures[-1].ledger.later:
        own = checkpoint.of_part(len(captures), sorted(done))
        capture = run(checkpoint=own, budget=budget, done=sorted(done))
        if ranks.first:
            products.add_matrices(capture.ledger, own.path.with_suffix(".gram"))
        done |= capture.ledger.let_products_go()
        captures.append(capture)
    return captures[0], products
