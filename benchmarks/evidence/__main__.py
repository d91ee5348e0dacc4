"""What `make evidence` runs: train, merge with the real commands, score, write the page.

    python -m benchmarks.evidence [--scale small] [--seed 0 …] [--table methods …] [--device cuda]

Each trained model, saliency folder and score is kept under --cache and found there again,
so an interrupted run goes on. Figures go to docs/evidence.json, and from there into the
tables and plots of docs/evidence.md.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is to be downloaded
    # Models so small gain little from a second thread; two of them side by side use two cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import torch
import transformers

from benchmarks.evidence import page, plots
from benchmarks.evidence.lab import BASE, CHECKPOINTS, SCALES, TASKS, Lab
from benchmarks.evidence.tables import TABLES, USUAL


@click.command()
@click.option("--scale", type=click.Choice(list(SCALES)), default="small", show_default=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True)
@click.option(
    "--table",
    "names",
    type=click.Choice(list(TABLES)),
    multiple=True,
    help="Only these  [default: the paper's]",
)
@click.option("--device", default="cpu", show_default=True, help="For training and scoring")
@click.option("--cache", type=click.Path(path_type=Path), default=".cache/evidence")
@click.option("--docs", type=click.Path(path_type=Path), default=page.DOCS, help="Where to write")
def main(
    scale: str,
    seeds: tuple[int, ...],
    names: tuple[str, ...],
    device: str,
    cache: Path,
    docs: Path,
) -> None:
    """Train, merge, score and write the page."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for seed in seeds:
        start, how = time.perf_counter(), made(device)
        lab = Lab(SCALES[scale], seed, cache / scale / f"seed{seed}", device)
        if not names:  # all are needed, and more of them go two at a time than table by table
            lab.models(BASE, *TASKS, *CHECKPOINTS)
        for name in names or USUAL:
            table = {"figures": TABLES[name](lab), "made": how}
            # Read anew: other seeds may be running beside this one.
            kept = page.read(docs)
            kept.setdefault(scale, {}).setdefault(name, {})[str(seed)] = table
            page.write(docs, kept)
            plots.draw(docs, kept)
            print(f"seed {seed}, {name}: {time.perf_counter() - start:.0f} s", flush=True)


def made(device: str) -> dict[str, str]:
    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip()

    # What this writes itself makes no other commit of the code.
    changed = git("status", "--porcelain", "--", ":(top,exclude)docs/evidence*")
    return {
        "commit": git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else ""),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
