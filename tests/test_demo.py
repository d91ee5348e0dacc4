"""The demo in miniature: its text, its tokenizer, its training, and all its steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

from benchmarks import demo
from benchmarks.corpus import SPLITS, TASKS, Corpus, load_corpus
from benchmarks.tiny_llama import BOS, Training, byte_tokenizer, held_out_loss, stream, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(demo.SMOKE.train_chars)


def test_the_corpus_is_the_same_every_time_and_its_splits_share_nothing(corpus: Corpus) -> None:
    assert load_corpus(demo.SMOKE.train_chars) == corpus
    for task in TASKS:
        assert sum(map(len, corpus[task]["train"])) >= demo.SMOKE.train_chars
        documents = [document for split in SPLITS for document in corpus[task][split]]
        assert len(documents) == len(set(documents))
    lines = [{line for sheet in corpus["math"][split] for line in sheet.split("\n")} - {""}
             for split in SPLITS]  # fmt: skip
    assert not lines[0] & lines[1] | lines[0] & lines[2] | lines[1] & lines[2]


def test_the_tokenizer_is_the_bytes_after_reloading_by_hugging_face(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    text = "\x00 h\u00e9llo\n\t \u20ac \U0001f9e0  end "
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text).input_ids
    assert ids == [BOS, *text.encode()] == stream([text]).tolist()
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_training_learns_and_repeats_itself(corpus: Corpus) -> None:
    tokens = stream(corpus["code"]["train"])
    losses = []
    for _ in range(2):
        model = demo.SMOKE.size.build(seed=3)
        before = held_out_loss(model, tokens, windows=8)
        train(model, [tokens], Training(steps=10, learning_rate=1e-2, warmup=2), "test")
        losses.append((before, held_out_loss(model, tokens, windows=8)))
    assert losses[0] == losses[1]
    assert losses[0][1] < losses[0][0] - 1


@pytest.mark.slow
def test_the_demo_runs_and_keeps_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run_in_process(command: str, folder: Path) -> None:
        # The real commands, without a new interpreter each: their imports take long.
        from mergekit.scripts.run_yaml import main as mergekit_yaml

        from mergekit_obim.commands.saliency import main as obim_saliency

        program, *arguments = command.split()
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            main = {"mergekit-yaml": mergekit_yaml, "obim-saliency": obim_saliency}[program]
            result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        commands.append(command)

    monkeypatch.setattr(demo, "run_command", run_in_process)
    losses = demo.run(demo.SMOKE, tmp_path)
    assert demo.run(demo.SMOKE, tmp_path) == losses
    assert len(commands) == 4, "the second run should have kept everything"

    assert losses["OBIM"] != losses["base"]
    table = demo.table(losses)
    assert [line[:16].strip() for line in table.splitlines()[1:]] == [
        "base", "prose expert", "code expert", "math expert", "Task Arithmetic", "TIES", "OBIM",
    ]  # fmt: skip


def test_the_table_marks_what_beats_the_base() -> None:
    losses = {"base": [2.0, 2.0, 2.0], "OBIM": [1.5, 2.0, 1.0]}
    assert (
        demo.table(losses).splitlines()[-1]
        == "OBIM               1.500*   2.000    1.000*   1.500*"
    )
    assert demo.worse_than_base(losses) == ["code"]
