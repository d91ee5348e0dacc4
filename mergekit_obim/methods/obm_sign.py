"""``obm_sign``: Optimal Brain Merging with a sign election by saliency (arXiv 2603.01416)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mergekit.merge_methods.base import TensorGroup

from mergekit_obim.kernels.ties import merge_obm_sign
from mergekit_obim.methods.base import ExpertMethod, comparable_candidates_of, values_of
from mergekit_obim.methods.parameters import (
    DENSITY,
    LAMBDA,
    NORMALIZE,
    WEIGHT,
    method_spec,
    saliency_parameters,
)


class ObmSign(ExpertMethod):
    """Merges as ``ties_obm`` does, but the saliencies vote on the sign."""

    def fallback(self, kind: str, parameters: Mapping[str, Any]) -> str:
        """Return what becomes of a tensor without saliency, for a warning.

        Votes by saliency and by magnitude cannot be added up, so all of its experts vote by one.
        """
        if kind == "base":
            return super().fallback(kind, parameters)
        return "merged by magnitude for every expert"

    def _merge(self, group: TensorGroup, **parameters: Any) -> torch.Tensor:
        candidates, densities = comparable_candidates_of(group, parameters)
        weights = values_of(group, parameters, "weight")
        return merge_obm_sign(
            candidates, densities, weights, parameters["lambda"], parameters["normalize"]
        )


OBM_SIGN = ObmSign(
    method_spec(
        "obm_sign",
        "OBM, signs elected by saliency",
        "2603.01416",
        DENSITY,
        WEIGHT,
        *saliency_parameters(random=False),
        LAMBDA,
        NORMALIZE,
    )
)
