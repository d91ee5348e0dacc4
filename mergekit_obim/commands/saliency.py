"""``obim-saliency``: the pre-pass that measures every expert of a recipe."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_obim.commands.options import (
    DTYPES,
    FILE,
    NEW_FILE,
    GroupedHelp,
    batch_size,
    check_hardware,
    hardware_options,
    run_options,
    shared_options,
    start_logging,
)
from mergekit_obim.errors import CheckpointError, RecipeError, told_as

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


class Usages(GroupedHelp):
    """Help for a command that measures the experts of a recipe, or does without measuring."""

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[OPTIONS] CONFIG OUT_DIR")
        formatter.write_usage(ctx.command_path, "--combine FILE FILE... -o NEW", "       ")
        formatter.write_usage(ctx.command_path, "--from-imatrix FILE MODEL -o NEW", "       ")
        formatter.write_usage(ctx.command_path, "--to-imatrix FILE -o NEW", "       ")


@click.command(
    "obim-saliency",
    cls=Usages,
    groups={
        "Calibration": ("samples", "max_length", "batch_size", "seed", "dtype", "model"),
        "Correlations": ("sketch", "full_gram"),
        "Output": ("dense", "overwrite"),
        "Check": ("check", "fixed", "as_json"),
        "Publish": ("push", "create_pr", "private"),
        "Combine": ("combine", "output"),
        "Imatrix": ("from_imatrix", "to_imatrix"),
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
    type=click.Choice(DTYPES),
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
    "--push",
    metavar="ORG/REPO",
    help="Commit the files to a repository on the Hub: a single expert's where a recipe that names "
    "this repository as its model finds it",
)
@click.option("--create-pr", is_flag=True, help="With --push: open a pull request instead")
@click.option("--private", is_flag=True, help="With --push: make the repository private, if new")
@click.option(
    "--combine",
    is_flag=True,
    help="Measure nothing: write the token-weighted means of saliency files, as the saliency of a "
    "model that was merged from theirs",
)
@click.option(
    "--from-imatrix",
    is_flag=True,
    help="Measure nothing: write the saliency of a model from its importance matrix, as llama.cpp "
    "makes it",
)
@click.option(
    "--to-imatrix",
    is_flag=True,
    help="Measure nothing: write an importance matrix for llama.cpp from a saliency file",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="NEW",
    help="With --combine, --from-imatrix or --to-imatrix: the file to write",
)
@hardware_options
@shared_options
def main(
    config: Path,
    out_dir: Path | None,
    more: tuple[Path, ...],
    check: bool,
    fixed: Path | None,
    as_json: bool,
    push: str | None,
    create_pr: bool,
    private: bool,
    combine: bool,
    from_imatrix: bool,
    to_imatrix: bool,
    output: Path | None,
    **options: Any,
) -> None:
    """Measure the saliency of every expert in a merge recipe.

    Loads each model of CONFIG but the base, runs its calibration inputs forward, and writes
    OUT_DIR/<model-name>.safetensors, for `parameters: {saliency: OUT_DIR}`.
    """
    check_hardware(options)
    if options["full_gram"] and options["sketch"] is not None:
        raise click.UsageError("--full-gram has all columns that --sketch could ask for; leave it")
    if (as_json or fixed) and not check:
        raise click.UsageError(f"--{'json' if as_json else 'fix'} does nothing without --check")
    if (create_pr or private) and not push:
        raise click.UsageError(f"--{'create-pr' if create_pr else 'private'} goes with --push")
    if push and (check or combine or from_imatrix or to_imatrix or options["dense"]):
        raise click.UsageError("--push publishes what is measured, in factored form: give it alone")
    if push and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", push):
        raise click.UsageError(f"--push {push}: is no repository on the Hub: write ORG/REPO")
    start_logging(options.pop("verbosity"))
    files = [config, *([out_dir] if out_dir else []), *more]
    modes = {"combine": combine, "from-imatrix": from_imatrix, "to-imatrix": to_imatrix}
    if asked := [mode for mode, given in modes.items() if given] or (["combine"] if output else []):
        fits = {
            "combine": len(files) > 1,
            "from-imatrix": len(files) == 2,
            "to-imatrix": not files[1:],
        }
        if not (any(modes.values()) and output and fits[asked[0]]) or asked[1:]:
            raise click.UsageError(f"--{asked[0]} takes {_TAKES[asked[0]]}, and -o NEW")
        _convert(asked[0], files, output, options)
        return
    if more:
        raise click.UsageError(f"Got unexpected extra argument ({more[0]})")
    if out_dir is not None and out_dir.is_file():
        raise click.UsageError(f"Invalid value for 'OUT_DIR': Directory '{out_dir}' is a file.")
    if out_dir is None and not check:
        raise click.UsageError("Missing argument 'OUT_DIR'.", click.get_current_context())
    if check:
        _check(config, out_dir, fixed, as_json, options)
        return
    publish = (push, create_pr, private) if push else None
    if "RANK" not in os.environ:  # alone: torch can wait until the recipe is read
        _measure(config, out_dir, options, publish)
    else:
        from mergekit_obim.calibration.ranks import joined

        with joined() as ranks:
            _measure(config, out_dir, options, publish, ranks)


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

    running = run_options(documents[0].content, options)
    if fixed is None:
        verdict = checking.check(documents, out_dir, running, overrides, only)
    else:
        text = config.read_bytes().decode()  # with the line ends that it has
        text, verdict = checking.fix(text, out_dir, running, overrides, only)
        write = bool(verdict.changes) or not verdict.errors
        if write:
            write_text(fixed, text)
        told = "written" if write else "not written: nothing could be put right by itself"
        click.echo(f"{fixed}: {told}", err=True)
    click.echo(verdict.to_json() if as_json else "\n".join(verdict.lines()))
    click.get_current_context().exit(1 if verdict.errors else 0)


def _measure(
    config: Path,
    out_dir: Path | None,
    options: dict[str, Any],
    publish: tuple[str, bool, bool] | None,
    ranks: Ranks | None = None,
) -> None:
    """What the command does, in one process or in one of several.

    `publish` is the repository to commit to, whether by a pull request, and whether it is private.
    """
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
    from mergekit_obim.saliency.file import PUBLISHED_NAME
    from mergekit_obim.saliency.publish import check_login
    from mergekit_obim.saliency.publish import publish as push

    ranks = ranks or Ranks()
    if publish:
        ranks.local_first(partial(check_login, publish[0]))
    running = run_options(documents[0].content, options, ranks.local)
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
        own = replace(running, merge_dtype=document.content.get("dtype"))
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
    files: dict[str, Path] = {}
    for number, (one, own) in enumerate(jobs, 1):
        measured = measure(one, own, ranks)
        if measured is None:
            continue  # the first process says it
        # A single expert's where a recipe that names the repository as its model looks for it.
        files[PUBLISHED_NAME if len(jobs) == 1 else measured.path.name] = measured.path
        for warning in measured.warnings:
            click.echo(f"Warning: {measured.model}: {warning}", err=True)
        if not own.quiet:
            click.echo(f"[{number}/{len(jobs)}] {_summary(measured)}")
    if publish and files:
        repo, create_pr, private = publish
        address = push(files, repo, create_pr=create_pr, private=private or None)
        click.echo(f"{repo}: {', '.join(files)} → {address}")


# What stands where a recipe and a folder stand otherwise.
_TAKES = {
    "combine": "two or more files",
    "from-imatrix": "an imatrix and its model",
    "to-imatrix": "one saliency file",
}


def _convert(mode: str, files: list[Path], output: Path, options: dict[str, Any]) -> None:
    """What the command does with --combine, --from-imatrix or --to-imatrix."""
    overwrite = options["overwrite"]
    if output.exists() and (
        not overwrite or any(path.exists() and output.samefile(path) for path in files)
    ):
        raise RecipeError(
            f"--output {output}: is there already: name another file"
            + ("" if overwrite else ", or give --overwrite")
        )
    with told_as(RecipeError, f"{output}: cannot be written", OSError):
        if mode == "combine":
            _combine(files, output)
        elif mode == "from-imatrix":
            _from_imatrix(files[0], files[1], output, options)
        else:
            _to_imatrix(files[0], output)


def _combine(paths: list[Path], output: Path) -> None:
    from mergekit_obim.saliency.combine import combine

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


_ACCESS = ("trust_remote_code", "transformers_cache", "lora_merge_cache")


def _from_imatrix(path: Path, model: Path, output: Path, options: dict[str, Any]) -> None:
    from mergekit.common import ModelReference
    from mergekit.options import MergeOptions

    from mergekit_obim.models.imatrix import imatrix_saliency
    from mergekit_obim.models.opened import open_model
    from mergekit_obim.saliency.file import write_saliency

    access = MergeOptions(**{name: options[name] for name in _ACCESS})
    opened = open_model(ModelReference.parse(str(model)), access)
    file = imatrix_saliency(path, opened, access)
    write_saliency(output, file.shapes, file.__getitem__, file.metadata)
    click.echo(f"{output}: {len(file.shapes)} tensors of model {model}, from {path}")
    if left := file.metadata.unscored:
        click.echo(f"unscored, {len(left)} tensors that it lacks: {', '.join(left)}")
    for warning in file.warnings():
        click.echo(f"Warning: {warning}", err=True)


def _to_imatrix(path: Path, output: Path) -> None:
    from mergekit_obim.models.imatrix import write_saliency_as_imatrix
    from mergekit_obim.saliency.file import SaliencyFile

    file = SaliencyFile(path)
    file.check_values()
    left = write_saliency_as_imatrix(file, output)
    click.echo(f"{output}: {len(file.shapes) - len(left)} tensors of model {file.metadata.model}")
    if left:
        click.echo(f"left out, as an imatrix does not hold them: {', '.join(left)}")


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
