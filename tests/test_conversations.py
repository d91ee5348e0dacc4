"""Conversations in every usual form, through chat templates of every kind, on any day."""

from __future__ import annotations

import csv
import datetime
import json
import locale
from pathlib import Path
from typing import Any

import datasets
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

import commands
from commands import obim_saliency, refusal, says, succeed, write_recipe, write_rows
from mergekit_obim.calibration.data import TokenizedCalibration, prepare
from mergekit_obim.calibration.data.text import row_input
from mergekit_obim.errors import CalibrationError
from mergekit_obim.recipe.calibration import Calibration, DataSource
from tiny_tokenizers import byte_tokenizer

MESSAGES = [{"role": "user", "content": "hel'lo\n"}, {"role": "assistant", "content": "yo"}]
SHAREGPT = [{"from": "human", "value": "hel'lo\n"}, {"from": "gpt", "value": "yo"}]

# As a text model's, as a vision model's, as either's, and with a habit for each role.
TEXT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}"
    "{% if p.type == 'image' %}[image]{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
MIXED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'user' %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
STRICT = "{% if messages[0].content is string %}{{ raise_exception('parts') }}{% endif %}" + PARTS
TEMPLATES = {"text": TEXT, "parts": PARTS, "either": EITHER, "mixed": MIXED, "strict": STRICT}
WRITTEN = "<user>hel'lo\n<assistant>yo"


def prepared(data: Path, template: str | None = TEXT, **calibration: Any) -> TokenizedCalibration:
    options = Calibration.model_validate({"data": str(data), **calibration})
    return prepare(options, byte_tokenizer(chat_template=template), "./expert")


def written(folder: Path, row: dict[str, Any], template: str = TEXT, **calibration: Any) -> str:
    """What the model is shown of a row."""
    data = write_rows(folder / "data.jsonl", [row])
    (sequence,) = prepared(data, template, **calibration).sequences
    return byte_tokenizer().decode(sequence.ids)


def parts(text: str, kind: str = "text") -> list[dict[str, Any]]:
    return [{"type": kind, "text": text[:2], "annotations": []}, {"type": kind, "text": text[2:]}]


def in_parts(**types: str) -> list[dict[str, Any]]:
    return [{**m, "content": parts(m["content"], types.get(m["role"], "text"))} for m in MESSAGES]


FORMS: dict[str, dict[str, Any]] = {
    "OpenAI": {"messages": MESSAGES},
    "parts": {"messages": in_parts()},
    "OpenAI's newer parts": {"messages": in_parts(user="input_text", assistant="output_text")},
    "parts that are texts": {"messages": [{**m, "content": [*m["content"]]} for m in MESSAGES]},
    "one part, no list": {"messages": [{**m, "content": {"text": m["content"]}} for m in MESSAGES]},
    "parts as parquet has them": {
        "messages": [
            {**m, "content": [*parts(m["content"]), {"type": "text", "text": None, "image": None}]}
            for m in MESSAGES
        ]
    },
    "Gemini": {"messages": [{"role": m["role"], "parts": parts(m["content"])} for m in MESSAGES]},
    "JSON": {"messages": json.dumps(MESSAGES)},
    "JSON with parts": {"messages": json.dumps(in_parts(), indent=1)},
    "JSON in JSON": {"messages": json.dumps(json.dumps(MESSAGES))},
    "JSON of a whole row": {"messages": json.dumps({"id": 1, "messages": MESSAGES})},
    "JSON of each message": {"messages": [json.dumps(m) for m in MESSAGES]},
    "JSON of the content": {
        "messages": [{**m, "content": json.dumps(parts(m["content"]))} for m in MESSAGES]
    },
    "as Python prints it": {"messages": str(in_parts())},
    "another column": {"messages": MESSAGES[:1], "chat": json.dumps(MESSAGES)},
    "lists": {"messages": {key: [m[key] for m in MESSAGES] for key in ("role", "content")}},
    "ShareGPT": {"conversations": SHAREGPT},
    "ShareGPT as JSON": {"conversations": json.dumps(SHAREGPT)},
    "ShareGPT's words elsewhere": {"messages": SHAREGPT},
    "roles by another name": {
        "conversation": [{**SHAREGPT[0], "from": "User"}, {**SHAREGPT[1], "from": "assistant"}]
    },
    "Capybara": {"conversation": [{"input": "hel'lo\n", "output": "yo"}]},
    "preferences": {"chosen": MESSAGES, "rejected": MESSAGES[:1]},
    "prompt": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "prompt of one message": {"prompt": MESSAGES[0], "completion": MESSAGES[1]},
    "prompt as JSON": {"prompt": json.dumps(in_parts()[:1]), "completion": str(MESSAGES[1:])},
    "prompt in ShareGPT's words": {"prompt": SHAREGPT[:1], "completion": SHAREGPT[1:]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_means_the_same(form: str, tmp_path: Path) -> None:
    row = FORMS[form]
    keys = {"include_completion": True, **({"column": "chat"} if "chat" in row else {})}
    for template in TEMPLATES.values():
        assert written(tmp_path, row, template, **keys) == WRITTEN


def test_every_file_means_the_same(tmp_path: Path) -> None:
    rows = [{"messages": MESSAGES}, {"messages": in_parts()}]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    for name, dump in (("c.csv", json.dumps), ("d.csv", str)):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows([["messages"], *[[dump(row["messages"])] for row in rows]])
    tables = {
        "e.parquet": [{"messages": MESSAGES}] * 2,
        "f.parquet": [{"messages": in_parts()}] * 2,
        "g.parquet": [{"messages": json.dumps(row["messages"])} for row in rows],
    }
    for name, table in tables.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / name)
    hashes = {prepared(path).content_hash for path in sorted(tmp_path.iterdir())}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"type": "object", "properties": {"role": {"type": "string"}}}',
        '[{"from": "me@example.org", "text": "a mail"}]',
        '[{"type": "integer"}]',
        '{"role": "admin"}',
        "[{'role': 'user'}]",
        '"role": "user", "content": "x"',
        '[{"input": "1", "output": "2"}]',
        "[INST] hello [/INST]",
        '["role:", "content"]',
    ],
)
def test_a_document_stays_text(text: str) -> None:
    assert row_input({"text": text}, DataSource(data="a.jsonl")) == text
    message = [{"role": "user", "content": text}]
    assert row_input({"messages": message}, DataSource(data="a.jsonl")) == message


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]}, "abc"),
        ({"instruction": "Sum up.", "context": "Long.", "response": "L."}, "Sum up.\nLong."),
        ({"instruction": "Sum up.", "input": "", "context": "Long."}, "Sum up.\nLong."),
        ({"system": "S", "messages": MESSAGES}, [{"role": "system", "content": "S"}, *MESSAGES]),
        ({"system": "S", "messages": [{"role": "system", "content": "T"}]}, "T"),
        ({"system": "S", "text": "t"}, "t"),
        ({"messages": [], "conversations": SHAREGPT}, MESSAGES),
        ({"text": "t", "conversations": SHAREGPT}, "t"),
        ({"messages": "[]"}, ""),
    ],
)
def test_other_rows(row: dict[str, Any], expected: Any) -> None:
    found = row_input(row, DataSource(data="a.jsonl"))
    assert (found[0]["content"] if expected == "T" else found) == expected


# --- what is refused ----------------------------------------------------------------------

UNCLEAR: dict[str, tuple[dict[str, Any], list[str]]] = {
    "numpy's print": (
        {"messages": "[{'role': 'user', 'content': 'hi'}\n {'role': 'assistant'}]"},
        ["field 'messages' should be text, or messages as JSON", "json.dumps", ".parquet"],
    ),
    "numpy's print of a prompt": (
        {"prompt": "[{'role': 'user', 'content': 'hi'}\n {'role': 'assistant'}]"},
        ["field 'prompt' should be text, or messages as JSON", "found \"[{'role'"],
    ),
    "half of it": (
        {"conversations": '[{"from": "human", "value": "hi"'},
        ["field 'conversations' should be text, or messages as JSON"],
    ),
    "something else": ({"messages": '{"a": 1}'}, ["field 'messages' should be text, or messages"]),
    "sound": (
        {"messages": [MESSAGES[0], {"role": "user", "content": [{"type": "input_audio"}]}]},
        ["message 2 has a part of type 'input_audio'", "keep parts of type text and image"],
    ),
    "a part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "txt": "hi"}]}]},
        ["message 1: its content should be a text or a list", "'txt': 'hi'"],
    ),
    "a mapping": (
        {"messages": [{"role": "user", "content": {"a": 1}}]},
        ["message 1: its content should be a text or a list", "found {'a': 1}"],
    ),
    "nobody's name": (
        {"conversations": [{"from": "Bob", "value": "hi"}]},
        ["message 1 is from 'Bob'", "human, user, gpt"],
    ),
    "no content": ({"messages": [{"role": "user", "body": "hi"}]}, ["'messages' should be"]),
    "texts": ({"text": ["a", "b"]}, ["field 'text' should be", "found ['a', 'b']", "column:"]),
    "images as a prompt": ({"prompt": [{"type": "image"}]}, ["field 'prompt' should be"]),
    "tools": (
        {"messages": MESSAGES, "tools": "f(x)"},
        ["field 'tools' is not valid JSON"],
    ),
    "tools' names": (
        {"messages": MESSAGES, "tools": ["f"]},
        ["field 'tools' should be a list of function descriptions, found ['f']"],
    ),
}


@pytest.mark.parametrize("fault", UNCLEAR)
def test_what_is_not_clear_is_refused(fault: str, tmp_path: Path) -> None:
    row, words = UNCLEAR[fault]
    data = write_rows(tmp_path / "data.jsonl", [{"text": "t"}, row])
    with pytest.raises(CalibrationError) as caught:
        prepared(data)
    says(caught.value.message, f"./expert: {data}, line 2: ", *words)
    assert "\n" not in caught.value.message


PRINTING = {
    "JSON": "{{ messages | tojson }}",
    "JSON on many lines": "{{ messages | tojson(indent=2) }}",
    "a list": "{{ messages }}",
    "messages": "{% for m in messages %}{{ m }}{% endfor %}",
    "a list of parts": "{% if messages[0].content is string %}{{ raise_exception('parts') }}"
    "{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
    "the assistant's parts": "{% for m in messages %}{% if m.content is string %}"
    "{{ raise_exception('parts') }}{% elif m.role == 'user' %}{{ m.content[0].text }}"
    "{% else %}{{ m.content | trim }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("kind", PRINTING)
@pytest.mark.parametrize("row", [{"messages": MESSAGES}, {"messages": in_parts()}])
def test_a_template_that_prints_lists_or_json_is_refused(
    kind: str, row: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError) as caught:
        written(tmp_path, row, PRINTING[kind])
    says(
        caught.value.message,
        *(f"./expert: {tmp_path / 'data.jsonl'}, line 1: ", "prints messages as a Python list or"),
        *("chat_template.jinja", "prompt or text fields"),
    )


def test_text_that_looks_like_it_was_printed_is_no_fault(tmp_path: Path) -> None:
    content = """{'role': 'user', 'content': [{'type': 'text', 'text': "hi"}]} or {"text": "hi"}"""
    row = {"messages": [{"role": "user", "content": content}, *in_parts()]}
    for template in TEMPLATES.values():
        assert written(tmp_path, row, template) == f"<user>{content}{WRITTEN}"


def test_a_template_that_shows_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="line 1: the chat template shows nothing of these"):
        written(tmp_path, {"messages": MESSAGES}, "hello")


def test_a_template_that_draws_lots_is_refused(tmp_path: Path) -> None:
    template = "{{ range(99999) | random }} {{ range(99999) | random }}" + TEXT
    with pytest.raises(CalibrationError, match="writes another text each time: take what is"):
        written(tmp_path, {"messages": MESSAGES}, template)


# --- tools --------------------------------------------------------------------------------

ARGUMENTS = {"city": "Köln"}
_CALL = "{% for c in m.tool_calls %}[{{ c.function.name }} ARGUMENTS]{% endfor %}"
WITH_CALLS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + _CALL + "{% endfor %}"
# Qwen's way, and DeepSeek's.
MAPPINGS = WITH_CALLS.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")
TEXTS = WITH_CALLS.replace("ARGUMENTS", "{{ '' + c.function.arguments }}")
ANY = WITH_CALLS.replace("ARGUMENTS", "{{ c.function.arguments }}")


def called(arguments: object) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "22"},
    ]


CALLS: dict[str, dict[str, Any]] = {
    "OpenAI": {"messages": called(json.dumps(ARGUMENTS, ensure_ascii=False))},
    "transformers": {"messages": called(ARGUMENTS)},
    "OpenAI until 2023": {
        "messages": [
            {"role": "user", "content": "w?"},
            {
                "role": "assistant",
                "content": None,
                "function_call": {
                    "name": "weather",
                    "arguments": json.dumps(ARGUMENTS, ensure_ascii=False),
                },
            },
            {"role": "tool", "content": "22"},
        ]
    },
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "w?"},
            {
                "from": "function_call",
                "value": json.dumps({"name": "weather", "arguments": ARGUMENTS}),
            },
            {"from": "observation", "value": "22"},
        ]
    },
}


@pytest.mark.parametrize("form", CALLS)
@pytest.mark.parametrize("template", [MAPPINGS, TEXTS, ANY])
def test_calls_are_written_as_the_template_has_them(
    form: str, template: str, tmp_path: Path
) -> None:
    found = written(tmp_path, CALLS[form], template)
    assert found == '<user>w?<assistant>[weather {"city": "Köln"}]<tool>22'


def test_a_call_is_text_where_the_template_knows_none(tmp_path: Path) -> None:
    found = written(tmp_path, CALLS["ShareGPT"])
    call = CALLS["ShareGPT"]["conversations"][1]["value"]
    assert found == f"<user>w?<assistant>{call}<tool>22"


@pytest.mark.parametrize("content", [{"degrees": 22}, [{"type": "json", "degrees": 22}]])
def test_a_tools_answer_is_json_and_not_pythons(content: Any, tmp_path: Path) -> None:
    row = {"messages": [MESSAGES[0], {"role": "tool", "content": content}]}
    assert written(tmp_path, row) == f"<user>hel'lo\n<tool>{json.dumps(content)}"


@pytest.mark.parametrize("dump", [lambda tools: tools, json.dumps])
def test_tools_are_shown_to_the_template(dump: Any, tmp_path: Path) -> None:
    plain = {"name": "weather", "parameters": {"type": "object"}}
    whole = {"type": "function", "function": plain}
    for tools in ([plain], [whole]):
        row = {"messages": MESSAGES, "tools": dump(tools)}
        found = written(tmp_path, row, "{{ tools | tojson }}" + TEXT)
        assert found == json.dumps([whole]) + WRITTEN
    assert written(tmp_path, {"messages": MESSAGES, "tools": ""}) == WRITTEN


# --- the clock ----------------------------------------------------------------------------

CLOCK = "{{ strftime_now('%d %B %Y, %A, %H:%M:%S.%f') }}" + TEXT


def test_the_clock_stands_still(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", [{"messages": MESSAGES}])
    result = prepared(data, CLOCK)
    day = "01 January 2025, Wednesday, 00:00:00.000000"
    assert byte_tokenizer().decode(result.sequences[0].ids) == day + WRITTEN
    assert result.date == "2025-01-01"
    assert prepared(data, CLOCK, date=datetime.date(2024, 2, 29)).date == "2024-02-29"
    assert written(tmp_path, {"messages": MESSAGES}, CLOCK, date="2024-02-29").startswith("29 Feb")
    # A template that does not ask is told nothing, and nothing is recorded.
    unasked = "{% if messages | length > 9 %}{{ strftime_now('%Y') }}{% endif %}" + TEXT
    assert prepared(data, unasked).date is None
    # What others write with the same template has today's date.
    other = byte_tokenizer(chat_template=CLOCK).apply_chat_template(MESSAGES, tokenize=False)
    assert not other.startswith("01 January 2025")


def test_a_template_that_is_given_no_date_has_its_own(tmp_path: Path) -> None:
    template = (
        "{% if date_string is not defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
        "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{{ date_string }}"
    )
    assert written(tmp_path, {"messages": MESSAGES}, template + TEXT) == "01 Jan 2025" + WRITTEN


def test_the_same_file_on_another_day(
    world: commands.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "expert").mkdir()
    for file in world.chat.iterdir():
        (tmp_path / "expert" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "expert/chat_template.jinja").write_text(CLOCK)
    data = write_rows(tmp_path / "data.jsonl", [{"messages": MESSAGES}] * 3)
    models = [{"model": str(tmp_path / "expert"), "calibration": str(data)}]
    recipe = world.recipe(models=models, calibration={"samples": 3})
    path, out = write_recipe(tmp_path, recipe), tmp_path / "out"
    succeed(obim_saliency(path, out))
    file = world.saliency_of(tmp_path / "expert", out)
    assert json.loads(commands.header(file)["calibration"])["date"] == "2025-01-01"
    assert "kept" in succeed(obim_saliency(path, out)).stdout  # some microseconds later
    assert "no errors" in succeed(obim_saliency("--check", path, out)).stdout
    write_recipe(tmp_path, {**recipe, "calibration": {"samples": 3, "date": "2025-12-24"}})
    for command in (obim_saliency(path, out), obim_saliency("--check", path, out)):
        assert command.exit_code == 1
        says(command.output, file, "another calibration content_hash, calibration date")
    kept = json.loads(commands.header(world.saliency_of(world.math))["calibration"])
    assert "date" not in kept


@pytest.mark.parametrize("kind", ["file", "saved", "folder"])
def test_check_says_what_the_prepass_says(
    kind: str, world: commands.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"messages": SHAREGPT}, {"messages": [{"from": "Bob", "value": "hi"}]}]
    data = tmp_path / "data"
    if kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(data)
    else:
        data.mkdir()
        file = write_rows(data / "data.jsonl", rows)
        data = file if kind == "file" else data
    models = [{"model": str(world.chat), "calibration": str(data)}]
    path = write_recipe(tmp_path, world.recipe(models=models))
    error = refusal(obim_saliency(path, tmp_path / "out")).removeprefix("Error: ")
    says(error, world.chat, f"{data}, {'line' if kind == 'file' else 'row'} 2", "is from 'Bob'")
    checked = obim_saliency("--check", path, tmp_path / "out")
    assert checked.exit_code == 1
    says(checked.stdout, error)


def test_a_text_model_gets_the_text_beside_the_images(tmp_path: Path) -> None:
    content = [{"type": "image_url", "image_url": {"url": "a.png"}}, *parts("hello")]
    for row in (
        {"messages": [{"role": "user", "content": content}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, "hello"]}], "images": ["a"]},
        {"conversations": [{"from": "human", "value": "<image>\nhello"}], "image": "a.png"},
    ):
        for template in TEMPLATES.values():
            assert written(tmp_path, row, template) == "<user>hello"
        warnings = prepared(tmp_path / "data.jsonl", samples=1).warnings
        assert warnings == [
            f"{tmp_path / 'data.jsonl'} has images, but the model takes none: only the text is used"
        ]


# --- other hidden inputs ------------------------------------------------------------------


def test_the_locale_has_no_part_in_it(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Grüße \N{SNOWMAN}"}]}
    before = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, "C")
        assert written(tmp_path, row) == "<user>Grüße \N{SNOWMAN}"
    finally:
        locale.setlocale(locale.LC_ALL, before)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_cut_at_their_end(side: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(add_eos=True)
    tokenizer.truncation_side = side
    data = write_rows(tmp_path / "data.jsonl", ["abcdef"])
    calibration = Calibration.model_validate({"data": str(data), "max_length": 4})
    (sequence,) = prepare(calibration, tokenizer, "m").sequences
    assert byte_tokenizer().decode(sequence.ids) == "abc</s>"
    assert tokenizer.truncation_side == side


def test_a_tokenizer_that_draws_lots_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {token: n for n, token in enumerate(["a", "aa", "aaaa"])}
    merges = [("a", "a"), ("aa", "aa")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, dropout=0.5))
    data = write_rows(tmp_path / "data.jsonl", ["a" * 400])
    calibration = Calibration.model_validate({"data": str(data)})
    with pytest.raises(CalibrationError, match="other tokens of the same text each time; set drop"):
        prepare(calibration, PreTrainedTokenizerFast(tokenizer_object=tokenizer), "m")
