"""Whether Optimal Brain Surgeon's ranking helps OBIM: s = δ² / [G⁻¹]_jj in the place of δ² h_j.

    python -m benchmarks.obs [--scale tiny] [--seed 0] [--columns 16 --columns 64] [--damp 0.01]

Optimal Brain Damage, which OBIM follows, asks what a layer's output loses if one change δ_j is
dropped and the others stay. Optimal Brain Surgeon (Hassibi and Stork 1993, equation 5) asks what it
loses if the others make up for it as well as they can, which is δ_j² / [G⁻¹]_jj: never more, and
much less where other inputs go with j. Masks are exclusive, so here nothing makes up for anything.

Each expert's saliency file is measured with a sketch of G and rewritten with 1 / [Ĝ⁻¹]_jj in the
place of h, and both are merged by the real commands on the models of docs/evidence.md. Prints
recoveries on held-out text, by expert and their mean; ends with one JSON line.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is to be downloaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import torch
import transformers
from torch import Tensor

from benchmarks.evidence.lab import SCALES, TRIO, Lab, Merge
from mergekit_obim.kernels.regmean_gram import Gram
from mergekit_obim.methods.saliency import has_gram, input_axis, stored_layers
from mergekit_obim.saliency.file import SaliencyFile, write_saliency

SETTINGS = {
    "OBIM, density 0.1": Merge("obim", each={"density": 0.1}),
    "OBIM, density 1/3": Merge("obim", each={"density": 0.3333}),
    "OBIM, least error": Merge("obim", {"assignment": "least_error"}),
    "RegMean, diagonal": Merge("regmean_diag"),
}


def inverse_diagonal(gram: Gram, damp: float) -> Tensor:
    """The diagonal of (Ĝ + damp · mean(h) · I)⁻¹, [d], float64.

    With Ĝ = diag(a) + U Uᵀ it follows from Woodbury's identity: 1/a − (‖row j of L⁻¹ Uᵀ‖ / a)²,
    L Lᵀ = I + Uᵀ diag(1/a) U.

    Args:
        gram: What is known of G, as the merge knows it.
        damp: What is added to the diagonal, as a share of its mean.
    """
    h = gram.h.double()
    added = damp * h.mean() if h.any() else torch.ones(())
    if gram.full:
        matrix = gram.full().double()
        matrix.diagonal().copy_(h + added)
        return torch.linalg.inv(matrix).diagonal().clone()
    if gram.factor is None:
        return 1 / (h + added)
    u = gram.factor.double()
    a = (h - u.square().sum(1)).clamp(min=0) + added
    core = torch.eye(u.shape[1], dtype=torch.float64) + u.T @ (u / a[:, None])
    rows = torch.linalg.solve_triangular(torch.linalg.cholesky(core), u.T, upper=False)
    return 1 / a - rows.square().sum(0) / a.square()


def rewrite(source: Path, target: Path, damp: float) -> None:
    """Write a saliency file with 1 / [Ĝ⁻¹]_jj for h, for all weights that have a sketch."""
    file = SaliencyFile(source)

    def read(name: str) -> Tensor:
        h = file[name]
        axis = input_axis(tuple(h.shape), tuple(h.shape))
        if axis is None or not has_gram(file, name):
            return h
        layers = stored_layers(file, name, h, h.shape, axis)
        count = h.shape[0] if h.ndim == 3 else 1
        rows = [1 / inverse_diagonal(layers(index), damp) for index in range(count)]
        return torch.stack(rows).view(h.shape)

    metadata = file.metadata.model_copy(update={"gram": None})
    write_saliency(target, file.shapes, read, metadata)


@click.command()
@click.option("--scale", type=click.Choice(list(SCALES)), default="tiny", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--columns", type=int, multiple=True, default=(16, 64), show_default=True)
@click.option("--damp", type=float, default=0.01, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=".cache/evidence")
def main(scale: str, seed: int, columns: tuple[int, ...], damp: float, cache: Path) -> None:
    """Measure, rewrite, merge both ways, score."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    lab = Lab(SCALES[scale], seed, cache / scale / f"seed{seed}")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for count in columns:
        files = {task: lab.saliency(task, sketch=count) for task in TRIO}
        folder = lab.folder / f"saliency/obs-{count}-{damp:g}"
        for file in files.values():
            rewrite(file, folder / file.name, damp)
        for way, paths in (
            ("h", {task: str(file) for task, file in files.items()}),
            (f"1 / [G⁻¹], {count} columns", {t: str(folder / f.name) for t, f in files.items()}),
        ):
            if way in found:  # h is the same with any sketch beside it
                continue
            found[way] = {}
            for name, merge in SETTINGS.items():
                recovery = lab.recovery(_by(merge, paths))
                found[way][name] = recovery
                shown = " ".join(f"{task} {value:6.3f}" for task, value in recovery.items())
                mean = sum(recovery.values()) / len(recovery)
                click.echo(f"{name:20} {way:24} mean {mean:6.3f}  {shown}")
    click.echo(json.dumps({"scale": scale, "seed": seed, "damp": damp, "recovery": found}))


def _by(merge: Merge, files: dict[str, str]) -> Merge:
    """The merge with each expert's saliency from a file of its own."""
    own = {task: {"saliency": path} for task, path in files.items()}
    return Merge(merge.method, merge.shared, merge.each, own)


if __name__ == "__main__":
    main()
