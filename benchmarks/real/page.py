"""The figures of docs/evidence-real.json as the tables of docs/evidence-real.md.

In the page's text a table stands between ``<!-- table: smollm2/lead -->`` and ``<!-- end -->``;
what is between is replaced. ``lead`` is the table of all regimes, ``light-4`` that of one.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.page import (
    as_table,
    in_words,
    mean,
    read_figures,
    summary,
    write_figures,
)
from benchmarks.real.tables import KINDS, methods

DOCS = Path(__file__).resolve().parents[2] / "docs"
Regimes = Mapping[str, Mapping[str, Any]]  # regime -> seed -> figures
_BLOCK = re.compile(r"(<!-- table: (\w+)/([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(docs: Path) -> dict[str, Any]:
    """All figures: scale -> regime -> seed -> {"models", "methods", "made"}."""
    return read_figures(docs / "evidence-real.json")


def write(docs: Path, kept: dict[str, Any]) -> None:
    """Keep the figures, to five digits, and put them into the page, where there is one."""
    write_figures(docs / "evidence-real.json", _rounded(kept), lambda text, _: render(text, kept))


def add(
    before: Mapping[str, Any], found: Mapping[str, Any], made: Mapping[str, str]
) -> dict[str, Any]:
    """A regime's figures of one seed with more methods, or more of what is known of them.

    Args:
        before: The figures that are there.
        found: The new ones.
        made: Where and by which commit they were made; all commits of a regime are told.
    """
    rows = dict(before.get("methods", {}))
    for method, row in found["methods"].items():
        rows[method] = {**rows.get(method, {}), **row}
    order = [method for method in methods(2) if method in rows]
    commits = before.get("made", {}).get("commit", "").split(", ")
    commit = ", ".join(dict.fromkeys(one for one in (*commits, made["commit"]) if one))
    return {
        **found,
        "methods": {method: rows[method] for method in order},
        "made": {**made, "commit": commit},
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def render(text: str, kept: Mapping[str, Any]) -> str:
    """The page's text with every table made anew from the figures."""

    def table(match: re.Match[str]) -> str:
        begin, scale, name, end = match.groups()
        regimes = kept.get(scale, {})
        if name != "lead" and name not in regimes:
            return f"{begin}*Not run yet.*\n{end}"
        lines = _lead(regimes) if name == "lead" else _regime(regimes[name])
        return "\n".join([begin.rstrip(), *lines, end])

    return _BLOCK.sub(table, text)


def scores(seeds: Mapping[str, Any], method: str, kind: str) -> list[float]:
    """A method's mean recovery of each seed that has it."""
    return [
        mean(one["methods"][method][kind]["recovery"])
        for one in seeds.values()
        if kind in one["methods"].get(method, {})
    ]


def regrets(regimes: Regimes, kind: str) -> dict[str, dict[str, float]]:
    """How far each method is below the best of the same kind: regime -> method -> recovery."""
    found = {}
    for name, seeds in regimes.items():
        every = dict.fromkeys(method for one in seeds.values() for method in one["methods"])
        each = {m: statistics.fmean(known) for m in every if (known := scores(seeds, m, kind))}
        best = max(each.values(), default=math.nan)
        found[name] = {method: best - score for method, score in each.items()}
    return found


def worst(regimes: Regimes, kind: str) -> dict[str, float]:
    """Each method's regret where it is largest; infinite where a regime lacks the method."""
    below = regrets(regimes, kind)
    every = dict.fromkeys(m for seeds in regimes.values() for one in seeds.values()
                          for m in one["methods"])  # fmt: skip
    return {m: max(one.get(m, math.inf) for one in below.values()) for m in every}


def order(regimes: Regimes) -> list[str]:
    """The methods, those with the least worst regret by default first."""
    regret = worst(regimes, "default")
    return sorted(regret, key=lambda method: regret[method])


def _lead(regimes: Regimes) -> list[str]:
    """Methods × regimes, default / tuned."""
    below = {kind: regrets(regimes, kind) for kind in KINDS}
    most = {kind: worst(regimes, kind) for kind in KINDS}
    ours = {m for seeds in regimes.values() for one in seeds.values()
            for m, row in one["methods"].items() if row["ours"]}  # fmt: skip

    def cell(name: str, method: str, kind: str) -> str:
        found = scores(regimes[name], method, kind)
        shown = f"{statistics.fmean(found):.2f}" if found else "–"
        return f"**{shown}**" if below[kind][name].get(method) == 0 else shown

    rows = []
    for method in order(regimes):
        cells = [" / ".join(cell(name, method, kind) for kind in KINDS) for name in regimes]
        regret = [most[kind][method] for kind in KINDS]
        shown = " / ".join(f"{x:.2f}" if math.isfinite(x) else "–" for x in regret)
        rows.append([f"*{method}*" if method in ours else method, *cells, shown])
    return as_table(["method", *regimes, "worst regret"], rows)


def _regime(seeds: Mapping[str, Any]) -> list[str]:
    """The models' losses, then every method by default and tuned, task by task."""
    first = next(iter(seeds.values()))
    tasks = list(next(iter(first["models"].values()))["loss"])
    models = [
        [name, *(summary([one["models"][name]["loss"][task] for one in seeds.values()])
                 for task in tasks), _exact([one["models"][name] for one in seeds.values()])]
        for name in first["models"]
    ]  # fmt: skip
    parts = list(next(iter(first["methods"].values()))["default"]["recovery"])
    parts = parts if len(parts) > 1 else []
    rows = []
    for method in first["methods"]:
        for kind in KINDS:
            found = [one["methods"][method][kind] for one in seeds.values()
                     if kind in one["methods"].get(method, {})]  # fmt: skip
            if not found:
                continue
            means = [mean(one["recovery"]) for one in found]
            rows.append([
                method, kind.replace("best", "tuned"), f"**{summary(means)}**",
                "; ".join("{:+.2f} to {:+.2f}".format(*one["ahead"]) for one in found),
                *(summary([one["recovery"][task] for one in found]) for task in parts),
                summary([mean(one["loss"]) for one in found]), _exact(found),
                "; ".join(dict.fromkeys(in_words(one["settings"]) for one in found)),
            ])  # fmt: skip
    header = ["method", "setting", "recovery", "ahead of the even average", *parts, "loss",
              "exact", "settings"]  # fmt: skip
    made = first["made"]
    how = "; ".join([f"seeds {', '.join(seeds)}", *(f"{key} {made[key]}" for key in made)])
    return [
        f"{first['about'][0].upper()}{first['about'][1:]}.",
        "",
        *as_table(["model", *tasks, "exact"], models),
        "",
        *as_table(header, rows),
        "",
        f"*{how}*",
    ]


def _exact(found: Sequence[Mapping[str, Any]]) -> str:
    shares = [mean(one["exact"]) for one in found if one["exact"]]
    return summary(shares) if shares else "–"
