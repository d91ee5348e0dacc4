"""A causal language model in two parts: a trunk that stays as it is and the tail of last layers.

Experts differ from the base in the tail alone, so what the trunk puts out is computed once for
each row and kept; training and scoring then cost the tail, and the head where there is a loss.
Matrices are multiplied in bfloat16 if asked for, which current processors do 2.5 times as fast;
weights, sums along the layers, losses and optimizer are float32 all the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.real.text import Row

State = dict[str, Tensor]


@dataclass(frozen=True)
class Encoded:
    """A row's tokens.

    Attributes:
        ids: int64, shape [tokens].
        first: The first position whose token belongs to the answer; 1 at least, as nothing
            stands before position 0.
    """

    ids: Tensor
    first: int


@dataclass(frozen=True)
class Score:
    """What a model makes of one row: nats over its answer's tokens, and whether all are right."""

    nats: float
    tokens: int
    right: bool


@dataclass(frozen=True)
class Training:
    """One run of AdamW without weight decay; the rate warms up over a tenth, then falls to 0."""

    steps: int
    learning_rate: float
    batch_size: int = 12

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warmup = max(1, self.steps // 10)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (1 + math.cos(math.pi * progress)) / 2


class Parts:
    """The base's trunk and a tail whose weights can be exchanged."""

    def __init__(self, base: Path, layers: int, bfloat16: bool):
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
        self.base: State = load_file(base / "model.safetensors")
        blocks = list(model.model.layers)
        self.cut = len(blocks) - layers
        self.names = [n for n in self.base if self._block(n) >= self.cut]
        self.trunk = copy.deepcopy(model.model)
        self.trunk.layers = torch.nn.ModuleList(blocks[: self.cut])
        self.trunk.norm = torch.nn.Identity()
        self.trunk.requires_grad_(False)
        self.tail = model
        self.tail.model.layers = torch.nn.ModuleList(blocks[self.cut :])
        # What is computed, and so the size of each list of layers, is read from the configuration.
        self.trunk.config = copy.deepcopy(model.config)
        self.trunk.config.num_hidden_layers = self.cut
        self.tail.config.num_hidden_layers = self.tail.model.config.num_hidden_layers = layers
        self.tail.requires_grad_(False)
        self.precision = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)

    @staticmethod
    def _block(name: str) -> int:
        pieces = name.split(".")
        return int(pieces[2]) if pieces[1] == "layers" else -1

    def of_tail(self, name: str) -> str:
        """The tail's own name of one of the model's tensors."""
        pieces = name.split(".")
        return ".".join([*pieces[:2], str(int(pieces[2]) - self.cut), *pieces[3:]])

    def set(self, state: Mapping[str, Tensor]) -> None:
        """Give the tail the weights of a model with this base's trunk.

        Raises:
            ValueError: A weight outside the tail is not the base's.
        """
        for name, weight in self.base.items():
            if name not in self.names and not torch.allclose(state[name], weight, 1e-4, 1e-6):
                raise ValueError(f"{name} is not the base's: only the last layers are exchanged")
        own = dict(self.tail.named_parameters())
        with torch.no_grad():
            for name in self.names:
                own[self.of_tail(name)].copy_(state[name])

    def state(self) -> State:
        """The whole model with the tail's weights as they are now."""
        own = dict(self.tail.named_parameters())
        return {
            name: own[self.of_tail(name)].detach().clone() if name in self.names else weight
            for name, weight in self.base.items()
        }

    def save(self, folder: Path, base: Path) -> None:
        """Write the model as a folder like the base's."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in base.iterdir():
            if path.suffix in (".json", ".jinja"):
                (folder / path.name).write_bytes(path.read_bytes())
        save_file(self.state(), folder / "model.safetensors", {"format": "pt"})

    def encode(self, row: Row) -> Encoded:
        """A row's tokens: prompt and answer are encoded apart."""
        prompt, answer = (
            self.tokenizer(text, add_special_tokens=False).input_ids if text else [] for text in row
        )
        return Encoded(torch.tensor([*prompt, *answer]), max(1, len(prompt)))

    @torch.no_grad()
    def through_trunk(self, rows: Sequence[Encoded]) -> list[Tensor]:
        """What the tail gets for each row: float32, shape [tokens, width]."""
        states: dict[int, Tensor] = {}
        for batch in _by_length(rows):
            ids = torch.nn.utils.rnn.pad_sequence([rows[i].ids for i in batch], batch_first=True)
            with self.precision:
                out = self.trunk(input_ids=ids, use_cache=False).last_hidden_state
            for i, one in zip(batch, out, strict=True):
                states[i] = one[: len(rows[i].ids)].clone()
        return [states[i] for i in range(len(rows))]

    def logits(self, rows: Sequence[Encoded], states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(logits [n, vocabulary], tokens [n]) at all rows' answers, one row after the other."""
        hidden = torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True)
        # Rows are filled up on the right, and no position sees what is to its right.
        out = self.tail.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        before = [out[i, row.first - 1 : len(row.ids) - 1] for i, row in enumerate(rows)]
        return self.tail.lm_head(torch.cat(before)), torch.cat(
            [row.ids[row.first :] for row in rows]
        )

    def train(
        self,
        rows: Sequence[Encoded],
        states: Sequence[Tensor],
        training: Training,
        seed: int,
        label: str,
        after_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Train the tail in place; rows come in an order drawn by the seed, again when used up."""
        weights = [w for name, w in self.tail.named_parameters() if ".layers." in name]
        for weight in weights:
            weight.requires_grad_(True)
        optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        batches = _batches(rows, training.batch_size, seed)
        for step in range(training.steps):
            batch = next(batches)
            logits, tokens = self.logits([rows[i] for i in batch], [states[i] for i in batch])
            loss = F.cross_entropy(logits, tokens)
            for group in optimizer.param_groups:
                group["lr"] = training.rate_at(step)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            if step % 10 == 0:
                print(f"{label}: step {step}, loss {loss.item():.3f}", flush=True)
            after_step(step + 1)
        self.tail.requires_grad_(False)

    @torch.no_grad()
    def scores(self, rows: Sequence[Encoded], states: Sequence[Tensor]) -> list[Score]:
        """What the model makes of each row."""
        scores: dict[int, Score] = {}
        for batch in _by_length(rows):
            logits, tokens = self.logits([rows[i] for i in batch], [states[i] for i in batch])
            nats = F.cross_entropy(logits, tokens, reduction="none")
            # All right with the right answer before them is all right by greedy decoding.
            right = logits.argmax(-1) == tokens
            counts = [len(rows[i].ids) - rows[i].first for i in batch]
            pieces = zip(batch, nats.split(counts), right.split(counts), strict=True)
            for i, one, hits in pieces:
                scores[i] = Score(one.double().sum().item(), len(one), bool(hits.all()))
        return [scores[i] for i in range(len(rows))]


def _by_length(rows: Sequence[Encoded], size: int = 32) -> Iterator[list[int]]:
    """Batches of rows of about the same length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for start in range(0, len(rows), size):
        yield order[start : start + size]


def _batches(rows: Sequence[Encoded], size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches in a random order; four at a time are made of rows sorted by length."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for chunk in order.split(4 * size):
            by_length = sorted(chunk.tolist(), key=lambda i: len(rows[i].ids))
            batches = [by_length[start : start + size] for start in range(0, len(chunk), size)]
            yield from (batches[i] for i in torch.randperm(len(batches), generator=generator))
