"""Checking one recipe: its adapters, its models, the merge as it is planned, its calibration."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from mergekit.common import ModelPath, ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.calibration.ranks import Ranks
from mergekit_obim.calibration.run import prepare_expert
from mergekit_obim.checking.estimate import merge_cost, prepass_cost
from mergekit_obim.checking.verdict import Verdict
from mergekit_obim.dry_run import plan_and_collect
from mergekit_obim.errors import ObimError, SaliencyFileError, SaliencyNotFoundError
from mergekit_obim.methods.saliency import saliency_of
from mergekit_obim.models import inspection
from mergekit_obim.models.adapters import adapter_warnings, check_adapter, look_up
from mergekit_obim.models.checkpoint import tensor_of
from mergekit_obim.models.weight_comparison import compare_weights
from mergekit_obim.recipe.calibration import is_here
from mergekit_obim.recipe.experts import Expert
from mergekit_obim.recipe.faults import fold
from mergekit_obim.saliency.file import SaliencyFile, saliency_file_name
from mergekit_obim.saliency.locate import check_measured_on


@dataclass
class RecipeCheck:
    """The check of one recipe, step by step; each adds to the verdict what it finds.

    Attributes:
        config: The recipe.
        out_dir: The folder that the pre-pass will write to; None if the merge is next.
        options: The options of the pre-pass.
        verdict: What was found so far.
        opened: The models that are on this machine, once they were looked at.
    """

    config: MergeConfiguration
    out_dir: Path | None
    options: RunOptions
    verdict: Verdict
    opened: inspection.Opened = field(default_factory=inspection.Opened)

    def check_adapters(self) -> None:
        """Find adapters that do not fit their models, and saliency of adapters that changed."""
        if not self.options.lora_merge_cache:
            return  # opening the models reports it
        for reference in sorted(self.config.referenced_models(), key=str):
            if not reference.lora:
                continue
            try:
                there = look_up(reference, self.options.lora_merge_cache)
                if there.rebuild_reason:
                    check_adapter(reference)
                self.verdict.warnings += adapter_warnings(reference)
            except ObimError as error:
                self.verdict.errors.append(error.message)
                continue
            if not there.changed or (self.out_dir and self.options.overwrite):
                continue
            file = self._saliency_file(reference)
            if file and _was_measured_on(file, reference, there.folder):
                self.verdict.errors.append(
                    f"{file.path} was measured on other weights than model {reference} has: "
                    f"{there.rebuild_reason}; measure this model with `obim-saliency RECIPE "
                    "OUT_DIR --overwrite`"
                )

    def _saliency_file(self, reference: ModelReference) -> SaliencyFile | None:
        """Return an expert's saliency file; None without one, or if it varies by tensor."""
        try:
            if self.out_dir:
                return SaliencyFile(self.out_dir / saliency_file_name(str(reference)))
            own = [one.parameters for one in self.config.models or () if one.model == reference]
            given = [
                (settings or {}).get("saliency") for settings in (*own, self.config.parameters)
            ]
            setting = next(filter(None, given), None)
            return saliency_of(reference, setting) if isinstance(setting, str | None) else None
        except ObimError:
            return (
                None  # it has yet to be made, or planning the merge reports what is wrong with it
            )

    def check_models(self, stages: Collection[str]) -> None:
        """Open the models, and inspect them by themselves and beside the base.

        Args:
            stages: The models that other recipes of the same file will make.
        """
        config, verdict = self.config, self.verdict
        to_come = [m for m in config.referenced_models() if m.model.path in stages]
        for reference in sorted(to_come, key=str):
            verdict.warnings.append(
                f"model {reference}: another recipe of this file makes it: its weights were not "
                "looked at"
            )
        here = set(config.referenced_models()).difference(to_come)
        self.opened = inspection.open_models(here, self.options)
        for reference, reason in self.opened.absent.items():
            verdict.warnings.append(f"model {reference}: {reason}: its weights were not looked at")
            try:
                verdict.add(inspection.inspect_absent(reference, self.options))
            except ObimError as error:
                verdict.errors.append(error.message)
        verdict.add(self.opened.faults)
        base, aligned = config.base_model, inspection.is_aligned(config)
        models = self.opened.models
        verdict.add(inspection.inspect_models(models, base, self.options, aligned=aligned))
        readable = self.opened.readable
        if base is None or base not in readable:
            return
        start = readable.pop(base)
        alike = {
            str(reference): model.loader
            for reference, model in readable.items()
            if model.config.architectures == start.config.architectures
        }
        if alike:
            compared = compare_weights(str(base), start.loader, alike)
            verdict.errors += compared.errors()
            verdict.warnings += compared.warnings()
            verdict.distances = compared.sizes()
            verdict.cosines = compared.cosines()

    def check_plan(self) -> list[str]:
        """Plan the merge.

        Returns:
            The messages on missing saliency files, which are errors only if the merge is next.
        """
        verdict, out_dir = self.verdict, self.out_dir
        if len(self.opened.readable) < len(self.config.referenced_models()):
            if not verdict.errors:
                verdict.warnings.append("the merge itself was not planned: not every model is here")
            return []
        merging = MergeOptions(
            transformers_cache=self.options.transformers_cache,
            lora_merge_cache=self.options.lora_merge_cache,
            trust_remote_code=self.options.trust_remote_code,
        )
        _, found = plan_and_collect(self.config, merging)
        missing = []
        for fault in fold(found.tensors):
            if fault.kind == "plan" and verdict.errors:
                continue  # mergekit may only fail because of the errors that were found before
            if fault.error is SaliencyNotFoundError:
                missing.append(fault.message)
                if out_dir is None:
                    verdict.errors.append(fault.message)
            elif not (out_dir and self.options.overwrite and fault.error is SaliencyFileError):
                verdict.add([fault])
        setting = (self.config.parameters or {}).get("saliency")
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

    def check_calibration(self, experts: Collection[Expert], base: object) -> None:
        """Prepare the experts as the pre-pass does; ``base`` is the recipe's, as it is written."""
        with TemporaryDirectory() as nowhere:
            for expert in experts:
                sources = expert.calibration.sources
                elsewhere = [s.data for s in sources if not (s.is_self or is_here(s.data))]
                if elsewhere:
                    self.verdict.warnings.append(
                        f"model {expert.model}: data set {elsewhere[0]} was not looked at: the "
                        "pre-pass will read it"
                    )
                reference = ModelReference.model_validate(expert.reference)
                if elsewhere or reference not in self.opened.readable:
                    continue
                path, models = self.out_dir or Path(nowhere), self.opened.models
                try:
                    ready = prepare_expert(expert, base, models, path, self.options, Ranks())
                except ObimError as error:
                    self.verdict.errors.append(error.message)
                    continue
                warnings = list(ready.data.warnings)
                if ready.unwritten:
                    rows = sum(source.samples for source in sources if source.is_self)
                    first = f"have it write {rows:,} rows of its own first"
                    warnings.append(f"data: self: the pre-pass will {first}")
                self.verdict.warnings += [f"model {expert.model}: {line}" for line in warnings]

    def estimate(self, experts: Collection[Expert]) -> None:
        """Estimate what both commands will take; ``experts`` are those to be measured."""
        config, models = self.config, self.opened.readable
        model = models.get(config.base_model) if config.base_model else None
        model = model or next(iter(models.values()), None)
        if model is None:
            return
        shapes = {name: list(header.shape) for name, header in model.headers.items()}
        tensors = map(model.load, shapes)
        stored = next(tensor.dtype for tensor in tensors if tensor.is_floating_point())
        if experts:
            asked = {e.calibration.dtype for e in experts}
            self.verdict.cost["obim-saliency"] = prepass_cost(
                shapes,
                len(experts),
                (dtype_from_name(asked.pop()) if len(asked) == 1 else None) or stored,
                tied="lm_head.weight" not in shapes and "embed_out.weight" not in shapes,
                dense=self.options.dense,
            )
        try:
            merged = dtype_from_name(config.dtype) or stored
            written = dtype_from_name(config.out_dtype) or merged
        except RuntimeError:
            return  # the recipe has another error then
        count = len({*config.referenced_models()} - {config.base_model})
        self.verdict.cost["mergekit-yaml"] = merge_cost(shapes, count, merged, written)


def _was_measured_on(file: SaliencyFile, reference: ModelReference, folder: Path) -> bool:
    """Return whether a file was measured on the outdated merged adapter in this folder."""
    loader = ModelReference(model=ModelPath(path=str(folder))).lazy_loader(lazy_unpickle=False)
    stored, load = loader.index.tensor_paths, partial(tensor_of, loader)
    try:
        check_measured_on(file, str(reference), stored, load)
    except ObimError:
        return False
    return bool(file.metadata.fingerprint)
