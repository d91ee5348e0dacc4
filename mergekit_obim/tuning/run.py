"""``obim-tune`` from the recipe to the tuned recipe, and what ``obim-eval`` begins with as well."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_obim import __version__
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.dry_run import plan, read_config, read_recipe
from mergekit_obim.errors import ObimError, RecipeError, SaliencyFileError, told_as
from mergekit_obim.methods.planning import registry
from mergekit_obim.methods.saliency import saliency_of
from mergekit_obim.models.inspection import inspect_models, is_aligned, open_models
from mergekit_obim.models.locking import locked
from mergekit_obim.models.opened import OpenModel
from mergekit_obim.recipe import Document, Method
from mergekit_obim.recipe.document import parse
from mergekit_obim.recipe.experts import find_experts
from mergekit_obim.recipe.faults import raise_errors
from mergekit_obim.recipe.keys import base_of
from mergekit_obim.saliency.file import SaliencyFile
from mergekit_obim.tuning.candidates import (
    AS_WRITTEN,
    AVERAGE,
    BASE,
    DEFAULT_SPACE,
    Candidate,
    Defaults,
    Entry,
    first_candidates,
    read_space,
)
from mergekit_obim.tuning.held_back import (
    GUARD,
    LIKELIEST,
    Rows,
    ask_teachers,
    measured_on_others,
    score_all,
    set_aside,
)
from mergekit_obim.tuning.merged import merge_options, merging
from mergekit_obim.tuning.scoring import Score
from mergekit_obim.tuning.search import Objective, Search, Tried, best_first, say, scratch_folder

LOG = logging.getLogger("mergekit_obim")


@dataclass(frozen=True)
class Session:
    """A recipe with its models opened and its rows read.

    Attributes:
        config: The recipe, as mergekit reads it.
        base: Its base.
        models: The base and the experts, opened.
        rows: The rows that were set aside, for the experts and the guard.
    """

    config: MergeConfiguration
    base: ModelReference
    models: Mapping[ModelReference, OpenModel]
    rows: list[Rows]

    @property
    def experts(self) -> list[str]:
        """The experts, by the references that the recipe has."""
        return [rows.label for rows in self.rows if rows.label != GUARD]


def open_session(
    document: Document,
    overrides: Mapping[str, Any],
    rows: int,
    scratch: Path,
    options: RunOptions,
) -> Session:
    """Check a recipe, open its models, and set rows aside.

    Args:
        document: The recipe.
        overrides: Command-line options that replace settings of every calibration; None is not
            given.
        rows: How many rows to set aside for each expert.
        scratch: A folder for weights that are offloaded to the disk.
        options: How models are read, and where they run.

    Raises:
        ObimError: The recipe, a model or the data cannot be used; the message names all faults
            that could be found.
    """
    config, faults = read_recipe(document)
    experts = find_experts(document, overrides)
    raise_errors([*faults, *experts.faults, *experts.uncalibrated.values()])
    assert config is not None
    written = base_of(document)
    if written is None:
        raise RecipeError(
            "the recipe has no top-level base_model, which merges are compared with: add it"
        )
    base = ModelReference.model_validate(written)
    references = [ModelReference.model_validate(one.reference) for one in experts.measured]
    opened = open_models([base, *references], options, fetch=True)
    found = [*opened.faults]
    found += inspect_models(opened.models, base, options, aligned=is_aligned(config))
    raise_errors(found)
    for fault in found:
        LOG.warning(str(fault))
    read = set_aside(experts.measured, experts.guard, base, opened.models, rows, scratch, options)
    for one in read:
        for warning in one.data.warnings:
            LOG.warning("model %s: %s", one.label, warning)
    return Session(config, base, opened.models, read)


@dataclass(frozen=True)
class Settings:
    """What ``obim-tune`` is asked for, beside the recipe.

    Attributes:
        kind: What is measured: ``kl`` or ``loss``.
        worst_case: Whether the worst teacher counts, and not their mean.
        trials: How many candidates are tried; those that always are come first.
        rows: How many rows are set aside for each expert.
        space: The file that says what is tried.
        weights: Whether every expert gets a weight of its own.
        seed: Of the search.
        overrides: Settings of every calibration that are replaced; None is not given.
    """

    kind: Literal["kl", "loss"] = "kl"
    worst_case: bool = False
    trials: int = 32
    rows: int = 32
    space: Path = DEFAULT_SPACE
    weights: bool = False
    seed: int = 0
    overrides: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Attributes:
        text: The tuned recipe, with comments that say what was measured.
        tried: The candidates, the best first.
        labels: The teachers.
    """

    text: str
    tried: list[Tried]
    labels: list[str]


def tune(text: str, output: Path, settings: Settings, options: RunOptions) -> Tuned:
    """Find the best way to merge a recipe's experts, by rows that were set aside.

    The trials are kept beside the output, and so is what is too large for memory, for the time of
    the run. Killed at any moment, the same call goes on.

    Args:
        text: The recipe, as YAML.
        output: Where the tuned recipe is going to be written; it is not written here.
        settings: What to measure and to try.
        options: Where and how models run.

    Raises:
        ObimError: The recipe, a model, the data or the space cannot be used.
    """
    document = parse(text)[0]
    # Called every second, and told once.
    waiting = cache(lambda: say(f"{output}: waits for another command that tunes it", quiet=False))
    trials_file = output.with_name(f"{output.name}.trials")
    with (
        locked(output, waiting),
        scratch_folder(output.with_name(f".{output.name}.scratch")) as scratch,
    ):
        overrides = settings.overrides or {}
        session = open_session(document, overrides, settings.rows, scratch, options)
        if is_aligned(session.config):
            raise RecipeError(
                "the recipe has mergekit align the models' vocabularies (tokenizer, "
                "tokenizer_source): the merged model would number tokens otherwise than its "
                "experts, so they cannot be compared yet; tune without that key, if the "
                "tokenizers are the same"
            )
        methods = registry()  # which reading the recipe has filled
        labels = [rows.label for rows in session.rows]
        planned = plan(session.config, merge_options(options), inspected=True)
        _warn_of_other_rows(session, planned, options)
        entries = _plannable(text, session, settings, methods, options)
        always = first_candidates(len(session.experts))
        search = Search(
            trials_file,
            _decisive(document, session, planned, entries, settings),
            always,
            entries,
            session.experts,
            settings.seed,
        )
        done = len(search.tried)
        trials = max(settings.trials, len(always))
        if done:
            say(f"Goes on after {done} merges of a run before ({trials_file})", quiet=options.quiet)
        elif search.others:
            line = f"Starts over: what {trials_file} has was measured on other models or settings"
            say(line, quiet=options.quiet)
        if done < trials:
            teachers = ask_teachers(session.rows, session.models, scratch, options)
            objective = Objective(
                settings.kind, settings.worst_case, {one.label: one.loss for one in teachers}
            )
            base = session.models[session.base]
            dtype = overrides.get("dtype")
            with merging(base, session.config, dtype, scratch, options) as merge:

                def evaluate(candidate: Candidate) -> dict[str, Score]:
                    recipe = _recipe_of(candidate, text, methods)
                    what = f"{candidate.label} ({candidate.settings()}): cannot be merged"
                    # mergekit's own methods raise many kinds.
                    with told_as(RecipeError, what), merge(recipe) as model:
                        scores = score_all(model, candidate.label, session.rows, teachers)
                    return dict(zip(labels, scores, strict=True))

                with _no_warnings():
                    search.run(trials, evaluate, objective, quiet=options.quiet)
        tried = best_first(search.tried)
        recipe = tried[0].candidate.recipe(text, methods)
    head = "\n".join(f"# {line}".rstrip() for line in _summary(tried, labels, settings))
    return Tuned(f"{head}\n{recipe}", tried, labels)


def _recipe_of(
    candidate: Candidate, text: str, methods: Mapping[str, Method]
) -> MergeConfiguration:
    """Return what mergekit-yaml would read of a candidate's recipe."""
    return read_config(parse(candidate.recipe(text, methods))[0].content)


def _plannable(
    text: str,
    session: Session,
    settings: Settings,
    methods: Mapping[str, Method],
    options: RunOptions,
) -> list[Entry]:
    """Plan every entry of the space, and return those that can be merged.

    Raises:
        ObimError: An entry of the user's own space cannot be merged.
    """
    merging = merge_options(options)
    entries: list[Entry] = []
    left_out: dict[str, list[str]] = {}
    for entry in read_space(settings.space, methods, weights=settings.weights):
        candidate = entry.candidate(Defaults(), session.experts)
        try:
            with _no_warnings():
                planned = plan(_recipe_of(candidate, text, methods), merging, inspected=True)
            if entry.method == "regmean":
                _check_sketches(planned, session.base)
        except ObimError as error:
            # Of several faults the first, which comes after a line with their number.
            why = error.message.splitlines()[:2][-1].strip()
            if settings.space != DEFAULT_SPACE:
                raise RecipeError(f"{settings.space}: {entry.label}: {why}") from error
            left_out.setdefault(why, []).append(entry.label)
        else:
            entries.append(entry)
    for why, labels in left_out.items():
        LOG.warning("left out of the search: %s: %s", ", ".join(labels), why)
    return entries


def _check_sketches(planned: Sequence[tuple[Any, Any]], base: ModelReference) -> None:
    """Refuse to try full RegMean where it would be the diagonal one, for lack of sketches.

    Raises:
        SaliencyFileError: None of the files that it is to read has any.
    """
    files = [file for _, file in _saliency_files(planned, base)]
    if files and not any(file.metadata.gram for file in files):
        raise SaliencyFileError(
            f"{files[0].path} has no sketch of any layer's Gram matrix: measure with --sketch 16"
        )


def _saliency_files(
    planned: Sequence[tuple[Any, Any]], base: ModelReference
) -> Iterator[tuple[ModelReference, SaliencyFile]]:
    """Yield each expert's saliency file, as far as a planned merge reads them."""
    seen = set()
    for _, task in planned:
        if dict(task.parameters.items()).get("statistics") == "none":
            continue
        for model, given in task.input_parameters.items():
            parameters = dict(given.items())
            if model == base or parameters.get("criterion") != "saliency" or model in seen:
                continue
            seen.add(model)
            yield model, saliency_of(model, parameters["saliency"])


def _warn_of_other_rows(
    session: Session, planned: Sequence[tuple[Any, Any]], options: RunOptions
) -> None:
    by_reference = {rows.reference: rows for rows in session.rows if rows.label != GUARD}
    for model, file in _saliency_files(planned, session.base):
        rows = by_reference.get(model)
        if rows and measured_on_others(rows, session.base, file, session.models[model], options):
            LOG.warning(
                "model %s: %s was not measured on the rows that the recipe says now: the rows set "
                "aside may be among those that were measured",
                model,
                file.path,
            )


def _decisive(
    document: Document,
    session: Session,
    planned: Sequence[tuple[Any, Any]],
    entries: Sequence[Entry],
    settings: Settings,
) -> dict[str, Any]:
    """Return all that the scores of a search depend on, JSON-able."""
    stats = {str(m): f.path.stat() for m, f in _saliency_files(planned, session.base)}
    return {
        "recipe": json.loads(json.dumps(document.content, default=str)),
        "models": {str(ref): model.digest() for ref, model in session.models.items()},
        "saliency": {model: [stat.st_size, stat.st_mtime_ns] for model, stat in stats.items()},
        "rows": {rows.label: rows.data.content_hash for rows in session.rows},
        "space": [
            [e.label, e.method, {n: str(v) for n, v in e.parameters.items()}] for e in entries
        ],
        "objective": [settings.kind, settings.worst_case],
        "seed": settings.seed,
        "overrides": {k: v for k, v in (settings.overrides or {}).items() if k != "batch_size"},
        "likeliest": LIKELIEST,
        "versions": [__version__, torch.__version__, transformers.__version__],
    }


def _summary(tried: Sequence[Tried], labels: Sequence[str], settings: Settings) -> Iterator[str]:
    """Yield what the tuned recipe says of itself, as lines."""
    best = tried[0]
    yield (
        f"Tuned by obim-tune, mergekit-obim {__version__}: the best of {len(tried)} merges on "
        "rows that were"
    )
    yield f"set aside, by {described(settings)}."
    wanted = dict.fromkeys([best.candidate.label, AVERAGE, AS_WRITTEN, BASE])
    for label in wanted:
        one = next(one for one in tried if one.candidate.label == label)
        yield f"  {one.value:<8.4g} {one.told if one is best else label}"
    shown = ", ".join(f"{label} {best.part(label, settings.kind):.4g}" for label in labels)
    yield f"The best by teacher: {shown}."
    yield ""


def described(settings: Settings) -> str:
    """Return what candidates are ranked by, in words."""
    what = "divergence (KL) from the experts" if settings.kind == "kl" else "excess loss"
    over = "of the worst expert" if settings.worst_case else "mean over the experts"
    return f"the {what}, {over}, in nats per token"


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep what the recipe's own plan has warned of from being repeated by every candidate's."""

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    LOG.addFilter(is_error)
    try:
        yield
    finally:
        LOG.removeFilter(is_error)
