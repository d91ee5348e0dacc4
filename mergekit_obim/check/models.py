"""What a recipe's models are to each other, and what mergekit's planner makes of them."""

from __future__ import annotations

from pathlib import Path

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.check.verdict import Verdict
from mergekit_obim.errors import (
    ObimError,
    SaliencyFileError,
    SaliencyNotFoundError,
)
from mergekit_obim.methods.planning import finding_all
from mergekit_obim.models.inspection import (
    Opened,
    inspect_absent,
    inspect_models,
    is_aligned,
    open_models,
)
from mergekit_obim.models.relation import relate
from mergekit_obim.planned import plan


def experts_of(config: MergeConfiguration) -> list[ModelReference]:
    return sorted((m for m in config.referenced_models() if m != config.base_model), key=str)


def check_models(config: MergeConfiguration, options: RunOptions, verdict: Verdict) -> Opened:
    """Open the recipe's models, and note what they are by themselves and beside the base."""
    opened = open_models(config.referenced_models(), options)
    for reference, reason in opened.absent.items():
        verdict.warnings.append(f"model {reference}: {reason}: its weights were not looked at")
        try:
            verdict.note(inspect_absent(reference, options))
        except ObimError as error:
            verdict.faults.append(error.message)
    verdict.note(opened.findings)
    base = config.base_model
    verdict.note(inspect_models(opened.models, base, options, aligned=is_aligned(config)))
    if base is None or base not in opened.readable:
        return opened
    start = opened.readable[base]
    alike = {
        str(reference): model.loader
        for reference, model in opened.readable.items()
        if reference != base and model.config.architectures == start.config.architectures
    }
    if alike:
        relation = relate(str(base), start.loader, alike)
        verdict.faults += relation.faults()
        verdict.warnings += relation.doubts()
        verdict.distances = relation.sizes()
        verdict.cosines = relation.cosines()
    return opened


def check_plan(
    config: MergeConfiguration,
    opened: Opened,
    out_dir: Path | None,
    options: RunOptions,
    verdict: Verdict,
) -> list[str]:
    """Plan the merge; returns what is said of saliency files that are not there."""
    if len(opened.readable) < len(config.referenced_models()):
        if not verdict.faults:
            verdict.warnings.append("the merge itself was not planned: not every model is here")
        return []
    merging = MergeOptions(
        transformers_cache=options.transformers_cache,
        lora_merge_cache=options.lora_merge_cache,
        trust_remote_code=options.trust_remote_code,
    )
    with finding_all() as findings:
        try:
            plan(config, merging, inspected=True)
        except ObimError as error:
            # What mergekit fails at in the end may come of what was found before.
            if not (verdict.faults or findings.faults):
                findings.add(error, None)
    missing = []
    for fault, more in findings.faults.values():
        line = fault.message + (f" (and {more} more tensors)" if more else "")
        if isinstance(fault, SaliencyNotFoundError):
            missing.append(line)
            if out_dir is None:
                verdict.faults.append(line)
        elif not (out_dir and options.overwrite and isinstance(fault, SaliencyFileError)):
            verdict.faults.append(line)
    setting = (config.parameters or {}).get("saliency")
    if out_dir and isinstance(setting, str) and Path(setting).resolve() != out_dir.resolve():
        verdict.warnings.append(
            f"the recipe's saliency is {setting}, but the pre-pass would write to {out_dir}"
        )
    for (model, fate), tensors in findings.fallbacks.found.items():
        verdict.fallbacks.append({"model": model, "fate": fate, "tensors": tensors})
    return missing
