"""What a recipe's models are to each other, and what mergekit's planner makes of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.options import MergeOptions
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.calibration.run import open_model
from mergekit_obim.check.verdict import Verdict
from mergekit_obim.errors import ObimError, SaliencyFileError, SaliencyNotFoundError
from mergekit_obim.models.relation import relate
from mergekit_obim.planned import look_through
from mergekit_obim.recipe.faults import fold


@dataclass(frozen=True)
class Model:
    """A model as far as it is on this machine: without its weights it has no loader."""

    config: PretrainedConfig
    weights: LazyTensorLoader | None


def open_models(
    config: MergeConfiguration, stages: Collection[str], options: RunOptions, verdict: Verdict
) -> dict[ModelReference, Model]:
    """Every model that is here, but for those that other recipes of the file will make."""
    models = {}
    for reference in sorted(config.referenced_models(), key=str):
        if reference.model.path in stages:
            verdict.warnings.append(
                f"model {reference}: another recipe of this file makes it: its weights were not "
                "looked at"
            )
            continue
        reason = absent(reference, options)
        if reason:
            verdict.warnings.append(f"model {reference}: {reason}: its weights were not looked at")
        try:
            models[reference] = Model(*open_model(reference, options, weights=not reason))
        except ObimError as error:
            verdict.errors.append(error.message)
    return models


def absent(reference: ModelReference, options: RunOptions) -> str | None:
    """Why a model's weights are not on this machine yet, if they are not."""
    if reference.lora:
        if not options.lora_merge_cache:
            return None  # which is told as a fault
        identity = f"{reference.model._unique_id()}_{reference.lora._unique_id()}"
        merged = Path(options.lora_merge_cache) / identity
        return None if merged.exists() else "the adapter has not been merged into its model yet"
    if Path(reference.model.path).exists():
        return None
    try:
        huggingface_hub.snapshot_download(
            reference.model.path,
            revision=reference.model.revision,
            cache_dir=options.transformers_cache,
            local_files_only=True,
        )
    except (OSError, ValueError):  # both of which the Hub's errors are
        return "has not been downloaded yet"
    return None


def experts_of(config: MergeConfiguration) -> list[ModelReference]:
    return sorted((m for m in config.referenced_models() if m != config.base_model), key=str)


def check_models(
    config: MergeConfiguration, models: Mapping[ModelReference, Model], verdict: Verdict
) -> None:
    """What the experts are beside the base: of the same architecture, shapes and descent."""
    base = config.base_model
    if base is None or base not in models:
        return
    alike = {}
    for reference in experts_of(config):
        model = models.get(reference)
        if model is None:
            continue
        own, wanted = ((m.config.architectures or ["?"])[0] for m in (model, models[base]))
        if reference.override_architecture is None and own != wanted:
            verdict.errors.append(
                f"model {reference}: is a {own}, but the base {base} a {wanted}: experts have to "
                "be fine-tunes of the base; leave it out, or merge it with its own base"
            )
        elif model.weights:
            alike[reference] = model
    weights = models[base].weights
    for reference, model in [*alike.items(), (base, models[base])]:
        if model.weights and (quantised := _integers(model.weights)):
            verdict.errors.append(
                f"model {reference}: tensor {quantised} holds integers: it is quantised, which "
                "mergekit cannot merge; use the full-precision checkpoint that it was made from"
            )
    if weights is None or not alike:
        return
    relation = relate(
        str(base), weights, {str(m): model.weights for m, model in alike.items() if model.weights}
    )
    verdict.errors += relation.faults()
    verdict.warnings += relation.doubts()
    verdict.distances = relation.sizes()
    verdict.cosines = relation.cosines()
    aligned = config.tokenizer is not None or config.tokenizer_source is not None
    for reference, model in alike.items():
        shapes = relation.shapes.get(str(reference), {})
        sizes = [_vocabulary(m.config) for m in (model, models[base])]
        tokens = {n: both for n, both in shapes.items() if _differ_in_tokens(n, *both, sizes)}
        if tokens and not aligned:
            name, (shape, base_shape) = next(iter(tokens.items()))
            verdict.errors.append(
                f"model {reference}: has another vocabulary than the base {base}: {name} is "
                f"{shape}, the base's {base_shape}; add `tokenizer: {{source: base}}` to the "
                "recipe, or `{source: union}` to keep every model's tokens"
            )
        others = [name for name in shapes if name not in tokens]
        if others:
            shape, base_shape = shapes[others[0]]
            more = f", and {len(others) - 1} more tensors differ" if others[1:] else ""
            verdict.errors.append(
                f"model {reference}: tensor {others[0]} is {shape}, but {base_shape} in the base "
                f"{base}{more}: it is no fine-tune of this base; set base_model to its own"
            )
        if not aligned and not tokens:
            verdict.warnings += _other_tokens(reference, base)


def _integers(weights: LazyTensorLoader) -> str | None:
    """A matrix of integers, if there is one: no checkpoint has such but a quantised one's."""
    for name in weights.index.tensor_paths:
        tensor = weights.get_tensor(name)
        small = (torch.int8, torch.uint8, torch.int32)
        if tensor is not None and tensor.ndim > 1 and tensor.dtype in small:
            return name
    return None


def _vocabulary(config: PretrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)


def _differ_in_tokens(
    name: str, own: list[int], wanted: list[int], sizes: list[int | None]
) -> bool:
    """Whether a tensor has a row for each token, and more or fewer rows than the base's."""
    if own[1:] != wanted[1:] or not own:
        return False
    return [own[0], wanted[0]] == sizes or "embed" in name or "lm_head" in name


def _other_tokens(reference: ModelReference, base: ModelReference) -> list[str]:
    """A line if the tokenizers give the same tokens other numbers."""
    ids = [_token_ids(Path(m.model.path) / "tokenizer.json") for m in (reference, base)]
    if None in ids:
        return []
    own, wanted = ids
    assert own is not None
    assert wanted is not None
    moved = [token for token, number in own.items() if wanted.get(token, number) != number]
    if not moved:
        return []
    return [
        f"model {reference}: {len(moved)} tokens have other numbers than in the base {base}, "
        f"{moved[0]!r} among them: add `tokenizer: {{source: base}}` to the recipe"
    ]


def _token_ids(path: Path) -> dict[str, int] | None:
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if isinstance(vocabulary, dict):
        return vocabulary
    return {entry[0]: number for number, entry in enumerate(vocabulary)}  # SentencePiece's unigram


def check_plan(
    config: MergeConfiguration,
    models: Mapping[ModelReference, Model],
    out_dir: Path | None,
    options: RunOptions,
    verdict: Verdict,
) -> list[str]:
    """Plan the merge; returns what is said of saliency files that are not there."""
    if len(models) < len(config.referenced_models()) or any(
        model.weights is None for model in models.values()
    ):
        if not verdict.errors:
            verdict.warnings.append("the merge itself was not planned: not every model is here")
        return []
    merging = MergeOptions(
        transformers_cache=options.transformers_cache,
        lora_merge_cache=options.lora_merge_cache,
        trust_remote_code=options.trust_remote_code,
    )
    planned, found = look_through(config, merging)
    missing = []
    for fault in fold(found.tensors):
        if fault.kind == "plan" and verdict.errors:
            continue  # what mergekit fails at in the end may come of what was found before
        if fault.error is SaliencyNotFoundError:
            missing.append(fault.message)
            if out_dir is None:
                verdict.errors.append(fault.message)
        elif not (out_dir and options.overwrite and fault.error is SaliencyFileError):
            verdict.add([fault])
    setting = (config.parameters or {}).get("saliency")
    if out_dir and isinstance(setting, str) and Path(setting).resolve() != out_dir.resolve():
        verdict.warnings.append(
            f"the recipe's saliency is {setting}, but the pre-pass would write to {out_dir}"
        )
    for (model, fate), tensors in found.fallbacks.found.items():
        verdict.fallbacks.append({"model": model, "fate": fate, "tensors": tensors})
    _check_tensors(planned, models, verdict)
    return missing


def _check_tensors(
    planned: list[tuple[Any, Any]], models: Mapping[ModelReference, Model], verdict: Verdict
) -> None:
    """Which tensors mergekit would look for in vain, or leave out without a word."""
    absent: dict[ModelReference, list[str]] = {}
    read: dict[ModelReference, set[str]] = {}
    for _, task in planned:
        gather = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
        for reference, info in gather.weight_info.items():
            possible = {info.name, *(info.aliases or ()), *(info.tied_names or ())}
            read.setdefault(reference, set()).update(possible)
            weights = models[reference].weights
            assert weights is not None
            if not info.optional and not possible & weights.index.tensor_paths.keys():
                absent.setdefault(reference, []).append(info.name)
    for reference, model in models.items():
        if reference not in read or _is_converted(model):
            continue  # mergekit makes some tensors of others, by rules of transformers
        assert model.weights is not None
        if names := absent.get(reference):
            verdict.errors.append(
                f"model {reference}: has no tensor {names[0]}"
                + (f", and {len(names) - 1} more are missing" if names[1:] else "")
                + ": the checkpoint is not complete, or has other layers than the base"
            )
    bases = {task.base_model for _, task in planned}
    base = bases.pop() if len(bases) == 1 else None
    if base is not None and not _is_converted(models[base]):
        weights = models[base].weights
        assert weights is not None
        left = [n for n in weights.index.tensor_paths if n not in read[base] and _is_weight(n)]
        if left:
            verdict.warnings.append(
                f"{len(left)} tensors of the base will not be in the merged model, as mergekit "
                f"does not know them or the slices leave them out: {', '.join(left[:5])}"
                + (", …" if left[5:] else "")
            )


def _is_converted(model: Model) -> bool:
    """Whether mergekit makes some of the tensors of others, by rules of transformers'."""
    return bool(get_checkpoint_conversion_mapping(model.config.model_type))


def _is_weight(name: str) -> bool:
    """Not a buffer that old checkpoints keep, and models make anew."""
    return name.endswith((".weight", ".bias")) and not name.endswith("attn.bias")
