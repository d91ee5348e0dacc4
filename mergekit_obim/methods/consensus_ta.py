"""``consensus_ta``: Consensus Task Arithmetic, with TALL masks (arXiv 2405.07813)."""

from __future__ import annotations

from typing import Any

import torch
from mergekit.merge_methods.base import TensorGroup

from mergekit_obim.kernels.baselines.consensus import merge_consensus
from mergekit_obim.methods.base import ExpertMethod, base_tensor, expert_tensors, values_of
from mergekit_obim.methods.parameters import LAMBDA, WEIGHT, method_spec, per_expert, shared


class ConsensusTa(ExpertMethod):
    """Adds up task vectors at the positions that several experts need; reads no saliency."""

    def _merge(self, group: TensorGroup, **parameters: Any) -> torch.Tensor:
        return merge_consensus(
            base_tensor(group),
            expert_tensors(group),
            values_of(group, parameters, "weight"),
            values_of(group, parameters, "mask_threshold"),
            parameters["min_agreement"],
            parameters["lambda"],
        )


CONSENSUS_TA = ConsensusTa(
    method_spec(
        "consensus_ta",
        "Consensus TA",
        "2405.07813",
        WEIGHT,
        # The original tries 0.2 to 0.6 and keeps what does best on validation data.
        per_expert("mask_threshold", float, 0.4, "How small the expert's TALL mask is"),
        LAMBDA,
        shared("min_agreement", int, 2, "Experts that must need a position"),
    )
)
