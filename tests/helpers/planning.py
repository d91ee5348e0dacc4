"""What mergekit-yaml does before it merges the first tensor: for recipes that are only planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_obim.methods import saliency


@dataclass
class Planned:
    """What would be merged: mergekit's tasks, by the output tensor's name."""

    tasks: dict[str, Any]

    def of(self, tensor: str, parameter: str) -> dict[str, Any]:
        """A per-expert parameter's values, by the expert's reference, in the merging order."""
        task = self.tasks[tensor]
        return {
            str(model): task.input_parameters[model][parameter]
            for model in task.model_order
            if model != task.base_model
        }


def plan(recipe: Mapping[str, Any]) -> Planned:
    """Check a recipe against mergekit's schema and plan its merge, as far as the first tensor."""
    # A process of its own would start without these.
    LoaderCache().loaders.clear()
    saliency._locate.cache_clear()
    config = MergeConfiguration.model_validate(recipe)
    options = MergeOptions(lora_merge_cache="lora-cache", quiet=True)
    LoaderCache().setup(options=options)
    assert config.base_model is not None
    planner = MergePlanner(
        config,
        get_architecture_info(config, options),
        options=options,
        out_model_config=config.base_model.config(),
    )
    planner.plan_to_disk("merged")
    return Planned({weight.name: task for weight, task in planner._tensors})
