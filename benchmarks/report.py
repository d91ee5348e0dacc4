"""How long `obim-report` takes beside the merge that it looks at, and how much memory.

    python -m benchmarks.report [--cache .cache/bench-report] [--runs 5] [--experts 3]

Both run as a user starts them, in turns, on random bf16 Llamas of 0.1B parameters: wall seconds
from start to end, writing included, processor seconds, which other processes on the machine
disturb less, and peak resident memory. Prints medians and the report's ratios to the merge; ends
with one JSON line.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import yaml
from transformers import LlamaConfig

from benchmarks.bench import machine, recipe, run_merge, write_models

SIZE = LlamaConfig(
    hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
    vocab_size=16000, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
)  # fmt: skip


def run_report(models: list[str], folder: Path) -> tuple[float, float]:
    """One `obim-report` process: wall seconds and peak resident memory in GiB."""
    path = folder / "obim.yml"
    path.write_text(yaml.safe_dump(recipe("obim", models, folder)))
    code = "from mergekit_obim.commands.report import report; report()"
    command = [sys.executable, "-c", code, str(path), "-o", str(folder / "report.html"), "--quiet"]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


@click.command()
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".cache/bench-report"))
@click.option("--runs", type=click.IntRange(min=1), default=5)
@click.option("--experts", type=click.IntRange(min=1), default=3)
def main(cache: Path, runs: int, experts: int) -> None:
    """Time both, in turns."""
    models = write_models(cache.resolve(), SIZE, experts)
    found: dict[str, list[tuple[float, ...]]] = {"merge": [], "report": []}
    for turn in range(runs + 1):
        for name in found:
            before = processor_seconds()
            if name == "merge":
                run = run_merge("obim", models, cache.resolve())
            else:
                run = run_report(models, cache.resolve())
            if turn:  # the first is the warm-up
                found[name].append((*run, processor_seconds() - before))
    figures: dict[str, dict[str, float]] = {}
    for part, what in enumerate(("seconds", "GiB", "processor seconds")):
        medians = {
            name: statistics.median(run[part] for run in all_) for name, all_ in found.items()
        }
        figures[what] = {**medians, "ratio": medians["report"] / medians["merge"]}
        click.echo(
            f"{what:17} merge {medians['merge']:6.2f}, report {medians['report']:6.2f}: "
            f"{figures[what]['ratio']:.2f}"
        )
    click.echo(json.dumps({"experts": experts, **figures, "machine": machine()}))


def processor_seconds() -> float:
    """Of all processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
