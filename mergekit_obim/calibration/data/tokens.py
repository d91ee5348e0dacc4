"""Token sequences: how text becomes one, how they are packed, hashed and batched."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_obim.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenSequence:
    """One sequence of tokens that the model is run on, and the images that belong to it.

    Attributes:
        ids: The token ids.
        template: The chat template that wrote its text, if one did.
        image_inputs: Makes what the model is given beside the ids, where the row has images. The
            pixels are not kept: a row's can take more memory than all tokens together.
        image_hash: A hash of its images and of how the processor is to show them.
    """

    ids: list[int]
    template: str | None = None
    image_inputs: Callable[[], BatchFeature] | None = None
    image_hash: bytes = b""


def check_room(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Checks that ``max_length`` leaves room for more than special tokens.

    Raises:
        CalibrationError: It does not.
    """
    room = tokenizer.num_special_tokens_to_add()
    if max_length <= room:
        raise CalibrationError(
            f"max_length {max_length} leaves no room beside the {room} special tokens that the "
            "tokenizer adds; raise it"
        )


def tokenize(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    template: str | None = None,
) -> TokenSequence:
    """Returns the token sequence of a text, empty if the tokenizer makes nothing of it.

    Args:
        text: The text that the model is shown.
        tokenizer: The tokenizer of the model.
        max_length: Where the sequence is cut, special tokens counted; ``None`` cuts nothing.
        template: The chat template that wrote the text. It has put special tokens in already, so
            that none are added; to other text, the tokenizer adds its own.

    Raises:
        CalibrationError: The tokenizer is random.
    """
    with cuts_the_end(tokenizer):
        # Cut by the tokenizer, which keeps a closing token such as BERT's [SEP].
        ids, again = (
            tokenizer(
                text,
                add_special_tokens=template is None,
                truncation=max_length is not None,
                max_length=max_length,
                padding=False,
                verbose=False,
            )["input_ids"]
            for _ in range(2)
        )
    if ids != again:  # BPE with dropout, SentencePiece with sampling: for training a model
        raise CalibrationError(
            "the tokenizer makes other tokens of the same text each time; set dropout to null in "
            "its tokenizer.json, or enable_sampling to false in its tokenizer_config.json"
        )
    return TokenSequence([int(token) for token in ids], template)


@contextmanager
def cuts_the_end(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Makes a tokenizer cut long texts at their end, whatever its files say.

    The files of some chat models say ``left``: of a long row, these would be measured on the end,
    and other experts on the beginning.
    """
    side = tokenizer.truncation_side
    tokenizer.truncation_side = "right"
    try:
        yield
    finally:
        tokenizer.truncation_side = side


def pack(sequences: Iterable[Sequence[int]], length: int, separator: int | None) -> list[list[int]]:
    """Joins sequences into segments of exactly ``length`` tokens.

    The incomplete segment at the end is dropped, unless there is no other.

    Args:
        sequences: Token ids.
        length: Tokens per segment.
        separator: Put between two sequences, unless the first ends in it already.
    """
    stream: list[int] = []
    for sequence in sequences:
        if stream and separator is not None and stream[-1] != separator:
            stream.append(separator)
        stream += sequence
    whole = max(len(stream) - len(stream) % length, min(len(stream), length))
    return [stream[start : start + length] for start in range(0, whole, length)]


def content_hash(sequences: Iterable[TokenSequence]) -> str:
    """Returns the sha256 over each sequence's length and token ids, as little-endian int64.

    The hash of a sequence's images, if it has any, follows its token ids.
    """
    digest = hashlib.sha256()
    for sequence in sequences:
        ids = sequence.ids
        digest.update(struct.pack(f"<{len(ids) + 1}q", len(ids), *ids))
        digest.update(sequence.image_hash)
    return digest.hexdigest()


def next_batch(ordered: Sequence[TokenSequence], start: int, size: int) -> Sequence[TokenSequence]:
    """Returns the sequences from ``start`` on that make a batch: up to ``size``, all of one length.

    A sequence with images is a batch of its own.

    Args:
        ordered: All sequences, sorted by length.
        start: The index of the first one of the batch.
        size: The largest number of sequences in a batch, at least 1.
    """
    if size < 1:
        raise ValueError(f"size should be at least 1, found {size}")
    end = start + 1
    while (
        end < min(start + size, len(ordered))
        and len(ordered[end].ids) == len(ordered[start].ids)
        and not any(sequence.image_inputs for sequence in ordered[end - 1 : end + 1])
    ):
        end += 1
    return ordered[start:end]


def next_packed(
    ordered: Sequence[TokenSequence], start: int, tokens: int, size: int
) -> Sequence[TokenSequence]:
    """Returns the sequences from ``start`` on that make a pass of packed rows, of any lengths.

    The first is in it whatever its length. A sequence with images is alone.

    Args:
        ordered: All sequences.
        start: The index of the first one of the pass.
        tokens: The most tokens of the pass.
        size: The most sequences of the pass, at least 1.
    """
    end, total = start + 1, len(ordered[start].ids)
    while (
        end < min(start + size, len(ordered))
        and total + len(ordered[end].ids) <= tokens
        and not any(sequence.image_inputs for sequence in ordered[end - 1 : end + 1])
    ):
        total += len(ordered[end].ids)
        end += 1
    return ordered[start:end]
