"""obim-eval: loss, divergence and recovery beside a reference, lm-eval's tasks, the model card."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from commands import (
    World,
    mergekit_yaml,
    obim_eval,
    refusal,
    says,
    succeed,
    write_recipe,
    write_rows,
)
from tiny_tokenizers import byte_tokenizer

ROWS = 5


@pytest.fixture(scope="module")
def evaluated(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A merge of the world's experts, and what obim-eval says of it and of an expert."""
    root = tmp_path_factory.mktemp("evaluated")
    recipe = world.recipe(merge_method="task_arithmetic", parameters={"weight": 0.5})
    for name, model in zip(("math", "code"), recipe["models"], strict=True):
        rows = write_rows(root / f"{name}.jsonl", [f"{name} {n}" + " and" * n for n in range(9)])
        model["calibration"] = {"data": str(rows), "samples": 4}
        model["parameters"] = {}
    guard = write_rows(root / "guard.jsonl", [f"everything {n}" for n in range(6)])
    recipe["guard"] = str(guard)
    path = write_recipe(root, recipe)
    succeed(mergekit_yaml(path, root / "merged", "--quiet"))
    arguments = (root / "merged", world.math, "--recipe", path, "--rows", ROWS, "--quiet")
    printed = succeed(obim_eval(*arguments, "--json")).stdout
    table = succeed(obim_eval(*arguments)).stdout
    return {
        "root": root,
        "recipe": path,
        "merged": root / "merged",
        "json": json.loads(printed),
        "table": table,
    }


def measured(folder: Path, teacher: Path, texts: list[str]) -> tuple[float, float]:
    """Loss and divergence, row by row in float64."""
    tokenizer = byte_tokenizer()
    own, theirs = (AutoModelForCausalLM.from_pretrained(one).eval() for one in (folder, teacher))
    losses, divergences = [], []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            q, p = (one(ids).logits[0, :-1].double().log_softmax(-1) for one in (own, theirs))
        losses.append(-q[torch.arange(len(q)), ids[0, 1:]])
        divergences.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(losses).mean()), float(torch.cat(divergences).mean())


def test_the_figures(evaluated: dict[str, Any], world: World) -> None:
    found, merged = evaluated["json"], str(evaluated["merged"])
    for name, expert in (("math", world.math), ("code", world.code)):
        label = str(expert)
        lines = (evaluated["root"] / f"{name}.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        # Of 9 rows 4 are measured: all others were set aside.
        used = found["rows"][label]
        assert used["rows"] == ROWS
        possible = {text: len(byte_tokenizer()(text)["input_ids"]) for text in texts}
        saliency = yaml.safe_load((evaluated["recipe"]).read_text())
        assert saliency["merge_method"] == "task_arithmetic"
        rest = set_aside(texts, 4)
        assert used["tokens"] == sum(possible[text] for text in rest)
        base, _ = measured(world.base, expert, rest)
        own, _ = measured(expert, expert, rest)
        for model, folder in (("the base", world.base), (merged, evaluated["merged"])):
            loss, divergence = measured(folder, expert, rest)
            result = found["models"][model][label]
            assert result["loss"] == pytest.approx(loss, rel=1e-6)
            # 256 of 259 tokens are kept.
            assert result["divergence"] == pytest.approx(divergence, rel=1e-3)
            wanted = (base - loss) / (base - own) if own < base else None
            assert result["recovery"] == (wanted and pytest.approx(wanted, rel=1e-4))
        assert found["teachers"][label]["loss"] == pytest.approx(own, rel=1e-6)
    itself = found["models"][str(world.math)][str(world.math)]
    assert itself["divergence"] == 0
    assert itself["loss"] == found["teachers"][str(world.math)]["loss"]
    guard = found["models"]["the base"]["guard"]
    assert guard["divergence"] == 0
    assert guard["recovery"] is None
    assert found["rows"]["guard"]["rows"] == ROWS


def set_aside(texts: list[str], samples: int) -> list[str]:
    """What the seed 0 draws after so many rows."""
    from hashlib import sha256

    order = sorted(range(len(texts)), key=lambda index: sha256(f"0:{index}".encode()).digest())
    return [texts[index] for index in order[samples : samples + ROWS]]


def test_the_table_has_the_figures(evaluated: dict[str, Any], world: World) -> None:
    table, found = evaluated["table"], evaluated["json"]
    for label, used in found["rows"].items():
        says(
            table, f"{label}: {used['rows']} rows of {used['sources'][0]}, {used['tokens']} tokens"
        )
        for name, results in found["models"].items():
            loss = f"{results[label]['loss']:.4g}"
            assert any(line.startswith(name) and loss in line for line in table.splitlines())
    assert table.count("its own expert") == 2
    assert "mean over the experts" in table


def test_what_has_other_tokens_is_refused(
    evaluated: dict[str, Any], world: World, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.math)
    model.save_pretrained(tmp_path / "other")
    byte_tokenizer(tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["m"], vocabulary["a"] = vocabulary["a"], vocabulary["m"]
    path.write_text(json.dumps(content))
    message = refusal(obim_eval(tmp_path / "other", "--recipe", evaluated["recipe"], "--quiet"))
    says(message, tmp_path / "other", "token 'a' is number", "the same rows")


def test_results_in_the_card(evaluated: dict[str, Any], world: World) -> None:
    merged = evaluated["merged"]
    card = ModelCard.load(merged / "README.md")
    before = card.text
    arguments = (merged, "--recipe", evaluated["recipe"], "--rows", ROWS, "--quiet", "--card")
    succeed(obim_eval(*arguments))
    once = (merged / "README.md").read_bytes()
    [index] = ModelCard.load(merged / "README.md").data.to_dict()["model-index"]
    assert index["name"] == "merged"
    found = evaluated["json"]["models"][str(merged)]
    told = {
        (result["dataset"]["name"], metric["type"]): metric["value"]
        for result in index["results"]
        for metric in result["metrics"]
    }
    assert told == {
        (f"rows of {label}", metric): pytest.approx(value)
        for label, result in found.items()
        for metric, value in result.items()
        if value is not None
    }
    assert ModelCard.load(merged / "README.md").text == before
    succeed(obim_eval(*arguments))
    assert (merged / "README.md").read_bytes() == once
    # Somebody else's results stay.
    text = once.decode().replace(
        "  results:\n",
        "  results:\n  - task: {type: text-generation}\n    dataset: {name: theirs, type: theirs}\n"
        "    metrics: [{type: acc, value: 0.5}]\n",
        1,
    )
    (merged / "README.md").write_text(text)
    succeed(obim_eval(*arguments))
    [index] = ModelCard.load(merged / "README.md").data.to_dict()["model-index"]
    assert len(index["results"]) == 4
    assert index["results"][0]["dataset"]["name"] == "theirs"


def test_a_card_that_is_missing_is_made(
    evaluated: dict[str, Any], world: World, tmp_path: Path
) -> None:
    expert = tmp_path / "expert"
    shutil.copytree(world.math, expert)
    assert not (expert / "README.md").exists()
    succeed(obim_eval(expert, "--recipe", evaluated["recipe"], "--rows", 2, "--quiet", "--card"))
    card = ModelCard.load(expert / "README.md")
    assert card.text.strip() == "# expert"
    [index] = card.data.to_dict()["model-index"]
    assert index["name"] == "expert"
    assert index["results"]


def test_a_card_needs_a_folder(evaluated: dict[str, Any]) -> None:
    message = refusal(obim_eval("org/model", "--recipe", evaluated["recipe"], "--card"))
    says(message, "--card", "org/model", "no folder")


@pytest.mark.slow
def test_tasks_of_the_harness(evaluated: dict[str, Any], world: World, tmp_path: Path) -> None:
    """A task of our own, without the network: the figure is that of the harness's own command."""
    pairs = [
        ("1 + 1 =", "2", "x"),
        ("math", "0", "z"),
        ("code", "a", "b"),
        ("x", "y", "zz"),
        ("", "q", "Q"),
    ]
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [{"q": question, "right": right, "wrong": wrong} for question, right, wrong in pairs],
    )
    task = tmp_path / "own.yaml"
    task.write_text(
        yaml.safe_dump(
            {
                "task": "own_task",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(rows)}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{q}}",
                "doc_to_choice": ["{{right}}", "{{wrong}}"],
                "doc_to_target": 0,
                "target_delimiter": "",
                "metric_list": [{"metric": "acc"}],
            }
        )
    )
    expected = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(evaluated["merged"]), "device": "cpu"},
        tasks=[str(task)],
        task_manager=TaskManager(include_defaults=False),
    )["results"]["own_task"]["acc,none"]
    arguments = (evaluated["merged"], "--recipe", evaluated["recipe"], "--rows", ROWS, "--quiet")
    shown = succeed(obim_eval(*arguments, "--json", "--tasks", task, "--card")).stdout
    found = json.loads(shown)["tasks"][str(evaluated["merged"])]
    assert found == {"own_task": {"acc,none": expected}}
    [index] = ModelCard.load(evaluated["merged"] / "README.md").data.to_dict()["model-index"]
    assert "own_task" in {result["dataset"]["type"] for result in index["results"]}
    message = refusal(obim_eval(*arguments, "--tasks", f"{task},{tmp_path / 'none.yaml'}"))
    says(message, "--tasks", "none.yaml", "no such file")


def test_without_the_harness(evaluated: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = refusal(
        obim_eval(
            *(evaluated["merged"], "--recipe", evaluated["recipe"], "--rows", ROWS, "--quiet"),
            *("--tasks", "arc_easy"),
        )
    )
    says(message, "--tasks", "pip install 'mergekit-obim[eval]'")
