"""One recipe, two commands: from models and text to the merge that the paper's formulas give.

h is checked against a slow float64 reference written here, which knows modules and not
operations; the merge, bit for bit, against ``reference.py`` given the h that was written.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from mergekit.common import get_auto_cls
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import checkpoints
import commands
import reference
import tiny_models
from commands import CODE_ROWS, MATH_ROWS, World, succeed
from mergekit_obim.kernels.gram import draw_test_matrix
from mergekit_obim.saliency.file import SaliencyFile
from tiny_tokenizers import EOS, VOCAB_SIZE, byte_ids, byte_tokenizer

Tensors = dict[str, Tensor]


# --- the references --------------------------------------------------------------------------


def reference_h(folder: Path, sequences: Iterable[Sequence[int]]) -> Tensors:
    """h of every parameter in float64, one sequence at a time."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = get_auto_cls(config.architectures[0]).from_pretrained(folder, dtype=torch.float64)
    model = model.eval()
    names = {id(p): name for name, p in model.named_parameters()}
    terms: dict[str, dict[str, Tensor]] = defaultdict(dict)
    rows: dict[str, int] = defaultdict(int)

    def add(parameter: Tensor | None, kind: str, total: Tensor, count: int) -> None:
        if parameter is not None:
            name = names[id(parameter)]
            terms[name][kind] = terms[name].get(kind, torch.zeros(())) + total.double()
            rows[f"{name} {kind}"] += count

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        (x,) = args
        if isinstance(module, nn.Embedding):
            counts = torch.zeros(module.num_embeddings)
            for token in x.flatten().tolist():
                counts[token] += 1
            add(module.weight, "embedding", counts[:, None], x.numel())
            return
        x = x.reshape(-1, x.shape[-1])
        if isinstance(module, nn.Linear):
            add(module.weight, "linear", (x**2).sum(0)[None], len(x))
        elif isinstance(module, Conv1D):
            add(module.weight, "linear", (x**2).sum(0)[:, None], len(x))
        elif isinstance(module, nn.LayerNorm):
            centred = x - x.mean(-1, keepdim=True)
            normal = centred / (centred.pow(2).mean(-1, keepdim=True) + module.eps).sqrt()
            add(module.weight, "gain", (normal**2).sum(0), len(x))
        elif is_rms_norm(module):
            normal = x / (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
            add(module.weight, "gain", (normal**2).sum(0), len(x))
        if (bias := getattr(module, "bias", None)) is not None:
            add(bias, "bias", torch.tensor([float(len(x))]), len(x))

    known = (nn.Linear, nn.Embedding, nn.LayerNorm, Conv1D)
    for module in model.modules():
        if isinstance(module, known) or is_rms_norm(module):
            module.register_forward_hook(hook)
    with torch.no_grad():
        for ids in sequences:
            model(input_ids=torch.tensor([ids]))
    assert terms.keys() == set(names.values())  # nothing is left unchecked
    return {
        name: sum(total / rows[f"{name} {kind}"] for kind, total in kinds.items())
        for name, kinds in terms.items()
    }


def is_rms_norm(module: nn.Module) -> bool:
    """Each architecture has a class of its own for it."""
    return type(module).__name__.endswith("RMSNorm")


def check_h(written: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, h in expected.items():
        assert written[name].shape == h.shape, name
        torch.testing.assert_close(
            written[name].double(), h, rtol=2e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def source_layer(name: str, moved: Sequence[int]) -> str:
    """What an output tensor is called in the inputs; `moved` is the source of each layer."""
    return re.sub(r"(?<=\.layers\.)\d+", lambda match: str(moved[int(match[0])]), name)


def reference_merge(
    base: Tensors,
    experts: Sequence[tuple[Tensors, Tensors, Mapping[str, float]]],
    outputs: Iterable[str],
    *,
    dtype: torch.dtype = torch.float32,
    moved: Sequence[int] | None = None,
    order: str = "rotation",
    lambda_: float = 1.0,
    blocks: int = commands.LAYERS,
) -> Tensors:
    """Every output tensor; an expert is (weights, h, its density and weight)."""
    merged = {}
    for output in outputs:
        name = source_layer(output, moved) if moved else output
        merged[output] = reference.obim(
            base[name].to(dtype),
            [
                reference.Expert(weights[name].to(dtype), h=h.get(name), **parameters)
                for weights, h, parameters in experts
            ],
            layer=reference.layer_index(output, blocks),
            order=order,
            lambda_=lambda_,
        )
    return merged


def cut(rows: Sequence[str], length: int, *, end: Sequence[int] = ()) -> list[list[int]]:
    """What the tokenizer makes of rows: a token per byte, the closing one kept when cut."""
    return [[*byte_ids(row)[: length - len(end)], *end] for row in rows]


# --- as a user types it ------------------------------------------------------------------------

CONTRACT_RECIPE = """
merge_method: obim
base_model: ./models/base
models:
  - model: ./models/math
    parameters: {density: 0.45}
    calibration: {data: data/math.jsonl, samples: 100}
  - model: ./models/code
    parameters: {density: 0.1}
    calibration: data/code.jsonl            # short for {data: …}
parameters:
  saliency: ./saliency                      # the pre-pass's OUT_DIR
  order: rotation
calibration: {max_length: 40}               # defaults for every model's calibration
dtype: bfloat16
"""


@pytest.mark.slow
def test_one_recipe_two_commands(world: World, tmp_path: Path) -> None:
    for name in ("base", "math", "code"):
        shutil.copytree(world.root / name, tmp_path / "models" / name)
    (tmp_path / "data").mkdir()
    shutil.copy(world.math_data, tmp_path / "data")
    shutil.copy(world.code_data, tmp_path / "data")
    (tmp_path / "recipe.yml").write_text(CONTRACT_RECIPE, encoding="utf-8")

    measured = commands.spawn("obim-saliency", "recipe.yml", "./saliency", cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    assert "[1/2] ./models/math → saliency/models--math.safetensors\n" in measured.stdout
    assert "[2/2] ./models/code → saliency/models--code.safetensors\n" in measured.stdout
    assert "Measuring ./models/code: 100%" in measured.stderr
    merged = commands.spawn("mergekit-yaml", "recipe.yml", "./merged", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    assert "without saliency" not in merged.stderr  # everything was scored

    files = [tmp_path / "saliency" / f"models--{name}.safetensors" for name in ("math", "code")]
    h = [commands.entries(file) for file in files]
    for written, expert, rows in zip(h, world.experts, (MATH_ROWS, CODE_ROWS), strict=True):
        check_h(written, reference_h(expert, cut(rows, 40)))
    result = checkpoints.read_checkpoint(tmp_path / "merged")
    base, math, code = map(checkpoints.read_checkpoint, (world.base, *world.experts))
    expected = reference_merge(
        base,
        [(math, h[0], {"density": 0.45}), (code, h[1], {"density": 0.1})],
        base,
        dtype=torch.bfloat16,
    )
    commands.same_tensors(result, expected)
    # The merge is one of all three, and a model that loads.
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    for source in (base, math, code):
        assert (result[q_proj] == source[q_proj].bfloat16()).any()
        assert not torch.equal(result[q_proj], source[q_proj].bfloat16())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model(input_ids=torch.tensor([cut(MATH_ROWS, 40)[0]])).logits.isfinite().all()


# --- within this process -----------------------------------------------------------------------


def merge(recipe: dict[str, Any], folder: Path, *options: object) -> Tensors:
    path = commands.write_recipe(folder, recipe, "merge.yml")
    out = folder / "merged"
    shutil.rmtree(out, ignore_errors=True)
    succeed(commands.mergekit_yaml(path, out, *options))
    return checkpoints.read_checkpoint(out)


def measure(recipe: dict[str, Any], folder: Path, *options: object) -> Path:
    """Run the pre-pass and put its folder into the recipe."""
    out = folder / "saliency"
    recipe.setdefault("parameters", {})["saliency"] = str(out)
    succeed(commands.obim_saliency(commands.write_recipe(folder, recipe), out, *options))
    return out


def inputs(world: World, *parameters: Mapping[str, float]) -> list[tuple[Tensors, Tensors, Any]]:
    return [
        (
            checkpoints.read_checkpoint(expert),
            commands.entries(world.saliency_of(expert)),
            own,
        )
        for expert, own in zip(world.experts, parameters, strict=True)
    ]


METHODS: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
    "obim": ({"assignment": "least_error"}, reference.least_error),
    "ties_obm": ({}, reference.ties_obm),
    "obm_sign": ({}, reference.obm_sign),
    "regmean_diag": ({}, reference.regmean_diag),
    "consensus_ta": ({"lambda": 1.0}, reference.consensus_ta),
    "pcb": ({"lambda": 1.0}, reference.pcb),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges(world: World, tmp_path: Path, method: str) -> None:
    parameters, merged_by = METHODS[method]
    if "lambda" not in parameters:
        parameters = {**parameters, "saliency": str(world.saliency)}
    recipe = world.recipe(merge_method=method, models=world.models(), parameters=parameters)
    merged = merge(recipe, tmp_path)
    base = checkpoints.read_checkpoint(world.base)
    experts = inputs(world, {}, {})
    expected = {
        name: merged_by(weight, [reference.Expert(w[name], h=h[name]) for w, h, _ in experts])
        for name, weight in base.items()
    }
    commands.same_tensors(merged, expected)


@pytest.mark.parametrize("options", [["--sketch", 5], ["--full-gram"], []])
def test_regmean_of_what_the_pre_pass_measured(
    world: World, tmp_path: Path, options: list[Any]
) -> None:
    """By sketches, by matrices, and by what it measures for a recipe of this method."""
    recipe = world.recipe(merge_method="regmean", models=world.models(), parameters={})
    out = measure(recipe, tmp_path, *options)
    merged = merge(recipe, tmp_path)
    base = checkpoints.read_checkpoint(world.base)
    experts = [checkpoints.read_checkpoint(expert) for expert in world.experts]
    files = [SaliencyFile(world.saliency_of(expert, out)) for expert in world.experts]
    for name, weight in base.items():
        own = [expert[name] for expert in experts]
        h = [file[name] for file in files]
        if "proj" not in name and "lm_head" not in name:
            told = [reference.Expert(t, h=x) for t, x in zip(own, h, strict=True)]
            assert torch.equal(merged[name], reference.regmean_diag(weight, told)), name
            continue
        estimates = []
        for file in files:
            estimate = file.gram(name)
            sketch = file.sketch(name)
            assert (estimate is None) == (options != ["--full-gram"])
            if sketch is not None:
                omega = draw_test_matrix(*sketch.shape).double()
                sketch = sketch.double()
                core = torch.linalg.pinv(omega.T @ sketch, hermitian=True, rtol=1e-6)
                estimate = sketch @ core @ sketch.T
            assert estimate is not None
            estimate = 0.95 * estimate.double()
            estimate.diagonal().copy_(file[name][0])
            estimates.append(estimate)
        expected = reference.regmean(weight, own, estimates, [1.0, 1.0])
        step = float((expected - weight).abs().max())
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-3 * step)


@pytest.mark.parametrize("order", ["rotation", "recipe"])
def test_scaled_merge_in_either_order(world: World, tmp_path: Path, order: str) -> None:
    recipe = world.recipe(
        parameters={"saliency": str(world.saliency), "order": order, "lambda": 0.75}
    )
    recipe["models"][0]["parameters"] = {"density": 0.5, "weight": 1.5}
    recipe["models"][1]["parameters"] = {"density": 0.375, "weight": -0.5}
    base = checkpoints.read_checkpoint(world.base)
    experts = inputs(world, {"density": 0.5, "weight": 1.5}, {"density": 0.375, "weight": -0.5})
    expected = reference_merge(base, experts, base, order=order, lambda_=0.75)
    commands.same_tensors(merge(recipe, tmp_path), expected)


def test_density_left_out_is_one_share_each(world: World, tmp_path: Path) -> None:
    base = checkpoints.read_checkpoint(world.base)
    merged = merge(world.recipe(models=world.models()), tmp_path)
    commands.same_tensors(merged, reference_merge(base, inputs(world, {}, {}), base))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_dense_files_give_the_same_bytes(world: World, tmp_path: Path, dtype: str | None) -> None:
    """Also where the merge rounds its inputs first, which makes other task vectors of them."""
    factored = merge(world.recipe(dtype=dtype), tmp_path)
    recipe = world.recipe(dtype=dtype, parameters={})
    out = measure(recipe, tmp_path, "--dense")
    for file in out.iterdir():
        assert commands.header(file)["form"] == "dense"
    commands.same_tensors(merge(recipe, tmp_path), factored)


def test_a_file_per_model_and_the_models_own(world: World, tmp_path: Path) -> None:
    usual = merge(world.recipe(), tmp_path)
    own = shutil.copytree(world.code, tmp_path / "code")
    shutil.copy(world.saliency_of(world.code), own / "obim_saliency.safetensors")
    recipe = world.recipe(parameters=None)
    recipe["models"][0]["parameters"]["saliency"] = str(world.saliency_of(world.math))
    recipe["models"][1]["model"] = str(own)
    commands.same_tensors(merge(recipe, tmp_path), usual)


def test_slices_use_the_source_layers_saliency(world: World, tmp_path: Path) -> None:
    """Layers swapped and one repeated; rotation goes by the *output*'s layer."""
    moved = [1, 0, 1]
    slices = [
        {
            "sources": [
                {
                    "model": str(model),
                    "layer_range": [layer, layer + 1],
                    **({"parameters": {"density": density}} if density else {}),
                }
                for model, density in ((world.math, 0.5), (world.code, 0.25), (world.base, None))
            ]
        }
        for layer in moved
    ]
    merged = merge(world.recipe(models=None, slices=slices), tmp_path)
    base = checkpoints.read_checkpoint(world.base)
    outputs = checkpoints.llama_shapes(layers=len(moved), vocabulary=VOCAB_SIZE)
    experts = inputs(world, {"density": 0.5}, {"density": 0.25})
    expected = reference_merge(base, experts, outputs, moved=moved, blocks=len(moved))
    commands.same_tensors(merged, expected)
    # The test is worth something only if another layer's saliency gives something else.
    wrong = [(w, {n: h[source_layer(n, [1, 0])] for n in h}, own) for w, h, own in experts]
    other = reference_merge(base, wrong, outputs, moved=moved, blocks=len(moved))
    assert any(not torch.equal(other[name], expected[name]) for name in outputs)


def random_experts(
    build: Callable[[], transformers.PreTrainedModel], folder: Path, **tokenizer: Any
) -> list[Path]:
    """A base and two experts near it."""
    model = build()
    folders = [folder / name for name in ("base", "one", "two")]
    for seed, out in enumerate(folders):
        generator = torch.Generator().manual_seed(seed)
        if seed:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(out)
        byte_tokenizer(out, **tokenizer)
    return folders


def resized(name: str) -> transformers.PreTrainedModel:
    model = tiny_models.build(name)
    model.resize_token_embeddings(VOCAB_SIZE, mean_resizing=False)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "bert-classifier", "roberta-masked"])
def test_other_architectures(world: World, tmp_path: Path, name: str) -> None:
    """Conv1D, tied heads, learned positions, encoders, biases, LayerNorms."""
    folders = random_experts(lambda: resized(name), tmp_path, add_eos=True)
    recipe = world.recipe(
        base_model=str(folders[0]),
        models=[
            {
                "model": str(folder),
                "parameters": {"density": density},
                "calibration": str(data),
            }
            for folder, density, data in (
                (folders[1], 0.5, world.math_data),
                (folders[2], 0.25, world.code_data),
            )
        ],
        # Names of layers differ between architectures: rotation has its own tests.
        parameters={"order": "recipe"},
        calibration={"max_length": 24},
    )
    out = measure(recipe, tmp_path)
    merged = merge(recipe, tmp_path)
    h = [commands.entries(world.saliency_of(folder, out)) for folder in folders[1:]]
    for written, folder, rows in zip(h, folders[1:], (MATH_ROWS, CODE_ROWS), strict=True):
        check_h(written, reference_h(folder, cut(rows, 24, end=[EOS])))
    base, one, two = map(checkpoints.read_checkpoint, folders)
    experts = [(one, h[0], {"density": 0.5}), (two, h[1], {"density": 0.25})]
    commands.same_tensors(merged, reference_merge(base, experts, merged, order="recipe"))


def test_what_has_no_saliency_is_named_by_both_commands(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = random_experts(lambda: resized("mamba"), tmp_path)
    recipe = world.recipe(
        base_model=str(folders[0]),
        models=[{"model": str(f), "calibration": str(world.math_data)} for f in folders[1:]],
        parameters={"unscored": "base"},
        calibration={"max_length": 4, "samples": 2},
    )
    out = measure(recipe, tmp_path)
    with caplog.at_level(logging.WARNING, logger="mergekit_obim"):
        merged = merge(recipe, tmp_path)
    base, *experts = map(checkpoints.read_checkpoint, folders)
    for folder in folders[1:]:
        unscored = json.loads(commands.header(world.saliency_of(folder, out))["unscored"])
        told = [r.getMessage() for r in caplog.records if f"model {folder}:" in r.getMessage()]
        assert len(told) == 1
        assert "left at the base's values: " in told[0]
        assert set(told[0].split(": ")[-1].split(", ")) == unscored.keys() & merged.keys()
    a_log = "backbone.layers.0.mixer.A_log"
    assert a_log in told[0]
    assert torch.equal(merged[a_log], base[a_log])
    assert not torch.equal(experts[0][a_log], base[a_log])


def test_warnings_of_the_merge_reach_the_terminal(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file by hand, with the four required keys, that scores one tensor."""
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    for expert in world.experts:
        checkpoints.write_saliency_file(
            world.saliency_of(expert, tmp_path / "by-hand"), {q_proj: torch.ones(1, 16)}
        )
    recipe = world.recipe(parameters={"saliency": str(tmp_path / "by-hand")})
    path = commands.write_recipe(tmp_path, recipe)
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's: the command sets its own
    done = commands.succeed(commands.mergekit_yaml(path, tmp_path / "merged"))
    others = checkpoints.read_checkpoint(world.base).keys() - {q_proj}
    for expert in world.experts:
        line = next(
            line
            for line in done.stderr.splitlines()
            if f"model {expert}: {len(others)} tensors without saliency, ranked by" in line
        )
        assert set(line.split(": ")[-1].split(", ")) == others
    expected = reference_merge(
        checkpoints.read_checkpoint(world.base),
        [
            (checkpoints.read_checkpoint(expert), {q_proj: torch.ones(1, 16)}, {"density": d})
            for expert, d in zip(world.experts, (0.45, 0.1), strict=True)
        ],
        [*others, q_proj],
    )
    commands.same_tensors(checkpoints.read_checkpoint(tmp_path / "merged"), expected)


@pytest.fixture
def adapter(world: World, tmp_path: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(world.base)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    tuned = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapters_through_both_commands(world: World, tmp_path: Path, adapter: Path) -> None:
    lora, cache = f"{world.base}+{adapter}", tmp_path / "cache"
    recipe = world.recipe(
        models=[
            {"model": lora, "parameters": {"density": 0.5}, "calibration": str(world.math_data)},
            world.recipe()["models"][1],
        ],
        parameters={},
    )
    out = measure(recipe, tmp_path, "--lora-merge-cache", cache)
    merged = merge(recipe, tmp_path, "--lora-merge-cache", cache)
    base = checkpoints.read_checkpoint(world.base)
    factors = checkpoints.Tensors()
    for file in adapter.glob("*.safetensors"):
        factors |= commands.entries(file)
    (folder,) = cache.iterdir()
    tuned = checkpoints.read_checkpoint(folder)
    for name, weight in tuned.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        change = torch.zeros_like(weight)
        if f"{prefix}A.weight" in factors:
            change = 2 * factors[f"{prefix}B.weight"] @ factors[f"{prefix}A.weight"]
            assert change.any()
        torch.testing.assert_close(weight, base[name] + change)
    files = {path.name: path for path in out.iterdir()}
    lora_file = next(path for name, path in files.items() if "adapter" in name)
    assert commands.header(lora_file)["model"] == lora
    check_h(commands.entries(lora_file), reference_h(folder, cut(MATH_ROWS, 48)))
    experts = [
        (tuned, commands.entries(lora_file), {"density": 0.5}),
        (
            checkpoints.read_checkpoint(world.code),
            commands.entries(world.saliency_of(world.code, out)),
            {"density": 0.1},
        ),
    ]
    commands.same_tensors(merged, reference_merge(base, experts, base))


def test_mergekit_pytorch_and_multi_give_the_same(world: World, tmp_path: Path) -> None:
    usual = merge(world.recipe(), tmp_path)
    flat = world.recipe(
        base_model=f"{world.base}/model.safetensors",
        models=[
            {
                "model": f"{expert}/model.safetensors",
                "parameters": {"density": density, "saliency": str(world.saliency_of(expert))},
            }
            for expert, density in zip(world.experts, (0.45, 0.1), strict=True)
        ],
        parameters=None,
    )
    path = commands.write_recipe(tmp_path, flat, "flat.yml")
    succeed(commands.mergekit_pytorch(path, tmp_path / "flat"))
    commands.same_tensors(checkpoints.read_checkpoint(tmp_path / "flat"), usual)

    documents = tmp_path / "multi.yml"
    documents.write_text(yaml.safe_dump({**world.recipe(), "name": "stage"}))
    stages = tmp_path / "stages"
    succeed(commands.mergekit_multi(documents, "--intermediate-dir", stages))
    commands.same_tensors(checkpoints.read_checkpoint(stages / "stage"), usual)


def test_a_bf16_copy_of_what_was_measured_is_accepted(world: World, tmp_path: Path) -> None:
    """Publishing weights in half of the precision does not make their saliency another's."""
    folder = shutil.copytree(world.math, tmp_path / "math")
    tensors = checkpoints.read_checkpoint(world.math)
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    recipe = world.recipe(dtype="bfloat16")
    usual = merge(recipe, tmp_path)
    recipe["models"][0]["model"] = str(folder)
    recipe["models"][0]["parameters"]["saliency"] = str(world.saliency_of(world.math))
    commands.same_tensors(merge(recipe, tmp_path), usual)
