"""What `make evidence-real` runs: fine-tune, merge with the real commands, score, write the page.

    python -m benchmarks.real [--seed 0 …] [--regime light-4 …] [--method OBIM …]

Each trained model, saliency file and score is kept under --cache and found there again, so an
interrupted run goes on. Figures go to docs/evidence-real.json, and from there into the tables of
docs/evidence-real.md, after every method.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is to be downloaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import transformers

from benchmarks.evidence.__main__ import made
from benchmarks.real import base, page, plots, tables, text
from benchmarks.real.lab import SCALES, Lab

REGIMES = list(tables.regimes("abcd"))


@click.command()
@click.option("--scale", type=click.Choice(list(SCALES)), default="smollm2", show_default=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True)
@click.option("--regime", "names", type=click.Choice(REGIMES), multiple=True, help="Only these")
@click.option("--method", "only", multiple=True, help="Only these, added to what is there")
@click.option("--kind", "kinds", type=click.Choice(tables.KINDS), multiple=True, help="Only this")
@click.option("--packages", type=click.Path(path_type=Path), default=".cache/real-packages")
@click.option("--cache", type=click.Path(path_type=Path), default=".cache/real")
@click.option("--docs", type=click.Path(path_type=Path), default=page.DOCS, help="Where to write")
def main(
    scale: str,
    seeds: tuple[int, ...],
    names: tuple[str, ...],
    only: tuple[str, ...],
    kinds: tuple[str, ...],
    packages: Path,
    cache: Path,
    docs: Path,
) -> None:
    """Train, merge, score and write the page."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settings = SCALES[scale]
    if scale == "smoke":
        model, rows = (
            base.random_llama(cache / scale / "base"),
            base.generated_rows(settings.counts),
        )
    else:
        model = base.smollm2(packages / "pip", cache / scale / "base")
        rows = text.load_rows(packages / "deb", settings.counts)
    for seed in seeds:
        lab = Lab(model, rows, settings, seed, cache / scale / f"seed{seed}")
        for name in names or REGIMES:
            start, how = time.perf_counter(), made("cpu")
            for found in tables.figures(lab, name, kinds or tables.KINDS, only):
                # Read anew: other regimes may be running beside this one.
                kept = page.read(docs)
                by_seed = kept.setdefault(scale, {}).setdefault(name, {})
                by_seed[str(seed)] = page.add(by_seed.get(str(seed), {}), found, how)
                page.write(docs, kept)
            plots.draw(docs, page.read(docs))
            print(f"seed {seed}, {name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
