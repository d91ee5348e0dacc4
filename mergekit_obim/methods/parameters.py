"""The parameters of our methods: their defaults and the values that they take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
)
from pydantic import ValidationError

from mergekit_obim.errors import RecipeError

# Filled in by the planners; not for recipes.
PLANNED = ("tensor_name", "vocabulary_rows", "layer", "cosines", "input_axis")
NOT_NEGATIVE = ("mask_threshold", "min_agreement", "stretch")
# As `stretch`: what makes the experts' mean as long as each of them.
AUTO = "auto"


@dataclass(frozen=True)
class Parameter(ParameterSpec):
    """A parameter that reports a wrong value in one line instead of pydantic's traceback.

    Attributes:
        choices: The values that it takes; empty if it takes any of its type.
        word: A word that it takes beside the values of its type.
    """

    choices: tuple[str, ...] = ()
    word: str | None = None

    def validate(self, value: Any) -> Any:
        """Return a value, converted to the parameter's type.

        Raises:
            RecipeError: The parameter does not take this value.
        """
        if self.word is not None and value == self.word:
            return value
        try:
            value = super().validate(value)
        except ValidationError as error:
            hint = f"; or write {self.word}" if self.word else ""
            raise RecipeError(
                f"parameter {self.name}: {value!r} is not acceptable: "
                f"{error.errors()[0]['msg']}{hint}"
            ) from error
        if self.choices and value not in self.choices:
            raise RecipeError(
                f"parameter {self.name}: unknown value {value!r}; "
                f"choose one of {', '.join(self.choices)}"
            )
        if self.name == "density" and value is not None and not 0 <= value <= 1:
            raise RecipeError(
                f"parameter density: {value} lies outside 0…1; it is the share of each tensor's "
                "positions that the expert may claim"
            )
        if self.name == "shrink" and value is not None and not 0 <= value <= 1:
            raise RecipeError(
                f"parameter shrink: {value} lies outside 0…1; it is how much the correlations of "
                "input features count"
            )
        if self.name in NOT_NEGATIVE and value is not None and value < 0:
            raise RecipeError(f"parameter {self.name}: {value} is negative")
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"parameter {self.name}: {value} is not a finite number")
        return value


def shared(
    name: str, kind: Any, default: Any, description: str, choices: tuple[str, ...] = ()
) -> Parameter:
    """Declare a parameter that is the same for all experts."""
    return Parameter(name, kind, ParameterScope.SHARED, default, description, choices=choices)


def per_expert(
    name: str, kind: Any, default: Any, description: str, choices: tuple[str, ...] = ()
) -> Parameter:
    """Declare a parameter that may have a different value for each expert."""
    return Parameter(name, kind, ParameterScope.NON_BASE, default, description, choices=choices)


DENSITY = per_expert("density", float | None, None, "Share of each tensor's positions; 1/K")
WEIGHT = per_expert("weight", float, 1.0, "Scale of the expert's task vector")
LAMBDA = shared("lambda", float, 1.0, "Scale of the merged task vector")
SEED = shared("seed", int, 0, "For every random ranking")
NORMALIZE = shared("normalize", bool, True, "Divide by the sum of the agreeing weights")


def stretch_parameters(default: float | None, description: str) -> tuple[Parameter, ...]:
    """Return the parameters of a method that stretches the experts' mean.

    Args:
        default: The factor where a recipe gives none; None if the method knows what it means.
        description: What is stretched.
    """
    return (
        Parameter("stretch", float | None, ParameterScope.SHARED, default, description, word=AUTO),
        shared("cosines", Any, None, "Between the experts' task vectors, for stretch: auto"),
    )


def saliency_parameters(*, random: bool) -> tuple[Parameter, ...]:
    """Return the parameters of a method that reads saliency files.

    Args:
        random: Whether a random ranking may take the saliency's place.
    """
    chance = ("random",) if random else ()
    return (
        per_expert("saliency", str | None, None, "Saliency file, a folder of them, or a Hub path"),
        per_expert(
            "criterion",
            str,
            "saliency",
            "What ranks positions",
            ("saliency", "magnitude", *chance),
        ),
        shared(
            "unscored",
            str,
            "magnitude",
            "How tensors without saliency are ranked",
            ("magnitude", *chance, "base"),
        ),
        per_expert("tensor_name", str | None, None, "The weight's name in the expert"),
        per_expert("vocabulary_rows", Any, None, "Which stored row each token's row is"),
        shared("layer", int | None, None, "The layer's number, for rotation"),
    )


def method_spec(
    name: str, pretty_name: str, paper: str, *parameters: ParameterSpec
) -> MergeMethodSpec:
    """Return mergekit's description of a method; all of ours need a base and an expert.

    Args:
        name: The name that recipes give under ``merge_method``.
        pretty_name: The name for documentation.
        paper: The arXiv number of the method's paper.
        parameters: The parameters that a recipe may set.
    """
    return MergeMethodSpec(
        name=name,
        pretty_name=pretty_name,
        reference_url=f"https://arxiv.org/abs/{paper}",
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        parameters=parameters,
    )
