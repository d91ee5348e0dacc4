"""What the pre-pass runs of models that are not plain decoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import commands
from architectures import ARCHITECTURES
from commands import MATH_ROWS, succeed
from mergekit_obim.calibration.capture import CurvatureCapture
from mergekit_obim.calibration.feeding import feed
from mergekit_obim.saliency.file import saliency_file_name
from tiny_tokenizers import VOCAB_SIZE, byte_tokenizer

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def test_an_encoder_decoder_reads_the_text_on_both_sides() -> None:
    model = ARCHITECTURES["t5"].build()
    seen: dict[str, torch.Tensor] = {}
    for side in ("encoder", "decoder"):
        model.get_submodule(side).register_forward_pre_hook(
            lambda _, args, kwargs, side=side: seen.update({side: kwargs["input_ids"]}),
            with_kwargs=True,
        )
    feed(model, IDS)
    assert torch.equal(seen["encoder"], IDS)
    assert torch.equal(seen["decoder"], torch.cat([torch.zeros(2, 1).long(), IDS[:, :-1]], 1))


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_float32_is_float32_whatever_the_environment_says(precision: str) -> None:
    def settings() -> tuple[Any, ...]:
        cudnn = torch.backends.cudnn
        return (
            torch.get_float32_matmul_precision(),
            cudnn.allow_tf32,
            cudnn.deterministic,
            cudnn.enabled,
        )

    seen = []
    model = ARCHITECTURES["llama"].build()
    model.register_forward_pre_hook(lambda *_: seen.append(settings()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        outside = settings()
        feed(model, IDS)
        assert settings() == outside
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [("highest", False, True, outside[-1])]


def test_of_a_speech_model_the_decoder_runs_and_its_head() -> None:
    model = ARCHITECTURES["whisper"].build()
    with CurvatureCapture(model) as capture:
        feed(model, IDS)
    unscored = capture.unscored()
    assert all("encoder" in name for name in unscored)  # also the decoder's encoder_attn
    assert set(unscored.values()) == {"never used in the calibration run"}
    # It is the embedding too: [vocab, d] says that both were seen.
    assert capture.curvatures()["model.decoder.embed_tokens.weight"].h.shape == (48, 16)


@pytest.mark.parametrize("name", ["t5", "whisper", "qwen2_vl"])
def test_through_the_command(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name].build()
    model.resize_token_embeddings(VOCAB_SIZE, mean_resizing=False)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    data = commands.write_rows(tmp_path / "math.jsonl", MATH_ROWS)
    recipe = {
        "merge_method": "obim",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(folder), "calibration": {"data": str(data), "max_length": 16}}],
    }
    path = commands.write_recipe(tmp_path, recipe)
    base = ARCHITECTURES[name].build(seed=1)
    base.resize_token_embeddings(VOCAB_SIZE, mean_resizing=False)
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer(tmp_path / "base")
    result = succeed(commands.obim_saliency(path, tmp_path / "out"))
    file = tmp_path / "out" / saliency_file_name(str(folder))
    unscored = json.loads(commands.header(file)["unscored"])
    entries = commands.entries(file)
    assert entries
    if name == "t5":
        assert unscored == {}
    else:
        assert unscored
        assert "unscored, never used in the calibration run: " in result.stdout
