"""``obim-kinship``: how similar models are, and which of them to merge next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_obim.commands.options import (
    FILE,
    NEW_FILE,
    NEW_FOLDER,
    GroupedHelp,
    merge_options,
    shared_options,
)
from mergekit_obim.errors import RecipeError
from mergekit_obim.recipe.document import read_document

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_obim.kinship.planner import Evolution


@click.command(
    "obim-kinship",
    cls=GroupedHelp,
    groups={
        "Input": ("base",),
        "Output": ("output", "as_json", "layers"),
        "Plan": ("plan", "top_k", "recipe"),
    },
)
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option("--base", help="The model that they were fine-tuned from")
@click.option("-o", "--output", type=NEW_FILE, help="Also write the measures to this JSON file")
@click.option("--json", "as_json", is_flag=True, help="Print the measures as JSON, for machines")
@click.option("--layers", is_flag=True, help="Add each layer's measures to the JSON")
@click.option(
    "--plan", type=NEW_FOLDER, help="Plan the next generation of merges in this folder, instead"
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
@shared_options
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
    """Measure how similar MODELs are as fine-tunes of one base.

    Prints Pearson's correlation, cosine and Euclidean distance of their task vectors. With
    --plan DIR it plans merges instead, generation by generation, from scores that you fill in.
    """
    if plan is not None:
        if layers or output or as_json:
            raise click.UsageError("--layers, --output and --json do nothing with --plan")
        known = (plan / "plan.json").exists()
        if known and (models or base or top_k or recipe):
            raise click.UsageError(f"{plan} has a plan already: --plan {plan} alone continues it")
        _plan(plan, None if known else _begin(models, base, top_k, recipe), merge_options(options))
        return
    if top_k or recipe:
        raise click.UsageError("--top-k and --recipe do nothing without --plan")
    if not (models and base):
        raise click.UsageError("name two or more MODELs, and --base")

    from mergekit_obim.kinship.measures import measure
    from mergekit_obim.saliency.file import write_text

    measured = measure(models, base, merge_options(options))
    found = measured.to_dict(layers=layers)
    text = json.dumps(found, indent=1)
    if output:
        write_text(output, text + "\n")
    for name, reason in list(found["skipped"].items())[:5]:
        click.echo(f"Warning: tensor {name} was left out: {reason}", err=True)
    if len(found["skipped"]) > 5:
        click.echo(f"Warning: {len(found['skipped'])} tensors were left out in all", err=True)
    click.echo(text if as_json else "\n".join(_tables(found)))


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
    from mergekit_obim.kinship.planner import DEFAULT_TEMPLATE, Evolution

    if len(set(models)) < 2 or not base:
        raise click.UsageError("a new plan needs two or more MODELs, and --base")
    template = dict(read_document(recipe).content) if recipe else DEFAULT_TEMPLATE
    extra = [key for key in ("models", "base_model", "slices", "modules") if key in template]
    if extra or "merge_method" not in template:
        raise RecipeError(
            f"{recipe}: should have a merge_method and no {extra[0] if extra else 'models'}: the "
            "plan adds each merge's models and base"
        )
    return Evolution(base, top_k or 3, template, {model: model for model in models})


def _plan(folder: Path, evolution: Evolution | None, options: MergeOptions) -> None:
    from mergekit_obim.kinship import planner
    from mergekit_obim.kinship.measures import matrix, measure

    evolution = evolution or planner.read(folder)
    scores = planner.read_scores(folder, evolution)
    waiting = planner.unscored(evolution, scores)
    if not waiting and not evolution.done:

        def similarity(name: str, others: list[str]) -> list[float | None]:
            names = [name, *others]
            paths = [evolution.models[one] for one in names]
            found = measure(paths, evolution.base, options)
            return matrix(found.total.pearson())[0][1:]

        planner.next_generation(evolution, scores, folder, similarity)
        waiting = planner.unscored(evolution, scores)
    planner.write(folder, evolution, scores)
    if evolution.done:
        best = evolution.tops[-1][0]
        click.echo(
            f"Finished: {evolution.done}. The best is {best}, with a score of {scores[best]:g}: "
            f"{evolution.models[best]}"
        )
        return
    for name in waiting:
        if name in evolution.parents:
            kin = evolution.kin.get(name)
            why = f"   # explores: correlation {kin:.3f}" if kin is not None else ""
            click.echo(f"mergekit-yaml {folder / name}.yml {evolution.models[name]}{why}")
    click.echo(f"Fill in {folder / 'scores.yml'}, then run obim-kinship --plan {folder}")
