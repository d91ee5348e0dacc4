"""Configurations are compared by what they make of the weights, not by how files are written."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    AutoConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from commands import says
from mergekit_obim.models.configs import architecture_fault, config_faults, head_faults

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def findings(own: PretrainedConfig, base: PretrainedConfig) -> list[tuple[str, str]]:
    return [(f.level, f.message) for f in config_faults("expert", own, "base", base)]


def read(model_type: str, **written: Any) -> PretrainedConfig:
    """What ``AutoConfig`` makes of a file."""
    config: PretrainedConfig = AutoConfig.for_model(model_type, **written)
    return config


@pytest.mark.parametrize(
    ("own", "base"),
    [
        (read("llama"), read("llama")),
        (read("llama", rms_norm_eps=0.00001), read("llama", rms_norm_eps=1e-05)),
        (read("llama", rms_norm_eps=9.999999747378752e-06), read("llama", rms_norm_eps=1e-05)),
        (read("llama", rope_scaling={**YARN, "type": "yarn"}), read("llama", rope_scaling=YARN)),
        (read("llama", rope_theta=10000), read("llama", rope_parameters={"rope_theta": 10000.0})),
        (read("llama", rope_theta=5e5, rope_scaling=None), read("llama", rope_theta=500000.0)),
        (read("llama", partial_rotary_factor=1.0), read("llama")),
        (read("llama", hidden_act="swish"), read("llama", hidden_act="silu")),
        (read("llama", head_dim=128), read("llama", head_dim=None)),
        (read("llama", num_key_value_heads=None), read("llama", num_key_value_heads=32)),
        (read("llama", attention_dropout=0.1, initializer_range=1.0), read("llama")),
        (read("llama", max_position_embeddings=8192), read("llama")),
        (read("llama", torch_dtype="float32", eos_token_id=7, vocab_size=9), read("llama")),
        (read("llama", unsloth_version="1", _attn_implementation="sdpa"), read("llama")),
        # Gemma's first files say gelu where they mean its approximation
        (read("gemma", hidden_act="gelu"), read("gemma", hidden_act="gelu_new")),
        # a window that is off
        (read("qwen2", sliding_window=9, max_window_layers=3), read("qwen2")),
        (
            read("gemma3_text", rope_theta=1e6, rope_local_base_freq=1e4),
            read("gemma3_text", rope_parameters=GEMMA_ROPE),
        ),
        # slices take from models of other depths
        (read("gemma3_text", num_hidden_layers=12), read("gemma3_text", num_hidden_layers=24)),
    ],
)
def test_configurations_that_mean_the_same(own: PretrainedConfig, base: PretrainedConfig) -> None:
    assert findings(own, base) == []
    assert findings(base, own) == []


@pytest.mark.parametrize(
    ("own", "base", "words"),
    [
        (
            LlamaConfig(rope_theta=1000000.0),
            LlamaConfig(),
            ("rope_parameters.rope_theta 1000000.0 (the base's: 10000.0)",),
        ),
        (
            LlamaConfig(rope_parameters=YARN),
            LlamaConfig(),
            ('rope_type "yarn" (the base\'s: "default")', "factor 4.0 (the base's: not set)"),
        ),
        (
            Gemma3TextConfig(rope_parameters={**GEMMA_ROPE, "full_attention": {"rope_theta": 9.0}}),
            Gemma3TextConfig(),
            ("rope_parameters.full_attention.rope_theta 9.0 (the base's: 1000000.0)",),
        ),
        (
            LlamaConfig(rms_norm_eps=1e-5),
            LlamaConfig(rms_norm_eps=1e-6),
            ("rms_norm_eps 1e-05 (the base's: 1e-06)",),
        ),
        (
            GraniteConfig(attention_multiplier=0.5, logits_scaling=8.0),
            GraniteConfig(),
            ("attention_multiplier 0.5", "logits_scaling 8.0"),
        ),
        (
            Gemma3TextConfig(query_pre_attn_scalar=128),
            Gemma3TextConfig(),
            ("query_pre_attn_scalar 128 (the base's: 256)",),
        ),
        (
            LlamaConfig(hidden_act="gelu"),
            LlamaConfig(hidden_act="gelu_new"),
            ('hidden_act "gelu" (the base\'s: "gelu_pytorch_tanh")',),
        ),
        (
            Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=0),
            Qwen2Config(),
            ("sliding_window 64 (the base's: not set)", "layer_types", "…"),
        ),
        (
            MixtralConfig(num_experts_per_tok=1),
            MixtralConfig(),
            ("num_experts_per_tok 1 (the base's: 2)",),
        ),
        (
            Llama4TextConfig(attention_chunk_size=64),
            Llama4TextConfig(),
            ("attention_chunk_size 64 (the base's: 8192)",),
        ),
        (
            Gemma3Config(vision_config={"layer_norm_eps": 1e-3}),
            Gemma3Config(),
            ("vision_config.layer_norm_eps 0.001",),
        ),
    ],
    ids=lambda value: value[0][:24] if isinstance(value, tuple) else "",
)
def test_what_is_a_matter_of_degree(
    own: PretrainedConfig, base: PretrainedConfig, words: tuple[str, ...]
) -> None:
    [(level, line)] = findings(own, base)
    assert level == "warning"
    says(line, "model expert: its config has", *words, "the config of the base base")
    says(line, "try the merged model with either value in its config.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, ('hidden_act "gelu" (the base\'s: "silu")',)),
        (
            {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256},
            ("head_dim 256", "num_attention_heads 16 (the base's: 32)", "num_key_value_heads 16"),
        ),
        ({"attention_bias": True}, ("attention_bias true (the base's: false)",)),
    ],
    ids=["activation", "heads", "bias"],
)
def test_what_makes_other_weights(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    [(level, line)] = findings(LlamaConfig(**changes), LlamaConfig())
    assert level == "check_error"
    says(line, *words, "its weights mean something else", "correct its config.json")


def test_faults_and_warnings_are_told_apart() -> None:
    lines = findings(LlamaConfig(hidden_act="relu", rms_norm_eps=1.0), LlamaConfig())
    assert [level for level, _ in lines] == ["check_error", "warning"]
    assert "rms_norm_eps" not in lines[0][1]
    assert "hidden_act" not in lines[1][1]


# --- the head that is, or is not, the embeddings ---------------------------------------------

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def heads(*, tied: bool, **stored: set[str]) -> list[str]:
    config = LlamaConfig(architectures=["LlamaForCausalLM"], tie_word_embeddings=tied)
    found = list(head_faults("base", config, stored))
    assert all(finding.level == "warning" for finding in found)
    return [finding.message for finding in found]


def test_heads_as_the_base_has_them() -> None:
    assert heads(tied=True, base={EMBEDDING}, one={EMBEDDING}) == []
    assert heads(tied=False, base={EMBEDDING, HEAD}, one={EMBEDDING, HEAD}) == []


def test_a_head_that_the_merged_config_denies() -> None:
    [line] = heads(tied=True, base={EMBEDDING}, one={EMBEDDING, HEAD}, two={EMBEDDING})
    says(line, "model one: has a lm_head.weight of its own", "tie_word_embeddings: true", "base")
    says(line, "set tie_word_embeddings to false in the merged config.json")
    [line] = heads(tied=True, base={EMBEDDING, HEAD}, one={HEAD}, two={HEAD})
    says(line, "model one", "(and 1 more such models)")
    [line] = heads(tied=True, base={EMBEDDING, HEAD}, one={EMBEDDING})
    says(line, "model base: has a lm_head.weight of its own")


def test_an_expert_without_the_base_s_head() -> None:
    [line] = heads(tied=False, base={EMBEDDING, HEAD}, one={EMBEDDING}, two={EMBEDDING, HEAD})
    says(
        line, "model one: has no lm_head.weight", "the base base has one", "embeddings for its head"
    )


def test_the_head_has_the_name_that_mergekit_knows() -> None:
    config = PretrainedConfig(
        architectures=["InternLM2ForCausalLM"], tie_word_embeddings=True, num_hidden_layers=1
    )
    stored = {"base": {"model.tok_embeddings.weight"}, "one": {"output.weight"}}
    [finding] = head_faults("base", config, stored)
    says(finding.message, "model one: has a output.weight of its own")


# --- without an architecture -------------------------------------------------------------------


def test_architectures() -> None:
    known = ["LlamaForCausalLM"]
    assert architecture_fault("one", LlamaConfig(architectures=known), known) is None
    finding = architecture_fault("one", LlamaConfig(), known)
    assert finding is not None
    assert finding.level == "error"
    says(finding.message, "model one: its config.json has no `architectures`")
    says(finding.message, '"architectures": ["LlamaForCausalLM"]', "as the other models have")
    two = architecture_fault("one", LlamaConfig(architectures=["A", "B"]), [])
    assert two is not None
    says(two.message, "lists 2 `architectures`", '["…ForCausalLM"]')
