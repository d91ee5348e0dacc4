"""Top-k greedy merging guided by model kinship (arXiv 2410.12613), one generation at a time.

Each generation merges the k best models so far with each other, pair by pair, and also merges the
best model with the one least related to it, which explores. Merging ends once a generation leaves
the k best unchanged. The user runs the merges and scores the models; a folder holds the state:

``plan.json``    what has been planned, for this module
``scores.yml``   filled in by the user: one number per model, higher is better
``NAME.yml``     a recipe for each merge, to be merged into the folder ``NAME``
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mergekit_obim.errors import RecipeError, told_as
from mergekit_obim.recipe.faults import nearest
from mergekit_obim.saliency.file import write_text

# The paper merges its pairs this way.
DEFAULT_TEMPLATE: dict[str, Any] = {"merge_method": "slerp", "parameters": {"t": 0.5}}


@dataclass
class Evolution:
    """What has been planned so far, as ``plan.json`` holds it.

    Attributes:
        base: The base model that all models were fine-tuned from.
        top_k: How many of the best models are merged with each other.
        template: The recipe of every merge, without its models and base.
        models: Each model's path by its name: the models that the user gave, then the merges.
        parents: The names of each merge's two parents.
        kin: For each merge that explores, the correlation of its parents' task vectors.
        tops: The names of the k best models in each generation, the best first.
        done: Why the plan has ended; empty while it goes on.
    """

    base: str
    top_k: int
    template: dict[str, Any]
    models: dict[str, str]
    parents: dict[str, list[str]] = field(default_factory=dict)
    kin: dict[str, float | None] = field(default_factory=dict)
    tops: list[list[str]] = field(default_factory=list)
    done: str = ""


# The correlation of one model with each of several others, all given by name.
Similarity = Callable[[str, list[str]], list[float | None]]


def read(folder: Path) -> Evolution:
    """Read the plan that a folder holds.

    Raises:
        RecipeError: The folder has no plan, or its plan cannot be read.
    """
    path = folder / "plan.json"
    if not path.exists():
        raise RecipeError(f"{folder}: has no plan yet: name the models and --base")
    with told_as(RecipeError, f"{path}: cannot be read"):
        return Evolution(**json.loads(path.read_text(encoding="utf-8")))


def write(folder: Path, evolution: Evolution, scores: Mapping[str, float]) -> None:
    """Write the plan, the recipes that are missing, and the list of scores to fill in."""
    for name, pair in evolution.parents.items():
        path = folder / f"{name}.yml"
        if not path.exists():  # the user may have edited one that is there
            write_text(path, yaml.safe_dump(recipe_of(evolution, pair), sort_keys=False))
    lines = [f"{json.dumps(name)}: {scores.get(name, '')}\n" for name in evolution.models]
    head = "# One number per model, higher is better; then run obim-kinship --plan again.\n"
    write_text(folder / "scores.yml", head + "".join(lines))
    write_text(folder / "plan.json", json.dumps(asdict(evolution), indent=1) + "\n")


def recipe_of(evolution: Evolution, pair: list[str]) -> dict[str, Any]:
    """Return mergekit's recipe for the merge of two models, given by name."""
    paths = [evolution.models[name] for name in pair]
    # mergekit's slerp interpolates between its base and one other model; no third takes part.
    base = paths[0] if evolution.template["merge_method"] == "slerp" else evolution.base
    models = [{"model": path} for path in paths]
    return {**evolution.template, "base_model": base, "models": models}


def read_scores(folder: Path, evolution: Evolution) -> dict[str, float]:
    """Read the scores that the user has filled in so far.

    Raises:
        RecipeError: The file names a model that is not in the plan, or a score is not a number.
    """
    path = folder / "scores.yml"
    with told_as(RecipeError, f"{path}: cannot be read"):
        content = path.exists() and yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content or {}, Mapping):
        raise RecipeError(f"{path}: should have a line `NAME: NUMBER` for each model")
    scores = {}
    for name, score in (content or {}).items():
        if name not in evolution.models:
            near = nearest(str(name), evolution.models)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(evolution.models)}"
            raise RecipeError(f"{path}: there is no model {name!r}; {hint}")
        if score is None:
            continue
        if type(score) not in (int, float) or not math.isfinite(score):
            raise RecipeError(f"{path}: the score of {name} is {score!r}; write a number")
        scores[name] = float(score)
    return scores


def unscored(evolution: Evolution, scores: Mapping[str, float]) -> list[str]:
    """Return the names of the models that still need a score."""
    return [name for name in evolution.models if name not in scores]


def next_generation(
    evolution: Evolution, scores: Mapping[str, float], folder: Path, similarity: Similarity
) -> list[str]:
    """Add the next generation's merges to the plan, or end it.

    Args:
        evolution: The plan so far, which is changed in place.
        scores: The score of every model in the plan.
        folder: Where the merges will be written.
        similarity: Returns the correlation of a model with each of several others.

    Returns:
        The names of the new merges; none if the plan has ended, for the reason that
        ``evolution.done`` then gives.
    """
    # Of two equal scores the older model's ranks first, so a merge must beat what it replaces.
    ranked = sorted(evolution.models, key=lambda name: -scores[name])
    top = ranked[: evolution.top_k]
    if evolution.tops and set(top) == set(evolution.tops[-1]):
        evolution.done = f"the {len(top)} best have not changed"
        return []
    evolution.tops.append(top)
    merged = {frozenset(pair) for pair in evolution.parents.values()}
    pairs = [pair for pair in itertools.combinations(top, 2) if frozenset(pair) not in merged]
    best = top[0]
    others = [name for name in evolution.models if name != best]
    kin = dict(zip(others, similarity(best, others), strict=True))
    # A model without a direction of its own, such as a copy of the base, has no correlation.
    least_related = sorted((value, name) for name, value in kin.items() if value is not None)
    planned = merged | {frozenset(pair) for pair in pairs}
    explored = next((n for _, n in least_related if frozenset((best, n)) not in planned), None)
    new: list[str] = []
    for pair in [*pairs, *([(best, explored)] if explored else [])]:
        name = f"gen{len(evolution.tops)}-{len(new) + 1}"
        evolution.parents[name] = list(pair)
        # Without the dot mergekit takes a path of two parts for a name on the Hub, and asks there.
        here = "" if folder.is_absolute() else "./"
        evolution.models[name] = f"{here}{folder / name}"
        if explored and pair == (best, explored):
            evolution.kin[name] = kin[explored]
        new.append(name)
    if not new:
        evolution.done = "every pair among the best has been merged"
    return new
