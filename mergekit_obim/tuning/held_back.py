"""The rows that are set aside for each expert, and who their teacher is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit.common import ModelReference
from transformers import PreTrainedModel

from mergekit_obim.calibration.data import TokenizedCalibration
from mergekit_obim.calibration.loading import loaded
from mergekit_obim.calibration.opening import read_calibration
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.models.loaded import check_loaded
from mergekit_obim.models.opened import OpenModel
from mergekit_obim.recipe.calibration import Calibration
from mergekit_obim.recipe.experts import Expert
from mergekit_obim.saliency.file import SaliencyFile
from mergekit_obim.tuning.scoring import Score, Teacher, score, teach

GUARD = "guard"
# Of a distribution over a vocabulary; docs/tuning.md has what the rest amounts to.
LIKELIEST = 256


@dataclass(frozen=True)
class Rows:
    """Rows that were set aside, and the model that says what is right on them.

    Attributes:
        expert: The teacher with its calibration; the base goes by the name of ``guard``.
        data: The rows.
    """

    expert: Expert
    data: TokenizedCalibration

    @property
    def label(self) -> str:
        """The name for messages and tables: the expert's as the recipe has it, or ``guard``."""
        return self.expert.model

    @property
    def reference(self) -> ModelReference:
        """The teacher."""
        return ModelReference.model_validate(self.expert.reference)


def set_aside(
    experts: Sequence[Expert],
    guard: Calibration | None,
    base: ModelReference,
    models: Mapping[ModelReference, OpenModel],
    rows: int,
    options: RunOptions,
) -> list[Rows]:
    """Read rows for every expert that are not among those that its saliency is measured on.

    Args:
        experts: The recipe's experts, with their calibration.
        guard: What to read for the base; None for nothing.
        base: The recipe's base.
        models: The experts and the base, opened.
        rows: How many for each expert; for the base too, where ``guard`` says no ``samples``.
        options: How models are read.

    Raises:
        CalibrationError: Some rows cannot be read or used.
    """
    found = []
    for expert in experts:
        reference = ModelReference.model_validate(expert.reference)
        config = models[reference].config
        data = read_calibration(expert, [reference, base], config, options, further=rows)
        found.append(Rows(expert, data))
    if guard is not None:
        share = math.ceil(rows / len(guard.sources))
        sources = tuple(
            source
            if "samples" in source.model_fields_set
            else source.model_copy(update={"samples": share})
            for source in guard.sources
        )
        # No saliency is measured on them, so none have to be left out.
        calibration = guard.model_copy(update={"sources": sources})
        teacher = Expert(GUARD, calibration, base.model_dump())
        found.append(Rows(teacher, read_calibration(teacher, [base], models[base].config, options)))
    return found


def measured_on_others(
    rows: Rows, base: ModelReference, file: SaliencyFile, model: OpenModel, options: RunOptions
) -> bool:
    """Return whether an expert's saliency was measured on other rows than the recipe says.

    Then nobody can say whether the rows that were set aside are among them.
    """
    recorded = file.metadata.calibration.get("content_hash")
    places = [rows.reference, base]
    data = read_calibration(rows.expert, places, model.config, options)
    return bool(recorded) and recorded != data.content_hash


def ask_teachers(
    every: Sequence[Rows],
    models: Mapping[ModelReference, OpenModel],
    scratch: Path,
    options: RunOptions,
    likeliest: int = LIKELIEST,
) -> list[Teacher]:
    """Load every teacher, one at a time, and run it on its rows.

    Args:
        every: The rows.
        models: The teachers, opened.
        scratch: A folder for weights that are offloaded to the disk.
        options: Where and how models run.
        likeliest: How many tokens to keep of each distribution.

    Raises:
        ObimError: A model cannot be loaded or run.
    """
    teachers = []
    for rows in every:
        calibration = rows.expert.calibration
        opened = models[rows.reference]
        with loaded(rows.label, opened, calibration.dtype, options, scratch / "offload") as model:
            check_loaded(model, opened, opened.fingerprints())
            teachers.append(
                teach(
                    model,
                    rows.data.sequences,
                    label=rows.label,
                    batch_size=calibration.batch_size,
                    likeliest=likeliest,
                    quiet=options.quiet,
                )
            )
    return teachers


def score_all(
    model: PreTrainedModel,
    label: str,
    every: Sequence[Rows],
    teachers: Sequence[Teacher],
    *,
    quiet: bool = True,
) -> list[Score]:
    """Score a model with every teacher, in their order.

    Raises:
        ObimError: It cannot be run.
    """
    return [
        score(
            model,
            teacher,
            label=label,
            batch_size=rows.expert.calibration.batch_size,
            quiet=quiet,
        )
        for rows, teacher in zip(every, teachers, strict=True)
    ]
