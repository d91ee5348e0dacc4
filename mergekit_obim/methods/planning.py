"""Planning a merge: everything that can be wrong is found before a tensor is merged.

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
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader
from mergekit.merge_methods.base import (
    BatchOptions,
    GroupMergeMethod,
    MergeMethod,
    MergeMethodSpec,
    ParameterScope,
    PerInputValues,
    TensorGroup,
)

from mergekit_obim.errors import ObimError, RecipeError
from mergekit_obim.methods.parameters import PLANNED
from mergekit_obim.methods.preflight import inspect_files
from mergekit_obim.methods.recipes import dtype_faults
from mergekit_obim.methods.saliency import VocabularyRows, check_shape, saliency_of
from mergekit_obim.models.checkpoint import tensor_of
from mergekit_obim.models.layers import layer_indices
from mergekit_obim.models.references import written_in_two_ways
from mergekit_obim.models.relation import relate
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
        if group_name is None and all(isinstance(i, ModelReference) for i in input_ids):
            # mergekit-pytorch, which opens the files next; mergekit-yaml's names have a group.
            inspect_files([i for i in input_ids if isinstance(i, ModelReference)], base_id)

    def check_tensor(
        self, output: str | None, inputs: Sequence[PlannedInput], parameters: Mapping[str, Any]
    ) -> None:
        """Refuse parameter values that make no sense together.

        Args:
            output: The merged tensor's name.
            inputs: The experts.
            parameters: The shared parameters for this tensor.

        Raises:
            RecipeError: They do not.
        """

    def fallback(self, kind: str, parameters: Mapping[str, Any]) -> str:
        """What becomes of a tensor without saliency under ``unscored: kind``, for a warning."""
        return "left at the base's values" if kind == "base" else f"ranked by {kind}"

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        **dtypes: Any,
    ) -> tuple[torch.Tensor, ...]:
        # From mergekit's Python API nothing was planned: the group's name is its inputs'
        # name too. Every group is checked before the first is merged.
        if self.reads_saliency and not any(is_planned(group) for group in groups):
            parameters = _plan_in_memory(self, groups, parameters)
        return super()._execute(groups, parameters, options, **dtypes)


@dataclass
class Fallbacks:
    """Tensors without a saliency, to be named in one warning per model and what becomes of them.

    Attributes:
        found: By the model and what becomes of them, the tensors' names, and why there is none.
    """

    found: dict[tuple[str, str], dict[str, str]] = field(default_factory=lambda: defaultdict(dict))

    def warn(self) -> None:
        for (model, what), names in self.found.items():
            LOG.warning(
                "model %s: %d tensor%s without saliency, %s: %s",
                model,
                len(names),
                "" if len(names) == 1 else "s",
                what,
                ", ".join(names),
            )
        self.found.clear()


@dataclass
class Findings:
    """What is to be said of a recipe, all of it, where a merge ends with the first fault.

    Attributes:
        faults: By what was found wherever it was, the first error and how many more there are.
        fallbacks: Tensors without saliency.
    """

    faults: dict[str, tuple[ObimError, int]] = field(default_factory=dict)
    fallbacks: Fallbacks = field(default_factory=Fallbacks)

    def add(self, error: ObimError, tensor: str | None) -> None:
        """Note a fault; the same one of many tensors is noted once."""
        what = error.message.replace(tensor, "") if tensor else error.message
        first, more = self.faults.get(what, (error, -1))
        self.faults[what] = first, more + 1


_FINDINGS: ContextVar[Findings | None] = ContextVar("findings", default=None)


@contextmanager
def finding_all() -> Iterator[Findings]:
    """Within it, planning notes the faults that it would otherwise end with, and goes on."""
    findings = Findings()
    token = _FINDINGS.set(findings)
    try:
        yield findings
    finally:
        _FINDINGS.reset(token)


def _refuse(error: ObimError, tensor: str | None = None) -> None:
    """End planning with an error, or note it if every one is wanted."""
    findings = _FINDINGS.get()
    if findings is None:
        raise error
    findings.add(error, tensor)


# mergekit-pytorch plans tensor by tensor: what it found is told when the first is merged.
UNWARNED = Fallbacks()


def _plan_tensor(
    method: PlannedMethod,
    output: str | None,
    inputs: Sequence[PlannedInput],
    parameters: Mapping[str, Any],
    fallbacks: Fallbacks,
) -> dict[Hashable, str]:
    """Check one tensor's parameters and saliency; returns the name to look each expert up by."""
    try:
        method.check_tensor(output, inputs, parameters)
    except ObimError as error:
        _refuse(error, output)
    fate = method.fallback(parameters["unscored"], parameters)
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
                fallbacks.found[str(i.model), fate][i.names[0]] = reason
        except ObimError as error:
            _refuse(error, i.names[0])
    return chosen


def _plan_in_memory(
    method: PlannedMethod,
    groups: Sequence[TensorGroup],
    parameters: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """What the planners do, for mergekit's Python API."""
    layers = layer_indices(group.metadata.name for group in groups if group.metadata.name)
    fallbacks = Fallbacks()
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
        chosen = _plan_tensor(method, name, inputs, values, fallbacks)
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
                file = saliency_of(entry.id, values["saliency"][entry.id])
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
        if not isinstance(planner._method, PlannedMethod):
            original(planner, module_name, definition)
            return
        _check_recipe(planner._method, planner.config, definition)
        first = len(planner._tensors)
        original(planner, module_name, definition)
        if planner._method.reads_saliency:
            planner._tensors[first:] = _plan_tasks(planner._method, planner._tensors[first:])
        if not _FINDINGS.get():
            _warn_of_strangers(planner._tensors[first:])

    return plan_module


def _check_recipe(method: PlannedMethod, config: Any, definition: Any) -> None:
    """Check every parameter as written; mergekit would ignore what it does not know."""
    _check_settings(method, "parameters", config.parameters, ParameterScope.SHARED)
    _check_settings(method, "module parameters", definition.parameters, ParameterScope.SHARED)
    for output_slice in definition.slices:
        _check_settings(method, "slice parameters", output_slice.parameters, ParameterScope.SHARED)
        base = output_slice.base_model or config.base_model
        for source in output_slice.sources:
            # The planner adds a base that is not listed without naming its parameters.
            if source.model == base and "parameters" in source.model_fields_set:
                _refuse(
                    RecipeError(
                        f"the base {base} is also listed among the experts: list it as base_model "
                        "only; its own weights are what the experts are compared with"
                    )
                )
            _check_settings(
                method, f"model {source.model}", source.parameters, ParameterScope.NON_BASE
            )


def _check_settings(
    method: MergeMethod, where: str, settings: dict[str, Any] | None, scope: ParameterScope
) -> None:
    for name, error in list(setting_faults(method, where, settings, scope)):
        _refuse(error)
        assert settings is not None
        settings.pop(name, None)  # so that what it is in the way of can be found too


def setting_faults(
    method: MergeMethod, where: str, settings: Mapping[str, Any] | None, scope: ParameterScope
) -> Iterator[tuple[str, RecipeError]]:
    """What is wrong with the parameters that stand in one place of a recipe.

    Args:
        method: The recipe's method.
        where: The place, for the message.
        settings: What stands there.
        scope: Whose parameters may stand there.

    Yields:
        The parameter's name, and the error.
    """
    known = {p.name: p for p in method.spec.parameters if p.name not in PLANNED}
    for name, setting in (settings or {}).items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}"
            message = f"{where}: {method.spec.name} has no parameter {name!r}; {hint}"
            yield name, RecipeError(message)
            continue
        # Per-expert parameters may stand under `parameters`, for all; not the reverse.
        if scope == ParameterScope.NON_BASE and known[name].scope == ParameterScope.SHARED:
            message = f"{where}: parameter {name} is shared by all models: move it to the recipe's "
            yield name, RecipeError(message + "own `parameters`")
            continue
        for value in _leaves(setting):
            try:
                known[name].validate(value)
            except RecipeError as error:
                yield name, RecipeError(f"{where}: {error.message}")


def _leaves(setting: Any) -> Iterator[Any]:
    """Every plain value in a setting: of a gradient, of each filter's branch."""
    if isinstance(setting, list):
        for item in setting:
            yield from _leaves(item)
    elif hasattr(setting, "filter"):
        yield from _leaves(setting.value)
    else:
        yield setting


def _plan_tasks(method: PlannedMethod, planned: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    from mergekit.io.tasks import LoaderCache

    layers = layer_indices(weight.name for weight, _ in planned)
    findings = _FINDINGS.get()
    fallbacks = findings.fallbacks if findings else Fallbacks()
    verified: dict[tuple[ModelReference, Any], bool] = {}
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
            if not _verified_once(verified, loader, model, parameters):
                parameters["criterion"] = "magnitude"  # nothing is merged: see `finding_all`
            names = _possible_names(info)
            stored = _stored_name(loader, info)
            if stored and stored not in (info.tied_names or ()):
                # A head that is there by itself is not ranked by the embeddings' saliency.
                names = tuple(name for name in names if name not in (info.tied_names or ()))
            tensor = loader.get_tensor(stored) if stored else None
            inputs.append(PlannedInput(model, names, tensor, parameters))
        chosen = _plan_tensor(method, weight.name, inputs, task.parameters, fallbacks)
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
    if not findings:
        fallbacks.warn()
    LoaderCache().flush_all()
    return result


def _warn_of_strangers(planned: Sequence[tuple[Any, Any]]) -> None:
    """Say which experts do not look like fine-tunes of their base; see ``relation``."""
    from mergekit.io.tasks import LoaderCache

    families: dict[ModelReference, dict[str, LazyTensorLoader]] = defaultdict(dict)
    for _, task in planned:
        for model in task.model_order:
            if model != task.base_model:
                families[task.base_model][str(model)] = LoaderCache().get(model)
    for base, experts in families.items():
        relation = relate(str(base), LoaderCache().get(base), experts)
        for line in (*relation.faults(), *relation.doubts()):
            LOG.warning(line)


def _possible_names(info: Any) -> tuple[str, ...]:
    """The names that mergekit loads a weight by, of which the first that exists counts."""
    return (info.name, *(info.aliases or ()), *(info.tied_names or ()))


def _stored_name(loader: LazyTensorLoader, info: Any) -> str | None:
    paths = loader.index.tensor_paths
    return next((name for name in _possible_names(info) if name in paths), None)


def _verified_once(
    verified: dict[tuple[ModelReference, Any], bool],
    loader: LazyTensorLoader,
    model: ModelReference,
    parameters: Mapping[str, Any],
) -> bool:
    """Whether an expert's saliency file is there and of its weights; refused if it is not."""
    if parameters["criterion"] != "saliency":
        return True
    key = model, parameters["saliency"]
    if not verified.get(key, True):
        return False
    try:
        file = saliency_of(model, parameters["saliency"])
        if (model, file) not in verified:
            check_measured_on(
                file, str(model), loader.index.tensor_paths, partial(tensor_of, loader)
            )
            verified[model, file] = True
    except ObimError as error:
        _refuse(error)
        verified[key] = False
        return False
    return True


def _vocabulary_rows(task: Any, weight: Any, i: PlannedInput, name: str) -> VocabularyRows | None:
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
    file = saliency_of(i.model, i.parameters["saliency"])
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
                sizes.append(tensor_of(loader, stored).shape[axis])
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
    verified: dict[tuple[ModelReference, Any], bool] = {}

    @functools.wraps(original)
    def construct_param_dicts(config: Any, method: Any, tensor_name: str) -> tuple[Any, Any]:
        shared, per_input = original(config, method, tensor_name)
        if not isinstance(method, PlannedMethod):
            return shared, per_input
        for error in dtype_faults({"dtype": config.dtype, "out_dtype": config.out_dtype}):
            raise error
        if line := written_in_two_ways([config.base_model, *(m.model for m in config.models)]):
            raise RecipeError(line)
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
        if not method.reads_saliency:
            return shared, per_input
        loaders = module.SimpleLoaderCache().loaders
        inputs = []
        for model, parameters in per_input.items():
            loader = loaders.get(model.model.path)
            if loader is None or model.model.path == config.base_model:
                continue
            _verified_once(verified, loader, model, parameters)
            tensor = loader.get_tensor(tensor_name, raise_on_missing=False)
            inputs.append(PlannedInput(model, (tensor_name,), tensor, parameters))
        present = [i for i in inputs if i.weight is not None]
        chosen = _plan_tensor(method, tensor_name, present, shared, UNWARNED)
        # The cache of loaders may hold other merges' models too.
        ours = [loaders[m.model.path] for m in per_input if m.model.path in loaders]
        names = frozenset().union(*(loader.index.tensor_paths for loader in ours))
        shared["layer"] = layers(names)[tensor_name]
        for model, name in chosen.items():
            per_input[model]["tensor_name"] = name
        return shared, per_input

    return construct_param_dicts


def is_planned(group: TensorGroup) -> bool:
    """mergekit's commands identify inputs by model references, its Python API by other things."""
    return any(isinstance(entry.id, ModelReference) for entry in group.entries)


def _in(group_name: str | None) -> str:
    return f" in {group_name}" if group_name else ""
