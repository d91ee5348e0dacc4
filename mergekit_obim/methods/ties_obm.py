"""``ties_obm``: TIES, trimmed by saliency (arXiv 2502.12217, section 3.3 and table 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mergekit.merge_methods.base import TensorGroup

from mergekit_obim.kernels.scores import Criterion
from mergekit_obim.kernels.ties import merge_ties
from mergekit_obim.methods.base import ExpertMethod, candidates_of, criteria_of, values_of
from mergekit_obim.methods.parameters import (
    DENSITY,
    LAMBDA,
    NORMALIZE,
    SEED,
    WEIGHT,
    method_spec,
    saliency_parameters,
)


class TiesObm(ExpertMethod):
    """Merges as TIES does, with its trimming ranked by saliency."""

    def criteria(self, group: TensorGroup, parameters: Mapping[str, Any]) -> list[Criterion | None]:
        """Return what ranks each expert's elements: only with each other, so one by one."""
        return criteria_of(group, parameters)

    def _merge(self, group: TensorGroup, **parameters: Any) -> torch.Tensor:
        candidates, densities = candidates_of(group, parameters)
        weights = values_of(group, parameters, "weight")
        return merge_ties(
            candidates, densities, weights, parameters["lambda"], parameters["normalize"]
        )


TIES_OBM = TiesObm(
    method_spec(
        "ties_obm",
        "TIES + OBM",
        "2502.12217",
        DENSITY,
        WEIGHT,
        *saliency_parameters(random=True),
        LAMBDA,
        SEED,
        NORMALIZE,
    )
)
