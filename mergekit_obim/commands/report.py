"""``obim-report`` and ``obim-card``: a merge looked at, and described in its model's card."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mergekit_obim import __version__
from mergekit_obim.errors import RecipeError, one_line
from mergekit_obim.recipe.document import read_document

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


@contextmanager
def importing() -> Iterator[None]:
    """Import with no search for garbage, then or later: modules stay, and looking takes seconds."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


def start(options: dict[str, Any]) -> MergeOptions:
    """Set up logging, and mergekit's options from ours."""
    logging.basicConfig(level=logging.INFO if options.pop("verbose") else logging.WARNING)
    with importing():
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
    content = read_document(path).content
    merging = start(options)

    from mergekit_obim.planned import read_config
    from mergekit_obim.report.card import write_section

    source = path.read_text(encoding="utf-8")
    written = write_section(merged, read_config(content), source, merging, shares=not no_shares)
    if not merging.quiet:
        click.echo(f"{written}: described how the experts were merged")


@click.command("obim-report")
@click.argument("recipe", type=FILE)
@click.option(
    "--merged", type=FOLDER, help="The merged model, to see whether the recipe still makes it"
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The HTML file to write  [default: obim-report.html]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers instead, for machines")
@merging_options
def report(
    recipe: Path, merged: Path | None, output: Path | None, as_json: bool, **options: Any
) -> None:
    """Show what a merge makes of its experts: an HTML file that needs nothing else.

    Goes through the merge of RECIPE without merging. Run it where mergekit-yaml runs. With both
    --json and --output the numbers are printed and the file is written.
    """
    content = read_document(recipe).content
    merging = start(options)

    with importing():
        from mergekit_obim.planned import read_config
        from mergekit_obim.report.gather import gather
        from mergekit_obim.report.summary import summarize

    write = output is not None or not as_json
    if write:
        try:
            with importing():
                from mergekit_obim.report.page import render
        except ImportError as error:
            raise RecipeError(
                f"the charts need matplotlib ({one_line(error)}): pip install "
                "'mergekit-obim[report]', or take the numbers by --json"
            ) from error
    found = summarize(gather(read_config(content), merging, merged=merged))
    if found["differing"]:
        click.echo(
            f"Warning: {merged}: tensor {found['differing'][0]}, and {len(found['differing']) - 1} "
            "more, are not what this recipe makes",
            err=True,
        )
    if as_json:
        import json

        click.echo(json.dumps(found, indent=1))
    if write:
        from mergekit_obim.saliency.file import atomic_write

        path = output or Path("obim-report.html")
        try:
            with atomic_write(path) as file:
                file.write(render(found).encode("utf-8"))
        except OSError as error:
            raise RecipeError(f"{path}: cannot be written: {one_line(error)}") from error
        if not (merging.quiet or as_json):
            click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB, opens in any browser")
