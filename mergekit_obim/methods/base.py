"""What all our methods do to merge a tensor; each of them adds its own formula."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from mergekit.merge_methods.base import TensorEntry, TensorGroup

from mergekit_obim.errors import RecipeError, UnscorableError
from mergekit_obim.kernels.blocks import one_thread
from mergekit_obim.kernels.scores import (
    Candidate,
    Criterion,
    GivenScores,
    Magnitude,
    RandomScores,
    Saliency,
    random_key,
)
from mergekit_obim.methods.mergekit_hooks import HookedMethod
from mergekit_obim.methods.parameters import AUTO
from mergekit_obim.methods.planning import UNWARNED, PlannedInput, is_planned
from mergekit_obim.methods.saliency import stored_scores
from mergekit_obim.recipe import Fault

_OPEN_BYTES = 1 << 28


@dataclass
class _ReadBytes:
    """Lets go of checkpoint files once :data:`_OPEN_BYTES` of them were read.

    mergekit maps whole files, and the pages that were read stay in the process for as long
    as the loader keeps the file open: in the end, all input models at once.
    """

    since: int = 0

    def add(self, count: int) -> None:
        """Note that so many bytes of tensors were read and merged."""
        self.since += count
        tasks = sys.modules.get("mergekit.io.tasks")
        if tasks and self.since >= _OPEN_BYTES:
            tasks.LoaderCache().flush_all()  # each opens its file again when it is asked next
            self.since = 0


_READ = _ReadBytes()


# What was merged: a tensor, None where no expert takes part, or what a method has instead.
Observer = Callable[[TensorGroup, Mapping[str, Any], Any], None]

_OBSERVER: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Report the outcome of every tensor's merge inside the context, and merge no model.

    Args:
        observer: Called for each tensor with its inputs, its parameters and what the method's
            ``outcome`` is. The merged tensors have undefined values meanwhile.
    """
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


class ExpertMethod(HookedMethod):
    """A merge of the experts' differences from one base, tensor by tensor."""

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Merge the inputs of one tensor, as mergekit asks for it.

        Args:
            group: The base's and the experts' tensors, of one shape.
            parameters: The recipe's, per expert or shared, and what planning found out.

        Returns:
            A new tensor like the base's.

        Raises:
            RecipeError: The merge was planned in a way that this version does not know.
            UnscorableError: A weight is not finite; the message names the tensor and the models.
        """
        name = group.metadata.name
        for entry in group.non_base if self.reads_saliency and is_planned(group) else ():
            if parameters["tensor_name"][entry.id] is None:
                raise RecipeError(
                    f"{self.spec.name}: mergekit did not say which tensor of {entry.id} became "
                    f"{name}; this mergekit plans merges in a way that mergekit-obim "
                    "does not know: please report it"
                )
        UNWARNED.warn()
        # mergekit's Python API passes modules' parameters with their gradients; choosing
        # positions has none.
        entries = tuple(replace(entry, tensor=entry.tensor.detach()) for entry in group.entries)
        group, observer = replace(group, entries=entries), _OBSERVER.get()
        try:
            with one_thread():
                if observer:
                    observer(group, parameters, self.outcome(group, parameters))
                    base = base_tensor(group)
                    merged = base.new_empty(()).expand(base.shape)
                else:
                    merged = self._merge(group, **parameters)
        except UnscorableError as error:
            raise error.of(name, (entry.id for entry in group.non_base)) from error
        _READ.add(sum(entry.tensor.nbytes for entry in entries))
        return merged

    def outcome(self, group: TensorGroup, parameters: Mapping[str, Any]) -> Any:
        """Return what an observer is told of a tensor: by default the merged tensor."""
        return self._merge(group, **parameters)

    def criteria(self, group: TensorGroup, parameters: Mapping[str, Any]) -> list[Criterion | None]:
        """Return what each expert's elements count by; None for one that takes no part."""
        return comparable(criteria_of(group, parameters))

    def stretch_of(
        self, group: TensorGroup, parameters: Mapping[str, Any], experts: Collection[torch.Tensor]
    ) -> float:
        """Return the factor on the mean of the experts that take part in a tensor.

        Args:
            group: The base's and all experts' tensors.
            parameters: The recipe's, and what planning found out.
            experts: The tensors of the group's experts that take part.
        """
        asked = self.asked_stretch(parameters)
        if asked != AUTO:
            return float(asked)
        # mergekit-pytorch has no call after it planned the last tensor: this measures at the first.
        parameters["cosines"].announce()
        weights = {
            entry.id: parameters["weight"][entry.id]
            for entry in group.non_base
            if any(entry.tensor is expert for expert in experts)
        }
        factor: float = parameters["cosines"].stretch(weights)
        return factor

    def _merge(self, group: TensorGroup, **parameters: Any) -> torch.Tensor:
        """Merge one tensor by the method's formula; the inputs have no gradients."""
        raise NotImplementedError


def base_tensor(group: TensorGroup) -> torch.Tensor:
    """Return the base's tensor; ``validate_inputs`` saw to it that there is one."""
    assert group.base is not None
    return group.base.tensor


def expert_tensors(group: TensorGroup) -> list[torch.Tensor]:
    """Return the experts' tensors, in the recipe's order."""
    return [entry.tensor for entry in group.non_base]


def values_of(group: TensorGroup, parameters: Mapping[str, Any], name: str) -> list[Any]:
    """Return a per-expert parameter's values, in the recipe's order."""
    return [parameters[name][entry.id] for entry in group.non_base]


def candidates_of(
    group: TensorGroup, parameters: Mapping[str, Any]
) -> tuple[list[Candidate], list[float]]:
    """Return every expert's candidate and density, in the recipe's order.

    An expert without saliency that is left at the base's values has density 0.
    """
    return _with_densities(group, parameters, criteria_of(group, parameters))


def comparable_candidates_of(
    group: TensorGroup, parameters: Mapping[str, Any]
) -> tuple[list[Candidate], list[float]]:
    """Return candidates and densities for methods that compare experts' scores with each other.

    They are those of :func:`candidates_of`, but with scores of one kind: see :func:`comparable`.
    """
    return _with_densities(group, parameters, comparable(criteria_of(group, parameters)))


def _with_densities(
    group: TensorGroup, parameters: Mapping[str, Any], criteria: Sequence[Criterion | None]
) -> tuple[list[Candidate], list[float]]:
    base, default = base_tensor(group), 1 / len(group.non_base)
    candidates, densities = [], []
    for entry, criterion in zip(group.non_base, criteria, strict=True):
        density = parameters["density"][entry.id]
        density = default if density is None else density
        candidates.append(Candidate(entry.tensor, base, criterion or Magnitude()))
        densities.append(density if criterion else 0.0)
    return candidates, densities


def objective_of(
    group: TensorGroup, parameters: Mapping[str, Any]
) -> tuple[list[Candidate], list[float]]:
    """Return the experts that take part in a tensor's objective, and their weights in it.

    An expert without saliency that is left at the base's values takes no part.
    """
    base, candidates, weights = base_tensor(group), [], []
    criteria = comparable(criteria_of(group, parameters))
    for entry, criterion in zip(group.non_base, criteria, strict=True):
        if criterion:
            candidates.append(Candidate(entry.tensor, base, criterion))
            weights.append(parameters["weight"][entry.id])
    return candidates, weights


def check_objective_weights(output: str | None, inputs: Sequence[PlannedInput]) -> Iterator[Fault]:
    """Yield a fault for each negative weight, under which errors would be maximised."""
    for i in inputs:
        if i.parameters["weight"] < 0:
            yield Fault(
                "tensor",
                f"tensor {output}: model {i.model} has weight {i.parameters['weight']}; here "
                "weights say how much each expert's error counts, so set it to 0 or more",
                tensor=output,
            )


def criteria_of(group: TensorGroup, parameters: Mapping[str, Any]) -> list[Criterion | None]:
    """Return what ranks the positions of each expert's tensor; None if it may claim none."""
    return [_criterion(group, entry, k, parameters) for k, entry in enumerate(group.non_base)]


def _criterion(
    group: TensorGroup, entry: TensorEntry, k: int, parameters: Mapping[str, Any]
) -> Criterion | None:
    kind = parameters["criterion"][entry.id]
    if kind == "saliency":
        scored = stored_scores(entry, parameters)
        if scored is not None:
            return scored
        kind = parameters["unscored"]
    if kind == "base":
        return None
    if kind == "random":
        return RandomScores(random_key(parameters["seed"], group.metadata.name, k))
    return Magnitude()


def comparable(criteria: Sequence[Criterion | None]) -> list[Criterion | None]:
    """Replace criteria by magnitude for all experts of a tensor, unless all have a saliency.

    Methods that compare or add up the experts' scores need them on one scale, which δ²·h and |δ|
    are not.
    """
    measured = all(c is None or isinstance(c, Saliency | GivenScores) for c in criteria)
    return [c if c is None or measured else Magnitude() for c in criteria]
