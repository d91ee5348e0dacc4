"""The plots of docs/evidence.md, from the figures of docs/evidence.json."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.evidence.page import Seeds, by_way, figures_of, interval, mean
from benchmarks.evidence.tables import methods

# The same figures give the same file.
_STYLE = {"svg.hashsalt": "evidence", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
OURS, OTHERS = "#0072b2", "#7a7a7a"  # Okabe and Ito's blue, told apart from grey by everyone


def draw(docs: Path, kept: Mapping[str, Any]) -> list[Path]:
    """Write every plot whose figures are there to docs/evidence/<scale>-<table>.svg."""
    drawn = []
    for scale in kept:
        for name, plot in PLOTS.items():
            seeds = figures_of(kept, scale, name)
            if not seeds:
                continue
            with matplotlib.rc_context(_STYLE):
                figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
                plot(axes, seeds)
                path = docs / "evidence" / f"{scale}-{name}.svg"
                path.parent.mkdir(exist_ok=True)
                figure.savefig(path, metadata={"Date": None})
                plt.close(figure)
            drawn.append(path)
    return drawn


def _methods(axes: Axes, seeds: Seeds) -> None:
    rows, first = methods(), next(iter(seeds.values()))
    for place, name in enumerate(reversed(list(first))):
        colour = OURS if rows[name].ours else OTHERS
        for kind, marker, fill, offset in (
            ("default", "o", colour, 0.15),
            ("best", "D", "white", -0.15),
        ):
            values = [mean(one[name][kind]["recovery"]) for one in seeds.values()]
            axes.errorbar(
                statistics.fmean(values),
                place + offset,
                xerr=interval(values) if len(values) > 1 else None,
                fmt=marker,
                color=colour,
                markerfacecolor=fill,
                markersize=5,
            )
    axes.set_yticks(range(len(first)), list(reversed(list(first))))
    axes.set_xlabel(
        "mean recovery, 95 % interval over seeds\n"
        "(● default, ◇ best on validation text; blue: every element is the base's or one expert's)"
    )


def _lines(what: str) -> Callable[[Axes, Seeds], None]:
    def plot(axes: Axes, seeds: Seeds) -> None:
        first = next(iter(seeds.values()))
        for way, marker in zip(first, "os^Dv", strict=False):
            values = list(first[way])
            points = [[mean(one[way][value]) for one in seeds.values()] for value in values]
            axes.errorbar(
                [float(value) for value in values],
                [statistics.fmean(p) for p in points],
                yerr=[interval(p) for p in points] if len(seeds) > 1 else None,
                marker=marker,
                label=way,
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel(what)
        axes.set_ylabel("mean recovery")
        axes.legend()

    return plot


PLOTS: dict[str, Callable[[Axes, Seeds], None]] = {
    "methods": _methods,
    "density": _lines("density: the share of positions that each expert may claim"),
    "count": lambda axes, seeds: _lines("experts")(axes, by_way(seeds)),
}
