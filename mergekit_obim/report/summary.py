"""A merge's account in plain numbers: what ``obim-report --json`` prints and the page shows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
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
    and sum to 1. ``error`` is the predicted error of the layers' outputs as a share of the error
    that the base's weights would make: 0 is the expert itself, 1 the base. All four cover the
    tensors that every expert has a saliency for; if there are none, all tensors, with h = 1.

    ``error_from`` says by a word what errors follow from: in a tensor, the ``gram`` matrix of its
    inputs, a ``sketch`` of it, or its ``diagonal`` h, with which the error is Σ h_k (δ_M − δ_k)²;
    ``unscored`` is h = 1. Of the whole it is the first of ``sketch``, ``gram``, ``diagonal`` and
    ``unscored`` that any of the tensors has. Other settings, in ``curve``, are judged by h alone.

    ``merged`` compares the merged task vector δ_M with each expert's: the cosine, and by how many
    times it is longer. In methods in which no weight has a single owner, ``owned``, ``kept``,
    ``overwritten`` and ``dropped`` are None.
    """
    experts = len(account.experts)
    measured = {tensor.name for tensor in account.measured()}

    def owned(tensors: Iterable[TensorTally]) -> list[int] | None:
        if not account.owners:
            return None
        return _counts(summed((t.tally for t in tensors), experts).owned)

    def weighed(tensors: Iterable[TensorTally]) -> list[TensorTally]:
        return [t for t in tensors if not measured or t.name in measured]

    def shares(tensors: Iterable[TensorTally]) -> list[dict[str, float | None]]:
        total = summed((t.tally for t in weighed(tensors)), experts)
        return _shares(total, owners=account.owners)

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
        "error_from": [
            _first_of({t.error_from[k] for t in weighed(account.tensors)}) for k in range(experts)
        ],
        "merged": _merged(account.total()),
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
                "treatment": tensor.treatments[k],
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
                "owned": owned([tensor]),
                "contested": _contested([tensor]),
                "saliency": tensor.tally.saliency.tolist() if account.owners else None,
                "error": tensor.tally.error.tolist(),
                "error_at_base": tensor.tally.at_base().tolist(),
                "error_from": tensor.error_from,
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


def _first_of(words: Collection[str | None]) -> str | None:
    """Return what tells most of what a set of tensors' errors follow from."""
    return next((w for w in ("sketch", "gram", "diagonal", "unscored") if w in words), None)


def _merged(total: Tally) -> list[dict[str, float | None]]:
    """Return how each expert's task vector lies to the merged one; None where one is 0."""
    products, own = total.merged[:-1], total.products.diagonal()
    merged = float(total.merged[-1])
    return [
        {
            "cosine": float(product / np.sqrt(square * merged)) if square * merged else None,
            "length": float(np.sqrt(merged / square)) if square else None,
        }
        for product, square in zip(products, own, strict=True)
    ]


def _shares(tally: Tally, *, owners: bool = True) -> list[dict[str, float | None]]:
    """Return what becomes of each expert's saliency; None for one that has no saliency."""
    found: list[dict[str, float | None]] = []
    for k, (row, error, at_base) in enumerate(
        zip(tally.saliency, tally.error, tally.at_base(), strict=True)
    ):
        shares = dict.fromkeys(("kept", "overwritten", "dropped", "error"))
        total = float(row.sum())
        if total and owners:
            kept, dropped = float(row[k]) / total, float(row[-1]) / total
            shares |= {
                "kept": kept,
                "overwritten": max(0.0, 1 - kept - dropped),
                "dropped": dropped,
            }
        if at_base > 0:
            shares["error"] = float(error / at_base)
        found.append(shares)
    return found
