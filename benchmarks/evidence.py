"""What `make evidence` runs: the paper's tables in miniature, on models trained here.

    python -m benchmarks.evidence [--scale small] [--seed 0 …] [--table methods …]

For each seed a base learns six tasks a little, and one expert per task is gently
fine-tuned from it. Every merge goes through `obim-saliency` and `mergekit-yaml`. Each
trained model, saliency folder and score is kept under --cache and found there again, so
an interrupted run goes on; results are written to docs/evidence/<scale>.json.

Scores are held-out losses, answers that are right, and *recovery*: of what an expert gained
over the base on its own task, the share that the merge kept,
(base − merged) / (base − expert), in losses; the mean over the merged experts' tasks.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two seeds side by side use two cores better

import click
import torch
import transformers
import yaml
from transformers import LlamaForCausalLM

from benchmarks import corpus as corpus_module
from benchmarks import lines, tiny_llama
from benchmarks.corpus import Corpus, load_corpus
from benchmarks.demo import digest, load, make
from benchmarks.tiny_llama import BOS, PAD, Size, Training, held_out_loss, save, stream

TRIO = ("prose", "math", "code")  # the paper's three: language, mathematics, code
TASKS = (*TRIO, *lines.GENERATORS)
PAGE = Path(__file__).resolve().parent.parent / "docs" / "evidence"


@dataclass(frozen=True)
class Scale:
    """How much is trained and looked at."""

    size: Size
    train_chars: int
    base: Training
    expert: Training
    samples: int
    windows: int
    questions: int


SCALES = {
    "small": Scale(
        size=Size(hidden=192, layers=6, heads=6, intermediate=512),
        train_chars=300_000,
        base=Training(steps=500, learning_rate=2e-3, final_rate=1.0),
        expert=Training(steps=150, learning_rate=1e-4, seed=1),
        samples=100,  # the paper's
        windows=48,
        questions=200,
    ),
    "smoke": Scale(
        size=Size(hidden=32, layers=2, heads=2, intermediate=64),
        train_chars=10_000,
        base=Training(steps=20, learning_rate=5e-3, warmup=2),
        expert=Training(steps=10, learning_rate=5e-4, warmup=2, seed=1),
        samples=5,
        windows=4,
        questions=10,
    ),
}


@dataclass(frozen=True)
class Merge:
    """A merge to score.

    Attributes:
        method: mergekit's name.
        shared: Its shared parameters.
        each: Parameters of every expert.
        by_task: Parameters of single experts, on top.
        experts: The tasks whose experts are merged, in the recipe's order.
        calibration: What a task's expert is calibrated on, where not on its own text.
    """

    method: str
    shared: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)
    by_task: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    experts: tuple[str, ...] = TRIO
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def needs_saliency(self) -> bool:
        """Whether the method reads saliency files under these settings."""
        return self.method in SALIENCY_METHODS and self.shared.get("criterion") is None


SALIENCY_METHODS = ("obim", "ties_obm", "regmean_diag", "obm_sign")
Scores = dict[str, dict[str, float]]  # "loss" and "accuracy" -> task -> value


class Lab:
    """One seed's models, merges and scores, in a folder."""

    def __init__(self, scale: Scale, seed: int, folder: Path):
        self.scale, self.seed, self.folder = scale, seed, folder.resolve()
        self.corpus = _corpus(scale)
        self.scores_path = self.folder / "scores.json"
        self.known: dict[str, Scores] = (
            json.loads(self.scores_path.read_text()) if self.scores_path.exists() else {}
        )

    # --- models -----------------------------------------------------------------------

    def train(self) -> None:
        """Train the base and all experts, unless they are there."""
        scale, streams = self.scale, {t: stream(self.corpus[t]["train"]) for t in TASKS}
        code = [Path(str(m.__file__)) for m in (corpus_module, lines, tiny_llama)]
        shape = (asdict(scale.size), scale.train_chars)
        base_key = digest(*code, torch.__version__, *shape, asdict(scale.base), self.seed)

        def base(out: Path) -> None:
            model = scale.size.build(self.seed)
            settings = Training(**{**asdict(scale.base), "seed": self.seed})
            tiny_llama.train(model, list(streams.values()), settings, "base")
            save(model, out)

        make(self.folder / "models/base", base_key, base)
        self.key = digest(base_key, asdict(scale.expert))
        start = load(self.folder / "models/base")
        for task in TASKS:

            def expert(out: Path, task: str = task) -> None:
                model = copy.deepcopy(start)
                settings = Training(**{**asdict(scale.expert), "seed": 1000 + self.seed})
                tiny_llama.train(model, [streams[task]], settings, task)
                save(model, out)

            make(self.folder / "models" / task, self.key, expert)
        for task in TASKS:
            rows = (json.dumps({"text": text}) + "\n" for text in self.corpus[task]["train"])
            path = self.folder / f"data/{task}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(rows))

    # --- merges -----------------------------------------------------------------------

    def score(self, merge: Merge, split: str = "test") -> Scores:
        """Scores of a merge, from the real commands, or as they were found before."""
        name = digest(self.key, asdict(merge), split)
        if name not in self.known:
            out = self.folder / "merged" / name
            self._merge(merge, out)
            self.known[name] = self.measure(load(out), merge.experts, split)
            shutil.rmtree(out)
            self._save()
        return self.known[name]

    def score_model(self, model: str, split: str = "test") -> Scores:
        """Scores of the base or of a task's expert."""
        name = digest(self.key, model, split)
        if name not in self.known:
            tasks = TASKS if model == "base" else (model,)
            self.known[name] = self.measure(load(self.folder / "models" / model), tasks, split)
            self._save()
        return self.known[name]

    def recovery(self, merge: Merge, split: str = "test") -> dict[str, float]:
        """(base − merged) / (base − expert) per task, in held-out loss."""
        base, merged = self.score_model("base", split)["loss"], self.score(merge, split)["loss"]
        return {
            task: (base[task] - merged[task])
            / (base[task] - self.score_model(task, split)["loss"][task])
            for task in merge.experts
        }

    def measure(self, model: LlamaForCausalLM, tasks: Sequence[str], split: str) -> Scores:
        """Held-out loss in nats per byte, and the share of questions answered rightly."""
        scale, losses, right = self.scale, {}, {}
        for task in tasks:
            text = self.corpus[task][split]
            losses[task] = held_out_loss(
                model, stream(text), scale.windows, context=scale.expert.context
            )
            if task == "math":
                asked = lines.math_questions(text)[: scale.questions]
            elif task in lines.GENERATORS:
                endless = lines.questions(task, split)
                asked = [next(endless) for _ in range(scale.questions)]
            else:
                continue
            right[task] = accuracy(model, asked)
        return {"loss": losses, "accuracy": right}

    def _merge(self, merge: Merge, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        calibrations = {
            task: merge.calibration.get(task, f"{self.folder}/data/{task}.jsonl")
            for task in merge.experts
        }
        models = [
            {
                "model": f"{self.folder}/models/{task}",
                "parameters": {**merge.each, **merge.by_task.get(task, {})},
                "calibration": calibrations[task],
            }
            for task in merge.experts
        ]
        recipe: dict[str, Any] = {
            "merge_method": merge.method,
            "base_model": f"{self.folder}/models/base",
            "models": models,
            "parameters": dict(merge.shared),
            "calibration": {
                "samples": self.scale.samples, "max_length": self.scale.expert.context,
            },
            "dtype": "float32",
        }  # fmt: skip
        if merge.needs_saliency():
            # One folder for each way of calibrating an expert, shared by all merges.
            for model, task in zip(models, merge.experts, strict=True):
                files = self.folder / "saliency" / digest(self.key, task, calibrations[task])
                model["parameters"]["saliency"] = str(files)
                if not files.exists():
                    only = {**recipe, "models": [model]}
                    command("obim-saliency", _write(files.with_suffix(".yml"), only), files)
        path = _write(out.with_suffix(".yml"), recipe)
        command("mergekit-yaml", path, out, "--no-copy-tokenizer", "--no-write-model-card")

    def _save(self) -> None:
        part = self.scores_path.with_suffix(".part")
        part.write_text(json.dumps(self.known))
        part.replace(self.scores_path)


_CORPORA: dict[int, Corpus] = {}


def _corpus(scale: Scale) -> Corpus:
    if scale.train_chars not in _CORPORA:
        corpus = load_corpus(scale.train_chars)
        lines.add_lines(corpus, scale.train_chars)
        _CORPORA[scale.train_chars] = corpus
    return _CORPORA[scale.train_chars]


def _write(path: Path, recipe: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(json.loads(json.dumps(recipe)), sort_keys=False))
    return path


def command(name: str, *arguments: object) -> None:
    """Run a command's own entry point in this process: starting one takes longer than merging."""
    from mergekit.io.tasks import LoaderCache
    from mergekit.scripts import run_yaml

    from mergekit_obim import cli

    LoaderCache().loaders.clear()
    entry = {"obim-saliency": cli.main, "mergekit-yaml": run_yaml.main}[name]
    entry.main([*map(str, arguments), "--quiet"], name, standalone_mode=False)


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, questions: Sequence[tuple[str, str]]) -> float:
    """The share of questions that greedy decoding answers, to the byte and the line's end."""
    right = 0
    for start in range(0, len(questions), 50):
        batch = questions[start : start + 50]
        texts = [f"{prompt}{answer}\n".encode() for prompt, answer in batch]
        width = max(map(len, texts)) + 1
        rows = [[BOS, *text, *[PAD] * (width - 1 - len(text))] for text in texts]
        ids = torch.tensor(rows)
        guesses = model(input_ids=ids, use_cache=False).logits.argmax(-1)
        for (prompt, answer), row, guess in zip(batch, ids, guesses, strict=True):
            first, last = len(prompt.encode()), len(f"{prompt}{answer}\n".encode())
            # All right with the right answer before them is all right by greedy decoding.
            right += bool(torch.equal(guess[first:last], row[first + 1 : last + 1]))
    return right / len(questions)


# --- the tables -----------------------------------------------------------------------


def methods(experts: int = 3) -> dict[str, tuple[Merge, list[Merge]]]:
    """Of each method the default setting and those that validation text chooses from."""
    share = round(1 / experts, 4)

    def grid(method: str, default: dict, *others: dict, **shared: Any) -> tuple[Merge, list[Merge]]:
        merges = []
        for setting in (default, *others):
            common = {k: v for k, v in setting.items() if k in ("lambda", "k", "order")}
            each = {k: v for k, v in setting.items() if k not in common}
            merges.append(Merge(method, {**shared, **common}, each))
        return merges[0], merges

    def over(**values: Sequence[float]) -> list[dict[str, float]]:
        combined: list[dict[str, float]] = [{}]
        for name, options in values.items():
            combined = [{**one, name: option} for one in combined for option in options]
        return combined

    scales = (0.2, share, 0.5, 0.7, 1.0)
    densities = (0.05, 0.1, 0.2, share)
    return {
        "Task Arithmetic": grid("task_arithmetic", {"weight": share}, *over(weight=scales)),
        "TIES": grid(
            "ties",
            {"weight": 1.0, "density": 0.5},
            *over(density=(0.1, 0.2, 0.5), weight=(1.0,), **{"lambda": (0.3, 0.6, 1.0)}),
        ),
        "DARE": grid(
            "dare_linear",
            {"weight": share, "density": 0.5},
            *over(density=(0.1, 0.3, 0.5, 0.8), weight=(share, 0.5)),
        ),
        "DELLA": grid(
            "della_linear",
            {"weight": share, "density": 0.5},
            *over(density=(0.2, 0.5, 0.8), weight=(share, 0.5)),
        ),
        "TALL-Mask": grid("consensus_ta", {}, *over(**{"lambda": (0.2, 0.4, 0.6, 0.8, 1.0)})),
        "PCB": grid("pcb", {}, *over(density=(0.05, 0.1, 0.2), **{"lambda": (0.5, 1.0)})),
        "RegMean (diagonal)": grid("regmean_diag", {}),
        "Sign by saliency": grid("obm_sign", {}, *over(density=(0.1, 0.2, 0.5, 1.0))),
        "TIES + OBM": grid(
            "ties_obm", {}, *over(density=(0.1, 0.2, 0.5), **{"lambda": (0.5, 1.0)})
        ),
        "TIES + IM": grid("obim", {}, *over(density=densities), criterion="magnitude"),
        "OBIM": grid("obim", {}, *over(density=densities)),
        "OBIM, least error": grid("obim", {}, assignment="least_error"),
    }


def mean(values: Mapping[str, float]) -> float:
    """The mean over tasks."""
    return sum(values.values()) / len(values)


def table_methods(lab: Lab) -> dict[str, Any]:
    """The paper's tables 1 and 3: every method by default and at its best on validation text."""
    rows: dict[str, Any] = {}
    for name, (default, settings) in methods().items():
        best = max(settings, key=lambda merge: mean(lab.recovery(merge, "validation")))
        rows[name] = {
            kind: {
                "setting": {**merge.shared, **merge.each},
                "recovery": lab.recovery(merge),
                "accuracy": lab.score(merge)["accuracy"],
            }
            for kind, merge in (("default", default), ("best", best))
        }
    return rows


def table_models(lab: Lab) -> dict[str, Any]:
    """The base and the experts; the guard: an even average beats the base on every task."""
    base = lab.score_model("base")
    average = lab.score(methods()["Task Arithmetic"][0])["loss"]
    return {
        "base": base,
        "experts": {task: lab.score_model(task) for task in TASKS},
        "guard": all(average[task] < base["loss"][task] for task in TRIO),
    }


def table_density(lab: Lab) -> dict[str, Any]:
    """Mask capacity: recovery over density, by saliency, magnitude and chance."""
    return {
        criterion: {
            str(density): lab.recovery(
                Merge(
                    "obim",
                    {} if criterion == "saliency" else {"criterion": criterion},
                    {"density": density},
                )
            )
            for density in (0.02, 0.05, 0.1, 0.2, 0.3333)
        }
        for criterion in ("saliency", "magnitude", "random")
    }


def table_source(lab: Lab) -> dict[str, Any]:
    """The paper's table 4: what the math expert is calibrated on."""
    data = f"{lab.folder}/data"
    mixed = [{"data": f"{data}/{task}.jsonl", "samples": lab.scale.samples // 2 + 1}
             for task in ("math", "code")]  # fmt: skip
    sources = {"math": f"{data}/math.jsonl", "code": f"{data}/code.jsonl", "mixed": mixed}
    return {
        name: lab.recovery(
            Merge("obim", each={"density": 0.1}, calibration={"math": {"data": source}})
        )
        for name, source in sources.items()
    }


def table_samples(lab: Lab) -> dict[str, Any]:
    """The paper's table 5: how many samples."""
    return {
        str(samples): lab.recovery(
            Merge(
                "obim",
                each={"density": 0.1},
                calibration={
                    task: {"data": f"{lab.folder}/data/{task}.jsonl", "samples": samples}
                    for task in TRIO
                },
            )
        )
        for samples in (10, 50, 100, 200)
    }


def table_order(lab: Lab) -> dict[str, Any]:
    """The paper's table 6: rotation, and each expert first and last."""
    rows = {"rotation": lab.recovery(Merge("obim", each={"density": 0.3333}))}
    for task in TRIO:
        others = tuple(other for other in TRIO if other != task)
        for place, experts in (("first", (task, *others)), ("last", (*others, task))):
            merge = Merge("obim", {"order": "recipe"}, {"density": 0.3333}, experts=experts)
            rows[f"{task} {place}"] = lab.recovery(merge)
    return rows


def table_count(lab: Lab) -> dict[str, Any]:
    """The paper's table 11: two to six experts."""
    rows: dict[str, Any] = {}
    for count in range(2, len(TASKS) + 1):
        experts, share = TASKS[:count], round(1 / count, 4)
        rows[str(count)] = {
            "Task Arithmetic": lab.recovery(
                Merge("task_arithmetic", each={"weight": share}, experts=experts)
            ),
            "DARE": lab.recovery(
                Merge("dare_linear", each={"weight": share, "density": 0.5}, experts=experts)
            ),
            "OBIM": lab.recovery(Merge("obim", each={"density": 0.1}, experts=experts)),
            "OBIM, least error": lab.recovery(
                Merge("obim", {"assignment": "least_error"}, experts=experts)
            ),
        }
    return rows


TABLES = {
    "models": table_models,
    "methods": table_methods,
    "density": table_density,
    "source": table_source,
    "samples": table_samples,
    "order": table_order,
    "count": table_count,
}


@click.command()
@click.option("--scale", type=click.Choice(list(SCALES)), default="small", show_default=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True)
@click.option("--table", "names", type=click.Choice(list(TABLES)), multiple=True)
@click.option("--cache", type=click.Path(path_type=Path), default=".cache/evidence")
@click.option("--results", type=click.Path(path_type=Path), default=PAGE, show_default=True)
def main(
    scale: str, seeds: tuple[int, ...], names: tuple[str, ...], cache: Path, results: Path
) -> None:
    """Train, merge, score; all tables unless some are named."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = results / f"{scale}.json"
    for seed in seeds:
        start = time.perf_counter()
        lab = Lab(SCALES[scale], seed, cache / scale / f"seed{seed}")
        lab.train()
        for name in names or TABLES:
            table = TABLES[name](lab)
            # Read anew: other seeds may be running beside this one.
            kept = json.loads(path.read_text()) if path.exists() else {"seeds": {}}
            kept["seeds"].setdefault(str(seed), {})[name] = table
            kept["made"] = _made()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
            print(f"seed {seed}, {name}: {time.perf_counter() - start:.0f} s", flush=True)


def _made() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    sys.exit(main())
