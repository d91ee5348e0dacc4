"""What teachers say on their rows, and how far a model is from it.

A teacher is run once. Of each of its distributions the likeliest tokens are kept, and the rest as
one (:mod:`mergekit_obim.kernels.divergence`), in the CPU's memory: 8 bytes for each of 256 tokens
are 2 KiB a position, 33 MB for 32 rows of 512 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from mergekit_obim.calibration.capture import input_device
from mergekit_obim.calibration.data import TokenSequence
from mergekit_obim.calibration.data.images import placeholders
from mergekit_obim.calibration.data.tokens import next_batch
from mergekit_obim.calibration.feeding import feed
from mergekit_obim.calibration.memory import most_tokens, out_of_memory
from mergekit_obim.errors import CalibrationError, DeviceMemoryError, ObimError, quoted
from mergekit_obim.kernels.divergence import TopTokens, divergence, top_tokens

# Logits of a forward pass: with a vocabulary of 128,000 tokens, `auto` runs 2,097 tokens at once.
_LOGITS = 1 << 28
# Of a part of a row that is compared at once, so that its temporary copies stay small beside them.
_COMPARED = 1 << 25

BatchSize = int | Literal["auto"]


@dataclass(frozen=True)
class Score:
    """How a model does on a teacher's rows.

    Attributes:
        divergence: KL(teacher ‖ model), in nats per position.
        loss: The cross-entropy of the rows' own next tokens, in nats per token; None where the
            model predicts none (an encoder).
    """

    divergence: float
    loss: float | None


@dataclass(frozen=True)
class Teacher:
    """Rows, and what their teacher says on them.

    Attributes:
        label: What to call it: the expert as the recipe names it, or ``guard``.
        sequences: The rows, the longest first.
        tops: The teacher's distributions, one entry for each row.
        loss: The teacher's own loss on the rows, in nats per token; None as in :class:`Score`.
    """

    label: str
    sequences: list[TokenSequence]
    tops: list[TopTokens]
    loss: float | None


def teach(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    *,
    label: str,
    batch_size: BatchSize,
    likeliest: int,
    quiet: bool,
) -> Teacher:
    """Run a teacher on its rows, and keep what it says.

    Args:
        model: The teacher, in eval mode.
        sequences: Its rows, in any order.
        label: What to call it.
        batch_size: Sequences per forward pass.
        likeliest: How many tokens to keep at each position.
        quiet: Show no progress.

    Raises:
        CalibrationError: The model has no predictions, or they are not finite; or no row has any.
        DeviceMemoryError: Its activations do not fit.
    """
    ordered = sorted(sequences, key=lambda row: len(row.ids), reverse=True)
    tops: list[TopTokens] = []
    losses: list[float] = []
    positions = 0
    for said in _run(model, ordered, label, batch_size, f"Asking {label}", quiet):
        parts = [top_tokens(part, likeliest).to("cpu") for part in _parts(said.logits)]
        top = TopTokens(*(torch.cat(ones) for ones in zip(*map(_fields, parts), strict=True)))
        if top.logs.isnan().any():
            raise CalibrationError(
                f"model {label}: its predictions are not finite numbers; try --dtype float32"
            )
        tops.append(top)
        losses += [_loss(said)] if said.targets is not None else []
        positions += len(said.logits)
    if not positions:
        raise CalibrationError(f"model {label}: none of its rows has a token after another")
    return Teacher(label, ordered, tops, sum(losses) / positions if losses else None)


def score(
    model: PreTrainedModel,
    teacher: Teacher,
    *,
    label: str,
    batch_size: BatchSize,
    quiet: bool = True,
) -> Score:
    """Run a model on a teacher's rows, and compare what it says.

    Args:
        model: The model, in eval mode, which numbers tokens as the teacher does.
        teacher: The rows, and what the teacher says on them.
        label: What to call the model in errors.
        batch_size: Sequences per forward pass.
        quiet: Show no progress.

    Returns:
        The means over all positions; inf or NaN where the model's predictions are not finite.

    Raises:
        CalibrationError: The model has no predictions, or lacks tokens that the teacher has.
        DeviceMemoryError: Its activations do not fit.
    """
    divergences: list[float] = []
    losses: list[float] = []
    positions = 0
    title = f"{label} on {teacher.label}"
    said_of = zip(
        _run(model, teacher.sequences, label, batch_size, title, quiet), teacher.tops, strict=True
    )
    for said, top in said_of:
        if top.ids.numel() and int(top.ids.max()) >= said.logits.shape[-1]:
            raise CalibrationError(
                f"model {label}: predicts {said.logits.shape[-1]} tokens, and {teacher.label} says "
                f"{int(top.ids.max())}: their vocabularies differ, so they cannot be compared"
            )
        start = 0
        for part in _parts(said.logits):
            rows = slice(start, start + len(part))
            theirs = TopTokens(*(one[rows] for one in _fields(top))).to(part.device)
            divergences.append(float(divergence(theirs, part).double().sum()))
            start += len(part)
        losses += [_loss(said)] if said.targets is not None else []
        positions += len(said.logits)
    loss = sum(losses) / positions if losses else None
    return Score(sum(divergences) / positions, loss)


@dataclass(frozen=True)
class _Said:
    """A model's predictions on one row: logits [n, V], and the tokens that follow, [n]."""

    logits: Tensor
    targets: Tensor | None


def _run(
    model: PreTrainedModel,
    ordered: Sequence[TokenSequence],
    label: str,
    batch_size: BatchSize,
    title: str,
    quiet: bool,
) -> Iterator[_Said]:
    """Yield the model's predictions row by row; the rows are ordered, the longest first."""
    device = input_device(model)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 1
    tokens = min(most_tokens(model, device), max(1, _LOGITS // vocabulary))
    total, done = sum(len(row.ids) for row in ordered), 0
    with tqdm(total=total, desc=title, unit="tok", disable=quiet) as progress:
        while done < len(ordered):
            longest = len(ordered[done].ids)
            size = max(1, tokens // longest) if batch_size == "auto" else batch_size
            rows = next_batch(ordered, done, size)
            logits = _logits(model, rows, device, label, may_not=batch_size == "auto")
            if logits is None:
                tokens = len(rows) // 2 * longest
                clear_device_cache(garbage_collection=True)
                continue
            for row, own in zip(rows, logits, strict=True):
                yield _predictions(model, row, own)
            done += len(rows)
            progress.update(len(rows) * longest)


def _logits(
    model: PreTrainedModel,
    rows: Sequence[TokenSequence],
    device: torch.device,
    label: str,
    *,
    may_not: bool,
) -> Tensor | None:
    """Return the logits of a batch; None if memory does not suffice for it, but may for less."""
    ids = torch.tensor([row.ids for row in rows], device=device)
    images = rows[0].image_inputs() if rows[0].image_inputs else None
    try:
        with torch.no_grad():
            logits: Tensor | None = getattr(feed(model, ids, images), "logits", None)
    except ObimError:
        raise
    except Exception as error:  # each model's forward pass has errors of its own
        if not out_of_memory(error):
            raise CalibrationError(
                f"model {label}: its forward pass failed on rows that were set aside: "
                f"{quoted(error)}"
            ) from error
        if may_not and len(rows) > 1:
            return None
        raise DeviceMemoryError(
            f"model {label}: its activations do not fit {device}; try --batch-size 1, a smaller "
            "--max-length, or --device-map auto with --max-memory"
        ) from error
    if logits is None:
        raise CalibrationError(
            f"model {label}: is a {type(model).__name__}, which predicts nothing that could be "
            "compared: name a checkpoint with its head"
        )
    return logits if logits.ndim > 2 else logits.unsqueeze(1)  # a classifier's


def _predictions(model: PreTrainedModel, row: TokenSequence, logits: Tensor) -> _Said:
    """Return a row's predictions, of logits [tokens, V], without those of nothing.

    The last token's prediction has no token after it, and what follows the token that stands for
    an image is a piece of the image.
    """
    if not model.can_generate() or len(logits) != len(row.ids):
        return _Said(logits, None)
    targets = torch.tensor(row.ids, device=logits.device)
    if not hasattr(model, "prepare_decoder_input_ids_from_labels"):  # else the input was shifted
        logits, targets = logits[:-1], targets[1:]
    if images := placeholders(model.config):
        text = ~torch.isin(targets, torch.tensor(sorted(images), device=logits.device))
        logits, targets = logits[text], targets[text]
    return _Said(logits, targets)


def _parts(logits: Tensor) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = logits.split(max(1, _COMPARED // logits.shape[-1]))
    return parts


def _loss(said: _Said) -> float:
    assert said.targets is not None
    kind = torch.float64 if said.logits.dtype == torch.float64 else torch.float32
    parts = _parts(said.logits)
    pairs = zip(parts, said.targets.split([len(part) for part in parts]), strict=True)
    losses = (F.cross_entropy(part.to(kind), own, reduction="sum") for part, own in pairs)
    return sum(float(loss.double()) for loss in losses)


def _fields(top: TopTokens) -> tuple[Tensor, Tensor, Tensor]:
    return top.ids, top.logs, top.rest
