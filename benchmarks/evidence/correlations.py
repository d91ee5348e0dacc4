"""RegMean by sketches, whole matrices and no data: what correlations between inputs are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.evidence.lab import BASE, CHECKPOINTS, TRIO, Lab, Merge, random_text

SKETCHES: tuple[int | str, ...] = (4, 8, 16, 32, 64, "full")
SHRINKS = (0.5, 0.8, 0.9, 0.95, 0.99, 1.0)


def of_correlations(experts: Sequence[str], sources: Mapping[str, Any]) -> dict[str, Merge]:
    """Every merge of the table, by its name."""

    def regmean(sketch: int | str = 16, data: Mapping[str, Any] = sources, **shared: Any) -> Merge:
        calibration = {expert: {**data[expert], "sketch": sketch} for expert in experts}
        return Merge("regmean", shared, experts=tuple(experts), calibration=calibration)

    def of_sketches(name: str, **shared: Any) -> dict[str, Merge]:
        return {
            f"{name}, {'whole matrix' if r == 'full' else f'{r} columns'}": regmean(r, **shared)
            for r in SKETCHES
        }

    plain: dict[str, Any] = {"experts": tuple(experts), "calibration": dict(sources)}
    share = round(1 / len(experts), 4)
    return {
        "Task Arithmetic, weight 1/K": Merge("task_arithmetic", each={"weight": share}, **plain),
        "OBIM, nearest": Merge("obim", {"assignment": "nearest"}, **plain),
        "RegMean, diagonal": Merge("regmean_diag", **plain),
        "RegMean, diagonal, stretch auto": Merge("regmean_diag", {"stretch": "auto"}, **plain),
        **of_sketches("RegMean"),
        **of_sketches("RegMean, stretch auto", stretch="auto"),
        **{f"RegMean, 16 columns, shrink {s}": regmean(shrink=s) for s in SHRINKS},
        **{f"RegMean, whole matrix, shrink {s}": regmean("full", shrink=s) for s in SHRINKS},
        **{
            f"no data, shrink {s}": Merge("regmean", {"statistics": "none", "shrink": s}, **plain)
            for s in (0.25, 0.5, 0.75, 0.9)
        },
    }


def mixed_text(lab: Lab) -> dict[str, Any]:
    """All three tasks' text, as calibration data."""
    samples = lab.scale.samples // len(TRIO) + 1
    return {"data": [{"data": lab.data(task), "samples": samples} for task in TRIO]}


def table_correlations(lab: Lab) -> dict[str, Any]:
    """Recoveries of the three experts, each calibrated on its own task's text or on other rows."""
    own = {task: {"data": lab.data(task)} for task in TRIO}
    others: dict[str, dict[str, Any]] = {
        "rows that each expert wrote itself": {key: {"data": "self"} for key in TRIO},
        "random characters": {key: {"data": random_text(lab)} for key in TRIO},
        "another task's text": {
            task: own[other] for task, other in zip(TRIO, (*TRIO[1:], TRIO[0]), strict=True)
        },
    }
    merges = of_correlations(TRIO, own)
    for source, calibration in others.items():
        for sketch, what in ((16, "16 columns"), ("full", "whole matrix")):
            name = f"RegMean, {what}"
            merges[f"{name}, {source}"] = replace(
                merges[name],
                calibration={task: {**calibration[task], "sketch": sketch} for task in TRIO},
            )
    return {name: lab.recovery(merge) for name, merge in merges.items()}


def table_correlations_one_run(lab: Lab) -> dict[str, Any]:
    """Losses of merged checkpoints of one run that forgot, calibrated on all tasks' text."""
    rows = {name: lab.score_model(name, TRIO) for name in (BASE, *CHECKPOINTS)}
    merges = of_correlations(CHECKPOINTS, dict.fromkeys(CHECKPOINTS, mixed_text(lab)))
    rows |= {name: lab.score(merge, TRIO) for name, merge in merges.items()}
    return {name: scores["loss"] for name, scores in rows.items()}
