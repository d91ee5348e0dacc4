"""``obim-card``: the merged model's card says whose weights they are, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import checkpoints
import commands
from commands import World, refusal, says, succeed
from mergekit_obim import __version__
from mergekit_obim.dry_run import read_config
from mergekit_obim.report.card import BEGIN, END, hub_models


@pytest.fixture(scope="session")
def merged_once(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    recipe = world.recipe(models=unequal(world))
    succeed(commands.mergekit_yaml(commands.write_recipe(folder, recipe), folder / "model"))
    return folder / "model"


@pytest.fixture
def merged(merged_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged_once, tmp_path / "model"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def unequal(world: World) -> list[dict[str, object]]:
    models = world.models()
    for model, density in zip(models, (0.3, 0.2), strict=True):
        model["parameters"] = {"density": density}
    return models


def read(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def owned(world: World, merged: Path) -> list[int]:
    """Positions by owner, from the tensors alone: where a value is one model's only, it is its."""
    models = [checkpoints.read_checkpoint(f) for f in (*world.experts, world.base)]
    result = checkpoints.read_checkpoint(merged)
    counts = [0, 0, 0]
    for name, tensor in result.items():
        base = models[2][name]
        for k in range(2):
            counts[k] += int(((tensor == models[k][name]) & (tensor != base)).sum())
        both = (models[0][name] == models[1][name]) & (tensor == models[0][name]) & (tensor != base)
        counts[2] += int(both.sum())
    return counts


def test_the_section_says_whose_the_weights_are(world: World, merged: Path) -> None:
    before, files = ModelCard(read(merged)), set(commands.contents(merged))
    succeed(commands.obim_card(merged))
    card = read(merged)
    assert ModelCard(card).text.startswith(before.text.rstrip("\n"))
    assert set(commands.contents(merged)) == files
    section = card.partition(BEGIN)[2].partition(END)[0]
    says(section, "OBIM", __version__, "the base")
    elements = sum(t.numel() for t in checkpoints.read_checkpoint(merged).values())
    math, code, both = owned(world, merged)
    for expert, count, data, rows in (
        (world.math, math, world.math_data, len(commands.MATH_ROWS)),
        (world.code, code, world.code_data, len(commands.CODE_ROWS)),
    ):
        [row] = [line for line in section.splitlines() if line.startswith(f"| {expert} ")]
        says(row, data, f"{rows} rows", world.saliency_of(expert).name)
        share = float(row.split("|")[2].strip(" %")) / 100
        # Where both experts have the same value, the tensors do not tell whose it is.
        assert (count - both) / elements - 1e-4 <= share <= count / elements + 1e-4


def test_again_it_replaces_the_section_and_keeps_what_others_wrote(
    world: World, merged: Path
) -> None:
    succeed(commands.obim_card(merged))
    once = read(merged)
    succeed(commands.obim_card(merged))
    assert read(merged) == once
    (merged / "README.md").write_text(once + "\n## Thanks\n", encoding="utf-8")
    succeed(commands.obim_card(merged, "--no-shares"))
    card = read(merged)
    assert card.count(BEGIN) == card.count(END) == 1
    assert card.endswith("\n## Thanks\n")
    assert "Share of the weights" in once
    assert "Share of the weights" not in card


def test_the_metadata_gets_tags_and_data_sets_and_keeps_what_it_has(
    world: World, merged: Path, tmp_path: Path
) -> None:
    sources = [{"data": "org/rows", "split": "train"}, {"data": "rows.jsonl"}]
    path = tmp_path / "saliency.safetensors"
    checkpoints.write_saliency_file(
        path,
        commands.entries(world.saliency_of(world.math)),
        calibration=json.dumps({"sources": sources * 2}),
    )
    models = unequal(world)
    models[0]["parameters"] = {"saliency": str(path)}
    recipe = commands.write_recipe(tmp_path, world.recipe(models=models))
    metadata = "license: mit\nbase_model: org/first\ntags: [mine, merge]\nown: 3\n"
    (merged / "README.md").write_text(f"---\n{metadata}---\n# Mine\n", encoding="utf-8")
    for _ in range(2):
        succeed(commands.obim_card(merged, "--recipe", recipe, "--no-shares"))
        card = ModelCard(read(merged))
        assert card.data.to_dict() == {
            "license": "mit",
            "base_model": "org/first",
            "tags": ["mine", "merge", "mergekit", "obim"],
            "own": 3,
            "datasets": ["org/rows"],
        }
        assert card.text.startswith("# Mine\n\n" + BEGIN)


def test_models_on_the_hub_are_its_base_models(world: World) -> None:
    models = [{"model": "org/math@v1+org/lora"}, {"model": str(world.code)}, {"model": "./gone"}]
    config = read_config(world.recipe(base_model="org/base", models=models))
    assert hub_models(config) == ["org/base", "org/lora", "org/math"]


def test_a_card_is_made_where_mergekit_wrote_none(world: World, merged: Path) -> None:
    (merged / "README.md").unlink()
    recipe = commands.write_recipe(merged.parent, world.recipe(models=unequal(world)))
    (merged / "mergekit_config.yml").unlink()
    says(refusal(commands.obim_card(merged)), merged, "--recipe")
    succeed(commands.obim_card(merged, "--recipe", recipe, "--no-shares"))
    says(read(merged), "merge of pre-trained language models", BEGIN, world.math)


def test_methods_without_owners_have_a_section_without_shares(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(merge_method="ties_obm")
    path = commands.write_recipe(tmp_path, recipe)
    succeed(commands.mergekit_yaml(path, tmp_path / "model"))
    succeed(commands.obim_card(tmp_path / "model"))
    card = read(tmp_path / "model")
    says(card, "TIES + OBM", BEGIN, world.saliency_of(world.math).name)
    assert "Share of the weights" not in card


def test_a_model_that_the_recipe_does_not_make_any_more(merged: Path) -> None:
    [path] = merged.glob("model*.safetensors")
    tensors = checkpoints.read_checkpoint(merged)
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    before = read(merged)
    says(refusal(commands.obim_card(merged)), name, "not what this recipe makes", "--no-shares")
    assert read(merged) == before


def test_other_faults(world: World, merged: Path, tmp_path: Path) -> None:
    recipe = {**world.recipe(), "merge_method": "linear"}
    path = commands.write_recipe(tmp_path, recipe)
    says(refusal(commands.obim_card(merged, "--recipe", path)), "linear", "nothing to add")
    (merged / "README.md").write_text(f"{BEGIN}\nhalf", encoding="utf-8")
    says(refusal(commands.obim_card(merged, "--no-shares")), END, "by hand")
    (merged / "README.md").write_text("---\n- a list\n---\n", encoding="utf-8")
    says(refusal(commands.obim_card(merged, "--no-shares")), "README.md", "cannot be read")
    recipe["models"] = [{"model": str(tmp_path / "gone")}]
    recipe["merge_method"] = "obim"
    path = commands.write_recipe(tmp_path, recipe)
    says(refusal(commands.obim_card(merged, "--recipe", path)), "gone")
    assert json.loads((merged / "config.json").read_text())  # untouched
