"""``obim-tune``: the recipe, tuned by what the experts say on rows that were set aside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_obim.commands.options import (
    DTYPES,
    FILE,
    NEW_FILE,
    BatchSize,
    GroupedHelp,
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


@click.command(
    "obim-tune",
    cls=GroupedHelp,
    groups={
        "Objective": ("objective", "worst_case", "rows"),
        "Search": ("trials", "space", "weights", "seed"),
        "Output": ("output", "overwrite"),
        "Forward passes": ("batch_size", "max_length", "dtype"),
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
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=32,
    help="Rows to set aside for each expert  [default: 32]",
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=32,
    help="Merges to try, those that are always tried included  [default: 32]",
)
@click.option("--space", type=FILE, help="What to try, in a file like the default one")
@click.option("--weights", is_flag=True, help="Also give each expert a weight of its own")
@click.option("--seed", type=int, default=0, help="Of the search  [default: 0]")
@click.option("--overwrite", is_flag=True, help="Replace TUNED if it is there")
@click.option("--batch-size", type=BatchSize(), help="Sequences per forward pass  [default: auto]")
@click.option(
    "--max-length", type=click.IntRange(min=1), help="Cut rows at this many tokens  [default: 512]"
)
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Of the forward passes  [default: the weights']"
)
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
        overrides={name: options.pop(name) for name in ("batch_size", "max_length", "dtype")},
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
    names = [label.rstrip("/").rpartition("/")[2] or label for label in tuned.labels]
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
