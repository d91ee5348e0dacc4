"""Comparing configurations: the merged model gets the base's, whatever its experts had.

Two checkpoints with tensors of the same names and shapes are other models if they are to be run
differently. mergekit writes the base's ``config.json`` (with another dtype, number of layers and
vocabulary size where the recipe asks for them), so an expert that was trained under other settings
runs under settings that it does not know, or its tensors are left out by those who trust the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mergekit.architecture import WeightInfo
from transformers import PretrainedConfig

from mergekit_obim.models.completeness import planned_tensors
from mergekit_obim.models.faults import model_fault
from mergekit_obim.recipe.faults import Fault

# Each family has its own names for the same thing, so these are patterns, tried on all of
# transformers' configurations.
_IGNORED = re.compile(
    r"dropout|drop_|_pdrop|init|jitter|_loss|loss_|gradient|summary|classif|freeze|fp32|mtp_"
    r"|_implementation|rescale_prenorm"
    r"|max_window|window_pattern"  # of which transformers makes layer_types
)
# Pattern of the keys -> whether another value makes the weights meaningless (a different
# activation), and not merely somewhat inaccurate (a different epsilon). The first that fits counts.
_SETTINGS = {
    # rope_theta and rope_scaling before transformers 5, per kind of layer in Gemma 3
    r"rope|rotary|alibi|position_embedding_type|position_encoding": False,
    # rms_norm_eps, layer_norm_epsilon
    r"(^|_)eps(ilon)?($|_)": False,
    r"(^|_)(act|afn|act_fn|activation(_function|_fn)?)$|^feed_forward_proj$": True,
    # num_attention_heads, num_key_value_heads, head_dim
    r"(^|_)heads?$|_heads_per_layer$|head_dim$|^d_kv$|^multi_query$|query_groups$": True,
    # attention_bias, mlp_bias, use_qk_norm, use_parallel_residual
    r"(^|_)bias$|parallel_|qk_(layer)?norm|norm_(before|after)$|(pre|post)_norm$": True,
    # num_experts_per_tok, norm_topk_prob
    r"per_tok(en)?$|top_?k(_|$)|_topk|moe_k$|scoring_func|n_group$|expert_group": False,
    # Granite's multipliers, Gemma's soft caps and query_pre_attn_scalar
    r"multiplier|softcap|scal(e|ing|ar)(_|$)|clip|swiglu_|alpha|_factor$|normaliz": False,
    # sliding_window, layer_types, attention_chunk_size
    r"window|layer_types|block_type|attention_chunk|causal|bidirectional|attn_layer": False,
}
# Names of one function; GELU's approximation by tanh is within 1e-3 of GELU.
_SAME_FUNCTION = {
    **{"swish": "silu", "gelu_python": "gelu"},
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate"), "gelu_pytorch_tanh"),
}
_LONGEST = 60


def config_faults(
    expert: str, config: PretrainedConfig, base: str, base_config: PretrainedConfig
) -> Iterator[Fault]:
    """Find settings that an expert was trained with, but that the merged model will not have.

    Args:
        expert: The expert's name in messages.
        config: The expert's configuration, from ``AutoConfig``. That fills in defaults and renames
            old keys, so two files that say the same in different ways do not differ.
        base: The name of the base, whose configuration the merged model gets.
        base_config: The base's configuration, of the same architecture.

    Yields:
        One ``check_error`` for settings that change what the weights mean (an activation function,
        a number of heads), and one warning for settings that matter by degree (the base frequency
        of the positions, a norm's epsilon, a scale).
    """
    own, wanted = _settings(config), _settings(base_config)
    same_kind = config.model_type == base_config.model_type
    differing: dict[bool, list[str]] = {True: [], False: []}
    for path in sorted(own.keys() | wanted.keys()):
        if not same_kind and not (path in own and path in wanted):
            continue  # the classes have other keys
        values = own.get(path), wanted.get(path)
        fatal = _is_fatal(path)
        if fatal is None or _same(*values):
            continue
        fatal = fatal and not all("gelu" in str(value) for value in values)
        shown = _shown(*values), _shown(*reversed(values))
        differing[fatal].append(f"{path} {shown[0]} (the base's: {shown[1]})")
    if differing[True]:
        yield model_fault(
            "check_error",
            f"model {expert}: its config has {', '.join(differing[True])}: under the config of the "
            f"base {base}, which the merged model gets, its weights mean something else; correct "
            f"its config.json if that is wrong, or leave {expert} out",
        )
    if differing[False]:
        yield model_fault(
            "warning",
            f"model {expert}: its config has {', '.join(differing[False])}: the merged model gets "
            f"the config of the base {base}, under which {expert} was not trained; try the merged "
            f"model with either value in its config.json, or leave {expert} out",
        )


def architecture_fault(
    model: str, config: PretrainedConfig, known: Collection[str]
) -> Fault | None:
    """Return an error if a configuration does not tell mergekit what tensors the model has.

    Args:
        model: The model, for the message.
        config: Its configuration.
        known: The architectures that the recipe's models name.
    """
    names = config.architectures or []
    if len(names) == 1:
        return None
    found = f"lists {len(names)} `architectures`" if names else "has no `architectures`"
    entry = f'"architectures": ["{next(iter(known), "…ForCausalLM")}"]'
    return model_fault(
        "error",
        f"model {model}: its config.json {found}, and mergekit needs one to know its tensors: "
        f"give it {entry}" + (", as the other models have" if known else ""),
    )


def head_faults(
    base: str, base_config: PretrainedConfig, stored: Mapping[str, Collection[str]]
) -> Iterator[Fault]:
    """Find where the merged model's tensors will contradict its ``tie_word_embeddings``.

    mergekit writes a head as soon as one of the models has one, and takes the embeddings of the
    models that have none. Libraries differ in what they do with a stored head if the configuration
    says that it is tied: transformers uses it if its values differ, vLLM ignores it.

    Args:
        base: The base, whose configuration the merged model gets.
        base_config: Its configuration.
        stored: For each model, the base included, the names of its tensors.
    """
    heads = [info for info in vocabulary_weights(base_config) if info.tied_names]
    for head in heads:
        names = {head.name, *(head.aliases or ())}
        having = [model for model, tensors in stored.items() if not names.isdisjoint(tensors)]
        without = [model for model in stored if model not in having]
        if not having:
            continue
        if getattr(base_config, "tie_word_embeddings", False):
            others = [model for model in having if model != base] or having
            yield model_fault(
                "warning",
                f"model {others[0]}: has a {head.name} of its own, so the merged model will have "
                f"one, but its config.json, the base {base}'s, says tie_word_embeddings: true, and "
                "some readers (vLLM) then take the embeddings for it; set tie_word_embeddings to "
                "false in the merged config.json"
                + (f" (and {len(others) - 1} more such models)" if others[1:] else ""),
            )
        elif base in having:
            for model in without:
                yield model_fault(
                    "warning",
                    f"model {model}: has no {head.name}, but the base {base} has one (its config "
                    "says tie_word_embeddings: false): the merge takes this expert's embeddings "
                    "for its head; leave it out, or merge it with the base it was trained from",
                )


def vocabulary_weights(config: PretrainedConfig) -> list[WeightInfo]:
    """List the weights with a row for each token, by mergekit's definition of the architecture.

    Returns:
        The weights; empty for an architecture that mergekit infers from the tensors, as it has no
        definition of it.
    """
    planned = planned_tensors(config)
    return [weight for weight in planned if weight.vocabulary_axis is not None]


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    """Return dotted path -> value for each setting whose value means more than a missing key."""
    found: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{path}.{key}" if path else str(key), inner)
        elif (path.endswith("rotary_factor") and value == 1) or path.endswith(".type"):
            return  # all of a head's features are rotated; rope_type says it under its new name
        elif value is not None and value is not False:
            value = list(value) if isinstance(value, tuple) else value
            found[path] = _SAME_FUNCTION.get(value, value) if isinstance(value, str) else value

    walk("", config.to_dict())
    return found


def _is_fatal(path: str) -> bool | None:
    """Return what ``_SETTINGS`` says of a path; None if its setting does not matter.

    Its first key counts that does not name a part of the model.
    """
    keys = (k for k in path.split(".") if not k.endswith("_config") and not k.isdecimal())
    key = next(keys, "")
    if _IGNORED.search(key):
        return None
    return next((fatal for pattern, fatal in _SETTINGS.items() if re.search(pattern, key)), None)


def _same(own: Any, other: Any) -> bool:
    """Return whether two values mean the same, as far as the values alone tell."""
    if isinstance(own, list) and isinstance(other, list) and len(own) != len(other):
        return True  # an entry per layer, of models with other numbers of layers
    if isinstance(own, int | float) and isinstance(other, int | float):
        return math.isclose(own, other, rel_tol=1e-6)  # tools that have float32 write such
    return bool(own == other)


def _shown(value: Any, other: Any) -> str:
    """Return a value as config.json has it, shortened, for a message that it is not the other."""
    text = json.dumps(value, default=str)
    if value is None:
        text = "false" if other is True else "not set"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
