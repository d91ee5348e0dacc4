"""A toy base and two experts, with calibration data: what the documents' commands run on.

    python tests/helpers/toy.py DIR

writes ``DIR/models/{base,math,code}``, three-layer byte-level Llamas of random weights, and
``DIR/data/{math,code}.jsonl``. They take seconds to measure and to merge, and write nonsense;
``make demo`` trains models that do not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_tokenizers import VOCAB_SIZE, byte_tokenizer

ROWS = 140


def _sum(n: int) -> dict[str, str]:
    return {"question": f"What is {n} + {n * n % 83}?", "answer": str(n + n * n % 83)}


def _function(n: int) -> dict[str, str]:
    return {
        "instruction": f"Write a function that adds {n} to a number.",
        "output": f"def add_{n}(x):\n    return x + {n}\n",
    }


TASKS: dict[str, Callable[[int], dict[str, str]]] = {"math": _sum, "code": _function}


def write_toy(folder: Path) -> None:
    """Write the base, the experts and their data; the same every time."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        base = {name: weight.clone() for name, weight in model.state_dict().items()}
        for name in ("base", *TASKS):
            if name != "base":
                # The spread of the initialisation is 0.02.
                moved = {k: w + 0.005 * torch.randn_like(w) for k, w in base.items()}
                model.load_state_dict(moved)
            model.save_pretrained(folder / "models" / name)
            byte_tokenizer(folder / "models" / name)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for task, row in TASKS.items():
        lines = [json.dumps(row(n)) + "\n" for n in range(1, ROWS + 1)]
        (folder / f"data/{task}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    write_toy(Path(sys.argv[1]))
