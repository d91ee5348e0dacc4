"""Top-k greedy merging with model kinship (arXiv 2410.12613), generation by generation.

Of all models so far the k best are merged with each other, pair by pair. One merge explores: the
best model with the one that is least its kin. When a generation leaves the k best as they were,
it ends. The merging and the scoring are the user's; a folder keeps what has been planned:

``plan.json``    what there is, for this module
``scores.yml``   for the user: a number a model, the higher the better
``NAME.yml``     a recipe for each merge, to be merged into the folder ``NAME``
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mergekit_obim.errors import RecipeError, one_line
from mergekit_obim.saliency.file import atomic_write

# As the paper merges its pairs.
DEFAULT_TEMPLATE: dict[str, Any] = {"merge_method": "slerp", "parameters": {"t": 0.5}}


@dataclass
class Evolution:
    """What has been planned so far.

    Attributes:
        base: What all models come from.
        top_k: How many of the best are merged with each other.
        template: The recipe of a merge, less its models.
        models: Path of each model, by name: those that the user named, then merges.
        parents: Of each merge.
        kin: Of each merge that explores, the correlation of its parents.
        tops: The k best, generation by generation.
        done: Why it has ended; empty while it goes on.
    """

    base: str
    top_k: int
    template: dict[str, Any]
    models: dict[str, str]
    parents: dict[str, list[str]] = field(default_factory=dict)
    kin: dict[str, float | None] = field(default_factory=dict)
    tops: list[list[str]] = field(default_factory=list)
    done: str = ""


Similarity = Callable[[str, list[str]], list[float | None]]


def read(folder: Path) -> Evolution:
    """What is kept in a folder.

    Raises:
        RecipeError: Nothing is, or it cannot be read.
    """
    path = folder / "plan.json"
    try:
        return Evolution(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise RecipeError(
            f"{folder}: no merging has been planned there: name the models and --base"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"{path}: cannot be read: {one_line(error)}") from error


def write(folder: Path, evolution: Evolution, scores: Mapping[str, float]) -> None:
    """Keep the plan, the recipes that are not there yet, and the list of scores to be filled in."""
    for name, pair in evolution.parents.items():
        path = folder / f"{name}.yml"
        if not path.exists():
            _put(path, yaml.safe_dump(recipe_of(evolution, pair), sort_keys=False))
    lines = [f"{json.dumps(name)}: {scores.get(name, '')}\n" for name in evolution.models]
    head = "# One number a model, the higher the better; then run obim-kinship --plan again.\n"
    _put(folder / "scores.yml", head + "".join(lines))
    _put(folder / "plan.json", json.dumps(asdict(evolution), indent=1) + "\n")


def _put(path: Path, text: str) -> None:
    try:
        with atomic_write(path) as file:
            file.write(text.encode("utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written: {one_line(error)}") from error


def recipe_of(evolution: Evolution, pair: list[str]) -> dict[str, Any]:
    """The recipe of one merge, for mergekit."""
    paths = [evolution.models[name] for name in pair]
    # mergekit's slerp goes from one of the two to the other, and knows no common base.
    base = paths[0] if evolution.template["merge_method"] == "slerp" else evolution.base
    models = [{"model": path} for path in paths]
    return {**evolution.template, "base_model": base, "models": models}


def read_scores(folder: Path, evolution: Evolution) -> dict[str, float]:
    """The scores that the user has filled in.

    Raises:
        RecipeError: A name is none of the models', or a score no number.
    """
    path = folder / "scores.yml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read: {one_line(error)}") from error
    if not isinstance(content or {}, Mapping):
        raise RecipeError(f"{path}: should have a line `NAME: NUMBER` for each model")
    scores = {}
    for name, score in (content or {}).items():
        if name not in evolution.models:
            near = difflib.get_close_matches(str(name), evolution.models, n=1)
            hint = (
                f"did you mean {near[0]}?" if near else f"there are {', '.join(evolution.models)}"
            )
            raise RecipeError(f"{path}: there is no model {name!r}; {hint}")
        if score is None:
            continue
        if (
            isinstance(score, bool)
            or not isinstance(score, int | float)
            or not math.isfinite(score)
        ):
            raise RecipeError(f"{path}: the score of {name} is {score!r}; write a number")
        scores[name] = float(score)
    return scores


def unscored(evolution: Evolution, scores: Mapping[str, float]) -> list[str]:
    """The models that wait for a score."""
    return [name for name in evolution.models if name not in scores]


def next_generation(
    evolution: Evolution, scores: Mapping[str, float], folder: Path, similarity: Similarity
) -> list[str]:
    """Plan the merges that come next, or end.

    Args:
        evolution: What there is; changed in place.
        scores: Of every model.
        folder: Where merges are going to be.
        similarity: The correlation of a model with others, by name.

    Returns:
        The new merges' names; none if it has ended, and ``evolution.done`` says why.
    """
    # Of equals the older comes first, so that a merge has to be better to take its place.
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
    # What has no direction of its own, as the base itself, is nobody's kin and of no use.
    strangers = sorted((value, name) for name, value in kin.items() if value is not None)
    planned = merged | {frozenset(pair) for pair in pairs}
    explored = next((n for _, n in strangers if frozenset((best, n)) not in planned), None)
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
