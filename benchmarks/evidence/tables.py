"""What is merged for each table of docs/evidence.md."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.evidence.correlations import table_correlations, table_correlations_one_run
from benchmarks.evidence.lab import BASE, CHECKPOINTS, TASKS, TRIO, Lab, Merge, random_text
from benchmarks.evidence.tuned import table_tuned, table_tuned_one_run
from benchmarks.evidence.variants import table_variants
from mergekit_obim.models.layers import block_of
from mergekit_obim.saliency.file import SaliencyFile, write_saliency

# Calibrated OBIM with the share that most small tables use; a third of all for what needs rivalry.
OBIM = Merge("obim", each={"density": 0.1})
SHARED = ("lambda", "order", "assignment", "stretch", "criterion", "min_agreement")


@dataclass(frozen=True)
class Method:
    """A row of the headline table.

    Attributes:
        default: Its merge by default settings; the paper's or mergekit's where a method has none.
        tried: What validation text chooses from, the default included.
        ours: Whether it is one of our exclusive methods, which the others are compared with.
    """

    default: Merge
    tried: list[Merge]
    ours: bool = False


Settings = Mapping[str, Any]


def _method(name: str, default: Settings, *others: Settings, ours: bool = False) -> Method:
    merges = []
    for settings in (default, *others):
        shared = {key: value for key, value in settings.items() if key in SHARED}
        each = {key: value for key, value in settings.items() if key not in SHARED}
        merge = Merge(name, shared, each)
        if merge not in merges:
            merges.append(merge)
    return Method(merges[0], merges, ours)


def over(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of the values of some parameters; ``lambda_`` stands for ``lambda``."""
    names = [name.rstrip("_") for name in axes]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*axes.values())]


def methods(experts: int = len(TRIO)) -> dict[str, Method]:
    """The headline's methods."""
    share = round(1 / experts, 4)
    low, magnitude = (0.05, 0.1, 0.2, share), {"criterion": "magnitude"}
    least, nearest = {"assignment": "least_error"}, {"assignment": "nearest"}
    return {
        "Task Arithmetic": _method(
            "task_arithmetic", {"weight": share}, *over(weight=(0.2, 0.5, 0.7, 1.0))
        ),
        "TIES": _method(
            "ties",
            {"weight": 1.0, "density": 0.5},
            *over(weight=(1.0,), density=(0.1, 0.2, 0.5, 1.0), lambda_=(0.5, 1.0, 1.5)),
        ),
        "DARE": _method(
            "dare_linear",
            {"weight": share, "density": 0.5},
            *over(weight=(share, 0.5), density=(0.3, 0.5, 0.8)),
        ),
        "DARE-TIES": _method(
            "dare_ties",
            {"weight": share, "density": 0.5},
            *over(weight=(share, 0.5, 1.0), density=(0.3, 0.5, 0.8)),
        ),
        "DELLA": _method(
            "della",
            {"weight": 1.0, "density": 0.5},
            *over(weight=(1.0,), density=(0.3, 0.5, 0.8), lambda_=(0.5, 1.0)),
        ),
        "TALL-Mask": _method(
            "consensus_ta", {}, *over(lambda_=(0.2, 0.4, 0.6, 0.8, 1.0), mask_threshold=(0.2, 0.4))
        ),
        "PCB": _method("pcb", {}, *over(density=(0.05, 0.1, 0.2), lambda_=(0.5, 1.0, 1.5))),
        "RegMean, diagonal": _method("regmean_diag", {}, *over(lambda_=(1.0, 1.5, 2.0))),
        "Sign by saliency": _method(
            "obm_sign", {}, *over(density=(0.1, 0.2, 0.5, 1.0), lambda_=(0.5, 1.0))
        ),
        "TIES + OBM": _method(
            "ties_obm", {}, *over(density=(0.1, 0.2, 0.5), lambda_=(0.5, 1.0, 1.5))
        ),
        "TIES + IM": _method(
            "obim", magnitude, *({**magnitude, **one} for one in over(density=low)), ours=True
        ),
        "OBIM": _method("obim", {}, *over(density=low), ours=True),
        "OBIM, least error": _method("obim", least, ours=True),
        "OBIM, nearest": _method(
            "obim",
            nearest,
            *({**nearest, **one} for one in over(stretch=(1.3, 2.0, 3.0))),
            ours=True,
        ),
    }


def mean(values: Mapping[str, float]) -> float:
    """The mean over tasks."""
    return statistics.fmean(values.values())


def _best(lab: Lab, tried: Sequence[Merge]) -> Merge:
    return max(tried, key=lambda merge: mean(lab.recovery(merge, "validation")))


def table_models(lab: Lab) -> dict[str, Any]:
    """The base and the experts; the guard: an even average beats the base on every task."""
    base = lab.score_model(BASE, TRIO)
    average = lab.score(methods()["Task Arithmetic"].default)
    return {
        "base": base,
        "experts": {task: lab.score_model(task) for task in TRIO},
        "average": average,
        "guard": all(average["loss"][task] < base["loss"][task] for task in TRIO),
    }


def table_methods(lab: Lab) -> dict[str, Any]:
    """The paper's tables 1 and 3: every method by default and at its best on validation text."""
    return {
        name: {
            kind: {
                "settings": merge.settings(),
                "recovery": lab.recovery(merge),
                "accuracy": lab.score(merge)["accuracy"],
            }
            for kind, merge in (
                ("default", row.default),
                ("best", _best(lab, row.tried[: lab.scale.tried])),
            )
        }
        for name, row in methods().items()
    }


def table_forgetting(lab: Lab) -> dict[str, Any]:
    """The paper's table 2: the last checkpoints of a run of continued training that forgot.

    All are calibrated on all three tasks' text, as the paper's are on all languages.
    """
    mixed = {"data": [{"data": lab.data(task), "samples": lab.scale.samples // 3 + 1}
                      for task in TRIO]}  # fmt: skip
    rows = {name: lab.score_model(name, TRIO) for name in (BASE, *CHECKPOINTS)}
    for name, row in methods(len(CHECKPOINTS)).items():

        def of_checkpoints(merge: Merge) -> Merge:
            return replace(
                merge, experts=CHECKPOINTS, calibration=dict.fromkeys(CHECKPOINTS, mixed)
            )

        def total(merge: Merge) -> float:
            return -mean(lab.score(of_checkpoints(merge), TRIO, "validation")["loss"])

        best = max(row.tried[: lab.scale.tried], key=total)
        rows[f"{name}, default"] = lab.score(of_checkpoints(row.default), TRIO)
        rows[f"{name}, best"] = lab.score(of_checkpoints(best), TRIO)
    return {name: scores["loss"] for name, scores in rows.items()}


def table_density(lab: Lab) -> dict[str, Any]:
    """Mask capacity: recovery over density, by saliency, magnitude and chance."""
    ways: dict[str, dict[str, Any]] = {
        "saliency": {}, "magnitude": {"criterion": "magnitude"}, "random": {"criterion": "random"},
    }  # fmt: skip
    return {
        way: {
            str(density): lab.recovery(Merge("obim", shared, {"density": density}))
            for density in (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3333)
        }
        for way, shared in ways.items()
    }


def table_source(lab: Lab) -> dict[str, Any]:
    """The paper's table 4: what the math expert is calibrated on."""
    half = lab.scale.samples // 2
    sources: dict[str, Any] = {
        "its own task": lab.data("math"),
        "another task (code)": lab.data("code"),
        "both": [{"data": lab.data(task), "samples": half} for task in ("math", "code")],
        "random tokens": random_text(lab),
    }
    return {
        way: {
            name: lab.recovery(replace(merge, calibration={"math": {"data": source}}))
            for name, source in sources.items()
        }
        for way, merge in (
            ("OBIM", OBIM), ("OBIM, nearest", methods()["OBIM, nearest"].default)
        )
    }  # fmt: skip


def table_samples(lab: Lab) -> dict[str, Any]:
    """The paper's table 5: how many samples."""

    def calibrated(samples: int) -> dict[str, Any]:
        return {task: {"data": lab.data(task), "samples": samples} for task in TRIO}

    return {
        way: {
            str(samples): lab.recovery(replace(merge, calibration=calibrated(samples)))
            for samples in (10, 50, 100, 200)
        }
        for way, merge in (
            ("OBIM", OBIM), ("OBIM, nearest", methods()["OBIM, nearest"].default)
        )
    }  # fmt: skip


def table_order(lab: Lab) -> dict[str, Any]:
    """The paper's table 6: rotation, and each expert first and last."""
    share = round(1 / len(TRIO), 4)
    rows = {"rotation": lab.recovery(Merge("obim", each={"density": share}))}
    for task in TRIO:
        others = tuple(other for other in TRIO if other != task)
        for place, experts in (("first", (task, *others)), ("last", (*others, task))):
            merge = Merge("obim", {"order": "recipe"}, {"density": share}, experts=experts)
            rows[f"{task} {place}"] = lab.recovery(merge)
    return rows


def table_unscored(lab: Lab) -> dict[str, Any]:
    """What becomes of weights that have no h: here those of every other layer."""
    kept = lab.folder / "saliency/every-other-layer"
    for task in TRIO:
        file = SaliencyFile(lab.saliency(task))
        blocks = {name: block_of(name) for name in file.shapes}
        shapes = {name: x for name, x in file.shapes.items()
                  if (block := blocks[name]) is None or block[1] % 2 == 0}  # fmt: skip
        write_saliency(kept / file.path.name, shapes, file.__getitem__, file.metadata)

    def recovery(merge: Merge, unscored: str) -> dict[str, float]:
        shared = {**merge.shared, "unscored": unscored, "saliency": str(kept)}
        return lab.recovery(replace(merge, shared=shared))

    every = methods()
    return {
        way: {
            "all are scored": lab.recovery(merge),
            **{kind: recovery(merge, kind) for kind in ("magnitude", "random", "base")},
        }
        for way, merge in (
            ("OBIM, density 0.1", OBIM), ("OBIM", every["OBIM"].default),
            ("OBIM, nearest", every["OBIM, nearest"].default),
        )
    }  # fmt: skip


def table_count(lab: Lab) -> dict[str, Any]:
    """The paper's table 11, two to six models, with the experts of as many tasks."""
    return {
        str(count): {name: lab.recovery(merge) for name, merge in _of_many(count).items()}
        for count in range(2, len(TASKS) + 1)
    }


def _of_many(count: int) -> dict[str, Merge]:
    """Default merges of the first so many tasks' experts."""
    return {
        name: replace(methods(count)[name].default, experts=TASKS[:count])
        for name in ("Task Arithmetic", "DARE", "TIES", "OBIM", "OBIM, nearest")
    }


def table_answers(lab: Lab) -> dict[str, Any]:
    """The share of questions answered rightly, after merging all experts."""
    merges = _of_many(len(TASKS)).items()
    rows = {BASE: lab.score_model(BASE, TASKS)["accuracy"]}
    experts = {task: lab.score_model(task)["accuracy"].get(task) for task in TASKS}
    rows["the task's own expert"] = {t: share for t, share in experts.items() if share is not None}
    return rows | {name: lab.score(merge)["accuracy"] for name, merge in merges}


TABLES: dict[str, Callable[[Lab], dict[str, Any]]] = {
    "models": table_models,
    "methods": table_methods,
    "variants": table_variants,
    "density": table_density,
    "source": table_source,
    "samples": table_samples,
    "order": table_order,
    "unscored": table_unscored,
    "count": table_count,
    "answers": table_answers,
    "forgetting": table_forgetting,
    "correlations": table_correlations,
    "correlations_one_run": table_correlations_one_run,
    "tuned": table_tuned,
    "tuned_one_run": table_tuned_one_run,
}
# What is made if nothing is asked for: the paper's tables. The others take as long again.
USUAL = tuple(name for name in TABLES if not name.startswith(("correlations", "tuned")))
