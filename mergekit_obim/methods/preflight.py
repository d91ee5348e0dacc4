"""Looking at a recipe's models before mergekit does, so that faults are told in our words.

mergekit opens models and works out their architecture before it plans, and ends with a traceback
where a model is not what it expects. Its first step with a recipe is `get_architecture_info`: with
one of our methods, the models are inspected before it. With any other method nothing happens. (A
hook of mergekit's own, called with the recipe and the options before a merge begins, would replace
this.)
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mergekit.architecture
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_obim.errors import CheckpointError, ObimError, RecipeError, one_line
from mergekit_obim.models.findings import Finding
from mergekit_obim.recipe import Document, Fault, recipe_faults
from mergekit_obim.recipe.faults import raise_errors
from mergekit_obim.recipe.fix import path_warnings

LOG = logging.getLogger("mergekit_obim")

_HOOKED = "get_architecture_info"


def install(method_names: Collection[str]) -> None:
    """Have the models of recipes with these methods inspected first; again changes nothing."""
    # Registration usually happens while mergekit.merge is being imported, which has its own
    # reference to the function by then.
    for module in (mergekit.architecture, sys.modules.get("mergekit.merge")):
        original = getattr(module, _HOOKED, None)
        if original is not None and not hasattr(original, "__wrapped__"):
            vars(module)[_HOOKED] = _inspecting(original, frozenset(method_names))


def inspect_recipe(config: MergeConfiguration, options: MergeOptions) -> None:
    """Open and inspect all models of a recipe, log warnings, and refuse what cannot be merged.

    Raises:
        CheckpointError: Some cannot; the message names them all, and what to do.
    """
    # Imported here: whoever merges with another method should not wait for it.
    from mergekit_obim.methods.planning import registry, written
    from mergekit_obim.models.inspection import inspect_models, is_aligned
    from mergekit_obim.models.opened import open_model

    findings: list[Finding] = []
    models = {}
    for reference in sorted(config.referenced_models(), key=str):
        try:
            models[reference] = open_model(reference, options)
        except ObimError as error:
            findings.append(Finding("error", error.message))
    findings += inspect_models(
        models,
        config.base_model,
        options,
        aligned=is_aligned(config) or options.unsafe_truncate_embeddings,
        any_architecture=options.allow_crimes,
    )
    document = Document(written(config))
    if options.write_model_card:
        findings += [Finding("warning", str(fault)) for fault in path_warnings(document)]
    errors = _warn(findings)
    if errors:
        # Else the planner tells what is wrong with the recipe, and with single tensors.
        raise_errors([*recipe_faults(document, registry()), *errors])


def inspect_files(models: Sequence[ModelReference], base: object) -> None:
    """Refuse the weight files of a `mergekit-pytorch` recipe that cannot be merged.

    Models are compared as far as there is a folder of a transformers model around each file.

    Raises:
        CheckpointError: Some cannot; the message names them all, and what to do.
    """
    from mergekit_obim.models.comparison import comparison_findings
    from mergekit_obim.models.opened import inspect_file, open_model

    paths = [model.model.path for model in models]
    raise_errors(_warn(finding for path in paths for finding in inspect_file(path)))
    opened = {}
    options = MergeOptions()
    for path in paths:
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        with suppress(ObimError):  # it needs no configuration, so a faulty one is no fault
            model = open_model(ModelReference(model=ModelPath(path=str(folder))), options)
            if len(model.config.architectures or ()) == 1:
                opened[path] = model
    start = opened.pop(str(base), None)
    findings = comparison_findings(start, list(opened.values()), aligned=False, access=options)
    # Its recipes have no tokenizer option, and what they have is ignored.
    raise_errors(
        _warn(
            replace(
                finding,
                message=finding.message.replace("to the recipe", "to a recipe for mergekit-yaml"),
            )
            for finding in findings
        )
    )


def _warn(findings: Iterable[Finding]) -> list[Fault]:
    """Log what does not stop a merge; return what does."""
    errors = []
    for finding in findings:
        if finding.severity == "error":
            errors.append(Fault("model", finding.message, error=CheckpointError))
        else:
            LOG.warning(finding.message)
    return errors


def _inspecting(original: Callable[..., Any], method_names: frozenset[str]) -> Callable[..., Any]:
    from mergekit_obim.models.adapters import trust_by_content

    @functools.wraps(original)
    def get_architecture_info(config: Any, options: MergeOptions) -> Any:
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
