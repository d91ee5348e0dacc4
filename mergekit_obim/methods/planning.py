"""Planning a merge: everything that can be wrong is found before a tensor is merged.

mergekit calls a method with tensors and parameter values, but not with the *input*
tensors' names, which a saliency is looked up by and which differ from the output's where
``slices`` move layers. So planning is wrapped, from the method's own ``validate_inputs``:
nothing of mergekit is touched unless a recipe uses one of our methods. The wrapped
planners check the whole recipe before any tensor is merged and hand the names to the
method as ordinary parameters of mergekit's task graph.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader
from mergekit.merge_methods.base import (
    BatchOptions,
    GroupMergeMethod,
    MergeMethodSpec,
    PerInputValues,
    TensorGroup,
)
from pydantic import BaseModel

from mergekit_obim.errors import ObimError, RecipeError
from mergekit_obim.methods.parameters import PLANNED
from mergekit_obim.methods.preflight import inspect_files
from mergekit_obim.methods.saliency import VocabularyRows, check_shape, saliency_of
from mergekit_obim.models.checkpoint import tensor_of
from mergekit_obim.models.layers import layer_indices
from mergekit_obim.models.relation import relate
from mergekit_obim.recipe import Document, Fault, Method, recipe_faults
from mergekit_obim.recipe.faults import (
    Kind,
    errors_of,
    fault_of,
    raise_errors,
    setting_path,
    warnings_of,
)
from mergekit_obim.saliency.file import SaliencyFile
from mergekit_obim.saliency.locate import check_measured_on

LOG = logging.getLogger("mergekit_obim")
# How mergekit's planner calls the inputs of a slice, before it plans a tensor of it.
_PLANNERS_SLICE = re.compile(r"\.slices\[\d+\]$")


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
        if group_name and _PLANNERS_SLICE.search(group_name):
            return  # `plan_module` comes next, and tells it with everything else
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
    """What planning found.

    Attributes:
        recipe: What is wrong with the recipe as it is written.
        tensors: What is wrong with models, saliency files and the parameters of single tensors.
        fallbacks: Tensors without saliency.
    """

    recipe: list[Fault] = field(default_factory=list)
    tensors: list[Fault] = field(default_factory=list)
    fallbacks: Fallbacks = field(default_factory=Fallbacks)

    @property
    def errors(self) -> list[Fault]:
        return errors_of([*self.recipe, *self.tensors])

    def add(self, error: ObimError, kind: Kind, tensor: str | None = None) -> None:
        """Note what something refused."""
        self.tensors.append(fault_of(error, kind, tensor))

    def conclude(self) -> None:
        """Raise all errors as one, or else warn of what is no error.

        Raises:
            ObimError: There are errors.
        """
        raise_errors([*self.recipe, *self.tensors])
        for fault in warnings_of(self.recipe):
            LOG.warning(str(fault))
        self.fallbacks.warn()


# mergekit-pytorch plans tensor by tensor: what it found is told when the first is merged.
UNWARNED = Fallbacks()


def _plan_tensor(
    method: PlannedMethod,
    output: str | None,
    inputs: Sequence[PlannedInput],
    parameters: Mapping[str, Any],
    found: Findings,
) -> dict[Hashable, str]:
    """Check one tensor's parameters and saliency; returns the name to look each expert up by."""
    found.tensors += method.check_tensor(output, inputs, parameters)
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
                found.fallbacks.found[str(i.model), fate][i.names[0]] = reason
        except ObimError as error:
            found.add(error, "saliency", i.names[0])
    return chosen


def _plan_in_memory(
    method: PlannedMethod,
    groups: Sequence[TensorGroup],
    parameters: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """What the planners do, for mergekit's Python API."""
    layers = layer_indices(group.metadata.name for group in groups if group.metadata.name)
    found = Findings()
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
        chosen = _plan_tensor(method, name, inputs, values, found)
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
        # Of every module, as an error is to tell of all of them: kept where the tensors are.
        found = vars(planner).setdefault("obim_findings", Findings())
        plan_module_checked(planner, module_name, found)
        if module_name == list(planner.config.modules)[-1]:
            found.conclude()
            _warn_of_strangers(planner._tensors)

    return plan_module


def plan_module_checked(planner: Any, module_name: str, found: Findings) -> None:
    """Plan one module of a recipe for one of our methods, and note what is wrong.

    Args:
        planner: mergekit's planner, its recipe in normal form.
        module_name: The module.
        found: Where it is noted; of the recipe as it is written with the first module.

    Raises:
        Exception: mergekit cannot plan it, although nothing was found that explains it.
    """
    from mergekit.plan import MergePlanner

    method, config = planner._method, planner.config
    original = getattr(MergePlanner.plan_module, "__wrapped__", MergePlanner.plan_module)
    if module_name == next(iter(config.modules)):
        found.recipe += recipe_faults(Document(written(config)), registry())
    if any(fault.kind == "structure" for fault in found.recipe):
        return
    first = len(planner._tensors)
    try:
        # What is wrong so far is taken out of the way, that the rest can be found too. This is
        # a copy: the recipe that mergekit was given stays as it is.
        planner.config = _without(config, found.recipe)
        original(planner, module_name, planner.config.modules[module_name])
        if method.reads_saliency:
            planner._tensors[first:] = _plan_tasks(method, planner._tensors[first:], found)
    except ObimError as error:
        found.add(error, "plan")
    except Exception:
        if not found.errors:  # else it may come of them
            raise
    finally:
        planner.config = config
    if any(f.kind == "value" and "density" in f.place.path for f in found.recipe):
        # A density that was taken out of the way is not 1/K in earnest.
        found.tensors = [fault for fault in found.tensors if fault.kind != "densities"]


def _without(config: Any, faults: Iterable[Fault]) -> Any:
    """A recipe with misspelt parameters put right and wrong values left out."""
    wrong = [fault for fault in faults if fault.kind in ("parameter", "value")]
    if not wrong:
        return config
    content = written(config)
    for fault in wrong:
        *steps, name = setting_path(fault.place.path)
        settings = content
        for step in steps:
            settings = settings[step]
        value = settings.pop(name, None)
        if fault.nearest and value is not None:
            settings.setdefault(fault.nearest, value)
    return type(config).model_validate(content)


def written(value: Any) -> Any:
    """A recipe, or a part of it, as a file would have it, of plain mappings and lists.

    pydantic's own ``model_dump`` fails where the name of a model has a space in it.
    """
    if isinstance(value, BaseModel):
        return {name: written(part) for name, part in value if part is not None}
    if isinstance(value, Mapping):
        return {name: written(part) for name, part in value.items()}
    return [written(part) for part in value] if isinstance(value, list | tuple) else value


def registry() -> dict[str, Method]:
    """Every merge method that mergekit knows now, as far as recipes concern it."""
    found = {}
    for method in merge_methods.registered_methods():
        parameters = {p.name: p for p in method.spec.parameters if p.name not in PLANNED}
        ours = isinstance(method, PlannedMethod)
        copies = method.copies if isinstance(method, PlannedMethod) else (lambda _: False)
        found[method.spec.name] = Method(method.spec.name, parameters, ours, copies)
    return found


def _plan_tasks(
    method: PlannedMethod, planned: Sequence[tuple[Any, Any]], found: Findings
) -> list[tuple[Any, Any]]:
    from mergekit.io.tasks import LoaderCache

    layers = layer_indices(weight.name for weight, _ in planned)
    verified: set[tuple[ModelReference, SaliencyFile]] = set()
    refused: set[tuple[ModelReference, Any]] = set()
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
            key = model, parameters["saliency"]
            if key in refused or not _verified_once(verified, loader, model, parameters, found):
                refused.add(key)
                parameters["criterion"] = "magnitude"  # to go on with: nothing will be merged
            names = _possible_names(info)
            stored = _stored_name(loader, info)
            if stored and stored not in (info.tied_names or ()):
                # A head that is there by itself is not ranked by the embeddings' saliency.
                names = tuple(name for name in names if name not in (info.tied_names or ()))
            tensor = loader.get_tensor(stored) if stored else None
            inputs.append(PlannedInput(model, names, tensor, parameters))
        chosen = _plan_tensor(method, weight.name, inputs, task.parameters, found)
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
    verified: set[tuple[ModelReference, SaliencyFile]],
    loader: LazyTensorLoader,
    model: ModelReference,
    parameters: Mapping[str, Any],
    found: Findings,
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
    verified: set[tuple[ModelReference, SaliencyFile]] = set()
    checked: list[Any] = [None]  # the recipe that was last looked at as a whole

    @functools.wraps(original)
    def construct_param_dicts(config: Any, method: Any, tensor_name: str) -> tuple[Any, Any]:
        if isinstance(method, PlannedMethod) and checked[0] is not config:
            content = written(config)
            # Its models are files, whatever characters their names have.
            for entry in (content, *content["models"]):
                key = "base_model" if entry is content else "model"
                entry |= {key: {"model": {"path": entry[key]}}} if key in entry else {}
            Findings(list(recipe_faults(Document(content), registry()))).conclude()
            checked[0] = config
        shared, per_input = original(config, method, tensor_name)
        if not isinstance(method, PlannedMethod) or not method.reads_saliency:
            return shared, per_input
        loaders = module.SimpleLoaderCache().loaders
        inputs, found = [], Findings(fallbacks=UNWARNED)
        for model, parameters in per_input.items():
            loader = loaders.get(model.model.path)
            if loader is None or model.model.path == config.base_model:
                continue
            if not _verified_once(verified, loader, model, parameters, found):
                continue
            tensor = loader.get_tensor(tensor_name, raise_on_missing=False)
            inputs.append(PlannedInput(model, (tensor_name,), tensor, parameters))
        present = [i for i in inputs if i.weight is not None]
        chosen = _plan_tensor(method, tensor_name, present, shared, found)
        raise_errors(found.errors)
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
