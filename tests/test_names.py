"""Names: whatever mergekit plans to load has an h, or a reason, under a name it asks for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from mergekit.architecture import WeightInfo, arch_info_for_config
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel

import tiny_models
from mergekit_obim.calibration.capture import CurvatureCapture
from mergekit_obim.models.names import sources_of, weight_names

pytestmark = pytest.mark.usefixtures("one_thread")

# mergekit has no definition of these: it infers their tensors from the checkpoint.
INFERRED = {"opt", "bloom"}
# What mergekit's definitions plan and these checkpoints do not hold: buffers, mostly.
NOT_STORED = {
    "gpt_neox": r".*(attention\.bias|masked_bias|inv_freq)",
    "falcon-old": r"transformer\.h\.\d+\.ln_(attn|mlp)\.(weight|bias)|lm_head\.weight",
    "bert-masked": r"bert\.(embeddings\.position_ids|pooler\.dense\.(weight|bias))",
}


def stored_names(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


def planned(folder: Path) -> list[WeightInfo]:
    """The weights that mergekit plans for this checkpoint."""
    config = AutoConfig.from_pretrained(folder)
    architecture = arch_info_for_config(config)
    assert architecture is not None
    return architecture.all_weights(config)


def asked(weight: WeightInfo) -> set[str]:
    """The names under which LoadTensor looks for it."""
    return {weight.name, *(weight.aliases or ()), *(weight.tied_names or ())}


def measured_names(model: PreTrainedModel, folder: Path) -> set[str]:
    with CurvatureCapture(model) as capture:
        model(input_ids=torch.tensor([[5, 6, 7]]))
    names = weight_names(model, sources_of(model, stored_names(folder)))
    assert set(names) == set(capture.curvatures()) | set(capture.unscored())
    return {name for known in names.values() for name in known}


@pytest.mark.parametrize("name", [n for n in tiny_models.NAMES if n not in INFERRED])
def test_every_planned_tensor_is_measured_under_a_name_mergekit_asks_for(
    name: str, tmp_path: Path
) -> None:
    model = tiny_models.build(name)
    model.save_pretrained(tmp_path)
    known = measured_names(type(model).from_pretrained(tmp_path).eval(), tmp_path)
    weights = planned(tmp_path)
    missing = {weight.name for weight in weights if not asked(weight) & known}
    not_stored = re.compile(NOT_STORED.get(name, r".*position_ids"))
    assert len(weights) - len(missing) > 10
    assert {weight for weight in missing if not not_stored.fullmatch(weight)} == set()
    # And what is missing from the model really is missing from the checkpoint.
    assert not missing & set(stored_names(tmp_path))


@pytest.mark.parametrize("name", sorted(INFERRED))
def test_every_stored_tensor_is_measured_where_mergekit_infers(name: str, tmp_path: Path) -> None:
    model = tiny_models.build(name)
    model.save_pretrained(tmp_path)
    assert set(stored_names(tmp_path)) <= measured_names(model, tmp_path)


def test_stored_names_that_differ_are_kept_beside_the_modules() -> None:
    model = tiny_models.build("gpt2")
    names = weight_names(model, sources_of(model, ["wte.weight", "h.0.ln_1.bias", "h.0.attn.bias"]))
    assert names["transformer.wte.weight"] == ("transformer.wte.weight", "wte.weight")
    assert names["transformer.h.0.ln_1.bias"] == ("transformer.h.0.ln_1.bias", "h.0.ln_1.bias")
    assert not any(".attn.bias" in name for known in names.values() for name in known)

    model = tiny_models.build("gpt_neox")
    names = weight_names(model, sources_of(model, ["embed_out.weight"]))
    assert names["lm_head.weight"] == ("lm_head.weight", "embed_out.weight")

    model = tiny_models.build("bert-masked")
    module, stored = (f"bert.embeddings.LayerNorm.{kind}" for kind in ("weight", "gamma"))
    assert weight_names(model, sources_of(model, [stored]))[module] == (module, stored)


def test_a_tied_weight_stored_twice_keeps_both_names() -> None:
    model = tiny_models.build("llama-tied")
    names = weight_names(model, sources_of(model, ["model.embed_tokens.weight", "lm_head.weight"]))
    assert names["model.embed_tokens.weight"] == ("model.embed_tokens.weight", "lm_head.weight")
    assert "lm_head.weight" not in names


def test_fused_tensors_keep_the_modules_name_only() -> None:
    stored = [f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight" for e in range(4)]
    model = tiny_models.build("mixtral")
    names = weight_names(model, sources_of(model, stored))
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    assert names[fused] == (fused,)
