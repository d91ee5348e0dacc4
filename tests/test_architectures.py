"""Every architecture of the table: each h against a reference, each weight scored or named.

The reference (``square_gradients.py``) knows neither modules nor aten operations: it squares the
activations and takes gradients.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from architectures import ARCHITECTURES, DEFINED, EXCLUDED, UPSTREAM, coverage
from mergekit_obim.calibration.capture import CurvatureCapture
from mergekit_obim.calibration.feeding import feed
from square_gradients import SquareGradients

pytestmark = pytest.mark.usefixtures("one_thread")

FEWEST_ROWS = 32
PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
OUTDATED = "docs/architectures.md is out of date: run `python tests/helpers/write_architectures.py`"


@cache
def page() -> dict[str, list[str]]:
    """The page's rows, by their first cell."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    return {first: rest for first, *rest in rows}


def reference_sums(model: Any, sequences: list[Tensor]) -> SquareGradients:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.enable_grad(), SquareGradients(model) as reference:
        for ids in sequences:
            feed(model, ids[None])
    return reference


def mean(total: Tensor, rows: int | list[int]) -> Tensor:
    """h of one term, as method.md has it: experts that saw too few rows take the layer's."""
    if isinstance(rows, int):
        return total / rows
    h = total.clone()
    for expert, count in enumerate(rows):
        h[expert] = total.sum(0) / sum(rows) if count < FEWEST_ROWS else total[expert] / count
    return h


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_h_equals_the_reference(name: str) -> None:
    model = ARCHITECTURES[name].build()
    sequences = tiny_models.sequences((7, 5, 40))
    with CurvatureCapture(model) as capture:
        for ids in sequences:
            feed(model, ids[None])
    curvatures, unscored, state = capture.curvatures(), capture.unscored(), capture.ledger.state()
    shapes = {parameter: p.shape for parameter, p in model.named_parameters()}
    assert curvatures.keys() | unscored.keys() == shapes.keys()
    assert not curvatures.keys() & unscored.keys()

    row = page()[name]
    assert row[2:5] == [str(cell) for cell in coverage(shapes, unscored)], OUTDATED

    reference = reference_sums(model, sequences)
    for parameter, curvature in curvatures.items():
        assert parameter not in reference.unknown, (parameter, reference.unknown[parameter])
        terms = {
            key.partition(":")[0]: (total, state["rows"][key])
            for key, total in state["totals"].items()
            if key.partition(":")[2] == parameter
        }
        shape = shapes[parameter]
        total = sum(total.expand(shape) for total, _ in terms.values())
        rows = sum(per_element(rows, shape) for _, rows in terms.values())
        wanted, counts = reference.totals[parameter], reference.counts[parameter]
        if parameter.endswith("proj_bias") and len(shape) == 2:
            # A bias per expert: 1 over the rows of each, whoever saw how many.
            wanted, counts = rows, rows
        torch.testing.assert_close(
            total, wanted, rtol=1e-4, atol=1e-6, msg=lambda m, p=parameter: f"{p}: {m}"
        )
        if "convolution" not in terms:  # the padding is no use of a weight, but counts
            assert torch.equal(rows, counts), parameter
        h = sum(mean(*term) for term in terms.values())
        torch.testing.assert_close(curvature.h.double(), h, rtol=1e-5, atol=1e-9)


def per_element(rows: int | list[int], shape: torch.Size) -> Tensor:
    counts = torch.tensor(rows, dtype=torch.float64)
    return counts.view(-1, *[1] * (len(shape) - 1 if counts.ndim else 0)).expand(shape)


def test_every_definition_of_mergekit_is_built_or_excluded() -> None:
    from importlib.resources import files

    definitions = files("mergekit") / "_data" / "architectures"
    stems = {
        file.name.removesuffix(".json")
        for file in definitions.iterdir()
        if file.name.endswith(".json")
    }
    built = {name for name in DEFINED if name in stems}
    assert built | EXCLUDED.keys() == stems
    assert len(ARCHITECTURES) >= 70


def test_the_page_lists_the_table() -> None:
    rows = page()
    for name, architecture in ARCHITECTURES.items():
        model, known, *_, merged = rows[name]
        assert model == f"`{architecture.model}`", OUTDATED
        assert known == ("defined" if name in DEFINED else "inferred"), OUTDATED
        told = f"({UPSTREAM[name]})" if name in UPSTREAM else "yes"
        assert merged.endswith(told), OUTDATED
    for name, why in EXCLUDED.items():
        assert rows[name] == [why], OUTDATED
    heads = {"architecture", "definition"}
    assert rows.keys() - heads == ARCHITECTURES.keys() | EXCLUDED.keys(), OUTDATED
