"""Rows that are set aside: not those that are measured, and said so where that cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mergekit.common import ModelReference

import mergekit_obim
from commands import World, obim_saliency, obim_tune, succeed, write_recipe, write_rows
from mergekit_obim.calibration.data import prepare
from mergekit_obim.calibration.data.drawing import sample_order
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.models.opened import open_model
from mergekit_obim.recipe import Document
from mergekit_obim.recipe.calibration import Calibration
from mergekit_obim.recipe.experts import Expert, find_experts
from mergekit_obim.tuning.held_back import GUARD, set_aside
from tiny_tokenizers import byte_tokenizer

OPTIONS = RunOptions(quiet=True)
TOKENIZER = byte_tokenizer()


def rows_of(path: Path, count: int) -> Path:
    # Every seventh is empty, and does not count.
    return write_rows(path, ["" if n % 7 == 3 else f"row {n}" for n in range(count)])


def texts(calibration: dict[str, Any], further: int = 0) -> tuple[set[str], list[str]]:
    data = prepare(Calibration.model_validate(calibration), TOKENIZER, "m", further=further)
    found = [TOKENIZER.decode(row.ids, skip_special_tokens=True) for row in data.sequences]
    assert len(set(found)) == len(found)
    return set(found), data.warnings


@pytest.mark.parametrize("seed", [0, 5])
def test_they_come_after_those_that_are_measured(seed: int, tmp_path: Path) -> None:
    path = rows_of(tmp_path / "rows.jsonl", 60)
    calibration = {"data": str(path), "samples": 20, "seed": seed}
    measured, _ = texts(calibration)
    further, warnings = texts(calibration, 12)
    assert not warnings
    assert len(measured) == 20
    assert len(further) == 12
    assert not measured & further
    order = [f"row {n}" for n in sample_order(60, 60, seed) if n % 7 != 3]
    assert further == set(order[20:32])
    # As many samples as both together are both together.
    assert texts({**calibration, "samples": 32})[0] == measured | further


def test_fewer_are_taken_if_there_are_fewer(tmp_path: Path) -> None:
    path = rows_of(tmp_path / "rows.jsonl", 42)  # 36 that are not empty
    calibration = {"data": str(path), "samples": 32}
    further, [warning] = texts(calibration, 10)
    assert len(further) == 4
    assert not further & texts(calibration)[0]
    assert f"{path} has 4 usable rows beyond the 32 samples: these are set aside, inst" in warning


def test_without_further_rows_some_of_the_measured_are_taken_and_said(tmp_path: Path) -> None:
    path = rows_of(tmp_path / "rows.jsonl", 42)
    calibration = {"data": str(path), "samples": 100}
    further, [warning] = texts(calibration, 10)
    assert len(further) == 10
    assert further < texts(calibration)[0]
    assert "10 of the 10 rows set aside may be among those that were measured" in warning
    assert "measure again with samples: 26" in warning
    again = {**calibration, "samples": 26}
    fresh, warnings = texts(again, 10)
    assert not warnings
    assert fresh == further
    assert not fresh & texts(again)[0]


def test_a_mixture_gives_its_shares(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", [f"one {n}" for n in range(40)])
    two = write_rows(tmp_path / "two.jsonl", [f"two {n}" for n in range(40)])
    calibration = {
        "data": [{"data": str(one), "samples": 15}, {"data": str(two), "samples": 5}],
    }
    further, warnings = texts(calibration, 8)
    assert not warnings
    assert sum(text.startswith("one") for text in further) == 6
    assert sum(text.startswith("two") for text in further) == 2
    assert not further & texts(calibration)[0]


# --- a recipe's ---------------------------------------------------------------------------


def opened(world: World) -> dict[ModelReference, Any]:
    references = [ModelReference.parse(str(one)) for one in (world.base, *world.experts)]
    return {reference: open_model(reference, OPTIONS) for reference in references}


@pytest.mark.parametrize(("own", "count"), [({}, 6), ({"samples": 3}, 3)])
def test_guard_rows_are_the_bases(
    own: dict[str, Any], count: int, world: World, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "guard.jsonl", [f"guard {n}" for n in range(20)])
    found = find_experts(Document(world.recipe(guard={"data": str(path), **own})))
    assert not found.faults
    assert found.guard is not None
    assert found.guard.max_length == 48  # the recipe's default
    base = ModelReference.parse(str(world.base))
    rows = set_aside(
        found.measured, found.guard, base, opened(world), 6, tmp_path / "scratch", OPTIONS
    )
    assert [one.label for one in rows] == [str(world.math), str(world.code), GUARD]
    assert rows[-1].reference == base
    assert len(rows[-1].data.sequences) == count


def test_guard_is_a_key_of_recipes(world: World, tmp_path: Path) -> None:
    found = find_experts(Document(world.recipe(guard="any.jsonl")))
    assert found.guard == Calibration.model_validate({"data": "any.jsonl", "max_length": 48})
    assert not mergekit_obim.check(world.recipe(guard=str(world.math_data))).warnings
    [fault] = find_experts(Document(world.recipe(guard={"data": "x.jsonl", "max_lenth": 3}))).faults
    assert fault.message.startswith("guard: unknown key 'max_lenth'")


def test_rows_that_an_expert_writes_are_others(world: World, tmp_path: Path) -> None:
    recipe = world.recipe()
    recipe["models"][0]["calibration"] = {"data": "self", "samples": 5, "max_length": 12}
    [expert, *_] = find_experts(Document(recipe)).measured
    base = ModelReference.parse(str(world.base))
    models = opened(world)

    def written(expert: Expert) -> set[tuple[int, ...]]:
        [rows] = set_aside([expert], None, base, models, 5, tmp_path / "scratch", OPTIONS)
        assert len(rows.data.sequences) == 5
        return {tuple(row.ids) for row in rows.data.sequences}

    assert written(expert) == written(expert)
    succeed(obim_saliency(write_recipe(tmp_path, recipe), tmp_path / "out", "--quiet"))
    [file] = (tmp_path / "out").glob("*.self-*.jsonl")
    measured = {tuple(json.loads(line)["tokens"]) for line in file.read_text().splitlines()}
    assert len(measured) == 5
    assert not measured & written(expert)
    other = expert.calibration.model_copy(update={"seed": 1})
    assert written(replace(expert, calibration=other)) != written(expert)


def test_a_saliency_of_other_rows_is_noticed(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [f"row {n}" for n in range(30)])
    recipe = world.recipe(parameters={"saliency": str(tmp_path / "saliency")})
    for model in recipe["models"]:
        model["calibration"] = {"data": str(rows), "samples": 8}
    path = write_recipe(tmp_path, recipe)
    more = ("--samples", 9, "--model", str(world.math))
    succeed(obim_saliency(path, tmp_path / "saliency", "--quiet", *more))
    succeed(obim_saliency(path, tmp_path / "saliency", "--quiet", "--model", str(world.code)))
    succeed(obim_tune(path, "-o", tmp_path / "tuned.yml", "--quiet", "--rows", 4, "--trials", 1))
    told = [line for line in caplog.messages if "was not measured on the rows" in line]
    assert len(told) == 1
    assert str(world.math) in told[0]
