"""The exact top share of a tensor's positions, found in about one pass over it.

A sample brackets the threshold. One pass then claims what is surely above the bracket
and sets aside what falls inside it, a percent or two of the tensor; only that is sorted
out exactly. The sample decides how fast this is, never what is selected.
"""

from __future__ import annotations

import math

import torch

from mergekit_obim.errors import UnscorableError
from mergekit_obim.kernels import masked
from mergekit_obim.kernels.blocks import Block, Part, Positions, blocks
from mergekit_obim.kernels.masked import array, assign
from mergekit_obim.kernels.scores import Candidate

# Labels in a uint8 map of owners; experts are numbered from 0.
FREE = 255
_UNDECIDED = 254
MAX_EXPERTS = 254

_SAMPLE = 1 << 16


def claim_top(owner: torch.Tensor, label: int, count: int, candidate: Candidate) -> int:
    """Label the ``count`` best free positions of a tensor; ties go to the lowest flat index.

    Algorithm 1's step for one expert: exclude what is already in the merged mask, take
    the top of what is left. Positions that score zero are never labelled, so fewer than
    ``count`` may be.

    Args:
        owner: uint8, contiguous, of the tensor's shape; ``FREE`` where nothing was
            claimed yet. Changed in place.
        label: Written where this expert claims, 0 … 253.
        count: How many positions to claim at most.
        candidate: The expert's tensor, the base's, and what ranks the positions.

    Returns:
        The number of positions labelled.

    Raises:
        UnscorableError: A score is not a finite number.
    """
    total = owner.numel()
    if count <= 0 or total == 0:
        return 0
    if total > 4 * _SAMPLE:
        claimed = _claim_between(owner, label, count, candidate, *_bracket(owner, count, candidate))
        if claimed is not None:
            return claimed
        # The sample misled (values in clumps): give back what was labelled and look at all.
        _relabel(owner, label, FREE)
        _relabel(owner, _UNDECIDED, FREE)
    claimed = _claim_between(owner, label, count, candidate, 0.0, math.inf)
    assert claimed is not None
    return claimed


def _bracket(owner: torch.Tensor, count: int, candidate: Candidate) -> tuple[float, float]:
    """Two scores that the ``count``-th highest free score very likely lies between.

    Five standard deviations of the sample's rank on either side.
    """
    total = owner.numel()
    # A fixed odd multiplier scatters the sample over rows and columns; a plain stride
    # could hit the same few columns of every row.
    flat = torch.arange(_SAMPLE, device=owner.device) * 0x5851F42D4C957F2D
    sample = Positions((flat & ((1 << 62) - 1)) % total)
    scores = _free_scores(candidate, sample, sample.of(owner))
    ranked = scores.sort(descending=True).values
    rank = count / total * _SAMPLE
    margin = 5 * math.sqrt(max(rank * (1 - count / total), 1.0)) + 1
    high, low = int(rank - margin), int(rank + margin)
    return (
        float(ranked[low]) if low < _SAMPLE else 0.0,
        float(ranked[high]) if high >= 0 else math.inf,
    )


def _claim_between(
    owner: torch.Tensor, label: int, count: int, candidate: Candidate, low: float, high: float
) -> int | None:
    """Claim every free score above ``high`` and the best in [low, high]; None if that misses."""
    wanted = count
    undecided: list[tuple[Block, torch.Tensor]] = []
    for block in blocks(owner.shape, owner.device):
        owned = block.of(owner)
        scores = _free_scores(candidate, block, owned)
        ranked = array(scores)
        sure = ranked > high
        assign(owned, label, where=sure)
        wanted -= masked.count(sure)
        # What scores zero is in no bracket.
        maybe = (ranked >= low if low > 0 else ranked > 0) ^ sure
        assign(owned, _UNDECIDED, where=maybe)
        undecided.append((block, masked.take(scores, maybe)))
    found = sum(len(scores) for _, scores in undecided)
    if wanted < 0 or (wanted > found and low > 0):
        return None
    if wanted >= found:
        _relabel(owner, _UNDECIDED, label)
        return count - wanted + found
    threshold, ties = _kth_largest(torch.cat([scores for _, scores in undecided]), wanted)
    for block, scores in undecided:
        owned = block.of(owner)
        tied = scores == threshold
        keep = (scores > threshold) | (tied & (tied.cumsum(0) <= ties))
        ties -= min(ties, int(tied.count_nonzero()))
        masked.put(owned, array(owned) == _UNDECIDED, torch.where(keep, label, FREE))
    return count


def _relabel(owner: torch.Tensor, old: int, new: int) -> None:
    for block in blocks(owner.shape, owner.device):
        owned = block.of(owner)
        assign(owned, new, where=array(owned) == old)


def _free_scores(candidate: Candidate, part: Part, owned: torch.Tensor) -> torch.Tensor:
    """Scores of a part, zero where a position is taken."""
    scores = masked.keep(candidate.scores(part), where=array(owned) == FREE)
    # One reduction finds NaN and infinity alike: both survive a maximum.
    if not math.isfinite(float(scores.amax())):
        raise UnscorableError("the task vector or its saliency is not finite")
    return scores


def _kth_largest(values: torch.Tensor, k: int) -> tuple[float, int]:
    """The k-th largest of ``values`` and how many of its equals are among the k largest.

    ``values`` may be reordered. 0 means none: an infinite threshold.
    """
    if k == 0:
        return math.inf, 0
    if values.device.type == "cpu":
        # numpy's partition is vectorised and works in place; torch's kthvalue copies and
        # took five times as long.
        array(values).partition(len(values) - k)
        threshold = float(values[len(values) - k])
    else:
        threshold = float(values.kthvalue(len(values) - k + 1).values)
    return threshold, k - int((values > threshold).count_nonzero())
