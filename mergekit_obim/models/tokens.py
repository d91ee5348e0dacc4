"""Comparing tokenizers: a merge mixes rows by number, so a number has to mean one token.

The embeddings and the head have a row for each token, and a merge without mergekit's
``tokenizer`` option mixes row 7 of one model with row 7 of another, whatever the two
tokenizers call it. What matters is the whole vocabulary, added tokens included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mergekit_obim.models.faults import model_fault
from mergekit_obim.recipe.faults import Fault

Vocabulary = Mapping[str, int]
"""Token -> its number, which is its row in the embeddings and in the head."""

# Without one of these, transformers makes up a tokenizer of a few special tokens.
_VOCABULARY_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "spm.model", "tekken.json", "tiktoken.model"),
)
# Names that families give to rows that are free for later use, and to padding: no text has made a
# model learn what such a row means, so calling it something else takes nothing away.
_SPARE = re.compile(
    r"[<\[].*(reserved|unused|placeholder|dummy|madeupword|(?<![a-z])pad(ding)?(?![a-z])"
    r"|(?<![a-z])(special|control|extra)[ _-]?(token[ _-]?)?\d).*[>\]]",
    re.IGNORECASE,
)
_EXAMPLES = 2


def is_spare(token: str) -> bool:
    """Return whether a token's name says that no text contains it: a reserved token, or padding.

    >>> is_spare("<|reserved_special_token_7|>"), is_spare("[PAD]"), is_spare("reserved")
    (True, True, False)
    """
    return _SPARE.fullmatch(token) is not None


def token_faults(
    vocabularies: Mapping[str, Vocabulary],
    base: str,
    rows_differ: Callable[[str, str, Collection[int]], bool] = lambda *_: True,
) -> Iterator[Fault]:
    """Find what is wrong with mixing these models' vocabulary rows by number.

    Experts are compared with the base, and with each other where the base has no word in it: two
    experts may have put tokens of their own at the same spare number.

    Args:
        vocabularies: For each model its tokens, none of them beyond the model's last row. A model
            without a tokenizer is left out, as it goes by the base's.
        base: The base's name among the models, or what to call it where it is not among them.
        rows_differ: Whether two models have different values in some rows of these numbers. Where
            they are equal, nothing is mixed, and the ``check_error`` becomes a warning.

    Yields:
        A ``check_error`` for each pair of models that give one number to two tokens, or one token
        two numbers; a warning where an expert uses a row that is spare in the base
        (:func:`is_spare`).
    """
    of_base = vocabularies.get(base, {})
    experts = [model for model in vocabularies if model != base]
    union = "add `tokenizer: {source: union}` to the recipe"
    for model in experts:
        clash = _Clash.of(vocabularies[model], of_base)
        there = f"the base {base}"
        way_out = union
        if vocabularies[model].keys() <= of_base.keys():  # it has nothing to lose but the order
            way_out = "add `tokenizer: {source: base}` to the recipe, or `{source: union}`"
        if clash.numbers:
            mixed = rows_differ(model, base, clash.numbers)
            yield _clash_fault(f"model {model}", clash.lines(model, there), way_out, mixed=mixed)
        if clash.renamed:
            yield model_fault(
                "warning",
                f"model {model}: {_some(_said(clash.renamed, model, there))}: the merged model "
                "gets the base's tokenizer, which lacks it; copy this expert's into the merged "
                f"folder, or {union}",
            )
    if not of_base:
        union = f"copy the tokenizer of {base} into its folder, and {union}"
    used = {number for token, number in of_base.items() if not is_spare(token)}
    for one, other in combinations(experts, 2):
        clash = _Clash.of(vocabularies[one], vocabularies[other])
        # Of what the base uses it was said above that one of them has it otherwise.
        moved = {token: both for token, both in clash.moved.items() if token not in of_base}
        replaced = {number: both for number, both in clash.replaced.items() if number not in used}
        clash = _Clash(moved, replaced, {})
        if clash.numbers:
            mixed = rows_differ(one, other, clash.numbers)
            lines = clash.lines(one, other)
            yield _clash_fault(f"models {one} and {other}", lines, union, mixed=mixed)


@dataclass(frozen=True)
class _Clash:
    """How the vocabularies of two models contradict each other.

    Attributes:
        moved: Token -> its numbers in the first and in the second model.
        replaced: Number -> its tokens in both, neither of which is spare.
        renamed: Number -> its tokens in both, of which the second model's is spare.
    """

    moved: dict[str, tuple[int, int]]
    replaced: dict[int, tuple[str, str]]
    renamed: dict[int, tuple[str, str]]

    @classmethod
    def of(cls, own: Vocabulary, other: Vocabulary) -> _Clash:
        clash = cls({}, {}, {})
        if own is other or own == other:
            return clash
        there = {number: token for token, number in other.items() - own.items()}
        for token, number in sorted(own.items() - other.items(), key=lambda entry: entry[1]):
            theirs = there.get(number)
            if is_spare(token):
                continue  # it has no meaning to lose
            if token in other:
                clash.moved[token] = number, other[token]
            elif theirs is None or (theirs in own and not is_spare(theirs)):
                continue  # the number is free there, or reported as that of a token that has moved
            elif is_spare(theirs):
                clash.renamed[number] = token, theirs
            else:
                clash.replaced[number] = token, theirs
        return clash

    @property
    def numbers(self) -> set[int]:
        """The rows that a merge must not mix."""
        return {*self.replaced, *(number for both in self.moved.values() for number in both)}

    def lines(self, model: str, other: str) -> list[str]:
        return _said(self.replaced, model, other) + [
            f"token {token!r} has number {own} in {model}, but {theirs} in {other}"
            for token, (own, theirs) in self.moved.items()
        ]


def _said(tokens: Mapping[int, tuple[str, str]], model: str, other: str) -> list[str]:
    return [
        f"number {number} is {own!r} in {model}, but {theirs!r} in {other}"
        for number, (own, theirs) in tokens.items()
    ]


def _clash_fault(them: str, lines: list[str], way_out: str, *, mixed: bool) -> Fault:
    if mixed:
        what = f"a merge would mix the rows of different tokens; {way_out}"
        return model_fault("check_error", f"{them}: {_some(lines)}: {what}")
    what = (
        "their rows are the same in both, so nothing is mixed, but the merged model gets the "
        f"base's tokenizer; to keep every model's tokens, {way_out}"
    )
    return model_fault("warning", f"{them}: {_some(lines)}: {what}")


def _some(lines: list[str]) -> str:
    """Join the first few lines, and say how many more there are."""
    more = len(lines) - _EXAMPLES
    return "; ".join(lines[:_EXAMPLES]) + (f" (and {more} more)" if more > 0 else "")


# --- reading them -------------------------------------------------------------------------------


def read_vocabulary(folder: Path, *, trust_remote_code: bool = False) -> Vocabulary | None:
    """Read the vocabulary of the tokenizer in a model's folder, in any form transformers loads.

    ``tokenizer.json`` is read directly where the answer is the same: loading a tokenizer of
    150,000 tokens takes several times as long.

    Args:
        folder: A checkpoint's or an adapter's.
        trust_remote_code: Whether code in the folder may run.

    Returns:
        Token -> number, added tokens included; None if there is no tokenizer.

    Raises:
        Exception: Whatever transformers raises at files that it cannot make a tokenizer of.
    """
    settings = _json(folder / "tokenizer_config.json")
    own_code = "auto_map" in settings
    if not (own_code and trust_remote_code):
        vocabulary = _from_json(folder, settings)
        if vocabulary is not None:
            return vocabulary
    if not own_code and not any((folder / name).exists() for name in _VOCABULARY_FILES):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    characters = bytes_to_unicode()
    return {
        # Tokenizers with code of their own (Qwen's first) have bytes, where others' have these.
        token if isinstance(token, str) else "".join(characters[byte] for byte in token): number
        for token, number in tokenizer.get_vocab().items()
    }


def _from_json(folder: Path, settings: Mapping[str, Any]) -> Vocabulary | None:
    """Read ``tokenizer.json``; None if transformers would add tokens or renumber them."""
    path = folder / "tokenizer.json"
    if "fast_tokenizer_files" in settings or not path.exists():
        return None
    vocabulary = _tokens_of(path.read_bytes())
    if vocabulary is None:
        return None
    named: dict[str, int | None] = dict(_json(folder / "added_tokens.json"))
    for number, token in settings.get("added_tokens_decoder", {}).items():
        named[_content(token)] = int(number)
    for source in (settings, _json(folder / "special_tokens_map.json")):
        for key, value in source.items():
            if key in ("additional_special_tokens", "extra_special_tokens"):
                tokens = value.values() if isinstance(value, Mapping) else value or ()
            else:
                tokens = [value] if key.endswith("_token") and value else ()
            for token in tokens:
                if not isinstance(token, bool):  # as `add_bos_token` is
                    named.setdefault(_content(token), None)
    for token, wanted in named.items():
        if token not in vocabulary or wanted not in (None, vocabulary[token]):
            return None
    return vocabulary


# Experts mostly have the base's own file, byte for byte: then it is parsed once.
@lru_cache(maxsize=4)
def _tokens_of(tokenizer_json: bytes) -> Vocabulary | None:
    """Read the tokens in such a file; None unless its numbers are those that loading assigns.

    tokenizers' own rule is that an added token has the number that the model has for it, or else
    the next one after as many as there are; the number in the file is not looked at.
    """
    try:
        content = json.loads(tokenizer_json)
        found = content["model"]["vocab"]
        added = [(token["content"], token["id"]) for token in content.get("added_tokens") or ()]
    except (ValueError, KeyError, TypeError):
        return None
    if isinstance(found, list):  # Unigram's, with scores
        found = {entry[0]: number for number, entry in enumerate(found)}
    vocabulary = dict(found)
    # Where the model's own numbers have gaps, it may give one of them to an added token too.
    gaps = max(found.values(), default=-1) >= len(found)
    for token, number in added:
        free = -1 if gaps else len(vocabulary)
        if number != vocabulary.setdefault(token, free):
            return None
    return vocabulary


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else str(token)


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON file's mapping; empty on failure, which loading the tokenizer will report."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
