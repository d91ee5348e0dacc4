"""The Python face gives what the commands give, and says in one line what it cannot do."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import mergekit_obim
from commands import MATH_ROWS, World, mergekit_yaml, same_tensors, succeed, write_recipe
from mergekit_obim.errors import (
    CalibrationError,
    RecipeError,
    SaliencyFileError,
    SaliencyNotFoundError,
)
from mergekit_obim.saliency.file import SaliencyFile
from tiny_models import build
from tiny_processors import MODELS, architecture, processor, write_images
from tiny_tokenizers import CHAT_TEMPLATE, VOCAB_SIZE, byte_tokenizer

# What the world's recipe says.
DENSITY = {"math": 0.45, "code": 0.1}
MATH = {"samples": len(MATH_ROWS), "max_length": 48}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def small(**changes: Any) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        **changes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def merged(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What mergekit-yaml makes of the world's recipe."""
    folder = tmp_path_factory.mktemp("merged")
    succeed(mergekit_yaml(write_recipe(folder, world.recipe()), folder / "out"))
    return weights(folder / "out")


@pytest.fixture
def scores(world: World) -> dict[str, Path]:
    return {folder.name: world.saliency_of(folder) for folder in world.experts}


# --- measuring ----------------------------------------------------------------------------


def test_a_folder_is_measured_as_the_command_measures_it(world: World) -> None:
    measured = mergekit_obim.measure(world.math, world.math_data, **MATH, quiet=True)
    file = SaliencyFile(world.saliency_of(world.math))
    same_tensors(measured, {name: file[name] for name in file.shapes})
    assert measured.metadata == file.metadata


def test_a_loaded_model_is_measured_as_the_command_measures_it(world: World) -> None:
    model = loaded(world.math).train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    measured = mergekit_obim.measure(
        model, world.math_data, tokenizer=byte_tokenizer(), **MATH, quiet=True
    )
    file = SaliencyFile(world.saliency_of(world.math))
    same_tensors(measured, {name: file[name] for name in file.shapes})
    assert measured.metadata == file.metadata
    assert before == {name: module.training for name, module in model.named_modules()}
    same_tensors(kept, model.state_dict())


ROWS = ["one and one", "two"]


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        tuple(ROWS),
        (row for row in ROWS),
        [{"text": row} for row in ROWS],
        [{"prompt": row, "completion": "left out"} for row in ROWS],
    ],
    ids=["texts", "a tuple", "a generator", "rows", "prompts"],
)
def test_data_may_be_in_memory(data: Any) -> None:
    model, tokenizer = small(), byte_tokenizer()
    expected = mergekit_obim.measure(
        model, [*ROWS, "not drawn"][:2], tokenizer=tokenizer, quiet=True
    )
    measured = mergekit_obim.measure(model, data, tokenizer=tokenizer, quiet=True)
    same_tensors(measured, expected)
    record = measured.metadata.calibration
    assert record["samples"] == 2
    assert record["sources"][0]["data"] == "data"
    assert record["tokens"] == sum(map(len, ROWS))


def test_conversations_go_through_the_chat_template() -> None:
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    model = small()
    measured = mergekit_obim.measure(model, [talk], tokenizer=tokenizer, quiet=True)
    row = mergekit_obim.measure(model, [{"messages": talk}], tokenizer=tokenizer, quiet=True)
    same_tensors(measured, row)
    assert measured.metadata.calibration["template"]


def test_settings_are_those_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"own": f"{n} " * n}) + "\n" for n in range(1, 9)))
    model, tokenizer = small(), byte_tokenizer()
    measured = mergekit_obim.measure(
        model, path, tokenizer=tokenizer, column="own", samples=3, max_length=4, quiet=True
    )
    recipe = mergekit_obim.measure(
        model,
        {"data": [{"data": str(path), "column": "own"}], "samples": 3, "max_length": 4},
        tokenizer=tokenizer,
        quiet=True,
    )
    same_tensors(measured, recipe)
    assert measured.metadata.calibration["samples"] == 3
    assert measured.metadata.calibration["max_length"] == 4


def test_a_mixture_in_memory_has_the_names_of_its_checkpoint_too(tmp_path: Path) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    stored = weights(tmp_path)
    fused = [name for name in model.state_dict() if name not in stored]
    assert fused
    text = "".join(map(chr, range(35)))  # 38 tokens of the model's 48
    measured = mergekit_obim.measure(model, [text], tokenizer=byte_tokenizer(), quiet=True)
    apart = [name for name in stored if name not in model.state_dict()]
    assert {*fused, *apart} <= measured.keys()
    assert {*apart} <= measured.metadata.fingerprint.keys()


@pytest.mark.parametrize(
    ("data", "settings", "words"),
    [
        ([], {}, ["data", "empty"]),
        (["fine", {"nothing": 1}], {}, ["data, row 2", "nothing"]),
        ([{"text": "x", "images": [object()]}], {}, ["data, row 1", "absolute path"]),
        (["x"], {"sampels": 3}, ["sampels", "did you mean 'samples'?"]),
        (["x"], {"max_length": 0}, ["max_length", "0"]),
        (["x"], {"device": "cpu"}, ["device", "loaded already"]),
        (["x"], {"dtype": "bfloat16"}, ["dtype", "loaded already"]),
        (["x"], {"tokenizer": None}, ["tokenizer"]),
    ],
)
def test_what_cannot_be_measured_is_told(data: Any, settings: Any, words: list[str]) -> None:
    arguments = {"tokenizer": byte_tokenizer(), "quiet": True, **settings}
    with pytest.raises((CalibrationError, RecipeError)) as told:
        mergekit_obim.measure(small(), data, **arguments)
    assert "\n" not in told.value.message
    assert "rows.jsonl" not in told.value.message
    for word in words:
        assert word in told.value.message


def test_a_path_among_texts_is_no_text(world: World) -> None:
    for path in (world.math_data, str(world.math_data)):
        with pytest.raises(CalibrationError, match=r"data, row 2: .* is a file:"):
            mergekit_obim.measure(small(), ["a text", path], tokenizer=byte_tokenizer())


def test_models_that_a_merge_would_not_read_so_are_refused() -> None:
    adapted = small()
    adapted.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped = get_peft_model(small(), LoraConfig(r=2, target_modules=["q_proj"]))
    for model, words in (
        (adapted, r"has an adapter .* give MODEL\+ADAPTER"),
        (wrapped, r"no transformers model.* merge_and_unload\(\)"),
    ):
        with pytest.raises(CalibrationError, match=words):
            mergekit_obim.measure(model, ["x"], tokenizer=byte_tokenizer())


def test_images_go_through_the_processor_that_is_given(tmp_path: Path) -> None:
    name = MODELS[0]
    model = architecture(name).build()
    model.save_pretrained(tmp_path / "model")
    own = processor(name, chat=True)
    own.save_pretrained(tmp_path / "model")
    [image] = write_images(tmp_path, 1)
    rows = [{"text": "What is this?", "images": [str(tmp_path / image)]}, {"text": "no image"}]
    measured = mergekit_obim.measure(model, rows, tokenizer=own, quiet=True)
    same_tensors(measured, mergekit_obim.measure(tmp_path / "model", rows, quiet=True))
    assert any("vision" in key for key in measured)
    with pytest.raises(CalibrationError, match="data, row 1: has images: give the model's proc"):
        mergekit_obim.measure(model, rows, tokenizer=own.tokenizer, quiet=True)


def test_a_folder_takes_options_and_no_tokenizer(world: World) -> None:
    with pytest.raises(RecipeError, match="tokenizer: not for a model that is yet to be loaded"):
        mergekit_obim.measure(world.math, ["x"], tokenizer=byte_tokenizer())
    with pytest.raises(RecipeError, match="did you mean 'trust_remote_code'"):
        mergekit_obim.measure(world.math, ["x"], options={"trust_remote_cod": True})


def test_warnings_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mergekit_obim"):
        mergekit_obim.measure(
            small(max_position_embeddings=8), ["x"], tokenizer=byte_tokenizer(), quiet=True
        )
    assert "max_length is 8" in caplog.text


# --- files --------------------------------------------------------------------------------


def test_a_file_that_is_read_and_written_is_the_same(world: World, tmp_path: Path) -> None:
    path = world.saliency_of(world.math)
    copy = mergekit_obim.write_saliency(tmp_path / "a/b.safetensors", read := read_all(path))
    assert copy.read_bytes() == path.read_bytes()
    next(iter(read.values())).zero_()  # what was read is the caller's own
    assert copy.read_bytes() == path.read_bytes()
    renamed = mergekit_obim.write_saliency(copy, read, model="another")
    assert mergekit_obim.read_saliency(renamed).metadata.model == "another"


def read_all(path: Path) -> mergekit_obim.ExpertSaliency:
    return mergekit_obim.read_saliency(path)


@pytest.mark.parametrize(
    ("tensor", "metadata", "words"),
    [
        (torch.ones(2), {}, "which model"),
        (torch.ones(2), {"model": "m", "froms": "dense"}, "did you mean 'form'"),
        (torch.ones(2), {"model": "m", "form": "thick"}, "form: .*'factored' or 'dense'"),
        (-torch.ones(2), {"model": "m"}, "negative"),
        (torch.full((2,), torch.nan), {"model": "m"}, "not finite"),
    ],
)
def test_what_is_no_saliency_is_not_written(
    tensor: Tensor, metadata: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(SaliencyFileError, match=words):
        mergekit_obim.write_saliency(tmp_path / "x.safetensors", {"w": tensor}, **metadata)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SaliencyNotFoundError, match=r"x\.safetensors"):
        mergekit_obim.read_saliency(tmp_path / "x.safetensors")


# --- merging ------------------------------------------------------------------------------


def test_state_dicts_merge_as_mergekit_yaml_merges(
    world: World, merged: dict[str, Tensor], scores: dict[str, Path]
) -> None:
    experts = {folder.name: weights(folder) for folder in world.experts}
    same_tensors(mergekit_obim.merge(weights(world.base), experts, scores, density=DENSITY), merged)
    in_memory = [read_all(path) for path in scores.values()]
    listed = mergekit_obim.merge(
        weights(world.base), list(experts.values()), in_memory, density=[0.45, 0.1]
    )
    same_tensors(listed, merged)


def test_modules_merge_as_mergekit_yaml_merges(
    world: World, merged: dict[str, Tensor], scores: dict[str, Path]
) -> None:
    experts = {folder.name: loaded(folder) for folder in world.experts}
    result = mergekit_obim.merge(loaded(world.base), experts, scores, density=DENSITY)
    same_tensors({name: result[name] for name in merged}, merged)


def test_folders_merge_as_mergekit_yaml_merges(
    world: World, merged: dict[str, Tensor], scores: dict[str, Path], tmp_path: Path
) -> None:
    experts = {folder.name: folder for folder in world.experts}
    settings: Any = {"density": DENSITY, "dtype": torch.float32, "quiet": True}
    same_tensors(mergekit_obim.merge(world.base, experts, scores, **settings), merged)
    in_memory = {name: read_all(path) for name, path in scores.items()}
    out = mergekit_obim.merge(world.base, experts, in_memory, out=tmp_path / "out", **settings)
    same_tensors(weights(out), merged)
    assert (out / "tokenizer.json").is_file()
    # The recipe beside it says how it was made, and runs again.
    again = out / "mergekit_config.yml"
    assert yaml.safe_load(again.read_text())["merge_method"] == "obim"
    succeed(mergekit_yaml(again, tmp_path / "again"))
    same_tensors(weights(tmp_path / "again"), merged)


def test_a_folder_of_saliency_serves_all(world: World, merged: dict[str, Tensor]) -> None:
    result = mergekit_obim.merge(
        world.base, world.experts, world.saliency, density=[0.45, 0.1], dtype="float32", quiet=True
    )
    same_tensors(result, merged)


def test_a_folder_that_was_written_anew_is_read_anew(world: World, tmp_path: Path) -> None:
    base, math = loaded(world.base), loaded(world.math)
    results = []
    for expert in (base, math):
        expert.save_pretrained(tmp_path / "expert")
        byte_tokenizer(tmp_path / "expert")
        results.append(
            mergekit_obim.merge(
                world.base, [tmp_path / "expert"], criterion="magnitude", density=1.0, quiet=True
            )
        )
    same_tensors(results[0], weights(world.base))
    same_tensors(results[1], weights(world.math))


def test_tied_weights_stay_tied() -> None:
    base = small(tie_word_embeddings=True)
    experts = {}
    for n in range(2):
        expert = experts[f"e{n}"] = small(tie_word_embeddings=True)
        torch.manual_seed(n)
        for parameter in expert.parameters():
            parameter.data += torch.randn_like(parameter)
    saliencies = {
        name: mergekit_obim.measure(expert, ROWS, tokenizer=byte_tokenizer(), quiet=True)
        for name, expert in experts.items()
    }
    result = mergekit_obim.merge(base, experts, saliencies)
    assert result.keys() == base.state_dict().keys()
    assert torch.equal(result["lm_head.weight"], result["model.embed_tokens.weight"])
    assert not torch.equal(result["lm_head.weight"], base.state_dict()["lm_head.weight"])


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("obim", {"lambda_": 0.5, "order": "recipe"}),
        ("ties_obm", {"weight": [1.0, 0.5]}),
        ("regmean_diag", {}),
        ("consensus_ta", {}),
    ],
)
def test_every_method_merges_in_memory_as_on_disk(
    method: str, parameters: dict[str, Any], world: World, scores: dict[str, Path]
) -> None:
    files = None if method == "consensus_ta" else scores
    in_memory = {folder.name: weights(folder) for folder in world.experts}
    on_disk = {folder.name: folder for folder in world.experts}
    same_tensors(
        mergekit_obim.merge(weights(world.base), in_memory, files, method, **parameters),
        mergekit_obim.merge(world.base, on_disk, files, method, quiet=True, **parameters),
    )


def tiny(*values: float) -> dict[str, Tensor]:
    return {"w": torch.tensor([values], dtype=torch.float32)}


ONE = {"w": torch.ones(1, 2)}


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        ([tiny(1, 2)], {}, "experts: give a list"),
        ([[tiny(1, 2)]], {}, "expert-1: has no saliency.*criterion=.magnitude."),
        ([{"a": tiny(1, 2)}, {"b": ONE}], {}, "saliencies: 'b' is no expert's name: a"),
        ([[tiny(1, 2)], [ONE, ONE]], {}, "saliencies: there are 2 for 1 experts"),
        ([[tiny(1, 2)], [ONE]], {"densty": 1}, "no parameter 'densty'; did you mean density"),
        ([[tiny(1, 2)], [ONE]], {"density": 3}, "density: 3.* lies outside 0…1"),
        ([[tiny(1, 2)] * 2, [ONE] * 2], {"density": 0.7}, "densities"),
        ([[tiny(1, 2)], [ONE]], {"density": [1, 1]}, "density: there are 2 for 1 experts"),
        ([[tiny(1, 2)], [ONE]], {"method": "obmi"}, "'obmi' is none of mergekit-obim's: .*obim"),
        ([[tiny(1, 2)], [ONE]], {"method": "pcb"}, "saliencies: pcb reads none"),
        ([[tiny(1, 2)], [ONE]], {"dtype": "int8"}, "dtype"),
        ([[tiny(1, 2)], [ONE]], {"out": "x"}, "out: not for models in memory"),
        ([["a-folder"], [ONE]], {}, "some models are folders"),
        ([[{"v": torch.ones(1, 2)}], [ONE]], {}, "cannot be merged: .*different tensor keys"),
        ([[tiny(1, 2, 3)], [ONE]], {}, r"size mismatch for w: \[\(1, 2\), \(1, 3\)\]"),
    ],
)
def test_what_cannot_be_merged_is_told(arguments: Any, settings: Any, words: str) -> None:
    with pytest.raises((RecipeError, SaliencyFileError), match=words) as told:
        mergekit_obim.merge(tiny(0, 0), *arguments, **settings)
    assert "\n" not in told.value.message


def test_a_saliency_of_other_weights_is_refused(world: World, scores: dict[str, Path]) -> None:
    experts = {folder.name: weights(folder) for folder in world.experts}
    swapped = {"math": read_all(scores["code"]), "code": read_all(scores["math"])}
    with pytest.raises(SaliencyFileError, match="was measured on other weights"):
        mergekit_obim.merge(weights(world.base), experts, swapped)


# --- checking -----------------------------------------------------------------------------


def test_a_recipe_is_checked_in_every_form(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(merge_method="obmi")
    path = write_recipe(tmp_path, recipe)
    for form in (path, str(path), path.read_text(), recipe):
        [error] = mergekit_obim.check(form).errors
        assert "did you mean obim?" in error
    assert not mergekit_obim.check(world.recipe()).errors


def test_what_is_no_recipe_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no such recipe"):
        mergekit_obim.check(tmp_path / "none.yml")
    with pytest.raises(RecipeError, match=r"^the recipe: not a YAML recipe"):
        mergekit_obim.check("models: [\nmerge_method: obim")


# --- the package --------------------------------------------------------------------------


def test_the_package_has_what_it_says_it_has() -> None:
    for name in mergekit_obim.__all__:
        assert getattr(mergekit_obim, name) is not None
        assert name in dir(mergekit_obim)
    with pytest.raises(AttributeError, match="has no attribute 'mesure'"):
        mergekit_obim.mesure  # noqa: B018
