"""Inspecting a recipe's models before mergekit opens them, for errors that say what to do.

`mergekit_hooks` calls this as soon as mergekit has read a recipe with one of our methods.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import BaseModel

from mergekit_obim.errors import ObimError
from mergekit_obim.recipe import Document, Fault, recipe_faults
from mergekit_obim.recipe.faults import raise_errors
from mergekit_obim.recipe.fix import path_warnings

LOG = logging.getLogger("mergekit_obim")


def inspect_recipe(config: MergeConfiguration, options: MergeOptions) -> None:
    """Open and inspect all models of a recipe, log warnings, and refuse what cannot be merged.

    Raises:
        CheckpointError: Some models cannot be merged; the message names all of them.
        RecipeError: The recipe has errors as well.
    """
    # Imported here, so that merges with other methods do not wait for it.
    from mergekit_obim.methods.planning import registry
    from mergekit_obim.models.inspection import inspect_models, is_aligned, open_models

    opened = open_models(config.referenced_models(), options, fetch=True)
    faults = opened.faults
    faults += inspect_models(
        opened.models,
        config.base_model,
        options,
        aligned=is_aligned(config) or options.unsafe_truncate_embeddings,
        any_architecture=options.allow_crimes,
    )
    document = Document(written(config))
    if options.write_model_card:
        faults += path_warnings(document)
    errors = _warn(faults)
    if errors:
        # mergekit will not get to plan the merge, which would report the recipe's own faults.
        raise_errors([*recipe_faults(document, registry()), *errors])


def inspect_files(models: Sequence[ModelReference], base: object) -> None:
    """Refuse the weight files of a `mergekit-pytorch` recipe that cannot be merged.

    Models are compared as far as there is a folder of a transformers model around each file.

    Raises:
        CheckpointError: Some files cannot be merged; the message names all of them.
    """
    from mergekit_obim.models.comparison import comparison_faults
    from mergekit_obim.models.opened import inspect_file, open_model

    paths = [model.model.path for model in models]
    raise_errors(_warn(fault for path in paths for fault in inspect_file(path)))
    opened = {}
    options = MergeOptions()
    for path in paths:
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        with suppress(ObimError):  # a faulty configuration does not matter here
            model = open_model(ModelReference(model=ModelPath(path=str(folder))), options)
            if len(model.config.architectures or ()) == 1:
                opened[path] = model
    start = opened.pop(str(base), None)
    faults = comparison_faults(start, list(opened.values()), aligned=False, access=options)
    # mergekit-pytorch ignores tokenizer options, so that advice has to name the other command.
    raise_errors(
        _warn(
            replace(
                fault,
                message=fault.message.replace("to the recipe", "to a recipe for mergekit-yaml"),
            )
            for fault in faults
        )
    )


def _warn(faults: Iterable[Fault]) -> list[Fault]:
    """Log the faults that do not stop a merge, and return those that do."""
    errors = []
    for fault in faults:
        if fault.level == "error":
            errors.append(fault)
        else:
            LOG.warning(str(fault))
    return errors


def written(value: Any) -> Any:
    """Convert a recipe, or a part of it, to the plain mappings and lists of a YAML file.

    pydantic's own ``model_dump`` fails where the name of a model has a space in it.
    """
    if isinstance(value, BaseModel):
        return {name: written(part) for name, part in value if part is not None}
    if isinstance(value, Mapping):
        return {name: written(part) for name, part in value.items()}
    return [written(part) for part in value] if isinstance(value, list | tuple) else value
