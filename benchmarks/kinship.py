"""Kinship, measured and used: what docs/kinship.md shows.

    python -m benchmarks.kinship [--out .cache/demo]
    python -m benchmarks.kinship --time [--cache .cache/bench-report] [--runs 5]

The first trains the models of benchmarks/demo.py, unless they are there, and then does what a user
of `obim-kinship --plan` does: merges each generation by mergekit-yaml, scores every model (minus
the mean held-out loss over the three tasks, in the three decimals that `make demo` gives losses
in), and goes on until the plan ends.

The second times how long comparing three experts of 0.1B parameters takes, after a warm-up, once
models and libraries are loaded: as the command does it, on one thread, and as it would on as many
threads as torch takes by default. Prints medians and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

if __name__ == "__main__":  # as in benchmarks.demo
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "--time" not in sys.argv:
        os.environ["OMP_NUM_THREADS"] = "1"

import torch
import transformers
import yaml
from mergekit.options import MergeOptions

from benchmarks.bench import machine, write_models
from benchmarks.corpus import TASKS, load_corpus
from benchmarks.demo import DEMO, Settings, mean, train_models
from benchmarks.report import SIZE
from benchmarks.tiny_llama import held_out_loss, load, stream
from mergekit_obim.kinship import measures

# The paper's scores are accuracies, which come in steps. A loss has no steps: each merge of two
# alike models beats the last by a little less, and the k best change for as long as digits do.
DECIMALS = 3


def run(settings: Settings, folder: Path) -> list[str]:
    """Train, measure kinship, and evolve; returns the last command's lines."""
    corpus = load_corpus(settings.train_chars)
    train_models(settings, corpus, folder)
    streams = [stream(corpus[task]["test"]) for task in TASKS]
    models = " ".join(f"./models/{task}" for task in TASKS)
    shutil.rmtree(folder / "plan", ignore_errors=True)
    command(f"obim-kinship {models} --base ./models/base --quiet", folder)
    lines = command(
        f"obim-kinship {models} --base ./models/base --plan plan --top-k 2 --quiet", folder
    )
    scores: dict[str, float] = {}
    while not lines[-1].startswith("Finished"):
        for line in lines:
            if line.startswith("mergekit-yaml"):
                command(line.partition("#")[0] + " --quiet --no-copy-tokenizer", folder)
        known = yaml.safe_load((folder / "plan/scores.yml").read_text())
        for name in known:
            if name not in scores:
                model = load(folder / (name if name in models.split() else f"plan/{name}"))
                losses = [
                    held_out_loss(model, tokens, settings.windows, settings.expert.context)
                    for tokens in streams
                ]
                scores[name] = round(-mean(losses), DECIMALS)
                print(f"# {name}: {scores[name]}")
        (folder / "plan/scores.yml").write_text(yaml.safe_dump(scores, sort_keys=False))
        lines = command("obim-kinship --plan plan --quiet", folder)
    return lines


def command(line: str, folder: Path) -> list[str]:
    """Run a command of this virtual environment in a folder, and show it with what it prints."""
    print(f"$ {line}", flush=True)
    program, *arguments = shlex.split(line)
    path = Path(sys.executable).with_name(program)
    done = subprocess.run(
        [str(path), *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    print(done.stdout, end="", flush=True)
    return done.stdout.splitlines() or [""]


def time_threads(folder: Path, runs: int) -> dict[str, float]:
    """Median seconds of one comparison, on one thread and on torch's default number of them."""
    base, *experts = write_models(folder, SIZE, 3)
    ways = {
        "one thread": contextlib.nullcontext,  # the measures see to it themselves
        f"{torch.get_num_threads()} threads": lambda: mock.patch.object(
            measures, "one_thread", contextlib.nullcontext
        ),
    }
    seen: dict[str, list[float]] = {way: [] for way in ways}
    measures.measure(experts, base, MergeOptions(quiet=True))  # warm-up: files into the page cache
    for _ in range(runs):
        for way, patched in ways.items():
            start = time.perf_counter()
            with patched():
                measures.measure(experts, base, MergeOptions(quiet=True))
            seen[way].append(time.perf_counter() - start)
    return {way: statistics.median(seconds) for way, seconds in seen.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(".cache/demo"), help="where files go")
    parser.add_argument("--time", action="store_true", help="only time the comparison")
    parser.add_argument("--cache", type=Path, default=Path(".cache/bench-report"))
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.time:
        seconds = time_threads(arguments.cache.resolve(), arguments.runs)
        for way, median in seconds.items():
            print(f"obim-kinship, {way:10} {median:7.2f} s")
        print(json.dumps({"benchmark": "kinship", "seconds": seconds, "machine": machine()}))
        return
    transformers.utils.logging.disable_progress_bar()
    run(DEMO, arguments.out)


if __name__ == "__main__":
    main()
