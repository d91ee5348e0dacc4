"""Planning a merge: everything that can be wrong is found before a tensor is merged.

What is found are values (``recipe.faults``): a planner collects those of a whole merge and ends it
with one error that tells them all. ``mergekit_hooks`` brings mergekit's planners here.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader
from mergekit.merge_methods.base import (
    GroupMergeMethod,
    MergeMethodSpec,
    PerInputValues,
    TensorGroup,
)

from mergekit_obim.errors import ObimError, RecipeError
from mergekit_obim.methods.parameters import PLANNED
from mergekit_obim.methods.saliency import check_shape, saliency_of
from mergekit_obim.models.checkpoint import tensor_of
from mergekit_obim.models.layers import layer_indices
from mergekit_obim.recipe import Fault, Method
from mergekit_obim.recipe.faults import Kind, errors_of, fault_of, raise_errors, warnings_of
from mergekit_obim.saliency.file import SaliencyFile
from mergekit_obim.saliency.locate import check_measured_on

LOG = logging.getLogger("mergekit_obim")


@dataclass(frozen=True)
class PlannedInput:
    """One expert's side of a planned tensor.

    Attributes:
        model: The expert.
        names: The names the weight may have in the expert, the first that exists counts.
        weight: The weight as stored (read lazily), or None where it cannot be had yet.
        parameters: The expert's parameters for this tensor.
    """

    model: Hashable
    names: tuple[str, ...]
    weight: torch.Tensor | None
    parameters: dict[str, Any]


class PlannedMethod(GroupMergeMethod):
    """A merge method whose recipes are checked whole before the first tensor is merged."""

    def __init__(self, spec: MergeMethodSpec):
        self.spec = spec
        self.reads_saliency = any(p.name == "saliency" for p in spec.parameters)

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Check which inputs there are; called by every planner before it plans any tensor."""
        if base_id is None or base_id not in input_ids:
            found = "none is set" if base_id is None else f"{base_id} is not among the inputs"
            raise RecipeError(
                f"{self.spec.name} needs a base model{_in(group_name)}, but {found}: "
                "set base_model to the model that the experts were fine-tuned from"
            )
        if len(set(input_ids)) < len(input_ids):
            twice = next(model for model in input_ids if list(input_ids).count(model) > 1)
            raise RecipeError(
                f"model {twice} is listed twice{_in(group_name)}: list each expert once"
            )
        if len(input_ids) < 2:
            raise RecipeError(f"{self.spec.name} needs an expert beside the base {base_id}")

    def check_tensor(
        self, output: str | None, inputs: Sequence[PlannedInput], parameters: Mapping[str, Any]
    ) -> Iterator[Fault]:
        """Parameter values of one tensor that make no sense together.

        Args:
            output: The merged tensor's name.
            inputs: The experts.
            parameters: The shared parameters for this tensor.
        """
        return iter(())

    def copies(self, parameters: Mapping[str, Any]) -> bool:
        """Whether a recipe with these parameters copies elements, so that a weight scales them."""
        return False

    def fallback(self, kind: str, parameters: Mapping[str, Any]) -> str:
        """What becomes of a tensor without saliency under ``unscored: kind``, for a warning."""
        return "left at the base's values" if kind == "base" else f"ranked by {kind}"


@dataclass
class Fallbacks:
    """The tensors without saliency, collected so that one warning per model names them all.

    Attributes:
        found: (model, what the merge does with them instead) -> tensor name -> why it has none.
    """

    found: dict[tuple[str, str], dict[str, str]] = field(default_factory=lambda: defaultdict(dict))

    def warn(self) -> None:
        """Log the warnings, and forget the tensors."""
        for (model, outcome), names in self.found.items():
            LOG.warning(
                "model %s: %d tensor%s without saliency, %s: %s",
                model,
                len(names),
                "" if len(names) == 1 else "s",
                outcome,
                ", ".join(names),
            )
        self.found.clear()


@dataclass
class PlanReport:
    """Everything that was found while a merge was planned.

    Attributes:
        recipe: Faults of the recipe as it is written.
        tensors: Faults of models, saliency files and the parameters of single tensors.
        fallbacks: The tensors without saliency.
    """

    recipe: list[Fault] = field(default_factory=list)
    tensors: list[Fault] = field(default_factory=list)
    fallbacks: Fallbacks = field(default_factory=Fallbacks)

    @property
    def errors(self) -> list[Fault]:
        """The faults that stop the merge."""
        return errors_of([*self.recipe, *self.tensors])

    def add(self, error: ObimError, kind: Kind, tensor: str | None = None) -> None:
        """Add an error that was raised, as a fault."""
        self.tensors.append(fault_of(error, kind, tensor))

    def conclude(self) -> None:
        """Raise all errors as one; without any, log the warnings.

        Raises:
            ObimError: There are errors; the message lists them all.
        """
        raise_errors([*self.recipe, *self.tensors])
        for fault in warnings_of(self.recipe):
            LOG.warning(str(fault))
        self.fallbacks.warn()


# mergekit-pytorch plans tensor by tensor: what it found is told when the first is merged.
UNWARNED = Fallbacks()


def plan_tensor(
    method: PlannedMethod,
    output: str | None,
    inputs: Sequence[PlannedInput],
    parameters: Mapping[str, Any],
    found: PlanReport,
) -> dict[Hashable, str]:
    """Check one tensor's parameters and saliency; returns the name to look each expert up by."""
    found.tensors += method.check_tensor(output, inputs, parameters)
    outcome = method.fallback(parameters["unscored"], parameters)
    chosen = {}
    for i in inputs:
        chosen[i.model] = i.names[0]
        if i.parameters["criterion"] != "saliency":
            continue
        try:
            file = saliency_of(i.model, i.parameters["saliency"])
            name = next((name for name in i.names if name in file), None)
            if name is not None:
                chosen[i.model] = name
                if i.weight is not None:
                    check_shape(file, name, file.shapes[name], tuple(i.weight.shape), i.model)
            elif i.weight is None or i.weight.is_floating_point():
                unscored = file.metadata.unscored
                reasons = [unscored[name] for name in i.names if name in unscored]
                reason = reasons[0] if reasons else "its saliency file has no entry for it"
                found.fallbacks.found[str(i.model), outcome][i.names[0]] = reason
        except ObimError as error:
            found.add(error, "saliency", i.names[0])
    return chosen


def plan_in_memory(
    method: PlannedMethod,
    groups: Sequence[TensorGroup],
    parameters: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """What the planners do, for mergekit's Python API."""
    layers = layer_indices(group.metadata.name for group in groups if group.metadata.name)
    found = PlanReport()
    planned = []
    for group, values in zip(groups, parameters, strict=True):
        name = group.metadata.name
        inputs = [
            PlannedInput(
                entry.id,
                (values["tensor_name"][entry.id] or name or "",),
                entry.tensor,
                {p.name: values[p.name][entry.id] for p in method.spec.input_parameters},
            )
            for entry in group.non_base
        ]
        chosen = plan_tensor(method, name, inputs, values, found)
        layer = values["layer"]
        planned.append(
            {
                **values,
                "tensor_name": PerInputValues([(i.model, chosen[i.model]) for i in inputs]),
                "layer": layers.get(name or "", 0) if layer is None else layer,
            }
        )
    raise_errors(found.errors)
    _check_group_fingerprints(groups, planned)
    found.conclude()
    return planned


def _check_group_fingerprints(
    groups: Sequence[TensorGroup], parameters: Sequence[Mapping[str, Any]]
) -> None:
    tensors: dict[tuple[Hashable, SaliencyFile], dict[str, torch.Tensor]] = defaultdict(dict)
    for group, values in zip(groups, parameters, strict=True):
        for entry in group.non_base:
            if values["criterion"][entry.id] == "saliency":
                file = saliency_of(entry.id, values["saliency"][entry.id])
                tensors[entry.id, file][values["tensor_name"][entry.id]] = entry.tensor
    for (model, file), stored in tensors.items():
        check_measured_on(file, str(model), stored, stored.__getitem__)


def verified_once(
    verified: set[tuple[ModelReference, SaliencyFile]],
    loader: LazyTensorLoader,
    model: ModelReference,
    parameters: Mapping[str, Any],
    found: PlanReport,
) -> bool:
    """Whether an expert's saliency file is there and of its weights; noted if it is not."""
    if parameters["criterion"] != "saliency":
        return True
    try:
        file = saliency_of(model, parameters["saliency"])
        if (model, file) not in verified:
            check_measured_on(
                file, str(model), loader.index.tensor_paths, partial(tensor_of, loader)
            )
            verified.add((model, file))
    except ObimError as error:
        found.add(error, "saliency")
        return False
    return True


def registry() -> dict[str, Method]:
    """Every merge method that mergekit knows now, as far as recipes concern it."""
    found = {}
    for method in merge_methods.registered_methods():
        parameters = {p.name: p for p in method.spec.parameters if p.name not in PLANNED}
        ours = isinstance(method, PlannedMethod)
        copies = method.copies if isinstance(method, PlannedMethod) else (lambda _: False)
        found[method.spec.name] = Method(method.spec.name, parameters, ours, copies)
    return found


def is_planned(group: TensorGroup) -> bool:
    """mergekit's commands identify inputs by model references, its Python API by other things."""
    return any(isinstance(entry.id, ModelReference) for entry in group.entries)


def _in(group_name: str | None) -> str:
    return f" in {group_name}" if group_name else ""
