"""A byte-level Llama small enough to train on a laptop's CPU, and its tokenizer.

Genuine Hugging Face models: ``save`` writes a folder that ``AutoModelForCausalLM`` and
``AutoTokenizer`` (and so mergekit) load like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = 256, 257, 258  # after the 256 bytes, whose ids are their values
VOCABULARY = 259

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Size:
    """Shape of a model; the default has 1.1M parameters."""

    hidden: int = 128
    layers: int = 5
    heads: int = 4
    intermediate: int = 352
    context: int = 512

    def build(self, seed: int) -> LlamaForCausalLM:
        """A freshly initialised model, the same for the same seed."""
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.context,
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Training:
    """One training run: AdamW whose learning rate warms up, then falls along a cosine."""

    steps: int
    learning_rate: float
    batch_size: int = 8
    context: int = 128
    warmup: int = 20
    final_rate: float = 0.1  # of learning_rate; 1 is no fall
    weight_decay: float = 0.1
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer whose token ids are the text's UTF-8 bytes, after one ``<s>``."""
    # Byte-level BPE writes bytes as printable characters: those that are printable in
    # Latin-1 as themselves, the others, in order, as the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({name: byte for byte, name in sorted(names.items())}, []))
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def stream(documents: Iterable[str]) -> Tensor:
    """All documents in a row, each as the tokenizer would encode it: int16, shape [tokens]."""
    ids: list[int] = []
    for document in documents:
        ids.append(BOS)
        ids.extend(document.encode())
    return torch.tensor(ids, dtype=torch.int16)


def train(
    model: LlamaForCausalLM,
    streams: Sequence[Tensor],
    training: Training,
    label: str,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train in place on random windows, as many from each stream in every batch.

    Args:
        model: On any device; left in evaluation mode.
        streams: One or more token streams, each int16 of shape [tokens].
        training: The run's settings; its seed decides which windows are seen.
        label: What the progress bar calls the run.
        after_step: Called with the number of steps done, after each.
    """
    generator = torch.Generator().manual_seed(training.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": training.weight_decay},
         {"params": gains, "weight_decay": 0.0}],
        lr=training.learning_rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    offsets = torch.arange(training.context + 1)
    model.train()
    progress = tqdm(range(training.steps), desc=label, unit="step", mininterval=1.0)
    for step in progress:
        windows = []
        for i in range(training.batch_size):
            tokens = streams[i % len(streams)]
            start = torch.randint(len(tokens) - training.context, (1,), generator=generator)
            windows.append(tokens[start + offsets])
        loss = _loss(model, torch.stack(windows))
        for group in optimizer.param_groups:
            group["lr"] = training.rate_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        after_step(step + 1)
    model.eval()


def held_out_loss(
    model: LlamaForCausalLM, tokens: Tensor, windows: int = 128, context: int = 128
) -> float:
    """Mean cross-entropy, in nats per byte, over evenly spaced windows of a stream [tokens]."""
    starts = torch.linspace(0, len(tokens) - context - 1, windows).long()

    @torch.no_grad()
    def total(batch: Tensor) -> float:
        return _loss(model, batch).item() * len(batch)

    # Eight windows of such a model are about what a core keeps in its cache.
    batches = tokens[starts[:, None] + torch.arange(context + 1)].split(8)
    return sum(side_by_side(total, batches)) / windows


def _loss(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Next-token cross-entropy of windows [batch, context + 1]."""
    windows = windows.to(model.device, torch.long)
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write model (safetensors) and tokenizer as one Hugging Face folder."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


# Loading switches the tying of weights off for the whole process. Two threads at it at once can
# leave it off, and every later model of the process untied (seen with transformers 5.23).
_LOADING = Lock()


def load(folder: Path) -> LlamaForCausalLM:
    """A model from its folder; safe to call from several threads."""
    with _LOADING:
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder)
    model.eval()
    return model


def side_by_side(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``[function(item) for item in items]``, two at a time.

    Two threads with an operation each do more than two threads that share such small ones.
    """
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))
