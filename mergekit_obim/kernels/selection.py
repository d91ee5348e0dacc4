"""The exact top share of a tensor's positions, found in about one pass over it.

A sample brackets the threshold. One pass then claims what is surely above the bracket
and sets aside what falls inside it, a percent or two of the tensor; only that is sorted
out exactly. The sample decides how fast this is, never what is selected.
"""

from __future__ import annotations

import math

import torch

from mergekit_obim.errors import UnscorableError
from mergekit_obim.kernels.blocks import Positions, blocks
from mergekit_obim.kernels.scores import Candidate, working_dtype

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
        owner.masked_fill_((owner == label) | (owner == _UNDECIDED), FREE)
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
    scores = candidate.scores(sample).masked_fill_(sample.of(owner) != FREE, 0)
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
    dtype = working_dtype(candidate.base.dtype)
    # Only the part that is written to takes memory.
    inside = torch.empty(owner.numel(), dtype=dtype, device=owner.device)
    above = undecided = 0
    for block in blocks(owner.shape, owner.device):
        owned = block.of(owner)
        scores = candidate.scores(block).masked_fill_(owned != FREE, 0)
        _check_finite(scores)
        sure = scores > high
        owned.masked_fill_(sure, label)
        above += int(sure.count_nonzero())
        maybe = (scores >= low).logical_and_(scores > 0).logical_and_(~sure)
        owned.masked_fill_(maybe, _UNDECIDED)
        values = scores[maybe]
        inside[undecided : undecided + len(values)] = values
        undecided += len(values)
    wanted = count - above
    if wanted < 0 or (wanted > undecided and low > 0):
        return None
    if wanted >= undecided:
        owner.masked_fill_(owner == _UNDECIDED, label)
        return above + undecided
    threshold, ties = _kth_largest(inside[:undecided], wanted)
    for block in blocks(owner.shape, owner.device):
        owned = block.of(owner)
        open_ = owned.reshape(-1) == _UNDECIDED
        positions = open_.nonzero().squeeze(-1)
        if not len(positions):
            continue
        scores = candidate.scores(Positions(positions + block.start))
        tied = scores == threshold
        keep = (scores > threshold) | (tied & (tied.cumsum(0) <= ties))
        ties -= min(ties, int(tied.count_nonzero()))
        labels = torch.where(keep, label, FREE).to(torch.uint8)
        owned.view(-1)[positions] = labels
    return count


def _kth_largest(values: torch.Tensor, k: int) -> tuple[float, int]:
    """The k-th largest of ``values`` and how many of its equals are among the k largest.

    ``values`` may be reordered. 0 means none: an infinite threshold.
    """
    if k == 0:
        return math.inf, 0
    if values.device.type == "cpu":
        # numpy's partition is vectorised and works in place; torch's kthvalue copies and
        # took five times as long.
        array = values.numpy()
        array.partition(len(array) - k)
        threshold = float(array[len(array) - k])
    else:
        threshold = float(values.kthvalue(len(values) - k + 1).values)
    return threshold, k - int((values > threshold).count_nonzero())


def _check_finite(scores: torch.Tensor) -> None:
    # One reduction finds NaN and infinity alike: both survive a maximum.
    if not math.isfinite(float(scores.amax())):
        raise UnscorableError("the task vector or its saliency is not finite")
