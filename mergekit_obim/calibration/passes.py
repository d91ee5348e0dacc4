"""Running every calibration sequence through the model once.

Nothing is kept of a batch but its sums.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from accelerate.utils.memory import clear_device_cache
from tqdm import tqdm
from transformers import BatchFeature, PreTrainedModel

from mergekit_obim.calibration.capture import Columns, CurvatureCapture, input_device
from mergekit_obim.calibration.data.tokens import TokenSequence, next_batch, next_packed
from mergekit_obim.calibration.feeding import feed
from mergekit_obim.calibration.memory import most_tokens, out_of_memory, packed_tokens
from mergekit_obim.calibration.packing import packed, why_apart
from mergekit_obim.calibration.ranks import Ranks
from mergekit_obim.calibration.resume import Checkpoint, Sums

LOG = logging.getLogger("mergekit_obim")


def run_through(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    *,
    label: str,
    batch_size: int | Literal["auto"],
    checkpoint: Checkpoint,
    ranks: Ranks,
    quiet: bool,
    columns: Columns = 0,
    budget: float = math.inf,
    done: Collection[str] = (),
) -> CurvatureCapture:
    """Run the model over this process's share of the data, from the checkpoint on if there is one.

    The longest sequences come first, so that memory runs out at the start or not at all. Those of
    one length make a batch; where more of different lengths fit one pass, these are packed, if the
    model keeps them apart.

    Args:
        model: In eval mode.
        sequences: What to run, in any order.
        label: What to call the model.
        batch_size: Sequences per forward pass. With `auto`, as many as fit: where memory runs
            out, half as many are tried, from there on.
        checkpoint: Where sums are saved now and then.
        ranks: The processes that share the sequences. The first alone shows anything.
        quiet: Show no progress.
        columns: How many columns of the Gram matrices are measured beside h.
        budget: With ``full``, the most bytes that Gram matrices may take.
        done: With ``full``, weights whose Gram matrix an earlier run has measured.

    Returns:
        The capture, with the sums over all sequences, of all processes.

    Raises:
        CalibrationError: Activations are not finite.
        SaliencyFileError: The checkpoint cannot be written.
        OtherProcessError: Another process has failed.
        Exception: Whatever the model's forward pass raises.
    """
    capture = CurvatureCapture(model, skip_logits=True, columns=columns, budget=budget, done=done)
    device = input_device(model)
    ordered = ranks.share(sorted(sequences, key=lambda row: len(row.ids), reverse=True))
    quiet = quiet or not ranks.first
    total = sum(len(row.ids) for row in ordered)
    first = len(ordered[0].ids) if ordered else 0
    ran, tokens = 0, most_tokens(model, device)
    sums, unusable = checkpoint.load()
    if sums is not None:
        ran, tokens = sums.done, min(tokens, sums.tokens)
        capture.ledger.load_state(sums.state)
        del sums  # its tensors are the file's, mapped
    elif unusable and ranks.first:
        line = f"Warning: {label}: starting over: the sums of an interrupted run {unusable}"
        tqdm.write(line, file=sys.stderr)
    apart = why_apart(model, sequences) if batch_size != 1 else "batch_size is 1"
    if apart and len({len(row.ids) for row in ordered}) > 1:
        LOG.info("%s: rows of different lengths do not share passes: %s", label, apart)
    gone = sum(len(row.ids) for row in ordered[:ran])
    if ran and not quiet:
        tqdm.write(f"{label}: goes on after {gone:,} tokens of an interrupted run", sys.stderr)
    with tqdm(
        total=total, initial=gone, desc=f"Measuring {label}", unit="tok", disable=quiet
    ) as progress:
        while ran < len(ordered):
            longest = len(ordered[ran].ids)
            size = max(1, tokens // longest) if batch_size == "auto" else batch_size
            rows = next_batch(ordered, ran, size)
            if not apart:
                auto = batch_size == "auto"
                most = packed_tokens(tokens if auto else size * first, first)
                mixed = next_packed(ordered, ran, most, len(ordered) if auto else size)
                rows = max(rows, mixed, key=len)  # the batch where it is as large
            positions = None
            if len(rows[-1].ids) == longest:
                ids = torch.tensor([row.ids for row in rows], device=device)
            else:
                ids, positions = packed(rows, device)
            images = rows[0].image_inputs() if rows[0].image_inputs else None
            may_not = batch_size == "auto" and len(rows) > 1
            if not _fits(model, ids, images, positions, capture, may_not=may_not):
                tokens = len(rows) // 2 * (ids.numel() // len(rows))
                LOG.info("%s: %d tokens do not fit, trying %d", label, ids.numel(), tokens)
                if columns == "full":  # of which there is no copy to go back to
                    capture.reset()
                    ran = 0
                    progress.reset()
                clear_device_cache(garbage_collection=True)
                continue
            ranks.check()
            ran += len(rows)
            progress.update(ids.numel())
            # What another run over the data goes on from has to outlive this one.
            if checkpoint.due() or (ran == len(ordered) and capture.ledger.later):
                checkpoint.save(Sums(ran, tokens, capture.ledger.state()))
    ranks.all_reduce(capture.ledger)
    return capture


def _fits(
    model: PreTrainedModel,
    ids: torch.Tensor,
    images: BatchFeature | None,
    positions: torch.Tensor | None,
    capture: CurvatureCapture,
    *,
    may_not: bool,
) -> bool:
    """Run a batch, and return whether memory sufficed; if not, nothing of it was counted."""
    try:
        with capture:  # which turns gradients off
            feed(model, ids, images, positions)
    except Exception as error:
        if not may_not or not out_of_memory(error):
            raise
        return False  # which lets go of the error, and so of the activations
    return True
