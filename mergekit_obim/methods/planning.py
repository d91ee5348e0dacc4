"""Checking a merge while it is planned: all faults are found before a tensor is merged.

The faults of a whole merge are collected as values (``recipe.faults``), and raised as one error
that lists them all. ``mergekit_hooks`` makes mergekit's planners call this module.
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
from mergekit_obim.methods.parameters import AUTO, PLANNED
from mergekit_obim.methods.saliency import check_shape, saliency_of
from mergekit_obim.models.checkpoint import tensor_of
from mergekit_obim.models.layers import layer_indices
from mergekit_obim.models.linear_layers import input_axes, input_axis_of
from mergekit_obim.models.task_vectors import Cosines, Place
from mergekit_obim.recipe import Fault, Method
from mergekit_obim.recipe.faults import Kind, errors_of, fault_of, raise_errors, warnings_of
from mergekit_obim.saliency.file import SaliencyFile
from mergekit_obim.saliency.locate import check_measured_on

LOG = logging.getLogger("mergekit_obim")


@dataclass(frozen=True)
class PlannedInput:
    """One expert's input to a planned tensor.

    Attributes:
        model: The expert.
        names: The names to look the weight's saliency up by; the first that exists counts.
        weight: The weight as stored (read lazily), or None if it is not available yet.
        parameters: The expert's parameters for this tensor.
    """

    model: Hashable
    names: tuple[str, ...]
    weight: torch.Tensor | None
    parameters: dict[str, Any]


class PlannedMethod(GroupMergeMethod):
    """A merge method that checks a whole recipe before the first tensor is merged."""

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
        """Check the base and the experts; every planner calls this before it plans any tensor.

        Raises:
            RecipeError: There is no base or no expert, or a model is listed twice.
        """
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
        """Find parameter values of one tensor that make no sense together.

        Args:
            output: The merged tensor's name.
            inputs: The experts.
            parameters: The shared parameters for this tensor.
        """
        return iter(())

    def asked_stretch(self, parameters: Mapping[str, Any]) -> float | str:
        """Return the factor on the experts' mean that the parameters ask for, or ``auto``."""
        asked: float | str = parameters.get("stretch", 1.0)
        return asked

    def copies(self, parameters: Mapping[str, Any]) -> bool:
        """Return whether a recipe with these parameters copies elements, scaled by the weight."""
        return False

    def fallback(self, kind: str, parameters: Mapping[str, Any]) -> str:
        """Return what ``unscored: kind`` does with a tensor without saliency, for a warning."""
        return "left at the base's values" if kind == "base" else f"ranked by {kind}"

    def plan_parameters(
        self, own: Mapping[str, Any], parameters: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return an expert's parameters for a tensor, as the merge is to have them.

        Args:
            own: The expert's parameters, as the recipe gives them.
            parameters: The shared parameters.
        """
        return dict(own)

    def note_statistics(
        self,
        inputs: Sequence[PlannedInput],
        chosen: Mapping[Hashable, str],
        parameters: Mapping[str, Any],
        fallbacks: Fallbacks,
    ) -> None:
        """Note what the method would use of the saliency files beside h, and does not find.

        Args:
            inputs: The experts.
            chosen: Expert -> the name to look up its saliency of this tensor by.
            parameters: The shared parameters for this tensor.
            fallbacks: Where it is noted.
        """


@dataclass
class Fallbacks:
    """The tensors without saliency, collected so that one warning per model names them all.

    Attributes:
        found: (model, what the merge does with them instead) -> tensor name -> why it has none.
        by_diagonal: Model -> the tensors of which it has no Gram sketch, and another expert has.
        sketched: Whether there is a tensor of which some expert has a sketch.
        unsketched: Whether there is one with saliency of which none has.
    """

    found: dict[tuple[str, str], dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    by_diagonal: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    sketched: bool = False
    unsketched: bool = False

    def sketch_warnings(self) -> list[str]:
        """Return a line for each model that lacks sketches, or one if all models lack all."""
        if self.unsketched and not self.sketched:
            return [
                "no saliency file has a Gram sketch, so that regmean merges as regmean_diag does; "
                "measure them with `obim-saliency RECIPE OUT_DIR --sketch 16 --overwrite`"
            ]
        return [
            f"model {model}: {len(names)} tensor{'s' * (len(names) != 1)} without a Gram sketch, "
            f"merged by the diagonal beside other experts' sketches: {', '.join(names)}"
            for model, names in self.by_diagonal.items()
        ]

    def warn(self) -> None:
        """Log the warnings, and forget the tensors."""
        for line in self.sketch_warnings():
            LOG.warning(line)
        self.by_diagonal.clear()
        self.sketched = self.unsketched = False
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
        cosines: By base and experts, what will measure their cosines: for the experts of a recipe
            one, with slices of other models one for each set of experts.
    """

    recipe: list[Fault] = field(default_factory=list)
    tensors: list[Fault] = field(default_factory=list)
    fallbacks: Fallbacks = field(default_factory=Fallbacks)
    cosines: dict[Hashable, Cosines] = field(default_factory=dict)

    @property
    def errors(self) -> list[Fault]:
        """The faults that stop the merge."""
        return errors_of([*self.recipe, *self.tensors])

    def add(self, error: ObimError, kind: Kind, tensor: str | None = None) -> None:
        """Add an error that was raised, as a fault."""
        self.tensors.append(fault_of(error, kind, tensor))

    def conclude(self) -> None:
        """Raise all errors as one; without any, measure what is to be, and log the warnings.

        Raises:
            ObimError: There are errors; the message lists them all.
        """
        raise_errors([*self.recipe, *self.tensors])
        for cosines in self.cosines.values():
            cosines.announce()
        for fault in warnings_of(self.recipe):
            LOG.warning(str(fault))
        self.fallbacks.warn()


# mergekit-pytorch plans tensor by tensor, with no call after the last one: its fallbacks are
# collected here, and logged when the first tensor is merged.
UNWARNED = Fallbacks()


def plan_tensor(
    method: PlannedMethod,
    output: str | None,
    inputs: Sequence[PlannedInput],
    parameters: Mapping[str, Any],
    found: PlanReport,
) -> dict[Hashable, str]:
    """Check one tensor's parameters and saliency, and add what is wrong to the report.

    Returns:
        Expert -> the name to look up its saliency of this tensor by.
    """
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
    if not found.errors:
        method.note_statistics(inputs, chosen, parameters, found.fallbacks)
    return chosen


def plan_stretch(
    method: PlannedMethod,
    output: str,
    places: Mapping[Hashable, Place | None],
    inputs: Sequence[PlannedInput],
    parameters: Mapping[str, Any],
    found: PlanReport,
) -> dict[str, Cosines]:
    """Return the planned parameter that ``stretch: auto`` needs, for methods that have it.

    Args:
        method: The method.
        output: The merged tensor's name.
        places: Where the base, which comes first, and then each expert has the tensor; None if
            it has none, or if rows of it will be moved first.
        inputs: The experts.
        parameters: The shared parameters for this tensor.
        found: The report, which holds what is shared by all tensors.
    """
    if "cosines" not in parameters:
        return {}
    base, *experts = places
    cosines = found.cosines.setdefault((base, frozenset(experts)), Cosines(base, experts))
    cosines.add(output, places)
    if method.asked_stretch(parameters) == AUTO:
        cosines.expect({i.model: i.parameters["weight"] for i in inputs})
    return {"cosines": cosines}


def plan_input_axis(
    parameters: Mapping[str, Any],
    name: str,
    base: ModelReference | None,
    trust_remote_code: bool = False,
) -> dict[str, int | None]:
    """Return the planned parameter that ``statistics: none`` needs, for methods that have it.

    Args:
        parameters: The shared parameters of a tensor.
        name: The tensor's.
        base: The base, whose configuration says what the tensor is; None for models in memory.
        trust_remote_code: Whether the base's own code may run.
    """
    if parameters.get("statistics") != "none":
        return {}
    axes = input_axes(base, trust_remote_code) if base else {}
    return {"input_axis": input_axis_of(name, axes)}


def plan_in_memory(
    method: PlannedMethod,
    groups: Sequence[TensorGroup],
    parameters: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Check a merge by mergekit's Python API, which has no planner, before it begins.

    Returns:
        The parameters of each group, completed as the planners do.

    Raises:
        ObimError: Something is wrong; the message lists it all.
    """
    layers = layer_indices(group.metadata.name for group in groups if group.metadata.name)
    found = PlanReport()
    planned = []
    for number, (group, values) in enumerate(zip(groups, parameters, strict=True)):
        name = group.metadata.name
        inputs = [
            PlannedInput(
                entry.id,
                (values["tensor_name"][entry.id] or name or "",),
                entry.tensor,
                method.plan_parameters(
                    {p.name: values[p.name][entry.id] for p in method.spec.input_parameters}, values
                ),
            )
            for entry in group.non_base
        ]
        chosen = plan_tensor(method, name, inputs, values, found)
        layer = values["layer"]
        base = group.base
        assert base is not None  # `validate_inputs` saw to it
        places = {entry.id: entry.tensor for entry in (base, *group.non_base)}
        planned.append(
            {
                **values,
                **plan_stretch(method, name or str(number), places, inputs, values, found),
                "tensor_name": PerInputValues([(i.model, chosen[i.model]) for i in inputs]),
                "criterion": PerInputValues([(i.model, i.parameters["criterion"]) for i in inputs]),
                "layer": layers.get(name or "", 0) if layer is None else layer,
                **plan_input_axis(values, name or "", None),
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
    """Check that an expert's saliency file exists and was measured on its weights.

    Args:
        verified: The pairs that were checked before; this one is added.
        loader: The expert's checkpoint.
        model: The expert.
        parameters: The expert's parameters.
        found: The report that an error is added to.

    Returns:
        Whether it is so, or the expert's criterion needs no saliency.
    """
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
    """Return every merge method that mergekit has registered, as the recipe reader needs it."""
    found = {}
    for method in merge_methods.registered_methods():
        parameters = {p.name: p for p in method.spec.parameters if p.name not in PLANNED}
        ours = isinstance(method, PlannedMethod)
        copies = method.copies if isinstance(method, PlannedMethod) else (lambda _: False)
        found[method.spec.name] = Method(method.spec.name, parameters, ours, copies)
    return found


def is_planned(group: TensorGroup) -> bool:
    """Return whether one of mergekit's commands planned this, and not its Python API.

    The commands identify inputs by model references, the API by other objects.
    """
    return any(isinstance(entry.id, ModelReference) for entry in group.entries)


def _in(group_name: str | None) -> str:
    return f" in {group_name}" if group_name else ""
