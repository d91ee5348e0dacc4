"""The report's page: arranges a summary's numbers for the template ``page.html.jinja``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from mergekit_obim.report import figures
from mergekit_obim.report.card import measured_on


def render(report: dict[str, Any]) -> str:
    """Return the report as one HTML file that needs nothing else.

    Args:
        report: What :func:`mergekit_obim.report.summary.summarize` returns.
    """
    environment = Environment(
        loader=PackageLoader("mergekit_obim.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(percent=_percent, thousands=_thousands)
    names = short_names(report["experts"])
    return environment.get_template("page.html.jinja").render(
        report=report,
        names=names,
        owners=[*names, "the base"],
        overview=_overview(report, names),
        ownership=_ownership(report, names),
        contested=_contested(report, names),
        errors=_errors(report, names),
        settings=_settings(report, names),
        kinship=_kinship(report, names),
        fallbacks=_fallbacks(report),
        calibration=_calibration(report),
    )


def short_names(experts: Sequence[str]) -> list[str]:
    """Return the last parts of references, as many as it takes to tell the experts apart.

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


def _overview(report: dict[str, Any], names: list[str]) -> dict[str, Any]:
    shares = [owned / report["elements"] for owned in report["owned"]]
    head = ["weights", "kept", "overwritten", "dropped", "error"]
    rows = [
        [share, *(expert[key] for key in head[1:])]
        for share, expert in zip(shares, report["experts_total"], strict=False)
    ]
    rows.append([shares[-1], *[None] * 4])  # the base
    if report["densities"]:
        head.insert(0, "density")
        for row, density in zip(rows, [*report["densities"], None], strict=True):
            row.insert(0, density)
    return {"head": ["expert", *head], "rows": _percents([*names, "the base"], rows)}


def _ownership(report: dict[str, Any], names: list[str]) -> dict[str, Any]:
    places = _unique(cell["place"] for cell in report["cells"])
    kinds = _unique(cell["kind"] for cell in report["cells"])
    grid = np.full((len(names), len(kinds), len(places)), np.nan)
    for cell in report["cells"]:
        shares = np.array(cell["owned"][:-1]) / max(1, cell["elements"])
        grid[:, kinds.index(cell["kind"]), places.index(cell["place"])] = shares
    highest = float(np.nanmax(grid))
    charts = [
        {
            "name": name,
            "svg": figures.heat_map(f"share-{k}", places, kinds, grid[k], highest),
            "low": np.nanmin(grid[k]),
            "high": np.nanmax(grid[k]),
            "rows": _percents(kinds, grid[k]),
        }
        for k, name in enumerate(names)
    ]
    return {"places": places, "charts": charts}


def _contested(report: dict[str, Any], names: list[str]) -> dict[str, Any] | None:
    if report["contested"] is None:
        return None
    layers = [layer for layer in report["layers"] if layer["contested"] is not None]
    places = [layer["place"] for layer in layers]
    owned = list(zip([*names, "the base"], report["contested"], strict=True))
    parts = [
        (
            name,
            figures.colour_of(owner, len(names)),
            [layer["contested"][owner] / max(1, layer["elements"]) for layer in layers],
        )
        for owner, (name, count) in enumerate(owned)
        if count or owner < len(names)
    ]
    total = sum(report["contested"])
    return {
        "share": total / report["elements"],
        "won": [
            (name, count / total) for name, count in owned if total and (count or name in names)
        ],
        "svg": figures.stacked("contested", places, parts),
        "rows": [
            [place, *map(_thousands, layer["contested"])]
            for place, layer in zip(places, layers, strict=True)
        ],
    }


def _errors(report: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
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
        line = ("predicted error", values["error"])
        charts.append(
            {
                "name": name,
                "svg": figures.stacked(f"error-{k}", places, parts, line),
                "worst": places[worst],
                "error": values["error"][worst],
                "head": ["layer", *values],
                "rows": _percents(places, zip(*values.values(), strict=True)),
            }
        )
    return charts


def _settings(report: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """Return a chart of the mean predicted error, and one of what each expert keeps."""
    orders = _unique(point["order"] for point in report["curve"])
    sums = _unique(point["density"] for point in report["curve"])
    experts = {(point["order"], point["density"]): point["experts"] for point in report["curve"]}

    def values(key: str) -> np.ndarray:
        """Return [orders, sums, experts]; NaN for an expert without saliency."""
        found = [[[e[key] for e in experts[o, s]] for s in sums] for o in orders]
        return np.array(found, dtype=float)

    if not report["curve"]:
        return []
    views = [
        ("Mean over the experts", "predicted error", values("error").mean(axis=-1), np.nanargmin)
    ]
    for k, name in enumerate(names):
        views.append((name, "saliency kept", values("kept")[..., k], np.nanargmax))
    charts = []
    for number, (title, label, grid, best_of) in enumerate(views):
        if np.isnan(grid).all():
            continue
        order, density = np.unravel_index(best_of(grid), grid.shape)
        svg = figures.lines(
            f"settings-{number}",
            sums,
            list(zip(orders, grid, strict=True)),
            ("sum of the densities", label),
            sum(report["densities"]),
        )
        charts.append(
            {
                "title": title,
                "label": label,
                "svg": svg,
                "best": grid[order, density],
                "order": orders[order],
                "density": sums[density],
                "orders": orders,
                "rows": _percents(map(_percent, sums), grid.T),
            }
        )
    return charts


def _kinship(report: dict[str, Any], names: list[str]) -> dict[str, Any]:
    titles = {
        "pearson": "Pearson correlation",
        "cosine": "Cosine",
        "euclidean": "Euclidean distance",
    }
    measures = [
        (
            title,
            [
                [name, *("" if value is None else f"{value:.4g}" for value in row)]
                for name, row in zip(names, report["kinship"][key], strict=True)
            ],
        )
        for key, title in titles.items()
    ]
    svg = figures.similarity("kinship", names, report["kinship"]["cosine"])
    return {"svg": svg, "measures": measures}


def _fallbacks(report: dict[str, Any]) -> dict[str, Any]:
    rows = [
        [f["tensor"], f["expert"], f["ranked"] or "nothing: left at the base", f["reason"]]
        for f in report["fallbacks"]
    ]
    rows += [[name, "", "nothing: copied", "it holds no weights"] for name in report["copied"]]
    return {
        "tensors": len({row[0] for row in rows}),
        "kinds": _unique(f"ranked by {ranked} ({reason})" for _, _, ranked, reason in rows),
        "rows": rows,
    }


def _calibration(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for expert in report["experts"]:
        file = report["calibration"].get(expert)
        record = json.dumps(file["calibration"], ensure_ascii=False) if file else ""
        rows.append([expert, measured_on(file), file["file"] if file else "", record])
    return rows


def _percents(labels: Iterable[str], rows: Iterable[Iterable[float | None]]) -> list[list[str]]:
    """Return a table's rows: a label, and shares in percent."""
    return [[label, *map(_percent, row)] for label, row in zip(labels, rows, strict=True)]


def _percent(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.1%}"


def _thousands(value: int) -> str:
    return f"{value:,}"


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
