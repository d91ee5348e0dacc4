"""The rows that are set aside for each expert, and who their teacher is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit.common import ModelReference
from transformers import PreTrainedModel

from mergekit_obim.calibration.data import TokenizedCalibration
from mergekit_obim.calibration.loading import does_not_fit, loaded
from mergekit_obim.calibration.memory import out_of_memory
from mergekit_obim.calibration.opening import CalibrationReader, open_calibration
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.calibration.writing import cannot_write, write_rows
from mergekit_obim.models.loaded import check_loaded
from mergekit_obim.models.opened import OpenModel
from mergekit_obim.recipe.calibration import Calibration
from mergekit_obim.recipe.experts import Expert
from mergekit_obim.saliency.file import SaliencyFile
from mergekit_obim.tuning.scoring import Score, Teacher, score, teach

GUARD = "guard"
# Of a distribution over a vocabulary; docs/tuning.md has what the rest amounts to.
LIKELIEST = 256
# Added to the seed of what an expert writes: rows of different seeds have nothing in common.
_OTHER_ROWS = 1 << 32


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
    scratch: Path,
    options: RunOptions,
) -> list[Rows]:
    """Read rows for every expert that are not among those that its saliency is measured on.

    An expert that writes its own rows is loaded, and writes further ones.

    Args:
        experts: The recipe's experts, with their calibration.
        guard: What to read for the base; None for nothing.
        base: The recipe's base.
        models: The experts and the base, opened.
        rows: How many for each expert; for the base too, where ``guard`` says no ``samples``.
        scratch: A folder for weights that are offloaded to the disk.
        options: How models are read, and where they run.

    Raises:
        CalibrationError: Some rows cannot be read or used.
    """
    found = []
    for expert in experts:
        reference = ModelReference.model_validate(expert.reference)
        reader = open_calibration(expert, [reference, base], models[reference], options)
        own = _written(reader, models[reference], rows, scratch, options)
        found.append(Rows(expert, reader.read(own, further=rows)))
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
        reader = open_calibration(teacher, [base], models[base], options)
        own = _written(reader, models[base], rows, scratch, options)
        found.append(Rows(teacher, reader.read(own)))
    return found


def _written(
    reader: CalibrationReader, model: OpenModel, rows: int, scratch: Path, options: RunOptions
) -> list[list[int]]:
    """Have an expert write rows that are not those that it wrote to be measured on."""
    if reader.writing is None:
        return []
    expert = reader.expert
    sources = expert.calibration.sources
    share = rows * reader.writing.samples / sum(source.samples for source in sources)
    writing = replace(
        reader.writing, samples=math.ceil(share), seed=reader.writing.seed + _OTHER_ROWS
    )
    with loaded(
        expert.model, model, expert.calibration.dtype, options, scratch / "offload"
    ) as running:
        try:
            written = write_rows(running, writing, label=expert.model, quiet=options.quiet)
        except Exception as error:
            if out_of_memory(error):
                raise does_not_fit(expert.model, options, "what it keeps does") from error
            raise cannot_write(expert.model, error) from error
    return [row.ids for row in written]


def measured_on_others(
    rows: Rows, base: ModelReference, file: SaliencyFile, model: OpenModel, options: RunOptions
) -> bool:
    """Return whether an expert's saliency was measured on other rows than the recipe says.

    Then nobody can say whether the rows that were set aside are among them.
    """
    recorded = file.metadata.calibration.get("content_hash")
    reader = open_calibration(rows.expert, [rows.reference, base], model, options)
    if not recorded or reader.writing:  # rows that an expert writes anew are other rows
        return False
    return bool(recorded != reader.read().content_hash)


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
