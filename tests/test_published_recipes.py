"""Recipes as users publish them, for mergekit's own methods: as they are, and swapped to ours.

``tests/recipes`` has recipes modelled on published ones, of models called base, A, B and C and of
adapters L and M. A recipe is swapped by another ``merge_method`` and a ``saliency`` folder.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import checkpoints
import commands
from commands import refusal, says, succeed
from mergekit_obim.methods.planning import registry
from mergekit_obim.recipe import Document, recipe_faults

RECIPES = sorted((Path(__file__).parent / "recipes").glob("*.yml"))
LAYERS = 4
WORDS = ["<unk>", *(f"w{n}" for n in range(checkpoints.VOCABULARY - 3)), "<|im_end|>", "<|eot|>"]
OPTIONS = ("--lora-merge-cache", "cache", "--no-write-model-card", "--quiet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that the recipes name, and a saliency file of each expert."""
    root = tmp_path_factory.mktemp("published")
    shapes = checkpoints.llama_shapes(layers=LAYERS)
    config = checkpoints.llama_config(layers=LAYERS)
    base = checkpoints.base_weights(0, shapes)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    for seed, name in enumerate(("base", "A", "B", "C")):
        tensors = checkpoints.fine_tuned(base, seed, step=1 / 64) if seed else base
        checkpoints.write_checkpoint(root / name, tensors, config)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=WORDS[0])),
            unk_token=WORDS[0],
        )
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        tokenizer.save_pretrained(root / name)
    for name in ("L", "M"):
        torch.manual_seed(ord(name))
        model = LlamaForCausalLM.from_pretrained(root / "base")
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(root / name)
    for seed, expert in enumerate(("A", "B", "C", "base+L", "base+M")):
        h = checkpoints.factored_saliency(shapes, seed)
        path = root / "saliency" / commands.saliency_file_name(expert)
        checkpoints.write_saliency_file(path, h, model=expert)
    return root


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def swapped(path: Path, method: str) -> str:
    """A recipe's text with another method, and the saliency that it needs."""
    text = re.sub("(?m)^merge_method: .*$", f"merge_method: {method}", path.read_text())
    if re.search("(?m)^parameters:$", text):
        return re.sub("(?m)^parameters:$", "parameters:\n  saliency: saliency", text)
    return text + "parameters: {saliency: saliency}\n"


def merge(text: str, out: Path) -> Any:
    recipe = out.with_suffix(".yml")
    recipe.write_text(text)
    return commands.mergekit_yaml(recipe, out, *OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_as_it_is(path: Path, tmp_path: Path) -> None:
    succeed(merge(path.read_text(), tmp_path / "merged"))


# What keeps a recipe from running under a method; the others run.
_OVER = "densities sum to {}, over 1"
REFUSED: dict[str, dict[str, list[str]]] = {
    "obim": {
        "02-dare-ties-int8": [_OVER.format("1.59")],
        "04-ties-gradients-filter": [_OVER.format("1.83")],
        "07-della-linear-filters-chatml": [_OVER.format("1.35")],
        "08-della-float32-out": [_OVER.format("1.5")],
        "19-breadcrumbs-shared": [_OVER.format("2.7")],
        "21-dare-linear-weight-shared": [_OVER.format("2")],
        "24-linear-four-heads": ["no base_model"],
    },
    "ties_obm": {"24-linear-four-heads": ["no base_model"]},
    "regmean_diag": {
        "17-task-arithmetic-negative": ["model B has weight -0.5", "0 or more"],
        "24-linear-four-heads": ["no base_model"],
    },
    "regmean": {
        "17-task-arithmetic-negative": ["model B has weight -0.5", "0 or more"],
        "24-linear-four-heads": ["no base_model"],
    },
}
# The parameters of other methods, in the order of the recipe; a method of ours may have some.
FOREIGN = {
    "01-ties-base-listed": "normalize",
    "02-dare-ties-int8": "int8_mask",
    "04-ties-gradients-filter": "normalize, int8_mask",
    "07-della-linear-filters-chatml": "normalize, int8_mask, epsilon",
    "08-della-float32-out": "epsilon, normalize, int8_mask",
    "10-sce-topk": "normalize, select_topk",
    "13-sce-lora-base": "normalize, select_topk",
    "17-task-arithmetic-negative": "normalize",
    "19-breadcrumbs-shared": "gamma",
    "21-dare-linear-weight-shared": "rescale",
}


@pytest.mark.slow
@pytest.mark.parametrize("method", REFUSED)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_swapped(path: Path, method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It runs wherever its meaning carries over; else every error is told at once."""
    with caplog.at_level(logging.WARNING, logger="mergekit_obim"):
        result = merge(swapped(path, method), tmp_path / "merged")
    if words := REFUSED[method].get(path.stem):
        says(refusal(result), *words)
        assert not (tmp_path / "merged").exists()
        return
    succeed(result)
    merged = checkpoints.read_checkpoint(tmp_path / "merged")
    base = checkpoints.read_checkpoint(Path("base"))
    assert merged.keys() == base.keys()
    assert any(not torch.equal(merged[name], base[name].to(merged[name].dtype)) for name in base)
    told = [r.getMessage() for r in caplog.records if "ignores parameters" in r.getMessage()]
    if method == "obim":
        ignored = FOREIGN.get(path.stem)
        wanted = [f"obim ignores parameters of other merge methods: {ignored}"] if ignored else []
        assert told == wanted
    else:
        assert len(told) <= 1


def test_what_ours_have_of_theirs_is_not_ignored() -> None:
    """``normalize`` means in ties_obm what it means in TIES."""
    path = next(path for path in RECIPES if path.stem.startswith("04"))
    faults = list(recipe_faults(Document(yaml.safe_load(swapped(path, "ties_obm"))), registry()))
    assert [fault.message for fault in faults] == [
        "ties_obm ignores parameters of other merge methods: int8_mask"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_mended(path: Path, tmp_path: Path) -> None:
    """``--fix`` writes what runs, keeps comments and order, and leaves the recipe alone."""
    text = swapped(path, "obim")
    recipe, new = tmp_path / "swapped.yml", tmp_path / "new.yml"
    recipe.write_text(text)
    result = commands.obim_saliency("--check", recipe, "--fix", new, *OPTIONS[:2])
    assert recipe.read_text() == text
    mended = new.read_text()
    comments = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    assert [line for line in mended.splitlines() if line.lstrip().startswith("#")] == comments
    keys = [list(yaml.safe_load(one)) for one in (text, mended)]
    assert keys[1] == [{"dype": "dtype"}.get(k, k) for k in keys[0] if k not in STRAY]
    if path.stem == "24-linear-four-heads":  # whose base nobody but the user can know
        assert result.exit_code == 1
        says(result.stdout, "no base_model", "1 error")
        return
    assert result.exit_code == 0, result.output
    checked = commands.obim_saliency("--check", new, *OPTIONS[:2])
    assert checked.exit_code == 0
    for unusual in ("ignores parameters", "shares of a sum", "asks the Hub"):
        assert unusual not in checked.stdout
    # Without --no-write-model-card too, and without a network.
    succeed(commands.mergekit_yaml(new, tmp_path / "merged", *OPTIONS[:2], "--quiet"))


# Parameters of other methods among the keys of the recipe.
STRAY = ("select_topk", "int8_mask")


def test_what_was_changed_is_said_with_the_reason(tmp_path: Path) -> None:
    (path,) = (path for path in RECIPES if path.stem.startswith("02"))
    recipe = tmp_path / "swapped.yml"
    recipe.write_text(swapped(path, "obim"))
    result = succeed(commands.obim_saliency("--check", recipe, "--fix", tmp_path / "new.yml"))
    changed = [line for line in result.stdout.splitlines() if line.startswith("Changed: ")]
    assert len(changed) == 4
    says(changed[0], "parameters.int8_mask taken out", "other merge methods")
    says(changed[1], "models[1].parameters.weight: 0.4 taken out; models[2]", "share of a sum")
    says(changed[2], "base_model: base → ./base; models[0].model: base → ./base", "the Hub")
    says(changed[3], "models[1].parameters.density: 0.53 → 0.3333;", "summed to 1.59")
    new = yaml.safe_load((tmp_path / "new.yml").read_text())
    assert [model.get("parameters") for model in new["models"]] == [
        None,
        *[{"density": 0.3333}] * 3,
    ]
