"""Merged models that are on disk, made by anything, on the rows that were set aside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference

from mergekit_obim.calibration.loading import loaded
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.errors import CheckpointError
from mergekit_obim.models.loaded import check_loaded
from mergekit_obim.models.opened import OpenModel, open_model
from mergekit_obim.models.tokens import read_vocabulary
from mergekit_obim.tuning.held_back import GUARD, Rows, ask_teachers, score_all
from mergekit_obim.tuning.run import Session
from mergekit_obim.tuning.scoring import Score, Teacher

BASE = "the base"


@dataclass(frozen=True)
class Result:
    """How a model does on one teacher's rows.

    Attributes:
        loss: The cross-entropy of the rows' own next tokens, nats per token; None where the model
            predicts none.
        divergence: KL(teacher ‖ model), nats per token.
        recovery: The share of the expert's gain over the base that the model has:
            (base's loss − its loss) / (base's loss − expert's loss). None where the expert gains
            nothing on its rows, and on the guard's, whose teacher is the base.
    """

    loss: float | None
    divergence: float
    recovery: float | None


@dataclass(frozen=True)
class RowsUsed:
    """What a teacher's rows are: how many, their tokens, and where they are from."""

    rows: int
    tokens: int
    sources: list[str]


@dataclass
class Evaluation:
    """Models on every teacher's rows.

    Attributes:
        rows: Teacher -> its rows.
        teachers: Teacher -> its own result, which has no divergence and recovers all.
        models: Model -> teacher -> result; the base comes first.
        tasks: Model -> task -> metric -> value, of lm-evaluation-harness.
    """

    rows: dict[str, RowsUsed]
    teachers: dict[str, Result]
    models: dict[str, dict[str, Result]] = field(default_factory=dict)
    tasks: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)


def evaluate(
    references: Sequence[str], session: Session, scratch: Path, options: RunOptions
) -> Evaluation:
    """Load one model after another, and run it on all rows.

    Args:
        references: The models, as mergekit writes them; their tokens must be numbered as those of
            the experts are.
        session: The recipe, its models and rows.
        scratch: A folder for weights that are offloaded to the disk.
        options: Where and how models run.

    Raises:
        ObimError: A model cannot be read, loaded or run, or numbers tokens otherwise.
    """
    opened = {name: open_model(ModelReference.parse(name), options) for name in references}
    for name, model in opened.items():
        for rows in session.rows:
            _check_numbering(name, model, rows, session, options)
    teachers = ask_teachers(session.rows, session.models, scratch, options)
    scores = {
        name: _scores(name, model, session.rows, teachers, scratch, options)
        for name, model in {BASE: session.models[session.base], **opened}.items()
    }
    base = dict(zip((rows.label for rows in session.rows), scores[BASE], strict=True))
    found = Evaluation(
        {
            rows.label: RowsUsed(
                len(rows.data.sequences), rows.data.tokens, [s["data"] for s in rows.data.sources]
            )
            for rows in session.rows
        },
        {one.label: _result(Score(0.0, one.loss), one, base[one.label].loss) for one in teachers},
    )
    for name, own in scores.items():
        found.models[name] = {
            teacher.label: _result(score, teacher, base[teacher.label].loss)
            for teacher, score in zip(teachers, own, strict=True)
        }
    return found


def _scores(
    name: str,
    model: OpenModel,
    rows: Sequence[Rows],
    teachers: Sequence[Teacher],
    scratch: Path,
    options: RunOptions,
) -> list[Score]:
    dtype = rows[0].expert.calibration.dtype
    with loaded(name, model, dtype, options, scratch / "offload") as running:
        check_loaded(running, model, model.fingerprints())
        return score_all(running, name, rows, teachers, quiet=options.quiet)


def _result(score: Score, teacher: Teacher, base_loss: float | None) -> Result:
    recovery = None
    if teacher.label != GUARD and None not in (score.loss, teacher.loss, base_loss):
        assert score.loss is not None
        assert teacher.loss is not None
        assert base_loss is not None
        gain = base_loss - teacher.loss
        recovery = (base_loss - score.loss) / gain if gain > 0 else None
    return Result(score.loss, score.divergence, recovery)


def _check_numbering(
    name: str, model: OpenModel, rows: Rows, session: Session, options: RunOptions
) -> None:
    """Refuse a model whose tokenizer gives other numbers to the rows' tokens than the expert's.

    Raises:
        CheckpointError: It does, so that the model would read another text.
    """
    places = (session.models[rows.reference], session.models[session.base])
    found = (read_vocabulary(p.folder, trust_remote_code=options.trust_remote_code) for p in places)
    theirs = next((vocabulary for vocabulary in found if vocabulary is not None), None)
    own = read_vocabulary(model.folder, trust_remote_code=options.trust_remote_code)
    if theirs is None or own is None:
        return  # without a tokenizer it goes by the base's
    used = set().union(*(row.ids for row in rows.data.sequences))
    for token, number in theirs.items():
        if number in used and own.get(token) != number:
            there = f"number {own[token]}" if token in own else "unknown"
            raise CheckpointError(
                f"model {name}: token {token!r} is number {number} in {rows.label}, and {there} "
                "here, so both cannot be given the same rows; evaluate a model with the tokenizer "
                "of the experts"
            )


def tables(found: Evaluation) -> Iterator[str]:
    """Yield an evaluation as the lines of a table for each teacher, and of their means."""
    width = max(len("its own expert"), *map(len, found.models))
    head = f"{'':{width}}  {'loss':>8}  {'divergence':>10}  {'recovery':>8}"
    for label, used in found.rows.items():
        yield f"{label}: {used.rows} rows of {', '.join(used.sources)}, {used.tokens:,} tokens"
        yield head
        own = {} if label == GUARD else {"its own expert": found.teachers[label]}
        for name, result in {**own, **{m: r[label] for m, r in found.models.items()}}.items():
            yield (
                f"{name:{width}}  {_cell(result.loss):>8}  {_cell(result.divergence):>10}  "
                f"{_cell(result.recovery):>8}"
            )
        yield ""
    experts = [label for label in found.rows if label != GUARD]
    if len(experts) > 1:
        yield "mean over the experts"
        yield f"{'':{width}}  {'':>8}  {'divergence':>10}  {'recovery':>8}"
        for name, results in found.models.items():
            divergence = _mean([results[label].divergence for label in experts])
            recovery = _mean([results[label].recovery for label in experts])
            yield f"{name:{width}}  {'':>8}  {_cell(divergence):>10}  {_cell(recovery):>8}"
        yield ""
    if found.tasks:
        yield "lm-evaluation-harness"
        for name, tasks in found.tasks.items():
            for task, metrics in tasks.items():
                told = ", ".join(f"{metric} {_cell(value)}" for metric, value in metrics.items())
                yield f"{name:{width}}  {task}: {told}"
        yield ""


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
