"""The one adapter to mergekit: the merge methods ``obim`` and ``ties_obm``.

mergekit calls a method with tensors and parameter values, but not with the *input*
tensors' names, which a saliency is looked up by and which differ from the output's where
``slices`` move layers. So planning is wrapped, from the method's own ``validate_inputs``:
nothing of mergekit is touched unless a recipe uses one of our methods. The wrapped
planners check the whole recipe before any tensor is merged and hand the names to the
method as ordinary parameters of mergekit's task graph.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader
from mergekit.merge_methods.base import (
    BasePolicy,
    BatchOptions,
    GroupMergeMethod,
    InputContract,
    MergeMethod,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    PerInputValues,
    TensorEntry,
    TensorGroup,
)
from pydantic import ValidationError

from mergekit_obim.errors import RecipeError, SaliencyFileError, UnscorableError
from mergekit_obim.kernels.exclusive import exclusive_masks
from mergekit_obim.kernels.merging import merge_owned
from mergekit_obim.kernels.scores import (
    Candidate,
    Criterion,
    GivenScores,
    Magnitude,
    RandomScores,
    Saliency,
    random_key,
)
from mergekit_obim.kernels.ties import merge_ties
from mergekit_obim.layers import layer_indices, rotate
from mergekit_obim.saliency_file import SaliencyFile
from mergekit_obim.saliency_store import check_measured_on, locate, open_saliency

LOG = logging.getLogger("mergekit_obim")

CHOICES = {
    "criterion": ("saliency", "magnitude", "random"),
    "order": ("rotation", "recipe"),
    "assignment": ("iterative",),
    "unscored": ("magnitude", "random", "base"),
}
# Filled in by the planners below; not for recipes.
_PLANNED = ("tensor_name", "vocabulary_rows", "layer")
# Densities such as 0.3333 and 0.6667 may add up to a little over 1.
_DENSITY_SLACK = 1e-6
_OPEN_BYTES = 1 << 28


class _Parameter(ParameterSpec):
    """A parameter whose wrong values end in one line and not in pydantic's traceback."""

    def validate(self, value: Any) -> Any:
        try:
            value = super().validate(value)
        except ValidationError as error:
            raise RecipeError(
                f"parameter {self.name}: {value!r} is not acceptable: {error.errors()[0]['msg']}"
            ) from error
        _check_value(self.name, value)
        return value


def _check_value(name: str, value: Any) -> None:
    if name in CHOICES and value not in CHOICES[name]:
        raise RecipeError(
            f"parameter {name}: unknown value {value!r}; choose one of {', '.join(CHOICES[name])}"
        )
    if name == "density" and value is not None and not 0 <= value <= 1:
        raise RecipeError(
            f"parameter density: {value} lies outside 0…1; it is the share of each tensor's "
            "positions that the expert may claim"
        )
    if name in ("weight", "lambda") and not math.isfinite(value):
        raise RecipeError(f"parameter {name}: {value} is not a finite number")


def _shared(name: str, kind: Any, default: Any, description: str) -> ParameterSpec:
    return _Parameter(name, kind, ParameterScope.SHARED, default, description)


def _per_expert(name: str, kind: Any, default: Any, description: str) -> ParameterSpec:
    return _Parameter(name, kind, ParameterScope.NON_BASE, default, description)


def _method_spec(name: str, pretty_name: str, *own: ParameterSpec) -> MergeMethodSpec:
    return MergeMethodSpec(
        name=name,
        pretty_name=pretty_name,
        reference_url="https://arxiv.org/abs/2502.12217",
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        parameters=(
            _per_expert("density", float | None, None, "Share of each tensor's positions; 1/K"),
            _per_expert("weight", float, 1.0, "Scale of the expert's task vector"),
            _per_expert(
                "saliency", str | None, None, "Saliency file, a folder of them, or a Hub path"
            ),
            _per_expert("criterion", str, "saliency", "What ranks positions"),
            _shared("lambda", float, 1.0, "Scale of the merged task vector"),
            _shared("unscored", str, "magnitude", "How tensors without saliency are ranked"),
            _shared("seed", int, 0, "For every random ranking"),
            *own,
            _per_expert("tensor_name", str | None, None, "The weight's name in the expert"),
            _per_expert("vocabulary_rows", Any, None, "Which stored row each token's row is"),
            _shared("layer", int | None, None, "The layer's number, for rotation"),
        ),
    )


@dataclass(frozen=True)
class VocabularyRows:
    """Where mergekit's tokenizer options took each row of a vocabulary axis from.

    Attributes:
        axis: The vocabulary axis.
        rows: Per row of the merged tensor the row in the expert's own, −1 for none.
    """

    axis: int
    rows: tuple[int, ...]

    def apply(self, h: torch.Tensor) -> torch.Tensor:
        """Bring what is stored per token into the merged vocabulary's order; new rows score 0."""
        if h.shape[self.axis] == 1:
            return h
        rows = torch.tensor(self.rows, device=h.device)
        h = h.index_select(self.axis, rows.clamp(min=0)).movedim(self.axis, 0)
        h[rows < 0] = 0
        return h.movedim(0, self.axis)


@dataclass
class _ReadBytes:
    """Lets go of checkpoint files once so much of them was read.

    mergekit maps whole files, and the pages that were read stay in the process for as long
    as the loader keeps the file open: in the end, all input models at once.
    """

    since: int = 0

    def add(self, count: int) -> None:
        self.since += count
        tasks = sys.modules.get("mergekit.io.tasks")
        if tasks and self.since >= _OPEN_BYTES:
            tasks.LoaderCache().flush_all()  # each opens its file again when it is asked next
            self.since = 0


_READ = _ReadBytes()


class _SaliencyMethod(GroupMergeMethod):
    """What obim and ties_obm share: parameters, saliency look-up, fall-backs."""

    densities_share_positions = False

    def __init__(self, spec: MergeMethodSpec):
        self.spec = spec

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Check which inputs there are; called by every planner before it plans any tensor."""
        _wrap_planners()
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

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        **dtypes: Any,
    ) -> tuple[torch.Tensor, ...]:
        # From mergekit's Python API nothing was planned: the group's name is its inputs'
        # name too. Every group is checked before the first is merged.
        if not any(_is_planned(group) for group in groups):
            parameters = _plan_in_memory(self, groups, parameters)
        return super()._execute(groups, parameters, options, **dtypes)

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Merge the inputs of one tensor."""
        name = group.metadata.name
        for entry in group.non_base:
            if _is_planned(group) and parameters["tensor_name"][entry.id] is None:
                raise RecipeError(
                    f"{self.spec.name}: mergekit did not say which tensor of {entry.id} became "
                    f"{name}; this mergekit plans merges in a way that mergekit-obim "
                    "does not know: please report it"
                )
        _UNWARNED.warn()
        # mergekit's Python API passes modules' parameters with their gradients; choosing
        # positions has none.
        entries = tuple(replace(entry, tensor=entry.tensor.detach()) for entry in group.entries)
        try:
            merged = self._merge(replace(group, entries=entries), **parameters)
        except UnscorableError as error:
            models = ", ".join(str(entry.id) for entry in group.non_base)
            raise UnscorableError(
                f"tensor {name}: {error.message} in one of {models}; a checkpoint with NaN or "
                "infinite weights cannot be merged"
            ) from error
        _READ.add(sum(entry.tensor.nbytes for entry in entries))
        return merged

    def _merge(self, group: TensorGroup, **parameters: Any) -> torch.Tensor:
        raise NotImplementedError

    def _candidates(
        self, group: TensorGroup, parameters: Mapping[str, Any]
    ) -> tuple[list[Candidate], list[float]]:
        """Every expert's candidate and density, in the recipe's order."""
        assert group.base is not None  # validate_inputs saw to it
        default = 1 / len(group.non_base)
        candidates, densities = [], []
        for k, entry in enumerate(group.non_base):
            ranking = _ranking(group, entry, k, parameters)
            density = parameters["density"][entry.id]
            density = default if density is None else density
            candidates.append(Candidate(entry.tensor, group.base.tensor, ranking or Magnitude()))
            densities.append(density if ranking else 0.0)
        return candidates, densities


class Obim(_SaliencyMethod):
    """Optimal Brain Iterative Merging (arXiv 2502.12217, section 3)."""

    densities_share_positions = True

    def _merge(self, group: TensorGroup, **parameters: Any) -> torch.Tensor:
        candidates, densities = self._candidates(group, parameters)
        order: Sequence[int] = range(len(candidates))
        if parameters["order"] == "rotation":
            order = rotate(order, parameters["layer"] or 0)
        owner = exclusive_masks(candidates, densities, order)
        scales = [parameters["weight"][e.id] * parameters["lambda"] for e in group.non_base]
        return merge_owned(candidates[0].base, [c.expert for c in candidates], owner, scales)


class TiesObm(_SaliencyMethod):
    """TIES with its trimming ranked by saliency (arXiv 2502.12217, section 3.3 and table 3)."""

    def _merge(self, group: TensorGroup, **parameters: Any) -> torch.Tensor:
        candidates, densities = self._candidates(group, parameters)
        weights = [parameters["weight"][entry.id] for entry in group.non_base]
        return merge_ties(
            candidates, densities, weights, parameters["lambda"], parameters["normalize"]
        )


METHODS: tuple[MergeMethod, ...] = (
    Obim(
        _method_spec(
            "obim",
            "OBIM",
            _shared("order", str, "rotation", "The merging order per layer"),
            _shared("assignment", str, "iterative", "How positions are given to experts"),
        )
    ),
    TiesObm(
        _method_spec(
            "ties_obm",
            "TIES + OBM",
            _shared("normalize", bool, True, "Divide by the sum of the agreeing weights"),
        )
    ),
)


def register() -> None:
    """Make the methods known to mergekit; doing it again changes nothing."""
    known = {method.spec.name: method for method in merge_methods.registered_methods()}
    for method in METHODS:
        other = known.get(method.spec.name)
        if other is None:
            merge_methods.register(method)
        elif other is not method:
            LOG.warning(
                "mergekit already has a merge method %r; mergekit-obim's stays out",
                method.spec.name,
            )


# --- ranking one expert's tensor -------------------------------------------------------


def _ranking(
    group: TensorGroup, entry: TensorEntry, k: int, parameters: Mapping[str, Any]
) -> Criterion | None:
    """What ranks the positions of one expert's tensor; None if it is to claim none."""
    kind = parameters["criterion"][entry.id]
    if kind == "saliency":
        scored = _stored_scores(group, entry, parameters)
        if scored is not None:
            return scored
        kind = parameters["unscored"]
    if kind == "base":
        return None
    if kind == "random":
        return RandomScores(random_key(parameters["seed"], group.metadata.name, k))
    return Magnitude()


def _stored_scores(
    group: TensorGroup, entry: TensorEntry, parameters: Mapping[str, Any]
) -> Criterion | None:
    name = parameters["tensor_name"][entry.id]
    file = _saliency_of(entry.id, parameters["saliency"][entry.id])
    if name is None or name not in file:
        return None
    values = file[name]
    rows = parameters["vocabulary_rows"][entry.id]
    if rows is not None:
        values = rows.apply(values)
    _check_shape(file, name, tuple(values.shape), tuple(entry.tensor.shape), entry.id)
    values = values.to(entry.tensor.device)
    return GivenScores(values) if file.metadata.form == "dense" else Saliency(values)


def _saliency_of(model: Hashable, setting: str | None) -> SaliencyFile:
    try:
        return open_saliency(_locate(setting, str(model)))
    except SaliencyFileError as error:
        raise SaliencyFileError(f"model {model}: {error.message}") from error


@functools.cache
def _locate(setting: str | None, model: str) -> Any:
    tasks = sys.modules.get("mergekit.io.tasks")
    cache_dir = tasks.LoaderCache().hf_cache_dir if tasks else None
    return locate(setting, model, cache_dir=cache_dir)


def _check_shape(
    file: SaliencyFile,
    name: str,
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    model: Hashable,
) -> None:
    if file.metadata.form == "dense":
        fits = shape == weight
    else:
        fits = len(shape) <= len(weight) and all(
            size in (1, full) for size, full in zip(reversed(shape), reversed(weight), strict=False)
        )
    if not fits:
        rule = (
            "must have the shape of" if file.metadata.form == "dense" else "must broadcast against"
        )
        raise SaliencyFileError(
            f"{file.path}: the {file.metadata.form} saliency of {name}, {list(shape)}, {rule} "
            f"the weight of model {model}, {list(weight)}; was it measured on this model?"
        )


# --- planning: everything that can be wrong is found before a tensor is merged ---------


@dataclass
class _Fallbacks:
    """Tensors without a saliency, by model, to be named in one warning each."""

    found: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))

    def warn(self) -> None:
        for (model, kind), names in self.found.items():
            what = "left at the base's values" if kind == "base" else f"ranked by {kind}"
            LOG.warning(
                "model %s: %d tensor%s without saliency, %s: %s",
                model,
                len(names),
                "" if len(names) == 1 else "s",
                what,
                ", ".join(names),
            )
        self.found.clear()


# mergekit-pytorch plans tensor by tensor: what it found is told when the first is merged.
_UNWARNED = _Fallbacks()


@dataclass(frozen=True)
class _Input:
    """One expert's side of a planned tensor.

    Attributes:
        names: The names the weight may have in the expert, the first that exists counts.
        weight: The weight as stored (read lazily), or None where it cannot be had yet.
        measurable: Whether every stored weight could be looked at.
    """

    model: Hashable
    names: tuple[str, ...]
    weight: torch.Tensor | None
    parameters: dict[str, Any]


def _plan_tensor(
    method: _SaliencyMethod,
    output: str | None,
    inputs: Iterable[_Input],
    unscored: str,
    fallbacks: _Fallbacks,
) -> dict[Hashable, str]:
    """Check one tensor's parameters and saliency; returns the name to look each expert up by."""
    inputs = list(inputs)
    densities = [i.parameters["density"] for i in inputs]
    densities = [1 / len(inputs) if density is None else density for density in densities]
    if method.densities_share_positions and sum(densities) > 1 + _DENSITY_SLACK:
        listed = ", ".join(f"{i.model} {d:.4g}" for i, d in zip(inputs, densities, strict=True))
        raise RecipeError(
            f"tensor {output}: the densities sum to {sum(densities):.4g}, over 1 ({listed}; left "
            f"out means 1/{len(inputs)}): experts share each tensor's positions, so lower them"
        )
    chosen = {}
    for i in inputs:
        chosen[i.model] = i.names[0]
        if i.parameters["criterion"] != "saliency":
            continue
        file = _saliency_of(i.model, i.parameters["saliency"])
        name = next((name for name in i.names if name in file), None)
        if name is not None:
            chosen[i.model] = name
            if i.weight is not None:
                _check_shape(file, name, file.shapes[name], tuple(i.weight.shape), i.model)
        elif i.weight is None or i.weight.is_floating_point():
            fallbacks.found[str(i.model), unscored].append(i.names[0])
    return chosen


def _plan_in_memory(
    method: _SaliencyMethod,
    groups: Sequence[TensorGroup],
    parameters: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """What the planners do, for mergekit's Python API."""
    layers = layer_indices(group.metadata.name for group in groups if group.metadata.name)
    fallbacks = _Fallbacks()
    planned = []
    for group, values in zip(groups, parameters, strict=True):
        name = group.metadata.name
        inputs = [
            _Input(
                entry.id,
                (values["tensor_name"][entry.id] or name or "",),
                entry.tensor,
                {p.name: values[p.name][entry.id] for p in method.spec.input_parameters},
            )
            for entry in group.non_base
        ]
        chosen = _plan_tensor(method, name, inputs, values["unscored"], fallbacks)
        layer = values["layer"]
        planned.append(
            {
                **values,
                "tensor_name": PerInputValues([(i.model, chosen[i.model]) for i in inputs]),
                "layer": layers.get(name or "", 0) if layer is None else layer,
            }
        )
    _check_group_fingerprints(groups, planned)
    fallbacks.warn()
    return planned


def _check_group_fingerprints(
    groups: Sequence[TensorGroup], parameters: Sequence[Mapping[str, Any]]
) -> None:
    tensors: dict[tuple[Hashable, SaliencyFile], dict[str, torch.Tensor]] = defaultdict(dict)
    for group, values in zip(groups, parameters, strict=True):
        for entry in group.non_base:
            if values["criterion"][entry.id] == "saliency":
                file = _saliency_of(entry.id, values["saliency"][entry.id])
                tensors[entry.id, file][values["tensor_name"][entry.id]] = entry.tensor
    for (model, file), stored in tensors.items():
        check_measured_on(file, str(model), stored, stored.__getitem__)


def _wrap_planners() -> None:
    """Wrap the two planners that mergekit has, where they are loaded; once each."""
    plan = sys.modules.get("mergekit.plan")
    if plan and not hasattr(plan.MergePlanner.plan_module, "__wrapped__"):
        plan.MergePlanner.plan_module = _checked_plan_module(plan.MergePlanner.plan_module)
    raw = sys.modules.get("mergekit.scripts.merge_raw_pytorch")
    # Run as `python -m`, the script's module goes by another name.
    main = sys.modules.get("__main__")
    for module in filter(None, (raw, main)):
        original = getattr(module, "construct_param_dicts", None)
        if original and not hasattr(original, "__wrapped__"):
            vars(module)["construct_param_dicts"] = _checked_param_dicts(original, module)


def _checked_plan_module(original: Any) -> Any:
    @functools.wraps(original)
    def plan_module(planner: Any, module_name: str, definition: Any) -> None:
        if not isinstance(planner._method, _SaliencyMethod):
            original(planner, module_name, definition)
            return
        _check_recipe(planner._method, planner.config, definition)
        first = len(planner._tensors)
        original(planner, module_name, definition)
        planner._tensors[first:] = _plan_tasks(planner._method, planner._tensors[first:])

    return plan_module


def _check_recipe(method: _SaliencyMethod, config: Any, definition: Any) -> None:
    """Check every parameter as written; mergekit would ignore what it does not know."""
    _check_settings(method, "parameters", config.parameters, ParameterScope.SHARED)
    _check_settings(method, "module parameters", definition.parameters, ParameterScope.SHARED)
    for output_slice in definition.slices:
        _check_settings(method, "slice parameters", output_slice.parameters, ParameterScope.SHARED)
        base = output_slice.base_model or config.base_model
        for source in output_slice.sources:
            # The planner adds a base that is not listed without naming its parameters.
            if source.model == base and "parameters" in source.model_fields_set:
                raise RecipeError(
                    f"the base {base} is also listed among the experts: list it as base_model "
                    "only; its own weights are what the experts are compared with"
                )
            _check_settings(
                method, f"model {source.model}", source.parameters, ParameterScope.NON_BASE
            )


def _check_settings(
    method: MergeMethod, where: str, settings: Mapping[str, Any] | None, scope: ParameterScope
) -> None:
    known = {p.name: p for p in method.spec.parameters if p.name not in _PLANNED}
    for name, setting in (settings or {}).items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}"
            raise RecipeError(f"{where}: {method.spec.name} has no parameter {name!r}; {hint}")
        # Per-expert parameters may stand under `parameters`, for all; not the reverse.
        if scope == ParameterScope.NON_BASE and known[name].scope == ParameterScope.SHARED:
            raise RecipeError(
                f"{where}: parameter {name} is shared by all models: move it to the recipe's "
                "own `parameters`"
            )
        for value in _leaves(setting):
            try:
                known[name].validate(value)
            except RecipeError as error:
                raise RecipeError(f"{where}: {error.message}") from error


def _leaves(setting: Any) -> Iterator[Any]:
    """Every plain value in a setting: of a gradient, of each filter's branch."""
    if isinstance(setting, list):
        for item in setting:
            yield from _leaves(item)
    elif hasattr(setting, "filter"):
        yield from _leaves(setting.value)
    else:
        yield setting


def _plan_tasks(
    method: _SaliencyMethod, planned: Sequence[tuple[Any, Any]]
) -> list[tuple[Any, Any]]:
    from mergekit.io.tasks import LoaderCache

    layers = layer_indices(weight.name for weight, _ in planned)
    fallbacks = _Fallbacks()
    verified: set[tuple[ModelReference, SaliencyFile]] = set()
    result = []
    for weight, task in planned:
        vocabulary = task.gather_tensors
        gather = getattr(vocabulary, "gather_tensors", vocabulary)
        inputs = []
        for model in task.model_order:
            if model == task.base_model:
                continue
            info = gather.weight_info[model]
            loader = LoaderCache().get(model)
            parameters = dict(task.input_parameters[model].items())
            _verify_once(verified, loader, model, parameters)
            names = _possible_names(info)
            stored = _stored_name(loader, info)
            if stored and stored not in (info.tied_names or ()):
                # A head that is there by itself is not ranked by the embeddings' saliency.
                names = tuple(name for name in names if name not in (info.tied_names or ()))
            tensor = loader.get_tensor(stored) if stored else None
            inputs.append(_Input(model, names, tensor, parameters))
        chosen = _plan_tensor(method, weight.name, inputs, task.parameters["unscored"], fallbacks)
        per_expert = {
            i.model: {
                **i.parameters,
                "tensor_name": chosen[i.model],
                "vocabulary_rows": _vocabulary_rows(vocabulary, weight, i, chosen[i.model]),
            }
            for i in inputs
        }
        values = dict(task.parameters.items())
        if values["layer"] is None:
            values["layer"] = layers[weight.name]
        fields = {name: getattr(task, name) for name in type(task).model_fields}
        fields |= {"parameters": values, "input_parameters": {**per_expert, task.base_model: {}}}
        result.append((weight, type(task)(**fields)))
    fallbacks.warn()
    LoaderCache().flush_all()
    return result


def _stored(loader: LazyTensorLoader, name: str) -> torch.Tensor:
    tensor = loader.get_tensor(name)
    assert tensor is not None  # it raises before
    return tensor


def _possible_names(info: Any) -> tuple[str, ...]:
    """The names that mergekit loads a weight by, of which the first that exists counts."""
    return (info.name, *(info.aliases or ()), *(info.tied_names or ()))


def _stored_name(loader: LazyTensorLoader, info: Any) -> str | None:
    paths = loader.index.tensor_paths
    return next((name for name in _possible_names(info) if name in paths), None)


def _verify_once(
    verified: set[tuple[ModelReference, SaliencyFile]],
    loader: LazyTensorLoader,
    model: ModelReference,
    parameters: Mapping[str, Any],
) -> None:
    if parameters["criterion"] != "saliency":
        return
    file = _saliency_of(model, parameters["saliency"])
    if (model, file) not in verified:
        check_measured_on(file, str(model), loader.index.tensor_paths, partial(_stored, loader))
        verified.add((model, file))


def _vocabulary_rows(task: Any, weight: Any, i: _Input, name: str) -> VocabularyRows | None:
    """How the tokenizer options will rearrange the rows of this tensor, if they will.

    Only what is stored per token needs it. The tokenizer task is run here once more than
    mergekit runs it: the rows have to be known before the merge starts.
    """
    from mergekit.tokenizer import PermutedVocabulary
    from mergekit.tokenizer.truncate import TruncatedVocabulary

    if (
        not isinstance(task, PermutedVocabulary | TruncatedVocabulary)
        or i.parameters["criterion"] != "saliency"
        or i.weight is None
    ):
        return None
    file = _saliency_of(i.model, i.parameters["saliency"])
    axis = weight.vocabulary_axis
    shape = file.shapes.get(name, ())
    padded = (1,) * (i.weight.ndim - len(shape)) + tuple(shape)
    if padded[axis] == 1:
        return None
    if isinstance(task, TruncatedVocabulary):
        from mergekit.io.tasks import LoaderCache

        sizes = []
        for model, info in task.gather_tensors.weight_info.items():
            loader = LoaderCache().get(model)
            if stored := _stored_name(loader, info):
                sizes.append(_stored(loader, stored).shape[axis])
        return VocabularyRows(axis, tuple(range(min(sizes))))
    info = _tokenizer_info(task.tokenizer_task)
    size = len(info.tokenizer.get_vocab())
    multiple = task.pad_to_multiple_of
    if multiple:
        size = -(-size // multiple) * multiple
    rows = [-1] * size
    forced = {token for token, config in (task.tokens or {}).items() if config.force}
    for token, index in info.tokenizer.get_vocab().items():
        if token not in forced:
            rows[index] = info.permutations[i.model][index]
    return VocabularyRows(axis, tuple(rows))


@functools.lru_cache(maxsize=4)
def _tokenizer_info(task: Any) -> Any:
    return task.execute()


def _checked_param_dicts(original: Any, module: Any) -> Any:
    """The same for mergekit-pytorch, whose outputs have their inputs' names."""
    layers = functools.lru_cache(maxsize=1)(layer_indices)
    verified: set[tuple[ModelReference, SaliencyFile]] = set()

    @functools.wraps(original)
    def construct_param_dicts(config: Any, method: Any, tensor_name: str) -> tuple[Any, Any]:
        shared, per_input = original(config, method, tensor_name)
        if not isinstance(method, _SaliencyMethod):
            return shared, per_input
        _check_settings(method, "parameters", config.parameters, ParameterScope.SHARED)
        for definition in config.models:
            if definition.model == config.base_model:
                raise RecipeError(
                    f"the base {config.base_model} is also listed among the experts: list it as "
                    "base_model only"
                )
            _check_settings(
                method, f"model {definition.model}", definition.parameters, ParameterScope.NON_BASE
            )
        loaders = module.SimpleLoaderCache().loaders
        inputs = []
        for model, parameters in per_input.items():
            loader = loaders.get(model.model.path)
            if loader is None or model.model.path == config.base_model:
                continue
            _verify_once(verified, loader, model, parameters)
            tensor = loader.get_tensor(tensor_name, raise_on_missing=False)
            inputs.append(_Input(model, (tensor_name,), tensor, parameters))
        present = [i for i in inputs if i.weight is not None]
        chosen = _plan_tensor(method, tensor_name, present, shared["unscored"], _UNWARNED)
        # The cache of loaders may hold other merges' models too.
        ours = [loaders[m.model.path] for m in per_input if m.model.path in loaders]
        names = frozenset().union(*(loader.index.tensor_paths for loader in ours))
        shared["layer"] = layers(names)[tensor_name]
        for model, name in chosen.items():
            per_input[model]["tensor_name"] = name
        return shared, per_input

    return construct_param_dicts


def _is_planned(group: TensorGroup) -> bool:
    """mergekit's commands identify inputs by model references, its Python API by other things."""
    return any(isinstance(entry.id, ModelReference) for entry in group.entries)


def _in(group_name: str | None) -> str:
    return f" in {group_name}" if group_name else ""
