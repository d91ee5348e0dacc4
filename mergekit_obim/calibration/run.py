"""Measuring one expert, from its recipe entry to its saliency file."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from mergekit.common import ModelReference, dtype_from_name, get_auto_cls
from mergekit.io import LazyTensorLoader
from tqdm import tqdm
from transformers import AutoTokenizer

from mergekit_obim import __version__
from mergekit_obim.calibration.capture import FEWEST_ROWS, CurvatureCapture
from mergekit_obim.calibration.data import TokenizedCalibration, batches, prepare
from mergekit_obim.calibration.feeding import feed
from mergekit_obim.calibration.names import stored_parts, weight_names
from mergekit_obim.calibration.spec import Calibration, Expert
from mergekit_obim.errors import (
    CalibrationError,
    DeviceMemoryError,
    RecipeError,
    SaliencyFileError,
    one_line,
)
from mergekit_obim.fingerprint import Fingerprint, fingerprint
from mergekit_obim.kernels.scores import task_vector
from mergekit_obim.saliency_file import (
    SaliencyFile,
    SaliencyMetadata,
    saliency_file_name,
    write_saliency,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LOG = logging.getLogger("mergekit_obim")

# `batch_size: auto` fills forward passes up to this many tokens: enough to keep a CPU or a
# GPU busy, little enough that the activations stay small beside the weights.
_AUTO_TOKENS = 2048


@dataclass(frozen=True)
class RunOptions:
    """Where and how to run; nothing here changes what is measured, but for rounding.

    Attributes:
        device: Where the whole model goes.
        device_map: accelerate's placement instead (``auto``, …), with ``max_memory``.
        dense: Write δ²·h per weight instead of h.
        merge_dtype: The recipe's dtype, to which the merge rounds every weight: δ is that of
            the rounded weights.
        overwrite: Replace a file that was made from something else.
    """

    device: str = "cpu"
    device_map: str | None = None
    max_memory: Mapping[int | str, str] = field(default_factory=dict)
    dense: bool = False
    merge_dtype: str | None = None
    overwrite: bool = False
    trust_remote_code: bool = False
    transformers_cache: str | None = None
    lora_merge_cache: str | None = None
    quiet: bool = False


@dataclass(frozen=True)
class Measured:
    """What became of one expert.

    Attributes:
        kept: The file was there already, made from the same weights, data and settings.
        scored: How many tensors have a saliency.
        unscored: The others, and why.
        warnings: What the user should know beside that.
    """

    model: str
    path: Path
    kept: bool
    scored: int
    unscored: Mapping[str, str]
    samples: int
    tokens: int
    warnings: list[str]


@dataclass(frozen=True)
class Prepared:
    """One expert with everything read, checked and tokenized that needs no model in memory.

    Attributes:
        path: The file to write.
        wanted: Its header, but for what the run will tell.
        kept: The file that is there already, if it is the one that would be written.
        base: The base's weights, for a dense file.
    """

    expert: Expert
    path: Path
    config: PretrainedConfig
    weights: _Weights
    data: TokenizedCalibration
    wanted: SaliencyMetadata
    kept: SaliencyFile | None
    base: _Weights | None


def prepare_expert(
    expert: Expert, base_model: object, out_dir: Path, options: RunOptions
) -> Prepared:
    """Read and check all that is needed to measure an expert, so that faults are told at once.

    Args:
        expert: Who is measured, on what.
        base_model: The recipe's base, for its tokenizer where the expert has none, and for
            dense files; None where only its slices have one.
        out_dir: The folder to write ``<model-name>.safetensors`` to.
        options: Where and how.

    Raises:
        CalibrationError: The data or the model cannot give a saliency.
        SaliencyFileError: There is a file already that was made from something else.
    """
    path = out_dir / saliency_file_name(expert.model)
    reference = ModelReference.model_validate(expert.reference)
    base = ModelReference.model_validate(base_model) if base_model else None
    config = _config(reference, options)
    weights = _Weights(expert.model, reference, options)
    tokenizer = _tokenizer(expert.model, [reference, *([base] if base else [])], options)
    data = prepare(expert.calibration, tokenizer, expert.model, _length_limit(tokenizer, config))
    _check_vocabulary(expert.model, data, config)
    wanted = SaliencyMetadata(
        form="dense" if options.dense else "factored",
        model=expert.model,
        revision=reference.model.revision or getattr(config, "_commit_hash", None) or "",
        architecture=(config.architectures or [""])[0],
        calibration=_record(expert.calibration, data, config),
        fingerprint=weights.fingerprints(),
        mergekit_obim_version=__version__,
    )
    base_weights = None
    if options.dense:
        if base is None:
            raise CalibrationError(
                f"model {expert.model}: --dense needs the weights that it was fine-tuned from: add "
                "a top-level base_model to the recipe, or leave --dense out"
            )
        base_weights = _Weights(str(base), base, options)
        wanted.calibration["base"] = str(base)
        wanted.calibration["base_weights"] = base_weights.digest()
        wanted.calibration["merge_dtype"] = options.merge_dtype
    kept = _kept(path, wanted, options.overwrite) if path.exists() else None
    return Prepared(expert, path, config, weights, data, wanted, kept, base_weights)


def open_model(
    reference: ModelReference, options: RunOptions, *, weights: bool = True
) -> tuple[PretrainedConfig, LazyTensorLoader | None]:
    """A model's configuration and, if asked for, its checkpoint, of which nothing is read yet.

    Raises:
        CalibrationError: It cannot be read, or is quantised.
    """
    config = _config(reference, options)
    return config, _Weights(str(reference), reference, options).loader if weights else None


def measure(prepared: Prepared, options: RunOptions) -> Measured:
    """Run an expert over its calibration data and write its saliency file, unless it is there.

    Raises:
        CalibrationError: The model cannot be loaded or run, or its activations are not finite.
        SaliencyFileError: The file cannot be written.
        DeviceMemoryError: The model or its activations do not fit.
    """
    if prepared.kept:
        return _measured(prepared, len(prepared.kept.shapes), prepared.kept.metadata)
    label, path = prepared.expert.model, prepared.path
    model = _load(
        label, prepared.weights.merged, prepared.config, prepared.expert.calibration, options
    )
    try:
        capture = _run(model, prepared.data, prepared.expert, options)
        h, found = _entries(model, capture, prepared.weights)
    except Exception as error:
        if not _out_of_memory(error):
            raise
        raise _does_not_fit(label, options, "its activations do") from error
    if not h:
        raise CalibrationError(
            f"model {label}: not one of its weights could be scored: "
            + "; ".join(sorted(set(found["unscored"].values())))
        )
    shapes: Mapping[str, torch.Size] = {name: x.shape for name, x in h.items()}
    read = h.__getitem__
    if prepared.base:
        del model
        dense = _DenseScores(h, prepared.weights, prepared.base, _merge_dtype(options.merge_dtype))
        shapes, read = dense.shapes, dense.read
    metadata = prepared.wanted.model_copy(update=found)
    try:
        write_saliency(path, shapes, read, metadata)
    except OSError as error:
        raise SaliencyFileError(
            f"{path}: the saliency of model {label} cannot be written: {_one_line(error)}"
        ) from error
    return _measured(prepared, len(h), metadata)


def _measured(prepared: Prepared, scored: int, metadata: SaliencyMetadata) -> Measured:
    return Measured(
        prepared.expert.model,
        prepared.path,
        prepared.kept is not None,
        scored,
        metadata.unscored,
        prepared.wanted.calibration["samples"],
        prepared.data.tokens,
        [*prepared.data.warnings, *_pooled(metadata.experts)],
    )


def _pooled(experts: Mapping[str, Mapping[str, list[int]]]) -> list[str]:
    """A line on the experts that saw too few tokens, if there are any."""
    pooled: dict[str, set[int]] = {}
    total = {}
    for name, found in experts.items():
        layer = name.rpartition(".")[0]
        pooled.setdefault(layer, set()).update(found["pooled"])
        total[layer] = len(found["tokens"])
    few = {layer: sorted(numbers) for layer, numbers in pooled.items() if numbers}
    if not few:
        return []
    layer, numbers = next(iter(few.items()))
    return [
        f"{sum(map(len, few.values()))} of {sum(total.values())} experts saw fewer than "
        f"{FEWEST_ROWS} tokens and take the mean over their layer's, as in {layer}: "
        f"{', '.join(map(str, numbers))}; more samples would tell them apart"
    ]


class _Weights:
    """An expert's checkpoint as mergekit reads it, adapters merged into it."""

    def __init__(self, label: str, reference: ModelReference, options: RunOptions):
        if reference.lora and not options.lora_merge_cache:
            raise CalibrationError(
                f"model {label}: an adapter has to be merged into its model first: give "
                "--lora-merge-cache DIR, and the same to mergekit-yaml"
            )
        self.label = label
        try:
            self.merged = reference.merged(
                cache_dir=options.lora_merge_cache, trust_remote_code=options.trust_remote_code
            )
            self.loader: LazyTensorLoader = self.merged.lazy_loader(
                cache_dir=options.transformers_cache, lazy_unpickle=False
            )
        except Exception as error:  # whatever transformers, peft, or the Hub raise
            raise CalibrationError(f"model {label}: cannot be read: {_one_line(error)}") from error

    @property
    def names(self) -> list[str]:
        return list(self.loader.index.tensor_paths)

    def load(self, name: str) -> torch.Tensor:
        tensor = self.loader.get_tensor(name)
        assert tensor is not None  # it raises before
        return tensor

    def shape(self, name: str) -> torch.Size | None:
        return self.load(name).shape if name in self.loader.index.tensor_paths else None

    def fingerprints(self) -> dict[str, Fingerprint]:
        """A sample of every stored floating-point weight."""
        prints = {}
        for name in self.names:
            tensor = self.load(name)
            if tensor.is_floating_point():
                prints[name] = fingerprint(tensor)
        self.loader.flush()
        return prints

    def digest(self) -> str:
        """The same in one word."""
        prints = self.fingerprints()
        lines = "".join(f"{name} {prints[name].model_dump_json()}\n" for name in sorted(prints))
        return hashlib.sha256(lines.encode()).hexdigest()


def _config(reference: ModelReference, options: RunOptions) -> PretrainedConfig:
    try:
        config = reference.config(trust_remote_code=options.trust_remote_code)
    except Exception as error:
        raise CalibrationError(
            f"model {reference}: neither a model folder nor a model on the Hub: {_one_line(error)}"
        ) from error
    if getattr(config, "quantization_config", None):
        raise CalibrationError(
            f"model {reference}: is quantised, which mergekit cannot merge: use the full-precision "
            "checkpoint that it was made from"
        )
    return config


def _tokenizer(
    label: str, references: list[ModelReference], options: RunOptions
) -> PreTrainedTokenizerBase:
    """The expert's own tokenizer, or that of the model its adapter is for, or the base's."""
    places = [
        place for reference in references for place in (reference.lora, reference.model) if place
    ]
    problems = []
    for place in places:
        try:
            return cast(
                "PreTrainedTokenizerBase",
                AutoTokenizer.from_pretrained(
                    place.path,
                    revision=place.revision,
                    trust_remote_code=options.trust_remote_code,
                    cache_dir=options.transformers_cache,
                ),
            )
        except Exception as error:
            problems.append(f"{place}: {_one_line(error)}")
    raise CalibrationError(f"model {label}: no tokenizer found ({'; '.join(problems)})")


def _length_limit(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int | None:
    """The longest sequence the model takes; a tokenizer that doesn't know has a huge number."""
    positions = getattr(config, "max_position_embeddings", None)
    limits = [limit for limit in (int(tokenizer.model_max_length), positions) if limit]
    return limit if (limit := min(limits)) < 1 << 24 else None


def _check_vocabulary(label: str, data: TokenizedCalibration, config: PretrainedConfig) -> None:
    """An unknown token would end in an IndexError, or on a GPU in a broken device."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    highest = max(map(max, data.sequences))
    if vocabulary and highest >= vocabulary:
        raise CalibrationError(
            f"model {label}: its tokenizer makes token {highest} of the calibration data, but the "
            f"model knows {vocabulary} tokens; give it the tokenizer that it was trained with"
        )


def _record(
    calibration: Calibration, data: TokenizedCalibration, config: PretrainedConfig
) -> dict[str, Any]:
    """What the measurement depends on beside the weights; the batch size is not among it."""
    dtype = calibration.dtype or getattr(config, "dtype", None) or "float32"
    return {
        "sources": data.sources,
        "content_hash": data.content_hash,
        "samples": sum(source["sampled"] for source in data.sources),
        "tokens": data.tokens,
        "max_length": calibration.max_length,
        "seed": calibration.seed,
        "packing": calibration.packing,
        "template": data.template,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _kept(path: Path, wanted: SaliencyMetadata, overwrite: bool) -> SaliencyFile | None:
    """The file that is there, if it is what would be written; None if it is to be replaced."""
    try:
        there = SaliencyFile(path)
    except SaliencyFileError as error:
        if overwrite:
            return None
        raise SaliencyFileError(f"model {wanted.model}: {error.message}") from error
    has, wants = there.metadata, wanted
    differing = [
        name
        for name in ("model", "revision", "form", "fingerprint")
        if getattr(has, name) != getattr(wants, name)
    ]
    differing += [
        f"calibration {name}"
        for name in sorted({*has.calibration, *wants.calibration})
        if has.calibration.get(name) != wants.calibration.get(name)
    ]
    if not differing:
        return there
    if overwrite:
        return None
    raise SaliencyFileError(
        f"{path}: was made for model {has.model} from something else (another "
        f"{', '.join(differing).replace('fingerprint', 'set of weights')}); measure again with "
        "--overwrite, or write to another folder"
    )


def _load(
    label: str,
    merged: ModelReference,
    config: PretrainedConfig,
    calibration: Calibration,
    options: RunOptions,
) -> PreTrainedModel:
    placement: dict[str, Any] = {}
    try:
        if options.device_map:
            placement = {
                "device_map": options.device_map,
                "max_memory": dict(options.max_memory) or None,
                "offload_folder": tempfile.mkdtemp(prefix="obim-offload-"),
            }
        model = get_auto_cls((config.architectures or [""])[0]).from_pretrained(
            merged.model.path,
            revision=merged.model.revision,
            dtype=calibration.dtype or "auto",
            trust_remote_code=options.trust_remote_code,
            cache_dir=options.transformers_cache,
            **placement,
        )
        if not options.device_map:
            cast("torch.nn.Module", model).to(options.device)
    except Exception as error:
        if _out_of_memory(error):
            raise _does_not_fit(label, options, "it does") from error
        raise CalibrationError(f"model {label}: cannot be loaded: {_one_line(error)}") from error
    finally:
        shutil.rmtree(placement.get("offload_folder", ""), ignore_errors=True)
    if any(parameter.is_meta for parameter in model.parameters()):
        # accelerate brings such weights in and out while the model runs, where the capture,
        # which knows weights by their place in memory, cannot follow them.
        raise DeviceMemoryError(
            f"model {label}: --device-map {options.device_map} leaves weights on the CPU or the "
            "disk, where they cannot be measured yet: raise --max-memory, use --dtype bfloat16, or "
            "run it whole with --device cpu"
        )
    if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
        _without_grouped_mm(model)
    return cast("PreTrainedModel", model.eval())


def _without_grouped_mm(model: PreTrainedModel) -> None:
    """torch has no grouped product in float64: the experts run one by one then."""
    if getattr(model.config, "_experts_implementation", None) == "grouped_mm":
        model.set_experts_implementation("eager")


def _out_of_memory(error: BaseException) -> bool:
    # Only accelerators have an exception of their own; CPU and MPS say it in words.
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _does_not_fit(label: str, options: RunOptions, what: str) -> DeviceMemoryError:
    place = options.device_map or options.device
    ways = "--batch-size 1, a smaller --max-length, --dtype bfloat16"
    ways += ", --device-map auto with --max-memory"
    ways += "" if place == "cpu" else ", --device cpu"
    return DeviceMemoryError(f"model {label}: {what} not fit {place}; try {ways}")


def _run(
    model: PreTrainedModel, data: TokenizedCalibration, expert: Expert, options: RunOptions
) -> CurvatureCapture:
    """Every batch through the model once; nothing is kept of a batch but its sums."""
    device = model.device if options.device_map else torch.device(options.device)
    capture = CurvatureCapture(model, skip_logits=True)
    size = expert.calibration.batch_size
    progress = tqdm(
        total=data.tokens, desc=f"Measuring {expert.model}", unit="tok", disable=options.quiet
    )
    with progress, capture:  # which turns gradients off
        for batch in batches(data.sequences, _AUTO_TOKENS if size == "auto" else size):
            longest = len(batch[0])
            step = max(1, _AUTO_TOKENS // longest) if size == "auto" else size
            for start in range(0, len(batch), step):
                rows = batch[start : start + step]
                try:
                    feed(model, torch.tensor(rows, device=device))
                except Exception as error:
                    if isinstance(error, CalibrationError) or _out_of_memory(error):
                        raise
                    raise CalibrationError(
                        f"model {expert.model}: its forward pass failed on calibration data: "
                        f"{_one_line(error)}"
                    ) from error
                progress.update(len(rows) * longest)
    return capture


def _entries(
    model: PreTrainedModel, capture: CurvatureCapture, weights: _Weights
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """h under every name that a merge may ask for it; and for the header, what else was found."""
    stored = set(weights.names)
    names = weight_names(model, stored)
    h: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[str, list[int]]] = {}
    for parameter, curvature in capture.curvatures().items():
        h |= dict.fromkeys(names[parameter], curvature.h)
        if not any(name in stored for name in names[parameter]):
            h |= stored_parts(model, parameter, curvature.h, weights.shape)
        if curvature.experts:
            tokens, pooled = list(curvature.experts), list(curvature.pooled)
            experts[parameter] = {"tokens": tokens, "pooled": pooled}
    unscored = {names[parameter][0]: reason for parameter, reason in capture.unscored().items()}
    return h, {"unscored": unscored, "experts": experts}


class _DenseScores:
    """δ²·h per weight, computed when it is written."""

    def __init__(
        self,
        h: Mapping[str, torch.Tensor],
        expert: _Weights,
        base: _Weights,
        dtype: torch.dtype | None,
    ):
        self.h, self.expert, self.base, self.dtype = h, expert, base, dtype
        self.shapes = {}
        for name in h:
            for weights in (expert, base):
                if name not in weights.loader.index.tensor_paths:
                    raise CalibrationError(
                        f"model {weights.label}: tensor {name} is stored in another layout, which "
                        "--dense cannot write; leave --dense out"
                    )
            shapes = [w.load(name).shape for w in (expert, base)]
            if shapes[0] != shapes[1]:
                raise CalibrationError(
                    f"tensor {name} is {list(shapes[0])} in {expert.label} but {list(shapes[1])} "
                    f"in the base {base.label}: --dense needs the same shape"
                )
            self.shapes[name] = shapes[0]

    def read(self, name: str) -> torch.Tensor:
        expert, base = self.expert.load(name), self.base.load(name)
        dtype = self.dtype or torch.promote_types(expert.dtype, base.dtype)
        return task_vector(expert.to(dtype), base.to(dtype)).square_().mul_(self.h[name])


def _merge_dtype(name: str | None) -> torch.dtype | None:
    try:
        return dtype_from_name(name)
    except (AttributeError, RuntimeError) as error:
        raise RecipeError(f"dtype: mergekit does not know {name!r}") from error


def _one_line(error: BaseException) -> str:
    text = one_line(error)
    return text if len(text) <= 300 else text[:297] + "…"
