"""A tiny model of every architecture that mergekit 0.1.5 defines and transformers builds natively.

Beside those that it defines, some of those that it infers from the checkpoint: mixtures of
experts, state-space hybrids, encoders, speech. ``test_architectures.py`` measures each of them
against a reference, and ``benchmarks/architectures.py`` writes docs/architectures.md from them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

VOCABULARY = 48
LAYERS = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Odd sizes that differ from each other, so that no axis can be taken for another.
_UNSPLIT: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_DECODER: dict[str, Any] = {**_UNSPLIT, "num_key_value_heads": 2, "head_dim": 6}
_UNTIED: dict[str, Any] = {**_DECODER, "tie_word_embeddings": False}
_SPLIT: dict[str, Any] = {**_UNTIED, "head_dim": 4}
_ENCODER: dict[str, Any] = {**_UNSPLIT, "type_vocab_size": 2}
_ROBERTA: dict[str, Any] = {**_ENCODER, "type_vocab_size": 1, "max_position_embeddings": 66}
_DISTILBERT: dict[str, Any] = {
    **_COMMON,
    "dim": 16,
    "hidden_dim": 24,
    "n_layers": LAYERS,
    "n_heads": 4,
    "max_position_embeddings": 64,
}
_GPT2: dict[str, Any] = {
    **_COMMON,
    "n_embd": 16,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_inner": 24,
    "n_positions": 64,
}
_EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2}
_LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 5, "num_experts_per_tok": 2}
_ROUTED_EXPERTS: dict[str, Any] = {"n_routed_experts": 6, "num_experts_per_tok": 2}
_MLA: dict[str, Any] = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 6,
    "head_dim": 4,  # of the rotary part
    "num_key_value_heads": 4,
}
_QWEN3_VISION = {
    "depth": 3,
    "hidden_size": 8,
    "intermediate_size": 20,
    "out_hidden_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1, 2],
}
_SECTIONS: dict[str, Any] = {
    "rope_theta": 10000.0,
    "rope_type": "default",
    "mrope_section": [1, 1, 1],
}
_SIGLIP: dict[str, Any] = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Architecture:
    """How to build a tiny model.

    Attributes:
        model: transformers' class.
        config: Its configuration's class.
        options: What the configuration is made with.
    """

    model: str
    config: str
    options: Mapping[str, Any]

    def configuration(self) -> transformers.PretrainedConfig:
        config = getattr(transformers, self.config)(**self.options)
        config.architectures = [self.model]
        return config

    def build(self, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        """The model in eval mode; the same weights for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, self.model)(self.configuration())
            with torch.no_grad():
                for parameter in model.parameters():
                    # Large enough that layers matter beside the residual stream; 1-D: gains.
                    parameter.normal_(0.0, 0.3)
                    if parameter.ndim == 1:
                        parameter.add_(0.5)
            model.tie_weights()
        return model.to(dtype).eval()


def _of(stem: str, options: Mapping[str, Any], kind: str = "ForCausalLM") -> Architecture:
    return Architecture(stem + kind, stem + "Config", options)


# By the stem of mergekit's definition, or a further class that it names.
DEFINED: dict[str, Architecture] = {
    "afmoe_partial": _of(
        "Afmoe",
        {
            **_UNTIED,
            **_EXPERTS,
            "moe_intermediate_size": 12,
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "apertus": _of("Apertus", _SPLIT),
    "arcee": _of("Arcee", _UNTIED),
    "bert": _of("Bert", _ENCODER, "Model"),
    "bert-masked-lm": _of("Bert", _ENCODER, "ForMaskedLM"),
    "bert-sequence-classification": _of(
        "Bert", {**_ENCODER, "num_labels": 3}, "ForSequenceClassification"
    ),
    "bert-token-classification": _of(
        "Bert", {**_ENCODER, "num_labels": 3}, "ForTokenClassification"
    ),
    "cohere": _of("Cohere", {**_SPLIT, "tie_word_embeddings": True, "use_qk_norm": True}),
    "cohere2": _of("Cohere2", {**_SPLIT, "tie_word_embeddings": True}),
    "distilbert": _of("DistilBert", _DISTILBERT, "Model"),
    "distilbert-masked-lm": _of("DistilBert", _DISTILBERT, "ForMaskedLM"),
    "distilbert-sequence-classification": _of(
        "DistilBert", {**_DISTILBERT, "num_labels": 3}, "ForSequenceClassification"
    ),
    "distilbert-token-classification": _of(
        "DistilBert", {**_DISTILBERT, "num_labels": 3}, "ForTokenClassification"
    ),
    "falcon": _of(
        "Falcon",
        {
            **_UNSPLIT,
            "ffn_hidden_size": 24,
            "alibi": False,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "tie_word_embeddings": False,
        },
    ),
    "gemma": _of("Gemma", _DECODER),
    "gemma2": _of("Gemma2", _DECODER),
    "gemma3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", _DECODER),
    "gemma3vl": _of(
        "Gemma3",
        {
            "text_config": _DECODER,
            "vision_config": {**_SIGLIP, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": 47,
            "boi_token_index": 46,
            "eoi_token_index": 45,
        },
        "ForConditionalGeneration",
    ),
    "glm4": _of("Glm4", _UNTIED),
    "glm4moe": _of(
        "Glm4Moe",
        {
            **_UNTIED,
            **_ROUTED_EXPERTS,
            "moe_intermediate_size": 12,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "gpt-neox": _of("GPTNeoX", {**_UNSPLIT, "tie_word_embeddings": False}),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2-sequence-classification": _of(
        "GPT2", {**_GPT2, "num_labels": 3}, "ForSequenceClassification"
    ),
    "gptbigcode": _of("GPTBigCode", _GPT2),
    "granite": _of("Granite", _SPLIT),
    "granite4moehybrid": _of(
        "GraniteMoeHybrid",
        {
            **_SPLIT,
            **_LOCAL_EXPERTS,
            "shared_intermediate_size": 20,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 4,
            "mamba_n_groups": 1,
            "mamba_d_state": 4,
            "mamba_expand": 2,
            "mamba_chunk_size": 8,
        },
    ),
    "lfm2": _of("Lfm2", {**_SPLIT, "layer_types": ["conv", "full_attention"]}),
    "llama": _of("Llama", _UNTIED),
    "llama-sequence-classification": _of(
        "Llama", {**_UNTIED, "num_labels": 3}, "ForSequenceClassification"
    ),
    "llama4": _of(
        "Llama4",
        {
            "text_config": {
                **_UNTIED,
                **_LOCAL_EXPERTS,
                "num_experts_per_tok": 1,
                "intermediate_size_mlp": 20,
                "interleave_moe_layer_step": 2,
                "attention_chunk_size": 32,
            },
            "vision_config": {
                **_SIGLIP,
                "vision_output_dim": 12,
                "projector_input_dim": 12,
                "projector_output_dim": 12,
                "intermediate_size": 48,
            },
        },
        "ForConditionalGeneration",
    ),
    "mamba": _of(
        "Mamba", {**_COMMON, "hidden_size": 16, "num_hidden_layers": LAYERS, "state_size": 4}
    ),
    "mistral": _of("Mistral", _UNTIED),
    "mistral3": _of(
        "Mistral3",
        {
            "text_config": {**_UNTIED, "model_type": "mistral"},
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 12,
                "intermediate_size": 20,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "head_dim": 6,
            },
            "image_token_index": 47,
            "tie_word_embeddings": False,
        },
        "ForConditionalGeneration",
    ),
    "mixtral": _of("Mixtral", {**_UNTIED, **_LOCAL_EXPERTS}),
    "olmo2": _of("Olmo2", _SPLIT),
    "phi2": _of("Phi", {**_UNSPLIT, "tie_word_embeddings": False}),
    "phi3": _of("Phi3", _SPLIT),
    "qwen2": _of("Qwen2", _UNTIED),
    "qwen2_vl": _of(
        "Qwen2VL",
        {
            "text_config": {**_SPLIT, "rope_parameters": {**_SECTIONS, "mrope_section": [1, 1]}},
            "vision_config": {
                "depth": 1,
                "embed_dim": 8,
                "hidden_size": 16,
                "num_heads": 2,
                "patch_size": 4,
            },
            "tie_word_embeddings": False,
        },
        "ForConditionalGeneration",
    ),
    "qwen2_5_vl": _of(
        "Qwen2_5_VL",
        {
            "text_config": {**_SPLIT, "rope_parameters": {**_SECTIONS, "mrope_section": [1, 1]}},
            "vision_config": {
                "depth": 1,
                "hidden_size": 8,
                "intermediate_size": 20,
                "out_hidden_size": 16,
                "num_heads": 2,
                "patch_size": 4,
            },
            "tie_word_embeddings": False,
        },
        "ForConditionalGeneration",
    ),
    "qwen3": _of("Qwen3", {**_DECODER, "tie_word_embeddings": True}),
    "qwen3_moe": _of("Qwen3Moe", {**_UNTIED, **_EXPERTS, "moe_intermediate_size": 12}),
    "qwen3_vl": _of(
        "Qwen3VLMoe",
        {
            "text_config": {
                **_UNTIED,
                **_EXPERTS,
                "moe_intermediate_size": 12,
                "rope_parameters": _SECTIONS,
            },
            "vision_config": _QWEN3_VISION,
            "tie_word_embeddings": False,
        },
        "ForConditionalGeneration",
    ),
    "qwen3_vl_dense": _of(
        "Qwen3VL",
        {
            "text_config": {**_UNTIED, "rope_parameters": _SECTIONS},
            "vision_config": _QWEN3_VISION,
            "tie_word_embeddings": False,
        },
        "ForConditionalGeneration",
    ),
    "roberta": _of("Roberta", _ROBERTA, "Model"),
    "roberta-masked-lm": _of("Roberta", _ROBERTA, "ForMaskedLM"),
    "roberta-sequence-classification": _of(
        "Roberta", {**_ROBERTA, "num_labels": 3}, "ForSequenceClassification"
    ),
    "roberta-token-classification": _of(
        "Roberta", {**_ROBERTA, "num_labels": 3}, "ForTokenClassification"
    ),
    "stablelm2": _of("StableLm", {**_SPLIT, "qk_layernorm": True}),
    "starcoder2": _of("Starcoder2", {**_SPLIT, "tie_word_embeddings": True}),
    "t5": _of(
        "T5",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 6,
            "d_ff": 24,
            "num_layers": LAYERS,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        },
        "ForConditionalGeneration",
    ),
    "whisper": _of(
        "Whisper",
        {
            **_COMMON,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 20,
            "num_mel_bins": 6,
            "max_source_positions": 12,
            "max_target_positions": 64,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "ForConditionalGeneration",
    ),
}

# mergekit has no definition of these: it infers their tensors from the checkpoint.
INFERRED: dict[str, Architecture] = {
    "bart": _of(
        "Bart",
        {
            **_COMMON,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 20,
            "max_position_embeddings": 64,
        },
        "ForConditionalGeneration",
    ),
    "bloom": _of("Bloom", {**_COMMON, "hidden_size": 16, "n_layer": LAYERS, "n_head": 4}),
    "deepseek_v2": _of(
        "DeepseekV2",
        {
            **_UNTIED,
            **_ROUTED_EXPERTS,
            **_MLA,
            "moe_intermediate_size": 12,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "deepseek_v3": _of(
        "DeepseekV3",
        {
            **_UNTIED,
            **_ROUTED_EXPERTS,
            **_MLA,
            "moe_intermediate_size": 12,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "electra": _of("Electra", {**_ENCODER, "embedding_size": 12}, "ForMaskedLM"),
    "ernie4_5": _of("Ernie4_5", {**_UNTIED, "use_bias": True}),
    "exaone4": _of("Exaone4", {**_UNTIED, "sliding_window": 8}),
    "falcon_mamba": _of(
        "FalconMamba", {**_COMMON, "hidden_size": 16, "num_hidden_layers": LAYERS, "state_size": 4}
    ),
    "gpt_oss": _of(
        "GptOss",
        {
            **_UNTIED,
            **_LOCAL_EXPERTS,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
        },
    ),
    "gptj": Architecture("GPTJForCausalLM", "GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "granitemoe": _of("GraniteMoe", {**_SPLIT, **_LOCAL_EXPERTS}),
    "jamba": _of(
        "Jamba",
        {
            **_SPLIT,
            **_EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 5,
            "use_mamba_kernels": False,
        },
    ),
    "llama4_text": Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **_UNTIED,
            **_LOCAL_EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 20,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32,
        },
    ),
    "llava": _of(
        "Llava",
        {
            "text_config": {**_UNTIED, "model_type": "llama"},
            "vision_config": {**_SIGLIP, "model_type": "clip_vision_model"},
            "image_token_index": 47,
        },
        "ForConditionalGeneration",
    ),
    "mamba2": _of(
        "Mamba2",
        {
            **_COMMON,
            "hidden_size": 16,
            "num_hidden_layers": LAYERS,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 4,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "mpt": _of("Mpt", {**_COMMON, "d_model": 16, "n_heads": 4, "n_layers": LAYERS}),
    "nemotron": _of("Nemotron", _UNTIED),
    "nemotron_h": _of(
        "NemotronH",
        {
            **_SPLIT,
            **_ROUTED_EXPERTS,
            "hybrid_override_pattern": "M*E",
            "num_hidden_layers": 3,
            "mamba_num_heads": 8,
            "mamba_head_dim": 4,
            "n_groups": 1,
            "ssm_state_size": 4,
            "chunk_size": 8,
            "moe_intermediate_size": 12,
            "moe_shared_expert_intermediate_size": 20,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "olmo": _of("Olmo", _SPLIT),
    "olmoe": _of("Olmoe", {**_SPLIT, **_EXPERTS}),
    "opt": _of(
        "OPT",
        {
            **_COMMON,
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 12,
        },
    ),
    "phimoe": _of("Phimoe", {**_SPLIT, **_LOCAL_EXPERTS, "lm_head_bias": True}),
    "qwen2_moe": _of(
        "Qwen2Moe",
        {
            **_SPLIT,
            **_EXPERTS,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
        },
    ),
    "qwen3_next": _of(
        "Qwen3Next",
        {
            **_UNTIED,
            **_EXPERTS,
            "head_dim": 8,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 6,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "seed_oss": _of("SeedOss", _UNTIED),
    "smollm3": _of("SmolLM3", _SPLIT),
    "xlm-roberta": _of("XLMRoberta", _ROBERTA, "ForMaskedLM"),
}

ARCHITECTURES: dict[str, Architecture] = {**DEFINED, **INFERRED}


def coverage(shapes: Collection[str], unscored: Mapping[str, str]) -> tuple[int, int, str]:
    """A row of docs/architectures.md: tensors, scored, and what is unscored and why.

    Layers are counted together, and so is what is within a module that never ran.
    """
    kinds: dict[tuple[str, str], int] = {}
    for name, reason in unscored.items():
        kind = re.sub(r"\.\d+\.", ".N.", name)
        if reason.startswith("never used"):
            kind = ".".join(kind.split(".")[:2]) + ".…" if kind.count(".") > 1 else kind
        kinds[kind, reason] = kinds.get((kind, reason), 0) + 1
    by_reason: dict[str, list[str]] = {}
    for (kind, reason), count in kinds.items():
        by_reason.setdefault(reason, []).append(f"`{kind}`" + (f" × {count}" if count > 1 else ""))
    told = "; ".join(f"{', '.join(kinds)}: {reason}" for reason, kinds in by_reason.items())
    return len(shapes), len(shapes) - len(unscored), told or "–"


# What mergekit defines and transformers 5 does not build without remote code.
EXCLUDED: dict[str, str] = {
    "baichuan": "remote code (BaichuanForCausalLM)",
    "chatglm": "remote code (ChatGLMModel)",
    "exaone": "remote code (ExaoneForCausalLM)",
    "internlm2": "remote code (InternLM2ForCausalLM)",
    "jais": "remote code (JAISLMHeadModel)",
    "phi-1": "remote code (MixFormerSequentialForCausalLM)",
    "phi2-old": "remote code (PhiForCausalLM of model type phi-msft)",
    "phi3-small": "remote code (Phi3SmallForCausalLM)",
    "qwen": "remote code (QWenLMHeadModel)",
    "solar": "remote code (SolarForCausalLM)",
    "stablelm": "remote code (StableLMEpochForCausalLM)",
}

# Why mergekit 0.1.5 cannot merge some of them, or loses tensors of theirs.
UPSTREAM: dict[str, str] = {
    "bert": "bert.json: planning adds a tuple to a list; load it with a head instead",
    "bert-masked-lm": "bert-masked-lm.json requires a pooler, which the class lacks",
    "deepseek_v2": "mergekit infers all layers as alike, but the first has no experts",
    "deepseek_v3": "mergekit infers all layers as alike, but the first has no experts",
    "distilbert": "distilbert.json has the prefix of the classes with a head",
    "gemma3vl": "gemma3vl.json has names that transformers 5 no longer stores",
    "gpt-neox": "gpt-neox.json requires buffers that transformers no longer stores",
    "jamba": "mergekit infers all layers as alike, but only some have experts",
    "llava": "inferred names are those of the modules, and transformers stores others",
    "nemotron_h": "mergekit infers all layers as alike, but each kind has its own tensors",
    "qwen2_vl": "qwen2_vl.json expects the number of layers where transformers 4 had it",
    "roberta": "roberta.json has the prefix of the classes with a head",
    "stablelm2": "stablelm2.json lacks the norms of queries and keys (qk_layernorm)",
    "whisper": "whisper.json lacks a dot",
}
