"""``obim-saliency``: the pre-pass that measures every expert of a recipe."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_obim.commands.options import (
    FILE,
    NEW_FILE,
    GroupedHelp,
    batch_size,
    device_memory,
    shared_options,
    start_logging,
)
from mergekit_obim.errors import CheckpointError, RecipeError, one_line, told_as

# torch, transformers and mergekit are imported where they are needed: --help and a faulty
# recipe should answer at once.
if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration

    from mergekit_obim.calibration.options import RunOptions
    from mergekit_obim.calibration.ranks import Ranks
    from mergekit_obim.calibration.run import Measured
    from mergekit_obim.models.inspection import Opened
    from mergekit_obim.recipe.experts import Expert


class TwoUsages(GroupedHelp):
    """Help for a command that either measures the experts of a recipe or combines their files."""

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[OPTIONS] CONFIG OUT_DIR")
        formatter.write_usage(ctx.command_path, "--combine FILE FILE... -o NEW", "       ")


@click.command(
    "obim-saliency",
    cls=TwoUsages,
    groups={
        "Calibration": ("samples", "max_length", "batch_size", "seed", "dtype", "model"),
        "Correlations": ("sketch", "full_gram"),
        "Output": ("dense", "overwrite"),
        "Check": ("check", "fixed", "as_json"),
        "Combine": ("combine", "output"),
        "Hardware": ("device", "device_map", "max_memory"),
    },
)
@click.argument("config", type=FILE)
@click.argument("out_dir", type=click.Path(path_type=Path), required=False, metavar="OUT_DIR")
@click.argument("more", type=click.Path(path_type=Path), nargs=-1)
@click.option("--samples", type=click.IntRange(min=1), help="Rows per data source  [default: 100]")
@click.option(
    "--max-length", type=click.IntRange(min=1), help="Cut rows at this many tokens  [default: 512]"
)
@click.option(
    "--batch-size",
    type=batch_size,
    metavar="INTEGER|AUTO",
    help="Sequences per forward pass; changes the speed only  [default: auto]",
)
@click.option("--seed", type=int, help="Which rows are drawn  [default: 0]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    help="Of the forward pass  [default: the checkpoint's]",
)
@click.option("--model", multiple=True, help="Only this expert, as the recipe names it; repeatable")
@click.option(
    "--sketch",
    type=click.IntRange(min=0),
    help="Measure this many columns of each layer's Gram matrix too, for regmean  "
    "[default: 16 if the recipe's method is regmean, else 0]",
)
@click.option(
    "--full-gram",
    is_flag=True,
    help="Measure the whole Gram matrices, in bfloat16: larger than the model itself",
)
@click.option(
    "--dense", is_flag=True, help="Write full saliency tensors, as large as the model in fp32"
)
@click.option("--overwrite", is_flag=True, help="Replace files that were made from something else")
@click.option(
    "--check",
    is_flag=True,
    help="Measure nothing: list everything that is wrong with the recipe. Give OUT_DIR before the "
    "pre-pass, and leave it out before the merge",
)
@click.option(
    "--fix",
    "fixed",
    type=NEW_FILE,
    metavar="NEW",
    help="With --check: write a corrected recipe to this file, and say what was changed and why",
)
@click.option("--json", "as_json", is_flag=True, help="With --check: for machines")
@click.option(
    "--combine",
    is_flag=True,
    help="Measure nothing: write the token-weighted means of saliency files, as the saliency of a "
    "model that was merged from theirs",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="NEW",
    help="With --combine: the file to write",
)
@click.option(
    "--device", help="Device to run on  [default: an accelerator if there is one, else cpu]"
)
@click.option(
    "--device-map", help="Spread the model over devices, CPU and disk: accelerate's, as auto"
)
@click.option(
    "--max-memory",
    type=device_memory,
    metavar="DEVICE=SIZE",
    multiple=True,
    help="With --device-map; repeatable",
)
@shared_options
def main(
    config: Path,
    out_dir: Path | None,
    more: tuple[Path, ...],
    check: bool,
    fixed: Path | None,
    as_json: bool,
    combine: bool,
    output: Path | None,
    **options: Any,
) -> None:
    """Measure the saliency of every expert in a merge recipe.

    Loads each model of CONFIG but the base, runs its calibration inputs forward, and writes
    OUT_DIR/<model-name>.safetensors, for `parameters: {saliency: OUT_DIR}`.
    """
    if options["max_memory"] and not options["device_map"]:
        raise click.UsageError("--max-memory does nothing without --device-map; add it, as auto")
    if options["full_gram"] and options["sketch"] is not None:
        raise click.UsageError("--full-gram has all columns that --sketch could ask for; leave it")
    if (as_json or fixed) and not check:
        raise click.UsageError(f"--{'json' if as_json else 'fix'} does nothing without --check")
    start_logging(options.pop("verbosity"))
    if combine or output:
        if not (combine and output and out_dir):
            raise click.UsageError("--combine takes two or more files, and -o NEW")
        _combine([config, out_dir, *more], output, options["overwrite"])
        return
    if more:
        raise click.UsageError(f"Got unexpected extra argument ({more[0]})")
    if out_dir is not None and out_dir.is_file():
        raise click.UsageError(f"Invalid value for 'OUT_DIR': Directory '{out_dir}' is a file.")
    if out_dir is None and not check:
        raise click.UsageError("Missing argument 'OUT_DIR'.", click.get_current_context())
    if check:
        _check(config, out_dir, fixed, as_json, options)
    elif "RANK" not in os.environ:  # alone: torch can wait until the recipe is read
        _measure(config, out_dir, options)
    else:
        from mergekit_obim.calibration.ranks import joined

        with joined() as ranks:
            _measure(config, out_dir, options, ranks)


def _check(
    config: Path, out_dir: Path | None, fixed: Path | None, as_json: bool, options: dict[str, Any]
) -> None:
    """What the command does with --check."""
    from mergekit_obim.recipe.document import read_document, read_documents

    documents = read_documents(config) if fixed is None else [read_document(config)]
    overrides, only = _overrides(options), options.pop("model")
    if fixed and fixed.exists() and fixed.samefile(config):
        raise RecipeError(f"--fix {fixed}: is the recipe itself: name another file")
    if fixed and fixed.exists() and not options["overwrite"]:
        raise RecipeError(f"--fix {fixed}: is there already: name another file, or --overwrite")

    from mergekit_obim import checking
    from mergekit_obim.saliency.file import write_text

    run_options = _run_options(documents[0].content, options)
    if fixed is None:
        verdict = checking.check(documents, out_dir, run_options, overrides, only)
    else:
        text = config.read_bytes().decode()  # with the line ends that it has
        text, verdict = checking.fix(text, out_dir, run_options, overrides, only)
        write = bool(verdict.changes) or not verdict.errors
        if write:
            write_text(fixed, text)
        told = "written" if write else "not written: nothing could be put right by itself"
        click.echo(f"{fixed}: {told}", err=True)
    click.echo(verdict.to_json() if as_json else "\n".join(verdict.lines()))
    click.get_current_context().exit(1 if verdict.errors else 0)


def _measure(
    config: Path, out_dir: Path | None, options: dict[str, Any], ranks: Ranks | None = None
) -> None:
    """What the command does, in one process or in one of several."""
    assert out_dir is not None

    from mergekit_obim.recipe import recipe_faults
    from mergekit_obim.recipe.document import read_documents
    from mergekit_obim.recipe.experts import find_in_all
    from mergekit_obim.recipe.faults import labelled, raise_errors, warnings_of
    from mergekit_obim.recipe.keys import base_of

    documents, only = read_documents(config), options.pop("model")
    found = find_in_all(documents, _overrides(options), only)
    # What needs no mergekit to be seen is told at once; the parameters' turn comes once it is here.
    faults = []
    for document, experts in zip(documents, found, strict=True):
        faults += labelled([*recipe_faults(document), *experts.faults], document.label)
        faults += labelled(experts.uncalibrated.values(), document.label)
    raise_errors(faults)

    from mergekit.common import ModelReference

    from mergekit_obim import checking
    from mergekit_obim.calibration.ranks import Ranks
    from mergekit_obim.calibration.run import Prepared, measure, prepare_expert
    from mergekit_obim.dry_run import read_recipe

    ranks = ranks or Ranks()
    run_options = _run_options(documents[0].content, options, ranks.local)
    faults, merges = [], []
    for document, experts in zip(documents, found, strict=True):
        merge, wrong = read_recipe(document)
        merges.append(merge)
        faults += labelled([*wrong, *experts.faults], document.label)
    raise_errors(faults)
    for fault in warnings_of(faults) if ranks.first else ():
        click.echo(f"Warning: {fault}", err=True)
    with told_as(RecipeError, f"{out_dir}: cannot be written to", OSError):
        out_dir.mkdir(parents=True, exist_ok=True)

    jobs: list[tuple[Prepared, RunOptions]] = []
    # All are checked before the first is run: a fault in the last recipe entry shows at once.
    for document, merge, experts in zip(documents, merges, found, strict=True):
        assert merge is not None  # else there were errors
        own = replace(run_options, merge_dtype=document.content.get("dtype"))
        base = ModelReference.model_validate(base_of(document)) if base_of(document) else None
        opened = ranks.local_first(partial(_inspected, merge, base, experts.measured, own, ranks))
        prepare = partial(
            prepare_expert,
            base_model=base,
            models=opened.models,
            out_dir=out_dir,
            options=own,
            ranks=ranks,
        )
        prepared = ranks.local_first(partial(list[Prepared], map(prepare, experts.measured)))
        for warning in checking.weight_warnings(prepared, base, opened) if ranks.first else ():
            click.echo(f"Warning: {warning}", err=True)
        jobs += [(one, own) for one in prepared]
    for number, (one, own) in enumerate(jobs, 1):
        measured = measure(one, own, ranks)
        if measured is None:
            continue  # the first process says it
        for warning in measured.warnings:
            click.echo(f"Warning: {measured.model}: {warning}", err=True)
        if not own.quiet:
            click.echo(f"[{number}/{len(jobs)}] {_summary(measured)}")


def _combine(paths: list[Path], output: Path, overwrite: bool) -> None:
    """What the command does with --combine."""
    if output.exists() and (not overwrite or any(output.samefile(path) for path in paths)):
        raise RecipeError(
            f"--output {output}: is there already: name another file"
            + ("" if overwrite else ", or give --overwrite")
        )

    from mergekit_obim.saliency.combine import combine

    with told_as(RecipeError, f"{output}: cannot be written", OSError):
        file = combine(paths, output)
    click.echo(
        f"{output}: {len(file.shapes)} tensors of "
        + ", ".join(
            f"{one['model']} ({one['tokens']:,} tokens)"
            for one in file.metadata.calibration["combined"]
        )
    )
    if left := len(file.metadata.unscored):
        click.echo(f"Warning: {left} tensors are not in every file, and left unscored", err=True)


def _inspected(
    merge: MergeConfiguration,
    base: ModelReference | None,
    experts: Sequence[Expert],
    options: RunOptions,
    ranks: Ranks,
) -> Opened:
    """The experts to measure and their base, opened and looked at.

    Raises:
        ObimError: Some of them cannot be measured, or not be merged; the message names them all.
    """
    from mergekit.common import ModelReference

    from mergekit_obim.models import inspection
    from mergekit_obim.recipe.faults import raise_errors

    opened = inspection.open_models([base] if base else [], options)
    # What is to be measured is downloaded, and its adapter merged, if need be.
    wanted = [ModelReference.model_validate(expert.reference) for expert in experts]
    fetched = inspection.open_models(wanted, options, fetch=True)
    opened.models |= fetched.models
    found = [*opened.faults, *fetched.faults]
    aligned = inspection.is_aligned(merge)
    found += inspection.inspect_models(opened.models, base, options, aligned=aligned, merging=False)
    if base in opened.absent:
        with suppress(CheckpointError):  # only the merge needs it
            found += inspection.inspect_absent(base, options)
    raise_errors(found)
    for fault in found if ranks.first else ():
        click.echo(f"Warning: {fault}", err=True)
    return opened


def _overrides(options: dict[str, Any]) -> dict[str, Any]:
    names = ("samples", "max_length", "batch_size", "seed", "dtype", "sketch")
    overrides = {name: options.pop(name) for name in names}
    return {**overrides, "sketch": "full"} if options.pop("full_gram") else overrides


def _run_options(recipe: Mapping[str, Any], options: dict[str, Any], number: int = 0) -> RunOptions:
    """Where and how to run, of the options that are left; ``number`` as in :func:`_device`."""
    from transformers.utils.logging import disable_progress_bar

    from mergekit_obim.calibration.options import RunOptions

    # transformers shows a bar of its own for every model it loads; accelerate warns that
    # offloaded weights are offloaded.
    disable_progress_bar()
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    options["device"] = _device(options["device"], number)
    options["max_memory"] = dict(options["max_memory"])
    return RunOptions(merge_dtype=recipe.get("dtype"), **options)


def _device(asked: str | None, number: int) -> str:
    """The device to run on; without an index, the one with this process's number on its machine."""
    import torch

    device = asked
    if device is None:
        found = torch.accelerator.current_accelerator()
        device = str(found) if found else "cpu"
    if number and ":" not in device and device != "cpu":
        device = f"{device}:{number % max(1, torch.accelerator.device_count())}"
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises several kinds
        raise RecipeError(
            f"--device {device}: torch cannot use it here ({one_line(error)}); leave "
            "--device out to take what there is"
        ) from error
    return device


def _summary(measured: Measured) -> str:
    total = measured.scored + len(measured.unscored)
    lines = [
        f"{measured.model} → {measured.path}"
        + (" (kept: nothing has changed)" if measured.kept else ""),
        f"scored {measured.scored} of {total} tensors on {measured.tokens:,} tokens "
        f"in {measured.samples:,} samples",
    ]
    reasons: dict[str, list[str]] = {}
    for name, reason in measured.unscored.items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"unscored, {reason}: {', '.join(names)}" for reason, names in reasons.items()]
    return "\n      ".join(lines)


if __name__ == "__main__":
    sys.exit(main())
