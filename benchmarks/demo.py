"""The whole job on real text: train a base and three experts, calibrate, merge, compare.

    python -m benchmarks.demo --out .cache/demo

Everything is made on this machine and nothing is downloaded: a tiny byte-level Llama
learns this Python's own docstrings, source code and arithmetic; three copies of it are
gently fine-tuned, one on each. Then the commands that a user would type calibrate and
merge them. What was made before, from the same settings and code, is kept.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as `python benchmarks/demo.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # for this process, before torch is loaded, and for the commands
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is to be downloaded
    # Operations of models so small gain little from a second thread, and lose tenfold to its
    # waiting where the cores are shared; whole models are trained side by side instead.
    os.environ["OMP_NUM_THREADS"] = "1"

import torch
import transformers
import yaml
from transformers import LlamaForCausalLM

import mergekit_obim
from benchmarks import corpus as corpus_module
from benchmarks import tiny_llama
from benchmarks.corpus import TASKS, Corpus, load_corpus
from benchmarks.tiny_llama import Size, Training, held_out_loss, load, save, side_by_side, stream

Losses = dict[str, list[float]]  # model -> its loss on each task


@dataclass(frozen=True)
class Settings:
    """What is trained, merged and measured."""

    size: Size
    train_chars: int  # of text per task
    base: Training
    expert: Training
    density: float  # of each expert in the OBIM merge
    calibration_samples: int
    windows: int  # of each task's test text


# Gentle fine-tuning of a base that was still learning, hence the base's constant rate. From a
# settled base, or after harder fine-tuning, every method's merge of models as small as these
# easily loses to the base on some task (seen with 2e-4 and a base whose rate had fallen).
DEMO = Settings(
    size=Size(),
    train_chars=300_000,
    base=Training(steps=400, learning_rate=2e-3, final_rate=1.0),
    expert=Training(steps=120, learning_rate=1e-4, seed=1),
    density=0.2,
    calibration_samples=100,  # the paper's
    windows=64,
)
SMOKE = Settings(  # seconds, for the tests: too poor to judge a merge by
    size=Size(hidden=32, layers=2, heads=2, intermediate=64),
    train_chars=20_000,
    base=Training(steps=20, learning_rate=5e-3, warmup=2),
    expert=Training(steps=10, learning_rate=5e-4, warmup=2, seed=1),
    density=0.1,
    calibration_samples=10,
    windows=8,
)


def run(settings: Settings, folder: Path) -> Losses:
    """Everything, step by step, in a folder; returns what the table shows."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    print("Text from this machine: Python's docstrings (prose), its sources (code), arithmetic")
    corpus = load_corpus(settings.train_chars)
    for task in TASKS:
        rows = (json.dumps({"text": document}) + "\n" for document in corpus[task]["train"])
        (folder / f"data/{task}.jsonl").write_text("".join(rows))
    for name, recipe in recipes(settings).items():
        (folder / name).write_text(yaml.safe_dump(recipe, sort_keys=False))
    models = train_models(settings, corpus, folder)
    merge_models(models, folder)
    return measure(settings, corpus, folder)


def train_models(settings: Settings, corpus: Corpus, folder: Path) -> str:
    """Train the base, then the experts from it, into ``folder/models``; returns their key."""
    streams = {task: stream(corpus[task]["train"]) for task in TASKS}
    code = [Path(str(module.__file__)) for module in (corpus_module, tiny_llama)]
    key = digest(
        *code, torch.__version__, sys.version,
        asdict(settings.size), settings.train_chars, asdict(settings.base),
    )  # fmt: skip

    def build_base(out: Path) -> None:
        model = settings.size.build(settings.base.seed)
        tiny_llama.train(model, list(streams.values()), settings.base, "train base ")
        save(model, out)

    make(folder / "models/base", key, build_base)
    key = digest(key, asdict(settings.expert))
    base = load(folder / "models/base")

    def make_expert(task: str) -> None:
        def build(out: Path) -> None:
            model = copy.deepcopy(base)
            tiny_llama.train(model, [streams[task]], settings.expert, f"train {task:5}")
            save(model, out)

        make(folder / "models" / task, key, build)

    side_by_side(make_expert, TASKS)
    return key


def recipes(settings: Settings) -> dict[str, dict[str, Any]]:
    """The recipes, by file name: ours, and what a user would otherwise pick."""

    def recipe(method: str, experts: Sequence[dict[str, Any]], **rest: Any) -> dict[str, Any]:
        models = [
            {"model": f"./models/{task}", **expert}
            for task, expert in zip(TASKS, experts, strict=True)
        ]
        head = {"merge_method": method, "base_model": "./models/base", "models": models}
        return {**head, **rest, "dtype": "float32"}

    calibrated = [
        {"parameters": {"density": settings.density}, "calibration": f"data/{task}.jsonl"}
        for task in TASKS
    ]
    calibration = {"samples": settings.calibration_samples, "max_length": settings.expert.context}
    weight = round(1 / len(TASKS), 4)
    return {
        "recipe.yml": recipe(
            "obim", calibrated, parameters={"saliency": "./saliency"}, calibration=calibration
        ),
        "task_arithmetic.yml": recipe(
            "task_arithmetic", [{"parameters": {"weight": weight}}] * len(TASKS)
        ),
        "ties.yml": recipe("ties", [{"parameters": {"weight": 1.0, "density": 0.5}}] * len(TASKS)),
    }


def merge_models(models: str, folder: Path) -> None:
    """Run the commands, as a user would who works in the folder."""
    package = sorted(Path(str(mergekit_obim.__file__)).parent.rglob("*.py"))
    for command in (
        "obim-saliency recipe.yml saliency",
        "mergekit-yaml recipe.yml merged-obim",
        "mergekit-yaml task_arithmetic.yml merged-task-arithmetic",
        "mergekit-yaml ties.yml merged-ties",
    ):
        print(f"\n$ {command}", flush=True)
        _, recipe, out = shlex.split(command)
        key = digest(models, folder / recipe, *package)
        make(folder / out, key, lambda _, command=command: run_command(command, folder))  # type: ignore[misc]


def run_command(command: str, folder: Path) -> None:
    """Run a command of this virtual environment in a folder."""
    program, *arguments = shlex.split(command)
    path = Path(sys.executable).with_name(program)
    code = subprocess.run([str(path), *arguments], cwd=folder, check=False).returncode
    if code:
        raise SystemExit(f"{program} failed with exit code {code}")


def make(out: Path, key: str, build: Callable[[Path], None]) -> None:
    """Call ``build(out)``, unless ``out`` is there already and was made with this key."""
    stamp = out.with_name(f"{out.name}.key")
    if out.exists() and stamp.is_file() and stamp.read_text() == key:
        print(f"kept from before: {out}")
        return
    stamp.unlink(missing_ok=True)  # written last, so that an interrupted step is done again
    shutil.rmtree(out, ignore_errors=True)
    build(out)
    stamp.write_text(key)


def digest(*parts: Any) -> str:
    """A hash of anything that JSON can write; a path stands for its file's contents."""
    contents = [part.read_text("utf-8") if isinstance(part, Path) else part for part in parts]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def measure(settings: Settings, corpus: Corpus, folder: Path) -> Losses:
    """The loss of every model and merge on each task's test text."""
    streams = [stream(corpus[task]["test"]) for task in TASKS]
    folders = {
        "base": "models/base",
        **{f"{task} expert": f"models/{task}" for task in TASKS},
        "Task Arithmetic": "merged-task-arithmetic",
        "TIES": "merged-ties",
        "OBIM": "merged-obim",
    }

    def losses(model: LlamaForCausalLM) -> list[float]:
        context = settings.expert.context
        return [held_out_loss(model, tokens, settings.windows, context) for tokens in streams]

    return {name: losses(load(folder / path)) for name, path in folders.items()}


def table(losses: Losses) -> str:
    """The losses, aligned; a star marks what is better than the base."""
    lines = [" " * 16 + "".join(f"{column:>8} " for column in (*TASKS, "mean"))]
    base = [*losses["base"], mean(losses["base"])]
    for name, row in losses.items():
        cells = zip([*row, mean(row)], base, strict=True)
        lines.append(f"{name:16}" + "".join(f"{x:8.3f}{'*' if x < b else ' '}" for x, b in cells))
    return "\n".join(line.rstrip() for line in lines)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def worse_than_base(losses: Losses) -> list[str]:
    """The tasks on which the OBIM merge is no better than the base."""
    rows = zip(TASKS, losses["OBIM"], losses["base"], strict=True)
    return [task for task, merged, base in rows if merged >= base]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(".cache/demo"), help="where files go")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()

    start = time.perf_counter()
    losses = run(DEMO, arguments.out)
    print("\nLoss on held-out text, in nats per byte (less is better; * better than the base)\n")
    print(table(losses))
    print(f"\n{time.perf_counter() - start:.0f} s; models, recipes and merges: {arguments.out}")
    if worse := worse_than_base(losses):
        raise SystemExit(f"The OBIM merge is no better than the base on: {', '.join(worse)}")
    print(
        "What to see: each expert is best at its own task; the OBIM merge is one model that beats\n"
        "the base on all of them, and each of its weights is the base's or one expert's own."
    )


if __name__ == "__main__":
    main()
