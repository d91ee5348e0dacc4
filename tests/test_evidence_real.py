"""The evidence on a real model in miniature: text, tail, rivals, regimes, and the page."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.corpus import SPLITS
from benchmarks.real import __main__ as command
from benchmarks.real import base as base_module
from benchmarks.real import lab as lab_module
from benchmarks.real import page, plots, rivals, tables, text
from benchmarks.real.lab import BASE, SCALES, Lab, Merge
from benchmarks.real.tail import Encoded, Parts, Score

pytestmark = pytest.mark.usefixtures("one_thread")

SMOKE = SCALES["smoke"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def lab(cache: Path) -> Lab:
    rows = base_module.generated_rows(SMOKE.counts)
    model = base_module.random_llama(cache / "smoke/base")
    return Lab(model, rows, SMOKE, 0, cache / "smoke/seed0")


def run(cache: Path, *arguments: str) -> dict[str, Any]:
    docs = cache / "docs"
    options = ["--scale", "smoke", "--cache", str(cache), "--docs", str(docs), *arguments]
    result = CliRunner().invoke(command.main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return page.read(docs)["smoke"]


@pytest.mark.slow
def test_every_method_is_merged_by_the_real_commands_and_shown(lab: Lab, cache: Path) -> None:
    figures = run(cache, "--regime", "light-2")
    assert list(figures["light-2"]["0"]["methods"]) == list(tables.methods(2))
    some = ("nearest", "Task Arithmetic")
    figures = run(cache, "--regime", "checkpoints", *(x for m in some for x in ("--method", m)))
    assert list(figures["checkpoints"]["0"]["methods"]) == list(reversed(some))
    blocks = [
        f"<!-- table: smoke/{name} -->\n<!-- end -->\n" for name in ("lead", *figures, "child")
    ]
    shown = page.render("".join(blocks), {"smoke": figures})
    assert shown.count("; commit ") == len(figures)
    assert shown.count("Not run yet") == 1
    assert page.render(shown, {"smoke": figures}) == shown
    for name, row in figures["light-2"]["0"]["methods"].items():
        mean = sum(row["default"]["recovery"].values()) / 2
        assert f"| {name} | default | **{mean:.3f}** |" in shown


@pytest.mark.slow
def test_what_was_made_is_found_again(
    lab: Lab, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(cache, "--regime", "child", "--method", "nearest")

    def made_again(*_: object, **__: object) -> None:
        raise AssertionError("trained, merged or scored twice")

    monkeypatch.setattr(lab_module, "command", made_again)
    monkeypatch.setattr(Parts, "train", made_again)
    monkeypatch.setattr(Parts, "scores", made_again)
    second = run(cache, "--regime", "child", "--method", "nearest")
    assert second["child"]["0"] == first["child"]["0"]


@pytest.mark.slow
def test_a_row_scores_what_the_whole_model_makes_of_it(lab: Lab) -> None:
    """Trunk, cache and tail together, against the model as transformers runs it."""
    for task in lab.tasks:
        folder = lab.model(f"light/{task}")
        model = LlamaForCausalLM.from_pretrained(folder).double().eval()
        scores = lab.score_model(f"light/{task}", "test", (task,))[task]
        for row, score in zip(lab.encoded(task, "test"), scores, strict=True):
            with torch.no_grad():
                logits = model(input_ids=row.ids[None]).logits[0, row.first - 1 : -1]
            tokens = row.ids[row.first :]
            nats = -logits.log_softmax(-1)[torch.arange(len(tokens)), tokens].sum()
            assert score.nats == pytest.approx(nats.item(), rel=1e-5)
            assert score.tokens == len(tokens)
            assert score.right == bool((logits.argmax(-1) == tokens).all())


@pytest.mark.slow
def test_experts_gain_on_their_tasks_and_differ_in_the_tail_alone(lab: Lab) -> None:
    base = load_file(lab.base / "model.safetensors")
    for task in lab.tasks:
        expert = load_file(lab.model(f"light/{task}") / "model.safetensors")
        changed = {name for name, weight in base.items() if not torch.equal(weight, expert[name])}
        assert changed == {
            name for name in base if name.startswith(("model.layers.2.", "model.layers.3."))
        }
        gain = [
            tables.loss(lab.score_model(name, "test"))[task] for name in (BASE, f"light/{task}")
        ]
        assert gain[1] < gain[0] - 0.1


@pytest.mark.slow
def test_checkpoints_are_of_one_run(lab: Lab) -> None:
    names = (BASE, "hard/german at 2/4", "hard/german at 3/4", "hard/german")
    states = [load_file(lab.model(name) / "model.safetensors") for name in names]
    moved = [
        sum(float((state[name] - weight).square().sum()) for name, weight in states[0].items())
        for state in states
    ]
    assert 0 == moved[0] < moved[1] < moved[2] < moved[3]


@pytest.mark.slow
def test_other_weights_than_the_tails_are_noticed(lab: Lab) -> None:
    state = load_file(lab.base / "model.safetensors")
    state["model.embed_tokens.weight"] += 0.01
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is not the base's"):
        lab.parts.set(state)


# --- rivals ---------------------------------------------------------------------------


def experts(lab: Lab) -> tuple[Parts, list[dict[str, Tensor]], list[list[Encoded]]]:
    states = [load_file(lab.model(f"light/{t}") / "model.safetensors") for t in lab.tasks[:2]]
    return lab.parts, states, [lab.encoded(task, "train")[:6] for task in lab.tasks[:2]]


def inputs_of(lab: Lab, expert: str, name: str, rows: Sequence[Encoded]) -> Tensor:
    """What a matrix of the whole model gets, all tokens: float64, [tokens, in]."""
    model = LlamaForCausalLM.from_pretrained(lab.model(expert)).double().eval()
    got: list[Tensor] = []
    module = model.get_submodule(name.removesuffix(".weight"))
    module.register_forward_pre_hook(lambda _, inputs: got.append(inputs[0][0]))
    with torch.no_grad():
        for row in rows:
            model(input_ids=row.ids[None])
    return torch.cat(got)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.9, 0.1])
def test_full_regmean_is_its_closed_form(lab: Lab, keep: float) -> None:
    parts, states, rows = experts(lab)
    merged = rivals.regmean(parts, states, rows, keep)
    for name in ("model.layers.2.self_attn.v_proj.weight", "model.layers.3.mlp.down_proj.weight"):
        grams = []
        for task, one in zip(lab.tasks, rows, strict=False):
            x = inputs_of(lab, f"light/{task}", name, one)
            gram = x.mT @ x / len(x)
            grams.append(keep * gram + (1 - keep) * gram.diag().diag())
        weighted = sum(
            state[name].double() @ gram for state, gram in zip(states, grams, strict=True)
        )
        # The gram matrices of few rows are singular; on what they see, the solutions agree.
        assert torch.allclose(merged[name].double() @ sum(grams), weighted, atol=1e-4)
    gain = "model.layers.3.input_layernorm.weight"
    assert torch.allclose(merged[gain], (states[0][gain] + states[1][gain]) / 2)


@pytest.mark.slow
def test_singular_value_merges_have_the_spectra_of_their_papers(lab: Lab) -> None:
    parts, states, rows = experts(lab)
    name = "model.layers.2.mlp.up_proj.weight"
    base = parts.base[name]
    deltas = [(state[name] - base).double() for state in states]
    iso = (rivals.iso_c(parts, states, rows, scale=0.5)[name] - base).double()
    mean = torch.linalg.svdvals(sum(deltas)).mean()
    assert torch.allclose(torch.linalg.svdvals(iso), (0.5 * mean).expand(32), rtol=1e-3)
    tsv = (rivals.tsv_m(parts, states, rows)[name] - base).double()
    largest = torch.cat([torch.linalg.svdvals(delta)[:16] for delta in deltas])
    assert torch.allclose(
        torch.linalg.svdvals(tsv), largest.sort(descending=True).values, rtol=1e-3
    )


@pytest.mark.slow
def test_one_expert_is_itself_by_tsv_m_and_regmean(lab: Lab) -> None:
    parts, states, rows = experts(lab)
    for merged in (
        rivals.tsv_m(parts, states[:1], rows[:1]),
        rivals.regmean(parts, states[:1], rows[:1]),
    ):
        for name, weight in states[0].items():
            assert torch.allclose(merged[name], weight, atol=1e-4)


@pytest.mark.slow
def test_fisher_files_hold_mean_squared_gradients(lab: Lab, tmp_path: Path) -> None:
    folder = lab.model("light/german")
    rows = lab.encoded("german", "train")[:3]
    lab.parts.set(load_file(folder / "model.safetensors"))
    rivals.fisher(lab.parts, rows, folder, tmp_path)
    (path,) = tmp_path.iterdir()
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    name = "model.layers.3.self_attn.q_proj.weight"
    weight = model.get_parameter(name)
    expected = torch.zeros_like(weight)
    for row in rows:
        logits = model(input_ids=row.ids[None]).logits[0, row.first - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, row.ids[row.first :], reduction="sum")
        expected += torch.autograd.grad(loss, weight)[0].square() / 3
    assert torch.allclose(load_file(path)[name], expected, rtol=1e-3, atol=1e-9)


# --- judging --------------------------------------------------------------------------


def test_recovery_of_experts_and_of_checkpoints() -> None:
    class Tasks:
        @staticmethod
        def task_of(name: str) -> str:
            return name[-1]

    of: dict[str, Any] = {
        BASE: {"a": 4.0, "b": 3.0},
        "xa": {"a": 2.0, "b": 9.0},
        "xb": {"a": 9.0, "b": 2.0},
    }
    experts = tables.Regime("", ("xa", "xb"))
    merged = {"a": 2.5, "b": 3.5}
    assert tables.recoveries(Tasks, experts, merged, of) == {"a": 0.75, "b": -0.5}  # type: ignore[arg-type]
    run = {BASE: of[BASE], "half": {"a": 3.0, "b": 3.5}, "last": {"a": 2.0, "b": 5.0}}
    checkpoints = tables.Regime("", ("half", "last"), forgot=True)
    # The last one's mean loss is 3.5, the best of each task's (2 and 3) 2.5, the merge's 3.
    assert tables.recoveries(Tasks, checkpoints, merged, run) == {"all": 0.5}  # type: ignore[arg-type]


def test_regret_is_the_distance_to_the_best_of_a_regime() -> None:
    def figures(a: float, b: float) -> dict[str, Any]:
        rows = {name: {kind: {"recovery": {"t": value}} for kind in tables.KINDS}
                for name, value in (("A", a), ("B", b))}  # fmt: skip
        return {"0": {"methods": rows}}

    below = page.regrets({"one": figures(0.5, 0.75), "two": figures(1.0, 0.25)}, "default")
    assert below == {"one": {"A": 0.25, "B": 0.0}, "two": {"A": 0.0, "B": 0.75}}


def test_the_plot_shows_the_figures_and_is_the_same_again(tmp_path: Path) -> None:
    def figures(value: float) -> dict[str, Any]:
        rows = {"nearest": {"ours": True, "default": {"recovery": {"t": value}}}}
        return {"smoke": {"light-2": {"0": {"methods": rows}}}}

    drawn = [plots.draw(tmp_path, figures(x))[0].read_bytes() for x in (0.5, 0.5, 0.6)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_interval_of_a_paired_difference_does_not_see_what_rows_share(lab: Lab) -> None:
    judge = object.__new__(tables.Judge)
    judge.lab, judge.regime, judge.tasks = lab, tables.Regime("", ("light/german",)), ("german",)

    def scores(extra: float) -> dict[str, list[Score]]:
        return {"german": [Score(10.0 * i + extra, 10, False) for i in range(1, 30)]}

    judge.models = {BASE: scores(20.0), "light/german": scores(0.0)}
    assert judge.ahead(scores(5.0), scores(10.0)) == pytest.approx([0.25, 0.25])


# --- text -----------------------------------------------------------------------------


def write_catalog(path: Path, messages: dict[str, str]) -> None:
    """A .mo file, by the format's description in gettext's manual."""
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n", **messages}
    keys = sorted(messages)
    strings = [text.encode() for column in (keys, [messages[k] for k in keys]) for text in column]
    place, table = 28 + 16 * len(keys), b""
    for string in strings:
        table += struct.pack("<II", len(string), place)
        place += len(string) + 1
    head = struct.pack("<7I", 0x950412DE, 0, len(keys), 28, 28 + 8 * len(keys), 0, 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(head + table + b"".join(string + b"\0" for string in strings))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    words = [a + b for a in "abcdefghij" for b in "klmnopqrst"]
    messages = {f"_Save {word} file": f"{word}-Datei s&peichern" for word in words}
    messages |= {"?stat:Bases here": "Basen", "menu\4Open it": "Auf", "Same text": "Same text",
                 "Two\nlines": "Zwei\nZeilen", "Save ak file": "doppelt"}  # fmt: skip
    write_catalog(folder / "vlc/usr/share/locale/de/LC_MESSAGES/vlc.mo", messages)
    wordnet = folder / "wordnet-base/usr/share/wordnet"
    wordnet.mkdir(parents=True)
    for kind, file in (("noun", 5), ("verb", 38), ("adj", 0)):
        lines = ["  1 This software and database is being provided to you, the LICENSEE"]
        for i, word in enumerate(words):
            gloss = f'the {kind} definition of {word}; "so {word}"  '
            lines.append(f"{i:08} {file:02} {kind[0]} 01 a_{word} 0 000 | {gloss}")
        (wordnet / f"data.{kind}").write_text("\n".join(lines) + "\n")
    return folder


COUNTS = {"train": 40, "validation": 4, "test": 4}


@pytest.fixture(scope="module")
def rows(packages: Path) -> text.Rows:
    return text.load_rows(packages, COUNTS)


def test_rows_are_read_from_catalogues_wordnet_and_the_library(rows: text.Rows) -> None:
    assert all({split: len(of[split]) for split in SPLITS} == COUNTS for of in rows.values())
    for prompt, answer in rows["german"]["train"]:
        word = prompt.split()[2]
        assert (prompt, answer) == (
            f"English: Save {word} file\nGerman:",
            f" {word}-Datei speichern\n",
        )
    prompt, answer = rows["gloss"]["test"][0]
    assert prompt.startswith("Word: a ")
    assert prompt.endswith(
        (" (noun)\nDefinition:", " (verb)\nDefinition:", " (adjective)\nDefinition:")
    )
    kind = prompt.split("(")[1].split(")")[0].removesuffix("ective")
    assert answer == f" the {kind} definition of {prompt.split()[2]}\n"
    assert {answer for _, answer in rows["topic"]["train"]} == {" animal\n"}
    assert all(prompt == "" and answer.endswith("\n") for prompt, answer in rows["python"]["test"])


def test_no_held_out_row_is_in_training_rows_of_any_task(rows: text.Rows) -> None:
    definitions = {
        split: {found for task in ("gloss", "topic") for row in rows[task][split]
                for found in re.findall("the .* definition of .*", "".join(row))}
        for split in SPLITS
    }  # fmt: skip
    assert definitions["test"]
    assert not definitions["train"] & (definitions["validation"] | definitions["test"])
    for task in rows:
        assert not set(rows[task]["train"]) & set(rows[task]["test"])


def test_a_missing_package_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"german: 0 train rows of 9 .*make evidence-real"):
        text.load_rows(tmp_path, {"train": 9, "validation": 1, "test": 1})


def test_the_committed_page_shows_the_committed_figures() -> None:
    """Written by `make evidence-real` and not by hand."""
    shown = (page.DOCS / "evidence-real.md").read_text(encoding="utf-8")
    assert page.render(shown, json.loads((page.DOCS / "evidence-real.json").read_text())) == shown


def test_every_setting_is_a_merge_of_its_own() -> None:
    for count in (2, 3, 4):
        for method in tables.methods(count).values():
            assert method.default in method.tried
            assert all(isinstance(merge, Merge) for merge in method.tried)
            assert len({json.dumps(m.settings()) for m in method.tried}) == len(method.tried)
