"""Measuring one expert, from its recipe entry to its saliency file."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from mergekit.common import ModelPath, ModelReference, dtype_from_name
from tqdm import tqdm
from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_torchvision_available

from mergekit_obim import __version__
from mergekit_obim.calibration.capture import FEWEST_ROWS, CurvatureCapture
from mergekit_obim.calibration.data import TokenizedCalibration, prepare
from mergekit_obim.calibration.data.images import RowProcessor, placeholders, require_pillow
from mergekit_obim.calibration.loading import does_not_fit, loaded
from mergekit_obim.calibration.memory import out_of_memory
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.calibration.passes import run_through
from mergekit_obim.calibration.ranks import Ranks
from mergekit_obim.calibration.resume import Checkpoint, different, remove_leftovers
from mergekit_obim.errors import (
    CalibrationError,
    ObimError,
    RecipeError,
    SaliencyFileError,
    quoted,
)
from mergekit_obim.kernels.scores import task_vector
from mergekit_obim.models.loaded import check_loaded
from mergekit_obim.models.locking import locked
from mergekit_obim.models.names import stored_parts, weight_names
from mergekit_obim.models.opened import OpenModel, open_model, refuse_code
from mergekit_obim.recipe.calibration import Calibration
from mergekit_obim.recipe.experts import Expert
from mergekit_obim.recipe.references import identity
from mergekit_obim.saliency.file import (
    SaliencyFile,
    SaliencyMetadata,
    saliency_file_name,
    write_saliency,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Measured:
    """What became of one expert.

    Attributes:
        kept: The file was there already, made from the same weights, data and settings.
        scored: How many of the checkpoint's tensors have a saliency.
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
    model: OpenModel
    data: TokenizedCalibration
    wanted: SaliencyMetadata
    kept: SaliencyFile | None
    base: OpenModel | None


def prepare_expert(
    expert: Expert,
    base_model: object,
    models: Mapping[ModelReference, OpenModel],
    out_dir: Path,
    options: RunOptions,
    ranks: Ranks,
) -> Prepared:
    """Read and check all that is needed to measure an expert, so that faults are told at once.

    Args:
        expert: Who is measured, on what.
        base_model: The recipe's base, for its tokenizer and its processor where the expert has
            none, and for dense files; None where only its slices have one.
        models: The recipe's models that are open already, the expert among them.
        out_dir: The folder to write ``<model-name>.safetensors`` to.
        options: Where and how.
        ranks: The processes that share the work; what is in OUT_DIR is the first one's business.

    Raises:
        CalibrationError: The data or the model cannot give a saliency.
        SaliencyFileError: There is a file already that was made from something else.
    """
    path = out_dir / saliency_file_name(expert.model)
    reference = ModelReference.model_validate(expert.reference)
    base = ModelReference.model_validate(base_model) if base_model else None
    model = models[reference]
    places = _places([reference, *([base] if base else [])])
    tokenizer = _tokenizer(expert.model, places, options)
    data = prepare(
        expert.calibration,
        tokenizer,
        expert.model,
        _length_limit(tokenizer, model.config),
        cache(lambda: _processor(places, options, model.config, tokenizer)),
    )
    _check_vocabulary(expert.model, data, model.config)
    wanted = SaliencyMetadata(
        form="dense" if options.dense else "factored",
        model=expert.model,
        revision=reference.model.revision or model.commit,
        architecture=(model.config.architectures or [""])[0],
        calibration=_record(expert.calibration, data, model.config),
        fingerprint=model.fingerprints(),
        mergekit_obim_version=__version__,
    )
    base_weights = None
    if options.dense:
        if base is None:
            raise CalibrationError(
                f"model {expert.model}: --dense needs the weights that it was fine-tuned from: add "
                "a top-level base_model to the recipe, or leave --dense out"
            )
        base_weights = models[base] if base in models else open_model(base, options)
        wanted.calibration["base"] = str(base)
        wanted.calibration["base_weights"] = base_weights.digest()
        wanted.calibration["merge_dtype"] = options.merge_dtype
    kept = None
    if ranks.first and path.exists():
        kept = _kept(path, wanted, options.overwrite)
    return Prepared(expert, path, model, data, wanted, kept, base_weights)


def measure(prepared: Prepared, options: RunOptions, ranks: Ranks) -> Measured | None:
    """Run an expert over its calibration data and write its saliency file, unless it is there.

    Killed at any moment, the same call goes on where the last checkpoint was taken.

    Returns:
        What became of it; in a process that is not the first, None.

    Raises:
        CalibrationError: The model cannot be loaded or run, or its activations are not finite.
        SaliencyFileError: The file cannot be written.
        DeviceMemoryError: The model or its activations do not fit.
        OtherProcessError: Another process has failed.
    """
    path = prepared.path
    with _alone(prepared, ranks) if ranks.first else nullcontext():
        if ranks.first and path.exists():  # which may have come only while this process waited
            prepared = replace(prepared, kept=_kept(path, prepared.wanted, options.overwrite))
        # The others wait here for the first, which waits for other commands.
        kept = ranks.all_gather(prepared.kept is not None)[0]
        if not ranks.local:
            remove_leftovers(path, sums=kept)
        if kept:
            return _measured(prepared, prepared.kept) if prepared.kept else None
        h, found = _run(prepared, options, ranks)
        if ranks.first:
            _write(prepared, options, h, found)
        ranks.barrier()
        remove_leftovers(path)
        ranks.barrier()  # so that the next to get the lock has the folder to itself
    return _measured(prepared, SaliencyFile(path)) if ranks.first else None


@contextmanager
def _alone(prepared: Prepared, ranks: Ranks) -> Iterator[None]:
    """Keep other commands from the same expert in the same folder.

    Only the first of all processes asks for it, as all share the run, and maybe the disk.
    """
    told = False

    def waiting() -> None:
        nonlocal told
        ranks.check()
        if not told:
            line = f"{prepared.expert.model}: waits for another command that writes {prepared.path}"
            tqdm.write(line, file=sys.stderr)
        told = True

    with ExitStack() as stack:
        try:
            stack.enter_context(locked(prepared.path, waiting))
        except OSError as error:
            if prepared.kept is None:
                raise _cannot_be_written(prepared, error) from error
            # A file that is kept may be in a folder that only others can write to.
        yield


def _write(
    prepared: Prepared,
    options: RunOptions,
    h: Mapping[str, torch.Tensor],
    found: Mapping[str, Any],
) -> None:
    label, path = prepared.expert.model, prepared.path
    if not h:
        raise CalibrationError(
            f"model {label}: not one of its weights could be scored: "
            + "; ".join(sorted(set(found["unscored"].values())))
        )
    shapes: Mapping[str, torch.Size] = {name: x.shape for name, x in h.items()}
    read = h.__getitem__
    if prepared.base:
        dense = _DenseScores(h, prepared.model, prepared.base, _merge_dtype(options.merge_dtype))
        shapes, read = dense.shapes, dense.read
    metadata = prepared.wanted.model_copy(update=found)
    try:
        write_saliency(path, shapes, read, metadata)
    except OSError as error:
        raise _cannot_be_written(prepared, error) from error


def _cannot_be_written(prepared: Prepared, error: OSError) -> SaliencyFileError:
    return SaliencyFileError(
        f"{prepared.path}: the saliency of model {prepared.expert.model} cannot be written: "
        f"{quoted(error)}"
    )


def _measured(prepared: Prepared, file: SaliencyFile) -> Measured:
    metadata = file.metadata
    return Measured(
        prepared.expert.model,
        prepared.path,
        prepared.kept is not None,
        len(file.shapes.keys() & set(prepared.model.names)),  # some under further names too
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


def _places(references: list[ModelReference]) -> list[ModelPath]:
    """Where to look for an expert's tokenizer: its adapter, its model, the base."""
    return [
        place for reference in references for place in (reference.lora, reference.model) if place
    ]


def _tokenizer(label: str, places: list[ModelPath], options: RunOptions) -> PreTrainedTokenizerBase:
    """The tokenizer of the first place that has one: transformers makes some up from nothing."""
    for place in places:
        if not _has(place, _TOKENIZER_FILES, options):
            continue
        try:
            return cast("PreTrainedTokenizerBase", _from(AutoTokenizer, place, options))
        except Exception as error:
            refuse_code(label, "its tokenizer", error)
            raise CalibrationError(
                f"model {label}: the tokenizer of {place} can't be loaded: {quoted(error)}; mend "
                "its files, or remove them where the base's tokenizer will do"
            ) from error
    raise CalibrationError(
        f"model {label}: no tokenizer found: none of {', '.join(map(str, places))} has any of "
        f"{', '.join(_TOKENIZER_FILES)}"
    )


def _processor(
    places: list[ModelPath],
    options: RunOptions,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> RowProcessor | None:
    """The expert's own processor, or else the base's; None for a model without vision.

    Raises:
        CalibrationError: A vision-language model has none; without the model's name.
    """
    for place in places:
        if not _has(place, _PROCESSOR_FILES, options):
            continue
        require_pillow()
        try:
            processor = _from(AutoProcessor, place, options)
        except Exception as error:
            refuse_code(str(place), "its processor", error)
            or_install = "" if is_torchvision_available() else ", or install torchvision for it"
            raise CalibrationError(
                f"has images, but the processor of {place} can't be loaded: {quoted(error)}; mend "
                f"its files{or_install}"
            ) from error
        if isinstance(processor, ProcessorMixin) and hasattr(processor, "image_processor"):
            # The expert's, with which its other rows are read.
            processor.tokenizer = tokenizer
            processor.chat_template = processor.chat_template or tokenizer.chat_template
            return RowProcessor(processor, placeholders(config))
    if not hasattr(config, "vision_config"):
        return None
    raise CalibrationError(
        "has images, but neither the model nor its base has a processor: copy "
        "preprocessor_config.json, and processor_config.json if there is one, from the model that "
        "it was made from, or name another images column"
    )


def _from(kind: Any, place: ModelPath, options: RunOptions) -> Any:
    return kind.from_pretrained(
        place.path,
        revision=place.revision,
        trust_remote_code=options.trust_remote_code,
        cache_dir=options.transformers_cache,
    )


def _has(place: ModelPath, files: Collection[str], options: RunOptions) -> bool:
    """Whether a model's folder or repository has any of these files."""
    return any(
        cached_file(
            place.path,
            name,
            revision=place.revision,
            cache_dir=options.transformers_cache,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        for name in files
    )


def _length_limit(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int | None:
    """The longest sequence the model takes; a tokenizer that doesn't know has a huge number."""
    positions = getattr(config, "max_position_embeddings", None)
    limits = [limit for limit in (int(tokenizer.model_max_length), positions) if limit]
    return limit if (limit := min(limits)) < 1 << 24 else None


def _check_vocabulary(label: str, data: TokenizedCalibration, config: PretrainedConfig) -> None:
    """An unknown token would end in an IndexError, or on a GPU in a broken device."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    # What stands for an image need be no word.
    highest = max(
        set().union(*(sequence.ids for sequence in data.sequences)) - placeholders(config),
        default=0,
    )
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
        # Only where it has a part in the measurement, so that other files stay as they are.
        **({"date": data.date} if data.date else {}),
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
    differing = ["model"] if identity(has.model) != identity(wants.model) else []
    differing += [
        name
        for name in ("revision", "form", "fingerprint")
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


def _run(
    prepared: Prepared, options: RunOptions, ranks: Ranks
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """h under all its names, and for the header, what else was found."""
    label, path = prepared.expert.model, prepared.path
    calibration = prepared.expert.calibration
    measurement = _measurement(prepared.wanted)
    checkpoint = Checkpoint(path, {**measurement, "number of processes": ranks.world}, ranks.rank)
    for other, theirs in enumerate(ranks.all_gather(checkpoint.measurement)):
        if differing := different(theirs, checkpoint.measurement):
            raise CalibrationError(
                f"model {label}: process {other} has another {', '.join(differing)} than process "
                f"{ranks.rank}: give all processes the same files and packages"
            )
    with loaded(
        label,
        prepared.model,
        calibration.dtype,
        options,
        path.with_name(f".{path.name}.{ranks.rank}.offload"),
    ) as model:
        stored = set(prepared.model.names)
        check_loaded(model, prepared.model, prepared.wanted.fingerprint)
        # Before the run, which unties the tied among offloaded weights.
        names = weight_names(model, stored)
        try:
            capture = run_through(
                model,
                prepared.data.sequences,
                label=label,
                batch_size=calibration.batch_size,
                checkpoint=checkpoint,
                ranks=ranks,
                quiet=options.quiet,
            )
        except Exception as error:
            if isinstance(error, ObimError):
                raise
            if out_of_memory(error):
                raise does_not_fit(label, options, "its activations do") from error
            raise CalibrationError(
                f"model {label}: its forward pass failed on calibration data: {quoted(error)}"
            ) from error
        return _entries(model, capture, names, prepared.model)


def _measurement(wanted: SaliencyMetadata) -> dict[str, object]:
    """All that decides the sums, under the words to name it by; not how fast or where it runs."""
    return {
        "model": [wanted.model, wanted.revision],
        "set of weights": {name: x.model_dump() for name, x in wanted.fingerprint.items()},
        "form": wanted.form,
        **{f"calibration {key}": value for key, value in wanted.calibration.items()},
        "version of mergekit-obim": wanted.mergekit_obim_version,
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
    }


def _entries(
    model: PreTrainedModel,
    capture: CurvatureCapture,
    names: Mapping[str, tuple[str, ...]],
    opened: OpenModel,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """h under every name that a merge may ask for it; and for the header, what else was found."""
    stored = set(opened.names)
    h: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[str, list[int]]] = {}
    for parameter, curvature in capture.curvatures().items():
        h |= dict.fromkeys(names[parameter], curvature.h)
        if not any(name in stored for name in names[parameter]):
            h |= stored_parts(model, parameter, curvature.h, opened.shape)
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
        expert: OpenModel,
        base: OpenModel,
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
