"""``regmean``: RegMean (arXiv 2212.09849), by Gram matrices that are sketched or whole."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from mergekit.merge_methods.base import TensorEntry, TensorGroup

from mergekit_obim.kernels.regmean import merge_regmean
from mergekit_obim.kernels.regmean_gram import Layers, merge_regmean_layers, task_vector_layers
from mergekit_obim.kernels.scores import Candidate, Criterion, Saliency
from mergekit_obim.methods.base import base_tensor, comparable, criteria_of
from mergekit_obim.methods.parameters import (
    LAMBDA,
    WEIGHT,
    method_spec,
    saliency_parameters,
    shared,
    stretch_parameters,
)
from mergekit_obim.methods.planning import Fallbacks, PlannedInput
from mergekit_obim.methods.regmean_diag import RegMeanDiag
from mergekit_obim.methods.saliency import has_gram, input_axis, saliency_of, stored_layers

# How much of the off-diagonal elements counts where a recipe does not say, by `statistics`.
SHRINK = {"measured": 0.95, "none": 0.5}


class RegMean(RegMeanDiag):
    """Takes the weights whose outputs come nearest to those of the experts, each on its inputs."""

    def plan_parameters(
        self, own: Mapping[str, Any], parameters: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return an expert's parameters; ``statistics: none`` asks for no saliency file."""
        ranked = {"criterion": "magnitude"} if parameters["statistics"] == "none" else {}
        return {**own, **ranked}

    def fallback(self, kind: str, parameters: Mapping[str, Any]) -> str:
        """Return what becomes of a tensor without saliency, for a warning."""
        if parameters["statistics"] == "none" and kind != "base":
            return "merged without saliency files"
        return super().fallback(kind, parameters)

    def note_statistics(
        self,
        inputs: Sequence[PlannedInput],
        chosen: Mapping[Hashable, str],
        parameters: Mapping[str, Any],
        fallbacks: Fallbacks,
    ) -> None:
        """Note which experts have no sketch of a tensor's inputs."""
        scored, lacking = 0, []
        for i in inputs:
            if i.parameters["criterion"] == "saliency":
                file, name = saliency_of(i.model, i.parameters["saliency"]), chosen[i.model]
                scored += name in file
                if name in file and not has_gram(file, name):
                    lacking.append((str(i.model), name))
        if not scored or not _shrink(parameters):
            return
        if len(lacking) == scored:
            fallbacks.unsketched = True
            return
        fallbacks.sketched = True
        for model, name in lacking:
            fallbacks.by_diagonal[model].append(name)

    def _merge(self, group: TensorGroup, **parameters: Any) -> torch.Tensor:
        base = base_tensor(group)
        criteria = comparable(criteria_of(group, parameters))
        taking = [(e, c) for e, c in zip(group.non_base, criteria, strict=True) if c]
        if not taking:
            return base.clone()
        weights = [parameters["weight"][entry.id] for entry, _ in taking]
        stretch = self.stretch_of(group, parameters, [entry.tensor for entry, _ in taking])
        scale = parameters["lambda"] * stretch
        shrink = _shrink(parameters)
        experts = [entry.tensor for entry, _ in taking]
        axis: int | None = None
        layers: list[Layers] | None = None
        if shrink and parameters["statistics"] == "none":
            axis = parameters["input_axis"]
            if axis == 0:  # not known by the base's class
                axis = -1 if base.ndim == 2 else None
            layers = task_vector_layers(base, experts, axis) if axis else None
        elif shrink:
            axis, layers = _measured(base, taking, parameters)
        if axis and layers:
            return merge_regmean_layers(base, experts, axis, layers, weights, shrink, scale)
        candidates = [Candidate(entry.tensor, base, c) for entry, c in taking]
        return merge_regmean(candidates, weights, scale)


def _measured(
    base: torch.Tensor,
    taking: Sequence[tuple[TensorEntry, Criterion]],
    parameters: Mapping[str, Any],
) -> tuple[int | None, list[Layers] | None]:
    """Return the axis of a tensor's input features, and what is known of each expert's inputs.

    Both are None if no file has a sketch of them, or if some entry is not by input feature.
    """
    axes, stored = set(), []
    for entry, criterion in taking:
        if not isinstance(criterion, Saliency):
            return None, None
        file = saliency_of(entry.id, parameters["saliency"][entry.id])
        stored.append((file, parameters["tensor_name"][entry.id], criterion.h))
        axes.add(input_axis(tuple(criterion.h.shape), tuple(base.shape)))
    axis = axes.pop()
    if axes or axis is None or not any(has_gram(file, name) for file, name, _ in stored):
        return None, None
    return axis, [stored_layers(file, name, h, base.shape, axis) for file, name, h in stored]


def _shrink(parameters: Mapping[str, Any]) -> float:
    asked: float | None = parameters["shrink"]
    return SHRINK[parameters["statistics"]] if asked is None else asked


REGMEAN = RegMean(
    method_spec(
        "regmean",
        "RegMean",
        "2212.09849",
        WEIGHT,
        *saliency_parameters(random=False),
        LAMBDA,
        shared("shrink", float | None, None, "How much inputs' correlations count; 0.95 or 0.5"),
        *stretch_parameters(1.0, "Times the experts' mean"),
        shared(
            "statistics",
            str,
            "measured",
            "Where the Gram matrices come from: saliency files, or the task vectors",
            ("measured", "none"),
        ),
        shared("input_axis", int | None, None, "Which axis of a layer's weight is its input"),
    )
)
