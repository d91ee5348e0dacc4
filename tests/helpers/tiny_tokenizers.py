"""Small real tokenizers for tests: one token per byte, saved as Hugging Face fast tokenizers."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3
"""Token id of byte 0; byte b is ``FIRST_BYTE + b`` in any of these tokenizers."""
VOCAB_SIZE = FIRST_BYTE + 256

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Writes BOS itself, as Llama 3's and Gemma's do."""


def byte_tokenizer(
    folder: Path | str | None = None,
    *,
    add_bos: bool = False,
    add_eos: bool = False,
    has_eos: bool = True,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 259 tokens: ``<pad>``, ``<s>``, ``</s>``, then the bytes.

    Args:
        folder: Where to save it, so that ``AutoTokenizer.from_pretrained(folder)`` finds it.
        add_bos: Whether its post-processor puts ``<s>`` before a text.
        add_eos: Whether its post-processor puts ``</s>`` after a text.
        has_eos: Whether it knows which token ends a text.
        chat_template: A Jinja template, such as :data:`CHAT_TEMPLATE`.
    """
    specials = ["<pad>", "<s>", "</s>"]
    vocab = {token: index for index, token in enumerate(specials)}
    vocab |= {char: FIRST_BYTE + byte for byte, char in _byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    template = ["<s>"] * add_bos + ["$A"] + ["</s>"] * add_eos
    if len(template) > 1:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>" if has_eos else None,
        pad_token="<pad>",
    )
    fast.chat_template = chat_template
    if folder is not None:
        fast.save_pretrained(folder)
    return fast


def byte_ids(text: str) -> list[int]:
    """The token ids of a text, without special tokens."""
    return [FIRST_BYTE + byte for byte in text.encode()]


def _byte_characters() -> dict[int, str]:
    """The printable stand-in that a byte-level model (GPT-2's) uses for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(0x100 + n) for n, byte in enumerate(others)}
