"""The model that runs is the model that mergekit merges: what commands find out beforehand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from mergekit.common import ModelReference, get_auto_cls
from safetensors.torch import load_file, save_file

import commands
from architectures import ARCHITECTURES, UPSTREAM
from commands import World, refusal, says, succeed
from mergekit_obim.errors import CheckpointError
from mergekit_obim.models.completeness import completeness
from mergekit_obim.models.files import TensorHeader
from mergekit_obim.models.loaded import check_loaded
from mergekit_obim.models.opened import OpenModel, open_model
from mergekit_obim.models.quantised import quantised

ACCESS = SimpleNamespace(trust_remote_code=False, transformers_cache=None, lora_merge_cache=None)
DOWN = "model.layers.0.mlp.down_proj.weight"
HEAD = "lm_head.weight"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def math(world: World, tmp_path: Path) -> Path:
    """A copy of an expert, to be changed."""
    return Path(shutil.copytree(world.math, tmp_path / "math"))


def opened(folder: Path) -> OpenModel:
    return open_model(ModelReference.parse(str(folder)), ACCESS)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def in_every_command(world: World, folder: Path, tmp_path: Path) -> Iterator[str]:
    """What --check, the pre-pass and the merge say of a recipe with this expert instead of math."""
    models = world.recipe()["models"]
    models[0]["model"] = str(folder)
    measured = tmp_path / "saliency"
    shutil.copytree(world.saliency, measured, dirs_exist_ok=True)
    world.saliency_of(world.math, measured).rename(world.saliency_of(folder, measured))
    path = commands.write_recipe(
        tmp_path, world.recipe(models=models, parameters={"saliency": str(measured)})
    )
    check = commands.obim_saliency("--check", path)
    assert check.exit_code == 1, check.output
    yield next(line for line in check.stdout.splitlines() if str(folder) in line)
    yield refusal(commands.obim_saliency(path, tmp_path / "new"))
    yield refusal(commands.mergekit_yaml(path, tmp_path / "out"))


# --- files ------------------------------------------------------------------------------------


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (Path.unlink, "is missing"),
        (cut, "not a whole safetensors file"),
        (pointer, "git lfs pull"),
    ],
    ids=["missing", "cut", "pointer"],
)
@pytest.mark.parametrize("shards", [True, False], ids=["shard", "single"])
def test_files_that_cannot_be_read(
    world: World,
    tmp_path: Path,
    math: Path,
    spoil: Callable[[Path], None],
    words: str,
    shards: bool,
) -> None:
    name = "model.safetensors"
    if shards:
        model = transformers.AutoModelForCausalLM.from_pretrained(math)
        (math / name).unlink()
        model.save_pretrained(math, max_shard_size="20KB")
        name = sorted(path.name for path in math.glob("model-*.safetensors"))[1]
    spoil(math / name)
    if not shards and spoil is Path.unlink:
        name, words = str(math), "model files"
    for line in in_every_command(world, math, tmp_path):
        says(line, f"model {math}", name, words)
    says(refusal(commands.obim_kinship("--base", world.base, math, world.code)), name)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut, "not a whole safetensors file"),
        (pointer, "git lfs pull"),
        (
            lambda file: rewrite(
                file.parent, lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)})
            ),
            f"is quantised, which mergekit cannot merge (tensor {DOWN}",
        ),
    ],
    ids=["cut", "pointer", "quantised"],
)
def test_mergekit_pytorch_is_told_too(
    world: World, tmp_path: Path, math: Path, spoil: Callable[[Path], object], words: str
) -> None:
    file = math / "model.safetensors"
    spoil(file)
    recipe = {
        "merge_method": "consensus_ta",
        "base_model": str(world.base / "model.safetensors"),
        "models": [{"model": str(file)}, {"model": str(world.code / "model.safetensors")}],
    }
    path = commands.write_recipe(tmp_path, recipe)
    says(refusal(commands.mergekit_pytorch(path, tmp_path / "out")), f"model {file}", words)


def test_the_other_faults_are_listed_too(world: World, tmp_path: Path, math: Path) -> None:
    pointer(math / "model.safetensors")
    models = world.recipe()["models"]
    models[0]["model"] = str(math)
    models[1]["calibration"] = "nowhere.jsonl"
    path = commands.write_recipe(tmp_path, world.recipe(models=models))
    output = commands.obim_saliency("--check", path, tmp_path / "new").stdout
    says(output, "git lfs pull", "nowhere.jsonl")


def test_an_index_of_other_files(world: World, tmp_path: Path, math: Path) -> None:
    where = dict.fromkeys(load_file(math / "model.safetensors"), "model.safetensors")
    where["model.other.weight"] = "model.safetensors"
    index = {"metadata": {}, "weight_map": where}
    (math / "model.safetensors.index.json").write_text(json.dumps(index))
    for line in in_every_command(world, math, tmp_path):
        says(line, f"model {math}", "does not hold model.other.weight")


def test_an_index_that_was_left_behind(world: World, tmp_path: Path, math: Path) -> None:
    """mergekit reads the shards that an index names, though a whole file lies beside it."""
    where = dict.fromkeys(load_file(math / "model.safetensors"), "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": where}
    (math / "model.safetensors.index.json").write_text(json.dumps(index))
    for line in in_every_command(world, math, tmp_path):
        says(line, f"model {math}", "is missing", "delete model.safetensors.index.json")


def test_a_file_that_goes_while_it_is_read(math: Path) -> None:
    model = opened(math)
    (math / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor {DOWN} cannot be read"):
        model.load(DOWN)


# --- files that mergekit does not read --------------------------------------------------------


def with_adapter(folder: Path) -> None:
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(folder),
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    parts = {
        f"{prefix}.lora_A.weight": torch.ones(2, 16),
        f"{prefix}.lora_B.weight": torch.ones(16, 2),
    }
    save_file(parts, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def with_shards(folder: Path) -> None:
    """The shards hold the expert, and the single file something else."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="20KB")
    tensors = {name: torch.zeros_like(p) for name, p in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_bin(folder: Path) -> None:
    """An older format holds something else."""
    tensors = load_file(folder / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    torch.save(zeros, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_bin, ("two sets of weights", "pytorch_model.bin will not be read")),
        (with_adapter, ("an adapter beside full weights", "adapter_config.json", "MODEL+ADAPTER")),
        (with_shards, ("two sets of weights", "model.safetensors")),
    ],
)
@pytest.mark.parametrize("options", [(), ("--device-map", "auto", "--max-memory", "cpu=30000")])
def test_the_weights_that_mergekit_reads_are_measured(
    world: World,
    tmp_path: Path,
    math: Path,
    change: Callable[[Path], None],
    words: tuple[str, ...],
    options: tuple[str, ...],
) -> None:
    change(math)
    models = world.recipe()["models"][:1]
    models[0]["model"] = str(math)
    path = commands.write_recipe(tmp_path, world.recipe(models=models))
    result = succeed(commands.obim_saliency(path, tmp_path / "new", *options))
    says(result.stderr, f"Warning: model {math}", *words)
    measured = commands.entries(world.saliency_of(math, tmp_path / "new"))
    expected = commands.entries(world.saliency_of(world.math))
    assert measured.keys() == expected.keys()
    for name, h in expected.items():
        torch.testing.assert_close(measured[name], h, rtol=1e-5, atol=1e-7)


def test_an_adapter_without_its_model(world: World, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with_adapter(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"is an adapter without its model: write MODEL\+"):
        opened(tmp_path / "adapter")


# --- tensors that are not there ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(DOWN), (DOWN, "not complete")),
        (lambda t: t.pop(HEAD), (HEAD, "does not say tie_word_embeddings")),
        (
            lambda t: [t.update({f"_orig_mod.{n}": t.pop(n)}) for n in list(t)],
            ("rename the tensors without '_orig_mod.'",),
        ),
    ],
    ids=["weight", "head", "prefix"],
)
def test_missing_tensors(
    world: World,
    tmp_path: Path,
    math: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    words: tuple[str, ...],
) -> None:
    rewrite(math, change)
    for line in in_every_command(world, math, tmp_path):
        says(line, f"model {math}: has no tensor", *words)


def test_a_head_that_the_config_ties_may_be_missing(math: Path) -> None:
    rewrite(math, lambda tensors: tensors.pop(HEAD))
    config = json.loads((math / "config.json").read_text())
    (math / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert not list(completeness(opened(math), ACCESS, is_base=True, merging=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architectures_checkpoint_is_traced(name: str, tmp_path: Path) -> None:
    """What transformers wrote is complete and loads as it is; without a tensor, it is not."""
    ARCHITECTURES[name].build().save_pretrained(tmp_path)
    model = opened(tmp_path)
    found = list(completeness(model, ACCESS, is_base=True, merging=True))
    found += quantised(model.label, model.config, model.headers)
    assert not found or name in UPSTREAM, found

    prints = model.fingerprints()
    kind = get_auto_cls(model.config.architectures[0])
    module = kind.from_pretrained(tmp_path, dtype=torch.bfloat16)
    check_loaded(module, model, prints)
    last = [p for p in module.parameters() if p.ndim > 1][-1]
    with torch.no_grad():
        last[(0,) * last.ndim] += 1
    with pytest.raises(CheckpointError, match="transformers loaded other values"):
        check_loaded(module, model, prints)

    tensors = load_file(tmp_path / "model.safetensors")
    floating = sorted(
        n for n, t in tensors.items() if t.is_floating_point() and n != "final_logits_bias"
    )
    for gone in (floating[0], floating[len(floating) // 2], floating[-1]):
        rest = {n: tensor for n, tensor in tensors.items() if n != gone}
        save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
        found = list(completeness(opened(tmp_path), ACCESS, is_base=True, merging=True))
        assert [f.level for f in found] == ["error"], gone
        assert "has no tensor" in found[0].message
        # A few families are stored under other names than their modules have.
        assert gone.split(".", 2)[-1] in found[0].message


def test_tensors_of_the_base_that_are_dropped(math: Path) -> None:
    rewrite(math, lambda tensors: tensors.update({"mtp.norm.weight": torch.ones(16)}))
    (found,) = completeness(opened(math), ACCESS, is_base=True, merging=True)
    assert found.level == "warning"
    says(found.message, "1 tensors of the base", "mtp.norm.weight")


# --- quantised --------------------------------------------------------------------------------

LLAMA = transformers.LlamaConfig()


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("model.layers.0.mlp.up_proj.weight", "F8_E4M3", (8, 8)),
        ("model.layers.0.mlp.up_proj.weight", "I8", (8, 8)),
        ("model.layers.0.mlp.up_proj.weight", "U8", (32, 1)),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "F32", (1, 1)),
        ("model.layers.0.mlp.up_proj.weight_scale", "BF16", (8, 1)),
        ("model.layers.0.mlp.up_proj.weight_zero_point", "I8", (8, 1)),
        ("model.layers.0.mlp.up_proj.weight_packed", "I32", (8, 1)),
        ("model.layers.0.mlp.up_proj.qweight", "I32", (1, 8)),
        ("model.layers.0.mlp.up_proj.scales", "F16", (1, 8)),
        ("model.layers.0.mlp.up_proj.SCB", "F32", (8,)),
        ("model.layers.0.mlp.up_proj.weight.absmax", "U8", (8,)),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "U8", (90,)),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", "U8", (2, 8, 1, 16)),
        ("model.layers.0.mlp.up_proj.weight._data", "I8", (8, 8)),
    ],
)
def test_quantised_by_its_tensors(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    (found,) = quantised("m", LLAMA, {name: TensorHeader(dtype, shape, "f.safetensors")})
    assert found.level == "error"
    says(found.message, "model m: is quantised", name, "f.safetensors", dtype, "full-precision")


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("transformer.h.0.attn.bias", "U8", (1, 1, 64, 64)),
        ("embeddings.position_ids", "I64", (1, 512)),
        ("encoder.relative_position_index", "I64", (49, 49)),
        ("bn.num_batches_tracked", "I64", ()),
        ("model.layers.0.self_attn.attn_mask", "I32", (64, 64)),
        ("model.layers.0.layer_scale", "F32", (8,)),
        ("model.layers.0.self_attn.k_scale", "F32", ()),
        ("model.layers.0.mlp.up_proj.weight", "BF16", (8, 8)),
    ],
)
def test_whole_tensors_and_buffers_are_not_quantised(
    name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    assert not list(quantised("m", LLAMA, {name: TensorHeader(dtype, shape, "f")}))


def test_what_only_the_config_says() -> None:
    text = {"quantization_config": {"quant_method": "fp8"}}
    config = transformers.LlavaConfig(text_config={"model_type": "llama", **text})
    whole = {"model.norm.weight": TensorHeader("BF16", (8,), "f")}
    (found,) = quantised("m", config, None)
    says(found.message, "is quantised", "quantization_config")
    (found,) = quantised("m", config, whole)
    says(found.message, "hold full precision", "take quantization_config out of its config.json")
    assert not list(quantised("m", transformers.LlavaConfig(), whole))
