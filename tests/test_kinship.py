"""``obim-kinship``: its numbers beside numpy's, and the generations of a plan beside the rule."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import checkpoints
import commands
from checkpoints import Tensors
from commands import refusal, says, succeed
from mergekit_obim.kinship import measures
from mergekit_obim.kinship.planner import Evolution, next_generation
from mergekit_obim.models import checkpoint

NAMES = ("math", "code", "chat")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kin")
    shapes, config = checkpoints.llama_shapes(), checkpoints.llama_config()
    base = checkpoints.base_weights(0, shapes)
    checkpoints.write_checkpoint(root / "base", base, config)
    shared = checkpoints.base_weights(50, shapes)
    for seed, (name, sign) in enumerate(zip(NAMES, (1, 0.5, -1), strict=True), 1):
        noise = checkpoints.base_weights(seed, shapes)
        expert = {n: b + 0.05 * sign * shared[n] + 0.05 * noise[n] for n, b in base.items()}
        checkpoints.write_checkpoint(root / name, expert, config)
    return root


def vectors(family: Path, prefix: str = "") -> np.ndarray:
    base = checkpoints.read_checkpoint(family / "base")
    rows = []
    for name in NAMES:
        tensors: Tensors = checkpoints.read_checkpoint(family / name)
        parts = [tensors[n].double() - base[n].double() for n in base if n.startswith(prefix)]
        rows.append(torch.cat([part.reshape(-1) for part in parts]).numpy())
    return np.stack(rows)


def agree(found: dict[str, Any], deltas: np.ndarray) -> None:
    size = np.linalg.norm(deltas, axis=1)
    np.testing.assert_allclose(found["pearson"], np.corrcoef(deltas), atol=1e-12)
    cosine = deltas @ deltas.T / np.outer(size, size)
    np.testing.assert_allclose(found["cosine"], cosine, atol=1e-12)
    distance = np.linalg.norm(deltas[:, None] - deltas[None], axis=2)
    np.testing.assert_allclose(found["euclidean"], distance, rtol=1e-10, atol=1e-6)


def models(family: Path) -> list[str]:
    return [str(family / name) for name in NAMES]


def test_the_matrices(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_MAPPED_BYTES", 10_000)  # files are let go of on the way
    out = tmp_path / "kinship.json"
    options = ("--base", family / "base", "--quiet", "--layers", "-o", out)
    output = succeed(commands.obim_kinship(*models(family), *options)).stdout
    found = json.loads(out.read_text())
    agree(found, vectors(family))
    assert found["cosine"][0][2] < -0.3  # signed
    assert found["models"] == models(family)
    assert found["elements"] == vectors(family).shape[1]
    places = [f"model.layers.{n}" for n in range(3)]
    assert set(found["layers"]) == {*places, "outside"}
    for place in places:
        agree(found["layers"][place], vectors(family, place + "."))
    says(
        output, "pearson", "cosine", "euclidean", f"{found['pearson'][0][1]:.4g}", "mean over pairs"
    )
    printed = commands.obim_kinship(*models(family), "--base", family / "base", "--quiet", "--json")
    found.pop("layers")
    assert json.loads(succeed(printed).stdout) == found


def test_it_computes_on_one_thread_and_then_gives_the_others_back(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    moments = measures.moments

    def watched(*args: Any) -> Any:
        seen.add(torch.get_num_threads())
        return moments(*args)

    monkeypatch.setattr(measures, "moments", watched)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        succeed(commands.obim_kinship(*models(family), "--base", family / "base", "--quiet"))
        assert (seen, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(threads)


def test_what_cannot_be_compared_is_named(family: Path, tmp_path: Path) -> None:
    tensors = checkpoints.read_checkpoint(family / "math")
    wider = torch.zeros(43, checkpoints.HIDDEN)
    tensors["model.embed_tokens.weight"] = wider
    del tensors["model.norm.weight"]
    checkpoints.write_checkpoint(tmp_path / "odd", tensors, checkpoints.llama_config())
    args = (tmp_path / "odd", family / "code", "--base", family / "base", "--quiet", "--json")
    result = succeed(commands.obim_kinship(*args))
    skipped = json.loads(result.stdout)["skipped"]
    assert set(skipped) == {"model.embed_tokens.weight", "model.norm.weight"}
    says(skipped["model.embed_tokens.weight"], tmp_path / "odd", "[43, 16]", "[40, 16]")
    says(result.stderr, "Warning", "model.norm.weight", "none of that name")


def test_refusals(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base, (math, code, _) = family / "base", models(family)

    def refused(*args: object) -> str:
        return refusal(commands.obim_kinship(*args, "--quiet"))

    says(refused(math, "--base", base), "two or more")
    says(refused(math, math, "--base", base), math, "named twice")
    says(refused(math, code, "--base", math), math, "named twice")
    says(refused(math, tmp_path / "gone", "--base", base), "gone", "cannot be read")
    tensors = checkpoints.read_checkpoint(family / "math")
    other = {f"other.{name}": tensor for name, tensor in tensors.items()}
    checkpoints.write_checkpoint(tmp_path / "other", other, checkpoints.llama_config())
    says(refused(tmp_path / "other", code, "--base", base), "no tensor in common", base)
    tensors["lm_head.weight"][3] = float("nan")
    checkpoints.write_checkpoint(tmp_path / "nan", tensors, checkpoints.llama_config())
    says(refused(tmp_path / "nan", code, "--base", base), "lm_head.weight", "not a finite")
    assert commands.obim_kinship(math, code).exit_code == 2
    assert commands.obim_kinship(math, code, "--base", base, "--top-k", "2").exit_code == 2


# --- the plan ---------------------------------------------------------------------------------


def evolution(**changes: Any) -> Evolution:
    return Evolution("base", 2, {"merge_method": "slerp"}, {n: n for n in "abcd"}, **changes)


def test_a_generation_merges_the_best_and_explores_the_least_related() -> None:
    asked = []

    def similarity(name: str, others: list[str]) -> list[float | None]:
        asked.append((name, others))
        return [{"a": 0.9, "c": 0.2, "d": 0.5}[other] for other in others]

    plan = evolution()
    new = next_generation(plan, {"a": 3, "b": 4, "c": 1, "d": 2}, Path("out"), similarity)
    assert asked == [("b", ["a", "c", "d"])]
    assert [plan.parents[name] for name in new] == [["b", "a"], ["b", "c"]]
    assert plan.tops == [["b", "a"]]
    assert plan.kin == {new[1]: 0.2}
    assert [plan.models[name] for name in new] == [f"./out/{name}" for name in new]


def test_what_was_merged_is_not_merged_again() -> None:
    plan = evolution(parents={"e": ["a", "b"]})
    plan.models["e"] = "e"
    scores = {"a": 5, "b": 4, "c": 1, "d": 2, "e": 3}
    kin = {"b": -0.5, "c": 0.2, "d": 0.5, "e": None}
    new = next_generation(plan, scores, Path("out"), lambda _, others: [kin[o] for o in others])
    assert [plan.parents[name] for name in new] == [["a", "c"]]


def test_it_ends_when_the_best_stay_the_best() -> None:
    plan = evolution(tops=[["a", "b"]])
    scores = {"a": 3, "b": 4, "c": 1, "d": 2}
    assert next_generation(plan, scores, Path("out"), lambda *_: []) == []
    says(plan.done, "have not changed")
    # A merge that is only as good as an older model does not take its place.
    plan = evolution(tops=[["a", "b"]], parents={"e": ["a", "b"]})
    plan.models["e"] = "e"
    assert next_generation(plan, {**scores, "e": 3}, Path("out"), lambda *_: []) == []


def test_it_ends_when_there_is_nothing_to_merge() -> None:
    pairs = {f"m{n}": list(pair) for n, pair in enumerate(itertools.combinations("abcd", 2))}
    plan = evolution(parents=pairs)
    assert not next_generation(
        plan, dict.fromkeys("abcd", 1.0), Path("out"), lambda _, others: [0.1] * len(others)
    )
    says(plan.done, "every pair")


def test_a_whole_plan_with_real_merges(family: Path, tmp_path: Path) -> None:
    """The score is nearness to a point between math and code, so that merging them helps."""
    folder = tmp_path / "plan"
    template = commands.write_recipe(
        tmp_path, {"merge_method": "linear", "parameters": {"weight": 0.5}, "dtype": "float32"}
    )
    base, (math, code, chat) = family / "base", models(family)
    output = succeed(
        commands.obim_kinship(
            math, code, chat, "--base", base, "--plan", folder, "--top-k", 2, "--recipe", template,
            "--quiet",
        )
    ).stdout  # fmt: skip
    says(output, "scores.yml")
    assert yaml.safe_load((folder / "scores.yml").read_text()) == dict.fromkeys([math, code, chat])
    assert not list(folder.glob("gen*"))  # nothing is planned before there are scores

    target = {
        name: (
            checkpoints.read_checkpoint(Path(math))[name].double() * 0.45
            + checkpoints.read_checkpoint(Path(code))[name].double() * 0.55
        )
        for name in checkpoints.llama_shapes()
    }

    def score(path: str) -> float:
        tensors = checkpoints.read_checkpoint(Path(path))
        return -sum(float((tensors[n].double() - target[n]).square().sum()) for n in target)

    generations = 0
    while "Finished" not in output:
        state = json.loads((folder / "plan.json").read_text())
        for name in state["parents"]:
            recipe = yaml.safe_load((folder / f"{name}.yml").read_text())
            assert recipe["base_model"] == str(base)
            assert recipe["merge_method"] == "linear"
            if not Path(state["models"][name]).exists():
                assert f"mergekit-yaml {folder / name}.yml {folder / name}" in output
                succeed(commands.mergekit_yaml(folder / f"{name}.yml", state["models"][name]))
        scores = {name: score(path) for name, path in state["models"].items()}
        (folder / "scores.yml").write_text(yaml.safe_dump(scores))
        output = succeed(commands.obim_kinship("--plan", folder, "--quiet")).stdout
        generations += 1
        assert generations < 10
    state = json.loads((folder / "plan.json").read_text())
    assert state["tops"][0] == sorted([math, code], key=score, reverse=True)
    assert state["parents"]["gen1-1"] == state["tops"][0]
    assert score(state["models"][state["tops"][-1][0]]) > max(score(math), score(code))
    says(output, "The best is", state["tops"][-1][0])
    explored = list(state["kin"])
    assert explored
    for name in explored:
        best, other = state["parents"][name]
        assert state["kin"][name] is not None
        assert best != other
    # Asked again, it only says so again.
    assert succeed(commands.obim_kinship("--plan", folder, "--quiet")).stdout == output


def test_slerp_goes_from_one_parent_to_the_other(family: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    args = (*models(family), "--base", family / "base", "--plan", folder, "--quiet")
    succeed(commands.obim_kinship(*args))
    scores = {model: number for number, model in enumerate(models(family))}
    (folder / "scores.yml").write_text(yaml.safe_dump(scores))
    succeed(commands.obim_kinship("--plan", folder, "--quiet"))
    recipe = yaml.safe_load((folder / "gen1-1.yml").read_text())
    assert recipe["base_model"] == recipe["models"][0]["model"] == models(family)[2]
    succeed(commands.mergekit_yaml(folder / "gen1-1.yml", folder / "gen1-1"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("mth: 1", ("'mth'", "there is no model")),
        ("{math}: high", ("'high'", "write a number")),
        ("{math}: .nan", ("nan", "write a number")),
        ("- 1", ("NAME: NUMBER",)),
        ("a: [", ("cannot be read",)),
    ],
)
def test_scores_that_are_none(
    family: Path, tmp_path: Path, content: str, words: tuple[str, ...]
) -> None:
    folder = tmp_path / "plan"
    args = (*models(family), "--base", family / "base", "--plan", folder, "--quiet")
    succeed(commands.obim_kinship(*args))
    (folder / "scores.yml").write_text(content.replace("{math}", str(family / "math")))
    says(refusal(commands.obim_kinship("--plan", folder)), folder / "scores.yml", *words)


def test_plans_that_are_none(family: Path, tmp_path: Path) -> None:
    says(refusal(commands.obim_kinship("--plan", tmp_path / "new", *models(family)[:0], "--base",
                                       "x", "a", "b", "--recipe",
                                       commands.write_recipe(tmp_path, {"models": []}))),
         "merge_method", "no models")  # fmt: skip
    (tmp_path / "plan.json").write_text("{")
    says(refusal(commands.obim_kinship("--plan", tmp_path)), "plan.json", "cannot be read")
    assert commands.obim_kinship("--plan", tmp_path, *models(family)).exit_code == 2
    assert commands.obim_kinship("--plan", tmp_path / "new", "--json").exit_code == 2
    assert commands.obim_kinship("--plan", tmp_path / "new").exit_code == 2


def test_a_model_that_is_the_base_is_nobody_s_kin(family: Path, tmp_path: Path) -> None:
    tensors = checkpoints.read_checkpoint(family / "base")
    (tmp_path / "copy").mkdir()
    save_file(tensors, tmp_path / "copy/model.safetensors")
    args = (tmp_path / "copy", family / "math", "--base", family / "base", "--quiet", "--json")
    found = json.loads(succeed(commands.obim_kinship(*args)).stdout)
    assert found["cosine"][0] == [None, None]
    assert found["relative_size"][0] == 0
