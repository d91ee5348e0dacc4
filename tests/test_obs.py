"""The trial of Optimal Brain Surgeon's ranking, and that of predicted errors, in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import reference
from benchmarks import obs, predicted_error
from mergekit_obim.kernels.gram import draw_test_matrix
from mergekit_obim.kernels.nystrom import nystrom_factor
from mergekit_obim.kernels.regmean_gram import Gram
from mergekit_obim.saliency.file import SaliencyFile
from test_regmean_recipes import gram_of, write_file

pytestmark = pytest.mark.usefixtures("one_thread")


def wanted(gram: torch.Tensor, columns: int | None, damp: float) -> torch.Tensor:
    form = reference.gram_estimate(gram, 1.0, columns)
    form += damp * gram.diagonal().mean() * torch.eye(len(gram))
    return 1 / torch.linalg.inv(form).diagonal()


@pytest.mark.parametrize("damp", [0.01, 1.0])
@pytest.mark.parametrize("columns", [0, 5, None])
def test_the_inverse_s_diagonal_is_that_of_the_inverse(columns: int | None, damp: float) -> None:
    gram = gram_of(12, torch.Generator().manual_seed(0))
    h = gram.diagonal()
    known = Gram(h, full=None if columns is not None else lambda: gram.clone())
    if columns:
        known = Gram(h, nystrom_factor(gram @ draw_test_matrix(12, columns).double(), h))
    found = 1 / obs.inverse_diagonal(known, damp)
    torch.testing.assert_close(found, wanted(gram, columns, damp), rtol=1e-7, atol=0)
    # What other inputs can make up for costs no more than what they cannot.
    assert (found <= (h + damp * h.mean()) * (1 + 1e-9)).all()


def test_only_weights_with_a_sketch_are_rewritten(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    grams = {
        "linear": gram_of(12, generator),
        "conv1d": gram_of(12, generator),
        "mixture": torch.stack([gram_of(12, generator) for _ in range(2)]),
    }
    h = {
        "linear": grams["linear"].diagonal()[None],
        "conv1d": grams["conv1d"].diagonal()[:, None],
        "mixture": grams["mixture"].diagonal(dim1=1, dim2=2)[:, None],
        "embedding": torch.rand(7, 1),
    }
    source = write_file(tmp_path / "a.safetensors", h, grams, 5)
    obs.rewrite(source, tmp_path / "b.safetensors", 0.1)
    found = load_file(tmp_path / "b.safetensors")
    assert SaliencyFile(tmp_path / "b.safetensors").metadata.gram is None
    assert torch.equal(found.pop("embedding"), load_file(source)["embedding"])
    for name, values in found.items():
        stack = grams[name] if name == "mixture" else grams[name][None]
        expected = torch.stack([wanted(gram, 5, 0.1) for gram in stack]).view(h[name].shape)
        torch.testing.assert_close(values, expected.float(), rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first of the two trains the models for both."""
    return tmp_path_factory.mktemp("cache")


def run(command: click.Command, cache: Path) -> dict[str, Any]:
    options = ["--scale", "smoke", "--columns", "4", "--cache", str(cache)]
    result = CliRunner().invoke(command, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures


@pytest.mark.slow
def test_the_trial_runs(cache: Path) -> None:
    figures = run(obs.main, cache)["recovery"]
    by_h, by_inverse = figures.values()
    assert by_h.keys() == by_inverse.keys() == obs.SETTINGS.keys()
    assert by_h != by_inverse


@pytest.mark.slow
def test_predictions_are_compared_with_the_truth(cache: Path) -> None:
    found = run(predicted_error.main, cache)["found"]
    assert list(found) == [*list(predicted_error.METHODS)[:-1], "regmean by 4 columns"]
    for ways in found.values():
        assert list(ways) == ["truth", "diagonal", "4 columns"]
        assert ways["4 columns"]["mean"] < ways["diagonal"]["mean"]
