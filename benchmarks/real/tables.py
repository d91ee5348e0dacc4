"""Which experts are merged by which methods, and how a merge is judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.evidence.tables import over
from benchmarks.real.lab import BASE, Lab, Merge, Scores
from benchmarks.real.text import EXACT

RESAMPLES = 2000
REFERENCE = "Task Arithmetic"  # by default, an even average: what the others are compared with
Losses = Mapping[str, Any]  # task -> a loss, or an array of one for each resample of the rows


@dataclass(frozen=True)
class Regime:
    """A kind of experts that are merged.

    Attributes:
        about: What the page says of them.
        experts: In the recipe's order.
        forgot: They are checkpoints of one run, judged on all tasks and calibrated on all.
    """

    about: str
    experts: tuple[str, ...]
    forgot: bool = False


def regimes(tasks: Sequence[str]) -> dict[str, Regime]:
    """All regimes, the most telling ones first."""
    first, second, *_ = tasks

    def of(way: str, count: int) -> tuple[str, ...]:
        return tuple(f"{way}/{task}" for task in tasks[:count])

    run = f"hard/{first}"
    return {
        "light-4": Regime("four lightly trained experts", of("light", 4)),
        "hard-4": Regime("four experts trained long and hard", of("hard", 4)),
        "checkpoints": Regime(
            f"three checkpoints of one run on {first}",
            (f"{run} at 2/4", f"{run} at 3/4", run), True
        ),
        "child": Regime(
            f"a light expert of {first}, and its child trained on {second}",
            (f"light/{first}", f"child/{second}"),
        ),
        "light-2": Regime("two lightly trained experts", of("light", 2)),
        "hard-2": Regime("two experts trained long and hard", of("hard", 2)),
        "light-3": Regime("three lightly trained experts", of("light", 3)),
    }  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        default: The merge by default settings; its paper's or mergekit's where it has none.
        tried: What validation rows choose from, the default included.
        ours: Whether it is this package's.
    """

    default: Merge
    tried: list[Merge]
    ours: bool


_EACH = ("weight", "density", "mask_threshold")


def _method(
    name: str, default: Mapping[str, Any], *others: Mapping[str, Any], statistics: str = "",
    ours: bool = False,
) -> Method:  # fmt: skip
    merges = []
    for settings in (default, *others):
        shared = {key: value for key, value in settings.items() if key not in _EACH}
        each = {key: value for key, value in settings.items() if key in _EACH}
        merge = Merge(name, (), shared, each, statistics=statistics)
        if merge not in merges:
            merges.append(merge)
    return Method(merges[0], merges, ours)


def methods(experts: int) -> dict[str, Method]:
    """The methods, with the settings that depend on how many experts there are."""
    share = round(1 / experts, 4)
    magnitude, no_data = {"criterion": "magnitude"}, {"statistics": "none"}
    least, nearest = {"assignment": "least_error"}, {"assignment": "nearest"}

    def stretches(**rest: Any) -> list[dict[str, Any]]:
        return [{**nearest, **rest, "stretch": stretch} for stretch in (1.0, 1.5, 2.0)]

    return {
        "Task Arithmetic": _method(
            "task_arithmetic", {"weight": share}, *over(weight=(0.25, 0.35, 0.5, 0.7, 1.0))
        ),
        "TIES": _method(
            "ties", {"weight": 1.0, "density": 0.5},
            *over(weight=(1.0,), density=(0.2, 0.5), lambda_=(0.6, 1.5)),
        ),
        "DARE": _method(
            "dare_linear", {"weight": share, "density": 0.5},
            *over(weight=(0.5, 0.7), density=(0.8,)),
        ),
        "DELLA": _method(
            "della", {"weight": 1.0, "density": 0.5},
            *over(weight=(1.0,), density=(0.5, 0.8), lambda_=(0.6,)),
        ),
        "Model Stock": _method("model_stock", {}),
        "Karcher mean": _method("karcher", {}),
        "SCE": _method("sce", {}, *over(select_topk=(0.1, 0.5))),
        "Consensus TA": _method(
            "consensus_ta", {}, *over(lambda_=(0.4, 0.7), mask_threshold=(0.2, 0.4))
        ),
        "PCB": _method("pcb", {}, *over(density=(0.2,), lambda_=(1.0, 1.5))),
        "TSV-M": _method("tsv_m", {}, *over(scale=(0.5, 0.7, 1.4))),
        "Iso-C": _method("iso_c", {}, *over(scale=(0.3, 0.6, 1.5))),
        "Fisher": _method("regmean_diag", {}, *over(lambda_=(1.4, 2.0)), statistics="fisher"),
        "RegMean, full Gram": _method(
            "regmean_full", {}, *over(keep=(0.1, 0.5, 0.99))
        ),
        "RegMean, sketch": _method(
            "regmean", {}, *over(stretch=("auto", 1.3)), {"shrink": 0.8},
            statistics="measured", ours=True,
        ),
        "RegMean, no data": _method("regmean", no_data, {**no_data, "stretch": "auto"}, ours=True),
        "RegMean, diagonal": _method(
            "regmean_diag", {}, *over(stretch=("auto", 1.4, 2.0)), statistics="measured", ours=True
        ),
        "OBIM": _method(
            "obim", {}, *over(density=(0.1, round(share / 2, 4))), statistics="measured", ours=True
        ),
        "OBIM by magnitude": _method(
            "obim", magnitude, {**magnitude, "density": 0.1},
            {**magnitude, "density": round(share / 2, 4)}, ours=True,
        ),
        "least_error": _method("obim", least, statistics="measured", ours=True),
        "nearest": _method("obim", nearest, *stretches(), statistics="measured", ours=True),
        "TIES + OBM": _method(
            "ties_obm", {}, *over(density=(0.2,), lambda_=(1.0, 1.5)),
            statistics="measured", ours=True,
        ),
        "Sign by saliency": _method(
            "obm_sign", {}, *over(density=(0.2, 0.5)), statistics="measured", ours=True
        ),
    }  # fmt: skip


# --- judging --------------------------------------------------------------------------


def loss(scores: Scores) -> dict[str, float]:
    """Nats per token of each task."""
    return {
        task: sum(row.nats for row in rows) / sum(row.tokens for row in rows)
        for task, rows in scores.items()
    }


def exact(scores: Scores) -> dict[str, float]:
    """The share of rows answered rightly, of the tasks where that is what counts."""
    return {
        task: sum(row.right for row in rows) / len(rows)
        for task, rows in scores.items()
        if task in EXACT
    }


def recoveries(
    lab: Lab, regime: Regime, merged: Losses, of: Mapping[str, Losses]
) -> dict[str, Any]:
    """What the merge kept, task by task; ``of`` has the losses of the base and the experts.

    Of experts: the share of each one's gain on its own task, (base − merged) / (base − expert).
    Of checkpoints of one run: the same over all tasks together, from the last checkpoint, 0, to
    an imagined model that is as good at each task as the best of base and checkpoints, 1.
    """
    if regime.forgot:
        best = {task: _least([of[name][task] for name in of]) for task in merged}
        last = of[regime.experts[-1]]
        return {"all": _mean(last, merged) / _mean(last, best)}
    return {
        lab.task_of(name): (of[BASE][lab.task_of(name)] - merged[lab.task_of(name)])
        / (of[BASE][lab.task_of(name)] - of[name][lab.task_of(name)])
        for name in regime.experts
    }


def _least(losses: Sequence[Any]) -> Any:
    return np.minimum.reduce(losses)


def _mean(one: Losses, other: Losses) -> Any:
    return sum(one[task] - other[task] for task in one) / len(one)


def mean(recovered: Mapping[str, Any]) -> Any:
    """The mean over tasks."""
    return sum(recovered.values()) / len(recovered)


class Judge:
    """Compares merges of one regime on the rows of one split."""

    def __init__(self, lab: Lab, regime: Regime, split: str):
        self.lab, self.regime, self.split = lab, regime, split
        tasks = lab.tasks if regime.forgot else [lab.task_of(name) for name in regime.experts]
        self.tasks = tuple(dict.fromkeys(tasks))
        self.models = {
            name: lab.score_model(name, split, self.tasks) for name in (BASE, *regime.experts)
        }

    def scores(self, merge: Merge) -> Scores:
        """Scores of a method's merge of the regime's experts."""
        whole = replace(merge, experts=self.regime.experts, mixed=self.regime.forgot)
        return self.lab.score(whole, self.split, self.tasks)

    def recoveries(self, scores: Scores) -> dict[str, float]:
        """Task by task."""
        of = {name: loss(known) for name, known in self.models.items()}
        return {k: float(v) for k, v in recoveries(self.lab, self.regime, loss(scores), of).items()}

    def ahead(self, scores: Scores, reference: Scores) -> list[float]:
        """The 95 % interval of how far a merge is ahead, by a paired bootstrap of rows."""
        generator = np.random.default_rng(0)
        drawn = {
            task: generator.integers(len(scores[task]), size=(RESAMPLES, len(scores[task])))
            for task in self.tasks
        }

        def losses(known: Scores) -> dict[str, NDArray[np.float64]]:
            each = {}
            for task, rows in drawn.items():
                nats = np.array([row.nats for row in known[task]])[rows].sum(1)
                each[task] = nats / np.array([row.tokens for row in known[task]])[rows].sum(1)
            return each

        of = {name: losses(known) for name, known in self.models.items()}
        with np.errstate(divide="ignore", invalid="ignore"):
            one, other = (
                mean(recoveries(self.lab, self.regime, losses(known), of))
                for known in (scores, reference)
            )
            ahead = one - other
        # Drawn rows on which the experts gained nothing say nothing about what was kept of it.
        return [float(x) for x in np.quantile(ahead[np.isfinite(ahead)], (0.025, 0.975))]


KINDS = ("default", "best")


def figures(
    lab: Lab, name: str, kinds: Sequence[str] = KINDS, only: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """A regime's figures, once more after each merge, for a page that grows.

    Args:
        lab: Models, merges and scores.
        name: The regime's.
        kinds: ``default``, ``best`` (of those tried, on validation rows) or both.
        only: Methods; all if empty.
    """
    regime = regimes(lab.tasks)[name]
    test = Judge(lab, regime, "test")
    every = methods(len(regime.experts))
    reference = test.scores(every[REFERENCE].default)
    rows: dict[str, Any] = {}
    found = {
        "about": regime.about,
        "models": {
            model: {"loss": loss(known), "exact": exact(known)}
            for model, known in test.models.items()
        },
        "methods": rows,
    }
    for kind in kinds:
        for method, row in every.items():
            if only and method not in only:
                continue
            merge = row.default if kind == "default" else _best(lab, regime, row)
            scores = test.scores(merge)
            rows.setdefault(method, {"ours": row.ours})[kind] = {
                "settings": merge.settings(),
                "recovery": test.recoveries(scores),
                "loss": loss(scores),
                "exact": exact(scores),
                "ahead": test.ahead(scores, reference),
            }
            yield found


def _best(lab: Lab, regime: Regime, row: Method) -> Merge:
    tried = row.tried[: lab.scale.tried]
    if len(tried) == 1:
        return tried[0]
    judge = Judge(lab, regime, "validation")
    return max(tried, key=lambda merge: mean(judge.recoveries(judge.scores(merge))))
