"""A merge's account in plain numbers: what ``obim-report --json`` prints and the page shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from mergekit.config import MergeConfiguration

from mergekit_obim import __version__
from mergekit_obim.kernels.tally import Tally
from mergekit_obim.kinship.measures import pairwise
from mergekit_obim.report.gather import Account, TensorTally, summed


def summarize(account: Account) -> dict[str, Any]:
    """Return everything that a report says, in types that JSON has.

    Positions are counts. Lists over owners have the experts in the recipe's order and the base
    last. ``kept``, ``overwritten`` and ``dropped`` are shares of an expert's own saliency Σ s_k
    and sum to 1. ``error`` is the predicted error of the layers' outputs, Σ h_k (δ_M − δ_k)², as a
    share of the error that the base's weights would make: 0 is the expert itself, 1 the base. All
    four cover the tensors that every expert has a saliency for; if there are none, all tensors,
    with h = 1.
    """
    experts = len(account.experts)
    measured = {tensor.name for tensor in account.measured()}

    def owned(tensors: Iterable[TensorTally]) -> list[int]:
        return _counts(summed((t.tally for t in tensors), experts).owned)

    def shares(tensors: Iterable[TensorTally]) -> list[dict[str, float | None]]:
        weighed = (t.tally for t in tensors if not measured or t.name in measured)
        return _shares(summed(weighed, experts))

    return {
        "mergekit_obim_version": __version__,
        "base": str(account.config.base_model),
        "experts": account.experts,
        "parameters": _parameters(account.config),
        "elements": sum(tensor.elements for tensor in account.tensors),
        "owned": owned(account.tensors),
        "contested": _contested(account.tensors),
        "measured": bool(measured),
        "experts_total": shares(account.tensors),
        "layers": [
            {
                "place": place,
                "elements": sum(tensor.elements for tensor in tensors),
                "owned": owned(tensors),
                "contested": _contested(tensors),
                "experts": shares(tensors),
            }
            for place, tensors in _grouped(account.tensors, lambda t: t.place)
        ],
        "cells": [
            {
                "place": place,
                "kind": kind,
                "elements": sum(tensor.elements for tensor in tensors),
                "owned": owned(tensors),
            }
            for (place, kind), tensors in _grouped(account.tensors, lambda t: (t.place, t.kind))
        ],
        "curve": [
            {"order": order, "density": share, "experts": _shares(tally)}
            for (order, share), tally in account.curve.items()
        ],
        "densities": account.densities,
        "kinship": pairwise(account.kinship()),
        "fallbacks": [
            {
                "expert": expert,
                "tensor": tensor.name,
                "ranked": tensor.ranked[k],
                "reason": tensor.reasons[k],
            }
            for k, expert in enumerate(account.experts)
            for tensor in account.tensors
            if tensor.reasons[k]
        ],
        "copied": account.copied,
        "calibration": account.calibration,
        "stretch": [asdict(stretch) for stretch in account.stretch],
        "differing": account.differing,
        "tensors": [
            {
                "name": tensor.name,
                "layer": tensor.layer,
                "elements": tensor.elements,
                "ranked": tensor.ranked,
                "owned": _counts(tensor.tally.owned),
                "contested": _contested([tensor]),
                "saliency": tensor.tally.saliency.tolist(),
                "error": tensor.tally.error.tolist(),
            }
            for tensor in account.tensors
        ],
    }


def _parameters(config: MergeConfiguration) -> dict[str, Any]:
    # Only these two keys: mergekit 0.1.5 cannot write a reference with a space in it as JSON.
    recipe = config.model_dump(mode="json", include={"merge_method", "parameters"})
    return {"merge_method": recipe["merge_method"], **(recipe["parameters"] or {})}


def _counts(values: np.ndarray) -> list[int]:
    return [int(value) for value in values]


def _grouped(
    tensors: Iterable[TensorTally], key: Callable[[TensorTally], Any]
) -> list[tuple[Any, list[TensorTally]]]:
    """Group tensors by a key, in the order in which the keys first appear."""
    groups: dict[Any, list[TensorTally]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor), []).append(tensor)
    return list(groups.items())


def _contested(tensors: Sequence[TensorTally]) -> list[int] | None:
    counted = [tensor.contested for tensor in tensors if tensor.contested is not None]
    return [round(sum(column)) for column in zip(*counted, strict=True)] if counted else None


def _shares(tally: Tally) -> list[dict[str, float | None]]:
    """Return what becomes of each expert's saliency; None for one that has no saliency."""
    found: list[dict[str, float | None]] = []
    for k, (row, error) in enumerate(zip(tally.saliency, tally.error, strict=True)):
        total = float(row.sum())
        if total == 0:
            found.append(dict.fromkeys(("kept", "overwritten", "dropped", "error")))
            continue
        kept, dropped = float(row[k]) / total, float(row[-1]) / total
        found.append(
            {
                "kept": kept,
                "overwritten": max(0.0, 1 - kept - dropped),
                "dropped": dropped,
                "error": float(error) / total,
            }
        )
    return found
