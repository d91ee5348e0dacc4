"""``obim-saliency --check``: everything that would go wrong with a recipe, before the work begins.

``one_recipe`` a recipe's adapters and models, the merge as it is planned, the calibration
``estimate``   the disk and memory that both commands will take
``verdict``    the result, for people and as JSON

It has no rules of its own: it runs mergekit's planner with our checks in it, the pre-pass's own
preparations, and the comparison of sampled weights (``mergekit_obim.models.weight_comparison``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit import merge_methods
from mergekit.common import ModelReference

from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.calibration.run import Prepared
from mergekit_obim.checking.one_recipe import RecipeCheck
from mergekit_obim.checking.verdict import Verdict
from mergekit_obim.dry_run import read_recipe
from mergekit_obim.methods.planning import PlannedMethod
from mergekit_obim.models.inspection import Opened
from mergekit_obim.models.weight_comparison import compare_weights
from mergekit_obim.recipe import Document, Fault
from mergekit_obim.recipe.document import parse
from mergekit_obim.recipe.experts import Experts, find_experts, find_in_all
from mergekit_obim.recipe.fix import change_lines, mend, path_warnings, scale_densities
from mergekit_obim.recipe.keys import base_of


def weight_warnings(
    prepared: Collection[Prepared], base: ModelReference | None, opened: Opened
) -> Iterator[str]:
    """Yield what the pre-pass warns of experts that do not look like fine-tunes of their base.

    Args:
        prepared: The experts that are about to be measured.
        base: The base; nothing is yielded without one.
        opened: The models on this machine; nothing is yielded if the base is not among them.
    """
    if base is None or base not in opened.models:
        return
    experts = {one.expert.model: one.model.loader for one in prepared}
    compared = compare_weights(str(base), opened.models[base].loader, experts)
    yield from compared.errors()
    yield from compared.warnings()


def fix(
    text: str,
    out_dir: Path | None,
    options: RunOptions,
    overrides: Mapping[str, Any] | None = None,
    only: Collection[str] = (),
) -> tuple[str, Verdict]:
    """Correct a recipe where it is clear what was meant, and check the result.

    Args:
        text: The recipe, as YAML.
        out_dir: As for :func:`check`.
        options: As for :func:`check`.
        overrides: As for :func:`check`.
        only: As for :func:`check`.

    Returns:
        The new text, unchanged if there is nothing to correct; and the verdict on it, which lists
        the changes.
    """

    def wrong(document: Document) -> Iterator[Fault]:
        yield from read_recipe(document)[1]
        yield from find_experts(document, overrides, only).faults
        yield from path_warnings(document)

    text, changes = mend(text, wrong)
    verdict = check(parse(text), out_dir, options, overrides, only)
    if verdict.densities is not None:  # what it takes the models' tensors to see
        text, more = scale_densities(text, verdict.densities)
        verdict = check(parse(text), out_dir, options, overrides, only)
        changes += more
    verdict.changes = change_lines(changes)
    return text, verdict


def check(
    documents: Sequence[Document],
    out_dir: Path | None,
    options: RunOptions,
    overrides: Mapping[str, Any] | None = None,
    only: Collection[str] = (),
) -> Verdict:
    """Check one or more recipes of a file, for the merge or for the pre-pass before it.

    Args:
        documents: The recipe, or all recipes of a file for mergekit-multi. A model that one of
            them makes does not exist yet, so it is not inspected where another uses it.
        out_dir: The folder that the pre-pass will write to; saliency files that it will make may
            be missing then. None if the merge is next; then calibration may be missing.
        options: The options of the pre-pass.
        overrides: The calibration settings that were given as command-line options.
        only: The experts to measure; all if empty.
    """
    verdict = Verdict()
    for document, found in zip(documents, find_in_all(documents, overrides, only), strict=True):
        own = replace(options, merge_dtype=document.content.get("dtype"))
        verdict.absorb(_check(document, found, out_dir, own), document.label)
    return verdict


def _check(
    document: Document, found: Experts, out_dir: Path | None, options: RunOptions
) -> Verdict:
    verdict = Verdict()
    config, faults = read_recipe(document)
    if out_dir is None:  # the merge is next, and would miss it
        faults = [replace(f, level="error") if f.kind == "stage" else f for f in faults]
    verdict.add([*faults, *found.faults, *path_warnings(document)])
    if config is None:
        verdict.add(found.uncalibrated.values())
        return verdict
    method = merge_methods.get(config.merge_method)
    if not isinstance(method, PlannedMethod):
        verdict.warnings.append(
            f"merge_method: {method.spec.name} is not a method of mergekit-obim: its "
            "parameters were not checked"
        )
    one = RecipeCheck(config, out_dir, options, verdict)
    one.check_adapters()
    one.check_models(document.stages)
    missing = one.check_plan()

    def is_measured(model: str) -> bool:
        # An expert whose saliency file exists needs no calibration any more.
        return out_dir is not None or any(f"model {model}:" in line for line in missing)

    experts = [expert for expert in found.measured if is_measured(expert.model)]
    verdict.add(fault for model, fault in found.uncalibrated.items() if is_measured(model))
    one.check_calibration(experts, base_of(document))
    one.estimate(experts)
    verdict.errors = list(dict.fromkeys(verdict.errors))
    verdict.warnings = list(dict.fromkeys(verdict.warnings))
    return verdict
