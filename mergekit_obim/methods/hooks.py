"""What is seen to as soon as a recipe with one of our methods is run, before mergekit plans it.

mergekit opens every model, and merges adapters into theirs, before it asks a merge method anything
(``planning`` is too late). But first it asks the recipe which models it has, so we listen there.
"""

from __future__ import annotations

import functools
from typing import Any

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_obim.methods.planning import PlannedMethod
from mergekit_obim.models.adapters import trust_by_content


def watch_recipes() -> None:
    """Have the adapters of every recipe with one of our methods merged by ``models.adapters``."""
    original: Any = MergeConfiguration.referenced_models
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def referenced_models(config: MergeConfiguration) -> list[ModelReference]:
        known = {method.spec.name: method for method in merge_methods.registered_methods()}
        if isinstance(known.get(config.merge_method), PlannedMethod):
            trust_by_content()
        models: list[ModelReference] = original(config)
        return models

    MergeConfiguration.referenced_models = referenced_models  # type: ignore[assignment, method-assign]
