"""Four tasks of real text from Debian's packages and this Python: rows of a prompt and an answer.

``german``: English and German messages of VLC's, GnuCash's and Freeciv's user interfaces; the
answer is the translation. ``gloss``: WordNet's words; the answer is the definition. ``topic``:
WordNet's definitions of nouns; the answer is the lexicographer's file, one of 25, such as
``animal``: right or wrong. ``python``: pieces of the standard library's sources, with no prompt.

A row belongs to one split by what it is about (the English message, the synset, the source
file), and to the same one in every task: no held-out definition is in any task's training rows.
"""

from __future__ import annotations

import gettext
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.corpus import SPLITS, load_corpus, split_of

Row = tuple[str, str]  # prompt, answer
Rows = dict[str, dict[str, list[Row]]]  # task -> split -> rows
EXACT = ("topic",)  # tasks whose answers are right or wrong

# https://wordnet.princeton.edu/documentation/lexnames5wn: nouns, by the file's number.
_TOPICS = dict(
    enumerate(
        (
            *("act", "animal", "artifact", "attribute", "body", "cognition", "communication"),
            *("event", "feeling", "food", "group", "location", "motive", "object", "person"),
            *("phenomenon", "plant", "possession", "process", "quantity", "relation", "shape"),
            *("state", "substance", "time"),
        ),
        start=4,
    )
)
_CATALOGS = "*/usr/share/locale/de/LC_MESSAGES/*.mo"
_WORDNET = "wordnet-base/usr/share/wordnet"


def load_rows(packages: Path, counts: Mapping[str, int]) -> Rows:
    """So many rows of each split of each task, the same ones on every machine.

    Args:
        packages: The folder that the Debian packages were unpacked into, each under its name.
        counts: Rows wanted of each split.

    Raises:
        RuntimeError: A package is missing, or holds too few rows.
    """
    sources = {
        "german": _german(packages),
        "gloss": _glosses(packages / _WORDNET),
        "topic": _topics(packages / _WORDNET),
        "python": _python(counts["train"] * 2000),
    }
    rows: Rows = {task: {split: [] for split in SPLITS} for task in sources}
    for task, source in sources.items():
        found: dict[str, tuple[str, Row]] = {}
        for about, split, row in source:
            found.setdefault(about, (split, row))
        for about in sorted(found, key=_hash):
            split, row = found[about]
            rows[task][split].append(row)
        for split in SPLITS:
            if len(rows[task][split]) < counts[split]:
                raise RuntimeError(
                    f"{task}: {len(rows[task][split])} {split} rows of {counts[split]} in "
                    f"{packages}; `make evidence-real` fetches the packages"
                )
            rows[task][split] = rows[task][split][: counts[split]]
    return rows


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


Source = Iterator[tuple[str, str, Row]]  # what a row is about, its split, the row


def _german(packages: Path) -> Source:
    for path in sorted(packages.glob(_CATALOGS)):
        with path.open("rb") as file:
            # Private, and the one way to list the messages of a catalogue.
            catalog: dict[object, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        for key, value in catalog.items():
            # Plural forms have tuples as keys; \4 and Freeciv's ?kind: stand before contexts.
            if not isinstance(key, str) or "\4" in key or key.startswith("?"):
                continue
            english, german = (_label(text) for text in (key, value))
            about = re.sub(r"[^a-z]", "", english.lower())
            short = len(about) >= 4 and len(english) <= 90 and len(german) <= 110
            if short and english != german and "\n" not in english + german:
                row = (f"English: {english}\nGerman:", f" {german}\n")
                yield about, split_of(about), row


def _label(text: str) -> str:
    """A message without the marks of its shortcut key, in one piece of white space."""
    return re.sub(r"[_&](?=\w)", "", text).strip()


def _synsets(path: Path) -> Iterator[tuple[str, int, str, str]]:
    """(the synset's name, lexicographer's file, word, definition) of a WordNet data file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        fields, _, gloss = line.partition(" | ")
        offset, file, kind, _, word, *_ = fields.split()
        definition = re.split(r'; "|\s*$', gloss.strip())[0]
        if 15 <= len(definition) <= 150:
            yield f"{kind}{offset}", int(file), word.replace("_", " "), definition


def _glosses(wordnet: Path) -> Source:
    kinds = {"noun": "noun", "verb": "verb", "adj": "adjective"}
    for kind, name in kinds.items():
        for synset, _, word, definition in _synsets(wordnet / f"data.{kind}"):
            row = (f"Word: {word} ({name})\nDefinition:", f" {definition}\n")
            yield synset, split_of(synset), row


def _topics(wordnet: Path) -> Source:
    for synset, file, _, definition in _synsets(wordnet / "data.noun"):
        if file in _TOPICS:
            row = (f"Definition: {definition}\nTopic:", f" {_TOPICS[file]}\n")
            yield synset, split_of(synset), row


def _python(train_chars: int, longest: int = 180) -> Source:
    """One piece from the middle of each function and class; its split is its file's."""
    corpus = load_corpus(train_chars)["code"]
    for split in SPLITS:
        for document in corpus[split]:
            lines = document.splitlines(keepends=True)
            middle = "".join(lines[len(lines) // 3 :])
            piece = middle[:longest].rpartition("\n")[0] + "\n"
            if len(piece) >= longest // 2:
                yield piece, split, ("", piece)
