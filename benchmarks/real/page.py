"""The figures of docs/evidence-real.json as the tables of docs/evidence-real.md.

In the page's text a table stands between ``<!-- table: smollm2/lead -->`` and ``<!-- end -->``;
what is between is replaced. ``lead`` is the table of all regimes, ``light-4`` that of one.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.page import summary

DOCS = Path(__file__).resolve().parents[2] / "docs"
KINDS = ("default", "best")
Regimes = Mapping[str, Mapping[str, Any]]  # regime -> seed -> figures
_BLOCK = re.compile(r"(<!-- table: (\w+)/([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(docs: Path) -> dict[str, Any]:
    """All figures: scale -> regime -> seed -> {"models", "methods", "made"}."""
    path = docs / "evidence-real.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(docs: Path, kept: dict[str, Any]) -> None:
    """Keep the figures, and put them into the page, where there is one."""
    docs.mkdir(parents=True, exist_ok=True)
    part = docs / "evidence-real.json.part"
    part.write_text(json.dumps(_rounded(kept), indent=1) + "\n", encoding="utf-8")
    part.replace(docs / "evidence-real.json")
    path = docs / "evidence-real.md"
    if path.exists():
        path.write_text(render(path.read_text(encoding="utf-8"), kept), encoding="utf-8")


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


def _mean(recovery: Mapping[str, float]) -> float:
    return statistics.fmean(recovery.values())


def scores(seeds: Mapping[str, Any], method: str, kind: str) -> list[float]:
    """A method's mean recovery of each seed that has it."""
    return [
        _mean(one["methods"][method][kind]["recovery"])
        for one in seeds.values()
        if method in one["methods"]
    ]


def regrets(regimes: Regimes, kind: str) -> dict[str, dict[str, float]]:
    """How far each method is below the best of the same kind: regime -> method -> recovery."""
    found = {}
    for name, seeds in regimes.items():
        methods = next(iter(seeds.values()))["methods"]
        each = {method: statistics.fmean(scores(seeds, method, kind)) for method in methods}
        best = max(each.values())
        found[name] = {method: best - score for method, score in each.items()}
    return found


def _lead(regimes: Regimes) -> list[str]:
    """Methods × regimes, default / tuned, the worst regret last; the least of it stands first."""
    below = {kind: regrets(regimes, kind) for kind in KINDS}
    methods = list(dict.fromkeys(m for one in below["default"].values() for m in one))
    worst = {
        kind: {m: max(one.get(m, float("nan")) for one in below[kind].values()) for m in methods}
        for kind in KINDS
    }
    best = {(name, kind): next(m for m, x in below[kind][name].items() if x == 0)
            for name in regimes for kind in KINDS}  # fmt: skip
    ours = {m for seeds in regimes.values() for one in seeds.values()
            for m, row in one["methods"].items() if row["ours"]}  # fmt: skip
    rows = []
    for method in sorted(methods, key=lambda m: worst["default"][m]):
        cells = []
        for name, seeds in regimes.items():
            pair = []
            for kind in KINDS:
                found = scores(seeds, method, kind)
                cell = f"{statistics.fmean(found):.2f}" if found else "–"
                pair.append(f"**{cell}**" if best[name, kind] == method else cell)
            cells.append(" / ".join(pair))
        label = f"*{method}*" if method in ours else method
        regret = " / ".join(f"{worst[kind][method]:.2f}" for kind in KINDS)
        rows.append([label, *cells, regret])
    return _table(["method", *regimes, "worst regret"], rows)


def _regime(seeds: Mapping[str, Any]) -> list[str]:
    """The models' losses, then every method by default and tuned, task by task."""
    first = next(iter(seeds.values()))
    tasks = list(next(iter(first["models"].values()))["loss"])
    models = [
        [name, *(summary([one["models"][name]["loss"][task] for one in seeds.values()])
                 for task in tasks), _exact([one["models"][name] for one in seeds.values()])]
        for name in first["models"]
    ]  # fmt: skip
    kept = list(next(iter(first["methods"].values()))["default"]["recovery"])
    rows = []
    for method in first["methods"]:
        for kind in KINDS:
            found = [one["methods"][method][kind] for one in seeds.values()
                     if method in one["methods"]]  # fmt: skip
            each = [summary([one["recovery"][task] for one in found]) for task in kept]
            means = [_mean(one["recovery"]) for one in found]
            chosen = {_settings(one["settings"]): None for one in found}
            ahead = "; ".join("{:+.2f} to {:+.2f}".format(*one["ahead"]) for one in found)
            nats = [_mean(one["loss"]) for one in found]
            rows.append([method, kind.replace("best", "tuned"), f"**{summary(means)}**", ahead,
                         *(each if len(kept) > 1 else []), summary(nats), _exact(found),
                         "; ".join(chosen)])  # fmt: skip
    made = first["made"]
    header = ["method", "setting", "recovery", "ahead of the even average",
              *(kept if len(kept) > 1 else []), "loss", "exact", "settings"]  # fmt: skip
    how = "; ".join([f"seeds {', '.join(seeds)}", *(f"{key} {made[key]}" for key in made)])
    return [
        *_table(["model", *tasks, "exact"], models),
        "",
        *_table(header, rows),
        "",
        f"*{how}*",
    ]


def _exact(found: Sequence[Mapping[str, Any]]) -> str:
    shares = [_mean(one["exact"]) for one in found if one["exact"]]
    return summary(shares) if shares else "–"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "–"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
