"""Iterative merging: each position of a tensor goes to at most one expert (section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_obim.kernels.scores import Candidate
from mergekit_obim.kernels.selection import MAX_EXPERTS, all_free, claim_top


def keep_count(density: float, numel: int) -> int:
    """How many positions a share is: n = round(density · N), of *all* N positions (section 3.2)."""
    return round(density * numel)


def free_owners(candidates: Sequence[Candidate]) -> torch.Tensor:
    """A map of owners on which everything is still ``FREE``: uint8, of the tensors' shape."""
    if len(candidates) > MAX_EXPERTS:
        raise ValueError(f"{len(candidates)} experts; at most {MAX_EXPERTS} can be merged")
    return all_free(candidates[0].base)


def iterative_owners(
    candidates: Sequence[Candidate], densities: Sequence[float], order: Sequence[int]
) -> torch.Tensor:
    """The masks m_k of equation 7, as one map of owners: algorithm 1.

    One map and not K masks: it keeps Σ_k m_k ≤ 1 by construction, and takes one byte a
    position however many experts there are.

    Args:
        candidates: The K experts' tensors, at most 254, with what ranks their positions.
        densities: n_k, the share of all positions that expert k may claim.
        order: The merging order: indices into ``candidates``.

    Returns:
        uint8, of the tensors' shape: the index of the expert that claims the position,
        or ``FREE`` (255) where none does.

    Raises:
        UnscorableError: An expert's score is not finite.
    """
    owner = free_owners(candidates)
    free = owner.numel()
    for k in order:
        count = min(keep_count(densities[k], owner.numel()), free)
        free -= claim_top(owner, k, count, candidates[k])
    return owner
