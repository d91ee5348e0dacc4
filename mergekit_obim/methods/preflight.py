"""Looking at a recipe's models before mergekit does, so that faults are told in our words.

`mergekit_hooks` calls this as soon as mergekit has a recipe with one of our methods.
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
from mergekit_obim.models.faults import model_fault
from mergekit_obim.recipe import Document, Fault, recipe_faults
from mergekit_obim.recipe.faults import raise_errors
from mergekit_obim.recipe.fix import path_warnings

LOG = logging.getLogger("mergekit_obim")


def inspect_recipe(config: MergeConfiguration, options: MergeOptions) -> None:
    """Open and inspect all models of a recipe, log warnings, and refuse what cannot be merged.

    Raises:
        CheckpointError: Some cannot; the message names them all, and what to do.
    """
    # Imported here: whoever merges with another method should not wait for it.
    from mergekit_obim.methods.planning import registry
    from mergekit_obim.models.inspection import inspect_models, is_aligned
    from mergekit_obim.models.opened import open_model

    faults: list[Fault] = []
    models = {}
    for reference in sorted(config.referenced_models(), key=str):
        try:
            models[reference] = open_model(reference, options)
        except ObimError as error:
            faults.append(model_fault("error", error.message))
    faults += inspect_models(
        models,
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
        # Else the planner tells what is wrong with the recipe, and with single tensors.
        raise_errors([*recipe_faults(document, registry()), *errors])


def inspect_files(models: Sequence[ModelReference], base: object) -> None:
    """Refuse the weight files of a `mergekit-pytorch` recipe that cannot be merged.

    Models are compared as far as there is a folder of a transformers model around each file.

    Raises:
        CheckpointError: Some cannot; the message names them all, and what to do.
    """
    from mergekit_obim.models.comparison import comparison_faults
    from mergekit_obim.models.opened import inspect_file, open_model

    paths = [model.model.path for model in models]
    raise_errors(_warn(fault for path in paths for fault in inspect_file(path)))
    opened = {}
    options = MergeOptions()
    for path in paths:
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        with suppress(ObimError):  # it needs no configuration, so a faulty one is no fault
            model = open_model(ModelReference(model=ModelPath(path=str(folder))), options)
            if len(model.config.architectures or ()) == 1:
                opened[path] = model
    start = opened.pop(str(base), None)
    faults = comparison_faults(start, list(opened.values()), aligned=False, access=options)
    # Its recipes have no tokenizer option, and what they have is ignored.
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
    """Log what does not stop a merge; return what does."""
    errors = []
    for fault in faults:
        if fault.level == "error":
            errors.append(fault)
        else:
            LOG.warning(str(fault))
    return errors


def written(value: Any) -> Any:
    """A recipe, or a part of it, as a file would have it, of plain mappings and lists.

    pydantic's own ``model_dump`` fails where the name of a model has a space in it.
    """
    if isinstance(value, BaseModel):
        return {name: written(part) for name, part in value if part is not None}
    if isinstance(value, Mapping):
        return {name: written(part) for name, part in value.items()}
    return [written(part) for part in value] if isinstance(value, list | tuple) else value
