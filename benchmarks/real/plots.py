"""The plot of docs/evidence-real.md: every method in every regime, as dots."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from benchmarks.evidence.plots import OTHERS, OURS
from benchmarks.real.page import order, scores
from benchmarks.real.tables import KINDS

# The same figures give the same file.
_STYLE = {"svg.hashsalt": "evidence-real", "font.size": 8, "axes.grid": True, "grid.alpha": 0.3}
_LEAST = -0.5  # what is worse stands at the edge


def draw(docs: Path, kept: Mapping[str, Any]) -> list[Path]:
    """Write docs/evidence/<scale>-real.svg: a panel for each regime, a row for each method."""
    return [_draw(docs / "evidence" / f"{scale}-real.svg", kept[scale]) for scale in kept]


def _draw(path: Path, regimes: Mapping[str, Mapping[str, Any]]) -> Path:
    methods = order(regimes)[::-1]
    ours = {method for seeds in regimes.values() for one in seeds.values()
            for method, row in one["methods"].items() if row["ours"]}  # fmt: skip
    with matplotlib.rc_context(_STYLE):
        figure, panels = plt.subplots(
            1, len(regimes), figsize=(1.7 + 1.5 * len(regimes), 0.6 + 0.19 * len(methods)),
            sharey=True, squeeze=False, layout="constrained",
        )  # fmt: skip
        for axes, (name, seeds) in zip(panels[0], regimes.items(), strict=True):
            for place, method in enumerate(methods):
                colour = OURS if method in ours else OTHERS
                for kind, fill in zip(KINDS, (colour, "white"), strict=True):
                    if found := scores(seeds, method, kind):
                        mean = max(statistics.fmean(found), _LEAST)
                        axes.plot(
                            mean, place, "o", color=colour, markerfacecolor=fill, markersize=4
                        )
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_xlim(_LEAST - 0.05, max(1.1, axes.get_xlim()[1]))
            axes.set_title(name, fontsize=8)
        panels[0][0].set_yticks(range(len(methods)), methods)
        figure.supxlabel("mean recovery: ● default, ○ tuned; blue: ours; at the edge: below −0.5")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return path
