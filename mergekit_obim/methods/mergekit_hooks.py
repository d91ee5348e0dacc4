"""All use of mergekit 0.1.5's private parts; but for mergekit-evolve, nothing else here patches it.

``evolve_hooks`` is the other module of this kind.

Two things are missing from mergekit's interface for merge methods:

1. The names of the *input* tensors, by which a saliency is looked up. They differ from the output's
   name where ``slices`` move layers.
2. A chance to refuse a recipe before the work begins. A method is first called to merge a tensor,
   when half of the recipe may have been merged already.

So both planners are wrapped: `MergePlanner.plan_module` of mergekit-yaml and
`construct_param_dicts` of mergekit-pytorch. The wrappers check the whole recipe, and pass the names
on as ordinary parameters of mergekit's task graph. The method's own ``validate_inputs``, which each
planner calls before it plans a tensor, puts them in place.

Even before that, mergekit opens every model and merges adapters, with a traceback if anything is
wrong with them. So its first step with a recipe, `get_architecture_info`, is wrapped when our
methods are registered: if the recipe uses one of them, the models are inspected first, and adapters
are merged by `models.adapters`. Recipes with other methods run as before.

Upstream, three additions to `MergeMethod` would replace this module: a `prepare(config, options)`
that is called before a model is opened; a `plan(config, tasks)` that is called once after all tasks
are planned and before one is run, and may refuse or replace them; and the input tensor's own name
in `TensorEntry`. Until then, a mergekit that plans in another way ends in an error that says so
(``methods.base``), never in a guess.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mergekit.architecture
import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.io import LazyTensorLoader
from mergekit.merge_methods.base import BatchOptions, TensorGroup

from mergekit_obim.errors import ObimError, RecipeError, one_line
from mergekit_obim.methods.planning import (
    UNWARNED,
    PlannedInput,
    PlannedMethod,
    PlanReport,
    is_planned,
    plan_in_memory,
    plan_input_axis,
    plan_stretch,
    plan_tensor,
    registry,
    verified_once,
)
from mergekit_obim.methods.preflight import inspect_files, inspect_recipe, written
from mergekit_obim.methods.vocabulary import vocabulary_rows
from mergekit_obim.models.adapters import trust_by_content
from mergekit_obim.models.checkpoint import scored_names, stored_name
from mergekit_obim.models.layers import layer_indices
from mergekit_obim.models.task_vectors import Cosines, Place
from mergekit_obim.models.weight_comparison import compare_weights
from mergekit_obim.recipe import Document, Fault, recipe_faults
from mergekit_obim.recipe.faults import raise_errors, setting_path
from mergekit_obim.saliency.file import SaliencyFile

LOG = logging.getLogger("mergekit_obim")
_FIRST_STEP = "get_architecture_info"
# The group name with which mergekit's planner validates a slice, before it plans its tensors.
_PLANNERS_SLICE = re.compile(r"\.slices\[\d+\]$")


class HookedMethod(PlannedMethod):
    """A planned method that makes mergekit's planners check its recipes."""

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Wrap the planners, the first of which calls this before it plans any tensor."""
        install()
        if group_name and _PLANNERS_SLICE.search(group_name):
            return  # `plan_module` comes next, and reports it with everything else
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        if group_name is None and all(isinstance(i, ModelReference) for i in input_ids):
            # mergekit-pytorch, which opens the files next; mergekit-yaml's names have a group.
            inspect_files([i for i in input_ids if isinstance(i, ModelReference)], base_id)

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        **dtypes: Any,
    ) -> tuple[torch.Tensor, ...]:
        # mergekit's Python API has no planner: the name of a group is that of its inputs too.
        # mergekit hands over all groups at once, so all are checked before the first is merged.
        if self.reads_saliency and not any(is_planned(group) for group in groups):
            parameters = plan_in_memory(self, groups, parameters)
        return super()._execute(groups, parameters, options, **dtypes)


def listen(method_names: Collection[str]) -> None:
    """Have the models of recipes with these methods inspected before mergekit opens them.

    mergekit's first step with a recipe is `get_architecture_info`; with any other method it is
    called as it is. Calling this again changes nothing.
    """
    # Registration usually happens while mergekit.merge is being imported, which has its own
    # reference to the function by then.
    for module in (mergekit.architecture, sys.modules.get("mergekit.merge")):
        original = getattr(module, _FIRST_STEP, None)
        if original is not None and not hasattr(original, "__wrapped__"):
            vars(module)[_FIRST_STEP] = _inspecting(original, frozenset(method_names))


def _inspecting(original: Any, method_names: frozenset[str]) -> Any:
    @functools.wraps(original)
    def get_architecture_info(config: Any, options: Any) -> Any:
        if getattr(config, "merge_method", None) not in method_names:
            return original(config, options)
        trust_by_content()
        inspect_recipe(config, options)
        try:
            return original(config, options)
        except ObimError:
            raise
        except Exception as error:  # mergekit, transformers and the Hub raise many kinds
            raise RecipeError(f"mergekit cannot plan this merge: {one_line(error)}") from error

    return get_architecture_info


def install() -> None:
    """Wrap mergekit's two planners, as far as they are imported; calling it again is harmless.

    They are looked up in ``sys.modules``: a planner that is not imported is not in use.
    """
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
        if not plans_ours(planner):
            original(planner, module_name, definition)
            return
        # One report for all modules of the recipe, so that one error lists all faults. It is kept
        # on the planner, as it has to end with this merge.
        found = vars(planner).setdefault("obim_report", PlanReport())
        plan_module_checked(planner, module_name, found)
        if module_name == list(planner.config.modules)[-1]:
            found.conclude()
            _warn_of_unrelated_experts(planner._tensors)

    return plan_module


def plans_ours(planner: Any) -> bool:
    """Return whether mergekit's planner has a recipe for one of our methods."""
    return isinstance(planner._method, PlannedMethod)


def plan_module_checked(planner: Any, module_name: str, found: PlanReport) -> None:
    """Plan one module of a recipe for one of our methods, and collect what is wrong.

    Args:
        planner: mergekit's planner, whose recipe is in normal form by now.
        module_name: The module.
        found: The report that faults are added to; the first module adds those of the recipe.

    Raises:
        Exception: mergekit cannot plan the module, and no fault was found that explains it.
    """
    from mergekit.plan import MergePlanner  # imports every method, so it is not there at the top

    method, config = planner._method, planner.config
    original = getattr(MergePlanner.plan_module, "__wrapped__", MergePlanner.plan_module)
    if module_name == next(iter(config.modules)):
        found.recipe += recipe_faults(Document(written(config)), registry())
    if any(fault.kind == "structure" for fault in found.recipe):
        return
    first = len(planner._tensors)
    try:
        # Wrong parameters would end the planning: without them the remaining faults are found
        # too. This is a copy; the recipe that mergekit was given stays as it is.
        planner.config = _without(config, found.recipe)
        original(planner, module_name, planner.config.modules[module_name])
        if method.reads_saliency:
            planner._tensors[first:] = _plan_tasks(method, planner._tensors[first:], found)
    except ObimError as error:
        found.add(error, "plan")
    except Exception:
        if not found.errors:  # otherwise they may be the cause
            raise
    finally:
        planner.config = config
    if any(f.kind == "value" and "density" in f.place.path for f in found.recipe):
        # A density that was left out above counted as 1/K, which the user did not write.
        found.tensors = [fault for fault in found.tensors if fault.kind != "densities"]


def _without(config: Any, faults: Iterable[Fault]) -> Any:
    """Return a recipe with misspelt parameters corrected and wrong values left out."""
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


def _plan_tasks(
    method: PlannedMethod, planned: Sequence[tuple[Any, Any]], found: PlanReport
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
        places: dict[Hashable, Place | None] = {task.base_model: None}
        for model in task.model_order:
            info = gather.weight_info[model]
            loader = LoaderCache().get(model)
            stored = stored_name(loader, info)
            # Until the tokenizer options move them, a vocabulary's rows are not those of the base.
            places[model] = (loader, stored) if stored and gather is vocabulary else None
            if model == task.base_model:
                continue
            own = dict(task.input_parameters[model].items())
            parameters = method.plan_parameters(own, task.parameters)
            key = model, parameters["saliency"]
            if key in refused or not verified_once(verified, loader, model, parameters, found):
                refused.add(key)
                parameters["criterion"] = "magnitude"  # only to go on: the error is in the report
            tensor = loader.get_tensor(stored) if stored else None
            inputs.append(PlannedInput(model, scored_names(loader, info), tensor, parameters))
        chosen = plan_tensor(method, weight.name, inputs, task.parameters, found)
        per_expert = {
            i.model: {
                **i.parameters,
                "tensor_name": chosen[i.model],
                "vocabulary_rows": vocabulary_rows(vocabulary, weight, i, chosen[i.model]),
            }
            for i in inputs
        }
        values = dict(task.parameters.items())
        if values["layer"] is None:
            values["layer"] = layers[weight.name]
        values |= plan_stretch(method, weight.name, places, inputs, values, found)
        trusted = LoaderCache().trust_remote_code
        values |= plan_input_axis(values, weight.name, task.base_model, trusted)
        fields = {name: getattr(task, name) for name in type(task).model_fields}
        fields |= {"parameters": values, "input_parameters": {**per_expert, task.base_model: {}}}
        result.append((weight, type(task)(**fields)))
    LoaderCache().flush_all()
    return result


def _warn_of_unrelated_experts(planned: Sequence[tuple[Any, Any]]) -> None:
    """Warn of experts that do not look like fine-tunes of their base."""
    from mergekit.io.tasks import LoaderCache

    families: dict[ModelReference, dict[str, LazyTensorLoader]] = defaultdict(dict)
    for _, task in planned:
        for model in task.model_order:
            if model != task.base_model:
                families[task.base_model][str(model)] = LoaderCache().get(model)
    for base, experts in families.items():
        compared = compare_weights(str(base), LoaderCache().get(base), experts)
        for line in (*compared.errors(), *compared.warnings()):
            LOG.warning(line)


def _checked_param_dicts(original: Any, module: Any) -> Any:
    """Wrap mergekit-pytorch's planner, which plans tensor by tensor.

    It names outputs as their inputs, and has no plan of the whole merge to check: the recipe is
    checked with the first tensor, and every tensor's own faults when its turn comes.
    """
    layers = functools.lru_cache(maxsize=1)(layer_indices)
    verified: set[tuple[ModelReference, SaliencyFile]] = set()
    checked: list[Any] = [None]  # the recipe that was last checked as a whole
    cosines: dict[Hashable, Cosines] = {}  # of that recipe

    @functools.wraps(original)
    def construct_param_dicts(config: Any, method: Any, tensor_name: str) -> tuple[Any, Any]:
        if isinstance(method, PlannedMethod) and checked[0] is not config:
            content = written(config)
            # Its models are files, whatever characters their names have.
            for entry in (content, *content["models"]):
                key = "base_model" if entry is content else "model"
                entry |= {key: {"model": {"path": entry[key]}}} if key in entry else {}
            PlanReport(list(recipe_faults(Document(content), registry()))).conclude()
            checked[0] = config
            cosines.clear()
        shared, per_input = original(config, method, tensor_name)
        if not isinstance(method, PlannedMethod) or not method.reads_saliency:
            return shared, per_input
        loaders = module.SimpleLoaderCache().loaders
        inputs, found = [], PlanReport(fallbacks=UNWARNED, cosines=cosines)
        places: dict[Hashable, Place | None] = {config.base_model: None}
        for model, parameters in per_input.items():
            loader = loaders.get(model.model.path)
            if loader is None:
                continue
            is_base = model.model.path == config.base_model
            has = tensor_name in loader.index.tensor_paths
            places[config.base_model if is_base else model] = (loader, tensor_name) if has else None
            if is_base:
                continue
            parameters |= method.plan_parameters(parameters, shared)
            if not verified_once(verified, loader, model, parameters, found):
                continue
            tensor = loader.get_tensor(tensor_name, raise_on_missing=False)
            inputs.append(PlannedInput(model, (tensor_name,), tensor, parameters))
        present = [i for i in inputs if i.weight is not None]
        chosen = plan_tensor(method, tensor_name, present, shared, found)
        raise_errors(found.errors)
        # The cache of loaders may hold other merges' models too.
        ours = [loaders[m.model.path] for m in per_input if m.model.path in loaders]
        names = frozenset().union(*(loader.index.tensor_paths for loader in ours))
        shared["layer"] = layers(names)[tensor_name]
        beside = Path(config.base_model)  # a file of weights, or a folder
        folder = ModelPath(path=str(beside if beside.is_dir() else beside.parent))
        shared |= plan_input_axis(shared, tensor_name, ModelReference(model=folder))
        for model, name in chosen.items():
            per_input[model]["tensor_name"] = name
        shared |= plan_stretch(method, tensor_name, places, present, shared, found)
        return shared, per_input

    return construct_param_dicts
