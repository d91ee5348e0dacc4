"""Mutually exclusive assignments that need neither an order nor densities.

Under mutual exclusion (equation 7) a position can take 0, which leaves it to the base, or
one expert's δ_k. What all experts together lose by that separates by position
(``kernels.objective``), so the best of these K + 1 values can be chosen at each by itself:
the h-weighted medoid of the task vectors and 0. This is not in the paper.

Σ_k w_k h_k (c − δ_k)² is least at the h-weighted mean of the δ_k, and the medoid is the
value nearest to it. A mean of vectors that differ is shorter than each of them, so the same
is done with a mean that is stretched by γ: (c − γ δ_k)² in the place of (c − δ_k)². What γ makes up
for that is in ``kernels.lengths``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_obim.kernels.backend import array, label, namespace
from mergekit_obim.kernels.blocks import blocks, scratch
from mergekit_obim.kernels.iterative import free_owners
from mergekit_obim.kernels.objective import objective
from mergekit_obim.kernels.scores import Candidate, working_dtype


def least_error_owners(
    candidates: Sequence[Candidate], weights: Sequence[float], stretch: float = 1.0
) -> torch.Tensor:
    """Assign positions so that the experts' summed error is least, under equation 7's exclusion.

    At each position c is the argmin over {0, δ_1 … δ_K} of Σ_k w_k h_k (c − γ δ_k)². Of values
    that cost the same, 0 comes first, and then the expert that is listed first. Costs are
    compared as c·(A·c − 2γB), in the working dtype; the constant that all share is left out.

    Args:
        candidates: The K experts' tensors, at most 254; their criterion says what h is.
        weights: w_k, not negative.
        stretch: γ; 1 for the error itself.

    Returns:
        uint8, of the tensors' shape: the index of the expert whose value the position
        takes, or ``FREE`` (255) for the base's.

    Raises:
        UnscorableError: A task vector or its h is not finite.
        ValueError: There are more experts than labels.
    """
    owner = free_owners(candidates)
    dtype, xp = working_dtype(candidates[0].base.dtype), namespace(owner.device)
    for block in blocks(owner.shape, owner.device):
        curvature, linear, deltas = objective(block, candidates, weights)
        linear *= 2 * stretch
        owned = block.of(owner)
        cost, least = (
            array(scratch(name, owned.numel(), dtype, owner.device).view(owned.shape))
            for name in ("cost", "least")
        )
        mask = scratch("mask", owned.numel(), torch.bool, owner.device).view(owned.shape)
        least[...] = 0  # what c = 0, the base's value, costs
        for k, delta in enumerate(deltas):
            xp.multiply(curvature, delta, out=cost)  # A c, for c = δ_k
            cost -= linear  # A c − 2γB
            cost *= delta  # c (A c − 2γB)
            # Strictly less: of equal costs the base's, and then the first expert's, stays.
            label(array(owned), xp.less(cost, least, out=array(mask)), k)
            xp.minimum(cost, least, out=least)
    return owner
