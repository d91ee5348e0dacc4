"""Measuring an expert: a model on disk or in memory, on data on disk or in memory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from mergekit.common import ModelReference
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from mergekit_obim import __version__
from mergekit_obim.api.arguments import PathLike, calling, refuse, run_options
from mergekit_obim.api.saliency import ExpertSaliency, read_saliency
from mergekit_obim.calibration.data import prepare
from mergekit_obim.calibration.data.images import RowProcessor, placeholders
from mergekit_obim.calibration.data.self_written import writing_of
from mergekit_obim.calibration.memory import out_of_memory
from mergekit_obim.calibration.opening import check_vocabulary, length_limit
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.calibration.products import run_with_products
from mergekit_obim.calibration.ranks import Ranks
from mergekit_obim.calibration.recording import calibration_record, entries, pooled_warnings
from mergekit_obim.calibration.resume import Checkpoint
from mergekit_obim.calibration.run import measure as measure_prepared
from mergekit_obim.calibration.run import prepare_expert
from mergekit_obim.calibration.writing import cannot_write, write_rows
from mergekit_obim.errors import (
    CalibrationError,
    CheckpointError,
    DeviceMemoryError,
    ObimError,
    one_line,
    quoted,
)
from mergekit_obim.models.inspection import inspect_models, open_models
from mergekit_obim.models.names import sources_of, weight_names
from mergekit_obim.models.opened import open_model
from mergekit_obim.recipe import Place
from mergekit_obim.recipe.calibration import (
    Calibration,
    calibration_faults,
    long_form,
    overridden,
)
from mergekit_obim.recipe.experts import Expert
from mergekit_obim.recipe.faults import errors_of, raise_errors
from mergekit_obim.saliency.file import SaliencyMetadata
from mergekit_obim.saliency.fingerprint import fingerprint

LOG = logging.getLogger("mergekit_obim")


def measure(
    model: PathLike | PreTrainedModel,
    data: PathLike | Mapping[str, Any] | Iterable[Any],
    *,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    name: str | None = None,
    base: PathLike | None = None,
    device: str | None = None,
    quiet: bool = False,
    options: Mapping[str, Any] | None = None,
    **calibration: Any,
) -> ExpertSaliency:
    """Run an expert over calibration data and return the saliency of its weights.

    The numbers are those that ``obim-saliency`` writes for the same model, data and settings.

    Args:
        model: The expert: a folder or a name on the Hub (``model[@revision][+adapter]``), or a
            transformers model that is loaded already. A loaded model is run where and in the
            dtype that it is, in eval mode, and left as it was found.
        data: What to run it on: a list of texts, of conversations (each a list of messages) or
            of rows (mappings such as ``{"prompt": …}``), all of which are used unless
            ``samples`` says how many; or a file, the name of a data set, ``"self"`` for rows
            that the expert writes itself, or a mapping, as the ``calibration`` of a recipe has
            them.
        tokenizer: Of a loaded model, which needs it; for data with images the processor. A
            folder or a name on the Hub has its own.
        name: What to call the model in messages and in the metadata.
        base: What the expert was fine-tuned from, for its tokenizer where the expert has none.
        device: Where to run a model that is not loaded yet; the accelerator if there is one.
        quiet: Show no progress.
        options: More options of ``obim-saliency`` by their names in Python, such as
            ``{"trust_remote_code": True}``, for a model that is not loaded yet.
        calibration: Settings by the keys of a recipe's ``calibration``: ``samples``,
            ``max_length``, ``batch_size``, ``seed``, ``packing``, ``column``, …

    Returns:
        The saliency, in memory: give it to :func:`merge`, or to :func:`write_saliency`.

    Raises:
        CalibrationError: The data or the model cannot give a saliency.
        CheckpointError: The model cannot be read.
        RecipeError: A setting is not what a recipe's ``calibration`` takes.
        DeviceMemoryError: The model, or its activations, do not fit the device.

    Example:
        >>> import mergekit_obim
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"?": 0, "one": 1, "and": 2}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
        >>> config = LlamaConfig(
        ...     vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=2, tie_word_embeddings=False,
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> saliency = mergekit_obim.measure(
        ...     model, ["one and one", "one"], tokenizer=tokenizer, name="math", quiet=True
        ... )
        >>> saliency
        <saliency of math: 12 tensors, factored>
        >>> saliency["model.layers.0.mlp.up_proj.weight"].shape
        torch.Size([1, 8])
    """
    with TemporaryDirectory(prefix="mergekit-obim-") as made:
        folder = Path(made)
        rows = folder / "rows.jsonl"
        with calling(rows, "data"):
            settings = _calibration(data, calibration, rows)
            if isinstance(model, nn.Module):
                refuse(
                    "a model that is loaded already",
                    {"base": base, "device": device, "options": options, "dtype": settings.dtype},
                )
                if tokenizer is None:
                    raise CalibrationError(
                        "measure: a model that is loaded already needs its tokenizer: add "
                        "tokenizer=AutoTokenizer.from_pretrained(…)"
                    )
                _check_takes(model)
                label = name or model.name_or_path or type(model).__name__
                found = _measure_loaded(model, label, tokenizer, settings, folder, quiet=quiet)
            else:
                refuse("a model that is yet to be loaded", {"tokenizer": tokenizer})
                run = run_options(device, options, quiet=quiet)
                found = _measure_stored(model, base, settings, folder, run)
    for source in found.metadata.calibration["sources"]:
        if source.get("data") == str(rows):
            source["data"] = "data"
    metadata = found.metadata.model_copy(update={"model": name} if name else {})
    return replace(found, metadata=metadata)


def _check_takes(model: nn.Module) -> None:
    """Refuse models in memory whose weights are not those that a merge reads."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        why, way = "is no transformers model", "of an adapter's model give merge_and_unload()"
    elif getattr(model, "_hf_peft_config_loaded", False):
        why, way = "has an adapter beside its weights", "give MODEL+ADAPTER, as a recipe does"
    elif getattr(model, "is_quantized", False):
        why, way = "is quantised", "load it without, in bfloat16 say"
    else:
        return
    raise CalibrationError(f"model {kind}: {why}, and cannot be measured so: {way}")


def _calibration(data: Any, settings: Mapping[str, Any], rows: Path) -> Calibration:
    """What to measure on, as a recipe says it; data in memory is written to `rows` for that."""
    settings = {key: value for key, value in settings.items() if value is not None}
    if isinstance(data, Mapping):
        raw = long_form(data)
    elif isinstance(data, str | os.PathLike):
        raw = {"data": os.fspath(data)}
    else:
        count = _write_rows(data, rows)
        raw = {"data": str(rows), "samples": count}
    whole = overridden(raw, settings)
    raise_errors(calibration_faults(whole, "measure: ", lambda path: Place()))
    return Calibration.model_validate(whole)


def _write_rows(data: Iterable[Any], rows: Path) -> int:
    """Write rows that are in memory to a file of JSON lines, and return how many there are."""
    lines = []
    for number, row in enumerate(data, 1):
        if isinstance(row, os.PathLike) or (isinstance(row, str) and os.path.isfile(row)):
            raise CalibrationError(
                f"data, row {number}: {row} is a file: give the path by itself, not in a list; "
                'several are {"data": [path, path, …]}'
            )
        whole = {"messages": row} if isinstance(row, list | tuple) else row
        try:
            lines.append(json.dumps(whole) + "\n")
        except TypeError as error:
            raise CalibrationError(
                f"data, row {number}: holds what is no text, number, list or mapping "
                f"({one_line(error)}); of an image give the absolute path of its file"
            ) from error
    if not lines:
        raise CalibrationError("data: is empty: it has no rows")
    rows.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def _measure_stored(
    model: PathLike,
    base_model: PathLike | None,
    calibration: Calibration,
    folder: Path,
    options: RunOptions,
) -> ExpertSaliency:
    """Measure a model that is on disk or on the Hub, exactly as the pre-pass does."""
    reference = _reference(model)
    base = _reference(base_model) if base_model is not None else None
    opened = open_models([base] if base else [], options)
    opened.models[reference] = open_model(reference, options)
    faults = list(opened.faults)
    # Whether vocabularies are going to be aligned is for the merge to say.
    faults += inspect_models(opened.models, base, options, aligned=True, merging=False)
    if errors := errors_of(faults):
        raise CheckpointError("; ".join(fault.message for fault in errors))
    expert = Expert(str(reference), calibration, reference.model_dump())
    prepared = prepare_expert(expert, base, opened.models, folder, options, Ranks())
    measured = measure_prepared(prepared, options, Ranks())
    assert measured is not None  # there is no other process
    for fault in faults:
        LOG.warning(fault.message)
    for warning in measured.warnings:
        LOG.warning("model %s: %s", reference, warning)
    return read_saliency(measured.path)


def _reference(model: PathLike) -> ModelReference:
    text = os.fspath(model)
    if os.path.exists(text):  # a folder, whatever characters its name has
        return ModelReference.model_validate({"model": {"path": text}})
    return ModelReference.parse(text)


@dataclass(frozen=True)
class _Stored:
    """A loaded model's weights under the names that saving it would give them."""

    tensors: Mapping[str, Tensor]

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> torch.Size | None:
        return self.tensors[name].shape if name in self.tensors else None


def _measure_loaded(
    model: PreTrainedModel,
    label: str,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    calibration: Calibration,
    folder: Path,
    *,
    quiet: bool,
) -> ExpertSaliency:
    """Measure a model that is in memory already; nothing of it is copied or written."""
    config, processor = model.config, None
    if isinstance(tokenizer, ProcessorMixin):
        processor = RowProcessor(tokenizer, placeholders(config))
        tokenizer = cast("PreTrainedTokenizerBase", cast(Any, tokenizer).tokenizer)

    def find_processor() -> RowProcessor | None:
        if processor is None and hasattr(config, "vision_config"):
            raise CalibrationError("has images: give the model's processor as tokenizer")
        return processor

    limit = length_limit(tokenizer, config)
    own_rows = _own_rows(model, label, tokenizer, calibration, limit, quiet=quiet)
    data = prepare(calibration, tokenizer, label, limit, find_processor, own_rows)
    check_vocabulary(label, data, config)
    # The steps of its save_pretrained.
    untied = remove_tied_weights_from_state_dict(model.state_dict(), model)
    stored = _Stored(revert_weight_conversion(model, untied))
    # Before the run, which unties the tied among offloaded weights.
    names = weight_names(model, sources_of(model, stored.names))
    with _evaluating(model):
        try:
            capture, products = run_with_products(
                model,
                data.sequences,
                columns=calibration.sketch,
                label=label,
                batch_size=calibration.batch_size,
                checkpoint=Checkpoint(folder / "saliency", {}),
                ranks=Ranks(),
                quiet=quiet,
            )
        except ObimError:
            raise
        except Exception as error:  # each model's forward pass has errors of its own
            if out_of_memory(error):
                raise DeviceMemoryError(
                    f"model {label}: its activations do not fit {model.device}; try batch_size=1 "
                    "or a smaller max_length"
                ) from error
            raise CalibrationError(
                f"model {label}: its forward pass failed on calibration data: {quoted(error)}"
            ) from error
    h, found = entries(model, capture, products, names, cast(Any, stored))
    if not h:
        raise CalibrationError(
            f"model {label}: not one of its weights could be scored: "
            + "; ".join(sorted(set(found["unscored"].values())))
        )
    for warning in [*data.warnings, *pooled_warnings(found["experts"])]:
        LOG.warning("model %s: %s", label, warning)
    record = calibration_record(calibration, data, config)
    metadata = SaliencyMetadata(
        form="factored",
        model=label,
        architecture=type(model).__name__,
        calibration={**record, "dtype": str(model.dtype).removeprefix("torch.")},
        fingerprint={
            name: fingerprint(tensor)
            for name, tensor in stored.tensors.items()
            if tensor.is_floating_point() and not tensor.is_meta  # offloaded
        },
        mergekit_obim_version=__version__,
        **found,
    )
    return ExpertSaliency(
        {name: t.float().cpu() for name, t in sorted(h.items())},
        metadata,
        {products.entry(first): products.read(first) for first in products.seen_by},
    )


def _own_rows(
    model: PreTrainedModel,
    label: str,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration,
    limit: int | None,
    *,
    quiet: bool,
) -> list[list[int]]:
    """Have a model write the rows of its own that it is to be measured on, if there are any."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    try:
        writing = writing_of(calibration, tokenizer, type(model), model.config, ends, limit)
        if writing is None:
            return []
        with _evaluating(model):
            return [row.ids for row in write_rows(model, writing, label=label, quiet=quiet)]
    except Exception as error:
        if out_of_memory(error):
            raise DeviceMemoryError(
                f"model {label}: what it keeps as it writes its own rows does not fit "
                f"{model.device}; try a smaller max_length"
            ) from error
        raise cannot_write(label, error) from error


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in eval mode for a while; each of its modules gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
