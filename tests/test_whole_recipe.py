"""What any recipe can have that mergekit finds out late, or never: all commands say it alike."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import mergekit.card
import pytest

import commands
from commands import World, refusal, says, succeed
from mergekit_obim.recipe.fix import _is_taken_for_the_hubs
from mergekit_obim.recipe.references import identity, written_in_two_ways


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def here(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models can be named without their folder's folder."""
    monkeypatch.chdir(world.root)


def models(world: World, *names: str) -> list[dict[str, Any]]:
    made = world.models(density=0.1)
    return [{**model, "model": name} for model, name in zip(made, names, strict=True)]


def check(path: Path, *options: object) -> tuple[list[str], list[str]]:
    result = commands.obim_saliency("--check", "--json", path, *options)
    found = json.loads(result.stdout)
    return found["errors"], found["warnings"]


def without_line(message: str) -> str:
    return re.sub(r"^line \d+: ", "", message)


def refused_by_all(world: World, tmp_path: Path, **changes: Any) -> str:
    """Every command refuses the recipe, in the same words, before its work begins."""
    path = commands.write_recipe(tmp_path, world.recipe(**changes))
    message = refusal(commands.obim_saliency(path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    fault = message.removeprefix("Error: ")
    assert fault in check(path, tmp_path / "out")[0]
    # mergekit has dropped the lines of the file by then.
    merge = refusal(commands.mergekit_yaml(path, tmp_path / "merged"))
    assert merge == f"Error: {without_line(fault)}"
    assert not (tmp_path / "merged").exists()
    return fault


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
@pytest.mark.parametrize("name", ["bf16", "int64"])
def test_dtypes_that_mergekit_does_not_merge_to(
    world: World, tmp_path: Path, key: str, name: str
) -> None:
    fault = refused_by_all(world, tmp_path, **{key: name})
    says(fault, f"{key}: mergekit cannot merge to {name!r}", "bfloat16")


def test_mergekit_pytorch_and_dtypes(world: World, tmp_path: Path) -> None:
    files = [str(folder / "model.safetensors") for folder in (world.base, *world.experts)]
    recipe = {
        "merge_method": "obim",
        "base_model": files[0],
        "models": [{"model": file} for file in files[1:]],
        "parameters": {"criterion": "magnitude"},
    }
    path = commands.write_recipe(tmp_path, {**recipe, "out_dtype": "fp16"})
    says(refusal(commands.mergekit_pytorch(path, tmp_path / "merged")), "out_dtype", "'fp16'")
    other_way = str(world.math / ".." / "math" / "model.safetensors")
    path = commands.write_recipe(
        tmp_path, {**recipe, "models": [{"model": other_way}, *recipe["models"]]}
    )
    says(refusal(commands.mergekit_pytorch(path, tmp_path / "merged")), other_way, files[1])


# --- one model, written in two ways ----------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_identity(tmp_path: Path, world: World) -> None:
    spellings = ["math", "./math", "math/", ".//math", str(world.math), "code/../math"]
    assert len({identity(spelling) for spelling in spellings}) == 1
    os.symlink(world.math, tmp_path / "latest")
    assert identity(str(tmp_path / "latest")) == identity("math")
    assert identity("./math+code") == identity("math/+./code") != identity("math")
    different = ["math", "code", "none", "./none", "math@v1", "org/math", "math+code", "code+math"]
    assert len({identity(one) for one in different}) == len(different)
    assert written_in_two_ways(different) is None
    assert written_in_two_ways(["math", "math"]) is None


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("base", "experts", "pair"),
    [
        ("./base", ("./math", "math/"), ("./math", "math/")),
        ("./base", ("./math", "base"), ("./base", "base")),
        ("{world.base}", ("./math", "./base"), ("./base", "{world.base}")),
    ],
)
def test_a_model_written_in_two_ways(
    world: World,
    tmp_path: Path,
    base: str,
    experts: tuple[str, str],
    pair: tuple[str, str],
) -> None:
    base, *names = (text.format(world=world) for text in (base, *pair))
    fault = refused_by_all(world, tmp_path, base_model=base, models=models(world, *experts))
    says(fault, *names, "one and the same", "list it once")


@pytest.mark.usefixtures("here")
def test_the_same_model_twice_is_no_two_experts(world: World, tmp_path: Path) -> None:
    path = commands.write_recipe(tmp_path, world.recipe(models=models(world, "./math", "./math")))
    message = refusal(commands.obim_saliency(path, tmp_path / "out"))
    says(message, "model ./math: is listed twice", "each expert once")
    says(refusal(commands.mergekit_yaml(path, tmp_path / "out")), "model ./math: is listed twice")
    kinship = commands.obim_kinship("./math", "math", "--base", "base")
    says(refusal(kinship), "./math and math", "one and the same")


@pytest.mark.usefixtures("here")
def test_a_file_is_kept_however_its_model_is_written(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for expert, word in (("./math", "scored"), ("math/", "kept"), ("math", "kept")):
        path = commands.write_recipe(tmp_path, world.recipe(models=models(world, expert, "./code")))
        says(succeed(commands.obim_saliency(path, out, "--model", "./math")).output, word)
    assert [file.name for file in out.iterdir()] == ["math.safetensors"]
    succeed(commands.obim_saliency(path, out))
    path = commands.write_recipe(
        tmp_path,
        world.recipe(models=models(world, "./math", "code"), parameters={"saliency": str(out)}),
    )
    succeed(commands.mergekit_yaml(path, tmp_path / "merged", "--no-write-model-card"))


# --- mergekit's model card -------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_which_folders_the_card_is_taken_for_the_hubs_about(
    monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    asked = []

    def repo_exists(path: str, **options: object) -> bool:
        huggingface_hub.utils.validate_repo_id(path)
        asked.append(path)
        return False

    monkeypatch.setattr(huggingface_hub, "repo_exists", repo_exists)
    folder = world.root.name
    os.chdir(world.root.parent)
    paths = [f"{folder}/math", f"./{folder}/math", str(world.math), f"{folder}/math/", folder]
    paths += [f"./{folder}", f"../{world.root.parent.name}", f"{folder}/none", f"./{folder}/none"]
    for path in paths:
        mergekit.card.is_hf(path)
    assert (
        asked
        == [path for path in paths if _is_taken_for_the_hubs(path)]
        == [f"{folder}/math", folder]
    )


@pytest.mark.usefixtures("here")
def test_a_card_that_would_ask_the_hub(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings(recipe: object, *options: str) -> list[str]:
        path = commands.write_recipe(tmp_path, recipe)
        caplog.clear()
        result = commands.mergekit_yaml(path, tmp_path / "merged", *options)
        if options:
            succeed(result)
        lines = [r.message for r in caplog.records if "model card" in r.message]
        told = [line for line in check(path)[1] if "model card" in line]
        assert lines == ([] if options else list(map(without_line, told)))
        return told

    recipe = world.recipe(
        models=models(world, "math", "./code"), parameters={"criterion": "magnitude"}
    )
    (line,) = warnings(recipe)
    says(line, "the folder math ", "without a network", "write ./math", "--no-write-model-card")
    assert warnings(recipe, "--no-write-model-card") == [line]
    recipe["models"][0]["model"] = "./math"
    assert warnings(recipe) == []
