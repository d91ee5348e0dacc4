"""Merges that neither mergekit nor this package has, written from their papers, and Fisher files.

Each method gets the base cut in two, the experts' whole weights and the rows that each expert is
calibrated on, and returns a whole model. What it does not say anything about (the gains of norms)
is averaged, as the papers do. Sums and decompositions are float64 unless noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.real.tail import Encoded, Parts, State
from mergekit_obim.saliency.file import saliency_file_name

Rows = Sequence[Encoded]


def _merge(
    parts: Parts, experts: Sequence[State], matrix: Callable[[str, Tensor, Tensor], Tensor]
) -> State:
    """Merge name by name: ``matrix(name, base, deltas [K, out, in])`` gives the merged change."""
    merged = dict(parts.base)
    for name in parts.names:
        base = parts.base[name]
        deltas = torch.stack([expert[name] - base for expert in experts])
        change = matrix(name, base, deltas) if base.dim() == 2 else deltas.mean(0)
        merged[name] = base + change.to(base.dtype)
    return merged


def regmean(
    parts: Parts, experts: Sequence[State], rows: Sequence[Rows], keep: float = 0.9
) -> State:
    """RegMean with whole Gram matrices (arXiv 2212.09849): (Σ W_k G_k)(Σ G_k)⁻¹.

    Args:
        keep: Off-diagonals of each G = E[x xᵀ] are multiplied by this: 0.9 in the paper, 0.1 in
            MergeBench (arXiv 2505.10833).
    """
    grams = [_grams(parts, expert, one) for expert, one in zip(experts, rows, strict=True)]

    def matrix(name: str, base: Tensor, deltas: Tensor) -> Tensor:
        each = [keep * gram[name] + (1 - keep) * gram[name].diag().diag() for gram in grams]
        total = torch.stack(each).sum(0)
        total += 1e-8 * total.diag().mean() * torch.eye(len(total), dtype=total.dtype)
        weighted = sum(delta.double() @ gram for delta, gram in zip(deltas, each, strict=True))
        return torch.linalg.solve(total, weighted, left=False)

    return _merge(parts, experts, matrix)


def _grams(parts: Parts, expert: State, rows: Rows) -> dict[str, Tensor]:
    """E[x xᵀ] of every matrix's inputs x over all tokens of an expert's rows, [in, in]."""
    parts.set(expert)
    names = {parts.of_tail(name): name for name in parts.names}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    real: Tensor  # which positions hold tokens, [rows, longest]

    def listen(name: str) -> Callable[[object, tuple[Tensor, ...]], None]:
        def hook(_: object, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0][real]
            sums[name] = sums.get(name, 0) + (x.mT @ x).double()
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    handles = [
        module.register_forward_pre_hook(listen(names[f"{path}.weight"]))
        for path, module in parts.tail.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{path}.weight" in names
    ]
    with torch.no_grad():
        for batch in _batches(rows):
            states = parts.through_trunk(batch)
            lengths = torch.tensor([len(row.ids) for row in batch])
            real = torch.arange(int(lengths.max())) < lengths[:, None]
            hidden = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
            with parts.precision:
                parts.tail.model(inputs_embeds=hidden, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def _batches(rows: Rows, size: int = 16) -> Iterator[Rows]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def tsv_m(
    parts: Parts, experts: Sequence[State], rows: Sequence[Rows], scale: float = 1.0
) -> State:
    """TSV-Merge (arXiv 2412.00081): each task's largest singular vectors, made orthogonal.

    Of each change the 1/K of its singular triplets with the largest values is kept; the left
    vectors of all tasks side by side, and the right ones, are replaced by the nearest matrices
    with orthonormal columns (Procrustes), and the changes put together again. float32.
    """

    def matrix(name: str, base: Tensor, deltas: Tensor) -> Tensor:
        kept = max(1, min(deltas.shape[1:]) // len(deltas))
        pieces = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
        left = _orthonormal(torch.cat([u[:, :kept] for u, _, _ in pieces], 1))
        right = _orthonormal(torch.cat([vh[:kept] for _, _, vh in pieces]).mT)
        values = torch.cat([s[:kept] for _, s, _ in pieces])
        return scale * (left * values) @ right.mT

    return _merge(parts, experts, matrix)


def _orthonormal(columns: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(columns, full_matrices=False)
    return u @ vh


def iso_c(
    parts: Parts, experts: Sequence[State], rows: Sequence[Rows], scale: float = 1.0
) -> State:
    """Iso-C (arXiv 2502.04959): the sum of all changes with all its singular values their mean."""

    def matrix(name: str, base: Tensor, deltas: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(deltas.sum(0), full_matrices=False)
        return scale * s.mean() * (u @ vh)

    return _merge(parts, experts, matrix)


METHODS: dict[str, Callable[..., State]] = {"regmean_full": regmean, "tsv_m": tsv_m, "iso_c": iso_c}


def fisher(parts: Parts, rows: Rows, model: Path, folder: Path) -> None:
    """Write a saliency file that holds the diagonal empirical Fisher information of the tail.

    That is the mean over rows of (∂ ln p(answer | prompt) / ∂θ)², of the shape of each weight.
    `regmean_diag`, the mean weighted by what the files hold, is Fisher merging (arXiv
    2111.09832) with it.
    """
    own = dict(parts.tail.named_parameters())
    weights = {name: own[parts.of_tail(name)].requires_grad_(True) for name in parts.names}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for row, state in zip(rows, parts.through_trunk(rows), strict=True):
        logits, tokens = parts.logits([row], [state])
        loss = F.cross_entropy(logits, tokens, reduction="sum")
        for name, grad in zip(
            weights, torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            sums[name] += grad.square()
    parts.tail.requires_grad_(False)
    metadata = {
        "format": "mergekit-obim-saliency",
        "format_version": "1",
        "form": "factored",
        "model": str(model),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / saliency_file_name(str(model))
    part = path.with_suffix(".part")
    save_file({name: total / len(rows) for name, total in sums.items()}, part, metadata)
    part.replace(path)
