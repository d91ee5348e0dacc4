"""Rows of different lengths in one forward pass, none of which sees another.

They follow each other in one line, with positions that begin anew with each row. transformers
makes the mask of that which keeps them apart, for most of its decoders; a model that mixes tokens
by other means than attention, or makes its own mask, takes all for one row. No list tells the two
apart, least of all for remote code: so each model is tried once it is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_obim.calibration.capture import CurvatureCapture, input_device
from mergekit_obim.calibration.data.tokens import TokenSequence
from mergekit_obim.calibration.feeding import feed
from mergekit_obim.errors import quoted

# The tokens of the trial's longest row; the others have two thirds and one third of that.
_MOST, _FEWEST = 32, 9
# Passes that the trial takes. Rows of no more lengths than that are not worth it.
_PASSES = 3
# What a token's output may change with other neighbours, relative to its norm. Kernels run on the
# same shapes and so give the same bits, but for a mixture's experts, which get other tokens beside
# it. A leak was 3e-3 and more in every architecture that has one, down to models of 16 features.
_SAME = 1e-5


def packed(rows: Sequence[TokenSequence], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows as one line: ids and positions, int64 [1, tokens of all]."""
    ids = torch.tensor([[token for row in rows for token in row.ids]], device=device)
    places = [torch.arange(len(row.ids), device=device) for row in rows]
    return ids, torch.cat(places)[None]


def why_apart(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> str:
    """Return why rows of different lengths cannot share a pass; empty if they can.

    A short row is run alone, and twice between two others. It has to come out the same, to the
    last bits, beside other neighbours: of other tokens, at the positions where the longest row
    ends (by which some rotary embeddings change their frequencies for the whole pass). And it has
    to come out as if alone, up to the rounding of other kernels; of most tokens, as rounding may
    send some of them to another expert. Each weight has to meet as many rows as alone.

    Args:
        model: In eval mode, on its device or offloaded.
        sequences: All rows, of which the longest without images is tried.
    """
    texts = [row.ids for row in sequences if not row.image_inputs]
    if len({len(ids) for ids in texts}) <= _PASSES:
        return "there are too few lengths"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "it takes no position_ids"
    longest = max(texts, key=len)
    before = longest[: min(_MOST, len(longest) // 2)]  # so that the end of the row is elsewhere
    others = sorted(set(before))
    if len(before) < _FEWEST or len(others) < 2:
        return "there is no row to try it with"
    row, after = before[: len(before) * 2 // 3][::-1], before[: len(before) // 3]
    other = dict(zip(others, others[1:] + others[:1], strict=True))
    try:
        return _differs(model, before, row, after, other, len(longest))
    except Exception as error:  # whatever it was: the run will tell if rows fail alone too
        return f"it fails on them ({quoted(error)})"


def _differs(
    model: PreTrainedModel,
    before: list[int],
    row: list[int],
    after: list[int],
    other: dict[int, int],
    longest: int,
) -> str:
    """Return what a row between two others does not have in common with the row alone."""
    device = input_device(model)
    capture = CurvatureCapture(model)

    def run(ids: list[int], positions: Tensor | None = None) -> tuple[Tensor, dict[str, int], int]:
        capture.reset()
        with capture:
            where = None if positions is None else positions[None].to(device)
            output: Tensor = feed(model, torch.tensor([ids], device=device), None, where)[0]
        state = capture.ledger.state()
        rows = {k: sum(n) if isinstance(n, list) else n for k, n in state["rows"].items()}
        return output, rows | dict.fromkeys(state["unaccounted"], 0), len(ids)

    place, begin, end = torch.arange(longest), len(before), len(before) + len(row)
    positions = torch.cat([place[:begin], place[: len(row)], place[: len(after)]])
    shifted = torch.cat([place[-begin:], positions[begin:]])
    alone, rows, count = run(row)
    among, packed_rows, packed_count = run([*before, *row, *after], positions)
    beside = run([*map(other.__getitem__, before), *row, *map(other.__getitem__, after)], shifted)
    outputs = [(alone, count), (among, packed_count), (beside[0], packed_count)]
    if any(x.ndim != 3 or x.shape[:2] != (1, n) for x, n in outputs):
        return "it does not give an output for each token"
    one = among[0, begin:end].double()
    if not _change(one, beside[0][0, begin:end]).max() <= _SAME:  # so also where it is not a number
        return "in a trial a row depended on its neighbours"
    # The square root is between one rounding and the whole: 9 % in bfloat16, 0.03 % in float32.
    if not _change(one, alone[0]).median() <= torch.finfo(alone.dtype).eps ** 0.5:
        return "in a trial a row did not come out as alone"
    if {k: n * packed_count for k, n in rows.items()} != {
        k: n * count for k, n in packed_rows.items()
    }:
        return "in a trial its weights met other rows"
    return ""


def _change(one: Tensor, other: Tensor) -> Tensor:
    """Return how far two outputs [tokens, …] are apart, for each token, relative to its norm."""
    other = other.double()
    change: Tensor = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-30)
    return change
