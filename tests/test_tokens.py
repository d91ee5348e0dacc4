"""Tokenizers are compared by what their numbers mean, in whatever form they come."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken
from transformers import AutoTokenizer

from commands import says
from mergekit_obim.models import tokens
from mergekit_obim.models.tokens import is_spare, read_vocabulary, token_faults
from tiny_tokenizers import byte_tokenizer

WORDS = {"a": 0, "b": 1, "c": 2, "d": 3}
RESERVED = {**WORDS, "<|reserved_special_token_0|>": 4, "<|reserved_special_token_1|>": 5}


def findings(**vocabularies: dict[str, int]) -> list[tuple[str, str]]:
    return [(f.level, f.message) for f in token_faults(vocabularies, "base")]


@pytest.mark.parametrize(
    "token",
    [
        *("<|reserved_special_token_250|>", "<unused7>", "[unused1]", "<|dummy_3|>", "[control_8]"),
        *("<SPECIAL_20>", "<|extra_5|>", "<madeupword0001>", "<|placeholder4|>", "<pad>", "[PAD]"),
        *("<|PAD_TOKEN|>", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>", "<|padding|>"),
    ],
)
def test_names_of_spare_rows(token: str) -> None:
    assert is_spare(token)


@pytest.mark.parametrize(
    "token",
    [
        *("reserved", "Ġunused", "▁pad", "<extra_id_0>", "<|im_start|>", "<think>", "<s>"),
        *("<0x0A>", "[INST]", "<|eot_id|>", "<paddle>", "<|special|>"),
    ],
)
def test_names_of_rows_that_are_used(token: str) -> None:
    assert not is_spare(token)


@pytest.mark.parametrize(
    "vocabularies",
    [
        {"base": WORDS, "one": dict(WORDS), "two": WORDS},
        {"base": WORDS, "one": {**WORDS, "<x>": 4}, "two": WORDS},
        {"base": WORDS, "one": {**WORDS, "<x>": 4}, "two": {**WORDS, "<x>": 4, "<y>": 5}},
        {"base": {**WORDS, "<x>": 4}, "one": WORDS},
        {"one": {**WORDS, "<x>": 4}, "two": WORDS},
        {"base": RESERVED, "one": {**WORDS, "<|dummy_0|>": 4}},
        # Llama 3.1 renumbers Llama 3's reserved tokens
        {"base": RESERVED, "one": {**WORDS, "<pad>": 4, "<|reserved_special_token_0|>": 5}},
        {"base": {**WORDS, "<x>": 4}, "one": RESERVED},  # it has no use for the base's word
        {"base": WORDS, "one": {**WORDS, "<x>": 4}, "two": {**WORDS, "<pad>": 4}},
    ],
)
def test_what_can_be_mixed(vocabularies: dict[str, dict[str, int]]) -> None:
    assert findings(**vocabularies) == []


def test_a_number_with_another_token_than_in_the_base() -> None:
    [(level, line)] = findings(base=WORDS, one={"a": 0, "b": 1, "<x>": 2, "d": 3}, two=WORDS)
    assert level == "check_error"
    says(line, "model one: number 2 is '<x>' in one, but 'c' in the base base", "source: union")
    assert "more" not in line


def test_tokens_in_another_order() -> None:
    [(level, line)] = findings(base=WORDS, one={"b": 0, "a": 1, "d": 2, "c": 3})
    assert level == "check_error"
    says(line, "token 'b' has number 0 in one, but 1 in the base base", "(and 2 more)")
    says(line, "{source: base}", "{source: union}")
    [(_, line)] = findings(base=WORDS, one={"b": 0, "a": 1, "c": 2, "d": 3, "<own>": 4})
    says(line, "{source: union}")
    assert "source: base" not in line  # which would drop its own


def test_two_experts_with_tokens_of_their_own() -> None:
    lines = findings(base=WORDS, one={**WORDS, "<x>": 4, "<z>": 5}, two={**WORDS, "<y>": 4})
    [(level, line)] = lines
    assert level == "check_error"
    says(line, "models one and two: number 4 is '<x>' in one, but '<y>' in two", "source: union")
    [(level, line)] = findings(base=WORDS, one={**WORDS, "<x>": 4}, two={**WORDS, "<x>": 5})
    assert level == "check_error"
    says(line, "token '<x>' has number 4 in one, but 5 in two")
    [(_, line)] = findings(one={**WORDS, "<x>": 4}, two={**WORDS, "<y>": 4})
    says(line, "copy the tokenizer of base into its folder, and add `tokenizer:")


def test_what_the_base_uses_is_told_beside_the_base_only() -> None:
    other = {"a": 0, "b": 1, "<x>": 2, "d": 3}
    lines = findings(base=WORDS, one=other, two={**WORDS, "c": 4, "<y>": 2})
    assert [line.split(":")[0] for _, line in lines] == ["model one", "model two"]


def test_a_reserved_token_that_is_used() -> None:
    used = {**RESERVED, "<think>": 4}
    del used["<|reserved_special_token_0|>"]
    [(level, line)] = findings(base=RESERVED, one=used, two=RESERVED)
    assert level == "warning"
    says(line, "number 4 is '<think>' in one, but '<|reserved_special_token_0|>' in the base")
    says(line, "gets the base's tokenizer", "source: union")
    other = {("<tool>" if token == "<think>" else token): n for token, n in used.items()}
    lines = findings(base=RESERVED, one=used, two=other)
    assert [level for level, _ in lines] == ["warning", "warning", "check_error"]
    says(lines[2][1], "number 4 is '<think>' in one, but '<tool>' in two")


def test_rows_that_are_the_same_are_mixed_with_nothing() -> None:
    asked: list[tuple[str, str, Collection[int]]] = []

    def same(one: str, other: str, numbers: Collection[int]) -> bool:
        asked.append((one, other, numbers))
        return False

    known = {"base": WORDS, "one": {**WORDS, "<x>": 4}, "two": {**WORDS, "<y>": 4}}
    [finding] = token_faults(known, "base", same)
    assert asked == [("one", "two", {4})]
    assert finding.level == "warning"
    says(finding.message, "number 4", "their rows are the same in both", "the base's tokenizer")


# --- reading them ---------------------------------------------------------------------------


@pytest.fixture
def transformers_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the whole tokenizer was loaded")

    monkeypatch.setattr(tokens.AutoTokenizer, "from_pretrained", load)


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_tokens(folder: Path, *names: str) -> Path:
    tokenizer = byte_tokenizer(folder)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("transformers_stays_out")
def test_added_tokens_are_read_too(tmp_path: Path) -> None:
    found = read_vocabulary(with_tokens(tmp_path / "a", "<x>", "<y>"))
    assert found is not None
    assert len(found) == 261
    assert (found["<pad>"], found["<x>"], found["<y>"]) == (0, 259, 260)
    # Experts mostly have the base's very file, and then it is parsed once.
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert read_vocabulary(tmp_path / "b") is found


@pytest.mark.usefixtures("transformers_stays_out")
def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path) is None
    with_tokens(tmp_path, "<x>")
    (tmp_path / "tokenizer.json").unlink()
    # Of settings alone transformers makes a tokenizer of a few words that no model has.
    assert read_vocabulary(tmp_path) is None


def sentencepiece_model(folder: Path) -> None:
    text = folder / "text.txt"
    text.write_text(
        "".join(f"the {n} quick foxes jump over {n * n} lazy dogs\n" for n in range(99))
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=90,
        model_type="bpe",
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": 90}))


def vocabulary_and_merges(folder: Path) -> None:
    words = {**byte_tokenizer().get_vocab(), "th": 259}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    special = {"unk_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "GPT2Tokenizer", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def word_list(folder: Path) -> None:
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\none\ntwo\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')


def only_in_the_settings(folder: Path) -> None:
    with_tokens(folder, "<x>")
    edited(folder / "tokenizer_config.json", extra_special_tokens=["<y>"])


def numbered_anew(folder: Path) -> None:
    """The file says 300, but tokenizers counts on after the last."""
    with_tokens(folder, "<x>")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][-1]["id"] = 300
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (sentencepiece_model, {"<s>": 1, "<x>": 90}),
        (vocabulary_and_merges, {"<s>": 1, "th": 259}),
        (word_list, {"[PAD]": 0, "two": 6}),
        (only_in_the_settings, {"<x>": 259, "<y>": 260}),
        (numbered_anew, {"<x>": 259}),
    ],
)
def test_other_forms_are_what_transformers_makes_of_them(
    tmp_path: Path, write: Any, expected: dict[str, int]
) -> None:
    tmp_path.joinpath("config.json").write_text('{"model_type": "llama"}')
    write(tmp_path)
    found = read_vocabulary(tmp_path)
    assert found == AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert found.items() >= expected.items()


def test_the_same_tokenizer_in_two_forms(tmp_path: Path) -> None:
    for name in ("slow", "fast"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    sentencepiece_model(tmp_path / "slow")
    AutoTokenizer.from_pretrained(tmp_path / "slow").save_pretrained(tmp_path / "fast")
    assert not (tmp_path / "fast" / "tokenizer.model").exists()
    slow, fast = (read_vocabulary(tmp_path / name) for name in ("slow", "fast"))
    assert slow == fast


def test_tokens_that_are_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnTokenizer:
        def get_vocab(self) -> dict[bytes | str, int]:
            return {b" the": 0, b"\xc3\xa9": 1, "<|endoftext|>": 2}

    monkeypatch.setattr(
        tokens.AutoTokenizer, "from_pretrained", lambda folder, trust_remote_code: OwnTokenizer()
    )
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["x.X", null]}}'
    )
    found = read_vocabulary(tmp_path, trust_remote_code=True)
    assert found == {"Ġthe": 0, "Ã©": 1, "<|endoftext|>": 2}
