"""Rows that an expert writes itself: how it is made to begin, and the file that keeps them.

Calibration data that a language model has sampled from itself serves compression about as well as
real text (LLM-QAT, arXiv 2305.17888; Williams et al., arXiv 2410.17170). A chat model is given its
template up to where a user's text goes, so that it writes an instruction, and then answers it
(Magpie, arXiv 2406.08464); its template up to the answer alone would leave it nothing to answer.
Any other model continues the beginning of text.

Everything is sampled at temperature 1 from all tokens, without the schedules and cuts of these
papers: what is estimated is the mean of x² over the text that the expert would write, and sampling
from the model's own distribution is what leaves that mean unbiased.

The file keeps the token ids of each row, because text does not keep them: a model may write other
tokens than the tokenizer would make of the same text, or half a character. The messages or the
text beside them are for people, and for other programs.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_obim.calibration.data.images import placeholders
from mergekit_obim.calibration.data.template import write_chat
from mergekit_obim.errors import CalibrationError
from mergekit_obim.recipe.calibration import SELF, Calibration
from mergekit_obim.saliency.file import atomic_write

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Stands in the chat template for what the user says. Letters and a digit: no template changes it.
_MARK = "obim0mark"


@dataclass(frozen=True)
class Opening:
    """What an expert is given of a row, the rest of which it writes.

    Attributes:
        start: The token ids that a row begins with. If there are none, its first is random.
        reply: The token ids between the user's turn and the answer; without a chat template, none.
        template: The chat template, if there is one.
        read_clock: Whether the template has asked for the date.
    """

    start: tuple[int, ...]
    reply: tuple[int, ...] = ()
    template: str | None = None
    read_clock: bool = False


@dataclass(frozen=True)
class Writing:
    """All that decides an expert's own rows beside its weights.

    Attributes:
        opening: What it is given.
        stops: The tokens that end a turn, or the text; sorted.
        unused: The token ids that it may not write, because no text has them; sorted.
        firsts: Where rows begin with nothing given, the tokens that may be first; sorted.
        samples: How many rows it is to write.
        max_length: Where a row ends, in tokens.
        seed: Which rows it writes.
        dtype: The dtype of the forward pass, as torch names it.
    """

    opening: Opening
    stops: tuple[int, ...]
    unused: tuple[int, ...]
    firsts: tuple[int, ...]
    samples: int
    max_length: int
    seed: int
    dtype: str

    def file_name(self, model_name: str, digest: str) -> str:
        """Return the name of the file that keeps the rows.

        Args:
            model_name: The expert's name in file names.
            digest: Identifies its weights.
        """
        decisive = json.dumps([digest, asdict(self)], sort_keys=True)
        return f"{model_name}.self-{hashlib.sha256(decisive.encode()).hexdigest()[:12]}.jsonl"


@dataclass(frozen=True)
class WrittenRow:
    """A row that an expert has written.

    Attributes:
        ids: All of its token ids, those that it was given included.
        turns: The token ids of the user's turn and of the answer, as far as there are any; without
            a chat template, of the text.
    """

    ids: list[int]
    turns: list[list[int]]


def opening_of(tokenizer: PreTrainedTokenizerBase, date: datetime.date) -> Opening:
    """Find out how a model's rows begin: with its chat template if it has one.

    Args:
        tokenizer: The model's.
        date: The date that the template is told if it asks for today's.

    Raises:
        CalibrationError: The chat template doesn't take a user's text, or changes it.
    """
    if tokenizer.chat_template:
        turn = {"role": "user", "content": _MARK}
        text, template, read_clock = write_chat(tokenizer, [turn], date, reply=True)
        before, _, after = text.partition(_MARK)
        if _MARK not in text or _MARK in after:
            raise CalibrationError(
                "the chat template doesn't show a user's text once and as it is, so that the model "
                "cannot write in its place; name a file or a data set instead"
            )
        # In most vocabularies a space belongs to the word after it, which is yet to be written.
        start, reply = (_bare(tokenizer, part) for part in (before.rstrip(" "), after))
        if start:
            return Opening(start, reply, template, read_clock)
    around = [int(token) for token in tokenizer("")["input_ids"]]
    start = tuple(token for token in around if token != tokenizer.eos_token_id)
    if not start and tokenizer.bos_token_id is not None:
        start = (tokenizer.bos_token_id,)
    return Opening(start)


def writing_of(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    kind: Any,
    config: PretrainedConfig,
    ends: Any,
    limit: int | None,
) -> Writing | None:
    """Return what an expert is to write; None if its calibration does not ask for that.

    Args:
        calibration: The expert's.
        tokenizer: The expert's.
        kind: The model's class; None if it is not known before the model is loaded.
        config: The model's configuration.
        ends: The ``eos_token_id`` of its generation configuration: a number, a list, or None.
        limit: The longest sequence that the model can take, if it has such a limit.

    Raises:
        CalibrationError: The model does not write, its chat template can't be used for that, or
            ``max_length`` leaves no room. The message lacks the model's name.
    """
    source = next((source for source in calibration.sources if source.is_self), None)
    if source is None:
        return None
    _refuse_mute(kind, config)
    opening = opening_of(tokenizer, calibration.date)
    max_length = min(calibration.max_length, limit or calibration.max_length)
    given = len(opening.start) + len(opening.reply)
    if max_length <= max(1, given) + bool(opening.reply):
        raise CalibrationError(
            f"max_length {max_length} leaves no room beside the {given} tokens that its rows are "
            "to begin with; raise it"
        )
    text_config = config.get_text_config()
    configured = getattr(text_config, "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *_numbers(ends), *_numbers(configured)} - {None}
    if opening.reply and opening.reply[0] in tokenizer.added_tokens_decoder:
        stops.add(opening.reply[0])  # such as <|im_end|>
    # Some embeddings have rows that no token has; an image's token stands for what is not text.
    count = int(getattr(text_config, "vocab_size", None) or len(tokenizer))
    unused = set(range(count)).difference({*tokenizer.get_vocab().values()} - placeholders(config))
    firsts = set() if opening.start else set(range(count)) - unused - {*tokenizer.all_special_ids}
    dtype = calibration.dtype or getattr(config, "dtype", None) or "float32"
    return Writing(
        opening,
        tuple(sorted(stops)),
        tuple(sorted(unused)),
        tuple(sorted(firsts - stops)),
        source.samples,
        max_length,
        calibration.seed,
        str(dtype).removeprefix("torch."),
    )


def save_rows(
    path: Path, rows: Iterable[WrittenRow], tokenizer: PreTrainedTokenizerBase, opening: Opening
) -> None:
    """Write rows to a file of JSON lines, whole or not at all.

    Args:
        path: The file.
        rows: The rows.
        tokenizer: The expert's, for the text beside the token ids.
        opening: Of the rows: with a chat template they are conversations.

    Raises:
        OSError: The file cannot be written.
    """
    lines = []
    for row in rows:
        turns = [tokenizer.decode(turn, skip_special_tokens=True) for turn in row.turns]
        shown: dict[str, Any] = {"text": turns[0]}
        if opening.template is not None:
            roles = zip(("user", "assistant"), turns, strict=False)
            shown = {"messages": [{"role": role, "content": text} for role, text in roles]}
        lines.append(json.dumps({**shown, "tokens": row.ids}, ensure_ascii=False) + "\n")
    with atomic_write(path) as file:
        file.write("".join(lines).encode())


def read_rows(path: Path) -> list[list[int]]:
    """Read the token ids of the rows that an expert has written.

    Raises:
        CalibrationError: The file cannot be read, or a row in it does not hold token ids.
    """
    way_out = "remove the file, and the expert writes it anew"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CalibrationError(f"{path}: can't be read: {error.strerror or error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            ids = json.loads(line)["tokens"]
        except (ValueError, TypeError, KeyError):
            ids = None
        if not isinstance(ids, list) or not ids or not all(_is_id(token) for token in ids):
            raise CalibrationError(f"{path}, line {number}: holds no tokens; {way_out}")
        rows.append(ids)
    if not rows:
        raise CalibrationError(f"{path}: is empty; {way_out}")
    return rows


def _refuse_mute(kind: Any, config: PretrainedConfig) -> None:
    """Refuse models that don't write text from its beginning on."""
    name = (config.architectures or [getattr(kind, "__name__", config.model_type)])[0]
    able = kind is None or (hasattr(kind, "can_generate") and kind.can_generate())
    if not able or getattr(config, "is_encoder_decoder", False):
        raise CalibrationError(
            f"data: {SELF} needs a model that writes text from its beginning on, which {name} does "
            "not; name a file or a data set of its task's inputs"
        )


def _bare(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"])


def _numbers(ends: int | Sequence[int] | None) -> Collection[int]:
    return [] if ends is None else [ends] if isinstance(ends, int) else [int(end) for end in ends]


def _is_id(token: object) -> bool:
    return type(token) is int and 0 <= token < 1 << 32
