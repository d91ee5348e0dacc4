"""The Python face of mergekit-obim, for notebooks and scripts: measure, merge, check, read, write.

Each function here is also an attribute of the package, which imports this module when one of them
is first asked for. The work is done by the rooms below; this module only translates: models and
data that are in memory into what those rooms read, and what they write back into memory.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias, cast, overload

import torch
import yaml
from mergekit import merge_methods
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.merge_methods.api import merge_state_dicts
from mergekit.options import MergeOptions
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.core_model_loading import revert_weight_conversion

from mergekit_obim import __version__, checking
from mergekit_obim.calibration import run as running
from mergekit_obim.calibration.data import prepare
from mergekit_obim.calibration.data.images import RowProcessor, placeholders
from mergekit_obim.calibration.memory import out_of_memory
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.calibration.passes import run_through
from mergekit_obim.calibration.ranks import Ranks
from mergekit_obim.calibration.resume import Checkpoint
from mergekit_obim.checking.verdict import Verdict
from mergekit_obim.errors import (
    CalibrationError,
    CheckpointError,
    DeviceMemoryError,
    ObimError,
    RecipeError,
    SaliencyFileError,
    one_line,
    quoted,
)
from mergekit_obim.methods import register
from mergekit_obim.methods.planning import registry
from mergekit_obim.models.inspection import inspect_models, open_models
from mergekit_obim.models.names import weight_names
from mergekit_obim.models.opened import open_model
from mergekit_obim.planned import read_config
from mergekit_obim.recipe import Document, Method, Place, recipe_faults
from mergekit_obim.recipe.calibration import (
    Calibration,
    calibration_faults,
    long_form,
    overridden,
)
from mergekit_obim.recipe.document import read_documents
from mergekit_obim.recipe.experts import Expert
from mergekit_obim.recipe.faults import nearest, raise_errors, warnings_of
from mergekit_obim.saliency import file as saliency_file
from mergekit_obim.saliency.file import SaliencyFile, SaliencyMetadata, saliency_file_name
from mergekit_obim.saliency.fingerprint import fingerprint

__all__ = ["ExpertSaliency", "check", "measure", "merge", "read_saliency", "write_saliency"]

LOG = logging.getLogger("mergekit_obim")

# The steps of the pre-pass that a model in memory takes too, without a checkpoint to open.
_length_limit, _check_vocabulary = running._length_limit, running._check_vocabulary
_calibration_record, _entries = running._record, running._entries
_pooled_warnings = running._pooled

PathLike: TypeAlias = str | os.PathLike[str]
# What a model may be given as: a folder or a name on the Hub, or its weights in memory.
Weights: TypeAlias = PathLike | Mapping[str, Tensor] | nn.Module
Scores: TypeAlias = PathLike | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class ExpertSaliency(Mapping[str, Tensor]):
    """The saliency of one expert: a mapping from the name of each scored weight to its scores.

    Attributes:
        tensors: Per weight, h (the mean square of its input, which broadcasts against the
            weight) or in dense form δ²·h (of the weight's own shape); float32, on the CPU.
        metadata: What a saliency file says beside that: the model, what it was measured on,
            which weights are unscored and why.

    Example:
        >>> import torch
        >>> from mergekit_obim.api import ExpertSaliency
        >>> from mergekit_obim.saliency.file import SaliencyMetadata
        >>> metadata = SaliencyMetadata(form="factored", model="./math")
        >>> ExpertSaliency({"layer.weight": torch.ones(1, 4)}, metadata)
        <saliency of ./math: 1 tensor, factored>
    """

    tensors: Mapping[str, Tensor]
    metadata: SaliencyMetadata

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        left = len(self.metadata.unscored)
        return (
            f"<saliency of {self.metadata.model}: {len(self)} tensor{'s' * (len(self) != 1)}, "
            f"{self.metadata.form}{f', {left} unscored' if left else ''}>"
        )


# --- measuring ----------------------------------------------------------------------------


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
            ``samples`` says how many; or a file, the name of a data set, or a mapping, as the
            ``calibration`` of a recipe has them.
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
        with _calling(rows, "data"):
            settings = _calibration(data, calibration, rows)
            if isinstance(model, nn.Module):
                _refuse(
                    "a model that is loaded already",
                    {"base": base, "device": device, "options": options, "dtype": settings.dtype},
                )
                if tokenizer is None:
                    raise CalibrationError(
                        "measure: a model that is loaded already needs its tokenizer: add "
                        "tokenizer=AutoTokenizer.from_pretrained(…)"
                    )
                label = name or model.name_or_path or type(model).__name__
                found = _measure_loaded(model, label, tokenizer, settings, folder, quiet=quiet)
            else:
                _refuse("a model that is yet to be loaded", {"tokenizer": tokenizer})
                run = _run_options(device, options, quiet=quiet)
                found = _measure_stored(model, base, settings, folder, run)
    sources = [
        {**source, "data": "data"} if source.get("data") == str(rows) else source
        for source in found.metadata.calibration["sources"]
    ]
    metadata = found.metadata.model_copy(
        update={
            "calibration": {**found.metadata.calibration, "sources": sources},
            "model": name or found.metadata.model,
        }
    )
    return replace(found, metadata=metadata)


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


@contextmanager
def _calling(path: Path, name: str) -> Iterator[None]:
    """Have errors and warnings call a temporary file by what the user gave in its place."""

    def told(text: str) -> str:
        return text.replace(f"{path}, line ", f"{name}, row ").replace(str(path), name)

    def rename(record: logging.LogRecord) -> bool:
        record.msg, record.args = told(record.getMessage()), ()
        return True

    LOG.addFilter(rename)
    try:
        yield
    except ObimError as error:
        raise type(error)(told(error.message)) from error
    finally:
        LOG.removeFilter(rename)


def _refuse(whom: str, given: Mapping[str, object]) -> None:
    """Refuse arguments that would have no effect, instead of ignoring them."""
    if names := [name for name, value in given.items() if value is not None]:
        raise RecipeError(f"{', '.join(names)}: not for {whom}: leave it out")


def _run_options(
    device: str | None, options: Mapping[str, Any] | None, *, quiet: bool
) -> RunOptions:
    _check_options(options, [field.name for field in fields(RunOptions)])
    accelerator = torch.accelerator.current_accelerator()
    return RunOptions(
        **{"device": device or str(accelerator or "cpu"), "quiet": quiet, **(options or {})}
    )


def _check_options(options: Mapping[str, Any] | None, known: Sequence[str]) -> None:
    for key in options or {}:
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
            raise RecipeError(f"options: unknown option {key!r} ({hint})")


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
    findings = list(opened.findings)
    # Whether vocabularies are going to be aligned is for the merge to say.
    findings += inspect_models(opened.models, base, options, aligned=True, merging=False)
    if errors := [finding.message for finding in findings if finding.severity == "error"]:
        raise CheckpointError("; ".join(errors))
    expert = Expert(str(reference), calibration, reference.model_dump())
    prepared = running.prepare_expert(expert, base, opened.models, folder, options, Ranks())
    measured = running.measure(prepared, options, Ranks())
    assert measured is not None  # there is no other process
    for warning in [f.message for f in findings if f.severity == "warning"] + measured.warnings:
        LOG.warning("%s: %s", reference, warning)
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

    limit = _length_limit(tokenizer, config)
    data = prepare(calibration, tokenizer, label, limit, find_processor)
    _check_vocabulary(label, data, config)
    weights = dict(revert_weight_conversion(model, model.state_dict()))
    aliases = _aliases([weights])
    stored = _Stored({name: t for name, t in weights.items() if name not in aliases})
    # Before the run, which unties the tied among offloaded weights.
    names = weight_names(model, stored.names)
    with _evaluating(model):
        try:
            capture = run_through(
                model,
                data.sequences,
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
    h, found = _entries(model, capture, names, cast(Any, stored))
    if not h:
        raise CalibrationError(
            f"model {label}: not one of its weights could be scored: "
            + "; ".join(sorted(set(found["unscored"].values())))
        )
    for warning in [*data.warnings, *_pooled_warnings(found["experts"])]:
        LOG.warning("%s: %s", label, warning)
    record = _calibration_record(calibration, data, config)
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
    return ExpertSaliency({name: t.float().cpu() for name, t in sorted(h.items())}, metadata)


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


# --- reading and writing ------------------------------------------------------------------


def read_saliency(path: PathLike) -> ExpertSaliency:
    """Read a saliency file whole into memory, and check every value of it.

    Args:
        path: The file, as ``obim-saliency``, :func:`write_saliency` or another tool wrote it. A
            dense file is as large as the model: :func:`merge` also takes its path.

    Raises:
        SaliencyNotFoundError: There is no such file.
        SaliencyFileError: It is not what format 1 asks for; the message says in what.

    Example:
        >>> import mergekit_obim, tempfile, torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> scores = {"layer.weight": torch.tensor([[1.0, 4.0, 0.0, 2.0]])}
        >>> path = mergekit_obim.write_saliency(
        ...     f"{folder.name}/math.safetensors", scores, model="./math"
        ... )
        >>> saliency = mergekit_obim.read_saliency(path)
        >>> saliency["layer.weight"]
        tensor([[1., 4., 0., 2.]])
        >>> saliency.metadata.model
        './math'
        >>> folder.cleanup()
    """
    file = SaliencyFile(path)
    file.check_values()
    # Copies, as what the file maps must not be written to.
    return ExpertSaliency({name: file[name].clone() for name in file.shapes}, file.metadata)


def write_saliency(path: PathLike, tensors: Mapping[str, Tensor], **metadata: Any) -> Path:
    """Write a saliency file, whole or not at all, from measured scores or from your own.

    Args:
        path: Where to write, named ``….safetensors``; its folder is made if needed.
        tensors: What :func:`measure` returned, or scores of your own: per weight a tensor that
            is finite, not negative, and broadcasts against the weight (``form="factored"``, h) or
            has its shape (``form="dense"``, δ²·h or any other score).
        metadata: The keys of the file's metadata by name (``docs/saliency_format.md`` lists
            them). They replace those of what was measured; scores of your own need ``model``.

    Returns:
        The path.

    Raises:
        SaliencyFileError: The model is not named, a key is not known, or a tensor is not what a
            saliency is; nothing is written then.

    Example:
        >>> import mergekit_obim, tempfile, torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> fisher = {"layer.weight": torch.rand(2, 4)}  # one score for each element
        >>> path = mergekit_obim.write_saliency(
        ...     f"{folder.name}/math.safetensors", fisher, model="./math", form="dense"
        ... )
        >>> path.name
        'math.safetensors'
        >>> folder.cleanup()
    """
    path = Path(path)
    for key in metadata:
        if key not in SaliencyMetadata.model_fields:
            near = nearest(key, SaliencyMetadata.model_fields)
            hint = f"did you mean {near!r}?" if near else "docs/saliency_format.md lists them"
            raise SaliencyFileError(f"{path}: unknown metadata key {key!r} ({hint})")
    known = tensors.metadata.model_dump() if isinstance(tensors, ExpertSaliency) else {}
    if "model" not in {**known, **metadata}:
        raise SaliencyFileError(f"{path}: say which model was scored: model='…'")
    try:
        header = SaliencyMetadata.model_validate({"form": "factored", **known, **metadata})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SaliencyFileError(f"{path}: metadata {place}: {first['msg']}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        saliency_file.write_saliency(path, shapes, tensors.__getitem__, header)
    except ObimError:
        raise
    except OSError as error:
        raise SaliencyFileError(f"{path}: cannot be written: {one_line(error)}") from error
    return path


# --- merging ------------------------------------------------------------------------------


@overload
def merge(
    base: Weights,
    experts: Mapping[str, Weights] | Sequence[Weights],
    saliencies: Scores | Mapping[str, Scores] | Sequence[Scores] | None = ...,
    method: str = ...,
    *,
    out: None = ...,
    dtype: str | torch.dtype | None = ...,
    quiet: bool = ...,
    options: Mapping[str, Any] | None = ...,
    **parameters: Any,
) -> dict[str, Tensor]: ...
@overload
def merge(
    base: Weights,
    experts: Mapping[str, Weights] | Sequence[Weights],
    saliencies: Scores | Mapping[str, Scores] | Sequence[Scores] | None = ...,
    method: str = ...,
    *,
    out: PathLike,
    dtype: str | torch.dtype | None = ...,
    quiet: bool = ...,
    options: Mapping[str, Any] | None = ...,
    **parameters: Any,
) -> Path: ...
def merge(
    base: Weights,
    experts: Mapping[str, Weights] | Sequence[Weights],
    saliencies: Scores | Mapping[str, Scores] | Sequence[Scores] | None = None,
    method: str = "obim",
    *,
    out: PathLike | None = None,
    dtype: str | torch.dtype | None = None,
    quiet: bool = False,
    options: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> dict[str, Tensor] | Path:
    """Merge experts of one base, bit for bit as ``mergekit-yaml`` would.

    Args:
        base: What the experts were fine-tuned from: a state dict or a module, or else a model's
            folder or name on the Hub.
        experts: The experts, each given as the base is: a mapping by names of your choice, or a
            list. Their order matters where ``order: recipe`` or the rotation asks for it.
        saliencies: Of each expert what :func:`measure` or :func:`read_saliency` returned, the
            path of a saliency file, or a plain mapping of scores: in a mapping by the experts'
            names or in a list in their order. A single path is a folder for all. Left out,
            folders use the saliency that they carry; methods without saliency need none.
        method: ``obim`` or another merge method of this package.
        out: Where to write the merged model, if the models are folders: with configuration,
            tokenizer, model card and the recipe. Saliencies from memory are put beside it, in
            ``out/saliency``, so that the recipe can be run again.
        dtype: What to merge in, such as ``"bfloat16"``; by default what the weights have.
        quiet: Show no progress.
        options: Options of ``mergekit-yaml`` by their names in Python, such as
            ``{"device": "cuda"}``, if the models are folders. State dicts are merged where they
            are.
        parameters: The method's parameters. One that each expert has for itself (``density``,
            ``weight``, …) takes a value for all, a list in the experts' order, or a mapping by
            their names. Write ``lambda_`` for ``lambda``.

    Returns:
        The merged state dict; with ``out``, that folder.

    Raises:
        RecipeError: A parameter is wrong, or the models cannot be merged with each other.
        SaliencyFileError: A saliency is not of this model's weights.
        SaliencyNotFoundError: An expert has no saliency.

    Example:
        >>> import mergekit_obim, torch
        >>> base = {"layer.weight": torch.zeros(1, 4)}
        >>> experts = {
        ...     "math": {"layer.weight": torch.tensor([[3.0, 1.0, 1.0, 0.0]])},
        ...     "code": {"layer.weight": torch.tensor([[2.0, 2.0, 0.0, 5.0]])},
        ... }
        >>> saliencies = {name: {"layer.weight": torch.ones(1, 4)} for name in experts}
        >>> mergekit_obim.merge(base, experts, saliencies, density={"math": 0.25, "code": 0.5})
        {'layer.weight': tensor([[3., 2., 0., 5.]])}
    """
    register()
    # mergekit keeps what it read of a folder for the life of the process; a notebook's cell may
    # have written another model there since.
    LoaderCache().loaders.clear()
    known = registry().get(method)
    if known is None or not known.ours:
        ours = sorted(name for name, one in registry().items() if one.ours)
        raise RecipeError(f"method: {method!r} is none of mergekit-obim's: {', '.join(ours)}")
    named = _named_experts(experts)
    stored = {isinstance(model, str | os.PathLike) for model in (base, *named.values())}
    if len(stored) > 1:
        raise RecipeError(
            "merge: some models are folders and some are in memory: load all of them or none"
        )
    shared, own = _parameters(known, list(named), parameters)
    scores = _by_expert("saliencies", saliencies, list(named))
    if scores and "saliency" not in known.parameters:
        raise RecipeError(f"saliencies: {method} reads none: leave them out")
    recipe: dict[str, Any] = {"merge_method": method, "parameters": shared}
    if dtype is not None:
        recipe["dtype"] = str(dtype).removeprefix("torch.")
    with TemporaryDirectory(prefix="mergekit-obim-") as made:
        if stored == {False}:
            _refuse("models in memory", {"out": out, "options": options})
            models = {name: _state_dict(model) for name, model in named.items()}
            _give_saliency(scores, own, {name: name for name in named}, Path(made))
            return _merge_state_dicts(known, _state_dict(base), models, recipe, own)
        names = {name: os.fspath(cast(PathLike, model)) for name, model in named.items()}
        _give_saliency(scores, own, names, Path(out, "saliency") if out else Path(made, "saliency"))
        recipe["base_model"] = os.fspath(cast(PathLike, base))
        recipe["models"] = [
            {"model": model, "parameters": own[name]} for name, model in names.items()
        ]
        return _merge_folders(recipe, out, Path(made, "merged"), options, quiet=quiet)


def _named_experts(experts: Any) -> dict[str, Weights]:
    if isinstance(experts, str | os.PathLike | nn.Module) or (
        isinstance(experts, Mapping) and any(isinstance(one, Tensor) for one in experts.values())
    ):
        raise RecipeError("experts: give a list or a mapping of experts, even if it is one")
    if isinstance(experts, Mapping):
        return {str(name): model for name, model in experts.items()}
    return {
        os.fspath(model) if isinstance(model, str | os.PathLike) else f"expert-{number}": model
        for number, model in enumerate(experts, 1)
    }


def _parameters(
    method: Method, names: Sequence[str], parameters: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Sort a method's parameters into those that all models share and each expert's own."""
    shared: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in parameters.items():
        key = key.removesuffix("_")  # `lambda` is a word of Python's
        spec = method.parameters.get(key)
        several = isinstance(value, Mapping | list | tuple)
        if several and spec is not None and spec.scope != "shared":
            for name, one in _by_expert(key, value, names).items():
                own[name][key] = one
        else:
            shared[key] = value  # the recipe's reader says so if there is none of that name
    return shared, own


def _by_expert(what: str, values: Any, names: Sequence[str]) -> dict[str, Any]:
    """Give each expert its own of some values, which stand by name or in the experts' order."""
    if values is None:
        return {}
    if isinstance(values, str | os.PathLike):
        return dict.fromkeys(names, values)
    if isinstance(values, Mapping) and not isinstance(values, ExpertSaliency):
        for name in values:
            if name not in names:
                raise RecipeError(f"{what}: {name!r} is no expert's name: {', '.join(names)}")
        return dict(values)
    ordered = [values] if isinstance(values, ExpertSaliency) else list(values)
    if len(ordered) != len(names):
        raise RecipeError(f"{what}: there are {len(ordered)} for {len(names)} experts")
    return dict(zip(names, ordered, strict=True))


def _give_saliency(
    scores: Mapping[str, Any],
    own: Mapping[str, dict[str, Any]],
    models: Mapping[str, str],
    folder: Path,
) -> None:
    """Set each expert's `saliency` to a path; what is in memory is written to a folder for that."""
    for name, score in scores.items():
        if isinstance(score, Mapping):
            path = folder / saliency_file_name(models[name])
            metadata = {} if isinstance(score, ExpertSaliency) else {"model": models[name]}
            score = write_saliency(path, score, **metadata)
        if score is not None:
            own[name]["saliency"] = os.fspath(score)


def _state_dict(model: Any) -> Mapping[str, Tensor]:
    return model.state_dict() if isinstance(model, nn.Module) else model


def _merge_state_dicts(
    method: Method,
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    recipe: dict[str, Any],
    own: Mapping[str, dict[str, Any]],
) -> dict[str, Tensor]:
    base_id = "base" if "base" not in experts else "the base"
    models = [{"model": {"model": {"path": name}}, "parameters": own[name]} for name in experts]
    recipe |= {"base_model": {"model": {"path": base_id}}, "models": models}
    faults = list(recipe_faults(Document(recipe), registry()))
    raise_errors(faults)
    for fault in warnings_of(faults):
        LOG.warning(str(fault))
    parameters = {k: v for k, v in recipe["parameters"].items() if k in method.parameters}
    defaults = {p.name: p.default for p in merge_methods.get(method.name).spec.parameters}
    for key in {key for settings in own.values() for key in settings}:
        # mergekit wants a value for each expert, or one for all.
        default = parameters.get(key, defaults[key])
        parameters[key] = {name: own[name].get(key, default) for name in experts}
    if "saliency" in defaults:
        _check_all_have_saliency({**defaults, **parameters}, list(experts))
    # Of tied weights one is merged, and goes by all its names again: ranked one by one, they
    # would come apart.
    aliases = _aliases([base, *experts.values()])
    kept: dict[Hashable, Mapping[str, Tensor] | nn.Module] = {
        name: {key: t for key, t in weights.items() if key not in aliases}
        for name, weights in {base_id: base, **experts}.items()
    }
    dtype = dtype_from_name(recipe.get("dtype"))
    try:
        merged = merge_state_dicts(
            kept, method.name, base=base_id, parameters=parameters, dtype=dtype
        )
    except ObimError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"these state dicts cannot be merged: {quoted(error)}") from error
    return {name: merged[aliases.get(name, name)] for name in base}


def _check_all_have_saliency(parameters: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        criterion, file = (
            value[name] if isinstance(value, Mapping) else value
            for value in (parameters["criterion"], parameters["saliency"])
        )
        if criterion == "saliency" and file is None:
            raise RecipeError(
                f"model {name}: has no saliency: make one with mergekit_obim.measure and give it "
                'in saliencies, or merge with criterion="magnitude"'
            )


def _aliases(models: Sequence[Mapping[str, Tensor]]) -> dict[str, str]:
    """Map each further name of a tensor that goes by several to its first, if in every model."""
    found: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name in models[0]:
        if not all(name in weights and weights[name].numel() for weights in models):
            continue
        if any(weights[name].is_meta for weights in models):
            continue  # offloaded: all such have the address 0
        places = tuple(
            (t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (w[name] for w in models)
        )
        if (first := found.setdefault(places, name)) != name:
            aliases[name] = first
    return aliases


def _merge_folders(
    recipe: dict[str, Any],
    out: PathLike | None,
    scratch: Path,
    options: Mapping[str, Any] | None,
    *,
    quiet: bool,
) -> dict[str, Tensor] | Path:
    _check_options(options, list(MergeOptions.model_fields))
    wanted: dict[str, Any] = {"quiet": quiet, **(options or {})}
    if out is None:
        wanted |= {"copy_tokenizer": False, "write_model_card": False, "safe_serialization": True}
    folder = Path(out) if out is not None else scratch
    config = read_config(recipe)
    source = yaml.safe_dump(recipe, sort_keys=False)
    run_merge(config, str(folder), MergeOptions(**wanted), config_source=source)
    if out is not None:
        return folder
    merged: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        # Copies, as the files are removed in a moment.
        merged |= {name: tensor.clone() for name, tensor in load_file(path).items()}
    return merged


# --- checking -----------------------------------------------------------------------------


def check(
    recipe: PathLike | Mapping[str, Any],
    *,
    out_dir: PathLike | None = None,
    device: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Verdict:
    """Find everything that is wrong with a recipe, as ``obim-saliency --check`` does.

    Args:
        recipe: The path of a recipe, its YAML text, or what YAML makes of it.
        out_dir: Where the pre-pass is going to write: then saliency files that it will make may
            be missing. Left out, the merge comes next.
        device: Where the pre-pass will run, for the estimate of its cost.
        options: More options of ``obim-saliency``, by their names in Python.

    Returns:
        What was found: ``errors`` and ``warnings`` are lists of lines, ``print(*verdict.lines(),
        sep="\\n")`` shows all of it, and ``to_json()`` is for machines.

    Raises:
        RecipeError: There is no such file, or it is not a recipe at all.

    Example:
        >>> import mergekit_obim
        >>> verdict = mergekit_obim.check('''
        ... merge_method: obim
        ... base_model: ./base
        ... models: [{model: ./base, parameters: {densty: 0.5}}]
        ... ''')
        >>> verdict.errors[0]
        'the recipe has no model besides the base: list the experts under models'
    """
    LoaderCache().loaders.clear()  # as in `merge`
    run = _run_options(device, options, quiet=True)
    documents = _documents(recipe)
    return checking.check(documents, Path(out_dir) if out_dir is not None else None, run)


def _documents(recipe: PathLike | Mapping[str, Any]) -> list[Document]:
    if isinstance(recipe, Mapping):
        return [Document(recipe)]
    if isinstance(recipe, os.PathLike) or "\n" not in recipe:
        path = Path(recipe)
        if not path.is_file():
            raise RecipeError(
                f"{path}: there is no such recipe (a relative path starts at {os.getcwd()})"
            )
        return read_documents(path)
    with TemporaryDirectory(prefix="mergekit-obim-") as made:
        path = Path(made, "recipe.yml")
        path.write_text(recipe, encoding="utf-8")
        with _calling(path, "the recipe"):
            return read_documents(path)
