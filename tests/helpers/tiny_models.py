"""Tiny transformers models with random weights, one builder per architecture.

`build(name)` gives the same weights every time. Norm gains and biases are random too, so that
nothing is trivially 0 or 1. Names end in ``-tied`` or ``-untied`` where an architecture has both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

VOCABULARY = 48
LAYERS = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Odd sizes that differ from each other, so that no axis can be taken for another.
_DECODER: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 6,
}
_UNSPLIT = {k: v for k, v in _DECODER.items() if k not in ("head_dim", "num_key_value_heads")}
_ENCODER: dict[str, Any] = {**_UNSPLIT, "type_vocab_size": 2}


def _llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_DECODER, **changes}))


def _falcon(**changes: Any) -> PreTrainedModel:
    return FalconForCausalLM(
        FalconConfig(**_UNSPLIT, ffn_hidden_size=24, bias=True, alibi=False, **changes)
    )


_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama-untied": lambda: _llama(tie_word_embeddings=False),
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_DECODER, tie_word_embeddings=False)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER, tie_word_embeddings=False)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_DECODER, tie_word_embeddings=True)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_DECODER)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_DECODER)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_DECODER)),
    "phi3": lambda: Phi3ForCausalLM(
        Phi3Config(**{**_DECODER, "head_dim": 4}, tie_word_embeddings=False)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**_COMMON, n_embd=16, n_layer=LAYERS, n_head=4, n_inner=24, n_positions=64)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_UNSPLIT, tie_word_embeddings=False)),
    "falcon": lambda: _falcon(
        new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=False
    ),
    "falcon-old": lambda: _falcon(multi_query=True),
    "olmo2": lambda: Olmo2ForCausalLM(
        Olmo2Config(**{**_DECODER, "head_dim": 4}, tie_word_embeddings=False)
    ),
    "bert-masked": lambda: BertForMaskedLM(BertConfig(**_ENCODER)),
    "bert-classifier": lambda: BertForSequenceClassification(BertConfig(**_ENCODER, num_labels=3)),
    "roberta-masked": lambda: RobertaForMaskedLM(
        RobertaConfig(**{**_ENCODER, "type_vocab_size": 1, "max_position_embeddings": 66})
    ),
    "roberta-classifier": lambda: RobertaForSequenceClassification(
        RobertaConfig(**{**_ENCODER, "type_vocab_size": 1}, num_labels=3)
    ),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(
            **_COMMON, dim=16, hidden_dim=24, n_layers=LAYERS, n_heads=4, max_position_embeddings=64
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            **_COMMON,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=12,
        )
    ),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(**_COMMON, hidden_size=16, n_layer=LAYERS, n_head=4)
    ),
    # Not (fully) scored yet: they show that such weights are named, and never scored wrongly.
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2)
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(**_COMMON, hidden_size=16, num_hidden_layers=LAYERS, state_size=4)
    ),
}

NAMES = tuple(_BUILDERS)


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tiny model of that name, in eval mode; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                # Large enough that layers matter beside the residual stream; 1-D: gains, biases.
                parameter.normal_(0.0, 0.3)
                if parameter.ndim == 1:
                    parameter.add_(0.5)
        model.tie_weights()
    return model.to(dtype).eval()


def sequences(
    lengths: tuple[int, ...] = (7, 5, 7, 3, 7, 5), *, seed: int = 0
) -> list[torch.Tensor]:
    """Token sequences [length], int64, without the special tokens (ids 0 to 2)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]
