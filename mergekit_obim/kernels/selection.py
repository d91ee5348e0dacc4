"""The exact top share of a tensor's positions, found in about one pass over it.

A third of 8 million bf16 weights is claimed in 22 ms on one core, scores included. With their
scores at hand in float32, sorting these would take 300 ms, ``torch.kthvalue`` 160 and numpy's
partition 60. The threshold is found by a sample instead, as Floyd and Rivest's SELECT does
(CACM 18, 1975):

1. ``_bracket``: a sample gives two scores that the threshold very likely lies between.
2. ``_claim_between``: one pass claims what is surely above the bracket and sets aside what falls
   inside it, a few percent of the tensor; only that is selected from exactly.
3. ``_threshold_by_digits``, where the bracket missed or scores clump so that too many fall inside:
   the threshold's bits, 16 at a time, from histograms of all scores; then ``_claim_above`` it.

The sample decides how fast this is, never what is selected. Scores are computed anew in each pass,
in the caches, and never kept: as a whole they would take twice the memory of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mergekit_obim.errors import UnscorableError
from mergekit_obim.kernels import backend
from mergekit_obim.kernels.backend import Array, Mask, array
from mergekit_obim.kernels.blocks import Positions, blocks, scratch
from mergekit_obim.kernels.scores import Candidate, working_dtype

# Labels in a uint8 map of owners; experts are numbered from 0.
FREE = 255
MAX_EXPERTS = 254

# The sample: 32,768 scores. Drawn one by one they would give ranks to 0.3 % of the tensor; they are
# drawn in runs of neighbours, which share cache lines.
_RUNS = 512
_RUN_LENGTH = 64
# What is set aside takes 8 bytes a position and a copy to sort: with this share at most, 1.5
# bytes a position of the tensor. Sorting more than that would not be faster than counting.
_LARGEST_SHARE = 1 / 8


def all_free(base: torch.Tensor) -> torch.Tensor:
    """Return a map of owners on which all of a tensor's positions are ``FREE``.

    Args:
        base: Gives shape and device.

    Returns:
        uint8, contiguous, of the tensor's shape. One byte a position, however many experts there
        are, where K masks of bool would take K.
    """
    return torch.empty(base.shape, dtype=torch.uint8, device=base.device).fill_(FREE)


def claim_top(owner: torch.Tensor, label: int, count: int, candidate: Candidate) -> int:
    """Label the ``count`` best free positions of a tensor; ties go to the lowest flat index.

    This is algorithm 1's step for one expert (arXiv 2502.12217, section 3.2): exclude what is
    already in the merged mask, take the top of what is left. Positions that score zero are never
    labelled, so fewer than ``count`` may be.

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
    count = min(count, total)
    if count <= 0:
        return 0
    # Of a small tensor everything is in the bracket: it is sorted out at once.
    low, high, limit = 0.0, math.inf, total
    if total > 4 * _RUNS * _RUN_LENGTH:
        low, high = _bracket(owner, count, candidate)
        limit = int(total * _LARGEST_SHARE)
    if low == high:  # so many scores are equal that setting them aside would take the whole tensor
        claimed = _claim_above(owner, label, count, candidate, low)
    else:
        claimed = _claim_between(owner, label, count, candidate, low, high, limit)
    if claimed is None:
        threshold = _threshold_by_digits(owner, count, candidate)
        claimed = _claim_above(owner, label, count, candidate, threshold)
        assert claimed is not None
    return claimed


def _walk(owner: torch.Tensor, candidate: Candidate) -> Iterator[tuple[Array, Array, Mask, Mask]]:
    """Go through a tensor block by block, flattened.

    Yields:
        Of each block [n] the owners (uint8, a view), the scores (in the working dtype), which
        positions are free (bool), and another bool array for the caller's own use. All but the
        owners lie in memory that the next block is going to use, and may be written to.
    """
    xp, flat = backend.namespace(owner.device), owner.view(-1)
    dtype, size = working_dtype(candidate.base.dtype), 0
    for block in blocks(owner.shape, owner.device):
        if size != block.of(owner).numel():
            size = block.of(owner).numel()
            memory = scratch("scores", size, dtype, owner.device)
            free, spare = (
                array(scratch(name, size, torch.bool, owner.device)) for name in ("free", "spare")
            )
        scores = candidate.scores(block, memory).view(-1)
        _check_finite(scores)
        owned = array(flat[block.start : block.start + size])
        # FREE is the highest label.
        yield owned, array(scores), xp.greater_equal(owned, FREE, out=free), spare


def _check_finite(scores: torch.Tensor) -> None:
    # One reduction finds NaN and infinity alike: both survive a maximum. Scores are not negative.
    if not math.isfinite(float(array(scores).max())):
        raise UnscorableError("the task vector or its saliency is not finite")


def _bracket(owner: torch.Tensor, count: int, candidate: Candidate) -> tuple[float, float]:
    """Estimate two scores that the ``count``-th highest free score very likely lies between.

    They are three standard deviations of the sample's rank apart on either side: in one call of
    400 it does not, and the caller has to look again.

    Returns:
        The lower and the upper score; 0 and infinity where the sample says nothing.
    """
    total = owner.numel()
    # A fixed odd multiplier (Knuth's MMIX generator's) scatters the runs over rows and columns, the
    # same on every machine; a plain stride could hit the same few columns of every row.
    runs = torch.arange(_RUNS, device=owner.device) * 0x5851F42D4C957F2D
    first = (runs & ((1 << 62) - 1)) % (total - _RUN_LENGTH)
    sample = Positions((first[:, None] + torch.arange(_RUN_LENGTH, device=owner.device)).view(-1))
    scores = candidate.scores(sample)
    _check_finite(scores)
    scores *= sample.of(owner) == FREE
    ranked = backend.sort_descending(scores)
    rank = count * len(ranked) // total
    # Neighbours are alike, as they share a row's δ or a column's h, so they are no independent
    # draws: the deviation is that of whole runs.
    above = (scores >= ranked[min(rank, len(ranked) - 1)]).view(_RUNS, _RUN_LENGTH).sum(1)
    margin = int(3 * math.sqrt(_RUNS * float(above.double().var(correction=0)))) + 5
    low, high = rank + margin, rank - margin
    return (
        float(ranked[low]) if low < len(ranked) else 0.0,
        float(ranked[high]) if high >= 0 else math.inf,
    )


def _claim_between(
    owner: torch.Tensor,
    label: int,
    count: int,
    candidate: Candidate,
    low: float,
    high: float,
    limit: int,
) -> int | None:
    """Claim every free score above ``high`` and the best in [low, high].

    Returns:
        How many were claimed, or None, with nothing claimed, if the threshold is not in
        between or more than ``limit`` scores are.
    """
    xp = backend.namespace(owner.device)
    reaches = xp.greater_equal if low > 0 else xp.greater  # what scores zero is in no bracket
    wanted, held = count, 0
    undecided: list[tuple[Array, Array, Array]] = []
    for owned, scores, free, mask in _walk(owner, candidate):
        maybe = reaches(scores, low, out=mask)
        maybe &= free
        sure = xp.greater(scores, high, out=free)
        sure &= maybe  # low <= high, so they are free
        maybe ^= sure
        wanted -= backend.count_nonzero(sure)
        backend.relabel(owned, sure, FREE, label)
        where = backend.flatnonzero(maybe)
        undecided.append((owned, where, scores[where]))
        held += len(where)
        if wanted < 0 or held > limit:
            break  # the bracket lies too low, or too much is in it
    if wanted < 0 or held > limit or (wanted > held and low > 0):
        _give_back(owner, label)
        return None
    # With low = 0 everything that is not zero was counted: there may be less than is wanted.
    missing = max(wanted - held, 0)
    threshold, surplus = backend.kth_largest([scores for *_, scores in undecided], wanted - missing)
    for owned, where, scores in undecided:
        owned[where[scores >= threshold]] = label
    # Ties go to the lowest flat index, so the surplus is taken back from the end.
    for owned, where, scores in reversed(undecided):
        if not surplus:
            break
        tied = where[scores == threshold][-surplus:]
        owned[tied] = FREE
        surplus -= len(tied)
    return count - missing


def _claim_above(
    owner: torch.Tensor, label: int, count: int, candidate: Candidate, threshold: float
) -> int | None:
    """Claim every free score above the threshold and the first of those equal to it.

    Returns:
        How many were claimed, or None, with nothing claimed, if it is not the threshold.
    """
    xp = backend.namespace(owner.device)
    wanted, ties = count, 0
    for owned, scores, free, mask in _walk(owner, candidate):
        sure = xp.greater(scores, threshold, out=mask)
        sure &= free
        wanted -= backend.count_nonzero(sure)
        backend.relabel(owned, sure, FREE, label)
        if threshold > 0:
            tied = xp.greater_equal(scores, threshold, out=mask)
            tied &= xp.greater_equal(owned, FREE, out=free)
            ties += backend.count_nonzero(tied)
    if wanted < 0 or (wanted > ties and threshold > 0):
        _give_back(owner, label)
        return None
    missing = max(wanted - ties, 0)
    left = wanted - missing
    for owned, scores, free, _ in _walk(owner, candidate) if left else ():
        first = backend.flatnonzero((scores == threshold) & free)[:left]
        owned[first] = label
        left -= len(first)
        if not left:
            break
    return count - missing


def _threshold_by_digits(owner: torch.Tensor, count: int, candidate: Candidate) -> float:
    """Return the ``count``-th highest free score, or 0 if fewer are not zero, by a radix select.

    The bits of a non-negative float sort like the integer they spell. 16 bits at a time,
    from the highest, a histogram tells which digit the threshold has: two passes for float32,
    four for float64, whatever the scores are.
    """
    dtype = working_dtype(candidate.base.dtype)
    prefix, wanted = 0, count
    highest = 8 * dtype.itemsize - 16
    for shift in range(highest, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=owner.device)
        for _, scores, free, _ in _walk(owner, candidate):
            scores *= free  # what is not free counts as zero, the lowest
            spelled = backend.bits(torch.as_tensor(scores))
            if shift < highest:
                spelled = spelled[spelled >> shift >> 16 == prefix]
            counts += torch.as_tensor(backend.bincount(spelled >> shift & 0xFFFF, 1 << 16))
        reached = counts.flip(0).cumsum(0)
        below = int((reached < wanted).sum())
        wanted -= int(reached[below - 1]) if below else 0
        prefix = prefix << 16 | (0xFFFF - below)
    word = torch.tensor([prefix], dtype=torch.int32 if dtype == torch.float32 else torch.int64)
    return float(word.view(dtype))


def _give_back(owner: torch.Tensor, label: int) -> None:
    """Free every position that a label was written to."""
    flat = owner.view(-1)
    for block in blocks(flat.shape, flat.device):
        owned = array(block.of(flat))
        backend.relabel(owned, owned == label, label, FREE)
