"""Checking a recipe's models by themselves, beside the base, and in mergekit's plan."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.checking.verdict import Verdict
from mergekit_obim.dry_run import plan_and_collect
from mergekit_obim.errors import (
    ObimError,
    SaliencyFileError,
    SaliencyNotFoundError,
)
from mergekit_obim.models.inspection import (
    Opened,
    inspect_absent,
    inspect_models,
    is_aligned,
    open_models,
)
from mergekit_obim.models.weight_comparison import compare_weights
from mergekit_obim.recipe.faults import fold


def expert_references(config: MergeConfiguration) -> list[ModelReference]:
    """Return every model of a recipe but the base, sorted by name."""
    return sorted((m for m in config.referenced_models() if m != config.base_model), key=str)


def check_models(
    config: MergeConfiguration, stages: Collection[str], options: RunOptions, verdict: Verdict
) -> Opened:
    """Open the recipe's models, and inspect them by themselves and beside the base.

    Args:
        config: The recipe.
        stages: The models that other recipes of the same file will make.
        options: How models are read.
        verdict: The verdict that errors, warnings and measures are added to.

    Returns:
        The models that are on this machine.
    """
    to_come = [m for m in config.referenced_models() if m.model.path in stages]
    for reference in sorted(to_come, key=str):
        verdict.warnings.append(
            f"model {reference}: another recipe of this file makes it: its weights were not "
            "looked at"
        )
    opened = open_models(set(config.referenced_models()).difference(to_come), options)
    for reference, reason in opened.absent.items():
        verdict.warnings.append(f"model {reference}: {reason}: its weights were not looked at")
        try:
            verdict.add(inspect_absent(reference, options))
        except ObimError as error:
            verdict.errors.append(error.message)
    verdict.add(opened.faults)
    base = config.base_model
    verdict.add(inspect_models(opened.models, base, options, aligned=is_aligned(config)))
    if base is None or base not in opened.readable:
        return opened
    start = opened.readable[base]
    alike = {
        str(reference): model.loader
        for reference, model in opened.readable.items()
        if reference != base and model.config.architectures == start.config.architectures
    }
    if alike:
        compared = compare_weights(str(base), start.loader, alike)
        verdict.errors += compared.errors()
        verdict.warnings += compared.warnings()
        verdict.distances = compared.sizes()
        verdict.cosines = compared.cosines()
    return opened


def check_plan(
    config: MergeConfiguration,
    opened: Opened,
    out_dir: Path | None,
    options: RunOptions,
    verdict: Verdict,
) -> list[str]:
    """Plan the merge, and add what is wrong to the verdict.

    Returns:
        The messages on missing saliency files, which are errors only if the merge is next.
    """
    if len(opened.readable) < len(config.referenced_models()):
        if not verdict.errors:
            verdict.warnings.append("the merge itself was not planned: not every model is here")
        return []
    merging = MergeOptions(
        transformers_cache=options.transformers_cache,
        lora_merge_cache=options.lora_merge_cache,
        trust_remote_code=options.trust_remote_code,
    )
    _, found = plan_and_collect(config, merging)
    missing = []
    for fault in fold(found.tensors):
        if fault.kind == "plan" and verdict.errors:
            continue  # mergekit may only fail because of the errors that were found before
        if fault.error is SaliencyNotFoundError:
            missing.append(fault.message)
            if out_dir is None:
                verdict.errors.append(fault.message)
        elif not (out_dir and options.overwrite and fault.error is SaliencyFileError):
            verdict.add([fault])
    setting = (config.parameters or {}).get("saliency")
    if out_dir and isinstance(setting, str) and Path(setting).resolve() != out_dir.resolve():
        verdict.warnings.append(
            f"the recipe's saliency is {setting}, but the pre-pass would write to {out_dir}"
        )
    if not verdict.errors:
        try:
            outcomes = [cosines.outcome() for cosines in found.cosines.values()]
            verdict.stretch = [outcome for outcome in outcomes if outcome]
        except ObimError as error:
            verdict.errors.append(error.message)
    verdict.warnings += found.fallbacks.sketch_warnings()
    for (model, outcome), tensors in found.fallbacks.found.items():
        verdict.fallbacks.append({"model": model, "outcome": outcome, "tensors": tensors})
    return missing
