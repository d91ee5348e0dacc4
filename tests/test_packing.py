"""Rows of different lengths share passes where no row sees another, and only there."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchFeature

from architectures import ARCHITECTURES, Architecture
from mergekit_obim.calibration import passes
from mergekit_obim.calibration.capture import CurvatureCapture
from mergekit_obim.calibration.data import TokenSequence
from mergekit_obim.calibration.data.tokens import next_packed
from mergekit_obim.calibration.feeding import feed
from mergekit_obim.calibration.memory import packed_tokens
from mergekit_obim.calibration.packing import packed, why_apart
from mergekit_obim.calibration.passes import run_through
from mergekit_obim.calibration.ranks import Ranks
from mergekit_obim.calibration.resume import INTERVAL, Checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (40, 17, 9, 5, 1)  # the first is longer than the tiny models' windows
# Everything else packs its rows.
APART = {
    "takes no position_ids": """
        mamba t5 whisper bart bloom falcon_mamba mamba2 mpt
    """,
    "depended on its neighbours": """
        afmoe_partial bert bert-masked-lm bert-token-classification distilbert
        distilbert-masked-lm distilbert-token-classification falcon granite4moehybrid lfm2
        qwen2_vl qwen2_5_vl roberta roberta-masked-lm roberta-token-classification electra
        gpt_oss jamba nemotron_h opt qwen3_next xlm-roberta
    """,
    "does not give an output for each token": """
        bert-sequence-classification distilbert-sequence-classification
        gpt2-sequence-classification llama-sequence-classification
        roberta-sequence-classification
    """,
}
WHY = {name: words for words, names in APART.items() for name in names.split()}


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(7)
    return [
        TokenSequence(torch.randint(3, 48, (n,), generator=generator).tolist()) for n in lengths
    ]


def alone(model: Any, sequences: list[TokenSequence]) -> CurvatureCapture:
    with CurvatureCapture(model) as capture:
        for row in sequences:
            feed(model, torch.tensor([row.ids]))
    return capture


def assert_same(got: CurvatureCapture, want: CurvatureCapture) -> None:
    assert got.unscored() == want.unscored()
    assert got.ledger.state()["rows"] == want.ledger.state()["rows"]
    found, wanted = got.curvatures(), want.curvatures()
    assert found.keys() == wanted.keys()
    assert found
    for name, curvature in wanted.items():
        torch.testing.assert_close(found[name].h, curvature.h, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_packs_to_the_same_h_or_says_why_not(name: str) -> None:
    model, sequences = ARCHITECTURES[name].build(), rows()
    told = why_apart(model, sequences)
    assert WHY[name] in told if name in WHY else told == ""
    if told:
        return
    with CurvatureCapture(model) as capture:
        ids, positions = packed(sequences, torch.device("cpu"))
        feed(model, ids, None, positions)
    assert_same(capture, alone(model, sequences))


def test_reasons_are_of_architectures_that_there_are() -> None:
    assert WHY.keys() < ARCHITECTURES.keys()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_longest_row_keep_rows_apart(kind: str) -> None:
    parameters: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": kind}
    if kind == "dynamic":
        parameters["factor"] = 4.0
    else:
        parameters |= {"short_factor": [1.0] * 3, "long_factor": [1.0, 2.0, 3.0], "factor": 4.0}
        parameters["original_max_position_embeddings"] = 32
    llama = ARCHITECTURES["llama"]
    options = {**llama.options, "rope_parameters": parameters, "max_position_embeddings": 32}

    def model() -> Any:
        return Architecture(llama.model, llama.config, options).build(dtype=torch.bfloat16)

    assert why_apart(model(), rows((30, 17, 9, 5))) == ""
    assert "depended on its neighbours" in why_apart(model(), rows((40, 17, 9, 5)))


class Leaky(torch.nn.Module):
    """A convolution over time, small beside what it is added to, as trained ones may be."""

    def __init__(self, layer: Any, share: float) -> None:
        super().__init__()
        self.layer, self.share = layer, share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out + self.share * out.roll(1, dims=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_small_leak_is_seen_in_every_dtype(dtype: torch.dtype) -> None:
    model = ARCHITECTURES["llama"].build(dtype=dtype)
    assert why_apart(model, rows()) == ""
    mlp = model.model.layers[0].mlp
    mlp.up_proj = Leaky(mlp.up_proj, 0.03)
    assert "depended on its neighbours" in why_apart(model, rows())


def test_positions_that_are_not_used_are_seen() -> None:
    model = ARCHITECTURES["gpt2"].build()
    forward = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda ids: forward(torch.arange(ids.numel())[None] % 64)
    assert "did not come out as alone" in why_apart(model, rows())


def test_rows_without_anything_to_try_run_apart() -> None:
    model = ARCHITECTURES["llama"].build()
    assert why_apart(model, rows((9, 9, 8, 7))) == "there are too few lengths"
    assert "no row to try" in why_apart(model, rows((17, 4, 3, 2)))
    same = [TokenSequence([7] * n) for n in (40, 10, 9, 8)]
    assert "no row to try" in why_apart(model, same)


class Watched:
    """The passes of a run: how many rows and tokens each had."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.passes: list[tuple[int, int]] = []
        self.fewest = 10**9  # tokens of a pass that fails
        feed = passes.feed

        def watched(model: Any, ids: Any, images: Any, positions: Any) -> None:
            several = ids.shape[0] if positions is None else int((positions == 0).sum())
            self.passes.append((several, ids.numel()))
            feed(model, ids, images, positions)
            if ids.numel() > self.fewest:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        patch.setattr(passes, "feed", watched)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def run(
    model: Any, sequences: list[TokenSequence], folder: Path, batch_size: Any = "auto", **how: Any
) -> CurvatureCapture:
    checkpoint = Checkpoint(folder / "m", {"all": 1})
    how = {"ranks": Ranks(), **how}
    return run_through(
        model, sequences, label="m", batch_size=batch_size, checkpoint=checkpoint, quiet=True, **how
    )


MANY = tuple(range(3, 63, 2))


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [("gemma3", "auto"), ("gpt2", 6), ("llama", 1), ("mamba", "auto"), ("mixtral", "auto")],
)
def test_a_run_gives_the_same_h_in_fewer_passes(
    name: str, batch_size: Any, tmp_path: Path, watched: Watched
) -> None:
    model, sequences = ARCHITECTURES[name].build(), rows(MANY)
    assert_same(run(model, sequences, tmp_path, batch_size), alone(model, sequences))
    assert sum(tokens for _, tokens in watched.passes) == sum(MANY)
    assert sum(several for several, _ in watched.passes) == len(MANY)
    if name == "mamba" or batch_size == 1:
        assert len(watched.passes) == len(MANY)
    elif batch_size == "auto":  # of 353 tokens, whose square is 2048 · 61
        assert len(watched.passes) == 3
        assert max(tokens for _, tokens in watched.passes) <= 353
    else:  # attention's scores take no more than those of 6 rows of 61
        assert Counter(several for several, _ in watched.passes).keys() >= {2, 6}
        assert max(several for several, _ in watched.passes) == 6
        assert max(tokens for _, tokens in watched.passes) <= 61 * 6**0.5


def test_a_batch_of_one_length_stays_one_where_it_is_larger(
    tmp_path: Path, watched: Watched
) -> None:
    model = ARCHITECTURES["llama"].build()
    run(model, rows((20,) * 10 + tuple(range(1, 20))), tmp_path, 16)
    assert watched.passes[0] == (10, 200)
    assert watched.passes[1] == (4, 19 + 18 + 17 + 16)  # less than 20 · 16^0.5


def test_packed_passes_that_do_not_fit_are_halved(tmp_path: Path, watched: Watched) -> None:
    model, sequences = ARCHITECTURES["mixtral"].build(), rows(MANY)
    watched.fewest = 100
    assert_same(run(model, sequences, tmp_path), alone(model, sequences))
    fitted = [tokens for _, tokens in watched.passes if tokens <= 100]
    assert sum(fitted) == sum(MANY)
    assert len(watched.passes) - len(fitted) <= 4


@pytest.mark.parametrize("batch_size", ["auto", 5])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    batch_size: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL, "0")
    model, sequences = ARCHITECTURES["mixtral"].build(), rows(MANY)
    want = run(model, sequences, tmp_path / "whole", batch_size, columns=4)
    feed, calls = passes.feed, iter(range(100))

    def stop(*args: Any) -> None:
        if next(calls) == 2:
            raise RuntimeError("stopped")
        feed(*args)

    monkeypatch.setattr(passes, "feed", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        run(model, sequences, tmp_path / "stopped", batch_size, columns=4)
    monkeypatch.setattr(passes, "feed", feed)
    got = run(model, sequences, tmp_path / "stopped", batch_size, columns=4)
    states = got.ledger.state(), want.ledger.state()
    assert states[0]["rows"] == states[1]["rows"]
    assert states[0]["totals"].keys() == states[1]["totals"].keys()
    for key, total in states[0]["totals"].items():
        assert torch.equal(total, states[1]["totals"][key]), key


def test_the_sketch_is_of_all_rows(tmp_path: Path) -> None:
    model, sequences = ARCHITECTURES["qwen3_moe"].build(), rows(MANY)
    got = run(model, sequences, tmp_path / "packed", columns=5).ledger
    want = run(model, sequences, tmp_path / "alone", 1, columns=5).ledger
    assert got.products() == want.products()
    assert got.products()
    for first in want.products():
        torch.testing.assert_close(
            got.mean_products(first), want.mean_products(first), rtol=1e-4, atol=1e-5
        )


def test_who_shares_no_passes_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mergekit_obim"):
        run(ARCHITECTURES["opt"].build(), rows(), tmp_path)
    [line] = [record for record in caplog.records if "share passes" in record.message]
    assert line.levelno == logging.INFO
    assert "m: rows of different lengths do not share passes" in line.message
    assert "depended on its neighbours" in line.message


def test_lines_are_short_enough_for_attention_and_for_what_the_trial_can_see() -> None:
    assert packed_tokens(2048, 128) == 512
    assert packed_tokens(100, 200) == 100
    assert packed_tokens(32768, 2048) == 4096


def test_rows_with_images_stay_alone() -> None:
    texts = rows((9, 8, 7, 6, 5))
    ordered = [*texts[:2], replace(texts[2], image_inputs=BatchFeature), *texts[3:]]
    assert list(next_packed(ordered, 0, 100, 9)) == ordered[:2]
    assert list(next_packed(ordered, 2, 100, 9)) == ordered[2:3]
    assert list(next_packed(ordered, 3, 100, 9)) == ordered[3:]
    assert list(next_packed(texts, 0, 24, 9)) == texts[:3]
    assert list(next_packed(texts, 0, 100, 2)) == texts[:2]
    assert list(next_packed(texts, 0, 3, 9)) == texts[:1]
