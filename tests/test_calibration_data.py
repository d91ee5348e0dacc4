"""Calibration data: every format, every field rule, sampling, tokens and batches."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_obim.calibration.data import TokenizedCalibration, TokenSequence, prepare
from mergekit_obim.calibration.data.drawing import sample_order
from mergekit_obim.calibration.data.rows import load_rows
from mergekit_obim.calibration.data.text import row_input
from mergekit_obim.calibration.data.tokens import content_hash, next_batch, pack, tokenize
from mergekit_obim.errors import CalibrationError
from mergekit_obim.recipe.calibration import Calibration, DataSource
from tiny_tokenizers import BOS, CHAT_TEMPLATE, EOS, byte_ids, byte_tokenizer

ROWS = [{"text": "one"}, {"text": "two, with \u2028 and é"}, {"text": 'three "quoted"'}]
PLAIN = byte_tokenizer()


def source(data: Any, **keys: Any) -> DataSource:
    return DataSource(data=str(data), **keys)


def calibration(data: Any, **keys: Any) -> Calibration:
    return Calibration.model_validate({"data": str(data), **keys})


def jsonl(folder: Path, rows: list[Any], name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def ids_of(result: TokenizedCalibration) -> list[list[int]]:
    return [sequence.ids for sequence in result.sequences]


def error_of(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(CalibrationError) as caught:
        call(*args, **kwargs)
    assert "\n" not in caught.value.message
    return caught.value.message


# --- formats ------------------------------------------------------------------------------


def test_jsonl(tmp_path: Path) -> None:
    assert list(load_rows(source(jsonl(tmp_path, ROWS)))) == ROWS


def test_jsonl_as_other_programs_write_it(tmp_path: Path) -> None:
    path = tmp_path / "data.JSONL"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n"b"\n{"text": "c"}')
    rows = load_rows(source(path))
    assert list(rows) == [{"text": "a"}, {"text": "b"}, {"text": "c"}]
    assert rows.where(1) == "line 4"


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps({"data": ROWS}),
        json.dumps({"version": 1, "rows": ROWS}),
        json.dumps([row["text"] for row in ROWS]),
        "\n".join(map(json.dumps, ROWS)),
    ],
    ids=["list", "data", "other list", "texts", "lines"],
)
def test_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.json").write_text(content)
    assert list(load_rows(source(tmp_path / "data.json"))) == ROWS


def test_json_of_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}]}
    (tmp_path / "data.json").write_text(json.dumps(row))
    assert list(load_rows(source(tmp_path / "data.json"))) == [row]


def test_txt(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_bytes("\ufeffone\r\n\n  \n two\x0c\u2028x\nthree".encode())
    rows = load_rows(source(tmp_path / "data.txt"))
    assert list(rows) == [{"text": "one"}, {"text": " two\x0c\u2028x"}, {"text": "three"}]
    assert rows.where(1) == "line 4"


def test_csv(tmp_path: Path) -> None:
    long = "x" * 200_000  # beyond Python's limit for a field
    with open(tmp_path / "data.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "label"], ["a, b\nc", "0"], [long, "1"], ["short"], [1, 2, 3]])
    before = csv.field_size_limit()
    assert list(load_rows(source(tmp_path / "data.csv"))) == [
        {"text": "a, b\nc", "label": "0"},
        {"text": long, "label": "1"},
        {"text": "short", "label": None},
        {"text": "1", "label": "2"},
    ]
    assert csv.field_size_limit() == before


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": [{"role": "user", "content": f"m{n}"}], "n": n} for n in range(10)]
    folder = tmp_path / "split=train"  # not a column
    folder.mkdir()
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "data.parquet", row_group_size=3)
    assert list(load_rows(source(folder / "data.parquet"))) == rows


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    jsonl(tmp_path, ROWS)
    assert list(load_rows(source("~/data.jsonl"))) == ROWS


# --- files that can't be read -------------------------------------------------------------


@pytest.mark.parametrize("name", ["no.jsonl", "no/such.txt", "./folder", "/no/where"])
def test_missing_file_is_never_sent_to_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
    assert error_of(load_rows, source(name)).startswith(f"{name}: there is no such file")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "txt", "csv"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_file(tmp_path: Path, suffix: str, content: str) -> None:
    path = tmp_path / f"data.{suffix}"
    path.write_text(content)
    assert error_of(load_rows, source(path)) == f"{path}: is empty: it has no rows"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl, line 3: is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "a.jsonl, line 2: should be an object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1: is not valid JSON"),
        ("a.json", b'[{"text": "a"}, {', "a.json: is not valid JSON"),
        ("a.json", b'[{"text": "a"}, 3]', "a.json, row 2: should be an object"),
        ("a.json", b'{"a": [], "b": []}', "a.json: should be a list of rows"),
        ("a.json", b"3", "a.json: should be a list of rows, found 3"),
        ("a.json", b'{"text": "a"}\n{"text": \n', "a.json, line 2: is not valid JSON"),
        ("a.txt", b"caf\xe9\n", "a.txt: is not UTF-8 text"),
        ("a.json", b'["\xe9"]', "a.json: is not UTF-8 text"),
        ("a.csv", b"text\ncaf\xe9\n", "a.csv: is not UTF-8 text"),
        ("a.parquet", b"not parquet at all", "a.parquet: is not a readable parquet file"),
        ("a.parquet", b"", "a.parquet: is not a readable parquet file"),
        ("a.xml", b"<a/>", "a.xml: can't tell its format"),
    ],
)
def test_malformed_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    assert error_of(load_rows, source(name)).startswith(message)


def test_folder_with_a_files_name(tmp_path: Path) -> None:
    (tmp_path / "data.txt").mkdir()
    message = error_of(load_rows, source(tmp_path / "data.txt"))
    assert f"{tmp_path / 'data.txt'}: is a folder that the datasets library can't read: " in message
    assert "name a file in it, or a folder of .jsonl, .json, .txt, .csv, .parquet files" in message


# --- Hugging Face data sets ---------------------------------------------------------------


class FakeHub:
    """Stands for ``datasets.load_dataset``: remembers the call, has the splits it is given."""

    def __init__(self, **splits: list[dict[str, Any]]) -> None:
        self.splits = splits
        self.call: tuple[Any, ...] = ()

    def __call__(self, name: str, config: Any, *, split: Any, revision: Any) -> Any:
        self.call = (name, config, split, revision)
        return self.splits if split is None else self.splits[split]


@pytest.mark.parametrize(
    ("splits", "asked", "taken"),
    [
        (["train", "test"], None, "train"),
        (["validation"], None, "validation"),
        (["train", "test"], "test", "test"),
    ],
)
def test_split(monkeypatch: pytest.MonkeyPatch, splits: list[str], asked: Any, taken: str) -> None:
    hub = FakeHub(**{split: [{"text": split}] for split in splits})
    monkeypatch.setattr("datasets.load_dataset", hub)
    rows = load_rows(source("org/set", config="main", split=asked, revision="v1"))
    assert list(rows) == [{"text": taken}]
    assert hub.call == ("org/set", "main", asked, "v1")
    result = prepare(calibration("org/set", split=asked, samples=1), PLAIN, "m")
    assert result.sources[0]["split"] == taken


def test_split_must_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", FakeHub(a=[{}], b=[{}]))
    assert "has no split 'train'; choose one with 'split:' from a, b" in error_of(
        load_rows, source("org/set")
    )


def test_data_set_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among: ['main']")

    monkeypatch.setattr("datasets.load_dataset", fail)
    message = error_of(prepare, calibration("org/set"), PLAIN, "./math")
    assert message.startswith("./math: org/set: is no file here and can't be loaded")
    assert message.endswith("Config name is missing. Please pick one among: ['main']")


def test_empty_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", FakeHub(train=[]))
    assert "org/set: split train is empty" in error_of(load_rows, source("org/set"))


def test_folder_through_the_real_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder, ROWS, "train.jsonl")
    rows = load_rows(source(folder))
    assert [rows[index] for index in range(len(rows))] == ROWS
    assert rows.split == "train"


@pytest.mark.parametrize(
    ("splits", "asked", "taken"),
    [
        (["train", "test"], None, "train"),
        (["train", "test"], "test", "test"),
        (["validation"], None, "validation"),
        ("train", "train", "train"),
        ("test", None, "test"),
        (None, None, "train"),
        (None, "train", "train"),
    ],
)
def test_folder_that_was_saved_to_disk(
    tmp_path: Path, splits: Any, asked: str | None, taken: str
) -> None:
    def saved(split: str | None) -> datasets.Dataset:
        rows = [{"text": str(split)}, {"text": "b"}]
        # As another program left it: as tensors, of the labels alone.
        rows = [{**row, "label": 1} for row in rows]
        made = datasets.Dataset.from_list(rows, split=split and datasets.NamedSplit(split))
        return made.with_format("numpy", columns=["label"])

    if isinstance(splits, list):
        whole: Any = datasets.DatasetDict({split: saved(split) for split in splits})
    else:
        whole = saved(splits)
    whole.save_to_disk(tmp_path / "set.json")  # whatever it is called
    rows = load_rows(source(tmp_path / "set.json", split=asked))
    named = taken if splits is not None else "None"
    assert [rows[index] for index in range(len(rows))] == [
        {"text": named, "label": 1},
        {"text": "b", "label": 1},
    ]
    assert rows.split == taken


def test_split_that_was_not_saved_to_disk(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(a=one, b=one).save_to_disk(tmp_path / "two")
    one.save_to_disk(tmp_path / "one")
    for name, split, found in (("two", None, "train"), ("two", "c", "c"), ("one", "test", "test")):
        assert error_of(load_rows, source(tmp_path / name, split=split)) == (
            f"{tmp_path / name}: has no split '{found}'; choose one with 'split:' from "
            + ("a, b" if name == "two" else "train")
        )
    message = error_of(load_rows, source(tmp_path / "one", config="main"))
    assert message.endswith("has neither config nor revision: leave them out")
    (tmp_path / "one/state.json").write_text("{")
    message = error_of(prepare, calibration(tmp_path / "one"), PLAIN, "./math")
    assert message.startswith(f"./math: {tmp_path / 'one'}: is a folder that the datasets library")


def test_folder_of_files_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    hashes = set()
    for name, order in (("one", "abc"), ("two", "cab")):
        for letter in order:
            (tmp_path / name).mkdir(exist_ok=True)
            jsonl(tmp_path / name, [{"text": letter}], f"{letter}.jsonl")
        hashes.add(prepare(calibration(tmp_path / name), PLAIN, "m").content_hash)
    assert len(hashes) == 1
    jsonl(tmp_path / "one", [{"text": "d"}], "a.jsonl")  # not what is in the cache
    assert prepare(calibration(tmp_path / "one"), PLAIN, "m").content_hash not in hashes


def test_local_files_write_nothing(tmp_path: Path) -> None:
    prepare(calibration(jsonl(tmp_path, ROWS)), PLAIN, "m")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


# --- fields -------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    ("row", "keys", "expected"),
    [
        ({"messages": CHAT, "text": "t"}, {}, CHAT),
        ({"prompt": "p", "completion": "c", "text": "t"}, {}, "p"),
        ({"prompt": "p", "completion": "c"}, {"include_completion": True}, "pc"),
        ({"prompt": "p", "completion": None}, {"include_completion": True}, "p"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {"include_completion": True}, CHAT),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {}, CHAT[:1]),
        ({"text": "t", "question": "q", "completion": "c"}, {"include_completion": True}, "t"),
        ({"question": "q", "instruction": "i"}, {}, "q"),
        ({"instruction": "i"}, {}, "i"),
        ({"instruction": "i", "input": "x"}, {}, "i\nx"),
        ({"instruction": "i", "input": ""}, {}, "i"),
        ({"instruction": "i", "input": None}, {}, "i"),
        ({"instruction": "i", "input": "x"}, {"column": "instruction"}, "i"),
        ({"text": "t", "body": "b"}, {"column": "body"}, "b"),
        ({"text": "t", "chat": CHAT}, {"column": "chat"}, CHAT),
        ({"prompt": "p", "completion": "c"}, {"column": "completion"}, "c"),
        ({"prompt": "", "text": "t"}, {}, "t"),
        ({"messages": None, "text": "t"}, {}, "t"),
        ({"text": "  \n"}, {}, ""),
        ({"messages": []}, {}, ""),
        ({"text": " kept as it is \n"}, {}, " kept as it is \n"),
    ],
)
def test_field(row: dict[str, Any], keys: dict[str, Any], expected: Any) -> None:
    assert row_input(row, source("a.jsonl", **keys)) == expected


def test_messages_keep_what_templates_ask_for() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"x": 1}], "name": None}
    assert row_input({"messages": [call]}, source("a.parquet")) == [
        {"role": "assistant", "content": None, "tool_calls": [{"x": 1}]}
    ]


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        ({"body": "b", "n": 1}, {}, "has no field of messages, prompt, .*; it has body, n; name"),
        ({}, {}, "it has nothing"),
        ({"text": "t"}, {"column": "body"}, "has no column 'body'; it has text; name"),
        ({"text": 3}, {}, "field 'text' should be text or a list .* found 3"),
        ({"messages": ["hi"]}, {}, "field 'messages' should be"),
        (
            {"messages": [{"from": "Bob", "value": "hi"}]},
            {},
            "message 1 is from 'Bob', which is none",
        ),
        ({"prompt": "p"}, {"include_completion": True}, "has no field completion"),
        ({"prompt": "p", "completion": CHAT}, {"include_completion": True}, "both be text"),
    ],
)
def test_row_that_cannot_be_used(
    tmp_path: Path, row: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    good = {"text": "t", "prompt": "p", "completion": "c", "body": "b"}
    path = jsonl(tmp_path, [good, row])
    with pytest.raises(CalibrationError, match=message) as caught:
        prepare(calibration(path, **keys), PLAIN, "./math")
    assert caught.value.message.startswith(f"./math: {path}, line 2: ")


def test_half_a_character(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "cut \\ud83d emoji"}')
    message = error_of(prepare, calibration(path), PLAIN, "./math")
    assert message == f"./math: {path}, line 1: holds half a character ('\\ud83d'); remove it"


def test_empty_rows_are_passed_over(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": ""}] * 50 + [{"text": "a"}, {"text": "b"}, {"text": "c"}])
    result = prepare(calibration(path, samples=2), PLAIN, "m")
    assert len(result.sequences) == 2
    assert not result.warnings
    assert result.sources[0]["rows"] == 53


def test_only_empty_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": ""}, {"text": None}])
    message = error_of(prepare, calibration(path), PLAIN, "./math")
    assert message == f"./math: {path}: is empty: none of its rows holds any text"


# --- sampling -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "samples", "seed", "expected"),
    [
        (1000, 5, 0, [392, 942, 404, 87, 923]),
        (1000, 5, 1, [819, 989, 691, 932, 661]),
        (4, 9, 0, [3, 2, 0, 1]),
    ],
)
def test_sample_order_is_the_same_everywhere(
    count: int, samples: int, seed: int, expected: list[int]
) -> None:
    assert sample_order(count, samples, seed) == expected


@given(st.integers(0, 60), st.integers(1, 80), st.integers(1, 80), st.integers())
def test_more_samples_keep_the_fewer(count: int, few: int, more: int, seed: int) -> None:
    few, more = sorted((few, more))
    order = sample_order(count, more, seed)
    assert order[: min(few, count)] == sample_order(count, few, seed)
    assert len(set(order)) == min(count, more)


def test_sampled_rows_stand_in_their_own_order(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": f"{n:03}"} for n in range(200)])
    result = prepare(calibration(path, samples=20, seed=3), PLAIN, "m")
    texts = [PLAIN.decode(ids) for ids in ids_of(result)]
    assert texts == [f"{n:03}" for n in sorted(sample_order(200, 20, 3))]


def test_fewer_rows_than_asked_for(tmp_path: Path) -> None:
    path = jsonl(tmp_path, ROWS)
    result = prepare(calibration(path, samples=5), PLAIN, "m")
    assert len(result.sequences) == 3
    assert result.warnings == [
        f"{path} has 3 usable rows, fewer than the 5 samples asked for: all are used"
    ]


def test_only_drawn_rows_are_looked_at(tmp_path: Path) -> None:
    rows: list[Any] = [{"bad": n} for n in range(10)]
    rows[sample_order(10, 1, 0)[0]] = {"text": "a"}
    result = prepare(calibration(jsonl(tmp_path, rows), samples=1), PLAIN, "m")
    assert ids_of(result) == [byte_ids("a")]


def test_mixture(tmp_path: Path) -> None:
    one = jsonl(tmp_path, [{"text": f"a{n}"} for n in range(9)], "one.jsonl")
    (tmp_path / "two.txt").write_text("b0\nb1\n")
    mixture = Calibration.model_validate(
        [{"data": str(one), "samples": 3}, {"data": str(tmp_path / "two.txt"), "samples": 2}]
    )
    result = prepare(mixture, PLAIN, "m")
    assert [PLAIN.decode(ids)[0] for ids in ids_of(result)] == ["a"] * 3 + ["b"] * 2
    assert result.tokens == 10
    assert [(s["data"], s["rows"], s["sampled"]) for s in result.sources] == [
        (str(one), 9, 3),
        (str(tmp_path / "two.txt"), 2, 2),
    ]
    json.dumps(result.sources)


# --- tokens -------------------------------------------------------------------------------


def test_special_tokens_are_the_tokenizers_own() -> None:
    assert tokenize("ab", PLAIN, 8).ids == byte_ids("ab")
    assert tokenize("ab", byte_tokenizer(add_bos=True), 8).ids == [BOS, *byte_ids("ab")]
    both = byte_tokenizer(add_bos=True, add_eos=True)
    assert tokenize("ab", both, 8).ids == [BOS, *byte_ids("ab"), EOS]


def test_cut_keeps_the_closing_token() -> None:
    both = byte_tokenizer(add_bos=True, add_eos=True)
    assert tokenize("abcdef", both, 4).ids == [BOS, *byte_ids("ab"), EOS]
    assert tokenize("é", both, 4).ids == [BOS, *byte_ids("é"), EOS]
    assert tokenize("abcdef", PLAIN, 4).ids == byte_ids("abcd")
    assert tokenize("abcdef", PLAIN, None).ids == byte_ids("abcdef")


def test_cut_and_padding_in_the_tokenizers_file_do_not_count() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=16)
    assert tokenize("abcdef", tokenizer, 4).ids == byte_ids("abcd")
    assert tokenize("abcdef", tokenizer, None).ids == byte_ids("abcdef")


def test_no_room_beside_the_special_tokens(tmp_path: Path) -> None:
    both = byte_tokenizer(add_bos=True, add_eos=True)
    path = jsonl(tmp_path, ROWS)
    message = error_of(prepare, calibration(path, max_length=2), both, "./math")
    assert message.startswith("./math: max_length 2 leaves no room beside the 2 special tokens")


def test_the_models_own_limit(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": "a" * 50}] * 3)
    result = prepare(calibration(path, max_length=32, samples=3), PLAIN, "m", limit=16)
    assert [len(ids) for ids in ids_of(result)] == [16] * 3
    assert result.warnings == ["max_length is 16, the longest that the model takes, instead of 32"]
    assert not prepare(calibration(path, max_length=9, samples=3), PLAIN, "m", limit=16).warnings


def test_chat_template_does_not_double_the_bos(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"messages": CHAT}])
    tokenizer = byte_tokenizer(add_bos=True, add_eos=True, chat_template=CHAT_TEMPLATE)
    result = prepare(calibration(path), tokenizer, "m")
    expected = [BOS, *byte_ids("<user>hi"), EOS, *byte_ids("<assistant>yo"), EOS]
    assert ids_of(result) == [expected]
    by_transformers = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert ids_of(result) == [by_transformers]
    assert result.template == hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()


def test_chat_and_text_in_one_mixture(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"messages": CHAT[:1]}, {"text": "hi"}])
    tokenizer = byte_tokenizer(add_bos=True, chat_template=CHAT_TEMPLATE)
    assert ids_of(prepare(calibration(path), tokenizer, "m")) == [
        [BOS, *byte_ids("<user>hi"), EOS],
        [BOS, *byte_ids("hi")],
    ]


def test_text_alone_uses_no_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    assert prepare(calibration(jsonl(tmp_path, ROWS)), tokenizer, "m").template is None


def test_no_chat_template(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"messages": CHAT}])
    message = error_of(prepare, calibration(path), PLAIN, "./math")
    assert message.startswith(f"./math: {path}, line 1: holds messages, but the model's tokenizer")
    assert "has no chat template" in message


def test_chat_template_that_refuses(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"messages": [{"role": "robot", "content": "x"}]}])
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    assert "line 1: the chat template doesn't take these messages: unknown role robot" in error_of(
        prepare, calibration(path), tokenizer, "m"
    )


def test_saved_tokenizer_comes_back(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    saved = byte_tokenizer(tmp_path, add_bos=True, chat_template=CHAT_TEMPLATE)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n\treturn 'é'  # \x00 \N{SNOWMAN}"
    for template in (None, CHAT_TEMPLATE):
        sequence = tokenize(f"<s>{text}</s>", loaded, 64, template)
        assert sequence == tokenize(f"<s>{text}</s>", saved, 64, template)
        assert sequence.ids == [BOS] * (template is None) + [BOS, *byte_ids(text), EOS]
    assert loaded.chat_template == CHAT_TEMPLATE


# --- packing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequences", "length", "separator", "expected"),
    [
        ([[1, 2, 3], [4, 5]], 2, None, [[1, 2], [3, 4]]),
        ([[1, 2, 3], [4, 5]], 2, 9, [[1, 2], [3, 9], [4, 5]]),
        ([[1, 2, 9], [4, 5]], 2, 9, [[1, 2], [9, 4]]),
        ([[1], [2]], 8, 9, [[1, 9, 2]]),
        ([[1], [2]], 3, 9, [[1, 9, 2]]),
        ([], 3, 9, []),
    ],
)
def test_pack(
    sequences: list[list[int]], length: int, separator: Any, expected: list[list[int]]
) -> None:
    assert pack(sequences, length, separator) == expected


def test_packing_joins_whole_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": "abcdefg"}, {"text": "hij"}])
    tokenizer = byte_tokenizer(add_bos=True)
    result = prepare(calibration(path, packing=True, max_length=4), tokenizer, "m")
    stream = [BOS, *byte_ids("abcdefg"), EOS, BOS, *byte_ids("hij")]
    assert ids_of(result) == [stream[0:4], stream[4:8], stream[8:12]]
    without_eos = byte_tokenizer(has_eos=False)
    result = prepare(calibration(path, packing=True, max_length=4), without_eos, "m")
    assert ids_of(result) == [byte_ids("abcd"), byte_ids("efgh")]


# --- hash and batches ---------------------------------------------------------------------


def hash_of(sequences: list[list[int]]) -> str:
    return content_hash(map(TokenSequence, sequences))


def test_content_hash() -> None:
    by_hand = b"".join(number.to_bytes(8, "little") for number in [2, 1, 258, 1, 3])
    assert hash_of([[1, 258], [3]]) == hashlib.sha256(by_hand).hexdigest()
    hashes = {hash_of(s) for s in ([[1, 2], [3]], [[1], [2, 3]], [[3], [1, 2]], [[1, 2, 3]])}
    assert len(hashes) == 4


def test_content_hash_follows_what_is_measured(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": f"row {n}"} for n in range(50)])
    first = prepare(calibration(path, samples=10), PLAIN, "m")
    again = prepare(calibration(path, samples=10, batch_size=7), PLAIN, "other")
    seeded = prepare(calibration(path, samples=10, seed=1), PLAIN, "m")
    assert first.content_hash == again.content_hash == content_hash(first.sequences)
    assert first.content_hash != seeded.content_hash


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6)), st.integers(1, 5))
def test_batches_hold_every_sequence_once(sequences: list[list[int]], size: int) -> None:
    ordered = [TokenSequence(ids) for ids in sorted(sequences, key=len)]
    made: list[list[list[int]]] = []
    while (start := sum(map(len, made))) < len(ordered):
        made.append([sequence.ids for sequence in next_batch(ordered, start, size)])
    assert sorted(s for batch in made for s in batch) == sorted(sequences)
    assert all(1 <= len(batch) <= size for batch in made)
    assert all(len(s) == len(batch[0]) for batch in made for s in batch)
    # And no more batches than that takes.
    needed = Counter(map(len, sequences)).values()
    assert len(made) == sum(-(-count // size) for count in needed)


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        next_batch([TokenSequence([1])], 0, 0)
