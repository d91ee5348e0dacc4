"""Times the merge kernels against a copy of one tensor, on the CPU or a GPU.

    python -m benchmarks.kernels [--device cuda] [--rows 4096 --columns 4096] [--experts 3]

Every figure is the median of several runs after a warm-up. The unit is the time of
copying the tensor once as float32, measured in the same process.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import click
import torch
from mergekit.merge_methods.api import merge_tensors

from mergekit_obim.kernels.blocks import blocks, one_thread, scratch
from mergekit_obim.kernels.gram import draw_test_matrix
from mergekit_obim.kernels.iterative import iterative_owners
from mergekit_obim.kernels.merging import merge_owned
from mergekit_obim.kernels.nystrom import nystrom_factor
from mergekit_obim.kernels.regmean_gram import Gram, Layers, merge_regmean_layers
from mergekit_obim.kernels.scores import Candidate, Magnitude, RandomScores, Saliency
from mergekit_obim.kernels.selection import all_free, claim_top


def median_time(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median wall time of some work in seconds, the device's queue emptied around it."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def median_ratio(
    work: Callable[[], object], peer: Callable[[], object], device: torch.device, repeats: int
) -> float:
    """Median of the time of some work over that of its peer, which take turns.

    On a CPU it is the processor's time, which other processes lengthen less than the wall's.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def timed(what: Callable[[], object]) -> float:
        start = clock()
        what()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    ratios = [timed(work) / timed(peer) for _ in range(repeats + 1)]
    return statistics.median(ratios[1:])


def sketched_layers(columns: int, r: int) -> Layers:
    """What a saliency file knows of a layer's inputs; its factor is made at each merge."""
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(4 * r, columns, generator=generator)
    h = inputs.square().mean(0)
    sketch = inputs.T @ (inputs @ draw_test_matrix(columns, r)) / len(inputs)
    return lambda _: Gram(h, nystrom_factor(sketch, h))


@one_thread()
def measure(rows: int, columns: int, experts: int, device: torch.device, repeats: int) -> dict:
    """Figures for one shape: seconds of a copy, and everything else in copies."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    base = random(rows, columns)
    tuned = [(base + 0.01 * random(rows, columns)).bfloat16() for _ in range(experts)]
    single, base = base, base.bfloat16()
    criteria = {
        "saliency": Saliency(random(1, columns).square()),
        "magnitude": Magnitude(),
        "random": RandomScores(1),
    }
    # numpy's copy, where it can be: torch's takes three times as long, to map small pages.
    copied = single.numpy() if device.type == "cpu" else single
    copy = median_time(copied.copy if device.type == "cpu" else single.clone, device, repeats)
    result = {"elements": rows * columns, "experts": experts, "copy_seconds": copy}

    def claim() -> None:
        owner = all_free(base)
        claim_top(owner, 0, base.numel() // 3, Candidate(tuned[0], base, criteria["saliency"]))

    result["claim_one"] = median_time(claim, device, repeats) / copy

    def scores() -> None:
        candidate = Candidate(tuned[0], base, criteria["saliency"])
        for block in blocks(base.shape, device):
            size = block.of(base).numel()
            candidate.scores(block, scratch("scores", size, torch.float32, device))

    # The k-th value, and labelling what reaches it: all of it but the scores' arithmetic.
    result["select_one"] = result["claim_one"] - median_time(scores, device, repeats) / copy
    density = [1 / experts] * experts
    for name, criterion in criteria.items():
        candidates = [Candidate(tensor, base, criterion) for tensor in tuned]
        masks = median_time(
            lambda c=candidates: iterative_owners(c, density, range(experts)), device, repeats
        )
        result[f"masks_{name}"] = masks / copy
    owner = iterative_owners(candidates, density, range(experts))
    merge = median_time(lambda: merge_owned(base, tuned, owner, [1.0] * experts), device, repeats)
    result["merge"] = merge / copy
    layers = [sketched_layers(columns, 16)] * experts
    result["regmean_over_linear"] = median_ratio(
        lambda: merge_regmean_layers(base, tuned, -1, layers, [1.0] * experts, 0.95, 1.0),
        lambda: merge_tensors(tuned, "linear", parameters={"weight": 1.0}),
        device,
        repeats,
    )
    # What must move: the base and every expert in, the merged tensor out, 2 bytes each; the
    # copy moves 4 bytes in and 4 out per element.
    must_move = (experts + 2) * 2 / 8
    result["bandwidth_share"] = must_move / (result["masks_saliency"] + result["merge"])
    return result


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--rows", default=4096, show_default=True)
@click.option("--columns", default=4096, show_default=True)
@click.option("--experts", default=3, show_default=True)
@click.option("--repeats", default=5, show_default=True)
def main(device: str, rows: int, columns: int, experts: int, repeats: int) -> None:
    """Time the merge kernels."""
    result = measure(rows, columns, experts, torch.device(device), repeats)
    for name, value in result.items():
        print(f"{name:>16} {value:.6g}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
