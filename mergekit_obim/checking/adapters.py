"""Checking a recipe's adapters without merging them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration

from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.checking.verdict import Verdict
from mergekit_obim.errors import ObimError
from mergekit_obim.methods.saliency import saliency_of
from mergekit_obim.models.adapters import adapter_warnings, check_adapter, look_up
from mergekit_obim.models.checkpoint import tensor_of
from mergekit_obim.saliency.file import SaliencyFile, saliency_file_name
from mergekit_obim.saliency.locate import check_measured_on


def check_adapters(
    config: MergeConfiguration, out_dir: Path | None, options: RunOptions, verdict: Verdict
) -> None:
    """Find adapters that do not fit their models, and saliency of adapters that have changed.

    Args:
        config: The recipe.
        out_dir: The folder that the pre-pass will write to; None if the merge is next.
        options: The options of the pre-pass.
        verdict: The verdict that errors and warnings are added to.
    """
    if not options.lora_merge_cache:
        return  # opening the models reports it
    for reference in sorted(config.referenced_models(), key=str):
        if not reference.lora:
            continue
        try:
            there = look_up(reference, options.lora_merge_cache)
            if there.rebuild_reason:
                check_adapter(reference)
            verdict.warnings += adapter_warnings(reference)
        except ObimError as error:
            verdict.errors.append(error.message)
            continue
        if not there.changed or (out_dir and options.overwrite):
            continue
        file = _saliency_file(config, reference, out_dir)
        if file and _was_measured_on(file, reference, there.folder):
            verdict.errors.append(
                f"{file.path} was measured on other weights than model {reference} has: "
                f"{there.rebuild_reason}; measure this model with `obim-saliency RECIPE OUT_DIR "
                "--overwrite`"
            )


def _saliency_file(
    config: MergeConfiguration, reference: ModelReference, out_dir: Path | None
) -> SaliencyFile | None:
    """Return an expert's saliency file, None if there is none or its setting varies by tensor."""
    try:
        if out_dir:
            return SaliencyFile(out_dir / saliency_file_name(str(reference)))
        own = [entry.parameters for entry in config.models or () if entry.model == reference]
        given = [(settings or {}).get("saliency") for settings in (*own, config.parameters)]
        setting = next(filter(None, given), None)
        return saliency_of(reference, setting) if isinstance(setting, str | None) else None
    except ObimError:
        return None  # it has yet to be made, or planning the merge reports what is wrong with it


def _was_measured_on(file: SaliencyFile, reference: ModelReference, folder: Path) -> bool:
    """Return whether a file was measured on the outdated merged adapter in this folder."""
    loader = ModelReference(model=ModelPath(path=str(folder))).lazy_loader(lazy_unpickle=False)
    try:
        check_measured_on(
            file, str(reference), loader.index.tensor_paths, partial(tensor_of, loader)
        )
    except ObimError:
        return False
    return bool(file.metadata.fingerprint)
