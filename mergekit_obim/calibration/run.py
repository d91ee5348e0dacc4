"""Measuring one expert, from its recipe entry to its saliency file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from tqdm import tqdm

from mergekit_obim.calibration.data import TokenizedCalibration
from mergekit_obim.calibration.loading import does_not_fit, loaded
from mergekit_obim.calibration.memory import out_of_memory
from mergekit_obim.calibration.opening import read_calibration
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.calibration.products import Products, run_with_products
from mergekit_obim.calibration.ranks import Ranks
from mergekit_obim.calibration.recording import (
    cannot_be_written,
    entries,
    expected_metadata,
    kept_file,
    measurement,
    pooled_warnings,
    write_measured,
)
from mergekit_obim.calibration.resume import Checkpoint, different, remove_leftovers
from mergekit_obim.errors import CalibrationError, ObimError, quoted
from mergekit_obim.models.loaded import check_loaded
from mergekit_obim.models.locking import locked
from mergekit_obim.models.names import weight_names
from mergekit_obim.models.opened import OpenModel, open_model
from mergekit_obim.recipe.experts import Expert
from mergekit_obim.saliency.file import SaliencyFile, SaliencyMetadata, saliency_file_name


@dataclass(frozen=True)
class Measured:
    """What became of one expert.

    Attributes:
        model: The expert's reference, as the recipe has it.
        path: Its saliency file.
        kept: The file was there already, made from the same weights, data and settings.
        scored: How many of the checkpoint's tensors have a saliency.
        unscored: The tensors that have none, and why.
        samples: How many rows it was measured on.
        tokens: How many tokens they have.
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
        expert: The expert, with its calibration.
        path: The file to write.
        model: Its checkpoint, of which nothing but headers and samples was read.
        data: What it is measured on.
        wanted: The file's metadata, but for what the run will find.
        kept: The file that is there already, if it is the one that would be written.
        base: The base's checkpoint, for a dense file.
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
    data = read_calibration(expert, [reference, *([base] if base else [])], model.config, options)
    base_weights = None
    if options.dense and expert.calibration.sketch:
        raise CalibrationError(
            f"model {expert.model}: a dense file holds δ²·h and no sketch: leave --dense out, or "
            "give --sketch 0"
        )
    if options.dense:
        if base is None:
            raise CalibrationError(
                f"model {expert.model}: --dense needs the weights that it was fine-tuned from: add "
                "a top-level base_model to the recipe, or leave --dense out"
            )
        base_weights = models[base] if base in models else open_model(base, options)
    wanted = expected_metadata(expert, model, data, options, base_weights)
    kept = None
    if ranks.first and path.exists():
        kept = kept_file(path, wanted, options.overwrite)
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
            prepared = replace(prepared, kept=kept_file(path, prepared.wanted, options.overwrite))
        # The others wait here for the first, which waits for other commands.
        kept = ranks.all_gather(prepared.kept is not None)[0]
        if not ranks.local:
            remove_leftovers(path, sums=kept)
        if kept:
            return _measured(prepared, prepared.kept) if prepared.kept else None
        h, products, found = _run(prepared, options, ranks)
        if ranks.first:
            metadata = prepared.wanted.model_copy(update=found)
            write_measured(path, h, products, metadata, prepared.model, prepared.base)
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
                raise cannot_be_written(prepared.path, prepared.expert.model, error) from error
            # A file that is kept may be in a folder that only others can write to.
        yield


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
        [*prepared.data.warnings, *pooled_warnings(metadata.experts)],
    )


def _run(
    prepared: Prepared, options: RunOptions, ranks: Ranks
) -> tuple[dict[str, torch.Tensor], Products, dict[str, Any]]:
    """Load the expert and run it.

    Returns:
        h, what was measured beside it, and metadata: see :func:`~.recording.entries`.
    """
    label, path = prepared.expert.model, prepared.path
    calibration = prepared.expert.calibration
    # Each process sums up its own share of the data, which depends on how many there are.
    decisive = {**measurement(prepared.wanted), "number of processes": ranks.world}
    checkpoint = Checkpoint(path, decisive, ranks.rank)
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
            capture, products = run_with_products(
                model,
                prepared.data.sequences,
                columns=calibration.sketch,
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
        h, found = entries(model, capture, products, names, prepared.model)
        return h, products, found
