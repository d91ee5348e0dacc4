"""The figures of docs/evidence.json as the tables and plots of docs/evidence.md.

In the page's text a table stands between ``<!-- table: small/methods -->`` and
``<!-- end -->``; what is between is replaced.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

DOCS = Path(__file__).resolve().parents[2] / "docs"
REFERENCE = "OBIM, nearest"  # what the others are compared with, seed by seed
Seeds = dict[str, Any]  # seed -> a table's figures
_BLOCK = re.compile(r"(<!-- table: (\w+)/(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(docs: Path) -> dict[str, Any]:
    """All figures: scale -> table -> seed -> {"figures", "made"}."""
    return read_figures(docs / "evidence.json")


def write(docs: Path, kept: dict[str, Any]) -> None:
    """Keep the figures, and put them into the page and its plots, where there is a page."""
    write_figures(docs / "evidence.json", kept, render)


def read_figures(path: Path) -> dict[str, Any]:
    """The figures that are kept beside a page; none if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_figures(
    path: Path, kept: dict[str, Any], render: Callable[[str, dict[str, Any]], str]
) -> None:
    """Keep a page's figures, whole or not at all, and render the page of that name, if it is there.

    Args:
        path: Where the figures go; the page is beside it.
        kept: The figures.
        render: Gives the page's text with the figures, of the text that is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    page = path.with_suffix(".md")
    if page.exists():
        page.write_text(render(page.read_text(encoding="utf-8"), kept), encoding="utf-8")


def render(text: str, kept: dict[str, Any]) -> str:
    """The page's text with every table made anew from the figures."""

    def table(match: re.Match[str]) -> str:
        begin, scale, name, end = match.groups()
        figures = figures_of(kept, scale, name)
        if not figures:
            return f"{begin}*Not run yet.*\n{end}"
        made = kept[scale][name][max(figures, key=int)]["made"]
        where = [f"seeds {', '.join(figures)}", *(f"{key} {value}" for key, value in made.items())]
        return "\n".join([begin.rstrip(), *FORMS[name](figures), "", f"*{'; '.join(where)}*", end])

    return _BLOCK.sub(table, text)


def figures_of(kept: Mapping[str, Any], scale: str, table: str) -> Seeds:
    """One table's figures by seed, in the seeds' order."""
    seeds = kept.get(scale, {}).get(table, {})
    return {seed: seeds[seed]["figures"] for seed in sorted(seeds, key=int)}


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of a mean, by Student's t; NaN for one."""
    if len(values) < 2:
        return math.nan
    quantile = float(student.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def summary(values: Sequence[float]) -> str:
    """A mean over seeds and its interval."""
    middle = f"{statistics.fmean(values):.3f}"
    return middle if len(values) < 2 else f"{middle} ± {interval(values):.3f}"


def mean(recovery: Mapping[str, float]) -> float:
    """The mean over tasks."""
    return statistics.fmean(recovery.values())


def as_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown, as lines."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def in_words(settings: Mapping[str, Any]) -> str:
    """A merge's parameters, for a cell of a table."""
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "–"


def _models(seeds: Seeds) -> list[str]:
    tasks = list(next(iter(seeds.values()))["experts"])

    def row(name: str, losses: Callable[[Any, str], float]) -> list[str]:
        return [name, *(summary([losses(one, task) for one in seeds.values()]) for task in tasks)]

    rows = [
        row("base", lambda one, task: one["base"]["loss"][task]),
        row("the task's own expert", lambda one, task: one["experts"][task]["loss"][task]),
        row("Task Arithmetic, weight 1/K", lambda one, task: one["average"]["loss"][task]),
    ]
    held = sum(one["guard"] for one in seeds.values())
    guard = f"The even average beats the base on every task for {held} of {len(seeds)} seeds."
    return [*as_table(["model", *tasks], rows), "", guard]


def _methods(seeds: Seeds) -> list[str]:
    first = next(iter(seeds.values()))
    tasks = list(next(iter(first.values()))["default"]["recovery"])
    reference = [mean(one[REFERENCE]["default"]["recovery"]) for one in seeds.values()]
    rows = []
    for name in first:
        for kind in ("default", "best"):
            found = [one[name][kind] for one in seeds.values()]
            each = [summary([one["recovery"][task] for one in found]) for task in tasks]
            exact = summary([one["accuracy"]["math"] for one in found])
            chosen = {in_words(one["settings"]): None for one in found}
            how = "; ".join(chosen) if len(chosen) < 3 else "differs by seed"
            means = [mean(one["recovery"]) for one in found]
            ahead = summary([ours - other for ours, other in zip(reference, means, strict=True)])
            rows.append([name, kind, f"**{summary(means)}**", ahead, *each, exact, how])
    header = ["method", "setting", "mean", "nearest, default, ahead by", *tasks, "correct sums"]
    return as_table([*header, "settings"], rows)


def _by_task(what: str) -> Callable[[Seeds], list[str]]:
    """A row for each way, a column for each task, and the mean over the tasks that it has."""

    def form(seeds: Seeds) -> list[str]:
        first = next(iter(seeds.values()))
        tasks = list(dict.fromkeys(task for row in first.values() for task in row))
        rows = []
        for name in first:
            found = [one[name] for one in seeds.values()]
            each = [summary([one[task] for one in found]) for task in tasks]
            rows.append([name, f"**{summary([mean(one) for one in found])}**", *each])
        return as_table([what, "mean", *tasks], rows)

    return form


def _crossed(across: str) -> Callable[[Seeds], list[str]]:
    """A row for each way, a column for each value: mean recoveries."""

    def form(seeds: Seeds) -> list[str]:
        first = next(iter(seeds.values()))
        values = list(next(iter(first.values())))
        rows = [
            [way, *(summary([mean(one[way][value]) for one in seeds.values()]) for value in values)]
            for way in first
        ]
        return as_table([across, *values], rows)

    return form


def by_way(seeds: Seeds) -> Seeds:
    """Figures that are listed by number of experts first, listed by method first."""
    return {
        seed: {way: {count: row[way] for count, row in one.items()} for way in one["2"]}
        for seed, one in seeds.items()
    }


def _count(seeds: Seeds) -> list[str]:
    return _crossed("experts")(by_way(seeds))


FORMS: dict[str, Callable[[Seeds], list[str]]] = {
    "models": _models,
    "methods": _methods,
    "variants": _by_task("rule"),
    "density": _crossed("density"),
    "source": _crossed("math is calibrated on"),
    "samples": _crossed("samples"),
    "order": _by_task("order"),
    "unscored": _crossed("h left out for half"),
    "count": _count,
    "answers": _by_task("correct answers"),
    "forgetting": _by_task("loss"),
    "correlations": _by_task("merge"),
    "correlations_one_run": _by_task("loss"),
    "tuned": _by_task("merge"),
    "tuned_one_run": _by_task("loss"),
}
