"""Running mergekit's planner on a recipe without merging anything.

The result is every output tensor with its inputs and parameters, for reports, model cards and
``--check``. What the methods themselves check while mergekit plans is in ``methods/planning.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import mergekit.architecture
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from pydantic import ValidationError

import mergekit_obim
from mergekit_obim.errors import ObimError, RecipeError, one_line, told_as
from mergekit_obim.methods.mergekit_hooks import plan_module_checked, plans_ours
from mergekit_obim.methods.planning import PlanReport, registry
from mergekit_obim.models.adapters import trust_by_content
from mergekit_obim.recipe import Document, Fault, recipe_faults
from mergekit_obim.recipe.faults import Path, raise_errors


def read_config(recipe: Mapping[str, Any]) -> MergeConfiguration:
    """Validate a recipe by mergekit's own schema.

    Args:
        recipe: The recipe, as ``yaml.safe_load`` returns it.

    Raises:
        RecipeError: mergekit would refuse the recipe.
    """
    config, faults = config_of(Document(recipe))
    raise_errors(faults)
    assert config is not None
    return config


def read_recipe(document: Document) -> tuple[MergeConfiguration | None, list[Fault]]:
    """Validate a recipe by our rules and by mergekit's schema.

    Returns:
        mergekit's configuration, None if it would refuse the recipe or has no such merge method;
        and everything that is wrong with the recipe.
    """
    mergekit_obim.register()
    faults = list(recipe_faults(document, registry()))
    config, refused = config_of(document)
    # Our own words for a list that should be a mapping are better than mergekit's.
    reported = [f.place.path for f in faults if f.kind in ("shape", "reference")]
    for fault in refused:
        path = fault.place.path
        if not any(path[: len(one)] == one or one[: len(path)] == path for one in reported):
            faults.append(fault)
    if any(fault.kind == "method" for fault in faults):
        config = None
    return config, faults


def config_of(document: Document) -> tuple[MergeConfiguration | None, list[Fault]]:
    """Validate a recipe by mergekit's own schema alone.

    Returns:
        mergekit's configuration and no faults, or None and what mergekit refuses.
    """
    mergekit_obim.register()
    try:
        return MergeConfiguration.model_validate(document.content), []
    except ValidationError as error:
        return None, list(_schema_faults(document, error))
    except RuntimeError as error:
        return None, [Fault("plan", f"the recipe: {one_line(error)}")]


def _schema_faults(document: Document, error: ValidationError) -> Iterator[Fault]:
    # Of a value that may have several types, pydantic says for each why it is not of that one.
    found: dict[Path, list[str]] = {}
    for fault in error.errors():
        path = document.known(fault["loc"])
        missing = f"{fault['loc'][-1]} is missing" if fault["type"] == "missing" else None
        found.setdefault(path, []).append(missing or fault["msg"])
    for path, messages in found.items():
        place = document.place(*path)
        message = messages[0] if len(messages) == 1 else "mergekit does not take such a value"
        yield Fault("plan", f"{place if path else 'the recipe'}: {message}", place)


def plan(
    config: MergeConfiguration, options: MergeOptions, *, inspected: bool = False
) -> list[tuple[Any, Any]]:
    """Plan a merge as mergekit-yaml would.

    Args:
        config: The recipe.
        options: mergekit's options.
        inspected: Whether the recipe's models were inspected before, which takes longer than to
            plan.

    Returns:
        For each output tensor, in the order of the merge, its ``WeightInfo`` and mergekit's task.

    Raises:
        ObimError: The recipe or the models cannot be merged. What mergekit itself raises is
            shortened to one line.
    """
    with _in_our_words():
        return _tasks(_planner(config, options, inspected=inspected))


def plan_and_collect(
    config: MergeConfiguration, options: MergeOptions
) -> tuple[list[tuple[Any, Any]], PlanReport]:
    """Plan a merge as :func:`plan` does, but return what is wrong instead of raising it.

    Returns:
        The plan, empty if mergekit could not make one; and what was found.
    """
    found = PlanReport()
    try:
        with _in_our_words():
            planner = _planner(config, options, inspected=True)

            def plan_module(name: str, definition: Any) -> None:
                plan_module_checked(planner, name, found)

            if plans_ours(planner):
                vars(planner)["plan_module"] = plan_module
            return _tasks(planner), found
    except ObimError as error:
        found.add(error, "plan")
        return [], found


def _planner(config: MergeConfiguration, options: MergeOptions, *, inspected: bool) -> MergePlanner:
    trust_by_content()
    LoaderCache().setup(options=options)
    no_card = options.model_copy(update={"write_model_card": False})
    find = mergekit.architecture.get_architecture_info
    # Wrapped by `methods.mergekit_hooks`, it inspects the models.
    info = (inspect.unwrap(find) if inspected else find)(config, no_card)
    # Of the merged model's configuration only the architecture matters here, not the layers.
    like = config.base_model or config.referenced_models()[0]
    out = like.config(trust_remote_code=options.trust_remote_code)
    # The planner rewrites the recipe that it is given.
    return MergePlanner(config.model_copy(deep=True), info, no_card, out)


def _tasks(planner: MergePlanner) -> list[tuple[Any, Any]]:
    # Nothing is written before a task runs, so no folder is needed. mergekit's own
    # `plan_in_memory` fails in 0.1.5.
    tasks = planner.plan_to_disk("")
    planned: list[Any] = [task.tensor_task for task in tasks if isinstance(task, SaveTensor)]
    return [(task.output_weight, task) for task in planned]


def _in_our_words() -> AbstractContextManager[None]:
    return told_as(RecipeError, "mergekit cannot plan this merge")
