"""What a recipe will cost on this machine: disk, memory and time, from shapes and two trials.

Time is that of the arithmetic, which two trials of a fraction of a second measure here, and of
the files at a fixed speed. It can be off by half: disks, caches and other processes differ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mergekit_obim.kernels.iterative import iterative_owners
from mergekit_obim.kernels.merging import merge_owned
from mergekit_obim.kernels.scores import Candidate, Saliency

# Start-up of Python, torch, transformers and mergekit, and what they take of memory.
_START_SECONDS = 8.0
_START_BYTES = 600 << 20
_FILE_SPEED = 500e6  # bytes a second, of reading and writing
# Checkpoint pages that the merge lets pile up before it closes the files, see methods.base.
_OPEN_BYTES = 256 << 20
_BATCH_TOKENS = 2048  # of `batch_size: auto`
_HEADER_BYTES = 400  # of a saliency file, for each tensor: its place, and its fingerprint
_TRIAL = 1 << 20


@dataclass(frozen=True)
class Cost:
    """Bytes and seconds, both rough.

    Attributes:
        disk: What is written, in bytes.
        memory: The peak, in bytes.
        seconds: From start to end.
    """

    disk: int
    memory: int
    seconds: float

    def then(self, other: Cost) -> Cost:
        """Of one command after the other."""
        memory = max(self.memory, other.memory)
        return Cost(self.disk + other.disk, memory, self.seconds + other.seconds)


def merge_cost(
    shapes: Mapping[str, Sequence[int]], experts: int, stored: torch.dtype, written: torch.dtype
) -> Cost:
    """Of ``mergekit-yaml``, on a CPU.

    Args:
        shapes: Shape of every weight of the base.
        experts: How many there are.
        stored: The dtype that the models are stored and merged in.
        written: The dtype of the merged model.
    """
    elements = sum(map(math.prod, shapes.values()))
    largest = max(map(math.prod, shapes.values()), default=0)
    files = elements * (stored.itemsize * (experts + 1) + written.itemsize)
    # Its inputs, the merged tensor, the map of owners, and what is being sorted out.
    tensor = largest * (stored.itemsize * (experts + 1) + written.itemsize + 2.5)
    return Cost(
        elements * written.itemsize,
        round(_START_BYTES + min(_OPEN_BYTES, files) + tensor),
        _START_SECONDS + files / _FILE_SPEED + elements * experts * _merge_speed(experts),
    )


def prepass_cost(
    shapes: Mapping[str, Sequence[int]],
    experts: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    tied: bool,
    dense: bool,
    device: str,
) -> Cost:
    """Of ``obim-saliency``.

    Args:
        shapes: Shape of every weight of one expert.
        experts: How many are to be measured.
        tokens: Of calibration, at most, over all experts.
        dtype: Of the forward pass.
        tied: Whether the embedding is the head too: then its h has a number per weight.
        dense: Whether full saliency tensors are written.
        device: Where the models run.
    """
    elements = sum(map(math.prod, shapes.values()))
    matrices = [shape for shape in shapes.values() if len(shape) > 1]
    work = sum(map(math.prod, matrices))
    vocabulary = max((shape[0] for name, shape in shapes.items() if "embed" in name), default=0)
    disk = 0
    for name, shape in shapes.items():
        embedding = shape[:1] == [vocabulary] and "embed" in name
        size = math.prod(shape) if len(shape) < 2 or dense or (embedding and tied) else shape[-1]
        disk += 4 * (shape[0] if embedding and not tied and not dense else size) + _HEADER_BYTES
    widest = max((max(shape) for shape in matrices if vocabulary not in shape), default=1)
    activations = _BATCH_TOKENS * widest * dtype.itemsize * 8
    files = elements * dtype.itemsize * experts + disk * experts
    speed = _forward_speed(dtype, device) if tokens else math.inf
    return Cost(
        disk * experts,
        round(_START_BYTES + elements * dtype.itemsize + activations + disk),
        _START_SECONDS + files / _FILE_SPEED + 2 * work * tokens / speed,
    )


def _best(trial: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest of a few trials, after a warm-up."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        trial()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _merge_speed(experts: int) -> float:
    """Seconds for an element and expert: masks and merge of random tensors of 2²⁰ elements."""
    generator = torch.Generator().manual_seed(0)
    shape = (1024, _TRIAL // 1024)
    base = torch.randn(shape, generator=generator).bfloat16()
    tensors = [base + (0.01 * torch.randn(shape, generator=generator)) for _ in range(experts)]
    h = Saliency(torch.rand((1, shape[1]), generator=generator))
    candidates = [Candidate(tensor.bfloat16(), base, h) for tensor in tensors]

    def trial() -> None:
        owner = iterative_owners(candidates, [1 / experts] * experts, range(experts))
        merge_owned(base, [c.expert for c in candidates], owner, [1.0] * experts)

    return _best(trial) / _TRIAL / experts


def _forward_speed(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations a second of a product as a linear layer has it."""
    rows, width = 512, 1024
    x = torch.zeros(rows, width, dtype=dtype, device=device)
    weight = torch.zeros(width, width, dtype=dtype, device=device)

    def trial() -> None:
        float((x @ weight.T)[0, 0])  # which waits for the device

    return 2 * rows * width * width / _best(trial)
