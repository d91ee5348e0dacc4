"""Calibration data: rows of a file or data set → token sequences.

``rows``           files and data sets → rows
``text``           one row → text, or messages
``conversations``  the usual forms of messages → one
``template``       messages → text
``images``         a row's images, for the model's processor
``tokens``         text → token ids; packing, hashing, batches
``drawing``        which rows are drawn, and what becomes of each
``self_written``   rows that the expert writes itself, and their file

Everything here is the same on every machine: which rows are drawn, in what order they
stand, and how they are batched. Nothing is ever padded: a batch holds sequences of one
length only, so a measurement depends neither on padding nor on the batch size. Rows with
images run alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergekit_obim.calibration.data.drawing import Drawn, RowReader, draw
from mergekit_obim.calibration.data.images import RowProcessor
from mergekit_obim.calibration.data.rows import load_rows
from mergekit_obim.calibration.data.self_written import opening_of
from mergekit_obim.calibration.data.tokens import TokenSequence, check_room, content_hash, pack
from mergekit_obim.errors import CalibrationError
from mergekit_obim.recipe.calibration import Calibration, DataSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenSequence", "TokenizedCalibration", "prepare"]


@dataclass(frozen=True)
class TokenizedCalibration:
    """What one expert is measured on, and where it is from.

    Attributes:
        sequences: What the model is run on; none is empty. Those with images come last.
        tokens: How many token ids they have together.
        content_hash: sha256 over the sequences and their images, the same on every machine.
        sources: One JSON-able mapping per source: as the recipe has it, with ``rows`` (how
            many it has) and ``sampled`` (how many were taken).
        template: sha256 of the chat template, if one was used.
        date: The date that the chat template was told, if it asked for one.
        warnings: What the user should be told.
    """

    sequences: list[TokenSequence]
    tokens: int
    content_hash: str
    sources: list[dict[str, Any]]
    template: str | None = None
    date: str | None = None
    warnings: list[str] = field(default_factory=list)


def prepare(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    model_label: str,
    limit: int | None = None,
    find_processor: Callable[[], RowProcessor | None] = lambda: None,
    own_rows: Sequence[list[int]] = (),
    *,
    further: int = 0,
) -> TokenizedCalibration:
    """Reads, samples and tokenizes all of an expert's calibration data.

    Args:
        calibration: What the recipe asks for.
        tokenizer: The expert's own.
        model_label: What to call the expert in errors.
        limit: The longest sequence that the model can take, if it has such a limit.
        find_processor: Gives the expert's processor, or None if it takes no images; called only
            if a row has any.
        own_rows: The token ids of the rows that the expert has written, for the source ``self``.
        further: If not 0, how many rows to read beyond those that the calibration asks for, of
            all sources together: rows that no saliency was measured on, as far as there are any.
            What the expert has written is taken as it is.

    Raises:
        CalibrationError: if data can't be read, or has a row that can't be used.
    """
    max_length = min(calibration.max_length, limit or calibration.max_length)
    warnings = []
    if max_length < calibration.max_length:
        warnings.append(
            f"max_length is {max_length}, the longest that the model takes, instead of "
            f"{calibration.max_length}"
        )
    drawn: list[TokenSequence] = []
    sources = []
    read_clock = False
    for source in calibration.sources:
        if source.is_self:
            opening = opening_of(tokenizer, calibration.date)
            drawn += [TokenSequence(ids, opening.template) for ids in own_rows]
            read_clock |= opening.read_clock
            described = source.model_dump(exclude_none=True)
            sources.append({**described, "rows": len(own_rows), "sampled": len(own_rows)})
            continue
        try:
            if not calibration.packing:
                check_room(tokenizer, max_length)
            rows = load_rows(source)
            reader = RowReader(
                model_label,
                rows,
                source,
                tokenizer,
                find_processor,
                max_length,
                calibration.date,
                cut=not calibration.packing,
            )
            share = further * source.samples / sum(one.samples for one in calibration.sources)
            drew = draw(reader, calibration.seed, math.ceil(share))
            found = drew.sequences
        except CalibrationError as error:
            raise CalibrationError(f"{model_label}: {error.message}") from error
        if further:
            warnings += _too_few_rows(source, drew, math.ceil(share))
        elif len(found) < source.samples:
            warnings.append(
                f"{source.data} has {len(found)} usable rows, fewer than the {source.samples} "
                "samples asked for: all are used"
            )
        if reader.ignores_images:
            warnings.append(
                f"{source.data} has images, but the model takes none: only the text is used"
            )
        drawn += found
        read_clock |= reader.read_clock
        described = source.model_dump(exclude_none=True)
        if rows.split is not None:
            described["split"] = rows.split
        sources.append({**described, "rows": len(rows), "sampled": len(found)})

    drawn = [row for row in drawn if row.ids]
    sequences = [row for row in drawn if row.image_inputs is None]
    if calibration.packing:
        packed = pack([row.ids for row in sequences], max_length, tokenizer.eos_token_id)
        sequences = [TokenSequence(ids) for ids in packed]
    sequences += [row for row in drawn if row.image_inputs is not None]
    if not sequences:
        names = ", ".join(source.data for source in calibration.sources)
        raise CalibrationError(
            f"{model_label}: {names}: the tokenizer makes no tokens of it; "
            "check the model's tokenizer files"
        )
    templates = {row.template for row in drawn if row.template is not None}
    return TokenizedCalibration(
        sequences=sequences,
        tokens=sum(len(sequence.ids) for sequence in sequences),
        content_hash=content_hash(sequences),
        sources=sources,
        template=hashlib.sha256("".join(sorted(templates)).encode()).hexdigest()
        if templates
        else None,
        date=calibration.date.isoformat() if read_clock else None,
        warnings=warnings,
    )


def _too_few_rows(source: DataSource, drew: Drawn, wanted: int) -> Iterator[str]:
    """Say so where not as many rows could be set aside as were wanted, or not new ones."""
    kept = len(drew.sequences)
    if drew.shared:
        way_out = "give it more rows"
        if drew.usable > 2 * wanted:
            way_out += f", or measure again with samples: {drew.usable - wanted}"
        yield (
            f"{source.data} has {drew.usable} usable rows and samples: {source.samples}: "
            f"{drew.shared} of the {kept} rows set aside may be among those that were measured; "
            f"{way_out}"
        )
    elif kept < wanted:
        yield (
            f"{source.data} has {kept} usable rows beyond the {source.samples} samples: these are "
            f"set aside, instead of {wanted}"
        )
