"""How long `obim-report` takes beside the merge that it looks at, and how much memory.

    python -m benchmarks.report [--cache .cache/bench-report] [--runs 5] [--experts 3]

All run as a user starts them, in turns, on random bf16 Llamas of 0.1B parameters: the merge, its
report by saliency files with h alone, and its report by files with sketches of 16 columns too.
Wall seconds from start to end, writing included, processor seconds, which other processes on the
machine disturb less, and peak resident memory. Prints medians and their ratios to the merge's;
ends with one JSON line.
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
import torch
import yaml
from transformers import LlamaConfig

from benchmarks.bench import machine, recipe, run_merge, write_models
from mergekit_obim.kernels.gram import TEST_MATRIX, draw_test_matrix
from mergekit_obim.saliency.file import Gram, SaliencyFile, write_saliency

SIZE = LlamaConfig(
    hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
    vocab_size=16000, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
)  # fmt: skip


def write_sketches(folder: Path, columns: int) -> None:
    """Add sketches to the saliency files, in a folder of their own."""
    for source in sorted((folder / "saliency").glob("*.safetensors")):
        file = SaliencyFile(source)
        linear = [n for n, h in file.shapes.items() if len(h) == 2 and "embed" not in n]
        entries = {name: file[name] for name in file.shapes}
        for name in linear:
            # Any Gram matrix whose diagonal is h will do: here inputs with one part in common.
            h = entries[name][0]
            omega, common = draw_test_matrix(len(h), columns), (h / 2).sqrt()
            entries[f"sketch/{name}"] = (h / 2)[:, None] * omega + torch.outer(
                common, common @ omega
            )
        gram = Gram(
            columns=columns,
            test_matrix=TEST_MATRIX,
            inputs={name: f"sketch/{name}" for name in linear},
        )
        write_saliency(
            folder / "sketched" / source.name,
            {name: tuple(entry.shape) for name, entry in entries.items()},
            entries.__getitem__,
            file.metadata.model_copy(update={"gram": gram}),
        )


def run_report(models: list[str], folder: Path, files: str) -> tuple[float, float]:
    """One `obim-report` process: wall seconds and peak resident memory in GiB."""
    path = folder / f"{files}.yml"
    settings = recipe("obim", models, folder)
    settings["parameters"] = {"saliency": str(folder / files)}
    path.write_text(yaml.safe_dump(settings))
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
    """Time all, in turns."""
    models = write_models(cache.resolve(), SIZE, experts)
    write_sketches(cache.resolve(), 16)
    files = {"report": "saliency", "report, sketch": "sketched"}
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in ("merge", *files)}
    for turn in range(runs + 1):
        for name in found:
            before = processor_seconds()
            if name == "merge":
                run = run_merge("obim", models, cache.resolve())
            else:
                run = run_report(models, cache.resolve(), files[name])
            if turn:  # the first is the warm-up
                found[name].append((*run, processor_seconds() - before))
    figures: dict[str, dict[str, float]] = {}
    for part, what in enumerate(("seconds", "GiB", "processor seconds")):
        medians = {
            name: statistics.median(run[part] for run in all_) for name, all_ in found.items()
        }
        figures[what] = medians
        ratios = {name: medians[name] / medians["merge"] for name in files}
        shown = ", ".join(f"{n} {medians[n]:.2f} ({r:.2f} of it)" for n, r in ratios.items())
        click.echo(f"{what:17} merge {medians['merge']:.2f}, {shown}")
    click.echo(json.dumps({"experts": experts, **figures, "machine": machine()}))


def processor_seconds() -> float:
    """Of all processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
