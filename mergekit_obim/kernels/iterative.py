"""Iterative merging (IM): each position of a tensor goes to at most one expert.

This is section 3.2 of the paper (arXiv 2502.12217) with its equation 7 and algorithm 1. One expert
after the other claims the best of the positions that are left, so nothing is ever averaged, and
the order matters: whoever comes first gets all it asks for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_obim.kernels.scores import Candidate
from mergekit_obim.kernels.selection import MAX_EXPERTS, all_free, claim_top


def keep_count(density: float, numel: int) -> int:
    """Return how many positions a share is: n = round(density · N), of *all* N (section 3.2).

    Args:
        density: n_k of the paper, 0 … 1.
        numel: N, the number of the tensor's positions, claimed ones included.
    """
    return round(density * numel)


def free_owners(candidates: Sequence[Candidate]) -> torch.Tensor:
    """Return a map of owners on which every position is still ``FREE``.

    Args:
        candidates: The K experts' tensors, at most 254.

    Returns:
        uint8, contiguous, of the tensors' shape.

    Raises:
        ValueError: There are more experts than labels.
    """
    if len(candidates) > MAX_EXPERTS:
        raise ValueError(f"{len(candidates)} experts; at most {MAX_EXPERTS} can be merged")
    return all_free(candidates[0].base)


def iterative_owners(
    candidates: Sequence[Candidate], densities: Sequence[float], order: Sequence[int]
) -> torch.Tensor:
    """Assign positions by algorithm 1: the masks m_k of equation 7, as one map of owners.

    One map and not K masks: it keeps Σ_k m_k ≤ 1 by construction, and takes one byte a
    position however many experts there are.

    Args:
        candidates: The K experts' tensors, at most 254, with what ranks their positions.
        densities: n_k, the share of all positions that expert k may claim.
        order: The merging order: indices into ``candidates``, from the first to choose.

    Returns:
        uint8, of the tensors' shape: the index of the expert that claims the position,
        or ``FREE`` (255) where none does.

    Raises:
        UnscorableError: An expert's score is not finite.
        ValueError: There are more experts than labels.
    """
    owner = free_owners(candidates)
    free = owner.numel()
    for k in order:
        count = min(keep_count(densities[k], owner.numel()), free)
        free -= claim_top(owner, k, count, candidates[k])
    return owner
