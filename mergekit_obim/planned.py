"""A recipe as mergekit plans it: every tensor's inputs and parameters, with nothing merged."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import mergekit.architecture
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from pydantic import ValidationError

import mergekit_obim
from mergekit_obim.errors import ObimError, RecipeError, one_line
from mergekit_obim.models.adapters import trust_by_content


def read_config(recipe: Mapping[str, Any]) -> MergeConfiguration:
    """A recipe by mergekit's own schema.

    Args:
        recipe: As ``yaml.safe_load`` gives it.

    Raises:
        RecipeError: mergekit would not take it.
    """
    mergekit_obim.register()
    try:
        return MergeConfiguration.model_validate(recipe)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise RecipeError("the recipe: " + "; ".join(faults)) from error
    except RuntimeError as error:
        raise RecipeError(f"the recipe: {one_line(error)}") from error


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
    trust_by_content()
    LoaderCache().setup(options=options)
    try:
        find = mergekit.architecture.get_architecture_info
        info = (inspect.unwrap(find) if inspected else find)(config, options)
        # Of the merged model's configuration only the architecture matters here, not the layers.
        like = config.base_model or config.referenced_models()[0]
        out = like.config(trust_remote_code=options.trust_remote_code)
        # The planner rewrites the recipe that it is given.
        no_card = options.model_copy(update={"write_model_card": False})
        planner = MergePlanner(config.model_copy(deep=True), info, no_card, out)
        # Nothing is written before a task is run; `plan_in_memory` fails in mergekit 0.1.5.
        tasks = planner.plan_to_disk("")
    except ObimError:
        raise
    except Exception as error:  # mergekit, transformers and the Hub raise many kinds
        raise RecipeError(f"mergekit cannot plan this merge: {one_line(error)}") from error
    planned: list[Any] = [task.tensor_task for task in tasks if isinstance(task, SaveTensor)]
    return [(task.output_weight, task) for task in planned]
