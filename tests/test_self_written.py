"""``calibration: {data: self}``: what an expert writes, where it is kept, and what is refused."""

from __future__ import annotations

import dataclasses
import datetime
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import commands
import mergekit_obim
import tiny_models
from commands import World, refusal, says, succeed
from mergekit_obim.calibration import run, writing
from mergekit_obim.calibration.data import TokenSequence
from mergekit_obim.calibration.data.self_written import (
    Opening,
    Writing,
    opening_of,
    read_rows,
    writing_of,
)
from mergekit_obim.calibration.data.tokens import content_hash
from mergekit_obim.calibration.writing import GROUP, write_rows
from mergekit_obim.errors import CalibrationError
from mergekit_obim.recipe.calibration import Calibration
from test_ranks import run_pair, same_but_for_rounding
from tiny_processors import MODELS, architecture, processor
from tiny_tokenizers import BOS, CHAT_TEMPLATE, EOS, byte_ids, byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES, LENGTH = 5, 24
DATE = datetime.date(2025, 1, 1)
PLAIN = Opening(start=(1,))
CHAT = Opening(start=(1, 7, 8), reply=(2, 9, 10, 11), template="any")
# Many tokens end a turn, so that most rows come to an end, and some of them at once.
WRITING = Writing(
    PLAIN, stops=(2, 20, 21, 22), unused=(0, 13), firsts=(), samples=20, max_length=16, seed=3,
    dtype="float64",
)  # fmt: skip


def written(model: PreTrainedModel, writing: Writing) -> list[list[int]]:
    return [row.ids for row in write_rows(model, writing, label="m", quiet=True)]


def reference(model: PreTrainedModel, writing: Writing) -> list[list[int]]:
    """Each row by itself, without caches: the first token whose cumulative share is above u."""
    rows: list[list[int]] = []
    number = 0
    while len(rows) < writing.samples:
        draws = random.Random(f"{writing.seed}:{number}")
        number += 1
        start, reply = list(writing.opening.start), list(writing.opening.reply)
        ids = start or [draws.choice(writing.firsts)]
        turns = [ids[len(start) :]]
        given: list[int] = []
        while len(ids) < writing.max_length:
            with torch.no_grad():
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
            logits[list(writing.unused)] = -torch.inf
            u, shares = draws.random(), logits.softmax(-1).cumsum(-1)
            token = int((shares <= u).sum())
            if not given and token in writing.stops:
                room = len(ids) + len(reply) < writing.max_length
                if len(turns) == 2 or not reply or not turns[0] or not room:
                    break
                given = list(reply)
                turns.append([])
            if given:
                token = given.pop(0)
            else:
                turns[-1].append(token)
            ids = [*ids, token]
        if turns[0]:
            rows.append(ids)
    return rows


# --- what is written ----------------------------------------------------------------------


@pytest.mark.parametrize("opening", [PLAIN, CHAT, Opening(start=())], ids=["bos", "chat", "none"])
def test_rows_are_samples_of_the_model(opening: Opening) -> None:
    model = tiny_models.build("llama-untied", dtype=torch.float64)
    wanted = dataclasses.replace(WRITING, opening=opening, firsts=(5, 6, 17, 30))
    rows = written(model, wanted)
    assert rows == reference(model, wanted)
    assert len(rows) == wanted.samples
    assert not {0, 13} & {token for row in rows for token in row}
    assert min(map(len, rows)) < max(map(len, rows)) <= wanted.max_length
    if opening is CHAT:  # some have an answer, some are cut before it
        answered = ["2, 9, 10, 11" in str(row) for row in rows]
        assert any(answered)
        assert not all(answered)


@pytest.mark.parametrize(
    "name", ["mamba", "gemma3", "mixtral", "bloom", "gpt2", "opt", "falcon-old"]
)
def test_rows_of_any_architecture(name: str) -> None:
    """Whatever caches it has, and whatever its own settings of `generate` are."""
    dtype = torch.float32 if name == "mixtral" else torch.float64
    model = tiny_models.build(name, dtype=dtype)
    own = model.generation_config
    own.update(do_sample=True, top_k=1, repetition_penalty=9.0, eos_token_id=[5, 6], max_length=3)
    few = dataclasses.replace(WRITING, samples=GROUP, max_length=10)
    assert written(model, few) == reference(model, few)
    assert model.generation_config is own


def test_more_rows_begin_with_the_fewer() -> None:
    model = tiny_models.build("llama-tied")
    many = written(model, dataclasses.replace(WRITING, samples=40))
    for samples in (1, GROUP, GROUP + 3):
        assert written(model, dataclasses.replace(WRITING, samples=samples)) == many[:samples]
    assert written(model, dataclasses.replace(WRITING, seed=4)) != many[:20]


def test_where_memory_runs_out_fewer_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama-tied", dtype=torch.float64)
    few = dataclasses.replace(WRITING, samples=4)
    wanted = written(model, few)
    group, sizes = writing._group, list[int]()

    def small(*args: Any) -> Any:
        rows = group(*args)
        sizes.append(len(args[2]))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows

    monkeypatch.setattr(writing, "_group", small)
    monkeypatch.setattr(writing, "clear_device_cache", lambda **_: None)  # which takes its time
    assert written(model, few) == wanted
    assert sizes == [16, 8, 4, 4, 8, 4, 4]


def test_a_model_that_writes_nothing() -> None:
    silent = dataclasses.replace(WRITING, stops=tuple(range(48)))
    with pytest.raises(CalibrationError, match="16 rows that it began all ended at once"):
        written(tiny_models.build("llama-tied"), silent)


def test_logits_that_are_not_finite() -> None:
    model = tiny_models.build("llama-untied")
    model.lm_head.weight.data[7, 3] = torch.nan
    with pytest.raises(CalibrationError, match="not finite as it writes; give --dtype float32"):
        written(model, WRITING)


# --- how it begins ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "start", "reply"),
    [
        ({}, [BOS], []),
        ({"add_bos": True}, [BOS], []),
        ({"add_bos": True, "add_eos": True}, [BOS], []),
        (
            {"chat_template": CHAT_TEMPLATE, "add_bos": True},
            [BOS, *byte_ids("<user>")],
            [EOS, *byte_ids("<assistant>")],
        ),
        # The space belongs to the first word of the instruction.
        (
            {"chat_template": "[INST] {{ messages[0]['content'] }} [/INST]"},
            byte_ids("[INST]"),
            byte_ids(" [/INST]"),
        ),
        ({"chat_template": "{{ messages[0]['content'] }}"}, [BOS], []),
    ],
)
def test_where_rows_begin(keys: dict[str, Any], start: list[int], reply: list[int]) -> None:
    opening = opening_of(byte_tokenizer(**keys), DATE)
    assert (list(opening.start), list(opening.reply)) == (start, reply)
    assert (opening.template is None) == (start == [BOS])


def test_without_a_first_token_any_may_be_first() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    model = tiny_models.build("llama-tied")
    calibration = Calibration.model_validate("self")
    found = writing_of(calibration, tokenizer, type(model), model.config, [4, 5], 30)
    assert found is not None
    assert found.opening == Opening(start=())
    # Of 48 tokens, without the special ones and those at which it ends.
    assert found.firsts == (1, 3, *range(6, 48))
    assert found.stops == (EOS, 4, 5)
    assert (found.max_length, found.samples, found.unused) == (30, 100, ())


def test_the_end_of_a_turn_and_what_no_text_has() -> None:
    """The template's own end of turn counts, although no configuration names it."""
    template = "{{ bos_token }}{{ messages[0]['content'] }}<pad>"
    config = tiny_models.build("llama-tied").config
    config.vocab_size, config.image_token_id = 262, 99
    config.image_token_index = 300  # which has no row
    calibration = Calibration.model_validate({"data": "self", "max_length": 9})
    tokenizer = byte_tokenizer(chat_template=template)
    found = writing_of(calibration, tokenizer, None, config, None, None)
    assert found is not None
    assert found.stops == (0, EOS)
    assert found.unused == (99, 259, 260, 261)


# --- through the command ------------------------------------------------------------------


def self_recipe(world: World, *experts: Path, data: Any = "self", **changes: Any) -> dict[str, Any]:
    calibration = {"data": data, "samples": SAMPLES, "max_length": LENGTH, **changes}
    models = [{"model": str(expert), "calibration": calibration} for expert in experts]
    return world.recipe(models=models)


def rows_file(out: Path) -> Path:
    [file] = out.glob("*.jsonl")
    return file


def record(world: World, expert: Path, out: Path) -> dict[str, Any]:
    found = json.loads(commands.header(world.saliency_of(expert, out))["calibration"])
    assert isinstance(found, dict)
    return found


def test_what_is_measured_is_what_was_written(world: World, tmp_path: Path) -> None:
    path = commands.write_recipe(tmp_path, self_recipe(world, world.math))
    out = tmp_path / "out"
    result = succeed(commands.obim_saliency(path, out))
    assert "Writing rows of" in result.stderr

    lines = [json.loads(line) for line in rows_file(out).read_text("utf-8").splitlines()]
    model = AutoModelForCausalLM.from_pretrained(world.math)
    calibration = Calibration.model_validate(
        {"data": "self", "samples": SAMPLES, "max_length": LENGTH}
    )
    tokenizer = byte_tokenizer()
    wanted = writing_of(calibration, tokenizer, type(model), model.config, None, None)
    assert wanted is not None
    rows = written(model, wanted)
    # These tokens are no text, and come back as they were sampled all the same.
    assert [line["tokens"] for line in lines] == rows
    assert all("\N{REPLACEMENT CHARACTER}" in line["text"] for line in lines)
    assert [line["text"] for line in lines] == [
        tokenizer.decode(row, skip_special_tokens=True) for row in rows
    ]
    found = record(world, world.math, out)
    assert found["content_hash"] == content_hash([TokenSequence(row) for row in rows])
    assert found["tokens"] == sum(map(len, rows))
    [source] = found["sources"]
    assert (source["data"], source["samples"], source["rows"]) == ("self", SAMPLES, SAMPLES)
    assert source["file"] == rows_file(out).name
    assert (found["seed"], found["max_length"], found["template"]) == (0, LENGTH, None)

    # A model in memory writes, and is measured on, the same.
    model.train()
    settings = {"samples": SAMPLES, "max_length": LENGTH, "quiet": True}
    measured = mergekit_obim.measure(model, "self", tokenizer=tokenizer, **settings)
    commands.same_tensors(measured, commands.entries(world.saliency_of(world.math, out)))
    assert model.training
    stored = mergekit_obim.measure(world.math, "self", **settings)
    commands.same_tensors(stored, measured)


def test_a_chat_model_writes_both_sides(world: World, tmp_path: Path) -> None:
    chat = tmp_path / "chat"
    shutil.copytree(world.chat, chat)
    byte_tokenizer(chat, chat_template=CHAT_TEMPLATE)
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(2, 40)]}))
    path = commands.write_recipe(tmp_path, self_recipe(world, chat, samples=20))
    out = tmp_path / "out"
    succeed(commands.obim_saliency(path, out))
    given, reply = [BOS, *byte_ids("<user>")], [EOS, *byte_ids("<assistant>")]
    roles = set()
    tokenizer = byte_tokenizer()
    for line in rows_file(out).read_text("utf-8").splitlines():
        row = json.loads(line)
        ids, turns = row["tokens"], [message["content"] for message in row["messages"]]
        assert ids[: len(given)] == given
        text = tokenizer.decode(ids, skip_special_tokens=True)
        # An answer that was ended at once leaves its beginning.
        assert text in ("<user>" + "<assistant>".join(turns), f"<user>{turns[0]}<assistant>")
        assert (len(turns) == 1) or str(reply)[1:-1] in str(ids)
        roles.add(tuple(message["role"] for message in row["messages"]))
    assert roles == {("user",), ("user", "assistant")}
    found = record(world, chat, out)
    assert found["template"] is not None
    # The file is data like any other, too: through the template, and with the end of the answer.
    recipe = self_recipe(world, chat, data=str(rows_file(out)), samples=20, max_length=48)
    path = commands.write_recipe(tmp_path, recipe, "again.yml")
    succeed(commands.obim_saliency(path, tmp_path / "again"))
    again = record(world, chat, tmp_path / "again")
    assert (again["template"], again["samples"]) == (found["template"], 20)


@pytest.mark.parametrize("name", MODELS)
def test_a_vision_language_model_writes_text(name: str) -> None:
    model = architecture(name).build().eval()
    measured = mergekit_obim.measure(
        model, "self", tokenizer=processor(name), samples=50, max_length=16, quiet=True
    )
    assert measured.metadata.calibration["samples"] == 50


def test_a_second_run_reads_what_the_first_wrote(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = commands.write_recipe(tmp_path, self_recipe(world, world.math))
    out = tmp_path / "out"
    succeed(commands.obim_saliency(path, out))
    before = commands.contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_rows", None)  # which is not called
        assert "(kept: nothing" in succeed(commands.obim_saliency(path, out)).stdout
        # Nor does it write again where other settings give another measurement.
        world.saliency_of(world.math, out).unlink()
        succeed(commands.obim_saliency(path, out, "--batch-size", 1))
        assert commands.contents(out).keys() == before.keys()
        packed = commands.write_recipe(
            tmp_path, self_recipe(world, world.math, packing=True), "packed.yml"
        )
        succeed(commands.obim_saliency(packed, out, "--overwrite"))
        assert rows_file(out).read_bytes() == before[rows_file(out).name]
        # With other settings it would have to write, and first says that it may not replace.
        says(
            refusal(commands.obim_saliency(path, out, "--samples", 3)),
            "was made for model",
            "--overwrite",
        )
    # Removed, the rows are written again as they were, and the measurement is kept.
    succeed(commands.obim_saliency(path, out, "--overwrite"))
    rows_file(out).unlink()
    assert "(kept: nothing" in succeed(commands.obim_saliency(path, out)).stdout
    assert rows_file(out).read_bytes() == before[rows_file(out).name]
    succeed(commands.obim_saliency(path, out, "--overwrite", "--samples", 3))
    one, other = sorted(out.glob("*.jsonl"), key=lambda file: file.stat().st_size)
    assert other.read_bytes().startswith(one.read_bytes())


@pytest.mark.parametrize("change", ["weights", "template", "ends"])
def test_what_decides_the_rows_decides_their_file(
    world: World, tmp_path: Path, change: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(world.math, model)
    path = commands.write_recipe(tmp_path, self_recipe(world, model))
    out = tmp_path / "out"
    succeed(commands.obim_saliency(path, out))
    first = rows_file(out)
    if change == "weights":
        shutil.copy(world.code / "model.safetensors", model)
    elif change == "template":
        byte_tokenizer(model, chat_template=CHAT_TEMPLATE)
    else:
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    succeed(commands.obim_saliency(path, out, "--overwrite"))
    assert len({first, *out.glob("*.jsonl")}) == 2


def test_killed_while_it_writes_nothing_is_left(world: World, tmp_path: Path) -> None:
    path = commands.write_recipe(tmp_path, self_recipe(world, world.math))
    out = tmp_path / "out"

    def patch(kill: Callable[[], None]) -> None:
        original = run.save_rows

        def save_rows(path: Path, *args: Any) -> None:
            path.with_name(f".{path.name}.0123abcd.part").write_text("half")
            kill()
            original(path, *args)

        run.save_rows = save_rows

    commands.killed(patch, path, out)
    assert not list(out.glob("*.jsonl"))
    succeed(commands.obim_saliency(path, out))
    assert sorted(file.suffix for file in out.iterdir()) == [".jsonl", ".safetensors"]


def test_offloaded_it_writes_the_same(world: World, tmp_path: Path) -> None:
    path = commands.write_recipe(tmp_path, self_recipe(world, world.math))
    outs = [tmp_path / "whole", tmp_path / "offloaded"]
    succeed(commands.obim_saliency(path, outs[0]))
    spread = ("--device-map", "auto", "--max-memory", "cpu=20KiB")
    succeed(commands.obim_saliency(path, outs[1], *spread))
    one, other = map(commands.contents, outs)
    assert one.keys() == other.keys()
    assert rows_file(outs[0]).read_bytes() == rows_file(outs[1]).read_bytes()


def test_beside_a_file(world: World, tmp_path: Path) -> None:
    data = ["self", {"data": str(world.math_data), "samples": 4}]
    path = commands.write_recipe(tmp_path, self_recipe(world, world.math, data=data, column="text"))
    out = tmp_path / "out"
    assert "of 21 tensors" in succeed(commands.obim_saliency(path, out)).stdout
    own, other = record(world, world.math, out)["sources"]
    assert (own["data"], own["sampled"]) == ("self", SAMPLES)
    assert "column" not in own
    assert (other["data"], other["sampled"], other["column"]) == (str(world.math_data), 4, "text")
    assert len(read_rows(rows_file(out))) == SAMPLES


def test_check_says_so_and_loads_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = self_recipe(world, world.math)
    recipe["parameters"] = {"saliency": str(tmp_path / "out")}
    path = commands.write_recipe(tmp_path, recipe)
    with monkeypatch.context() as patch:
        patch.setattr(run, "loaded", None)
        result = succeed(commands.obim_saliency("--check", path, tmp_path / "out"))
    line = f"model {world.math}: data: self: the pre-pass will have it write 5 rows of its own"
    says(result.output, line, "no errors, 1 warning")
    assert not (tmp_path / "out").exists()
    succeed(commands.obim_saliency(path, tmp_path / "out"))
    result = succeed(commands.obim_saliency("--check", path, tmp_path / "out"))
    says(result.output, "no errors, no warnings")


@pytest.mark.slow
def test_two_processes(world: World, tmp_path: Path) -> None:
    """The first writes; the second, on a disk of its own, gets the rows from it."""
    path = commands.write_recipe(tmp_path, self_recipe(world, world.math, world.chat))
    whole = tmp_path / "whole"
    succeed(commands.obim_saliency(path, whole))
    outs = [tmp_path / "out0", tmp_path / "out1"]

    def own_disk(rank: int) -> None:
        outs[rank].mkdir()
        original = run.prepare_expert
        run.prepare_expert = lambda expert, **keys: original(
            expert, **{**keys, "out_dir": outs[rank]}
        )

    done = run_pair(tmp_path, path, outs[0], patch=own_disk)
    assert done.returncode == 0, done.stderr
    for expert in (world.math, world.chat):
        same_but_for_rounding(world.saliency_of(expert, outs[0]), world.saliency_of(expert, whole))
    assert {file.name: file.read_bytes() for file in outs[0].glob("*.jsonl")} == {
        file.name: file.read_bytes() for file in whole.glob("*.jsonl")
    }
    assert not list(outs[1].iterdir())


# --- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ({"data": "self", "column": "text"}, ["column is for files", "./self"]),
        ({"data": "self", "split": "test", "images": "i"}, ["split and images is for files"]),
        ({"data": [{"data": "self", "include_completion": True}]}, ["include_completion is for"]),
        (["self", {"data": "self", "samples": 3}], ["self twice", "samples for both"]),
        ({"data": "./self"}, ["./self: there is no such file"]),
        ({"data": "self", "max_length": 1}, ["max_length 1 leaves no room"]),
    ],
)
def test_calibration_that_is_refused(
    world: World, tmp_path: Path, calibration: Any, words: Sequence[str]
) -> None:
    recipe = world.recipe(
        models=[{"model": str(world.math), "calibration": calibration}], calibration=None
    )
    path = commands.write_recipe(tmp_path, recipe)
    says(refusal(commands.obim_saliency(path, tmp_path / "out")), str(world.math), *words)


def test_the_recipes_default_keys_are_for_other_data(world: World, tmp_path: Path) -> None:
    recipe = self_recipe(world, world.math)
    recipe["calibration"] = {"data": "org/set", "column": "problem", "split": "test"}
    succeed(commands.obim_saliency(commands.write_recipe(tmp_path, recipe), tmp_path / "out"))


def test_something_here_of_that_name(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("self").mkdir()
    path = commands.write_recipe(tmp_path, self_recipe(world, world.math))
    for result in (
        commands.obim_saliency("--check", path, "out"),
        commands.obim_saliency(path, "out"),
    ):
        says(succeed(result).output, "for what is here under that name write ./self")


@pytest.mark.parametrize("name", ["bert-masked", "bert-classifier"])
def test_a_model_that_does_not_write(tmp_path: Path, name: str) -> None:
    model = tiny_models.build(name)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer(tmp_path / "model")
    kind = type(model).__name__
    words = [f"which {kind} does not", "name a file or a data set"]
    with pytest.raises(CalibrationError) as caught:
        mergekit_obim.measure(tmp_path / "model", "self", quiet=True)
    says(caught.value.message, *words)
    with pytest.raises(CalibrationError) as caught:
        mergekit_obim.measure(model, "self", tokenizer=byte_tokenizer(), quiet=True)
    says(caught.value.message, *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["is empty; remove the file"]),
        ('{"tokens": [5, 6]}\n{"text": "mine"}\n', ["line 2: holds no tokens; remove the file"]),
        ('{"tokens": [5, -6]}\n', ["line 1: holds no tokens"]),
        ('{"tokens": [5, 900]}\n', ["token 900"]),
    ],
)
def test_rows_that_someone_has_changed(
    world: World, tmp_path: Path, content: str, words: Sequence[str]
) -> None:
    path = commands.write_recipe(tmp_path, self_recipe(world, world.math))
    out = tmp_path / "out"
    succeed(commands.obim_saliency(path, out))
    rows_file(out).write_text(content)
    says(refusal(commands.obim_saliency(path, out)), *words)


def test_a_template_that_changes_what_users_say() -> None:
    template = "<{{ messages[0]['content'] }}|{{ messages[0]['content'] }}>"
    with pytest.raises(CalibrationError, match="a user's text once and as it is"):
        opening_of(byte_tokenizer(chat_template=template), DATE)
