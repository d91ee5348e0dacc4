"""Measuring one expert, from its recipe entry to its saliency file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from tqdm import tqdm

from mergekit_obim.calibration.data import TokenizedCalibration
from mergekit_obim.calibration.data.self_written import read_rows, save_rows
from mergekit_obim.calibration.loading import does_not_fit, loaded
from mergekit_obim.calibration.memory import out_of_memory
from mergekit_obim.calibration.opening import CalibrationReader, open_calibration
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.calibration.products import Products, run_with_products
from mergekit_obim.calibration.ranks import Ranks
from mergekit_obim.calibration.recording import (
    calibration_record,
    cannot_be_written,
    entries,
    expected_metadata,
    kept_file,
    measurement,
    pooled_warnings,
    write_measured,
)
from mergekit_obim.calibration.resume import Checkpoint, different, remove_leftovers
from mergekit_obim.calibration.writing import cannot_write, write_rows
from mergekit_obim.errors import CalibrationError, ObimError, SaliencyFileError, quoted
from mergekit_obim.models.loaded import check_loaded
from mergekit_obim.models.locking import locked
from mergekit_obim.models.names import weight_names
from mergekit_obim.models.opened import OpenModel, open_model
from mergekit_obim.recipe.calibration import SELF
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
        reader: Reads the data.
        own_rows: The file of the rows that the expert writes itself, if it is to write any.
        unwritten: Whether it has yet to write them; then `data` and `wanted` lack them.
    """

    expert: Expert
    path: Path
    model: OpenModel
    data: TokenizedCalibration
    wanted: SaliencyMetadata
    kept: SaliencyFile | None
    base: OpenModel | None
    reader: CalibrationReader
    own_rows: Path | None
    unwritten: bool


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
    reader = open_calibration(expert, [reference, *([base] if base else [])], model, options)
    own_rows = None
    if reader.writing:
        own_rows = path.with_name(reader.writing.file_name(path.stem, model.digest()))
    unwritten = own_rows is not None and not own_rows.exists()
    data = _read(reader, own_rows, None if unwritten or own_rows is None else read_rows(own_rows))
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
    if ranks.first and path.exists() and not (unwritten and _was_measured_on(path, own_rows)):
        kept = kept_file(path, wanted, options.overwrite)
    return Prepared(
        expert, path, model, data, wanted, kept, base_weights, reader, own_rows, unwritten
    )


def _read(
    reader: CalibrationReader, own_rows: Path | None, rows: Sequence[list[int]] | None
) -> TokenizedCalibration:
    """Read an expert's data; `rows` are its own, of the file `own_rows`, if they are written."""
    data = reader.read(rows)
    for source in data.sources:
        if own_rows and source["data"] == SELF:
            source["file"] = own_rows.name
    return data


def _was_measured_on(path: Path, own_rows: Path | None) -> bool:
    """Return whether a saliency file is of the rows that an expert is about to write again."""
    with suppress(SaliencyFileError):
        # As text, since a file of another program may have anything there.
        return own_rows is not None and own_rows.name in str(
            SaliencyFile(path).metadata.calibration
        )
    return False


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
        prepared = _with_own_rows(prepared, options, ranks)
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


def _with_own_rows(prepared: Prepared, options: RunOptions, ranks: Ranks) -> Prepared:
    """Have the expert write its own rows, if it is to write any and has not; all processes call it.

    The first process reads or writes them, and gives them to the others, whose disk may not have
    the file.
    """
    path = prepared.own_rows
    if path is None or not any(ranks.all_gather(prepared.unwritten)):
        return prepared
    rows = None
    if ranks.first:
        if not path.exists():  # as another command may have written it meanwhile
            _write_own_rows(prepared, path, options, ranks)
        rows = read_rows(path)
    rows = ranks.all_gather(rows)[0]
    data = _read(prepared.reader, path, rows)
    record = calibration_record(prepared.expert.calibration, data, prepared.model.config)
    calibration = {**prepared.wanted.calibration, **record}
    wanted = prepared.wanted.model_copy(update={"calibration": calibration})
    return replace(prepared, data=data, wanted=wanted, unwritten=False)


def _write_own_rows(prepared: Prepared, path: Path, options: RunOptions, ranks: Ranks) -> None:
    """Load the expert, and have it write the file of its own rows."""
    label, reader = prepared.expert.model, prepared.reader
    assert reader.writing is not None
    remove_leftovers(path)
    offload = path.with_name(f".{prepared.path.name}.{ranks.rank}.offload")
    with loaded(
        label, prepared.model, prepared.expert.calibration.dtype, options, offload
    ) as model:
        check_loaded(model, prepared.model, prepared.wanted.fingerprint)
        try:
            rows = write_rows(
                model, reader.writing, label=label, quiet=options.quiet, check=ranks.check
            )
        except Exception as error:
            if out_of_memory(error):
                raise does_not_fit(label, options, "what it keeps as it writes does") from error
            raise cannot_write(label, error) from error
    try:
        save_rows(path, rows, reader.tokenizer, reader.writing.opening)
    except OSError as error:
        raise cannot_be_written(path, label, error) from error


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
        sources = check_loaded(model, prepared.model, prepared.wanted.fingerprint)
        # Before the run, which unties the tied among offloaded weights.
        names = weight_names(model, sources)
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
