"""Generated tasks with answers: one line each, ``prompt`` + ``answer``, of arithmetic and strings.

A prompt is in exactly one split, so no held-out line was trained on. Seeded by the split's
name: the same on every machine.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator

from benchmarks.corpus import Corpus, split_of

LINES_PER_DOCUMENT = 12


def _sort(generator: random.Random) -> tuple[str, str]:
    digits = [generator.choice(string.digits) for _ in range(generator.randint(3, 7))]
    return f"sort {''.join(digits)}:", "".join(sorted(digits))


def _reverse(generator: random.Random) -> tuple[str, str]:
    word = "".join(generator.choices("abcdefgh", k=generator.randint(3, 7)))
    return f"reverse {word}:", word[::-1]


def _roman(generator: random.Random) -> tuple[str, str]:
    number = rest = generator.randint(1, 399)
    numerals = ""
    for value, numeral in (
        (100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"),
        (1, "I"),
    ):  # fmt: skip
        numerals += numeral * (rest // value)
        rest %= value
    return f"roman {number}:", numerals


GENERATORS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "sort": _sort,
    "reverse": _reverse,
    "roman": _roman,
}


def questions(task: str, split: str) -> Iterator[tuple[str, str]]:
    """Endless (prompt, answer) pairs of a task's split, with repetitions where there are few."""
    generator = random.Random(f"{task} {split}")
    while True:
        prompt, answer = GENERATORS[task](generator)
        if split_of(prompt) == split:
            yield prompt, answer


def add_lines(corpus: Corpus, train_chars: int) -> None:
    """Add the generated tasks to a corpus: so many characters, an eighth of it held out twice."""
    for task in GENERATORS:
        corpus[task] = {}
        for split in ("train", "validation", "test"):
            wanted = train_chars if split == "train" else train_chars // 8
            lines = questions(task, split)
            documents: list[str] = []
            while sum(map(len, documents)) < wanted:
                pairs = [next(lines) for _ in range(LINES_PER_DOCUMENT)]
                documents.append("".join(f"{prompt}{answer}\n" for prompt, answer in pairs))
            corpus[task][split] = documents


def math_questions(documents: list[str]) -> list[tuple[str, str]]:
    """The sums of the corpus' ``math`` documents as (prompt, answer)."""
    lines = "".join(documents).splitlines()
    return [(f"{left}=", right) for left, _, right in (line.partition("=") for line in lines)]
