"""What an ``obim`` recipe makes of its experts, found by going through the merge without merging.

Everything is read tensor by tensor, as the merge reads it, and the positions are assigned by the
merge's own code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io import LazyTensorLoader
from mergekit.merge_methods.base import TensorGroup
from mergekit.options import MergeOptions

from mergekit_obim.errors import RecipeError
from mergekit_obim.kernels.blocks import Positions
from mergekit_obim.kernels.kinship import Moments
from mergekit_obim.kernels.merging import merge_owned
from mergekit_obim.kernels.scores import Candidate, Criterion, GivenScores, Saliency
from mergekit_obim.kernels.selection import FREE
from mergekit_obim.kernels.tally import Tally, claim_counts, outcomes, tally
from mergekit_obim.methods.obim import Assignment, observing
from mergekit_obim.methods.saliency import saliency_of
from mergekit_obim.models.layers import block_of, rotate
from mergekit_obim.planned import plan
from mergekit_obim.saliency.fingerprint import sample, sample_positions

# Sums of densities that the curve is drawn through, and its sample of each tensor: runs of
# neighbours, for speed, spread over the tensor.
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
ORDERS = ("rotation", "recipe", "recipe reversed")
_RUNS, _RUN_LENGTH = 64, 32


@dataclass(frozen=True)
class TensorTally:
    """What became of one tensor.

    Attributes:
        name: The merged tensor's.
        layer: Its layer's number, for rotation.
        place: Its block, as ``model.layers.3``, or ``before`` or ``after`` the blocks.
        kind: What it is in its block, as ``mlp.up_proj``.
        elements: How many positions it has.
        ranked: What ranked each expert's positions: saliency, magnitude, random or nothing.
        tally: Counts and sums; 0 for an expert that took no part.
        contested: Who got the positions that two or more wanted, [K + 1], the base last, estimated
            from a sample where the tensor has more than 2,048; None without densities, where there
            is nothing to want, or if it was not asked for.
    """

    name: str
    layer: int
    place: str
    kind: str
    elements: int
    ranked: list[str | None]
    tally: Tally
    contested: list[float] | None


@dataclass
class Account:
    """What a recipe makes of its experts.

    Attributes:
        config: The recipe, as mergekit reads it.
        experts: The experts' references, in the recipe's order.
        tensors: What became of each tensor.
        copied: Tensors that no expert was asked about, such as buffers.
        densities: Each expert's share, in the first tensor.
        curve: By order and sum of densities the sums over a sample of every tensor's positions,
            each tensor counting as if whole; empty without densities.
        calibration: By the expert's reference its saliency file, and what that was made from.
        differing: Tensors of the merged model, if it was given, that are not what this recipe
            makes, as far as sampled.
    """

    config: MergeConfiguration
    experts: list[str]
    tensors: list[TensorTally] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    curve: dict[tuple[str, float], Tally] = field(default_factory=dict)
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)
    differing: list[str] = field(default_factory=list)

    def total(self) -> Tally:
        """Over all tensors."""
        return summed((tensor.tally for tensor in self.tensors), len(self.experts))

    def kinship(self) -> Moments:
        """Of the task vectors; the base's own row is 0, as it is not needed."""
        total, experts = self.total(), len(self.experts)
        sums, products = np.zeros(experts + 1), np.zeros((experts + 1, experts + 1))
        sums[1:], products[1:, 1:] = total.sums, total.products
        count = float(sum(tensor.elements for tensor in self.tensors))
        return Moments(count, torch.from_numpy(sums), torch.from_numpy(products))

    def measured(self) -> list[TensorTally]:
        """The tensors whose errors can be predicted: every expert has a saliency there."""
        return [t for t in self.tensors if all(kind == "saliency" for kind in t.ranked)]


def summed(tallies: Iterable[Tally], experts: int) -> Tally:
    """One tally of several."""
    total = Tally.zero(experts)
    for one in tallies:
        for name, value in vars(one).items():
            vars(total)[name] = vars(total)[name] + value
    return total


def gather(
    config: MergeConfiguration,
    options: MergeOptions,
    *,
    merged: Path | None = None,
    curve: bool = True,
) -> Account:
    """Go through a merge without merging.

    Args:
        config: A recipe for ``obim``.
        options: mergekit's; nothing is written.
        merged: The merged model, to be compared with what the recipe makes.
        curve: Whether to look at other orders and densities, and at what is contested.

    Raises:
        ObimError: The recipe is for another method, or cannot be merged.
    """
    if config.merge_method != "obim":
        raise RecipeError(
            f"merge_method: a report is made of obim, whose positions have one owner each, not of "
            f"{config.merge_method}"
        )
    planned = plan(config, options)
    experts = experts_of(planned)
    account = Account(config, [str(e) for e in experts], calibration=calibration_of(planned))
    weights = _merged_weights(merged) if merged else None

    def observe(
        group: TensorGroup, parameters: Mapping[str, Any], assignment: Assignment | None
    ) -> None:
        sampled: list[Candidate] = []
        if curve and assignment:
            shape = assignment.owner.shape
            sampled = [_sampled(candidate, shape) for candidate in assignment.candidates]
        account.tensors.append(_look(group, parameters, assignment, sampled, experts))
        if weights is not None and not _agrees(group, assignment, weights):
            account.differing.append(group.metadata.name or "")
        if assignment and assignment.densities and len(assignment.candidates) == len(experts):
            account.densities = account.densities or list(assignment.densities)
            if curve:
                _add_to_curve(account.curve, assignment, sampled, parameters)

    executor = Executor([task for _, task in planned])
    with observing(observe):
        for _ in executor.run(quiet=options.quiet, desc="Counting"):
            pass
    order = {info.name: number for number, (info, _) in enumerate(planned)}
    account.tensors.sort(key=lambda tensor: order[tensor.name])
    seen = {tensor.name for tensor in account.tensors}
    account.copied = [info.name for info, _ in planned if info.name not in seen]
    return account


def experts_of(planned: Sequence[tuple[Any, Any]]) -> list[ModelReference]:
    """Every expert of any tensor, in the recipe's order."""
    experts: dict[ModelReference, None] = {}
    for _, task in planned:
        experts |= dict.fromkeys(model for model in task.model_order if model != task.base_model)
    return list(experts)


def _look(
    group: TensorGroup,
    parameters: Mapping[str, Any],
    assignment: Assignment | None,
    sampled: Sequence[Candidate],
    experts: Sequence[ModelReference],
) -> TensorTally:
    name, base = group.metadata.name or "", group.base
    assert base is not None
    block = block_of(name)
    layer = parameters["layer"] or 0
    before = "after" if layer else "before"
    total = Tally.zero(len(experts))
    ranked: list[str | None] = [None] * len(experts)
    disputes = None
    if assignment is None:
        total.owned[-1] = base.tensor.numel()
    else:
        places = [
            next(experts.index(e.id) for e in group.non_base if e.tensor is candidate.expert)
            for candidate in assignment.candidates
        ]
        found = tally(assignment.candidates, assignment.owner, assignment.scales)
        columns = [*places, len(experts)]
        total.owned[columns] = found.owned
        total.saliency[np.ix_(places, columns)] = found.saliency
        total.error[places], total.sums[places] = found.error, found.sums
        total.products[np.ix_(places, places)] = found.products
        for place, candidate in zip(places, assignment.candidates, strict=True):
            ranked[place] = _ranked_by(candidate.criterion)
        if assignment.densities is not None and sampled:
            part = Positions(_spread(base.tensor.numel()))
            owner = part.of(assignment.owner).numpy()
            twice = claim_counts(sampled, assignment.densities) > 1
            disputes = [0.0] * (len(experts) + 1)
            for label, column in zip([*range(len(places)), FREE], columns, strict=True):
                share = np.count_nonzero(twice & (owner == label)) / max(1, len(owner))
                disputes[column] = share * base.tensor.numel()
    return TensorTally(
        name,
        layer,
        f"{block[0]}.{block[1]}" if block else before,
        kind_of(name),
        base.tensor.numel(),
        ranked,
        total,
        disputes,
    )


def kind_of(name: str) -> str:
    """What a tensor is in its block, the same for each block.

    >>> kind_of("model.layers.3.mlp.experts.7.up_proj.weight")
    'mlp.experts.*.up_proj'
    """
    block = block_of(name)
    rest = name.removeprefix(f"{block[0]}.{block[1]}." if block else "model.")
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", rest).removesuffix(".weight")


def _ranked_by(criterion: Criterion) -> str:
    if isinstance(criterion, Saliency | GivenScores):
        return "saliency"
    return type(criterion).__name__.removesuffix("Scores").lower()


def _add_to_curve(
    curve: dict[tuple[str, float], Tally],
    assignment: Assignment,
    candidates: Sequence[Candidate],
    parameters: Mapping[str, Any],
) -> None:
    """What a sample of the tensor's positions would be under other orders and densities."""
    densities = assignment.densities or []
    weight = assignment.owner.numel() / max(1, candidates[0].base.numel())
    experts = range(len(candidates))
    orders = (
        rotate(experts, parameters["layer"] or 0),
        list(experts),
        list(reversed(experts)),
    )
    if not sum(densities):
        return
    points = [(share, *order) for share in SHARES for order in zip(ORDERS, orders, strict=True)]
    settings = [
        ([density * share / sum(densities) for density in densities], order)
        for share, _, order in points
    ]
    found = outcomes(candidates, assignment.scales, settings)
    for (share, name, _), one in zip(points, found, strict=True):
        before = curve.get((name, share)) or Tally.zero(len(candidates))
        curve[name, share] = Tally(
            *(vars(before)[key] + weight * value for key, value in vars(one).items())
        )


def _sampled(candidate: Candidate, shape: torch.Size) -> Candidate:
    """The candidate at some of its positions, [n]."""
    part = Positions(_spread(shape.numel()))
    criterion = candidate.criterion
    if isinstance(criterion, Saliency):
        criterion = Saliency(part.of(criterion.h.expand(shape)))
    elif isinstance(criterion, GivenScores):
        criterion = GivenScores(part.of(criterion.values))
    return Candidate(part.of(candidate.expert), part.of(candidate.base), criterion)


def _spread(numel: int) -> torch.Tensor:
    if numel <= _RUNS * _RUN_LENGTH:
        return torch.arange(numel)
    # Golden-ratio steps reach all rows and columns, where equal ones could miss most columns.
    starts = (torch.arange(_RUNS, dtype=torch.float64) * 0.6180339887498949) % 1
    first = (starts * (numel - _RUN_LENGTH)).long()
    return (first[:, None] + torch.arange(_RUN_LENGTH)).view(-1)


def _merged_weights(folder: Path) -> LazyTensorLoader:
    try:
        return LazyTensorLoader.from_disk(str(folder))
    except (RuntimeError, OSError, ValueError) as error:
        raise RecipeError(
            f"--merged {folder}: holds no merged model; give the folder that mergekit-yaml wrote"
        ) from error


def _agrees(group: TensorGroup, assignment: Assignment | None, merged: LazyTensorLoader) -> bool:
    """Whether a sample of the merged tensor is what the assignment makes."""
    assert group.base is not None
    there = merged.get_tensor(group.metadata.name or "", raise_on_missing=False)
    base = group.base.tensor
    if there is None or there.shape != base.shape:
        return False
    part = Positions(sample_positions(base.numel()))
    expected = part.of(base)
    if assignment is not None:
        experts = [part.of(candidate.expert) for candidate in assignment.candidates]
        expected = merge_owned(expected, experts, part.of(assignment.owner), assignment.scales)
    return torch.equal(sample(there), expected.to(there.dtype))


def calibration_of(planned: Sequence[tuple[Any, Any]]) -> dict[str, dict[str, Any]]:
    """The saliency file of each expert, and what it was made from, by the expert's reference."""
    found: dict[str, dict[str, Any]] = {}
    for _, task in planned:
        for model, parameters in task.input_parameters.items():
            if model == task.base_model or parameters["criterion"] != "saliency":
                continue
            if str(model) not in found:
                file = saliency_of(model, parameters["saliency"])
                metadata = file.metadata
                found[str(model)] = {
                    "file": str(file.path),
                    "form": metadata.form,
                    "model": metadata.model,
                    "revision": metadata.revision,
                    "calibration": metadata.calibration,
                    "unscored": metadata.unscored,
                    "mergekit_obim_version": metadata.mergekit_obim_version,
                }
    return found
