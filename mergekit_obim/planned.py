"""A recipe as mergekit plans it: every tensor's inputs and parameters, with nothing merged."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import mergekit.architecture
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from pydantic import ValidationError

import mergekit_obim
from mergekit_obim.errors import ObimError, RecipeError, one_line
from mergekit_obim.methods.mergekit_hooks import plan_module_checked, plans_ours
from mergekit_obim.methods.planning import Findings, registry
from mergekit_obim.models.adapters import trust_by_content
from mergekit_obim.recipe import Document, Fault, recipe_faults
from mergekit_obim.recipe.faults import Path, raise_errors


def read_config(recipe: Mapping[str, Any]) -> MergeConfiguration:
    """A recipe by mergekit's own schema.

    Args:
        recipe: As ``yaml.safe_load`` gives it.

    Raises:
        RecipeError: mergekit would not take it.
    """
    config, faults = config_of(Document(recipe))
    raise_errors(faults)
    assert config is not None
    return config


def read_recipe(document: Document) -> tuple[MergeConfiguration | None, list[Fault]]:
    """A recipe by mergekit's own schema, None if it cannot be; and all that is wrong with it."""
    mergekit_obim.register()
    faults = list(recipe_faults(document, registry()))
    config, refused = config_of(document)
    # What mergekit makes of a list that should be a mapping was told in better words.
    told = [f.place.path for f in faults if f.kind in ("shape", "reference")]
    for fault in refused:
        path = fault.place.path
        if not any(path[: len(one)] == one or one[: len(path)] == path for one in told):
            faults.append(fault)
    if any(fault.kind == "method" for fault in faults):
        config = None
    return config, faults


def config_of(document: Document) -> tuple[MergeConfiguration | None, list[Fault]]:
    """A recipe by mergekit's own schema, or what mergekit would refuse in it."""
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
    """Every output tensor's weight info and mergekit's task for it, in the order of the merge.

    Args:
        config: The recipe.
        options: mergekit's.
        inspected: Whether the caller has looked at the models already.

    Raises:
        ObimError: The recipe or the models cannot be merged; whatever mergekit raises, in a line.
    """
    with _in_our_words():
        return _tasks(_planner(MergePlanner, config, options))


def look_through(
    config: MergeConfiguration, options: MergeOptions
) -> tuple[list[tuple[Any, Any]], Findings]:
    """Plan a recipe as :func:`plan` does, but with what is wrong as values and not as an error.

    Returns:
        What was planned, nothing if mergekit could not; and what was found.
    """
    found = Findings()
    try:
        with _in_our_words():
            planner = _planner(_LookingPlanner, config, options)
            found = planner.found
            return _tasks(planner), found
    except ObimError as error:
        found.add(error, "plan")
        return [], found


class _LookingPlanner(MergePlanner):
    """mergekit's planner, which keeps what is wrong with a recipe instead of raising it."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.found = Findings()

    def plan_module(self, module_name: str, definition: Any) -> None:
        if plans_ours(self):
            plan_module_checked(self, module_name, self.found)
        else:
            super().plan_module(module_name, definition)


P = TypeVar("P", bound=MergePlanner)


def _planner(kind: type[P], config: MergeConfiguration, options: MergeOptions) -> P:
    trust_by_content()
    LoaderCache().setup(options=options)
    no_card = options.model_copy(update={"write_model_card": False})
    find = mergekit.architecture.get_architecture_info
    # The check has looked at the models by itself.
    info = (inspect.unwrap(find) if kind is _LookingPlanner else find)(config, no_card)
    # Of the merged model's configuration only the architecture matters here, not the layers.
    like = config.base_model or config.referenced_models()[0]
    out = like.config(trust_remote_code=options.trust_remote_code)
    # The planner rewrites the recipe that it is given.
    return kind(config.model_copy(deep=True), info, no_card, out)


def _tasks(planner: MergePlanner) -> list[tuple[Any, Any]]:
    # Nothing is written before a task is run; `plan_in_memory` fails in mergekit 0.1.5.
    tasks = planner.plan_to_disk("")
    planned: list[Any] = [task.tensor_task for task in tasks if isinstance(task, SaveTensor)]
    return [(task.output_weight, task) for task in planned]


@contextmanager
def _in_our_words() -> Iterator[None]:
    try:
        yield
    except ObimError:
        raise
    except Exception as error:  # mergekit, transformers and the Hub raise many kinds
        raise RecipeError(f"mergekit cannot plan this merge: {one_line(error)}") from error
