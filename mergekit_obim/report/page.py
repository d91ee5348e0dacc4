"""The report as one HTML file that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from mergekit_obim.report import figures
from mergekit_obim.report.card import measured_on

_CSS = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fdfdfc; --soft: #5f5f5f;
  --line: #d4d4d0; --mark: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --paper: #161618; --soft: #ababab;
  --line: #3a3a3e; --mark: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin: 2rem 0 .3rem; }
p { max-width: 44rem; margin: .4rem 0; } .soft, figcaption, summary { color: var(--soft); }
.mark { color: var(--mark); font-weight: 600; }
a { color: inherit; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: .5rem 0; min-width: 0; } figure svg { display: block; width: 100%; height: auto;
  max-width: 30rem; color: var(--ink); }
figcaption { font-size: .875rem; max-width: 30rem; }
summary { cursor: pointer; padding: .6rem 0; min-height: 44px; } :focus-visible { outline: 2px solid; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem .3rem 0; text-align: right;
  vertical-align: top; overflow-wrap: normal; white-space: nowrap; }
th:first-child, .text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
@media print { details { display: block; } }
"""  # noqa: E501


def render(report: dict[str, Any]) -> str:
    """The page.

    Args:
        report: As ``summary.summarize`` gives it.
    """
    names = short_names(report["experts"])
    sections = [
        _overview(report, names),
        _shares(report, names),
        _contested(report, names),
        _errors(report, names),
        _curve(report, names),
        _kinship(report, names),
        _fallbacks(report),
        _calibration(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>OBIM merge report: {escape(', '.join(names))}</title>\n<style>{_CSS}</style>\n"
        "</head>\n<body>\n<main>\n" + "\n".join(filter(None, sections)) + "\n</main>\n</body>\n"
        "</html>\n"
    )


def short_names(experts: Sequence[str]) -> list[str]:
    """Last parts of references, as many of them as it takes to tell the experts apart.

    >>> short_names(["./models/math", "org/code@v1"])
    ['math', 'code@v1']
    >>> short_names(["a/x", "b/x"])
    ['a/x', 'b/x']
    """
    parts = [expert.rstrip("/").split("/") for expert in experts]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(experts)


def _overview(report: dict[str, Any], names: list[str]) -> str:
    elements = report["elements"]
    columns = ["weights", "kept", "overwritten", "dropped", "error"]
    rows = []
    for name, owned, shares in zip(names, report["owned"], report["experts_total"], strict=False):
        rows.append([name, _percent(owned / elements), *(_percent(shares[k]) for k in columns[1:])])
    rows.append(["the base", _percent(report["owned"][-1] / elements), *[""] * 4])
    if report["densities"]:
        columns.insert(0, "density")
        for row, density in zip(rows, [*report["densities"], None], strict=True):
            row.insert(1, _percent(density))
    notes = []
    if report["differing"]:
        first, more = report["differing"][0], len(report["differing"]) - 1
        notes.append(
            f'<p class="mark">The merged model is not what this recipe makes: {escape(first)}'
            + (f" and {more} more tensors differ" if more else " differs")
            + ", as far as sampled.</p>"
        )
    if not report["measured"]:
        notes.append(
            "<p>No tensor has a saliency for every expert: what follows counts every weight's "
            "change alike.</p>"
        )
    parameters = ", ".join(f"{key}: {value}" for key, value in report["parameters"].items())
    return (
        "<h1>What each expert brought to this merge</h1>"
        f'<p class="soft">Base {escape(report["base"])}. {escape(parameters)}. '
        f"{elements:,} weights. mergekit-obim {escape(report['mergekit_obim_version'])}.</p>"
        + "".join(notes)
        + _table(
            "The experts. Kept, overwritten and dropped are shares of the expert's own saliency. "
            "Error is the predicted error of the layers' outputs on its calibration data: 0 % is "
            "the expert itself, 100 % the base.",
            ["expert", *columns],
            rows,
        )
    )


def _shares(report: dict[str, Any], names: list[str]) -> str:
    places = _unique(cell["place"] for cell in report["cells"])
    kinds = _unique(cell["kind"] for cell in report["cells"])
    grid = np.full((len(names) + 1, len(kinds), len(places)), np.nan)
    for cell in report["cells"]:
        for owner, count in enumerate(cell["owned"]):
            row, column = kinds.index(cell["kind"]), places.index(cell["place"])
            grid[owner, row, column] = count / max(1, cell["elements"])
    highest = float(np.nanmax(grid[:-1])) if grid[:-1].size else 1.0
    charts = []
    for k, name in enumerate(names):
        charts.append(
            _figure(
                figures.heat_map(name, places, kinds, grid[k], highest),
                f"Share of {name} by layer and kind of tensor: from {_percent(np.nanmin(grid[k]))} "
                f"to {_percent(np.nanmax(grid[k]))}.",
                _table(
                    f"Share of {name}",
                    ["kind", *places],
                    [[kind, *map(_percent, grid[k, row])] for row, kind in enumerate(kinds)],
                ),
            )
        )
    return _section(
        "Whose weights they are",
        "The share of each tensor's weights that is the expert's, layer by layer.",
        charts,
    )


def _contested(report: dict[str, Any], names: list[str]) -> str:
    title = "What more than one expert wanted"
    if report["contested"] is None:
        text = (
            "This assignment has no densities, so no expert wants a set share of the weights, and "
            "none is contested: each is given to the value that costs all experts together least."
        )
        return _section(title, text, [])
    layers = [layer for layer in report["layers"] if layer["contested"] is not None]
    places = [layer["place"] for layer in layers]
    owners = [*names, "the base"]

    def shares(owner: int) -> list[float]:
        return [layer["contested"][owner] / max(1, layer["elements"]) for layer in layers]

    parts = [
        (name, figures.colour_of(owner, len(names)), shares(owner))
        for owner, name in enumerate(owners)
        if report["contested"][owner]
    ]
    total = sum(report["contested"])
    won = ", ".join(
        f"{name} {_percent(count / total)}"
        for name, count in zip(owners, report["contested"], strict=True)
        if total and (count or name != "the base")
    )
    chart = _figure(
        figures.stacked("contested, by who got it", places, parts),
        f"{_percent(total / report['elements'])} of all weights were wanted by two or more experts"
        + (f"; they went to: {won}." if total else "."),
        _table(
            "Contested weights",
            ["layer", *owners],
            [
                [place, *(f"{count:,}" for count in layer["contested"])]
                for place, layer in zip(places, layers, strict=True)
            ],
        ),
    )
    return _section(
        title,
        "A weight is contested if it is among the best of two or more experts, each taken as if it "
        "were alone. The one that chooses first in that layer gets it. Estimated from 2,048 "
        "weights of each tensor.",
        [chart],
    )


def _errors(report: dict[str, Any], names: list[str]) -> str:
    charts = []
    for k, name in enumerate(names):
        layers = [layer for layer in report["layers"] if layer["experts"][k]["kept"] is not None]
        if not layers:
            continue
        places = [layer["place"] for layer in layers]
        values = {
            key: [layer["experts"][k][key] for layer in layers]
            for key in ("kept", "overwritten", "dropped", "error")
        }
        parts = [
            ("kept", figures.COLOURS[0], values["kept"]),
            ("overwritten by others", figures.COLOURS[1], values["overwritten"]),
            ("dropped to the base", figures.GREY, values["dropped"]),
        ]
        worst = int(np.argmax(values["error"]))
        charts.append(
            _figure(
                figures.stacked(name, places, parts, ("predicted error", values["error"])),
                f"{name}: the predicted error is largest in {places[worst]}, "
                f"{_percent(values['error'][worst])} of the base's.",
                _table(
                    f"Saliency of {name}, and its predicted error",
                    ["layer", *values],
                    [
                        [place, *(_percent(column[i]) for column in values.values())]
                        for i, place in enumerate(places)
                    ],
                ),
            )
        )
    return _section(
        "What became of each expert's saliency",
        "Saliency that is dropped is the error that leaving the base's weight makes in the layer's "
        "output. Where another expert's weight stands, the error can be larger or smaller than "
        "that. So the line may pass 100 %: the layer then serves this expert worse than the "
        "base's.",
        charts,
    )


def _curve(report: dict[str, Any], names: list[str]) -> str:
    heading = "Other orders and densities"
    if not report["densities"]:
        return _section(heading, "This assignment has no order and no densities.", [])
    if not report["curve"]:  # all densities are 0
        return ""
    orders = _unique(point["order"] for point in report["curve"])
    sums = _unique(point["density"] for point in report["curve"])
    at = {(point["order"], point["density"]): point["experts"] for point in report["curve"]}
    now = sum(report["densities"])

    def mean(order: str, density: float) -> float:
        errors = [shares["error"] for shares in at[order, density]]
        return float(np.mean([np.nan if error is None else error for error in errors]))

    charts = []
    views: list[tuple[str, str, Callable[[str, float], float]]] = [
        ("mean over the experts", "predicted error", mean)
    ]
    for k, name in enumerate(names):

        def kept(order: str, density: float, k: int = k) -> float:
            value = at[order, density][k]["kept"]
            return np.nan if value is None else value

        views.append((name, "saliency kept", kept))
    for title, label, value in views:
        curves = [(order, [value(order, share) for share in sums]) for order in orders]
        best = min if label == "predicted error" else max
        order, share = best(
            ((o, s) for o in orders for s in sums), key=lambda place: np.nan_to_num(value(*place))
        )
        charts.append(
            _figure(
                figures.lines(title, sums, curves, ("sum of the densities", label), now),
                f"{title}: the {label} is best at {_percent(value(order, share))}, with order "
                f"{order} and densities that sum to {_percent(share)}.",
                _table(
                    f"{title}: {label}",
                    ["densities", *orders],
                    [
                        [_percent(share), *(_percent(y[i]) for _, y in curves)]
                        for i, share in enumerate(sums)
                    ],
                ),
            )
        )
    return _section(
        heading,
        "What other settings would keep, with the densities in the recipe's proportions: an "
        "estimate from a sample of each tensor's weights, without merging. It says what the "
        "layers' outputs would be on calibration data, not how good a merged model is.",
        charts,
    )


def _kinship(report: dict[str, Any], names: list[str]) -> str:
    measures = report["kinship"]
    tables = [
        _table(title, ["", *names], [[n, *map(f, row)] for n, row in zip(names, rows, strict=True)])
        for title, rows, f in (
            ("Pearson correlation", measures["pearson"], _number),
            ("Cosine", measures["cosine"], _number),
            ("Euclidean distance", measures["euclidean"], _number),
        )
    ]
    chart = _figure(
        figures.similarity("cosine of the task vectors", names, measures["cosine"]),
        "How alike the experts' task vectors are: 1 the same way, 0 unrelated, −1 opposite.",
        "".join(tables),
    )
    return _section("Kinship", "", [chart])


def _fallbacks(report: dict[str, Any]) -> str:
    rows = [
        [f["tensor"], f["expert"], f["ranked"] or "left at the base", f["reason"] or "asked for"]
        for f in report["fallbacks"]
    ]
    rows += [[name, "", "copied", "no weights"] for name in report["copied"]]
    if not rows:
        return _section("Without saliency", "Every tensor of every expert has a saliency.", [])
    table = _table("", ["tensor", "expert", "ranked by", "why"], rows, text=4)
    body = f"<details><summary>All {len(rows)}</summary>{table}</details>"
    kinds = _unique(f"{row[2]}: {row[3]}" for row in rows)
    return _section("Without saliency", f"{len(rows)} tensors. {'; '.join(kinds)}.", [], body)


def _calibration(report: dict[str, Any]) -> str:
    rows = []
    for expert in report["experts"]:
        file = report["calibration"].get(expert)
        record = json.dumps(file["calibration"], ensure_ascii=False) if file else ""
        rows.append(
            [expert, measured_on(file).replace("`", ""), file["file"] if file else "", record]
        )
    table = _table("", ["expert", "measured on", "saliency file", "record"], rows, text=4)
    return _section("Calibration", "What each expert's saliency was measured on.", [], table)


def _section(title: str, text: str, charts: Sequence[str], body: str = "") -> str:
    grid = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{grid}{body}</section>"


def _figure(svg: str, caption: str, table: str) -> str:
    # The caption is the chart's text for who does not see it, and the table all that is in it.
    return (
        f"<figure>{svg}<figcaption>{escape(caption)}</figcaption>"
        f"<details><summary>Numbers</summary>{table}</details></figure>"
    )


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> str:
    titles = "".join(
        f'<th scope="col" class="text">{escape(cell)}</th>'
        if i < text
        else f'<th scope="col">{escape(cell)}</th>'
        for i, cell in enumerate(head)
    )
    body = "".join(
        "<tr>"
        + f'<th scope="row">{escape(row[0])}</th>'
        + "".join(
            f'<td class="text">{escape(cell)}</td>' if i < text else f"<td>{escape(cell)}</td>"
            for i, cell in enumerate(row[1:], 1)
        )
        + "</tr>"
        for row in rows
    )
    label = escape(caption or head[0], quote=True)
    return (
        # Above the part that scrolls, where it is wrapped to the page's width.
        (f'<p class="soft">{escape(caption)}</p>' if caption else "")
        + f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        + f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _percent(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
