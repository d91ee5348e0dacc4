"""What the commands are told of models' tokenizers and configurations, from their folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mergekit.common import ModelReference
from safetensors.torch import save_file

import checkpoints
from commands import World, says
from mergekit_obim.models.comparison import comparison_faults
from mergekit_obim.models.opened import OpenModel
from mergekit_obim.recipe.faults import Fault

LAST = 258


ACCESS = SimpleNamespace(trust_remote_code=False, transformers_cache=None, lora_merge_cache=None)


def opened(reference: str) -> OpenModel:
    """A model, an adapter's with its model's weights."""
    model = ModelReference.parse(reference)
    merged = ModelReference(model=model.model)
    return OpenModel(model, merged, model.config(), merged.lazy_loader())


@pytest.fixture
def family(world: World, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base with a spare last row, and two experts that use it for tokens of their own."""
    folders = []
    for name, model in (("base", world.base), ("one", world.math), ("two", world.code)):
        folder = Path(shutil.copytree(model, tmp_path / name))
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        spare = next(token for token, number in vocabulary.items() if number == LAST)
        del vocabulary[spare]
        if name != "base":
            vocabulary[f"<|{name}|>"] = LAST
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        folders.append(folder)
    return folders[0], folders[1], folders[2]


def compare(base: Path | None, *experts: str | Path, **options: Any) -> list[Fault]:
    return comparison_faults(
        opened(str(base)) if base else None,
        [opened(str(expert)) for expert in experts],
        **{"aligned": False, "access": ACCESS, **options},
    )


def test_the_order_of_the_recipe_is_all_one(family: tuple[Path, Path, Path]) -> None:
    base, one, two = family
    found = compare(base, two, one)
    assert found == compare(base, one, two)
    assert [finding.level for finding in found] == ["check_error"]
    says(found[0].message, f"models {one} and {two}", "'<|one|>'", "'<|two|>'")
    assert compare(base, one, two, aligned=True) == []
    assert [f.level for f in compare(None, one, two)] == ["check_error"]


def test_rows_that_nobody_has_trained(family: tuple[Path, Path, Path]) -> None:
    base, one, two = family
    frozen = checkpoints.read_checkpoint(base)
    for expert in (one, two):
        tensors = checkpoints.read_checkpoint(expert)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name][LAST] = frozen[name][LAST]
        save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    [finding] = compare(base, one, two)
    assert finding.level == "warning"
    says(finding.message, "their rows are the same in both")
    tensors["lm_head.weight"][LAST, 0] += 1
    save_file(tensors, two / "model.safetensors", metadata={"format": "pt"})
    [finding] = compare(base, one, two)
    assert finding.level == "check_error"


def test_tokens_without_a_row(family: tuple[Path, Path, Path]) -> None:
    base, one, two = family
    path = two / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": LAST}))
    assert compare(base, one, two) == []


def test_a_model_without_a_tokenizer(family: tuple[Path, Path, Path]) -> None:
    base, one, two = family
    (two / "tokenizer.json").unlink()
    assert compare(base, one, two) == []


def test_a_tokenizer_that_cannot_be_loaded(family: tuple[Path, Path, Path]) -> None:
    base, one, two = family
    (one / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    [finding] = compare(base, one, two)
    assert finding.level == "warning"
    says(finding.message, f"model {one}: its tokens were not compared", "can't be loaded")
    (one / "tokenizer.json").unlink()
    (one / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Own", null]}}')
    [finding] = compare(base, one, two)
    says(finding.message, f"model {one}", "code of its own", "give --trust-remote-code")


def test_an_adapter_has_tokens_of_its_own(family: tuple[Path, Path, Path]) -> None:
    base, one, two = family
    adapter = one.with_name("adapter")
    adapter.mkdir()
    shutil.copy(one / "tokenizer.json", adapter)
    same = f"{one}+{adapter}"
    [finding] = compare(base, same, two)
    says(finding.message, f"'<|one|>' in {same}, but '<|two|>' in {two}", "source: union")
    assert compare(base, same, two, aligned=True) == []
    # mergekit asks the adapter's model for the tokens.
    other = f"{base}+{adapter}"
    clash, advice = compare(base, other, two)
    assert (clash.level, advice.level) == ("check_error", "warning")
    says(advice.message, f"model {other}", "merge the adapter into it", "save its tokenizer")
    assert compare(base, other, two, aligned=True) == [advice]


def test_nothing_is_compared_that_mergekit_cannot_plan(family: tuple[Path, Path, Path]) -> None:
    base, one, two = family
    path = one / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": None}))
    found = compare(base, one, two)
    [finding] = found
    assert finding.level == "error"
    says(finding.message, "has no `architectures`")


def test_of_the_weights_only_disputed_rows_are_read(
    family: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any) -> torch.Tensor:
        raise AssertionError("a tensor was read")

    base, one, two = family
    shutil.copy(one / "tokenizer.json", two)
    monkeypatch.setattr(OpenModel, "load", load)
    assert compare(base, one, two) == []
