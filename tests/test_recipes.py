"""Every example recipe: read by mergekit and by us, planned on stand-ins, one of them run whole.

The models that the recipes name are too large for a test, so the recipes' text is changed in one
point: each model's name becomes the folder of a tiny checkpoint of the same architecture.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from commands import mergekit_yaml, obim_saliency, succeed
from mergekit_obim.kernels.gram import TEST_MATRIX
from mergekit_obim.recipe import Document
from mergekit_obim.recipe.calibration import Calibration
from mergekit_obim.recipe.experts import find_experts
from mergekit_obim.saliency.file import saliency_file_name
from planning import Planned, plan
from tiny_tokenizers import byte_tokenizer
from toy import write_toy

RECIPES = Path(__file__).resolve().parents[1] / "example_recipes"
LAYERS = 3
_SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_SIZES, **changes}))


def qwen2(**changes: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**{**_SIZES, **changes}))


# Model name in the recipe -> its stand-in.
STAND_INS: dict[str, dict[str, Any]] = {
    "ci-toy.yml": {f"./models/{name}": llama for name in ("base", "math", "code")},
    "llama2-13b-sft.yml": {
        "meta-llama/Llama-2-13b-hf": llama,
        # A fine-tune with a padding token of its own, as many of Llama 2 have.
        "vanillaOVO/WizardMath-13B-V1.0": lambda: llama(vocab_size=260),
        "WizardLMTeam/WizardLM-13B-V1.2": llama,
        "layoric/llama-2-13b-code-alpaca": llama,
    },
    "qwen2-7b-post-pretraining.yml": {
        "Qwen/Qwen2-7B": qwen2,
        **{f"./checkpoints/step-{n}0000": qwen2 for n in (3, 4, 5)},
    },
    "lora.yml": {"./models/base": llama},
    "filtered.yml": {f"./models/{name}": qwen2 for name in ("base", "chat", "math")},
    "least-error.yml": {f"./models/{name}": llama for name in ("base", "chat", "math", "code")},
    "nearest.yml": {f"./models/{name}": llama for name in ("base", "chat", "math", "code")},
    "regmean.yml": {f"./models/{name}": llama for name in ("base", "chat", "math", "code")},
}
ADAPTERS = {"lora.yml": ("./adapters/math", "./adapters/code")}


def save_stand_in(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    byte_tokenizer(folder)


def fine_tune(model: PreTrainedModel, base: PreTrainedModel) -> PreTrainedModel:
    """The base's weights moved by little, where they have the same shape."""
    weights = dict(base.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.shape == weights[name].shape:
                weight.copy_(weights[name] + 0.1 * weights[name].std() * torch.randn(weight.shape))
    return model


def save_adapter(base: PreTrainedModel, folder: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapter = get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in adapter.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.01)
    adapter.save_pretrained(folder)


def save_saliency(
    folder: Path, model: str, shapes: dict[str, torch.Size], columns: int = 0
) -> None:
    """A file by any tool: h for every weight, per token for the embeddings, and sketches if any."""
    h = {
        name: torch.rand((shape[0], 1) if "embed" in name else (1, *shape[1:]))
        for name, shape in shapes.items()
    }
    header = {"format": "mergekit-obim-saliency", "format_version": "1", "form": "factored"}
    if columns:
        linear = [name for name, shape in shapes.items() if len(shape) == 2 and "embed" not in name]
        inputs = {name: f"sketch of {name}" for name in linear}
        for name, entry in inputs.items():
            h[entry] = torch.randn(shapes[name][1], min(columns, shapes[name][1]))
        gram = {"columns": columns, "test_matrix": TEST_MATRIX, "inputs": inputs}
        header["gram"] = json.dumps(gram)
    folder.mkdir(exist_ok=True)
    save_file(h, folder / saliency_file_name(model), metadata={**header, "model": model})


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("name", STAND_INS)
def test_the_recipe_is_planned_without_complaint(
    name: str, in_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = (RECIPES / name).read_text()
    torch.manual_seed(0)
    model_of: dict[int, PreTrainedModel] = {}
    for number, (model, build) in enumerate(STAND_INS[name].items()):
        assert model in text
        text = text.replace(model, f"./stand-in-{number}")
        model_of[number] = fine_tune(build(), model_of.get(0) or build())
        save_stand_in(model_of[number], in_folder / f"stand-in-{number}")
    for adapter in ADAPTERS.get(name, ()):
        assert adapter in text
        save_adapter(llama(), in_folder / adapter)

    recipe = yaml.safe_load(text)
    experts = find_experts(Document(recipe)).measured
    assert len(experts) == len(recipe["models"])
    for expert in experts:
        assert isinstance(expert.calibration, Calibration)
        stand_in = expert.model.split("+")[0]
        weights = load_file(in_folder / stand_in / "model.safetensors")
        shapes = {key: weight.shape for key, weight in weights.items()}
        columns = expert.calibration.sketch
        assert columns == (16 if name == "regmean.yml" else 0)
        save_saliency(in_folder / "saliency", expert.model, shapes, columns)

    planned = plan(recipe)

    # No tensor is without a saliency.
    assert not [record for record in caplog.records if record.name == "mergekit_obim"]
    assert set(planned.tasks) == set(shapes)
    assert not (in_folder / "merged").exists()
    CHECKS.get(name, lambda planned: None)(planned)


def check_sft(planned: Planned) -> None:
    for task in planned.tasks.values():
        assert task.parameters["order"] == "recipe"
    densities = planned.of("model.layers.1.mlp.up_proj.weight", "density")
    assert list(densities.values()) == [0.45, 0.4, 0.1]


def check_post_pretraining(planned: Planned) -> None:
    for name, task in planned.tasks.items():
        assert task.parameters["order"] == "rotation"
        assert set(planned.of(name, "density").values()) == {0.3}


def check_filtered(planned: Planned) -> None:
    for name, task in planned.tasks.items():
        random = "norm" in name or "bias" in name
        assert set(planned.of(name, "criterion").values()) == {"random" if random else "saliency"}
        assert task.parameters["lambda"] == (0.8 if name == "lm_head.weight" else 1.0)
    for layer, expected in enumerate(([0.5, 0.2], [0.35, 0.35], [0.2, 0.5])):
        densities = planned.of(f"model.layers.{layer}.mlp.up_proj.weight", "density")
        assert list(densities.values()) == pytest.approx(expected)
        densities = planned.of(f"model.layers.{layer}.self_attn.q_proj.weight", "density")
        assert list(densities.values()) == [0.3, 0.3]


def check_least_error(planned: Planned) -> None:
    for name, task in planned.tasks.items():
        assert task.parameters["assignment"] == "least_error"
        assert list(planned.of(name, "weight").values()) == [1.0, 2.0, 1.0]


def check_nearest(planned: Planned) -> None:
    for name, task in planned.tasks.items():
        assert (task.parameters["assignment"], task.parameters["stretch"]) == ("nearest", None)
        assert list(planned.of(name, "weight").values()) == [1.0, 1.0, 1.0]


def check_regmean(planned: Planned) -> None:
    for name, task in planned.tasks.items():
        assert (task.parameters["shrink"], task.parameters["stretch"]) == (0.95, 1.0)
        assert list(planned.of(name, "weight").values()) == [1.0, 2.0, 1.0]


CHECKS: dict[str, Any] = {
    "llama2-13b-sft.yml": check_sft,
    "qwen2-7b-post-pretraining.yml": check_post_pretraining,
    "filtered.yml": check_filtered,
    "least-error.yml": check_least_error,
    "nearest.yml": check_nearest,
    "regmean.yml": check_regmean,
}


def test_no_recipe_is_left_out() -> None:
    assert {path.name for path in RECIPES.iterdir()} == set(STAND_INS)


def test_the_toy_recipe_merges_with_the_two_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write_toy(tmp_path)
    recipe = RECIPES / "ci-toy.yml"

    measured = succeed(obim_saliency(recipe, "./saliency"))
    assert measured.stdout.count("scored 30 of 30 tensors") == 2
    caplog.clear()
    succeed(mergekit_yaml(recipe, "./merged"))
    assert not [r for r in caplog.records if r.name.startswith("mergekit_obim")]

    models = {
        name: load_file(tmp_path / path / "model.safetensors")
        for name, path in [
            *((m, f"models/{m}") for m in ("base", "math", "code")),
            ("merged", "merged"),
        ]
    }
    assert models["merged"].keys() == models["base"].keys()
    # 3 layers: the gradient's ends and its middle; what stands outside them takes the first.
    code_density = {"layers.0": 0.1, "layers.1": 0.2, "layers.2": 0.3}
    for name, weight in models["merged"].items():
        base, math, code = (models[m][name] for m in ("base", "math", "code"))
        is_math, is_code = (weight == math) & (weight != base), (weight == code) & (weight != base)
        # No mean of anything: each element is one model's, bit for bit.
        assert ((weight == base) | is_math | is_code).all()
        density = next((d for layer, d in code_density.items() if layer in name), 0.1)
        counts = [(int(is_math.sum()), 0.45), (int(is_code.sum()), density)]
        for claimed, share in counts:
            wanted = round(share * weight.numel())
            # A token that the data lacks has h = 0: its row is not claimed.
            assert claimed == wanted or (claimed < wanted and "embed" in name), name
