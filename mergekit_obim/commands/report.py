"""``obim-report`` and ``obim-card``: what each expert contributed to a merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mergekit_obim.commands.options import (
    FILE,
    FOLDER,
    NEW_FILE,
    GroupedHelp,
    merge_options,
    shared_options,
)
from mergekit_obim.errors import RecipeError, one_line
from mergekit_obim.recipe.document import read_document


@click.command("obim-card", cls=GroupedHelp, groups={"Input": ("recipe", "no_shares")})
@click.argument("merged", type=FOLDER, metavar="MERGED_DIR")
@click.option(
    "--recipe", type=FILE, help="The recipe of the merge  [default: MERGED_DIR/mergekit_config.yml]"
)
@click.option(
    "--no-shares",
    is_flag=True,
    help="Do not count each expert's weights, or predict its error: takes seconds only",
)
@shared_options
def card(merged: Path, recipe: Path | None, no_shares: bool, **options: Any) -> None:
    """Add to a merged model's card how many of the weights are each expert's.

    Goes through the merge that made MERGED_DIR once more, without merging, and writes a section
    into its README.md: experts, shares (or predicted errors, where no weight has a single owner),
    calibration, saliency files, version. The card's metadata
    gets tags, base models and calibration data sets. Run it where mergekit-yaml ran. Running it
    again replaces the section.
    """
    path = recipe or merged / "mergekit_config.yml"
    if not path.exists():
        raise RecipeError(
            f"{merged}: has no mergekit_config.yml, which mergekit writes with the card: name the "
            "recipe with --recipe"
        )
    content = read_document(path).content
    merging = merge_options(options)

    from mergekit_obim.dry_run import read_config
    from mergekit_obim.report.card import write_section

    source = path.read_text(encoding="utf-8")
    written = write_section(merged, read_config(content), source, merging, shares=not no_shares)
    if not merging.quiet:
        click.echo(f"{written}: described how the experts were merged")


@click.command(
    "obim-report",
    cls=GroupedHelp,
    groups={"Input": ("merged",), "Output": ("output", "as_json")},
)
@click.argument("recipe", type=FILE)
@click.option(
    "--merged", type=FOLDER, help="The merged model, to check that the recipe still makes it"
)
@click.option(
    "-o", "--output", type=NEW_FILE, help="The HTML file to write  [default: obim-report.html]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers instead, for machines")
@shared_options
def report(
    recipe: Path, merged: Path | None, output: Path | None, as_json: bool, **options: Any
) -> None:
    """Show what each expert contributes to a merge, in one self-contained HTML file.

    Goes through the merge of RECIPE without merging. Run it where mergekit-yaml runs. With both
    --json and --output the numbers are printed and the file is written.
    """
    content = read_document(recipe).content
    merging = merge_options(options)

    from mergekit_obim.dry_run import read_config
    from mergekit_obim.report.gather import gather
    from mergekit_obim.report.summary import summarize
    from mergekit_obim.saliency.file import write_text

    path = output or (None if as_json else Path("obim-report.html"))
    if path:
        try:
            from mergekit_obim.report.page import render
        except ImportError as error:
            raise RecipeError(
                f"the page needs matplotlib and Jinja ({one_line(error)}): pip install "
                "'mergekit-obim[report]', or take the numbers with --json"
            ) from error
    found = summarize(gather(read_config(content), merging, merged=merged))
    if found["differing"]:
        click.echo(
            f"Warning: {merged}: tensor {found['differing'][0]}, and {len(found['differing']) - 1} "
            "more, are not what this recipe makes",
            err=True,
        )
    if as_json:
        click.echo(json.dumps(found, indent=1))
    if path:
        write_text(path, render(found))
        if not (merging.quiet or as_json):
            click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB, opens in any browser")
