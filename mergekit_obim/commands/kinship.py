"""``obim-kinship``: how alike models are, and which of them to merge next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_obim.commands.report import FILE, merging_options, start
from mergekit_obim.errors import RecipeError, one_line
from mergekit_obim.recipe.document import read_document

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_obim.evolution import Evolution


@click.command("obim-kinship")
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option("--base", help="What the models were fine-tuned from")
@click.option("--layers", is_flag=True, help="Also for each layer, in the JSON")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON file")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON, for machines")
@click.option(
    "--plan",
    type=click.Path(file_okay=False, path_type=Path),
    help="Plan the next generation of merges in this folder, instead",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=2),
    help="With --plan: how many of the best to merge  [default: 3]",
)
@click.option(
    "--recipe",
    type=FILE,
    help="With --plan: a recipe without models and base, for every merge  [default: slerp]",
)
@merging_options
def kinship(
    models: tuple[str, ...],
    base: str | None,
    layers: bool,
    output: Path | None,
    as_json: bool,
    plan: Path | None,
    top_k: int | None,
    recipe: Path | None,
    **options: Any,
) -> None:
    """Measure how alike MODELs are as fine-tunes of one base.

    Prints Pearson's correlation, cosine and Euclidean distance of their task vectors. With
    --plan DIR it plans merges instead, generation by generation, from scores that you fill in.
    """
    if plan is None:
        if top_k or recipe:
            raise click.UsageError("--top-k and --recipe do nothing without --plan")
        if not (models and base):
            raise click.UsageError("name two or more MODELs, and --base")
        _measure(models, base, layers, output, as_json, start(options))
        return
    if layers or output or as_json:
        raise click.UsageError("--layers, --output and --json do nothing with --plan")
    known = (plan / "plan.json").exists()
    if known and (models or base or top_k or recipe):
        raise click.UsageError(f"{plan} has a plan already: --plan {plan} alone goes on with it")
    _plan(plan, None if known else _begin(models, base, top_k, recipe), start(options))


def _measure(
    models: tuple[str, ...],
    base: str,
    layers: bool,
    output: Path | None,
    as_json: bool,
    options: MergeOptions,
) -> None:
    import json

    from mergekit_obim.kinship import measure
    from mergekit_obim.saliency.file import atomic_write

    measured = measure(models, base, options)
    found = measured.to_dict(layers=layers)
    text = json.dumps(found, indent=1)
    if output:
        try:
            with atomic_write(output) as file:
                file.write(text.encode() + b"\n")
        except OSError as error:
            raise RecipeError(f"{output}: cannot be written: {one_line(error)}") from error
    for name, reason in list(found["skipped"].items())[:5]:
        click.echo(f"Warning: tensor {name} was left out: {reason}", err=True)
    if len(found["skipped"]) > 5:
        click.echo(f"Warning: {len(found['skipped'])} tensors were left out in all", err=True)
    if as_json:
        click.echo(text)
        return
    click.echo("\n".join(_tables(found)))


def _tables(found: dict[str, Any]) -> list[str]:
    lines = [f"{number}: {model}" for number, model in enumerate(found["models"], 1)]
    for measure in ("pearson", "cosine", "euclidean"):
        rows = found[measure]
        pairs = [rows[i][j] for i in range(len(rows)) for j in range(i) if rows[i][j] is not None]
        mean = f", mean over pairs {sum(pairs) / len(pairs):.4g}" if pairs else ""
        lines += [
            "",
            measure + mean,
            "     " + "".join(f"{n:>10}" for n in range(1, len(rows) + 1)),
        ]
        for number, row in enumerate(rows, 1):
            cells = ("–" if value is None else f"{value:.4g}" for value in row)
            lines.append(f"{number:>5}" + "".join(f"{cell:>10}" for cell in cells))
    return lines


def _begin(
    models: tuple[str, ...], base: str | None, top_k: int | None, recipe: Path | None
) -> Evolution:
    from mergekit_obim.evolution import DEFAULT_TEMPLATE, Evolution

    if len(set(models)) < 2 or not base:
        raise click.UsageError("--plan begins with two or more MODELs and --base")
    template = dict(read_document(recipe).content) if recipe else DEFAULT_TEMPLATE
    extra = [key for key in ("models", "base_model", "slices", "modules") if key in template]
    if extra or "merge_method" not in template:
        raise RecipeError(
            f"{recipe}: should have a merge_method and no {extra[0] if extra else 'models'}: the "
            "plan puts in the models of each merge, and the base"
        )
    return Evolution(base, top_k or 3, template, {model: model for model in models})


def _plan(folder: Path, evolution: Evolution | None, options: MergeOptions) -> None:
    from mergekit_obim import evolution as evolving
    from mergekit_obim.kinship import matrix, measure

    evolution = evolution or evolving.read(folder)
    scores = evolving.read_scores(folder, evolution)
    waiting = evolving.unscored(evolution, scores)
    if not waiting and not evolution.done:

        def similarity(name: str, others: list[str]) -> list[float | None]:
            names = [name, *others]
            paths = [evolution.models[one] for one in names]
            found = measure(paths, evolution.base, options)
            return matrix(found.total.pearson())[0][1:]

        evolving.next_generation(evolution, scores, folder, similarity)
        waiting = evolving.unscored(evolution, scores)
    evolving.write(folder, evolution, scores)
    if evolution.done:
        best = evolution.tops[-1][0]
        click.echo(
            f"It ends: {evolution.done}. The best is {best}, {scores[best]:g}: "
            f"{evolution.models[best]}"
        )
        return
    for name in waiting:
        if name in evolution.parents:
            kin = evolution.kin.get(name)
            why = f"   # explores: correlation {kin:.3f}" if kin is not None else ""
            click.echo(f"mergekit-yaml {folder / name}.yml {evolution.models[name]}{why}")
    click.echo(f"Then fill in {folder / 'scores.yml'}, and run obim-kinship --plan {folder}")
