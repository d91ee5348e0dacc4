"""Merges in stages: a file of several recipes, for mergekit-multi, and combined statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import checkpoints
import commands
import reference
from commands import World, refusal, says, succeed
from mergekit_obim.saliency.combine import combine
from mergekit_obim.saliency.file import SaliencyFile, SaliencyMetadata, write_saliency
from reference import Expert

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def write(path: Path, entries: dict[str, torch.Tensor], tokens: int | None, **more: Any) -> Path:
    calibration = {} if tokens is None else {"tokens": tokens, "samples": 2, "sources": [{}]}
    metadata = SaliencyMetadata(
        **{"form": "factored", "model": path.stem, "calibration": calibration, **more}
    )
    write_saliency(path, {n: t.shape for n, t in entries.items()}, entries.__getitem__, metadata)
    return path


def test_means_are_weighted_by_tokens(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    h = [{"w": torch.rand(1, 5, generator=generator), "b": torch.ones(3)} for _ in range(3)]
    h[1]["other"] = torch.ones(1)
    tokens = [100, 1, 7]
    paths = [
        write(tmp_path / f"m{k}.safetensors", h[k], tokens[k], unscored={"a": f"why {k}"})
        for k in range(3)
    ]
    file = combine(paths, tmp_path / "new" / "all.safetensors")
    expected = sum(n * one["w"].double() for n, one in zip(tokens, h, strict=True)) / 108
    torch.testing.assert_close(file["w"].double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(file["b"], torch.ones(3))
    assert set(file.shapes) == {"w", "b"}
    assert file.metadata.unscored == {
        "a": "why 0",
        "other": "not every combined file has an entry for it",
    }
    assert file.metadata.calibration["tokens"] == 108
    assert file.metadata.calibration["combined"] == [
        {"model": f"m{k}", "tokens": count} for k, count in enumerate(tokens)
    ]
    assert file.metadata.fingerprint == {}
    # Two at a time makes the same.
    combine(paths[:2], tmp_path / "two.safetensors")
    chained = combine([tmp_path / "two.safetensors", paths[2]], tmp_path / "chained.safetensors")
    torch.testing.assert_close(chained["w"], file["w"], rtol=1e-6, atol=0)


def test_experts_of_a_mixture_count_by_the_tokens_routed_to_them(tmp_path: Path) -> None:
    h = [torch.rand(3, 1, 4, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    routed = [[90, 10, 0], [30, 0, 0]]
    paths = [
        write(
            tmp_path / f"m{k}.safetensors",
            {"e": h[k]},
            [100, 300][k],
            experts={"e": {"tokens": routed[k], "pooled": [1, 2]}},
        )
        for k in range(2)
    ]
    file = combine(paths, tmp_path / "all.safetensors")
    # The third saw nothing, and has its layer's mean in both.
    expected = [(3 * h[0][0] + h[1][0]) / 4, h[0][1], (h[0][2] + 3 * h[1][2]) / 4]
    torch.testing.assert_close(file["e"], torch.stack(expected), rtol=1e-6, atol=1e-7)
    assert file.metadata.experts == {"e": {"tokens": [120, 10, 0], "pooled": [1, 2]}}


def test_what_cannot_be_combined(tmp_path: Path) -> None:
    good = write(tmp_path / "good.safetensors", {"w": torch.ones(1, 5)}, 10)
    new = tmp_path / "new.safetensors"

    def refused(other: object, *options: object) -> str:
        message = refusal(commands.obim_saliency("--combine", good, other, "-o", new, *options))
        assert not new.exists()
        return message

    wide = write(tmp_path / "wide.safetensors", {"w": torch.ones(1, 6)}, 10)
    says(refused(wide), wide, "w of model wide", "[1, 6]", "[1, 5]", good, "same vocabulary")
    dense = write(tmp_path / "dense.safetensors", {"w": torch.ones(4, 5)}, 10, form="dense")
    says(refused(dense), dense, "dense", "without --dense")
    untold = write(tmp_path / "untold.safetensors", {"w": torch.ones(1, 5)}, None)
    says(refused(untold), untold, "how many tokens", "model untold")
    message = refused(tmp_path / "none.safetensors")
    says(message, "none.safetensors", "no such saliency file")
    assert "cannot be written" not in message
    blocked = ("--combine", good, good, "-o", good / "new.safetensors")
    says(refusal(commands.obim_saliency(*blocked)), "cannot be written")
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    says(refused(tmp_path / "model.safetensors"), "not a saliency file")
    taken = ("--combine", good, good, "-o", good)
    says(refusal(commands.obim_saliency(*taken)), good, "there already", "--overwrite")
    says(refusal(commands.obim_saliency(*taken, "--overwrite")), good, "name another file")
    for usage in (("--combine", good, "-o", new), ("--combine", good, good), (good, "-o", new)):
        assert commands.obim_saliency(*usage).exit_code == 2


def stages(world: World, combined: Path | None) -> list[dict[str, Any]]:
    """math and code make `both`; that and chat make what is wanted."""
    both: dict[str, Any] = {"model": "both", "parameters": {"density": 0.5}}
    if combined:
        both["parameters"]["saliency"] = str(combined)
    calibration = {"data": str(world.math_data), "samples": 4}
    chat = {"model": str(world.chat), "calibration": calibration, "parameters": {"density": 0.3}}
    return [{"name": "both", **world.recipe()}, world.recipe(models=[both, chat])]


@pytest.fixture
def in_files(world: World, tmp_path: Path) -> Path:
    path = tmp_path / "stages.yml"
    path.write_text(yaml.safe_dump_all(stages(world, tmp_path / "both.safetensors")))
    return path


def test_two_stages(world: World, tmp_path: Path, in_files: Path, caplog: Any) -> None:
    recipes = stages(world, tmp_path / "both.safetensors")
    measured = tmp_path / "measured"
    for recipe in recipes:
        recipe["parameters"]["saliency"] = str(measured)
    in_files.write_text(yaml.safe_dump_all(recipes))
    told = succeed(commands.obim_saliency(in_files, measured))
    assert [line.split(" → ")[0] for line in told.stdout.splitlines() if " → " in line] == [
        f"[1/3] {world.math}",
        f"[2/3] {world.code}",
        f"[3/3] {world.chat}",
    ]
    files = [world.saliency_of(expert, measured) for expert in (*world.experts, world.chat)]
    # The first two are what a file of one recipe makes.
    for expert, file in zip(world.experts, files, strict=False):
        assert file.read_bytes() == world.saliency_of(expert).read_bytes()
    combined = tmp_path / "both.safetensors"
    told = succeed(commands.obim_saliency("--combine", *files[:2], "-o", combined))
    says(told.stdout, combined, f"{world.math} (120 tokens), {world.code} (306 tokens)")
    merge = (in_files, "-I", tmp_path / "made", "--out-path", tmp_path / "final", "--quiet")
    succeed(commands.mergekit_multi(*merge))
    assert not [record for record in caplog.records if "without saliency" in record.getMessage()]

    base = checkpoints.read_checkpoint(world.base)
    experts = [tmp_path / "made" / "both", world.chat]
    tensors = [checkpoints.read_checkpoint(folder) for folder in experts]
    h = [SaliencyFile(combined), SaliencyFile(files[2])]
    final = checkpoints.read_checkpoint(tmp_path / "final")
    for name, weight in base.items():
        inputs = [
            Expert(tensors[k][name], density, h=h[k][name]) for k, density in enumerate((0.5, 0.3))
        ]
        layer = reference.layer_index(name, commands.LAYERS)
        assert torch.equal(final[name], reference.obim(weight, inputs, layer=layer)), name


def test_the_second_stage_says_what_it_needs(world: World, tmp_path: Path) -> None:
    path = tmp_path / "stages.yml"
    path.write_text(yaml.safe_dump_all(stages(world, None)))
    told = succeed(commands.obim_saliency(path, tmp_path / "out", "--model", world.chat)).stderr
    says(told, "recipe 2: line", "model both: is made by another recipe", "--combine", "saliency:")
    checked = commands.obim_saliency("--check", "--json", path, tmp_path / "out")
    verdict = json.loads(checked.stdout)
    assert verdict["ok"]
    warnings = [line for line in verdict["warnings"] if line.startswith("recipe 2: ")]
    assert sum("--combine" in line for line in warnings) == 1
    assert sum("the merge itself was not planned" in line for line in warnings) == 1
    # Of the merge it is what will be missing.
    checked = commands.obim_saliency("--check", path)
    assert checked.exit_code == 1
    says(checked.stdout, "Error: recipe 2: line", "model both: is made by another recipe")


def test_a_fault_of_any_recipe_of_a_file(world: World, tmp_path: Path, in_files: Path) -> None:
    recipes = stages(world, tmp_path / "both.safetensors")
    recipes[0]["models"][0]["calibration"]["sampels"] = 3
    del recipes[1]["models"][1]["calibration"]
    recipes[1]["models"][0]["calibration"] = "unused.txt"
    in_files.write_text(yaml.safe_dump_all(recipes))
    message = refusal(commands.obim_saliency(in_files, tmp_path / "out"))
    says(message, "2 errors", "both: line", "'sampels'", "recipe 2: line", "no calibration data")
    recipes = stages(world, tmp_path / "both.safetensors")
    recipes[0]["parameters"]["lamda"] = 1
    recipes[1]["models"][1]["parameters"]["densty"] = 1
    in_files.write_text(yaml.safe_dump_all(recipes))
    for command in ((in_files, tmp_path / "out"), ("--check", in_files)):
        result = commands.obim_saliency(*command)
        assert result.exit_code == 1
        says(result.output, "both: line", "'lamda'", "recipe 2: line", "'densty'")
    says(
        refusal(commands.obim_saliency("--check", in_files, "--fix", tmp_path / "new")),
        "give each stage a file",
    )
    message = refusal(commands.obim_saliency(in_files, tmp_path / "out", "--model", "both"))
    says(message, "--model both: not an expert")


def test_an_expert_of_two_recipes_is_measured_once(world: World, tmp_path: Path) -> None:
    recipes = stages(world, tmp_path / "both.safetensors")
    recipes[1]["models"][1] = recipes[0]["models"][1]
    path = tmp_path / "stages.yml"
    path.write_text(yaml.safe_dump_all(recipes))
    told = succeed(commands.obim_saliency(path, tmp_path / "out")).stdout
    says(told, "[1/2]", "[2/2]")
    recipes[1]["models"][1] = {**recipes[0]["models"][1], "calibration": str(world.math_data)}
    path.write_text(yaml.safe_dump_all(recipes))
    message = refusal(commands.obim_saliency(path, tmp_path / "out"))
    says(message, f"model {world.code}: has two different calibrations")
