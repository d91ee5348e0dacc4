"""Which candidate is tried next, and what was tried.

optuna's tree-structured Parzen estimator suggests values (Bergstra et al. 2011, Algorithms for
hyper-parameter optimization). Its state is nothing but the finished trials and a seed, so that a
killed run goes on as if nothing had been, and the same command finds the same recipe.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from tqdm import tqdm

from mergekit_obim.errors import RecipeError, told_as
from mergekit_obim.tuning.candidates import Candidate, Defaults, Entry
from mergekit_obim.tuning.scoring import Score

# Random values come first, so that the estimator has something to estimate from.
_RANDOM_TRIALS = 10

Evaluate = Callable[[Candidate], dict[str, Score]]
"""Merges a candidate and scores it: a score for each teacher, by its label."""


@dataclass(frozen=True)
class Objective:
    """What a candidate is ranked by; less is better.

    Attributes:
        kind: ``kl``, the divergence from the teachers, or ``loss``, that of the rows' own tokens,
            by which it exceeds the teacher's own.
        worst_case: Whether the worst teacher counts, and not their mean.
        losses: Each teacher's own loss; None where there is none.
    """

    kind: Literal["kl", "loss"]
    worst_case: bool
    losses: Mapping[str, float | None]

    def of(self, scores: Mapping[str, Score]) -> float:
        """Return a candidate's value, in nats per token; inf where a prediction is not finite."""
        values = [self._value(label, score) for label, score in scores.items()]
        value = max(values) if self.worst_case else sum(values) / len(values)
        # Python's max of NaN and a number depends on their order.
        return value if all(map(math.isfinite, values)) else math.inf

    def _value(self, label: str, score: Score) -> float:
        own = self.losses[label]
        if self.kind == "kl":
            return score.divergence
        if own is None or score.loss is None:
            raise RecipeError(
                f"model {label}: predicts no next tokens, so it has no loss; leave --objective out"
            )
        return score.loss - own


@dataclass(frozen=True)
class Tried:
    """A candidate that was merged and scored.

    Attributes:
        candidate: The candidate.
        scores: Its score with each teacher, by the teacher's label.
        value: What it is ranked by.
    """

    candidate: Candidate
    scores: Mapping[str, Score]
    value: float

    @property
    def told(self) -> str:
        """The candidate in a line: its name and its parameters."""
        settings = self.candidate.settings()
        return self.candidate.label + (f": {settings}" if settings else "")

    def part(self, label: str, kind: str) -> float:
        """Return the divergence from a teacher, or the loss on its rows."""
        score = self.scores[label]
        return score.divergence if kind == "kl" or score.loss is None else score.loss


class Search:
    """The trials of one search, in a file that a killed run goes on from.

    Args:
        path: The file, in the format of optuna's journal. It may hold other searches too.
        decisive: What the scores depend on, JSON-able: with anything else another search begins.
        first: The candidates that are tried first.
        entries: The space to search, after the defaults of each entry.
        experts: The recipe's experts.
        seed: Of the values that are suggested.

    Raises:
        RecipeError: The file cannot be read or written.
    """

    def __init__(
        self,
        path: Path,
        decisive: Mapping[str, Any],
        first: Sequence[Candidate],
        entries: Sequence[Entry],
        experts: Sequence[str],
        seed: int,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        name = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
        what = f"{path}: holds no trials that could be gone on from; remove it to start over"
        with told_as(RecipeError, what):
            path.parent.mkdir(parents=True, exist_ok=True)
            storage = JournalStorage(JournalFileBackend(str(path)))
            self.others = len(set(optuna.get_all_study_names(storage)) - {name})
            self._study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        self._entries = {entry.label: entry for entry in entries}
        self._experts, self._seed = list(experts), seed
        defaults = [entry.candidate(Defaults(), experts) for entry in entries]
        self.first = [*first, *defaults]

    @property
    def tried(self) -> list[Tried]:
        """The candidates that were scored so far, in that order."""
        return [_tried(trial) for trial in self._finished]

    @property
    def _finished(self) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def run(self, trials: int, evaluate: Evaluate, objective: Objective, *, quiet: bool) -> None:
        """Try candidates until there are as many.

        Args:
            trials: How many, those of a run before included.
            evaluate: Merges and scores a candidate.
            objective: What ranks them.
            quiet: Show no progress.
        """
        done = len(self._finished)
        with tqdm(
            total=trials, initial=done, desc="Tuning", unit="merge", disable=quiet
        ) as progress:
            for number in range(done, trials):
                candidate, asked = self._next(number)
                known = {_key(one.candidate): one.scores for one in self.tried}
                scores = known.get(_key(candidate)) or evaluate(candidate)
                self._keep(candidate, scores, objective.of(scores), asked)
                progress.set_postfix_str(f"best {min(one.value for one in self.tried):.4g}")
                progress.update()

    def _next(self, number: int) -> tuple[Candidate, optuna.trial.Trial | None]:
        """Return the candidate to try after so many, and the trial that suggested it."""
        if number < len(self.first):
            return self.first[number], None
        # An estimator of its own for each trial, so that one that goes on is the one before.
        sampler = optuna.samplers.TPESampler(
            seed=_seed(self._seed, number), n_startup_trials=len(self.first) + _RANDOM_TRIALS
        )
        asking = optuna.create_study(sampler=sampler)
        asking.add_trials(self._finished)
        trial = asking.ask()
        label = trial.suggest_categorical("entry", list(self._entries))
        return self._entries[label].candidate(cast(Any, trial), self._experts), trial

    def _keep(
        self,
        candidate: Candidate,
        scores: Mapping[str, Score],
        value: float,
        asked: optuna.trial.Trial | None,
    ) -> None:
        attributes = {
            "candidate": asdict(candidate),
            "scores": {label: asdict(score) for label, score in scores.items()},
        }
        self._study.add_trial(
            optuna.create_trial(
                value=value,
                params=asked.params if asked else {},
                distributions=asked.distributions if asked else {},
                user_attrs=attributes,
            )
        )


def best_first(tried: Sequence[Tried]) -> list[Tried]:
    """Return candidates in the order of their values; of equal ones the earlier comes first.

    What was suggested twice is there once.
    """
    different: dict[str, Tried] = {}
    for one in tried:
        different.setdefault(_key(one.candidate), one)
    return sorted(different.values(), key=lambda one: one.value)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Give a folder for large temporary files, and remove what killed runs have left in it."""
    shutil.rmtree(path, ignore_errors=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _tried(trial: optuna.trial.FrozenTrial) -> Tried:
    scores = {label: Score(**one) for label, one in trial.user_attrs["scores"].items()}
    value = trial.value
    assert value is not None  # of finished ones
    return Tried(Candidate(**trial.user_attrs["candidate"]), scores, value)


def _key(candidate: Candidate) -> str:
    return json.dumps([candidate.method, candidate.shared, candidate.own], sort_keys=True)


def _seed(seed: int, number: int) -> int:
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def say(line: str, *, quiet: bool) -> None:
    """Print a line about the run's progress, above a progress bar if there is one."""
    if not quiet:
        tqdm.write(line, file=sys.stderr)
