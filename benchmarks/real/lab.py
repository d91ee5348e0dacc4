"""One seed's experts, merges and scores on one base: made once by the real commands, then kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

import mergekit_obim
from benchmarks.demo import digest, make
from benchmarks.evidence.lab import command
from benchmarks.real import rivals, tail
from benchmarks.real.tail import Encoded, Parts, Score, State, Training
from benchmarks.real.text import Rows

BASE = "base"
Scores = dict[str, list[Score]]  # task -> one for each row


@dataclass(frozen=True)
class Run:
    """How an expert came to be.

    Attributes:
        task: What it is trained on.
        training: One of the scale's.
        of: The model it starts from.
    """

    task: str
    training: str
    of: str = BASE


@dataclass(frozen=True)
class Scale:
    """How much is trained and looked at."""

    layers: int  # that are trained, the last ones
    counts: Mapping[str, int]  # rows of each split of each task
    trainings: Mapping[str, Training]
    bfloat16: bool  # matrices are multiplied so in training and scoring
    samples: int  # training rows that an expert is calibrated on
    max_length: int = 128  # tokens of them
    tried: int | None = None  # of each method's settings; None for all


SCALES = {
    "smollm2": Scale(
        layers=8,
        counts={"train": 384, "validation": 16, "test": 40},
        trainings={"light": Training(24, 1.5e-4), "hard": Training(64, 1e-3)},
        bfloat16=True,
        samples=50,
    ),
    "smoke": Scale(
        layers=2,
        counts={"train": 64, "validation": 4, "test": 8},
        trainings={
            "light": Training(8, 3e-3, batch_size=8),
            "hard": Training(16, 1e-2, batch_size=8),
        },
        bfloat16=False,
        samples=8,
        tried=2,
    ),
}


@dataclass(frozen=True)
class Merge:
    """A merge to score.

    Attributes:
        method: mergekit's name, or one of `rivals.METHODS`.
        experts: What is merged, in the recipe's order.
        shared: Shared parameters; a rival's settings.
        each: Parameters of every expert.
        mixed: Experts are calibrated on rows of all tasks instead of their own.
        statistics: What the method reads: ``""`` nothing, ``measured`` or ``fisher``.
    """

    method: str
    experts: tuple[str, ...] = ()
    shared: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)
    mixed: bool = False
    statistics: str = ""

    def settings(self) -> dict[str, Any]:
        """All parameters, for a table."""
        return {**self.shared, **self.each}


class Lab:
    """One seed's models, merges and scores, in a folder; all are made when asked for."""

    def __init__(self, base: Path, rows: Rows, scale: Scale, seed: int, folder: Path):
        self.base, self.rows, self.scale, self.seed = base.resolve(), rows, scale, seed
        self.folder = folder.resolve()
        self.tasks = tuple(rows)
        self.runs = runs(self.tasks)
        self.key = digest(
            base / "config.json",
            scale.layers,
            scale.bfloat16,
            Path(str(tail.__file__)),
            torch.__version__,
        )
        package = Path(str(mergekit_obim.__file__)).parent
        ours = [
            *sorted((package / "kernels").rglob("*.py")),
            *sorted((package / "methods").glob("*.py")),
        ]
        self._ours = digest(*ours)
        self._rivals = digest(Path(str(rivals.__file__)))
        self._found: set[str] = set()
        self._states: dict[tuple[str, str], list[torch.Tensor]] = {}
        self.scores_path = self.folder / "scores.json"
        self.known: dict[str, dict[str, list[list[float]]]] = (
            json.loads(self.scores_path.read_text()) if self.scores_path.exists() else {}
        )

    def _rows_key(self, task: str, split: str) -> str:
        return digest(self.key, task, self.rows[task][split])

    @cached_property
    def parts(self) -> Parts:
        """The base, cut in two."""
        return Parts(self.base, self.scale.layers, self.scale.bfloat16)

    def encoded(self, task: str, split: str) -> list[Encoded]:
        """A split's rows as tokens."""
        return [self.parts.encode(row) for row in self.rows[task][split]]

    def states(self, task: str, split: str) -> list[torch.Tensor]:
        """What the trunk makes of a split's rows; shared by all seeds."""
        if (task, split) not in self._states:
            name = f"{task}-{split}-{self._rows_key(task, split)}.safetensors"
            path = self.folder.parent / "trunk" / name
            if not path.exists():
                print(f"the trunk's output for {task}, {split}", flush=True)
                states = self.parts.through_trunk(self.encoded(task, split))
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(".part")
                save_file({str(i): state for i, state in enumerate(states)}, part)
                part.replace(path)
            kept = load_file(path)
            self._states[task, split] = [kept[str(i)] for i in range(len(kept))]
        return self._states[task, split]

    # --- models -----------------------------------------------------------------------

    def model(self, name: str) -> Path:
        """The folder of the base, an expert or one of its run's checkpoints; trained if missing."""
        if name == BASE:
            return self.base
        run_name = name.partition(" at ")[0]
        out = self._place(run_name)
        if run_name not in self._found:
            self._found.add(run_name)
            make(out, self.model_key(run_name), lambda folder: self._train(run_name, folder))
        return self._place(name)

    def _place(self, name: str) -> Path:
        return self.folder / "models" / name.replace("/", "-").replace(" at ", "-at-")

    def model_key(self, name: str) -> str:
        """What tells a trained model from one of other settings."""
        if name == BASE:
            return self.key
        run = self.runs[name.partition(" at ")[0]]
        training = asdict(self.scale.trainings[run.training])
        rows = self._rows_key(run.task, "train")
        return digest(self.model_key(run.of), name, asdict(run), training, rows, self.seed)

    def _train(self, name: str, out: Path) -> None:
        run = self.runs[name]
        training = self.scale.trainings[run.training]
        self.parts.set(load_file(self.model(run.of) / "model.safetensors"))
        wanted = {training.steps * part // 4: f"{name} at {part}/4" for part in (2, 3)}

        def keep(step: int) -> None:
            if step in wanted and name == f"hard/{self.tasks[0]}":
                self.parts.save(self._place(wanted[step]), self.base)

        rows, states = self.encoded(run.task, "train"), self.states(run.task, "train")
        self.parts.train(rows, states, training, self.seed, name, keep)
        self.parts.save(out, self.base)

    # --- merges -----------------------------------------------------------------------

    def score(self, merge: Merge, split: str, tasks: Sequence[str] = ()) -> Scores:
        """Scores of a merge; by the real commands where mergekit or this package has the method."""
        code = ""
        if merge.method in rivals.METHODS:
            code = self._rivals
        elif merge.statistics or merge.method in OURS:
            code = self._ours
        models = [self.model_key(expert) for expert in merge.experts]
        name = digest(models, asdict(merge), self.scale.samples, code)
        return self._scores(name, split, tasks, lambda: self._merged(merge, name))

    def score_model(self, model: str, split: str, tasks: Sequence[str] = ()) -> Scores:
        """Scores of the base or an expert."""
        name = self.model_key(model)
        return self._scores(name, split, tasks, lambda: load_file(self._weights(model)))

    def _weights(self, model: str) -> Path:
        return self.model(model) / "model.safetensors"

    def _scores(self, name: str, split: str, tasks: Sequence[str], weights: Any) -> Scores:
        wanted = {
            task: f"{name} {task} {self._rows_key(task, split)}" for task in tasks or self.tasks
        }
        if missing := [task for task, key in wanted.items() if key not in self.known]:
            self.parts.set(weights())
            for task in missing:
                found = self.parts.scores(self.encoded(task, split), self.states(task, split))
                self.known[wanted[task]] = [[s.nats, s.tokens, s.right] for s in found]
            self._save()
        return {
            task: [Score(nats, int(tokens), bool(right)) for nats, tokens, right in self.known[key]]
            for task, key in wanted.items()
        }

    def _merged(self, merge: Merge, name: str) -> State:
        if merge.method in rivals.METHODS:
            states = [load_file(self._weights(expert)) for expert in merge.experts]
            rows = [self._calibration_rows(expert, merge.mixed) for expert in merge.experts]
            return rivals.METHODS[merge.method](self.parts, states, rows, **merge.shared)
        out = self.folder / "merged" / name
        kept = self.folder / "merged" / "last"
        # Validation and test of one merge follow each other: the last one is kept for that.
        if not (kept.exists() and (kept / "name").exists() and (kept / "name").read_text() == name):
            shutil.rmtree(kept, ignore_errors=True)
            self._merge(merge, out)
            out.rename(kept)
            (kept / "name").write_text(name)
        return load_file(kept / "model.safetensors")

    def _merge(self, merge: Merge, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        models: list[dict[str, Any]] = [
            {"model": str(self.model(expert)), "parameters": dict(merge.each)}
            for expert in merge.experts
        ]
        recipe = {
            "merge_method": merge.method, "base_model": str(self.base), "models": models,
            "parameters": dict(merge.shared), "dtype": "float32",
        }  # fmt: skip
        if merge.method in BASELESS:
            del recipe["base_model"]
        if merge.statistics:
            for model, expert in zip(models, merge.experts, strict=True):
                files = self.statistics(expert, merge.statistics, merge.mixed)
                model["parameters"]["saliency"] = str(files)
        path = _write(out.with_suffix(".yml"), recipe)
        # DARE and DELLA draw what they drop: the seed makes their merges the same again.
        options = ("--no-copy-tokenizer", "--no-write-model-card", "--random-seed", self.seed)
        command("mergekit-yaml", path, out, *options)
        path.unlink()

    # --- statistics -------------------------------------------------------------------

    def task_of(self, expert: str) -> str:
        return self.runs[expert.partition(" at ")[0]].task

    def _calibration_rows(self, expert: str, mixed: bool) -> list[Encoded]:
        """The rows that an expert is calibrated on, by our command and by the rivals."""
        tasks = self.tasks if mixed else (self.task_of(expert),)
        share = self.scale.samples // len(tasks)
        return [row for task in tasks for row in self.encoded(task, "train")[:share]]

    def _data(self, expert: str, mixed: bool) -> Path:
        tasks = self.tasks if mixed else (self.task_of(expert),)
        share = self.scale.samples // len(tasks)
        path = self.folder / "data" / f"{'-'.join(tasks)}-{share}.jsonl"
        rows = [
            {"text": "".join(row)} for task in tasks for row in self.rows[task]["train"][:share]
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def statistics(self, expert: str, kind: str, mixed: bool) -> Path:
        """The folder with an expert's saliency file, by the pre-pass or by `rivals.fisher`."""
        data = self._data(expert, mixed)
        code = self._rivals if kind == "fisher" else ""
        key = digest(self.model_key(expert), data, self.scale.samples, kind, code)
        folder = self.folder / "saliency" / key
        if any(folder.glob("*.safetensors")):  # an interrupted pre-pass leaves none
            return folder
        model = self.model(expert)
        if kind == "fisher":
            rows = self._calibration_rows(expert, mixed)
            self.parts.set(load_file(model / "model.safetensors"))
            rivals.fisher(self.parts, rows, model, folder)
            return folder
        recipe = {
            "merge_method": "regmean_diag",
            "base_model": str(self.base),
            "models": [{"model": str(model), "calibration": str(data)}],
            "calibration": {"samples": self.scale.samples, "max_length": self.scale.max_length},
            "dtype": "float32",
        }
        path = _write(folder.with_suffix(".yml"), recipe)
        command("obim-saliency", path, folder, "--sketch", SKETCH)
        path.unlink()
        return folder

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.scores_path.with_suffix(".part")
        part.write_text(json.dumps(self.known))
        part.replace(self.scores_path)


OURS = ("obim", "ties_obm", "obm_sign", "regmean_diag", "regmean", "consensus_ta", "pcb")
BASELESS = ("linear", "karcher")
SKETCH = 16


def runs(tasks: Sequence[str]) -> dict[str, Run]:
    """Every expert that a regime may ask for."""
    first, second, *_ = tasks
    every = {f"{way}/{task}": Run(task, way) for way in ("light", "hard") for task in tasks}
    return {**every, f"child/{second}": Run(second, "light", of=f"light/{first}")}


def _write(path: Path, recipe: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(json.loads(json.dumps(recipe)), sort_keys=False))
    return path
