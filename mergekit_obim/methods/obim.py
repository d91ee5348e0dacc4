"""``obim``: Optimal Brain Iterative Merging (arXiv 2502.12217, section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.merge_methods.base import TensorGroup

from mergekit_obim.kernels.iterative import iterative_owners
from mergekit_obim.kernels.least_error import least_error_owners
from mergekit_obim.kernels.merging import merge_owned
from mergekit_obim.kernels.scores import Candidate
from mergekit_obim.methods.base import (
    ExpertMethod,
    base_tensor,
    candidates_of,
    check_objective_weights,
    objective_of,
    values_of,
)
from mergekit_obim.methods.parameters import (
    AUTO,
    DENSITY,
    LAMBDA,
    SEED,
    WEIGHT,
    method_spec,
    saliency_parameters,
    shared,
    stretch_parameters,
)
from mergekit_obim.methods.planning import PlannedInput
from mergekit_obim.models.layers import rotate
from mergekit_obim.recipe import Fault

# Densities such as 0.3333 and 0.6667 may add up to a little over 1.
_DENSITY_SLACK = 1e-6


@dataclass(frozen=True)
class Assignment:
    """Which model each position of a tensor takes its element from.

    Attributes:
        candidates: The experts that take part, in the recipe's order.
        owner: uint8, of the tensor's shape: indices into ``candidates``, ``FREE`` for the base.
        scales: λ · weight of each candidate.
        densities: The density of each candidate; None if the assignment uses none.
        order: The order in which the candidates chose; empty if the assignment has none.
    """

    candidates: list[Candidate]
    owner: torch.Tensor
    scales: list[float]
    densities: list[float] | None
    order: Sequence[int]


class Obim(ExpertMethod):
    """Gives each position of a tensor to one expert or leaves it to the base."""

    def check_tensor(
        self, output: str | None, inputs: Sequence[PlannedInput], parameters: Mapping[str, Any]
    ) -> Iterator[Fault]:
        """Find densities that sum to over 1, negative weights, and a misplaced ``stretch``."""
        if parameters["stretch"] is not None and parameters["assignment"] != "nearest":
            yield Fault(
                "tensor",
                f"tensor {output}: stretch is a parameter of assignment: nearest, and this is "
                f"{parameters['assignment']}; leave it out or change the assignment",
                tensor=output,
            )
        if parameters["assignment"] != "iterative":
            yield from check_objective_weights(output, inputs)
            return
        densities = [i.parameters["density"] for i in inputs]
        densities = [1 / len(inputs) if density is None else density for density in densities]
        if sum(densities) > 1 + _DENSITY_SLACK:
            listed = ", ".join(f"{i.model} {d:.4g}" for i, d in zip(inputs, densities, strict=True))
            yield Fault(
                "densities",
                f"tensor {output}: the densities sum to {sum(densities):.4g}, over 1 ({listed}; "
                f"left out means 1/{len(inputs)}): experts share each tensor's positions, so "
                "lower them, or have `obim-saliency --check RECIPE --fix NEW` do it",
                tensor=output,
                amount=sum(densities),
            )

    def asked_stretch(self, parameters: Mapping[str, Any]) -> float | str:
        """Return the factor that ``nearest`` is given, by default ``auto``; 1 for the others."""
        if parameters["assignment"] != "nearest":
            return 1.0
        asked: float | str | None = parameters["stretch"]
        return AUTO if asked is None else asked

    def copies(self, parameters: Mapping[str, Any]) -> bool:
        """Return whether elements are copied and scaled by the weight, as the paper does."""
        return bool(parameters.get("assignment", "iterative") == "iterative")

    def fallback(self, kind: str, parameters: Mapping[str, Any]) -> str:
        """Return what becomes of a tensor without saliency, for a warning."""
        if parameters["assignment"] == "iterative":
            return super().fallback(kind, parameters)
        return "left out of the choice" if kind == "base" else "chosen with h = 1 for every expert"

    def assign(self, group: TensorGroup, parameters: Mapping[str, Any]) -> Assignment | None:
        """Give the positions of one tensor to the experts.

        Args:
            group: The base's and the experts' tensors.
            parameters: The recipe's, and the layer's number.

        Returns:
            The assignment, or None if no expert takes part.

        Raises:
            UnscorableError: An expert's weight or score is not finite.
        """
        scale = parameters["lambda"]
        if parameters["assignment"] != "iterative":
            # The weights are the objective's w_k here, so λ alone scales what is chosen.
            candidates, weights = objective_of(group, parameters)
            if not candidates:
                return None
            stretch = self.stretch_of(group, parameters, [c.expert for c in candidates])
            owner = least_error_owners(candidates, weights, stretch)
            return Assignment(candidates, owner, [scale] * len(candidates), None, ())
        candidates, densities = candidates_of(group, parameters)
        order: Sequence[int] = range(len(candidates))
        if parameters["order"] == "rotation":
            order = rotate(order, parameters["layer"] or 0)
        owner = iterative_owners(candidates, densities, order)
        scales = [w * scale for w in values_of(group, parameters, "weight")]
        return Assignment(candidates, owner, scales, densities, order)

    def outcome(self, group: TensorGroup, parameters: Mapping[str, Any]) -> Assignment | None:
        """Return the assignment, from which what is merged follows."""
        return self.assign(group, parameters)

    def _merge(self, group: TensorGroup, **parameters: Any) -> torch.Tensor:
        base, assignment = base_tensor(group), self.assign(group, parameters)
        if assignment is None:
            return base.clone()
        experts = [candidate.expert for candidate in assignment.candidates]
        return merge_owned(base, experts, assignment.owner, assignment.scales)


OBIM = Obim(
    method_spec(
        "obim",
        "OBIM",
        "2502.12217",
        DENSITY,
        WEIGHT,
        *saliency_parameters(random=True),
        LAMBDA,
        SEED,
        shared("order", str, "rotation", "The merging order per layer", ("rotation", "recipe")),
        shared(
            "assignment",
            str,
            "iterative",
            "How positions are given to experts",
            ("iterative", "least_error", "nearest"),
        ),
        *stretch_parameters(None, "Of nearest: times the experts' mean; by default auto"),
    )
)
