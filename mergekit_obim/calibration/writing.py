"""Having an expert write its own calibration rows: sampling, the same rows every time."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from mergekit_obim.calibration.capture import input_device
from mergekit_obim.calibration.data.self_written import Writing, WrittenRow
from mergekit_obim.calibration.feeding import full_precision
from mergekit_obim.calibration.memory import out_of_memory
from mergekit_obim.errors import CalibrationError, ObimError, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows that are written together. Not `batch_size`: another batch rounds otherwise, and a rounding
# that tips one token over changes all that follow. Rows are numbered, and the same ones are always
# written together, so that a row depends on the seed and its number alone.
GROUP = 16


def write_rows(
    model: PreTrainedModel,
    writing: Writing,
    *,
    label: str,
    quiet: bool,
    check: Callable[[], None] = lambda: None,
) -> list[WrittenRow]:
    """Have a model write the rows that it is to be measured on.

    A row in which the model ends at once is passed over, and the next one takes its place.

    Args:
        model: In eval mode, on any devices.
        writing: What it is to write.
        label: What to call the model.
        quiet: Show no progress.
        check: Called before every token; what it raises ends the writing.

    Returns:
        As many rows as are asked for. More rows begin with those that fewer would be.

    Raises:
        CalibrationError: Its logits are not finite, or it ends row after row at once. The
            message lacks the model's name.
        Exception: Whatever the model's forward pass raises.
    """
    rows: list[WrittenRow] = []
    first = 0
    steps = writing.max_length - max(1, len(writing.opening.start))
    total = -(-writing.samples // GROUP) * GROUP * steps
    with (
        tqdm(total=total, desc=f"Writing rows of {label}", unit="tok", disable=quiet) as progress,
        _plain_generation(model),
    ):

        def written(numbers: Sequence[int]) -> list[_Row]:
            def went_on() -> None:
                check()
                progress.update(len(numbers))

            before = progress.n
            try:
                return _group(model, writing, numbers, went_on)
            except Exception as error:
                if not out_of_memory(error) or len(numbers) == 1:
                    raise
            # Out of the handler, which would hold on to what does not fit.
            clear_device_cache(garbage_collection=True)
            progress.n = before
            middle = len(numbers) // 2
            return [*written(numbers[:middle]), *written(numbers[middle:])]

        while len(rows) < writing.samples:
            group = written(range(first, first + GROUP))
            found = [WrittenRow(row.ids, list(filter(None, row.turns))) for row in group]
            found = [row for row in found if row.turns]
            if not found:
                raise CalibrationError(
                    f"{GROUP} rows that it began all ended at once: it writes nothing to measure "
                    "it on; name a file or a data set instead"
                )
            rows += found
            first += GROUP
            # Rows may end before they are full, and some are passed over.
            left = max(0, writing.samples - len(rows))
            progress.total = progress.n + -(-left // GROUP) * GROUP * steps
            progress.refresh()
    return rows[: writing.samples]


def cannot_write(label: str, error: Exception) -> ObimError:
    """Return the error to raise where :func:`write_rows` raised one that is not of memory.

    Args:
        label: What to call the model.
        error: What it raised.
    """
    if isinstance(error, CalibrationError):
        return CalibrationError(f"model {label}: {error.message}")
    if isinstance(error, ObimError):
        return error
    return CalibrationError(
        f"model {label}: its forward pass failed as it wrote its own rows: {quoted(error)}"
    )


class _Row:
    """One row while it is written.

    Attributes:
        ids: Its token ids so far.
        turns: Those of them that the model wrote, by turn.
        done: Whether it has come to its end.
    """

    def __init__(self, writing: Writing, number: int) -> None:
        self._random = random.Random(f"{writing.seed}:{number}")
        self._writing = writing
        self._given: deque[int] = deque()
        start = list(writing.opening.start)
        # As LLM-QAT begins: with any token at all.
        self.turns: list[list[int]] = [[] if start else [self._random.choice(writing.firsts)]]
        self.ids = start or list(self.turns[0])
        self.done = False

    def uniform(self) -> float:
        """Return the next random number, from 0 to 1, of which there is one for every token."""
        return self._random.random()

    def take(self, token: int) -> int:
        """Go on by one token, and return it: the one that was drawn, unless another is due."""
        if self.done:
            return token
        reply = self._writing.opening.reply
        if not self._given and token in self._writing.stops:
            room = self._writing.max_length - len(self.ids) > len(reply)
            if len(self.turns) == 2 or not (reply and room and self.turns[0]):
                self.done = True
                return token
            self._given.extend(reply)
            self.turns.append([])
        if self._given:
            token = self._given.popleft()
        else:
            self.turns[-1].append(token)
        self.ids.append(token)
        self.done = len(self.ids) >= self._writing.max_length
        return token


def _group(
    model: PreTrainedModel, writing: Writing, numbers: Sequence[int], went_on: Callable[[], None]
) -> list[_Row]:
    """Have the model write the rows of these numbers, calling `went_on` at every token of each."""
    rows = [_Row(writing, number) for number in numbers]
    ids = torch.tensor([row.ids for row in rows], device=input_device(model))
    with torch.no_grad(), full_precision():
        cast(Any, model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_plain(writing.max_length),
            logits_processor=LogitsProcessorList([_Draw(rows, writing.unused, went_on)]),
            stopping_criteria=StoppingCriteriaList([_AllDone(rows)]),
        )
    return rows


class _Draw(LogitsProcessor):
    """Chooses every next token; `generate` is left to feed the model and to keep its caches."""

    def __init__(
        self, rows: Sequence[_Row], unused: Sequence[int], went_on: Callable[[], None]
    ) -> None:
        self._rows, self._went_on = rows, went_on
        self._unused = torch.tensor(unused, dtype=torch.int64)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores that leave one token of each row.

        Args:
            input_ids: [rows, tokens], int64.
            scores: The logits, [rows, vocabulary], of any floating-point dtype.
        """
        self._went_on()
        logits = scores.float()
        logits = logits.index_fill(1, self._unused.to(logits.device), -torch.inf)
        # In float64, so that rounding gives no token more or less than its share; on the CPU,
        # because not every device has it.
        shares = logits.softmax(-1).cpu().double().cumsum(-1)
        if not shares[:, -1].isfinite().all():
            raise CalibrationError("the logits are not finite as it writes; give --dtype float32")
        uniform = torch.tensor([row.uniform() for row in self._rows], dtype=torch.float64)
        # The first token whose cumulative share is above the random number.
        drawn = torch.searchsorted(shares, (uniform * shares[:, -1])[:, None], right=True)
        tokens = [
            row.take(token) for row, token in zip(self._rows, drawn[:, 0].tolist(), strict=True)
        ]
        chosen = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class _AllDone(StoppingCriteria):
    """Ends the writing of a group with its last row."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Return which rows are done, [rows], bool."""
        return torch.tensor([row.done for row in self._rows], device=input_ids.device)


def _plain(max_length: int | None = None) -> GenerationConfig:
    """Return settings of `generate` that leave the choice of tokens to us."""
    return GenerationConfig(
        max_length=max_length, do_sample=False, use_cache=True, pad_token_id=0, disable_compile=True
    )


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Take away a model's own settings of `generate`, which fill in what a call leaves out."""
    owned = cast(Any, model)
    own = owned.generation_config
    owned.generation_config = _plain()
    try:
        yield
    finally:
        owned.generation_config = own
