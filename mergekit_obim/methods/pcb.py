"""``pcb``: Parameter Competition Balancing (arXiv 2410.02396)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from mergekit.merge_methods.base import TensorGroup

from mergekit_obim.kernels.baselines.pcb import merge_pcb
from mergekit_obim.methods.base import ExpertMethod, base_tensor, expert_tensors, values_of
from mergekit_obim.methods.parameters import DENSITY, LAMBDA, WEIGHT, method_spec


class Pcb(ExpertMethod):
    """Lets the experts' parameters compete within each tensor; reads no saliency."""

    def _merge(self, group: TensorGroup, **parameters: Any) -> torch.Tensor:
        return merge_pcb(
            base_tensor(group),
            expert_tensors(group),
            values_of(group, parameters, "density"),
            values_of(group, parameters, "weight"),
            parameters["lambda"],
        )


PCB = Pcb(
    method_spec(
        "pcb",
        "PCB-Merging",
        "2410.02396",
        # The default of the original's PCB_merge; its examples use 0.05.
        replace(DENSITY, value_type=float, default=0.1, description="Share that may score"),
        WEIGHT,
        LAMBDA,
    )
)
