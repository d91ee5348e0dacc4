"""What all experts together lose at a position, by the paper's own objective.

The paper's equation 6 is the error of a layer's output if its weights are W^B and not W_k; here it
is taken at the *merged* weights, where it is Σ_ij h_kj (δ_M − δ_k)²_ij for expert k (without the
products of different inputs, E[x_i x_j], which h leaves out). Weighted and summed over the experts,
it separates by position. With a_k = w_k h_k, a value c there costs

    Σ_k a_k (c − δ_k)² = A c² − 2 B c + const,    A = Σ_k a_k,    B = Σ_k a_k δ_k,

a parabola with its minimum at B / A. ``least_error`` takes the cheapest of the experts' own values,
``regmean`` the minimum itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mergekit_obim.errors import UnscorableError
from mergekit_obim.kernels.backend import Array, all_finite, array
from mergekit_obim.kernels.blocks import Block, scratch
from mergekit_obim.kernels.scores import (
    Candidate,
    Criterion,
    GivenScores,
    Saliency,
    task_vector,
    working_dtype,
)


def objective(
    block: Block, candidates: Sequence[Candidate], weights: Sequence[float]
) -> tuple[Array, Array, list[Array]]:
    """Compute the parabola's coefficients in a block.

    Sums are taken in the order of the candidates, whatever the device.

    Args:
        block: A block of the tensors' shape.
        candidates: The K experts' tensors; their criterion says what h is.
        weights: w_k.

    Returns:
        A, B and the K δ_k, each of the block's shape, in the working dtype, and in memory that the
        next block is going to use.

    Raises:
        UnscorableError: A task vector or its h is not finite.
    """
    base = candidates[0].base
    shape = block.of(base).shape
    dtype = working_dtype(base.dtype)

    def memory(name: str) -> torch.Tensor:
        return scratch(name, shape.numel(), dtype, base.device)

    curvature, linear, spare = (array(memory(name).view(shape)) for name in ("A", "B", "a"))
    curvature[...], linear[...] = 0, 0
    deltas = []
    # Whatever is not finite shows in A or B, and ends the merge; numpy need not warn of it.
    with np.errstate(invalid="ignore", over="ignore"):
        for k, (candidate, weight) in enumerate(zip(candidates, weights, strict=True)):
            delta = task_vector(
                block.of(candidate.expert),
                block.of(base),
                memory(f"delta {k}"),
            )
            deltas.append(array(delta))
            spare[...] = h_of(candidate.criterion, deltas[k], block, base.shape)
            spare *= weight
            curvature += spare
            spare *= deltas[k]
            linear += spare
    if not (all_finite(curvature) and all_finite(linear)):
        raise UnscorableError("the task vector or its saliency is not finite")
    return curvature, linear, deltas


def h_of(criterion: Criterion, delta: Array, block: Block, shape: torch.Size) -> Array | float:
    """Return h in a block, as the criterion has it.

    A dense file holds s = δ²·h, so it knows h only where δ is not 0; elsewhere it counts as
    0. Without a saliency h is 1: all positions are worth the same.

    Args:
        criterion: Ranks the expert's positions.
        delta: δ in the block, in the working dtype.
        block: A block of the tensor.
        shape: The whole tensor's.

    Returns:
        An array of the block's shape, or the number 1. A factored h is an expanded float32 view.
    """
    if isinstance(criterion, Saliency):
        return array(block.of(criterion.h.expand(shape)))
    if isinstance(criterion, GivenScores):
        squared = delta * delta
        squared[squared == 0] = float("inf")  # s / ∞ is 0
        return array(block.of(criterion.values)) / squared
    return 1.0
