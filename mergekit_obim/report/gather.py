"""What each expert contributes to a merge, counted without merging.

Tensors are read one by one, as the merge reads them, and the merge's own code assigns their
positions, or merges them; only the writing of a merged model is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io import LazyTensorLoader
from mergekit.merge_methods.base import TensorGroup
from mergekit.options import MergeOptions

from mergekit_obim.dry_run import plan
from mergekit_obim.errors import RecipeError
from mergekit_obim.kernels.blocks import Positions
from mergekit_obim.kernels.kinship import Moments
from mergekit_obim.kernels.merging import merge_owned
from mergekit_obim.kernels.output_error import output_errors
from mergekit_obim.kernels.scores import Candidate, Criterion, GivenScores, Saliency
from mergekit_obim.kernels.selection import FREE
from mergekit_obim.kernels.tally import Tally, claim_counts, outcomes, tally
from mergekit_obim.methods.base import ExpertMethod, observing
from mergekit_obim.methods.obim import Assignment
from mergekit_obim.methods.saliency import known_inputs, saliency_of
from mergekit_obim.models.layers import block_of, rotate
from mergekit_obim.models.task_vectors import Cosines, MeasuredStretch
from mergekit_obim.saliency.fingerprint import sample, sample_positions

# The sums of densities at which other settings are tried, and the orders that are tried at each.
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
ORDERS = ("rotation", "recipe", "recipe reversed")
# They are tried on a sample of each tensor: 64 runs spread over it, each of 32 neighbours, as
# reading single positions would take far longer.
_RUNS, _RUN_LENGTH = 64, 32


@dataclass(frozen=True)
class TensorTally:
    """What the K experts contribute to one tensor of the merged model.

    Attributes:
        name: The merged tensor's name.
        layer: The number of its layer, by which the merging order rotates.
        place: Its block, such as ``model.layers.3``, or ``before`` or ``after`` the blocks.
        kind: Its name within the block, such as ``mlp.up_proj``.
        elements: The number of positions.
        ranked: For each expert what ranked its positions: ``saliency``, ``magnitude`` or
            ``random``; None if it took no part.
        error_from: For each expert what its predicted error follows from: the ``gram`` matrix of
            the layer's inputs, a ``sketch`` of it, its ``diagonal`` h, or, for an ``unscored``
            weight, h = 1; None if it took no part.
        reasons: For each expert that was not ranked by saliency, why; None for the others.
        treatments: What became of it instead.
        tally: Counts and sums over the positions, 0 for an expert that took no part.
        contested: How many positions that two or more experts wanted each expert got, and last
            the base, [K + 1]. An estimate if the tensor has more than 2,048 positions. None if
            there is no assignment, or it has no densities, or if it was not asked for.
    """

    name: str
    layer: int
    place: str
    kind: str
    elements: int
    ranked: list[str | None]
    error_from: list[str | None]
    reasons: list[str | None]
    treatments: list[str | None]
    tally: Tally
    contested: list[float] | None


@dataclass
class Account:
    """What the experts of a recipe contribute to its merge.

    Attributes:
        config: The recipe, as mergekit reads it.
        experts: The references of the K experts, in the recipe's order.
        tensors: The tallies of the merged model's tensors, in the order of the merge.
        copied: Names of tensors that hold no weights, such as buffers, and are only copied.
        densities: Each expert's density in the first tensor, [K]; empty without densities.
        curve: For each order and sum of densities a tally over a sample of all tensors, scaled up
            to whole tensors; empty without densities.
        calibration: By expert, what its saliency file says of itself.
        stretch: What was measured for ``stretch: auto``; empty where nothing needs it.
        differing: Names of tensors of the merged model, if one was given, that differ from what
            this recipe makes in the values that were compared.
    """

    config: MergeConfiguration
    experts: list[str]
    tensors: list[TensorTally] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    curve: dict[tuple[str, float], Tally] = field(default_factory=dict)
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)
    stretch: list[MeasuredStretch] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    @property
    def owners(self) -> bool:
        """Whether each weight has one owner: in ``obim`` alone."""
        return self.config.merge_method == "obim"

    def total(self) -> Tally:
        """Return the tally over all tensors."""
        return summed((tensor.tally for tensor in self.tensors), len(self.experts))

    def kinship(self) -> Moments:
        """Return the moments of the task vectors; the base's own row, not needed here, is 0."""
        total, experts = self.total(), len(self.experts)
        sums, products = np.zeros(experts + 1), np.zeros((experts + 1, experts + 1))
        sums[1:], products[1:, 1:] = total.sums, total.products
        count = float(sum(tensor.elements for tensor in self.tensors))
        return Moments(count, torch.from_numpy(sums), torch.from_numpy(products))

    def measured(self) -> list[TensorTally]:
        """Return the tensors for which every expert has a saliency, and so a predicted error."""
        return [t for t in self.tensors if all(kind == "saliency" for kind in t.ranked)]


def summed(tallies: Iterable[Tally], experts: int) -> Tally:
    """Return the sum of several tallies of the same K experts."""
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
        config: A recipe for a method of ours that reads saliency files.
        options: mergekit's options; nothing is written.
        merged: The folder of a merged model, to be compared with what the recipe makes.
        curve: Whether to try other orders and densities, and to count what is contested.

    Raises:
        ObimError: The recipe is for another method, or it cannot be merged.
    """
    method = merge_methods.get(config.merge_method)
    if not isinstance(method, ExpertMethod) or not method.reads_saliency:
        raise RecipeError(
            f"merge_method: {config.merge_method} has no report: it reads no saliency files, from "
            f"which errors are predicted; {', '.join(reported())} do"
        )
    planned = plan(config, options)
    experts = planned_experts(planned)
    account = Account(
        config,
        [str(e) for e in experts],
        calibration=calibration_of(planned),
        stretch=stretches_of(planned),
    )
    weights = _merged_weights(merged) if merged else None

    def observe(group: TensorGroup, parameters: Mapping[str, Any], outcome: Any) -> None:
        assignment = outcome if isinstance(outcome, Assignment) else None
        sampled: list[Candidate] = []
        if curve and assignment:
            shape = assignment.owner.shape
            sampled = [_sampled(candidate, shape) for candidate in assignment.candidates]
        made = _made(method, group, parameters, outcome)
        account.tensors.append(
            _tensor_tally(method, group, parameters, made, assignment, sampled, experts)
        )
        if weights is not None and not _agrees(group, made, weights):
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


@dataclass(frozen=True)
class _Made:
    """How a tensor was merged.

    Attributes:
        base: θ_B.
        candidates: The experts that take part, and what their elements count by.
        scales: What each one's δ is multiplied by where it is taken.
        owner: Whose each position is; None in a method without owners.
        tensor: θ_M, in a method without owners.
    """

    base: torch.Tensor
    candidates: Sequence[Candidate]
    scales: Sequence[float]
    owner: torch.Tensor | None = None
    tensor: torch.Tensor | None = None

    def merged(self, part: Positions | None = None) -> torch.Tensor:
        """Return the merged tensor, or some elements of it."""

        def of(tensor: torch.Tensor) -> torch.Tensor:
            return part.of(tensor) if part else tensor

        if self.owner is None:
            return of(self.base if self.tensor is None else self.tensor)
        experts = [of(candidate.expert) for candidate in self.candidates]
        return merge_owned(of(self.base), experts, of(self.owner), self.scales)


def _made(
    method: ExpertMethod, group: TensorGroup, parameters: Mapping[str, Any], outcome: Any
) -> _Made:
    assert group.base is not None
    base = group.base.tensor
    if isinstance(outcome, Assignment):
        return _Made(base, outcome.candidates, outcome.scales, owner=outcome.owner)
    if outcome is None:
        return _Made(base, (), ())
    criteria = method.criteria(group, parameters)
    candidates = [
        Candidate(entry.tensor, base, criterion)
        for entry, criterion in zip(group.non_base, criteria, strict=True)
        if criterion
    ]
    return _Made(base, candidates, [1.0] * len(candidates), tensor=outcome)


def reported() -> list[str]:
    """Return the names of the merge methods that have a report."""
    methods = merge_methods.registered_methods()
    return [m.spec.name for m in methods if isinstance(m, ExpertMethod) and m.reads_saliency]


def planned_experts(planned: Sequence[tuple[Any, Any]]) -> list[ModelReference]:
    """Return the experts of a planned merge, in the recipe's order, each once."""
    experts: dict[ModelReference, None] = {}
    for _, task in planned:
        experts |= dict.fromkeys(model for model in task.model_order if model != task.base_model)
    return list(experts)


def _tensor_tally(
    method: ExpertMethod,
    group: TensorGroup,
    parameters: Mapping[str, Any],
    made: _Made,
    assignment: Assignment | None,
    sampled: Sequence[Candidate],
    experts: Sequence[ModelReference],
) -> TensorTally:
    name, elements = group.metadata.name or "", made.base.numel()
    block = block_of(name)
    layer = parameters["layer"] or 0
    before = "after" if layer else "before"
    total = Tally.zero(len(experts))
    ranked: list[str | None] = [None] * len(experts)
    error_from: list[str | None] = [None] * len(experts)
    contested = None
    if not made.candidates:
        total.owned[-1] = elements
    else:
        # The candidates are the experts that take part; these are their rows in the tallies.
        rows = [
            next(experts.index(e.id) for e in group.non_base if e.tensor is candidate.expert)
            for candidate in made.candidates
        ]
        found = tally(made.candidates, made.owner, made.scales, made.tensor)
        columns = [*rows, len(experts)]
        total.owned[columns], total.merged[columns] = found.owned, found.merged
        total.saliency[np.ix_(rows, columns)] = found.saliency
        total.error[rows], total.sums[rows] = found.error, found.sums
        total.products[np.ix_(rows, rows)] = found.products
        for row, candidate in zip(rows, made.candidates, strict=True):
            ranked[row] = _ranked_by(candidate.criterion)
            error_from[row] = "diagonal" if ranked[row] == "saliency" else "unscored"
        for row, word in _correlate(total, rows, made, experts, parameters).items():
            error_from[row] = word
        if assignment and assignment.densities is not None and sampled:
            part = Positions(_spread(elements))
            owner = part.of(assignment.owner).numpy()
            wanted_twice = claim_counts(sampled, assignment.densities) > 1
            contested = [0.0] * (len(experts) + 1)
            for label, column in zip([*range(len(rows)), FREE], columns, strict=True):
                share = np.count_nonzero(wanted_twice & (owner == label)) / max(1, len(owner))
                contested[column] = share * elements
    return TensorTally(
        name,
        layer,
        f"{block[0]}.{block[1]}" if block else before,
        kind_of(name),
        elements,
        ranked,
        error_from,
        [_reason(e, parameters, kind) for e, kind in zip(experts, ranked, strict=True)],
        [None if k == "saliency" else method.fallback(k or "base", parameters) for k in ranked],
        total,
        contested,
    )


def _correlate(
    total: Tally,
    rows: Sequence[int],
    made: _Made,
    experts: Sequence[ModelReference],
    parameters: Mapping[str, Any],
) -> dict[int, str]:
    """Put better predictions into a tally, for the experts whose files know more than h.

    Returns:
        By the expert's row, what the prediction follows from.
    """
    words: dict[int, str] = {}
    merged: torch.Tensor | None = None
    for row, candidate in zip(rows, made.candidates, strict=True):
        if not isinstance(candidate.criterion, Saliency):
            continue
        h, shape = candidate.criterion.h, made.base.shape
        known = known_inputs(experts[row], parameters, h, shape)
        if known is None:
            continue
        axis, layers, words[row] = known
        merged = made.merged() if merged is None else merged
        here, at_base = output_errors(candidate.expert, [merged, made.base], axis, layers)
        total.error[row] = here
        total.correlated[row] = at_base - total.saliency[row].sum()
    return words


def _reason(
    expert: ModelReference, parameters: Mapping[str, Any], ranked: str | None
) -> str | None:
    """Return why a tensor of an expert is not ranked by saliency; None if it is."""
    if ranked == "saliency":
        return None
    if expert not in parameters["criterion"]:
        return "not in this slice of the recipe"
    if parameters["criterion"][expert] != "saliency":
        return "the recipe asks for it"
    file = saliency_of(expert, parameters["saliency"][expert])
    name = parameters["tensor_name"][expert]
    if name in file:
        return "another expert has no saliency for it"
    return file.metadata.unscored.get(name, "not in the saliency file")


def kind_of(name: str) -> str:
    """Return a tensor's name within its block, which is the same for all blocks.

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
    """Add a tensor's tallies under other orders and densities, scaled up from its sample."""
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
    """Return a candidate at the sample's positions only, [n]."""
    part = Positions(_spread(shape.numel()))
    criterion = candidate.criterion
    if isinstance(criterion, Saliency):
        criterion = Saliency(part.of(criterion.h.expand(shape)))
    elif isinstance(criterion, GivenScores):
        criterion = GivenScores(part.of(criterion.values))
    return Candidate(part.of(candidate.expert), part.of(candidate.base), criterion)


def _spread(numel: int) -> torch.Tensor:
    """Return the flat indices of a tensor's sample, int64 [n]: all of a small tensor's."""
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
            f"--merged {folder}: holds no model; give the folder that mergekit-yaml wrote"
        ) from error


def _agrees(group: TensorGroup, made: _Made, merged: LazyTensorLoader) -> bool:
    """Return whether the merged tensor is what the recipe makes, in a sample of its values."""
    there = merged.get_tensor(group.metadata.name or "", raise_on_missing=False)
    if there is None or there.shape != made.base.shape:
        return False
    expected = made.merged(Positions(sample_positions(made.base.numel())))
    return torch.equal(sample(there), expected.to(there.dtype))


def calibration_of(planned: Sequence[tuple[Any, Any]]) -> dict[str, dict[str, Any]]:
    """Return what each expert's saliency file says of itself, by the expert's reference."""
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
                    "gram": metadata.gram.columns if metadata.gram else None,
                    "mergekit_obim_version": metadata.mergekit_obim_version,
                }
    return found


def stretches_of(planned: Sequence[tuple[Any, Any]]) -> list[MeasuredStretch]:
    """Return what was measured for ``stretch: auto``, of each set of experts with the same base."""
    all_cosines: dict[Cosines, None] = {}
    for _, task in planned:
        if cosines := dict(task.parameters.items()).get("cosines"):
            all_cosines[cosines] = None
    return [outcome for cosines in all_cosines if (outcome := cosines.outcome())]
