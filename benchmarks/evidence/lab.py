"""One seed's models, merges and scores: trained, merged and measured once, then kept.

Scores are held-out losses, answers that are right, and *recovery*: of what an expert gained
over the base on its own task, the share that the merge kept,
(base − merged) / (base − expert), in losses.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaForCausalLM

from benchmarks import corpus as corpus_module
from benchmarks import tiny_llama
from benchmarks.corpus import load_corpus
from benchmarks.demo import digest, make
from benchmarks.evidence import lines
from benchmarks.tiny_llama import (
    BOS,
    PAD,
    Size,
    Training,
    held_out_loss,
    load,
    save,
    side_by_side,
    stream,
)
from mergekit_obim.tuning import search

TRIO = ("prose", "math", "code")  # the paper's three: language, mathematics, code
TASKS = (*TRIO, *lines.GENERATORS)
# One run of continued pre-training on what forgets the rest, and its last checkpoints.
CONTINUED_ON = "code"
CONTINUED = "continued"
CHECKPOINTS = ("continued 1/2", "continued 3/4", "continued 1/1")
BASE = "base"


@dataclass(frozen=True)
class Scale:
    """How much is trained and looked at."""

    size: Size
    train_chars: int  # of text per task
    base: Training
    expert: Training
    continued: Training
    samples: int  # of calibration, for each expert
    windows: int  # of each task's held-out text
    questions: int
    tried: int | None = None  # of each method's settings; None for all


_SMALL = Scale(  # 2.7M parameters
    size=Size(hidden=192, layers=6, heads=6, intermediate=512),
    train_chars=600_000,
    base=Training(steps=700, learning_rate=2e-3, final_rate=1.0),
    expert=Training(steps=200, learning_rate=1e-4, seed=1),
    continued=Training(steps=160, learning_rate=1e-3, final_rate=1.0, seed=2),
    samples=100,  # the paper's
    windows=48,
    questions=200,
)
SCALES = {
    "small": _SMALL,
    "medium": replace(  # 10M parameters
        _SMALL,
        size=Size(hidden=320, layers=8, heads=5, intermediate=864),
        base=Training(steps=700, learning_rate=1.5e-3, final_rate=1.0),
    ),
    # Small enough to be trained until it hardly improves: gentle experts then change little.
    "settled": replace(  # 0.5M parameters
        _SMALL,
        size=Size(hidden=96, layers=4, heads=4, intermediate=256),
        base=Training(steps=2000, learning_rate=3e-3, final_rate=0.02),
    ),
    "large": Scale(  # 57M parameters, for a GPU
        size=Size(hidden=768, layers=8, heads=12, intermediate=2048),
        train_chars=2_000_000,
        base=Training(steps=3000, learning_rate=6e-4, batch_size=48, context=256, warmup=200,
                      final_rate=1.0),
        expert=Training(steps=400, learning_rate=3e-5, batch_size=32, context=256, seed=1),
        continued=Training(steps=400, learning_rate=3e-4, batch_size=32, context=256,
                           final_rate=1.0, seed=2),
        samples=100,
        windows=256,
        questions=500,
    ),
    "tiny": Scale(  # 1.1M parameters, minutes on one core: the demo's models
        size=Size(),
        train_chars=300_000,
        base=Training(steps=400, learning_rate=2e-3, final_rate=1.0),
        expert=Training(steps=120, learning_rate=1e-4, seed=1),
        continued=Training(steps=100, learning_rate=1e-3, final_rate=1.0, seed=2),
        samples=100,
        windows=48,
        questions=50,
    ),
    "smoke": Scale(
        size=Size(hidden=32, layers=2, heads=2, intermediate=64),
        train_chars=10_000,
        base=Training(steps=20, learning_rate=5e-3, warmup=2),
        expert=Training(steps=10, learning_rate=5e-4, warmup=2, seed=1),
        continued=Training(steps=8, learning_rate=5e-4, warmup=2, seed=2),
        samples=5,
        windows=4,
        questions=10,
        tried=2,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Merge:
    """A merge to score.

    Attributes:
        method: mergekit's name.
        shared: Its shared parameters.
        each: Parameters of every expert.
        by_expert: Parameters of single experts, on top.
        experts: What is merged, in the recipe's order: tasks, or checkpoints.
        calibration: What an expert is calibrated on, where not on its own task's text.
    """

    method: str
    shared: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)
    by_expert: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    experts: tuple[str, ...] = TRIO
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def needs_saliency(self) -> bool:
        """Whether the method reads saliency files under these settings."""
        unread = "criterion" in self.shared or self.shared.get("statistics") == "none"
        return self.method in SALIENCY_METHODS and not unread

    def settings(self) -> dict[str, Any]:
        """All parameters, for a table."""
        return {**self.shared, **self.each, **self.by_expert}


SALIENCY_METHODS = ("obim", "ties_obm", "regmean_diag", "regmean", "obm_sign")
Scores = dict[str, dict[str, float]]  # "loss" and "accuracy" -> task -> value


class Lab:
    """One seed's models, merges and scores, in a folder; all are made when asked for."""

    def __init__(self, scale: Scale, seed: int, folder: Path, device: str = "cpu"):
        self.scale, self.seed, self.folder = scale, seed, folder.resolve()
        self.device = device
        self.corpus = load_corpus(scale.train_chars)
        lines.add_lines(self.corpus, scale.train_chars)
        self.streams = {task: stream(self.corpus[task]["train"]) for task in TASKS}
        code = [Path(str(m.__file__)) for m in (corpus_module, lines, tiny_llama)]
        self.key = digest(*code, torch.__version__, device, self._settings(("size", "train_chars")))
        self.trained: set[str] = set()  # what was looked for already
        self.scores_path = self.folder / "scores.json"
        self.known: dict[str, Scores] = (
            json.loads(self.scores_path.read_text()) if self.scores_path.exists() else {}
        )

    # --- models -----------------------------------------------------------------------

    def models(self, *names: str) -> list[Path]:
        """The folders of the base, of tasks' experts or of checkpoints; trained if missing."""
        runs = {CONTINUED if name in CHECKPOINTS else name for name in names}
        fits = {BASE: self._train_base, CONTINUED: self._train_continued}

        def train(name: str) -> None:
            fit = fits.get(name, self._train_expert)
            make(self._place(name), self.model_key(name), lambda out: fit(out, name))
            self.trained.add(name)

        if BASE not in self.trained:
            train(BASE)
        side_by_side(train, sorted(runs - self.trained))
        return [self._place(name) for name in names]

    def _place(self, name: str) -> Path:
        return self.folder / "models" / name.replace("/", " of ").replace(" ", "-")

    def model_key(self, name: str) -> str:
        """What tells a trained model from one of other settings."""
        used = ("base",) if name == BASE else ("base", "expert")
        if name in (CONTINUED, *CHECKPOINTS):
            used = ("base", "continued")
        return digest(self.key, self.seed, self._settings(used))

    def _settings(self, names: Sequence[str]) -> list[Any]:
        every = asdict(self.scale)
        return [every[name] for name in names]

    def _train_base(self, out: Path, _: str) -> None:
        model = self.scale.size.build(self.seed).to(self.device)
        settings = Training(**{**asdict(self.scale.base), "seed": self.seed})
        # Nothing runs beside this one; the weights are the same to the bit with one thread.
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        tiny_llama.train(model, list(self.streams.values()), settings, BASE)
        torch.set_num_threads(threads)
        save(model, out)

    def _train_expert(self, out: Path, task: str) -> None:
        model = self._load(self._place(BASE))
        settings = Training(**{**asdict(self.scale.expert), "seed": 1000 + self.seed})
        tiny_llama.train(model, [self.streams[task]], settings, task)
        save(model, out)

    def _train_continued(self, out: Path, _: str) -> None:
        model = self._load(self._place(BASE))
        settings = Training(**{**asdict(self.scale.continued), "seed": 2000 + self.seed})
        wanted = {round(settings.steps * _share(name)): name for name in CHECKPOINTS}

        def keep(step: int) -> None:
            if step in wanted:
                save(model, self._place(wanted[step]))

        tiny_llama.train(model, [self.streams[CONTINUED_ON]], settings, CONTINUED, keep)
        out.mkdir()

    # --- merges -----------------------------------------------------------------------

    def score(self, merge: Merge, tasks: Sequence[str] = (), split: str = "test") -> Scores:
        """Scores of a merge by the real commands; on its experts' tasks unless others are named."""
        tasks = tuple(tasks or merge.experts)
        keys = [self.model_key(expert) for expert in merge.experts]
        measured = self._settings(("samples", "windows", "questions"))
        name = digest(keys, asdict(merge), measured, split, tasks)
        if name not in self.known:
            out = self.folder / "merged" / name
            self._merge(merge, out)
            self.known[name] = self.measure(self._load(out), tasks, split)
            shutil.rmtree(out)
            self._save()
        return self.known[name]

    def score_model(self, model: str, tasks: Sequence[str] = (), split: str = "test") -> Scores:
        """Scores of a trained model; of an expert on its own task unless others are named."""
        tasks = tuple(tasks or (model,))
        measured = self._settings(("windows", "questions"))
        name = digest(self.model_key(model), model, measured, split, tasks)
        if name not in self.known:
            self.known[name] = self.measure(self._load(*self.models(model)), tasks, split)
            self._save()
        return self.known[name]

    def recovery(self, merge: Merge, split: str = "test") -> dict[str, float]:
        """(base − merged) / (base − expert) per task, in held-out loss."""
        return self.recovered(self.score(merge, split=split), split)

    def recovered(self, scores: Scores, split: str) -> dict[str, float]:
        """The same, of a model's scores."""
        recovery = {}
        for task, loss in scores["loss"].items():
            base = self.score_model(BASE, (task,), split)["loss"][task]
            expert = self.score_model(task, split=split)["loss"][task]
            recovery[task] = (base - loss) / (base - expert)
        return recovery

    def measure(self, model: LlamaForCausalLM, tasks: Sequence[str], split: str) -> Scores:
        """Held-out loss in nats per byte, and the share of questions answered rightly."""
        scale, losses, right = self.scale, {}, {}
        for task in tasks:
            text = self.corpus[task][split]
            tokens = stream(text)
            losses[task] = held_out_loss(model, tokens, scale.windows, scale.expert.context)
            if task == "math":
                asked = lines.math_questions(text)[: scale.questions]
            elif task in lines.GENERATORS:
                endless = lines.questions(task, split)
                asked = [next(endless) for _ in range(scale.questions)]
            else:
                continue
            if split == "test":
                right[task] = accuracy(model, asked)
        return {"loss": losses, "accuracy": right}

    def _load(self, folder: Path) -> LlamaForCausalLM:
        return load(folder).to(self.device)

    def data(self, task: str) -> str:
        """The path of a task's training text, as calibration data."""
        path = self.folder / f"data/{task}.jsonl"
        if not path.exists():
            rows = (json.dumps({"text": text}) + "\n" for text in self.corpus[task]["train"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(rows))
        return str(path)

    def tuned(
        self, merge: Merge, tasks: Sequence[str], options: Sequence[object], **guard: Any
    ) -> Scores:
        """Scores of what `obim-tune` makes of a merge's recipe, on test text.

        Args:
            merge: The recipe.
            tasks: What the tuned merge is scored on.
            options: The command's.
            guard: The recipe's `guard`, if it is to have one.
        """
        keys = [self.model_key(expert) for expert in merge.experts]
        measured = self._settings(("samples", "windows", "questions"))
        # What is found depends on the search as well.
        how = (Path(search.__file__), list(map(str, options)), guard)
        name = digest("tuned", keys, asdict(merge), measured, tasks, *how)
        if name not in self.known:
            out = self.folder / "tuned" / name
            recipe = {**self.recipe(merge), **({"guard": guard} if guard else {})}
            path = _write(out.with_suffix(".yml"), recipe)
            tuned = path.with_suffix(".tuned.yml")
            command("obim-tune", path, "-o", tuned, "--overwrite", *options)
            command("mergekit-yaml", tuned, out, "--no-copy-tokenizer", "--no-write-model-card")
            self.known[name] = self.measure(self._load(out), tasks, "test")
            shutil.rmtree(out)
            self._save()
        return self.known[name]

    def _merge(self, merge: Merge, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        path = _write(out.with_suffix(".yml"), self.recipe(merge))
        # DARE and DELLA draw what they drop: the seed makes their merges the same again.
        options = ("--no-copy-tokenizer", "--no-write-model-card", "--random-seed", self.seed)
        command("mergekit-yaml", path, out, *options)
        path.unlink()

    def recipe(self, merge: Merge) -> dict[str, Any]:
        """The recipe of a merge; what it reads is trained and measured."""
        calibrations = [merge.calibration.get(expert) or self.data(expert)
                        for expert in merge.experts]  # fmt: skip
        models = [
            {
                "model": str(folder),
                "parameters": {**merge.each, **merge.by_expert.get(expert, {})},
                "calibration": calibration,
            }
            for expert, folder, calibration in zip(
                merge.experts, self.models(*merge.experts), calibrations, strict=True
            )
        ]
        recipe: dict[str, Any] = {
            "merge_method": merge.method,
            "base_model": str(*self.models(BASE)),
            "models": models,
            "parameters": dict(merge.shared),
            "calibration": {
                "samples": self.scale.samples, "max_length": self.scale.expert.context,
            },
            "dtype": "float32",
        }  # fmt: skip
        if merge.needs_saliency() and "saliency" not in merge.shared:
            for model, expert in zip(models, merge.experts, strict=True):
                if "saliency" in model["parameters"]:
                    continue
                files = self._saliency_folder(expert, model["calibration"])
                model["parameters"]["saliency"] = str(files)
                if not any(files.glob("*.safetensors")):  # an interrupted pre-pass leaves none
                    only = {**recipe, "models": [model]}
                    command("obim-saliency", _write(files.with_suffix(".yml"), only), files)
        return recipe

    def _saliency_folder(self, expert: str, calibration: Any) -> Path:
        """One folder for each way of calibrating an expert, shared by all merges."""
        way = (self.model_key(expert), expert, calibration, self.scale.samples)
        return self.folder / "saliency" / digest(*way)

    def saliency(self, task: str, **more: Any) -> Path:
        """The saliency file of a task's expert, by the pre-pass; with more calibration keys."""
        calibration: Any = {"data": self.data(task), **more} if more else self.data(task)
        folder = self._saliency_folder(task, calibration)
        if not any(folder.glob("*.safetensors")):
            own = {task: calibration} if more else {}
            self.score(Merge("regmean_diag", experts=(task,), calibration=own))
        return next(folder.glob("*.safetensors"))

    def _save(self) -> None:
        part = self.scores_path.with_suffix(".part")
        part.write_text(json.dumps(self.known))
        part.replace(self.scores_path)


def random_text(lab: Lab) -> str:
    """Write rows of random printable characters: every one is a token of its own."""
    path = lab.folder / "data/random.jsonl"
    generator = random.Random(lab.seed)
    printable = [chr(code) for code in range(32, 127)]
    rows = ("".join(generator.choices(printable, k=400)) for _ in range(200))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


def _share(checkpoint: str) -> float:
    over, under = checkpoint.split()[1].split("/")
    return int(over) / int(under)


def _write(path: Path, recipe: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(json.loads(json.dumps(recipe)), sort_keys=False))
    return path


def command(name: str, *arguments: object) -> None:
    """Run a command's own entry point in this process: starting one takes longer than merging."""
    from mergekit.io.tasks import LoaderCache
    from mergekit.scripts import run_yaml

    from mergekit_obim.commands import saliency, tune

    LoaderCache().loaders.clear()
    entry = {
        "obim-saliency": saliency.main,
        "obim-tune": tune.tune,
        "mergekit-yaml": run_yaml.main,
    }[name]
    entry.main([*map(str, arguments), "--quiet"], name, standalone_mode=False)


def accuracy(model: LlamaForCausalLM, questions: Sequence[tuple[str, str]]) -> float:
    """The share of questions that greedy decoding answers, to the byte and the line's end."""

    @torch.no_grad()
    def right(batch: Sequence[tuple[str, str]]) -> int:
        texts = [f"{prompt}{answer}\n".encode() for prompt, answer in batch]
        width = max(map(len, texts)) + 1
        ids = torch.tensor([[BOS, *text, *[PAD] * (width - 1 - len(text))] for text in texts])
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        count = 0
        for (prompt, _), text, row, guess in zip(
            batch, texts, ids, logits.argmax(-1).cpu(), strict=True
        ):
            first, last = len(prompt.encode()), len(text)
            # All right with the right answer before them is all right by greedy decoding.
            count += bool(torch.equal(guess[first:last], row[first + 1 : last + 1]))
        return count

    batches = [questions[start : start + 50] for start in range(0, len(questions), 50)]
    return sum(side_by_side(right, batches)) / len(questions)
