"""The report's page: arranges a summary's numbers for the template ``page.html.jinja``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from mergekit_obim.models.task_vectors import MeasuredStretch
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
    environment.filters["shown"] = _shown
    names = short_names(report["experts"])
    return environment.get_template("page.html.jinja").render(
        report=report,
        names=names,
        owners=[*names, "the base"],
        overview=_overview(report, names),
        correlated=any(word in ("sketch", "gram") for word in report["error_from"]),
        stretch=[str(MeasuredStretch(**one)) for one in report["stretch"]],
        ownership=_ownership(report, names),
        contested=_contested(report, names),
        errors=list(_errors(report, names)),
        settings=list(_settings(report, names)),
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
    total, merged = report["experts_total"], report["merged"]
    columns: dict[str, list[Any]] = {}
    if report["densities"]:
        columns["density"] = [*report["densities"], None]
    if report["owned"]:
        columns["weights"] = [owned / report["elements"] for owned in report["owned"]]
        for key in ("kept", "overwritten", "dropped"):
            columns[key] = [*(expert[key] for expert in total), None]
    else:
        columns |= {
            "cosine": [_decimal(one["cosine"]) for one in merged],
            "length": [one["length"] for one in merged],
        }
    columns["error"] = [*(expert["error"] for expert in total), None]
    columns["error from"] = [*report["error_from"], None]
    owners = [*names, "the base"] if report["owned"] else names
    rows = [(owner, [column[k] for column in columns.values()]) for k, owner in enumerate(owners)]
    return {"head": ["expert", *columns], "rows": rows}


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{round(value, 2) + 0.0:.2f}"  # no −0.00


def _ownership(report: dict[str, Any], names: list[str]) -> dict[str, Any] | None:
    if report["owned"] is None:
        return None
    places = _unique(cell["place"] for cell in report["cells"])
    kinds = _unique(cell["kind"] for cell in report["cells"])
    grids = np.full((len(names), len(kinds), len(places)), np.nan)
    for cell in report["cells"]:
        shares = np.array(cell["owned"][:-1]) / max(1, cell["elements"])
        grids[:, kinds.index(cell["kind"]), places.index(cell["place"])] = shares
    highest = float(np.nanmax(grids))
    charts = [
        {
            "name": name,
            "svg": figures.heat_map(f"share-{k}", places, kinds, grid, highest),
            "low": np.nanmin(grid),
            "high": np.nanmax(grid),
            "rows": list(zip(kinds, grid, strict=True)),
        }
        for k, (name, grid) in enumerate(zip(names, grids, strict=True))
    ]
    return {"places": places, "charts": charts}


def _contested(report: dict[str, Any], names: list[str]) -> dict[str, Any] | None:
    if report["contested"] is None:
        return None
    layers = [layer for layer in report["layers"] if layer["contested"] is not None]
    places = [layer["place"] for layer in layers]
    # The base has none, unless weights that two experts wanted are claimed by neither.
    owners = [*names, "the base"] if report["contested"][-1] else names
    parts = [
        (
            name,
            figures.colour_of(owner, len(names)),
            [layer["contested"][owner] / max(1, layer["elements"]) for layer in layers],
        )
        for owner, name in enumerate(owners)
    ]
    total = sum(report["contested"])
    won = zip(owners, report["contested"], strict=False)
    return {
        "share": total / report["elements"],
        "won": [(name, count / total) for name, count in won if total],
        "svg": figures.stacked("contested", places, parts),
        "rows": [(layer["place"], layer["contested"]) for layer in layers],
    }


def _errors(report: dict[str, Any], names: list[str]) -> Iterator[dict[str, Any]]:
    for k, name in enumerate(names):
        layers = [layer for layer in report["layers"] if layer["experts"][k]["error"] is not None]
        if not layers:
            continue
        places = [layer["place"] for layer in layers]
        values = {
            key: [layer["experts"][k][key] for layer in layers]
            for key in ("kept", "overwritten", "dropped", "error")
            if report["owned"] or key == "error"
        }
        parts = [
            (label, colour, values[key])
            for label, colour, key in (
                ("kept", figures.COLOURS[0], "kept"),
                ("overwritten by others", figures.COLOURS[1], "overwritten"),
                ("dropped to the base", figures.GREY, "dropped"),
            )
            if key in values
        ]
        worst = int(np.argmax(values["error"]))
        line = ("predicted error", values["error"])
        yield {
            "name": name,
            "svg": figures.stacked(f"error-{k}", places, parts, line),
            "worst": places[worst],
            "error": values["error"][worst],
            "head": ["layer", *values],
            "rows": list(zip(places, zip(*values.values(), strict=True), strict=True)),
        }


def _settings(report: dict[str, Any], names: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a chart of the mean predicted error, and one of what each expert keeps."""
    orders = _unique(point["order"] for point in report["curve"])
    sums = _unique(point["density"] for point in report["curve"])
    experts = {(point["order"], point["density"]): point["experts"] for point in report["curve"]}

    def grids(key: str) -> np.ndarray:
        """Return a value of each expert by order and density, [K, orders, sums]."""
        return np.array(
            [[[experts[o, s][k][key] for s in sums] for o in orders] for k in range(len(names))],
            dtype=float,  # None, of an expert without saliency, becomes NaN
        )

    views = [("Mean over the experts", "predicted error", grids("error").mean(axis=0))]
    views += [(n, "saliency kept", grid) for n, grid in zip(names, grids("kept"), strict=True)]
    for number, (title, label, grid) in enumerate(views):
        if np.isnan(grid).all():  # also if there is no curve, as all densities are 0
            continue
        best = np.nanargmax(-grid if label == "predicted error" else grid)
        order, density = np.unravel_index(best, grid.shape)
        curves = list(zip(orders, grid, strict=True))
        labels = ("sum of the densities", label)
        svg = figures.lines(f"settings-{number}", sums, curves, labels, sum(report["densities"]))
        yield {
            "title": title,
            "label": label,
            "svg": svg,
            "best": grid[order, density],
            "order": orders[order],
            "density": sums[density],
            "orders": orders,
            "rows": [(_shown(s), values) for s, values in zip(sums, grid.T, strict=True)],
        }


def _kinship(report: dict[str, Any], names: list[str]) -> dict[str, Any]:
    tables = []
    for measure, matrix in report["kinship"].items():
        cells = [["" if value is None else f"{value:.4g}" for value in row] for row in matrix]
        tables.append((measure, list(zip(names, cells, strict=True))))
    svg = figures.similarity("kinship", names, report["kinship"]["cosine"])
    return {"svg": svg, "tables": tables}


def _fallbacks(report: dict[str, Any]) -> dict[str, Any]:
    rows = [
        (one["tensor"], [one["expert"], one["treatment"], one["reason"]])
        for one in report["fallbacks"]
    ]
    rows += [(name, ["", "copied", "it holds no weights"]) for name in report["copied"]]
    return {
        "tensors": len({name for name, _ in rows}),
        "kinds": _unique(f"{treatment} ({reason})" for _, (_, treatment, reason) in rows),
        "rows": rows,
    }


def _calibration(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    rows = []
    for expert in report["experts"]:
        file = report["calibration"].get(expert)
        record = json.dumps(file["calibration"], ensure_ascii=False) if file else ""
        rows.append((expert, [measured_on(file), file["file"] if file else "", record]))
    return rows


def _shown(value: str | float | None) -> str:
    """Return a value as the page shows it: a count in full, any other number as a percentage."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int):
        return f"{value:,}"
    return "" if np.isnan(value) else f"{value:.1%}"


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
