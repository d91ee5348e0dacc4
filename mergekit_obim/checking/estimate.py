"""Estimates of the disk and memory that a recipe will need, from the shapes of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

# What Python, torch, transformers and mergekit take of memory by themselves.
_START_BYTES = 600 << 20
# Checkpoint pages that the merge lets pile up before it closes the files, see methods.base.
_OPEN_BYTES = 256 << 20
_BATCH_TOKENS = 2048  # of `batch_size: auto`
_HEADER_BYTES = 400  # of a saliency file, for each tensor: its place, and its fingerprint


@dataclass(frozen=True)
class Cost:
    """What a command needs of a machine, roughly.

    Attributes:
        disk: What it writes, in bytes.
        memory: Its peak of memory, in bytes.
    """

    disk: int
    memory: int

    def then(self, other: Cost) -> Cost:
        """Return the cost of this command and another after it."""
        return Cost(self.disk + other.disk, max(self.memory, other.memory))


def merge_cost(
    shapes: Mapping[str, Sequence[int]], experts: int, stored: torch.dtype, written: torch.dtype
) -> Cost:
    """Estimate what ``mergekit-yaml`` needs, on a CPU.

    Args:
        shapes: Shape of every weight of the base.
        experts: How many there are.
        stored: The dtype that the models are stored and merged in.
        written: The dtype of the merged model.
    """
    elements = sum(map(math.prod, shapes.values()))
    largest = max(map(math.prod, shapes.values()), default=0)
    files = elements * (stored.itemsize * (experts + 1) + written.itemsize)
    # Its inputs, the merged tensor, the map of owners (a byte an element), and what is being
    # sorted out.
    tensor = largest * (stored.itemsize * (experts + 1) + written.itemsize + 2.5)
    return Cost(elements * written.itemsize, round(_START_BYTES + min(_OPEN_BYTES, files) + tensor))


def prepass_cost(
    shapes: Mapping[str, Sequence[int]],
    experts: int,
    dtype: torch.dtype,
    *,
    tied: bool,
    dense: bool,
) -> Cost:
    """Estimate what ``obim-saliency`` needs, whatever the device.

    Args:
        shapes: Shape of every weight of one expert.
        experts: How many are to be measured.
        dtype: Of the forward pass.
        tied: Whether the embedding is the head too: then its h has a number per weight.
        dense: Whether full saliency tensors are written.
    """
    matrices = [shape for shape in shapes.values() if len(shape) > 1]
    vocabulary = max((shape[0] for name, shape in shapes.items() if "embed" in name), default=0)
    disk = 0
    for name, shape in shapes.items():
        embedding = shape[:1] == [vocabulary] and "embed" in name
        size = math.prod(shape) if len(shape) < 2 or dense or (embedding and tied) else shape[-1]
        disk += 4 * (shape[0] if embedding and not tied and not dense else size) + _HEADER_BYTES
    # One expert at a time: its weights, what its layers hand on, and h at the end.
    weights = sum(map(math.prod, shapes.values())) * dtype.itemsize
    widest = max((max(shape) for shape in matrices if vocabulary not in shape), default=1)
    activations = _BATCH_TOKENS * widest * dtype.itemsize * 8
    return Cost(disk * experts, round(_START_BYTES + weights + activations + disk))
