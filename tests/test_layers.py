"""Which layer a tensor belongs to, in the names of real architectures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from mergekit_obim.models.layers import layer_indices, rotate

# For every architecture: the tensors before the blocks, one in each of its blocks, those after.
ARCHITECTURES = {
    "llama": (
        ["model.embed_tokens.weight"],
        "model.layers.{}.self_attn.q_proj.weight",
        ["model.norm.weight", "lm_head.weight"],
    ),
    "gpt2": (
        ["transformer.wte.weight", "transformer.wpe.weight"],
        "transformer.h.{}.attn.c_attn.bias",
        ["transformer.ln_f.weight", "lm_head.weight"],
    ),
    "gpt2, bare": (["wte.weight", "wpe.weight"], "h.{}.mlp.c_fc.weight", ["ln_f.bias"]),
    "gpt_neox": (
        ["gpt_neox.embed_in.weight"],
        "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight",
        ["gpt_neox.final_layer_norm.weight", "embed_out.weight"],
    ),
    "falcon": (
        ["transformer.word_embeddings.weight"],
        "transformer.h.{}.self_attention.dense.weight",
        ["transformer.ln_f.weight", "lm_head.weight"],
    ),
    "opt": (
        ["model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"],
        "model.decoder.layers.{}.fc1.weight",
        ["model.decoder.final_layer_norm.weight"],
    ),
    "bert": (
        ["bert.embeddings.word_embeddings.weight", "bert.embeddings.LayerNorm.weight"],
        "bert.encoder.layer.{}.output.dense.weight",
        ["bert.pooler.dense.weight", "cls.predictions.decoder.weight", "classifier.bias"],
    ),
    "mixtral, per expert": (
        ["model.embed_tokens.weight"],
        "model.layers.{}.block_sparse_moe.experts.7.w1.weight",
        ["model.norm.weight"],
    ),
    "mamba": (
        ["backbone.embeddings.weight"],
        "backbone.layers.{}.mixer.A_log",
        ["backbone.norm_f"],
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_of(architecture: str) -> None:
    before, block, after = ARCHITECTURES[architecture]
    expected = dict.fromkeys(after, 12) | {block.format(n): n for n in range(12)}
    expected |= dict.fromkeys(before, 0)
    assert layer_indices(reversed(expected)) == expected


def test_every_stack_of_blocks_counts_for_itself() -> None:
    layers = layer_indices(
        [
            "shared.weight",
            *(f"encoder.block.{n}.layer.0.SelfAttention.q.weight" for n in range(3)),
            *(f"decoder.block.{n}.layer.2.DenseReluDense.wo.weight" for n in range(5)),
            "encoder.final_layer_norm.weight",
            "decoder.final_layer_norm.weight",
            "lm_head.weight",
        ]
    )
    assert layers["shared.weight"] == 0
    assert layers["encoder.block.2.layer.0.SelfAttention.q.weight"] == 2
    assert layers["decoder.block.4.layer.2.DenseReluDense.wo.weight"] == 4
    assert layers["encoder.final_layer_norm.weight"] == 3
    assert layers["decoder.final_layer_norm.weight"] == layers["lm_head.weight"] == 5


def test_a_model_without_blocks_is_all_layer_0() -> None:
    assert layer_indices(["weight", "head.bias"]) == {"weight": 0, "head.bias": 0}
    assert layer_indices([]) == {}


@given(experts=st.integers(1, 8), layer=st.integers(0, 100))
def test_each_layers_order_is_the_previous_rotated_left_by_one(experts: int, layer: int) -> None:
    order = rotate(range(experts), layer)
    assert order == reference.merging_order(experts, layer)
    assert rotate(range(experts), layer + 1) == [*order[1:], order[0]]


def test_rotating_no_experts_gives_none() -> None:
    assert rotate([], 3) == []
