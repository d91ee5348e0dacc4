"""``obim-tune`` and ``obim-eval``: merges judged by the experts on rows that were set aside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

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
from mergekit_obim.errors import RecipeError
from mergekit_obim.recipe.document import read_document

if TYPE_CHECKING:
    from mergekit_obim.tuning.run import Settings, Tuned

F = TypeVar("F", bound=Callable[..., Any])
_PASSES = ("batch_size", "max_length", "dtype")

rows_option = click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=32,
    help="Rows to set aside for each expert  [default: 32]",
)


def pass_options(command: F) -> F:
    """Add the options of forward passes, which replace what the recipe says of each model's."""
    for option in (
        click.option("--dtype", type=click.Choice(DTYPES), help="[default: the weights']"),
        click.option(
            "--max-length",
            type=click.IntRange(min=1),
            help="Cut rows at this many tokens  [default: the recipe's, or 512]",
        ),
        click.option(
            "--batch-size",
            type=batch_size,
            metavar="INTEGER|AUTO",
            help="Sequences per forward pass  [default: auto]",
        ),
    ):
        command = option(command)
    return command


def _overrides(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options.pop(name) for name in _PASSES}


@click.command(
    "obim-tune",
    cls=GroupedHelp,
    groups={
        "Objective": ("objective", "worst_case", "rows"),
        "Search": ("trials", "space", "weights", "seed"),
        "Output": ("output", "overwrite"),
        "Forward passes": _PASSES,
        "Hardware": ("device", "device_map", "max_memory"),
    },
)
@click.argument("recipe", type=FILE)
@click.option(
    "-o", "--output", type=NEW_FILE, required=True, metavar="TUNED", help="The recipe to write"
)
@click.option(
    "--objective",
    type=click.Choice(["kl", "loss"]),
    default="kl",
    help="How far the merge is from each expert's own predictions, or from the rows' own next "
    "tokens  [default: kl]",
)
@click.option("--worst-case", is_flag=True, help="Rank by the worst expert, not by their mean")
@rows_option
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=32,
    help="Merges to try, the base, the average and RECIPE itself included  [default: 32]",
)
@click.option("--space", type=FILE, help="What to try, in a file like the default one")
@click.option("--weights", is_flag=True, help="Also give each expert a weight of its own")
@click.option("--seed", type=int, default=0, help="Of the search  [default: 0]")
@click.option("--overwrite", is_flag=True, help="Replace TUNED if it is there")
@pass_options
@hardware_options
@shared_options
def tune(recipe: Path, output: Path, overwrite: bool, **options: Any) -> None:
    """Find out how RECIPE's experts are best merged, and write the recipe of that.

    Sets rows of each expert's calibration data aside, merges the experts in many ways, and ranks
    the merges by how far each is from every expert's own predictions on that expert's rows. Needs
    no labels. Killed, the same command goes on where it stopped.
    """
    check_hardware(options)
    start_logging(options.pop("verbosity"))
    document = read_document(recipe)
    if output.exists() and output.samefile(recipe):
        raise RecipeError(f"--output {output}: is the recipe itself: name another file")
    if output.exists() and not overwrite:
        raise RecipeError(f"--output {output}: is there already: name another file, or --overwrite")

    from mergekit_obim.saliency.file import write_text
    from mergekit_obim.tuning.candidates import DEFAULT_SPACE
    from mergekit_obim.tuning.run import Settings, described
    from mergekit_obim.tuning.run import tune as find

    settings = Settings(
        kind=options.pop("objective"),
        worst_case=options.pop("worst_case"),
        trials=options.pop("trials"),
        rows=options.pop("rows"),
        space=options.pop("space") or DEFAULT_SPACE,
        weights=options.pop("weights"),
        seed=options.pop("seed"),
        overrides=_overrides(options),
    )
    running = run_options(document.content, options)
    tuned = find(recipe.read_bytes().decode(), output, settings, running)
    write_text(output, tuned.text)
    if not running.quiet:
        click.echo(f"Ranked by {described(settings)}:\n")
        click.echo("\n".join(_table(tuned, settings)))
        click.echo(f"\n{output}: {tuned.tried[0].candidate.label}")


def _table(tuned: Tuned, settings: Settings) -> Iterator[str]:
    """Yield the lines of a table of what was tried, the best first."""
    names = [label.rstrip("/").rpartition("/")[2] for label in tuned.labels]
    names = names if len(set(names)) == len(names) else tuned.labels
    head = ["", *names, "merge"]
    rows = [
        [
            f"{one.value:.4g}",
            *(f"{one.part(label, settings.kind):.4g}" for label in tuned.labels),
            one.told,
        ]
        for one in tuned.tried
    ]
    widths = [max(8, *(len(row[k]) for row in (head, *rows))) for k in range(len(head) - 1)]
    for row in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        yield "  ".join([*cells, row[-1]])


@click.command(
    "obim-eval",
    cls=GroupedHelp,
    groups={
        "Input": ("recipe", "rows", "tasks"),
        "Output": ("as_json", "card"),
        "Forward passes": _PASSES,
        "Hardware": ("device", "device_map", "max_memory"),
    },
)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--recipe", type=FILE, required=True, help="The recipe that names experts and data")
@rows_option
@click.option(
    "--tasks", help="Also run these tasks of lm-evaluation-harness: names or YAML files, by commas"
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON, for machines")
@click.option("--card", is_flag=True, help="Write the results into each MODEL's README.md")
@pass_options
@hardware_options
@shared_options
def evaluate(
    models: tuple[str, ...],
    recipe: Path,
    rows: int,
    tasks: str | None,
    as_json: bool,
    card: bool,
    **options: Any,
) -> None:
    """Measure how much of each expert's gain MODELs have, on rows that were set aside.

    A MODEL is a merge of RECIPE's experts, made by anything. For each expert, on its own rows:
    the loss, the divergence from the expert, and the share of its gain over the base.
    """
    check_hardware(options)
    start_logging(options.pop("verbosity"))
    document = read_document(recipe)
    folders = [model for model in models if not Path(model).is_dir()]
    if card and folders:
        raise RecipeError(f"--card: {folders[0]} is no folder here, so its card cannot be written")

    from mergekit_obim.tuning.benchmarks import check_tasks, run_tasks
    from mergekit_obim.tuning.card import write_results
    from mergekit_obim.tuning.evaluation import evaluate as measure
    from mergekit_obim.tuning.evaluation import tables
    from mergekit_obim.tuning.run import open_session

    wanted = [task.strip() for task in tasks.split(",")] if tasks else []
    if wanted:
        check_tasks(wanted)
    overrides = _overrides(options)
    running = run_options(document.content, options)
    with TemporaryDirectory(prefix="mergekit-obim-") as made:
        session = open_session(document, overrides, rows, Path(made), running)
        found = measure(models, session, Path(made), running)
        for model in models if wanted else ():
            found.tasks[model] = run_tasks(
                model,
                wanted,
                Path(made),
                running,
                dtype=overrides["dtype"],
                batch_size=overrides["batch_size"],
            )
    click.echo(
        json.dumps(asdict(found), indent=1) if as_json else "\n".join(tables(found)).rstrip()
    )
    for model in models if card else ():
        path = write_results(Path(model), found, model)
        click.echo(f"{path}: has these results", err=True)
