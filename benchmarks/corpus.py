"""Real text without a download: this Python's own docstrings and sources, and arithmetic.

Three tasks, each a list of short documents: ``prose`` (docstrings of the standard
library), ``code`` (its top-level functions and classes, docstrings taken out) and ``math``
(generated sums). A source file or a sum is in exactly one of the splits ``train``,
``validation`` and ``test``, and no document occurs twice, so nothing held out was
trained on. The same Python gives the same corpus on every machine.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

TASKS = ("prose", "code", "math")
SPLITS = ("train", "validation", "test")
Corpus = dict[str, dict[str, list[str]]]  # task -> split -> documents

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
_SHORTEST, _LONGEST = 80, 4000  # characters in a document of prose or code
_LINES_PER_SHEET = 12  # sums in a document of math


def load_corpus(train_chars: int = 600_000) -> Corpus:
    """Collect documents until every task has enough of every split.

    Args:
        train_chars: Characters of training text per task, where the standard library has
            that many; each held-out split gets an eighth as much.

    Returns:
        ``corpus[task][split]``, a list of documents.

    Raises:
        RuntimeError: The standard library's sources are not installed.
    """
    corpus: Corpus = {task: {split: [] for split in SPLITS} for task in TASKS}
    missing = {
        (task, split): train_chars if split == "train" else train_chars // 8
        for task in TASKS
        for split in SPLITS
    }
    seen: set[str] = set()

    def add(task: str, split: str, document: str) -> None:
        if missing[task, split] > 0 and document not in seen:
            seen.add(document)
            corpus[task][split].append(document)
            missing[task, split] -= len(document)

    for split, tree, source in _modules():
        for document in _docstrings(tree):
            add("prose", split, document)
        for document in _definitions(tree, source):
            add("code", split, document)
        if all(missing[task, split] <= 0 for task in ("prose", "code") for split in SPLITS):
            break
    for split in SPLITS:
        sheets = _sheets(split)
        while missing["math", split] > 0:
            add("math", split, next(sheets))
    empty = [f"{task}/{split}" for task in TASKS for split in SPLITS if not corpus[task][split]]
    if empty:
        raise RuntimeError(
            f"no text for {', '.join(empty)}: this Python comes without its library's sources"
        )
    return corpus


def split_of(name: str) -> str:
    """The split that a file or a sum belongs to: one in ten is validation, one in ten test."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


def _modules() -> Iterator[tuple[str, ast.Module, str]]:
    """(split, parsed module, source) of the library's files, mixed by the hash of their path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths: dict[str, Path] = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - _SKIPPED_FOLDERS  # os.walk goes into what is left
        found = (Path(folder, file) for file in files if file.endswith(".py"))
        paths |= {path.relative_to(root).as_posix(): path for path in found}
    for name in sorted(paths, key=lambda name: hashlib.sha256(name.encode()).hexdigest()[8:]):
        try:
            source = paths[name].read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # a few files are not utf-8, or templates
            continue
        yield split_of(name), tree, source


def _docstring_nodes(
    tree: ast.AST,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in _docstring_nodes(tree):
        text = ast.get_docstring(node) or ""
        if _SHORTEST <= len(text) <= _LONGEST and ">>>" not in text:  # examples are code
            yield text + "\n"


def _definitions(tree: ast.Module, source: str) -> Iterator[str]:
    lines = source.splitlines()
    prose: set[int] = set()
    for node in _docstring_nodes(tree):
        # A body that is only a docstring keeps it: without it the code would not parse.
        if ast.get_docstring(node, clean=False) is not None and len(node.body) > 1:
            prose.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    for item in tree.body:
        if isinstance(item, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            numbers = range(item.lineno, (item.end_lineno or 0) + 1)
            text = "\n".join(lines[i - 1] for i in numbers if i not in prose)
            if len(text) >= _SHORTEST:
                yield text[:_LONGEST] + "\n"


def _sheets(split: str) -> Iterator[str]:
    """Endless sheets of sums such as ``37+158=195``, of one to three digits a side."""
    generator = random.Random(split)
    while True:
        sums: list[str] = []
        while len(sums) < _LINES_PER_SHEET:
            a, b = (generator.randrange(10 ** generator.randint(1, 3)) for _ in range(2))
            operator = generator.choice("+-*" if max(a, b) < 100 else "+-")
            # 3+5 and 5+3 share a split: one must not give the other away.
            low, high = sorted((a, b))
            if split_of(f"{low}{operator}{high}") == split:
                result = {"+": a + b, "-": a - b, "*": a * b}[operator]
                sums.append(f"{a}{operator}{b}={result}\n")
        yield "".join(sums)
