"""The report's charts, as SVG that scales to a phone's width and adapts to light and dark pages.

Each function returns one ``<svg>`` element. Its ``name`` makes every id in it unique, so that
charts with different names can share a page. Charts have no titles, for the page has them.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# A colour that no chart uses otherwise: what is drawn in it takes the page's text colour.
_INK = "#010203"
# Inches. The page shows a chart at about this width on a phone, so that letters keep their size.
_WIDTH = 3.6
# Distinguishable with any kind of colour vision, on white and on black; the base is grey.
COLOURS = ("#0077bb", "#d55e00", "#009e73", "#cc79a7", "#7a6ff0", "#999900", "#a05a2c", "#33a0c0")
GREY = "#888888"
_HATCHES = ("", "////", "----", "xxxx")
_LINES = ("-", "--", ":", "-.")
_MARKERS = "osD^vP*X"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 8,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def colour_of(owner: int, experts: int) -> str:
    """Return the colour of an expert, by its index; ``owner == experts`` is the base."""
    return GREY if owner == experts else COLOURS[owner % len(COLOURS)]


@mpl.rc_context(_STYLE)
def heat_map(
    name: str, places: Sequence[str], kinds: Sequence[str], values: np.ndarray, highest: float
) -> str:
    """Draw shares by kind of tensor (down) and place in the model (across).

    Args:
        name: The chart's own name on the page.
        places: Labels of the columns.
        kinds: Labels of the rows.
        values: The shares, [kinds, places]; NaN where there is no such tensor.
        highest: The share at the top of the colour scale, for charts to be comparable.
    """
    labels = [_wrapped(kind, 28) for kind in kinds]
    lines = max(label.count("\n") for label in labels) + 1
    figure, axes = _axes(0.7 + 0.17 * lines * len(kinds))
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(values), vmin=0, vmax=highest or 1, cmap="viridis",
        edgecolor="face", linewidth=0.2,
    )  # fmt: skip
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(kinds)) + 0.5, labels, fontsize=7)
    _mark_places(axes, places, offset=0.5)
    bar = figure.colorbar(mesh, ax=axes, format=_percent, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    return _svg(figure, name)


@mpl.rc_context(_STYLE)
def stacked(
    name: str,
    places: Sequence[str],
    parts: Sequence[tuple[str, str, Sequence[float]]],
    line: tuple[str, Sequence[float]] | None = None,
) -> str:
    """Draw shares on top of each other at each place in the model, and a line over them.

    Args:
        name: The chart's own name on the page.
        places: Labels of the bars.
        parts: A label, a colour and a share for each place, from the bottom up.
        line: A label and a share for each place.
    """
    figure, axes = _axes(2.1)
    below = np.zeros(len(places))
    x = np.arange(len(places))
    for number, (label, colour, heights) in enumerate(parts):
        axes.bar(
            x, heights, 0.9, below, color=colour, label=label,
            hatch=_HATCHES[number % len(_HATCHES)], edgecolor=_INK, linewidth=0,
        )  # fmt: skip
        below += np.asarray(heights)
    if line:
        axes.plot(x, line[1], color=_INK, marker="o", markersize=2.5, lw=1, label=line[0])
    _mark_places(axes, places)
    axes.yaxis.set_major_formatter(_percent)
    axes.set_ylim(bottom=0)
    _legend(figure, axes)
    return _svg(figure, name)


@mpl.rc_context(_STYLE)
def lines(
    name: str,
    x: Sequence[float],
    curves: Sequence[tuple[str, Sequence[float]]],
    labels: tuple[str, str],
    now: float,
) -> str:
    """Draw shares as curves over another share.

    Args:
        name: The chart's own name on the page.
        x: Where each curve has a point.
        curves: A label and a share for each point.
        labels: What the axes show, x and y.
        now: The x of the recipe, which is marked.
    """
    figure, axes = _axes(2.2)
    for number, (label, y) in enumerate(curves):
        axes.plot(
            x, y, color=COLOURS[number % len(COLOURS)], lw=1.5, label=label,
            marker=_MARKERS[number % len(_MARKERS)], markersize=3.5,
            linestyle=_LINES[number % len(_LINES)],
        )  # fmt: skip
    axes.axvline(now, color=_INK, lw=0.8, linestyle=":")
    axes.text(
        now, 1.01, "this recipe", fontsize=7, ha="center", transform=axes.get_xaxis_transform()
    )
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.xaxis.set_major_formatter(_percent)
    axes.yaxis.set_major_formatter(_percent)
    axes.set_ylim(bottom=0)
    _legend(figure, axes)
    return _svg(figure, name)


@mpl.rc_context(_STYLE)
def similarity(name: str, models: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    """Draw a symmetric K × K matrix of numbers from −1 to 1, None where there is none."""
    labels = [_wrapped(f"{number}: {model}", 24) for number, model in enumerate(models, 1)]
    figure, axes = _axes(0.3 + 0.35 * len(models))
    numbers = np.array(values, dtype=float)  # None becomes NaN
    axes.pcolormesh(np.ma.masked_invalid(numbers), vmin=-1, vmax=1, cmap="PuOr")
    for (i, j), value in np.ndenumerate(numbers):
        if not np.isnan(value):
            ink = "white" if abs(value) > 0.6 else "black"  # on a dark or a light cell
            text = f"{round(value, 2) + 0.0:.2f}"  # no −0.00
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=ink)
    axes.invert_yaxis()
    centres = np.arange(len(models)) + 0.5
    axes.set_xticks(centres, [str(number) for number, _ in enumerate(models, 1)], fontsize=7)
    axes.set_yticks(centres, labels, fontsize=7)
    return _svg(figure, name)


def _axes(height: float) -> tuple[Figure, Any]:
    figure = Figure((_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _percent(value: float, _: int) -> str:
    return f"{value:.0%}"


def _wrapped(name: str, width: int) -> str:
    """Break a name into lines of ``width`` characters, as nothing of it may be lost."""
    return textwrap.fill(name, width)


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    # A line of a chart has room for 25 characters twice, or for 52 once.
    columns = 2 if max(map(len, labels)) <= 25 else 1
    labels = [_wrapped(label, 52) for label in labels]
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def _mark_places(axes: Any, places: Sequence[str], offset: float = 0.0) -> None:
    """Label the axis with a few blocks' numbers, and with what is outside the blocks."""
    short = [place.rpartition(".")[2] for place in places]
    step = max(1, -(-len(short) // 8))
    shown = [i for i in range(len(short)) if i % step == 0 or i == len(short) - 1]
    if len(shown) > 1 and shown[-1] - shown[-2] < step:
        del shown[-2]  # it would touch the last label
    axes.set_xticks([i + offset for i in shown], [short[i] for i in shown], fontsize=7)
    axes.set_xlabel("layer")


def _svg(figure: Figure, name: str) -> str:
    # `savefig` would lay out and draw everything again, and take half as long once more.
    engine: Any = figure.get_layout_engine()
    engine.execute(figure)
    figure.set_layout_engine("none")
    for number, artist in enumerate(figure.findobj()):  # tick marks are there once it is laid out
        artist.set_gid(f"{name}-{number}")
    buffer = io.StringIO()
    canvas: Any = FigureCanvasSVG(figure)
    # The salt makes the ids that matplotlib derives from contents this chart's own, and the same
    # each time.
    with mpl.rc_context({"svg.hashsalt": name}):
        canvas.print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    # HTML has no place for XML's declaration and document type.
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")
