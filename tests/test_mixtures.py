"""Mixtures of experts through both commands, stored one by one and merged fused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

import checkpoints
import commands
import reference
from architectures import ARCHITECTURES
from commands import CODE_ROWS, MATH_ROWS, Recipe, succeed
from mergekit_obim.models.names import stored_parts
from mergekit_obim.saliency.file import saliency_file_name
from test_experts import FEWEST_ROWS, NaiveExperts
from tiny_tokenizers import VOCAB_SIZE, byte_ids, byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

DENSITIES = (0.5, 0.25)
LENGTH = 24


def write_models(name: str, root: Path) -> list[Path]:
    """A base and two experts near it, as transformers stores them."""
    model = ARCHITECTURES[name].build()
    model.resize_token_embeddings(VOCAB_SIZE, mean_resizing=False)
    folders = [root / folder for folder in ("base", "one", "two")]
    for seed, folder in enumerate(folders):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += seed * 0.02 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
        byte_tokenizer(folder)
    return folders


def recipe_for(folders: list[Path], root: Path, name: str) -> Recipe:
    data = [commands.write_rows(root / "math.jsonl", MATH_ROWS)]
    data.append(commands.write_rows(root / "code.jsonl", CODE_ROWS))
    return {
        "merge_method": "obim",
        "base_model": str(folders[0]) + name,
        "models": [
            {
                "model": str(folder) + name,
                "parameters": {"density": density},
                "calibration": str(rows),
            }
            for folder, density, rows in zip(folders[1:], DENSITIES, data, strict=True)
        ],
        "parameters": {"saliency": str(root / "saliency"), "order": "recipe"},
        "calibration": {"max_length": LENGTH},
        "dtype": "float32",
    }


def expected(folders: list[Path], h: list[dict[str, Tensor]], layout: str) -> dict[str, Tensor]:
    """The reference merge, of the modules' parameters or of the stored tensors."""
    if layout == "stored":
        weights = [checkpoints.read_checkpoint(folder) for folder in folders]
    else:
        models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
        weights = [dict(model.state_dict()) for model in models]
    return {
        name: reference.obim(
            weights[0][name],
            [
                reference.Expert(own[name], h=saliency.get(name), density=density)
                for own, saliency, density in zip(weights[1:], h, DENSITIES, strict=True)
            ],
            order="recipe",
        )
        for name in weights[0]
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_mixtures_through_both_commands(name: str, tmp_path: Path) -> None:
    folders = write_models(name, tmp_path)
    recipe = recipe_for(folders, tmp_path, "")
    path = commands.write_recipe(tmp_path, recipe)
    out = tmp_path / "saliency"
    result = succeed(commands.obim_saliency(path, out))
    files = [out / saliency_file_name(str(folder)) for folder in folders[1:]]
    h = [commands.entries(file) for file in files]

    few = 0
    for written, file, folder, rows in zip(
        h, files, folders[1:], (MATH_ROWS, CODE_ROWS), strict=True
    ):
        assert json.loads(commands.header(file)["unscored"]) == {}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        naive = NaiveExperts(model)
        with torch.no_grad():
            for row in rows:
                model(input_ids=torch.tensor([byte_ids(row)[:LENGTH]]))
        experts = json.loads(commands.header(file)["experts"])
        assert experts.keys() == naive.totals.keys()
        for parameter, total in naive.totals.items():
            counts = naive.counts[parameter]
            pooled = [e for e, count in enumerate(counts) if count < FEWEST_ROWS]
            assert experts[parameter] == {"tokens": counts, "pooled": pooled}
            few += len(pooled)
            wanted = torch.stack([total[e] / max(1, count) for e, count in enumerate(counts)])
            wanted[pooled] = total.sum(0) / sum(counts)
            torch.testing.assert_close(
                written[parameter].double(), wanted, rtol=1e-4, atol=1e-7, msg=parameter
            )
    # Both cases occur, and the terminal tells of the one.
    assert 0 < few < 2 * sum(len(counts) for counts in naive.counts.values())
    assert "experts saw fewer than 32 tokens and take the mean over their layer's" in result.stderr

    merged_folder = tmp_path / "merged"
    done = succeed(commands.mergekit_yaml(path, merged_folder))
    assert "without saliency" not in done.output
    merged = checkpoints.read_checkpoint(merged_folder)
    commands.same_tensors(merged, expected(folders, h, "module"))
    model = transformers.AutoModelForCausalLM.from_pretrained(merged_folder)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in merged.items())
    # Nothing to do the second time, but the experts are told of again.
    again = succeed(commands.obim_saliency(path, out))
    assert "(kept: nothing has changed)" in again.stdout
    assert "experts saw fewer than 32 tokens" in again.stderr

    # mergekit-pytorch knows no modules: it merges the experts as they are stored.
    shutil.rmtree(merged_folder)
    flat = recipe_for(folders, tmp_path, "/model.safetensors")
    for model, file in zip(flat["models"], files, strict=True):
        model["parameters"]["saliency"] = str(file)
    succeed(
        commands.mergekit_pytorch(commands.write_recipe(tmp_path, flat, "flat.yml"), merged_folder)
    )
    commands.same_tensors(
        checkpoints.read_checkpoint(merged_folder), expected(folders, h, "stored")
    )


def test_in_float64(tmp_path: Path) -> None:
    """Which torch's grouped product does not know."""
    folders = write_models("mixtral", tmp_path)
    path = commands.write_recipe(tmp_path, recipe_for(folders, tmp_path, ""))
    for dtype in ("float32", "float64"):
        succeed(commands.obim_saliency(path, tmp_path / dtype, "--dtype", dtype))
    for folder in folders[1:]:
        name = saliency_file_name(str(folder))
        single, double = (commands.entries(tmp_path / d / name) for d in ("float32", "float64"))
        assert single.keys() == double.keys()
        for entry, h in single.items():
            torch.testing.assert_close(h, double[entry], rtol=1e-3, atol=1e-6, msg=entry)


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "phimoe", "glm4moe", "nemotron_h", "jamba", "qwen3_vl"]
)
def test_stored_parts_are_what_loading_puts_together(name: str, tmp_path: Path) -> None:
    """A checkpoint whose *weights* are h, stored and loaded: the module's h apart is the stored."""
    model = ARCHITECTURES[name].build()
    fused = {n: p for n, p in model.named_parameters() if p.ndim == 3 and ".experts." in n}
    assert fused
    h = {}
    for parameter, weight in fused.items():
        h[parameter] = torch.rand(len(weight), 1, weight.shape[2])
        weight.data = h[parameter].expand(weight.shape).clone()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    loaded = type(model).from_pretrained(tmp_path)

    def shape(stored_name: str) -> torch.Size | None:
        return stored[stored_name].shape if stored_name in stored else None

    seen = 0
    for parameter in fused:
        if parameter in stored:
            continue
        parts = stored_parts(loaded, parameter, h[parameter], shape)
        for stored_name, part in parts.items():
            assert torch.equal(part.expand_as(stored[stored_name]), stored[stored_name])
        assert sum(stored[n].numel() for n in parts) == fused[parameter].numel()
        seen += len(parts)
    assert seen or name == "qwen3_vl"


def test_a_stored_tensor_of_several_parameters_gets_no_part_for_all(tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"].build()
    assert stored_parts(model, "lm_head.weight", torch.ones(1, 16), lambda _: None) == {}
