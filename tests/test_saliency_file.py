"""Format 1: its bytes, its rules, and that a file is written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoints import write_saliency_file
from mergekit_obim.errors import ObimError, SaliencyFileError, SaliencyNotFoundError
from mergekit_obim.saliency.file import (
    Gram,
    SaliencyFile,
    SaliencyMetadata,
    saliency_file_name,
    write_saliency,
)
from mergekit_obim.saliency.fingerprint import fingerprint
from mergekit_obim.saliency.locate import check_measured_on, open_saliency

GOLDEN = Path(__file__).parent / "data" / "saliency-format-1.safetensors"
ENTRIES = {
    "model.layers.0.mlp.up_proj.weight": torch.tensor([[0.0, 1.5, 3.25]]),
    "model.embed_tokens.weight": torch.tensor([[0.5], [0.25]]),
    "scalar": torch.tensor(2.0),
    "empty": torch.empty(0, 3),
}
METADATA = SaliencyMetadata(
    form="factored",
    model="org/mäth@v1",
    revision="v1",
    architecture="LlamaForCausalLM",
    calibration={"tokens": 12, "sources": [{"data": "math.jsonl"}]},
    unscored={"model.norm.weight": "no such operation"},
    fingerprint={"model.embed_tokens.weight": fingerprint(torch.tensor([[1.0], [2.0]]))},
    mergekit_obim_version="0.1.0",
)
REQUIRED = {
    "format": "mergekit-obim-saliency",
    "format_version": "1",
    "form": "factored",
    "model": "hand",
}


def write(path: Path, entries: dict[str, torch.Tensor] = ENTRIES, **changes: Any) -> Path:
    metadata = METADATA.model_copy(update=changes)
    write_saliency(path, {n: t.shape for n, t in entries.items()}, entries.__getitem__, metadata)
    return path


def test_golden_bytes(tmp_path: Path) -> None:
    """A file of format 1 never changes: these bytes were written once and are read for ever."""
    written = write(tmp_path / "new.safetensors").read_bytes()
    assert written == GOLDEN.read_bytes()
    length = int.from_bytes(written[:8], "little")
    assert length % 8 == 0, "safetensors aligns the data to 8 bytes"
    header = json.loads(written[8 : 8 + length])
    assert header["__metadata__"]["format"] == "mergekit-obim-saliency"
    assert all(isinstance(value, str) for value in header["__metadata__"].values())


def test_golden_file_is_read_back() -> None:
    file = SaliencyFile(GOLDEN)
    assert file.metadata == METADATA
    assert file.shapes == {name: tuple(tensor.shape) for name, tensor in ENTRIES.items()}
    for name, tensor in ENTRIES.items():
        assert name in file
        assert file[name].dtype == torch.float32
        assert torch.equal(file[name], tensor)
    assert "model.norm.weight" not in file
    file.check_values()


GRAM_GOLDEN = GOLDEN.with_name("saliency-format-1-gram.safetensors")
GRAM_ENTRIES = {
    "a.weight": torch.tensor([[1.0, 2.0, 4.0]]),
    "b.weight": torch.tensor([[1.0, 2.0, 4.0]]),
    "e.down_proj": torch.tensor([[[1.0, 2.0]], [[3.0, 0.5]]]),
    "e.1.down_proj": torch.tensor([[3.0, 0.5]]),
    "sketch/a.weight": torch.tensor([[1.5, -2.0], [0.25, 1.0], [-4.0, 3.0]]),
    "sketch/e.down_proj": torch.tensor([[[1.0, 0.5], [0.5, 2.0]], [[3.0, -1.0], [-1.0, 0.5]]]),
}
GRAM_METADATA = SaliencyMetadata(
    form="factored",
    model="./math",
    gram=Gram(
        columns=2,
        test_matrix="signs-shake128",
        inputs={
            **dict.fromkeys(["a.weight", "b.weight"], "sketch/a.weight"),
            **dict.fromkeys(["e.down_proj", "e.1.down_proj"], "sketch/e.down_proj"),
        },
        experts={"e.1.down_proj": 1},
    ),
)


def test_golden_bytes_of_a_file_with_sketches(tmp_path: Path) -> None:
    path = write(tmp_path / "new.safetensors", GRAM_ENTRIES, **dict(GRAM_METADATA))
    assert path.read_bytes() == GRAM_GOLDEN.read_bytes()
    file = SaliencyFile(GRAM_GOLDEN)
    assert file.metadata == GRAM_METADATA
    assert file.shapes.keys() == {name for name in GRAM_ENTRIES if "/" not in name}
    file.check_values()
    for name, wanted in {
        "a.weight": GRAM_ENTRIES["sketch/a.weight"],
        "b.weight": GRAM_ENTRIES["sketch/a.weight"],
        "e.down_proj": GRAM_ENTRIES["sketch/e.down_proj"],
        "e.1.down_proj": GRAM_ENTRIES["sketch/e.down_proj"][1],
    }.items():
        sketch = file.sketch(name)
        assert sketch is not None
        assert torch.equal(sketch, wanted)


def test_safetensors_itself_reads_what_we_write(tmp_path: Path) -> None:
    with safe_open(write(tmp_path / "a.safetensors"), framework="np") as file:
        assert set(file.keys()) == set(ENTRIES)
        assert file.get_tensor("model.embed_tokens.weight").tolist() == [[0.5], [0.25]]


def test_the_same_measurement_gives_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the order of entries, their dtype, device layout and strides."""
    first = write(tmp_path / "a.safetensors").read_bytes()
    shuffled = {name: ENTRIES[name].double() for name in reversed(ENTRIES)}
    name = "model.layers.0.mlp.up_proj.weight"
    shuffled[name] = ENTRIES[name].t().contiguous().t()
    assert write(tmp_path / "b.safetensors", shuffled).read_bytes() == first


def test_a_hand_written_file_needs_only_the_four_keys(tmp_path: Path) -> None:
    path = write_saliency_file(tmp_path / "hand.safetensors", {"w": torch.ones(1, 3)})
    file = open_saliency(path)
    assert (file.metadata.form, file.metadata.model) == ("factored", "hand")
    assert file["w"].tolist() == [[1, 1, 1]]
    check_measured_on(file, "any model", {"w": None}, lambda name: torch.zeros(2, 3))


def test_unknown_metadata_is_let_be(tmp_path: Path) -> None:
    path = write_saliency_file(tmp_path / "hand.safetensors", {"w": torch.ones(1)}, licence="MIT")
    assert SaliencyFile(path).metadata.model == "hand"


def test_dense_is_the_other_form(tmp_path: Path) -> None:
    path = write_saliency_file(tmp_path / "hand.safetensors", {"w": torch.ones(1)}, form="dense")
    assert SaliencyFile(path).metadata.form == "dense"


# --- refusals ----------------------------------------------------------------------------


def saved(
    entries: dict[str, torch.Tensor] | None = None, **metadata: str
) -> Callable[[Path], None]:
    header = {key: value for key, value in (REQUIRED | metadata).items() if value != "DROP"}
    return lambda path: save_file(entries or {"w": torch.ones(3)}, path, metadata=header)


def truncated(path: Path) -> None:
    path.write_bytes(GOLDEN.read_bytes()[:-5])


def header_only(path: Path) -> None:
    path.write_bytes(GOLDEN.read_bytes()[:100])


def without_metadata(path: Path) -> None:
    save_file({"w": torch.ones(3)}, path)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncated, r"truncated.*obim-saliency"),
    "truncated in its header": (header_only, r"truncated"),
    "empty": (lambda path: path.write_bytes(b""), r"not a readable safetensors file"),
    "text": (lambda path: path.write_text("h = 1\n" * 50), r"not a readable safetensors file"),
    "a model's checkpoint": (without_metadata, r"lacks format, format_version, form, model"),
    "other format": (saved(format="pt"), r"format is 'pt'"),
    "later version": (saved(format_version="2"), r"version '2'.*upgrade"),
    "no form": (saved(form="DROP"), r"lacks form"),
    "no model": (saved(model="DROP"), r"lacks model"),
    "unknown form": (saved(form="sparse"), r"metadata form of model hand.*'factored' or 'dense'"),
    "unparsable calibration": (saved(calibration="{"), r"metadata calibration of model hand"),
    "unparsable unscored": (saved(unscored="none"), r"metadata unscored of model hand"),
    "unparsable fingerprint": (saved(fingerprint="]"), r"metadata fingerprint of model hand"),
    "fingerprint without values": (
        saved(fingerprint='{"w": {"dtype": "float32", "shape": [3]}}'),
        r"metadata fingerprint\.w\.values of model hand",
    ),
    "fingerprint not base64": (
        saved(fingerprint='{"w": {"dtype": "float32", "shape": [3], "values": "A"}}'),
        r"metadata fingerprint\.w\.values of model hand",
    ),
    "bfloat16": (
        saved({"w": torch.ones(3).bfloat16()}),
        r"entry w \(model hand\) is BF16.*float32",
    ),
    "float64": (saved({"w": torch.ones(3).double()}), r"entry w \(model hand\) is F64"),
    "NaN": (saved({"w": torch.tensor([1, float("nan")])}), r"w \(model hand\).*not finite"),
    "infinity": (saved({"w": torch.tensor([float("inf"), 1])}), r"w \(model hand\).*not finite"),
    "negative": (saved({"w": torch.tensor([1, -1e-30])}), r"w \(model hand\) has negative values"),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_refused(rule: str, tmp_path: Path) -> None:
    make, message = REFUSED[rule]
    path = tmp_path / "bad.safetensors"
    make(path)
    with pytest.raises(SaliencyFileError, match=message) as error:
        open_saliency(path)
    assert str(path) in error.value.message
    assert "\n" not in error.value.message, "errors are one line"
    assert isinstance(error.value, ValueError)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    with pytest.raises(SaliencyNotFoundError, match="obim-saliency") as error:
        open_saliency(path)
    assert str(path) in str(error.value)
    assert isinstance(error.value, FileNotFoundError)
    assert isinstance(error.value, ObimError)


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    path = write_saliency_file(tmp_path / "a.safetensors", {"w": torch.ones(3)})
    assert open_saliency(path) is open_saliency(path)
    replacement = write_saliency_file(tmp_path / "b.safetensors", {"w": torch.full((3,), 2.0)})
    os.replace(replacement, path)
    assert open_saliency(path)["w"].tolist() == [2, 2, 2]


def test_a_file_of_other_weights_is_refused(tmp_path: Path) -> None:
    weights = {"a": torch.randn(30, 20), "b": torch.randn(20)}
    prints = {name: fingerprint(weight) for name, weight in weights.items()}
    file = SaliencyFile(write(tmp_path / "a.safetensors", fingerprint=prints))
    check_measured_on(file, "org/expert", weights, weights.__getitem__)
    check_measured_on(file, "org/expert", {"a": None}, weights.__getitem__)
    half = {name: weight.bfloat16() for name, weight in weights.items()}
    check_measured_on(file, "org/expert", half, half.__getitem__)

    tuned = weights | {"b": weights["b"] + 0.1}
    with pytest.raises(SaliencyFileError, match=r"org/expert has: b differs.*--overwrite"):
        check_measured_on(file, "org/expert", tuned, tuned.__getitem__)
    with pytest.raises(SaliencyFileError, match="does not even have"):
        check_measured_on(file, "org/expert", {"c": None}, weights.__getitem__)


# --- writing -----------------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "saliency" / "a.safetensors")
    before = path.read_bytes()

    def stop(name: str) -> torch.Tensor:
        if name.startswith("scalar"):
            raise KeyboardInterrupt
        return ENTRIES[name]

    with pytest.raises(KeyboardInterrupt):
        write_saliency(path, {n: t.shape for n, t in ENTRIES.items()}, stop, METADATA)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "not finite"),
        (torch.tensor([1.0, float("inf")]), "not finite"),
        (torch.tensor([1e300, 1.0], dtype=torch.float64), "not finite"),
        (torch.tensor([-1.0, 1.0]), "negative"),
        (torch.ones(3), r"shape \[3\], but \[2\]"),
    ],
)
def test_what_could_not_be_read_is_not_written(
    value: torch.Tensor, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SaliencyFileError, match=message):
        write_saliency(tmp_path / "a.safetensors", {"w": (2,)}, lambda _: value, METADATA)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_a_written_file_has_the_permissions_that_the_umask_leaves(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(_: int) -> int:
        raise AssertionError("the umask is that of all threads")

    before = os.umask(umask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", changed)
            path = write(tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


# --- names -------------------------------------------------------------------------------

PATHS = st.text("aB1-_.@/ é", min_size=1, max_size=12)
REFERENCES = st.builds("+".join, st.lists(PATHS, min_size=1, max_size=2))


@settings(deadline=None, max_examples=150)
@given(references=st.lists(REFERENCES, min_size=2, max_size=6))
def test_file_names_are_safe_and_unique(references: list[str]) -> None:
    # Only "./" in front and "/" behind may be left out without naming another model.
    same = {"+".join(p.removeprefix("./").rstrip("/") for p in r.split("+")) for r in references}
    names = {saliency_file_name(reference) for reference in references}
    assert len(names) >= len(same)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_@+][A-Za-z0-9._@+-]*\.safetensors", name)


def test_slashes_and_hyphens_are_told_apart() -> None:
    references = ["a-/b", "a/-b", "a---b", "a/b", "a--b", "a-/-b", "a//b"]
    assert len({saliency_file_name(reference) for reference in references}) == len(references)


def test_long_references_stay_short_and_unique() -> None:
    a, b = (saliency_file_name(f"/{'deep/' * 100}{last}/model") for last in "ab")
    assert a != b
    assert len(a) < 160
    c, d = (saliency_file_name(f"/{first}{'/deep' * 100}/model") for first in "cd")
    assert c != d
