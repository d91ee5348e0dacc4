"""The charts, as SVG that fits a phone and takes its ink from the page.

Each is drawn 3.6 inches wide, so that at a phone's width letters keep their size. What is drawn
in the one colour `_INK` becomes the text colour of the page, light or dark.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_INK = "#010203"
_WIDTH = 3.6
# Told apart by people with any kind of colour vision, on white and on black; the base is grey.
COLOURS = ("#0077bb", "#d55e00", "#009e73", "#cc79a7", "#7a6ff0", "#999900", "#a05a2c", "#33a0c0")
GREY = "#888888"
_MARKERS = "osD^vP*X"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mergekit-obim",  # the same figure, the same file
    "font.size": 8,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 7,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def colour_of(owner: int, experts: int) -> str:
    """An expert's colour, or the base's."""
    return GREY if owner == experts else COLOURS[owner % len(COLOURS)]


def heat_map(
    title: str, places: Sequence[str], kinds: Sequence[str], values: np.ndarray, highest: float
) -> str:
    """Shares by kind (down) and place (across); values [kinds, places], NaN for what is not."""
    with mpl.rc_context(_STYLE):
        figure = Figure((_WIDTH, 0.9 + 0.17 * len(kinds)), layout="constrained")
        axes = figure.subplots()
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(values), vmin=0, vmax=highest or 1, cmap="viridis",
            edgecolor="face", linewidth=0.2,
        )  # fmt: skip
        axes.invert_yaxis()
        axes.set_yticks(np.arange(len(kinds)) + 0.5, [_clip(k, 26) for k in kinds], fontsize=7)
        _mark_places(axes, places, offset=0.5)
        _title(figure, title)
        bar = figure.colorbar(mesh, ax=axes, format=lambda x, _: f"{x:.0%}", pad=0.02, aspect=30)
        bar.outline.set_visible(False)
        return _svg(figure)


def stacked(
    title: str,
    places: Sequence[str],
    parts: Sequence[tuple[str, str, Sequence[float]]],
    line: tuple[str, Sequence[float]] | None = None,
) -> str:
    """Parts (name, colour, values) on top of each other, by place, and a line over them."""
    with mpl.rc_context(_STYLE):
        figure = Figure((_WIDTH, 2.3), layout="constrained")
        axes = figure.subplots()
        below = np.zeros(len(places))
        x = np.arange(len(places))
        for number, (name, colour, heights) in enumerate(parts):
            axes.bar(
                x, heights, 0.9, below, color=colour, label=_clip(name),
                hatch=("", "////", "....", "xxxx")[number % 4], edgecolor="none", linewidth=0,
            )  # fmt: skip
            below += np.asarray(heights)
        if line:
            axes.plot(x, line[1], color=_INK, marker="o", markersize=2.5, lw=1, label=line[0])
        _mark_places(axes, places)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_ylim(bottom=0)
        _title(figure, title)
        _legend(figure, axes)
        return _svg(figure)


def lines(
    title: str,
    x: Sequence[float],
    curves: Sequence[tuple[str, Sequence[float]]],
    labels: tuple[str, str],
    now: float | None,
) -> str:
    """Curves (name, values) over x, and a mark at where the recipe is."""
    with mpl.rc_context(_STYLE):
        figure = Figure((_WIDTH, 2.4), layout="constrained")
        axes = figure.subplots()
        for number, (name, y) in enumerate(curves):
            axes.plot(
                x, y, color=COLOURS[number % len(COLOURS)], lw=1.5, label=_clip(name),
                marker=_MARKERS[number % len(_MARKERS)], markersize=3.5,
                linestyle=("-", "--", ":", "-.")[number % 4],
            )  # fmt: skip
        if now is not None:
            axes.axvline(now, color=_INK, lw=0.8, linestyle=":")
            axes.text(now, 1.01, "recipe", fontsize=7, transform=axes.get_xaxis_transform())
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_ylim(bottom=0)
        _title(figure, title)
        _legend(figure, axes)
        return _svg(figure)


def similarity(title: str, names: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    """A square of numbers between −1 and 1."""
    with mpl.rc_context(_STYLE):
        figure = Figure((_WIDTH, 0.9 + 0.35 * len(names)), layout="constrained")
        axes = figure.subplots()
        numbers = np.array(
            [[np.nan if v is None else v for v in row] for row in values], dtype=float
        )
        axes.pcolormesh(np.ma.masked_invalid(numbers), vmin=-1, vmax=1, cmap="PuOr")
        for i, row in enumerate(numbers):
            for j, value in enumerate(row):
                if value == value:
                    ink = "white" if abs(value) > 0.6 else "black"
                    text = f"{value:.2f}"
                    axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=ink)
        axes.invert_yaxis()
        short = [_clip(name) for name in names]
        axes.set_xticks(np.arange(len(names)) + 0.5, short, fontsize=7, rotation=30, ha="right")
        axes.set_yticks(np.arange(len(names)) + 0.5, short, fontsize=7)
        _title(figure, title)
        return _svg(figure)


def _clip(name: str, length: int = 18) -> str:
    """As much of a name as a chart has room for; the tables have it whole."""
    return name if len(name) <= length else f"{name[: length - 9]}…{name[-8:]}"


def _title(figure: Figure, title: str) -> None:
    figure.suptitle(_clip(title, 40), x=0.01, ha="left", fontsize=9)


def _legend(figure: Figure, axes: Any) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)


def _mark_places(axes: Any, places: Sequence[str], offset: float = 0.0) -> None:
    """Name a few blocks by their numbers, and what is outside them."""
    short = [place.rpartition(".")[2] for place in places]
    step = max(1, -(-len(short) // 8))
    shown = [i for i in range(len(short)) if i % step == 0 or i == len(short) - 1]
    if len(shown) > 1 and shown[-1] - shown[-2] < step:
        del shown[-2]
    axes.set_xticks([i + offset for i in shown], [short[i] for i in shown], fontsize=7)
    axes.set_xlabel("layer")


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # `savefig` would draw everything twice, and lay it out each time.
    engine = figure.get_layout_engine()
    assert engine is not None
    figure.dpi = 72  # an SVG's
    engine.execute(figure)
    figure.set_layout_engine("none")
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The page's width decides; screen readers have the caption and the table.
    head, close, body = svg.partition(">")
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    svg = f'{head} aria-hidden="true" focusable="false"{close}{body}'
    # Several figures share a page: ids are dropped, or made this figure's own if referred to.
    referred = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", svg))
    number = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(
        r' id="([^"]*)"',
        lambda match: f' id="f{number}-{match[1]}"' if match[1] in referred else "",
        svg,
    )
    return re.sub(r"(url\(#|href=\"#)([\w-]+)", rf"\g<1>f{number}-\g<2>", svg)
