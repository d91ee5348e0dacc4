"""``regmean_diag``: RegMean (arXiv 2212.09849) with the diagonals that saliency files hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mergekit.merge_methods.base import TensorGroup

from mergekit_obim.kernels.regmean import merge_regmean
from mergekit_obim.methods.base import (
    ExpertMethod,
    base_tensor,
    check_objective_weights,
    objective_of,
)
from mergekit_obim.methods.parameters import (
    LAMBDA,
    WEIGHT,
    method_spec,
    saliency_parameters,
    stretch_parameters,
)
from mergekit_obim.methods.planning import PlannedInput
from mergekit_obim.recipe import Fault


class RegMeanDiag(ExpertMethod):
    """Takes the mean of the experts, weighted by h."""

    def check_tensor(
        self, output: str | None, inputs: Sequence[PlannedInput], parameters: Mapping[str, Any]
    ) -> Iterator[Fault]:
        """Find negative weights."""
        return check_objective_weights(output, inputs)

    def fallback(self, kind: str, parameters: Mapping[str, Any]) -> str:
        """Return what becomes of a tensor without saliency, for a warning."""
        return "left out of the mean" if kind == "base" else "merged with h = 1 for every expert"

    def _merge(self, group: TensorGroup, **parameters: Any) -> torch.Tensor:
        candidates, weights = objective_of(group, parameters)
        if not candidates:
            return base_tensor(group).clone()
        stretch = self.stretch_of(group, parameters, [c.expert for c in candidates])
        return merge_regmean(candidates, weights, stretch * parameters["lambda"])


REGMEAN_DIAG = RegMeanDiag(
    method_spec(
        "regmean_diag",
        "Diagonal RegMean",
        "2212.09849",
        WEIGHT,
        *saliency_parameters(random=False),
        LAMBDA,
        *stretch_parameters(1.0, "Times the experts' mean"),
    )
)
