"""The evidence in miniature: what is trained, merged and scored, and the page that shows it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import lab as lab_module
from benchmarks.evidence import page, plots
from benchmarks.evidence.lab import BASE, CHECKPOINTS, SCALES, TASKS, TRIO, Lab, Merge, accuracy
from benchmarks.evidence.tables import TABLES, USUAL, methods
from benchmarks.tiny_llama import held_out_loss, load, stream

pytestmark = pytest.mark.usefixtures("one_thread")

SMOKE = SCALES["smoke"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evidence")


def run(cache: Path, *arguments: str) -> dict[str, Any]:
    docs = cache / "docs"
    options = ["--scale", "smoke", "--cache", str(cache), "--docs", str(docs), *arguments]
    result = CliRunner().invoke(command.main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return page.read(docs)["smoke"]


def lab(cache: Path) -> Lab:
    return Lab(SMOKE, 0, cache / "smoke/seed0")


@pytest.mark.slow
def test_every_table_is_filled_by_the_real_commands_and_shown(cache: Path) -> None:
    figures = run(cache)
    assert list(figures) == list(USUAL)
    more = [name for name in TABLES if name not in USUAL]
    assert "tuned" in more
    figures = run(cache, *(argument for name in more for argument in ("--table", name)))
    assert list(figures) == list(TABLES)
    text = "".join(f"<!-- table: smoke/{name} -->\n<!-- end -->\n" for name in TABLES)
    shown = page.render(text, {"smoke": figures})
    assert shown.count("; commit ") == len(TABLES)
    assert page.render(shown, {"smoke": figures}) == shown
    rows = figures["methods"]["0"]["figures"]
    assert list(rows) == list(methods())
    for name, row in rows.items():
        assert f"| {name} | default | **{page.mean(row['default']['recovery']):.3f}** |" in shown


@pytest.mark.slow
def test_plots_show_the_figures_and_are_the_same_again(cache: Path, tmp_path: Path) -> None:
    kept = {"smoke": run(cache, "--table", "density", "--table", "count", "--table", "methods")}
    drawn = plots.draw(cache / "docs", kept)
    assert [path.name for path in drawn] == [f"smoke-{name}.svg" for name in plots.PLOTS]
    first = [path.read_bytes() for path in drawn]
    assert [path.read_bytes() for path in plots.draw(cache / "docs", kept)] == first
    kept["smoke"]["density"]["0"]["figures"]["random"]["0.1"]["math"] += 1
    (cache / "docs/evidence").rename(tmp_path / "kept")
    changed = [path.read_bytes() == old for path, old in
               zip(plots.draw(cache / "docs", kept), first, strict=True)]  # fmt: skip
    assert changed == [True, False, True]


@pytest.mark.slow
def test_what_was_made_is_found_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(cache, "--table", "order")

    def made_again(*_: object) -> None:
        raise AssertionError("trained or merged twice")

    monkeypatch.setattr(lab_module, "command", made_again)
    monkeypatch.setattr(lab_module.tiny_llama, "train", made_again)
    second = run(cache, "--table", "order", "--table", "methods")
    assert second["order"]["0"]["figures"] == first["order"]["0"]["figures"]


@pytest.mark.slow
def test_another_seed_is_another_experiment(cache: Path) -> None:
    figures = run(cache, "--seed", "0", "--seed", "1", "--table", "models")["models"]
    assert figures["0"]["figures"]["base"] != figures["1"]["figures"]["base"]


@pytest.mark.slow
def test_recovery_is_of_the_losses_of_the_models_themselves(cache: Path) -> None:
    """One method whose merge is known: a third of each task vector."""
    one = lab(cache)
    merge = methods()["Task Arithmetic"].default
    folders = dict(zip((BASE, *TRIO), one.models(BASE, *TRIO), strict=True))
    weights = {name: load_file(path / "model.safetensors") for name, path in folders.items()}
    model = load(folders[BASE])
    model.load_state_dict(
        {
            name: base + 0.3333 * sum(weights[task][name] - base for task in TRIO)
            for name, base in weights[BASE].items()
        }
    )
    recovery = one.recovery(merge)
    for task in TRIO:
        tokens = stream(one.corpus[task]["test"])
        loss, base, expert = (
            held_out_loss(each, tokens, SMOKE.windows, SMOKE.expert.context)
            for each in (model, load(folders[BASE]), load(folders[task]))
        )
        # Losses are means of float32: the quotient of their differences keeps four digits.
        assert recovery[task] == pytest.approx((base - loss) / (base - expert), abs=2e-3)


@pytest.mark.slow
def test_checkpoints_are_of_one_run(cache: Path) -> None:
    one = lab(cache)
    states = [load_file(path / "model.safetensors") for path in one.models(BASE, *CHECKPOINTS)]
    moved = [
        math.sqrt(sum(float((state[n] - w).square().sum()) for n, w in states[0].items()))
        for state in states[1:]
    ]
    assert 0 < moved[0] < moved[1] < moved[2]


def test_accuracy_counts_whole_answers() -> None:
    """A model that always repeats the last byte."""

    class Repeats(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            class Output:
                logits = torch.nn.functional.one_hot(input_ids, 259)

            return Output

    questions = [("a=", "="), ("a\n", "\n"), ("b\n", "\nb")]
    assert accuracy(Repeats(), questions) == pytest.approx(1 / 3)  # type: ignore[arg-type]


def test_an_interval_is_students() -> None:
    # t(0.975, 4) = 2.776; the deviation of 1 … 5 is √2.5.
    assert page.interval([1, 2, 3, 4, 5]) == pytest.approx(2.7764 * math.sqrt(2.5 / 5), rel=1e-4)
    assert page.summary([1.0]) == "1.000"


def test_defaults_are_among_what_is_tried_and_have_no_twin() -> None:
    for row in methods().values():
        assert row.default == row.tried[0]
        assert all(merge not in row.tried[:i] for i, merge in enumerate(row.tried))
    assert methods(6)["Task Arithmetic"].default.each == {"weight": 0.1667}
    assert Merge("obim").experts == TRIO == TASKS[:3]


def test_the_page_shows_the_figures_that_are_kept_beside_it() -> None:
    """Written by `make evidence` and not by hand."""
    text = (page.DOCS / "evidence.md").read_text(encoding="utf-8")
    assert page.render(text, page.read(page.DOCS)) == text


def test_the_guard_held_in_what_is_published() -> None:
    """Where fine-tuning does not help gently, every merge loses and a table proves nothing."""
    for scale, tables in page.read(page.DOCS).items():
        for seed, kept in tables["models"].items():
            assert kept["figures"]["guard"], (scale, seed)
