"""`obim-tune` against the best single settings that test text itself would choose."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.evidence.correlations import mixed_text, of_correlations
from benchmarks.evidence.lab import BASE, CHECKPOINTS, TRIO, Lab, Merge

# Beside the merges of the tables on correlations.
BY_HAND = (
    *(Merge("task_arithmetic", each={"weight": weight}) for weight in (0.2, 0.5, 0.7, 1.0)),
    *(Merge("regmean_diag", {"lambda": scale}) for scale in (1.5, 2.0)),
    *(Merge("obim", {"assignment": "nearest", "stretch": stretch}) for stretch in (1.0, 1.3, 2.0)),
)
EVEN = "Task Arithmetic, weight 1/K"


def _by_hand(sources: Mapping[str, Any]) -> dict[str, Merge]:
    experts = tuple(sources)
    plain = [replace(merge, experts=experts, calibration=dict(sources)) for merge in BY_HAND]
    return of_correlations(experts, sources) | {
        f"{merge.method}, {merge.settings()}": merge for merge in plain
    }


def _recipe(sources: Mapping[str, Any]) -> Merge:
    """A recipe whose saliency files have sketches, so that regmean is in the space."""
    calibration = {expert: {**source, "sketch": 16} for expert, source in sources.items()}
    return Merge("regmean", experts=tuple(sources), calibration=calibration)


def _options(lab: Lab) -> tuple[object, ...]:
    return ("--trials", 4, "--rows", 2) if lab.scale.tried else ()


def _best(rows: Iterable[tuple[str, Mapping[str, float]]], sign: int) -> dict[str, Any]:
    name, best = max(rows, key=lambda row: sign * statistics.fmean(row[1].values()))
    return {f"the best by hand: {name}": best}


def table_tuned(lab: Lab) -> dict[str, Any]:
    """Recoveries of the three experts."""
    sources = {task: {"data": lab.data(task)} for task in TRIO}
    merges = _by_hand(sources)
    by_hand = [(name, lab.recovery(merge)) for name, merge in merges.items()]
    rows = {"the even average": dict(by_hand)[EVEN], **_best(by_hand, 1)}
    for objective in ("kl", "loss"):
        options = ("--objective", objective, *_options(lab))
        scores = lab.tuned(_recipe(sources), TRIO, options)
        rows[f"obim-tune --objective {objective}"] = lab.recovered(scores, "test")
    return rows


def table_tuned_one_run(lab: Lab) -> dict[str, Any]:
    """Losses of merged checkpoints of one run that forgot, on all tasks."""
    sources = dict.fromkeys(CHECKPOINTS, mixed_text(lab))
    merges = _by_hand(sources)
    by_hand = [(name, lab.score(merge, TRIO)["loss"]) for name, merge in merges.items()]
    base = lab.score_model(BASE, TRIO)["loss"]
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "obim-tune --objective kl": ("kl", {}),
        "obim-tune --objective kl, guard: all tasks' text": ("kl", mixed_text(lab)),
        "obim-tune --objective loss": ("loss", {}),
    }
    return {
        "base": base,
        "the even average": dict(by_hand)[EVEN],
        **_best([("base", base), *by_hand], -1),
        **{
            name: lab.tuned(
                _recipe(sources), TRIO, ("--objective", objective, *_options(lab)), **guard
            )["loss"]
            for name, (objective, guard) in ways.items()
        },
    }
