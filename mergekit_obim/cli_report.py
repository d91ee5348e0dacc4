"""``obim-report`` and ``obim-card``: a merge looked at, and described in its model's card."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mergekit_obim import __version__
from mergekit_obim.cli import read_recipe
from mergekit_obim.errors import RecipeError

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

F = TypeVar("F", bound=Callable[..., Any])

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def merging_options(command: F) -> F:
    """The options of mergekit that say how models are read."""
    for option in (
        click.version_option(__version__),
        click.option("-v", "verbose", is_flag=True, help="Verbose logging, tracebacks"),
        click.option("--quiet", is_flag=True, help="Print nothing but warnings and errors"),
        click.option("--trust-remote-code", is_flag=True, help="Trust remote code (danger)"),
        click.option("--lora-merge-cache", help="Path to store merged LORA models"),
        click.option("--transformers-cache", help="Override storage path for downloaded models"),
    ):
        command = option(command)
    return command


def start(options: dict[str, Any]) -> MergeOptions:
    """Set up logging, and mergekit's options from ours."""
    logging.basicConfig(level=logging.INFO if options.pop("verbose") else logging.WARNING)
    from mergekit.options import MergeOptions

    return MergeOptions(**options)


@click.command("obim-card")
@click.argument("merged", type=FOLDER, metavar="MERGED_DIR")
@click.option(
    "--recipe", type=FILE, help="What it was made from  [default: its mergekit_config.yml]"
)
@click.option("--no-shares", is_flag=True, help="Do not count whose weights they are: seconds")
@merging_options
def card(merged: Path, recipe: Path | None, no_shares: bool, **options: Any) -> None:
    """Add to a merged model's card which expert each share of the weights is from.

    Goes through the merge that made MERGED_DIR once more, without merging, and writes a section
    into its README.md: experts, shares, calibration, saliency files, version. Run it where
    mergekit-yaml ran; run again, it replaces the section.
    """
    path = recipe or merged / "mergekit_config.yml"
    if not path.exists():
        raise RecipeError(
            f"{merged}: has no mergekit_config.yml, which mergekit writes with the card: give the "
            "recipe by --recipe"
        )
    content = read_recipe(path)
    merging = start(options)

    from mergekit_obim.planned import read_config
    from mergekit_obim.report.card import write_section

    source = path.read_text(encoding="utf-8")
    written = write_section(merged, read_config(content), source, merging, shares=not no_shares)
    if not merging.quiet:
        click.echo(f"{written}: described how the experts were merged")
