"""What users can do wrong, through the real commands: exit code 1, one line, nothing harmed.

Every line of the contract's section "Errors" is here, for the merge and for the pre-pass.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from click.testing import Result
from safetensors.torch import save_file

import checkpoints
import commands
from commands import World, refusal, says
from mergekit_obim.calibration.capture.squares import Squares
from mergekit_obim.methods.base import ExpertMethod
from mergekit_obim.saliency import file as saliency_file
from tiny_tokenizers import byte_tokenizer

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
DOWN_PROJ = "model.layers.0.mlp.down_proj.weight"
# Any way to learn what goes wrong and where saliency comes from.
REMEASURE = "obim-saliency"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# --- the merge ---------------------------------------------------------------------------


@pytest.fixture
def refuse_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a merge that must be refused before any tensor is merged; returns its one line."""

    def merged(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a tensor was merged")

    def refuse(
        recipe: object, command: Callable[..., Result] = commands.mergekit_yaml, *options: object
    ) -> str:
        out = tmp_path / "merged"
        path = commands.write_recipe(tmp_path, recipe)
        message = refusal(command(path, out, *options))
        assert not out.exists()
        return message

    monkeypatch.setattr(ExpertMethod, "merge_group", merged)
    return refuse


@pytest.fixture
def spoilt(world: World, tmp_path: Path) -> Path:
    """A copy of the pre-pass's files, to be spoilt."""
    return shutil.copytree(world.saliency, tmp_path / "spoilt")


def rewrite(
    path: Path, *, edit: Callable[[dict[str, torch.Tensor]], None] = lambda _: None, **header: str
) -> None:
    """Write a saliency file again with other tensors or header; an empty value drops a key."""
    tensors = commands.entries(path)
    edit(tensors)
    metadata = {k: v for k, v in (commands.header(path) | header).items() if v}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def put(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return edit


def reshape(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.ones(shape)

    return edit


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def to_half_precision(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ].half()


SPOILERS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing": (Path.unlink, ["no saliency", REMEASURE]),
    "truncated": (cut_in_half, ["truncated", REMEASURE]),
    "empty": (lambda path: path.write_bytes(b""), ["not a readable safetensors", REMEASURE]),
    "not safetensors": (
        lambda path: path.write_text("<html>404</html>"),
        ["not a readable safetensors", REMEASURE],
    ),
    "a model's own weights": (
        lambda path: save_file({Q_PROJ: torch.ones(16, 16)}, path),
        ["not a saliency file", "format", "docs/saliency_format.md"],
    ),
    "another format": (
        lambda path: rewrite(path, format="imatrix"),
        ["'imatrix'", "docs/saliency_format.md"],
    ),
    "newer version": (
        lambda path: rewrite(path, format_version="2"),
        ["format version '2'", "upgrade"],
    ),
    "no form": (lambda path: rewrite(path, form=""), ["lacks form"]),
    "unknown form": (lambda path: rewrite(path, form="sparse"), ["form"]),
    "header is no JSON": (lambda path: rewrite(path, fingerprint="{"), ["fingerprint"]),
    "half precision": (lambda path: rewrite(path, edit=to_half_precision), [Q_PROJ, "float32"]),
    "NaN": (
        lambda path: rewrite(path, edit=put(Q_PROJ, math.nan)),
        [Q_PROJ, "not finite", REMEASURE],
    ),
    "infinite": (
        lambda path: rewrite(path, edit=put(Q_PROJ, math.inf)),
        [Q_PROJ, "not finite", REMEASURE],
    ),
    "negative": (
        lambda path: rewrite(path, edit=put(Q_PROJ, -1e-9)),
        [Q_PROJ, "negative", REMEASURE],
    ),
    "does not broadcast": (
        lambda path: rewrite(path, edit=reshape(Q_PROJ, 1, 17)),
        [Q_PROJ, "[1, 17]", "[16, 16]", "measured on this model?"],
    ),
    "too many dimensions": (
        lambda path: rewrite(path, edit=reshape(Q_PROJ, 1, 1, 16)),
        [Q_PROJ, "[1, 1, 16]", "measured on this model?"],
    ),
    "factored passed off as dense": (
        lambda path: rewrite(path, form="dense"),
        ["model.embed_tokens.weight", "dense", "[259, 16]"],
    ),
}


@pytest.mark.parametrize("how", SPOILERS)
def test_unusable_saliency(
    world: World, spoilt: Path, refuse_merge: Callable[..., str], how: str
) -> None:
    spoil, words = SPOILERS[how]
    spoil(world.saliency_of(world.code, spoilt))
    message = refuse_merge(world.recipe(parameters={"saliency": str(spoilt)}))
    says(message, world.code, *words)
    assert str(world.math) not in message


METHODS_WITH_SALIENCY = ("obim", "ties_obm", "obm_sign", "regmean_diag", "regmean")


@pytest.mark.parametrize("method", METHODS_WITH_SALIENCY)
def test_saliency_of_another_expert(
    world: World, spoilt: Path, refuse_merge: Callable[..., str], method: str
) -> None:
    shutil.copy(world.saliency_of(world.math, spoilt), world.saliency_of(world.code, spoilt))
    recipe = of_method(method, with_parameters(saliency=str(spoilt)))(world)
    message = refuse_merge(recipe)
    says(message, world.code, "measured on other weights", REMEASURE, "--overwrite")


@pytest.mark.parametrize("method", METHODS_WITH_SALIENCY)
def test_saliency_is_missing(
    world: World, spoilt: Path, refuse_merge: Callable[..., str], method: str
) -> None:
    world.saliency_of(world.code, spoilt).unlink()
    recipe = of_method(method, with_parameters(saliency=str(spoilt)))(world)
    says(refuse_merge(recipe), world.code, "no saliency", REMEASURE)


@pytest.mark.parametrize("changed", ["everything", Q_PROJ])
def test_saliency_from_before_a_little_more_training(
    world: World, tmp_path: Path, refuse_merge: Callable[..., str], changed: str
) -> None:
    tensors = checkpoints.read_checkpoint(world.math)
    for name, weight in tensors.items():
        if changed in (name, "everything"):
            weight += 1e-4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    trained = checkpoints.write_checkpoint(
        tmp_path / "math", tensors, checkpoints.llama_config(layers=2, vocabulary=259)
    )
    recipe = world.recipe()
    recipe["models"][0]["model"] = str(trained)
    recipe["models"][0]["parameters"]["saliency"] = str(world.saliency_of(world.math))
    says(
        refuse_merge(recipe),
        *(trained, world.saliency_of(world.math), "measured on other weights", REMEASURE),
        *([changed] if changed == Q_PROJ else []),
    )


@pytest.mark.parametrize("command", ["mergekit_yaml", "mergekit_pytorch"])
def test_saliency_left_out_and_no_model_carries_one(
    world: World, refuse_merge: Callable[..., str], command: str
) -> None:
    recipe = world.recipe(parameters=None)
    if command == "mergekit_pytorch":
        recipe = flat(recipe)
    message = refuse_merge(recipe, getattr(commands, command))
    says(message, world.math, "obim_saliency.safetensors", f"{REMEASURE} RECIPE", "`saliency:")


def test_saliency_is_an_unknown_place(world: World, refuse_merge: Callable[..., str]) -> None:
    message = refuse_merge(world.recipe(parameters={"saliency": "./salency"}))
    says(message, world.math, "./salency", REMEASURE)


def with_parameters(**parameters: Any) -> Callable[[World], dict[str, Any]]:
    """A recipe with these shared parameters beside its saliency."""
    return lambda world: world.recipe(parameters={"saliency": str(world.saliency), **parameters})


def with_each(**parameters: Any) -> Callable[[World], dict[str, Any]]:
    """A recipe whose models both have these parameters."""
    return lambda world: world.recipe(models=world.models(**parameters))


def with_one(**parameters: Any) -> Callable[[World], dict[str, Any]]:
    """A recipe whose second expert has these parameters, and the first none."""
    return lambda world: world.recipe(
        models=[world.models()[0], world.models(**parameters)[1]],
    )


def of_method(
    method: str, recipe: Callable[[World], dict[str, Any]], **changes: Any
) -> Callable[[World], dict[str, Any]]:
    """The same recipe for another method; its models have no density unless they are given."""

    def make(world: World) -> dict[str, Any]:
        made = {**recipe(world), "merge_method": method, **changes}
        for model, usual in zip(made["models"], world.recipe()["models"], strict=True):
            if model["parameters"] == usual["parameters"]:
                model["parameters"] = {}
        return {key: value for key, value in made.items() if value is not None}

    return make


def sliced(world: World, **changes: Any) -> dict[str, Any]:
    """The recipe in slices: every source's whole range at once."""
    sources: list[dict[str, Any]] = [
        {"model": str(model), "layer_range": [0, commands.LAYERS]}
        for model in (world.math, world.code, world.base)
    ]
    return world.recipe(models=None, slices=[{"sources": sources, **changes}])


def expert_twice(world: World) -> dict[str, Any]:
    return world.recipe(models=[*world.models(density=0.1), world.models(density=0.1)[0]])


FAULTY: dict[str, tuple[Callable[[World], dict[str, Any]], list[str]]] = {
    "densities sum over 1": (
        with_each(density=0.6),
        ["model.embed_tokens.weight", "densities sum to 1.2, over 1", "{math}", "{code}", "lower"],
    ),
    "density and the default sum over 1": (
        with_one(density=0.75),
        ["densities sum to 1.25", "left out means 1/2", "lower"],
    ),
    "over 1 in one tensor": (
        with_each(density=[{"filter": DOWN_PROJ, "value": 0.75}, {"value": 0.25}]),
        [f"tensor {DOWN_PROJ}", "1.5", "lower"],
    ),
    "over 1 where a gradient rises": (
        with_each(density=[0.25, 0.75]),
        ["tensor model.layers.1.", "1.5", "lower"],
    ),
    "density below 0": (with_one(density=-0.1), ["{code}", "density", "-0.1", "0…1"]),
    "density over 1": (with_one(density=1.5), ["{code}", "density", "1.5", "0…1"]),
    "density is no number": (with_one(density="half"), ["{code}", "density", "'half'"]),
    "density NaN": (with_one(density=math.nan), ["{code}", "density", "nan"]),
    "density over 1 for all": (with_parameters(density=2), ["parameters", "density", "2"]),
    "density over 1 in a gradient": (with_one(density=[0.1, 1.1]), ["{code}", "density", "1.1"]),
    "density over 1 for a filter that matches nothing": (
        with_one(density=[{"filter": "nowhere", "value": 7}, {"value": 0.1}]),
        ["{code}", "density", "7"],
    ),
    "weight is no number": (with_one(weight="heavy"), ["{code}", "weight", "'heavy'"]),
    "weight is infinite": (with_one(weight=math.inf), ["{code}", "weight", "inf"]),
    "lambda is no number": (with_parameters(**{"lambda": "big"}), ["lambda", "'big'"]),
    "unknown order": (with_parameters(order="rotate"), ["order", "'rotate'", "rotation, recipe"]),
    "unknown criterion": (
        with_one(criterion="magnitud"),
        ["{code}", "criterion", "'magnitud'", "saliency, magnitude, random"],
    ),
    "unknown criterion for all": (
        with_parameters(criterion="fisher"),
        ["criterion", "'fisher'", "saliency, magnitude, random"],
    ),
    "unknown criterion in a filter": (
        with_parameters(criterion=[{"filter": "norm", "value": "rnd"}, {"value": "saliency"}]),
        ["criterion", "'rnd'", "saliency, magnitude, random"],
    ),
    "unknown unscored": (
        with_parameters(unscored="skip"),
        ["unscored", "'skip'", "magnitude, random, base"],
    ),
    "unknown assignment": (
        with_parameters(assignment="greedy"),
        ["assignment", "'greedy'", "iterative, least_error, nearest"],
    ),
    "stretch of another assignment": (
        with_parameters(stretch=2.0),
        ["tensor model.", "stretch", "assignment: nearest", "iterative"],
    ),
    "negative stretch": (with_parameters(stretch=-1.0), ["stretch", "-1.0 is negative"]),
    "seed is no number": (with_parameters(seed="lucky"), ["seed", "'lucky'"]),
    "misspelt for one model": (
        with_one(densty=0.5),
        ["{code}", "'densty'", "did you mean density?"],
    ),
    "misspelt for all": (
        with_parameters(lamda=0.5),
        ["parameters", "'lamda'", "did you mean lambda?"],
    ),
    "misspelt beyond recognition": (
        with_parameters(xyzzy=1),
        ["'xyzzy'", "density", "saliency"],
    ),
    "misspelt in a slice": (
        lambda world: sliced(world, parameters={"wieght": 1}),
        ["slice parameters", "'wieght'", "did you mean weight?"],
    ),
    "filled in by the planner only": (with_parameters(tensor_name="x"), ["'tensor_name'"]),
    "shared parameter under a model": (
        with_one(order="recipe"),
        ["{code}", "order", "shared", "move it"],
    ),
    "base missing": (
        lambda world: world.recipe(base_model=None),
        ["no base_model", "add 'base_model: …'"],
    ),
    "base alone": (
        lambda world: world.recipe(models=[{"model": str(world.base)}]),
        ["no model besides the base", "under models"],
    ),
    "expert listed twice": (expert_twice, ["{math}", "twice", "once"]),
    "negative weight of an error": (
        lambda world: {
            **with_one(weight=-0.5)(world),
            "parameters": {"saliency": str(world.saliency), "assignment": "least_error"},
        },
        ["tensor model.", "{code}", "weight -0.5", "0 or more"],
    ),
    "negative weight in one tensor": (
        of_method(
            "regmean_diag", with_one(weight=[{"filter": DOWN_PROJ, "value": -1}, {"value": 1}])
        ),
        [f"tensor {DOWN_PROJ}", "{code}", "weight -1", "0 or more"],
    ),
    "chance in a mean": (
        of_method("regmean_diag", with_parameters(criterion="random")),
        ["criterion", "'random'", "saliency, magnitude"],
    ),
    "chance in an election": (
        of_method("obm_sign", with_parameters(unscored="random")),
        ["unscored", "'random'", "magnitude, base"],
    ),
    "misspelt for a baseline": (
        of_method("consensus_ta", with_each(mask_treshold=0.3), parameters=None),
        ["{math}", "'mask_treshold'", "did you mean mask_threshold?"],
    ),
    "shared parameter of a baseline under a model": (
        of_method("consensus_ta", with_each(min_agreement=1), parameters=None),
        ["{math}", "min_agreement", "shared", "move it"],
    ),
    "negative threshold": (
        of_method("consensus_ta", with_each(mask_threshold=-0.1), parameters=None),
        ["{math}", "mask_threshold", "-0.1", "negative"],
    ),
    "agreement of half an expert": (
        of_method("consensus_ta", with_each(), parameters={"min_agreement": 1.5}),
        ["min_agreement", "1.5"],
    ),
    "agreement of less than none": (
        of_method("consensus_ta", with_each(), parameters={"min_agreement": -1}),
        ["min_agreement", "-1", "negative"],
    ),
    "a baseline's density over 1": (
        of_method("pcb", with_each(density=1.5), parameters=None),
        ["{math}", "density", "1.5", "0…1"],
    ),
    "a baseline without a base": (
        of_method("pcb", with_each(), parameters=None, base_model=None),
        ["no base_model", "add 'base_model: …'"],
    ),
    "ties_obm's densities too": (
        lambda world: {**with_one(density=1.01)(world), "merge_method": "ties_obm"},
        ["{code}", "density", "1.01"],
    ),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_faulty_recipe(world: World, refuse_merge: Callable[..., str], fault: str) -> None:
    make, words = FAULTY[fault]
    folders = {"math": world.math, "code": world.code, "base": world.base}
    says(refuse_merge(make(world)), *(word.format_map(folders) for word in words))


def test_a_refused_merge_leaves_the_last_one_alone(world: World, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    good = commands.write_recipe(tmp_path, world.recipe(), "good.yml")
    commands.succeed(commands.mergekit_yaml(good, out))
    before = commands.contents(out)
    assert {"config.json", "model.safetensors"} <= before.keys()
    for make in (with_each(density=0.6), with_parameters(lamda=1), with_parameters(saliency="no")):
        refusal(commands.mergekit_yaml(commands.write_recipe(tmp_path, make(world)), out))
        assert commands.contents(out) == before


def flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """The same for mergekit-pytorch, whose models are files."""
    return {
        **{key: value for key, value in recipe.items() if key != "calibration"},
        "base_model": f"{recipe['base_model']}/model.safetensors",
        "models": [
            {**model, "model": f"{model['model']}/model.safetensors"} for model in recipe["models"]
        ],
    }


def test_mergekit_pytorch_refuses_too(
    world: World, spoilt: Path, tmp_path: Path, refuse_merge: Callable[..., str]
) -> None:
    files = {expert: world.saliency_of(expert, spoilt) for expert in world.experts}

    def run(**changes: Any) -> str:
        recipe = flat(world.recipe(**changes))
        for model, expert in zip(recipe["models"], world.experts, strict=True):
            model["parameters"] = {**model["parameters"], "saliency": str(files[expert])}
        return refuse_merge(recipe, commands.mergekit_pytorch)

    expert = f"{world.code}/model.safetensors"
    over = world.models(density=[{"filter": DOWN_PROJ, "value": 0.75}, {"value": 0.25}])
    says(run(models=over), f"tensor {DOWN_PROJ}", "1.5", "lower")
    says(run(parameters={"lamda": 1}), "'lamda'", "did you mean lambda?")
    says(run(models=with_one(densty=1)(world)["models"]), expert, "'densty'", "density?")
    recipe = flat(world.recipe())
    del recipe["base_model"]
    says(refuse_merge(recipe, commands.mergekit_pytorch), "needs a base model", "none is set")
    rewrite(files[world.code], edit=put(Q_PROJ, math.nan))
    says(run(), expert, Q_PROJ, "not finite", REMEASURE)
    shutil.copy(files[world.math], files[world.code])
    says(run(), expert, "measured on other weights", REMEASURE)


def test_mergekit_multi_refuses_too(world: World, tmp_path: Path) -> None:
    first = {**world.recipe(), "name": "first"}
    second = {**with_one(densty=0.5)(world), "name": "second"}
    documents = tmp_path / "multi.yml"
    stages = tmp_path / "stages"
    for recipes, made in (([second], set()), ([first, second], {"first"})):
        documents.write_text(yaml.safe_dump_all(recipes))
        message = refusal(commands.mergekit_multi(documents, "--intermediate-dir", stages))
        says(message, world.code, "'densty'", "did you mean density?")
        assert {path.name for path in stages.iterdir()} <= made


# --- the pre-pass ------------------------------------------------------------------------


@pytest.fixture
def refuse_prepass(world: World, tmp_path: Path) -> Callable[..., str]:
    """Runs a pre-pass that must be refused; returns its one line, having checked OUT_DIR."""

    def refuse(recipe: object, *options: object, leaves: Path | None = None) -> str:
        out = leaves or tmp_path / "measured"
        before = commands.contents(out)
        path = commands.write_recipe(tmp_path, recipe)
        message = refusal(commands.obim_saliency(path, out, *options))
        assert commands.contents(out) == before
        return message

    return refuse


def one_expert(world: World, calibration: object, model: object = None) -> dict[str, Any]:
    return world.recipe(models=[{"model": str(model or world.math), "calibration": calibration}])


DATA: dict[str, tuple[str, bytes, list[str]]] = {
    "empty file": ("rows.jsonl", b"", ["is empty"]),
    "only blank lines": ("rows.txt", b"\n \n", ["is empty"]),
    "rows without text": ("rows.jsonl", b'{"text": ""}\n{"text": " "}\n', ["is empty"]),
    "not JSON": ("rows.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2", "not valid JSON"]),
    "row is a number": ("rows.jsonl", b'{"text": "a"}\n3\n', ["line 2", "found 3"]),
    "no usable field": (
        "rows.jsonl",
        b'{"body": "a", "id": 3}\n',
        ["line 1", "no field", "body, id", "column:"],
    ),
    "text is a number": ("rows.jsonl", b'{"text": 3}\n', ["line 1", "'text'", "found 3"]),
    "messages without template": (
        "rows.jsonl",
        b'{"messages": [{"role": "user", "content": "hi"}]}\n',
        ["line 1", "no chat template", "chat_template.jinja"],
    ),
    "not UTF-8": ("rows.txt", b"\xff\xfe\xfa", ["UTF-8"]),
    "no parquet": ("rows.parquet", b"PAR0", ["parquet"]),
    "another suffix": ("rows.xlsx", b"?", ["format", ".jsonl"]),
}


@pytest.mark.parametrize("fault", DATA)
def test_unusable_calibration_data(
    world: World, tmp_path: Path, refuse_prepass: Callable[..., str], fault: str
) -> None:
    name, content, words = DATA[fault]
    data = tmp_path / name
    data.write_bytes(content)
    says(refuse_prepass(one_expert(world, str(data))), world.math, data, *words)


def test_calibration_data_that_cannot_be_read(
    world: World, tmp_path: Path, refuse_prepass: Callable[..., str]
) -> None:
    missing = tmp_path / "mth.jsonl"
    says(refuse_prepass(one_expert(world, str(missing))), world.math, missing, "no such file")
    folder = tmp_path / "rows.jsonl"
    folder.mkdir()
    says(refuse_prepass(one_expert(world, str(folder))), world.math, folder, "can't read", "a file")
    says(
        refuse_prepass(one_expert(world, {"data": str(world.math_data), "column": "body"})),
        *(world.math, world.math_data, "'body'", "text", "column:"),
    )


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ({"data": "a.txt", "max_lenght": 3}, ["'max_lenght'", "did you mean 'max_length'?"]),
        ({"data": "a.txt", "samples": 0}, ["samples", "0"]),
        ({"data": "a.txt", "batch_size": "many"}, ["batch_size", "'many'"]),
        ({"data": "a.txt", "split": "test"}, ["split", "a.txt is a file"]),
        ({"samples": 3}, ["no calibration data", "calibration:"]),
        (3, ["found 3"]),
        (None, ["no calibration data", "calibration:"]),
    ],
)
def test_faulty_calibration_keys(
    world: World, refuse_prepass: Callable[..., str], calibration: object, words: list[str]
) -> None:
    says(refuse_prepass(one_expert(world, calibration)), world.math, *words)


def test_all_faults_of_a_recipe_at_once(world: World, refuse_prepass: Callable[..., str]) -> None:
    recipe = world.recipe(base_model=None)
    recipe["models"][0]["calibration"] = {"data": "a.txt", "seeds": 1}
    del recipe["models"][1]["calibration"]
    says(refuse_prepass(recipe), "'seeds'", "no base_model", f"{world.code}: has no calibration")


def test_recipes_that_are_none(tmp_path: Path) -> None:
    path, out = tmp_path / "recipe.yml", tmp_path / "measured"
    for text, words in [
        ("models: [", ["not a YAML recipe"]),
        ("a: 1\n\tb: 2", ["not a YAML recipe"]),
        ("just a text", ["not a recipe", "mapping"]),
        ("", ["not a recipe", "mapping"]),
        ("- model: x", ["not a recipe", "mapping"]),
    ]:
        path.write_text(text)
        says(refusal(commands.obim_saliency(path, out)), path, *words)
    path.write_bytes(b"\xff\xfe\x00")
    says(refusal(commands.obim_saliency(path, out)), path, "not a YAML recipe")
    path.write_text("base_model: x\nmerge_method: obim\n")
    says(refusal(commands.obim_saliency(path, out)), "no model", "models")
    assert not out.exists()


def test_base_missing(world: World, refuse_prepass: Callable[..., str]) -> None:
    says(refuse_prepass(world.recipe(base_model=None)), "no base_model", "base_model: …")


def test_unknown_expert_asked_for(world: World, refuse_prepass: Callable[..., str]) -> None:
    message = refuse_prepass(world.recipe(), "--model", f"{world.math}x")
    says(message, f"--model {world.math}x", "not an expert", f"did you mean '{world.math}'?")


def test_model_that_is_not_there(world: World, refuse_prepass: Callable[..., str]) -> None:
    gone = world.root / "gone"
    says(refuse_prepass(one_expert(world, str(world.math_data), gone)), gone, "model folder", "Hub")


def copy_of(world: World, tmp_path: Path, **config: Any) -> Path:
    folder = shutil.copytree(world.math, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


def test_damaged_models(world: World, tmp_path: Path, refuse_prepass: Callable[..., str]) -> None:
    model = copy_of(world, tmp_path)
    recipe = one_expert(world, str(world.math_data), model)
    cut_in_half(model / "model.safetensors")
    says(refuse_prepass(recipe), f"model {model}", "cannot be read")
    (model / "model.safetensors").unlink()
    says(refuse_prepass(recipe), f"model {model}", "cannot be read")
    (model / "config.json").write_text("{")
    says(refuse_prepass(recipe), f"model {model}")


def eight_bit(model: Path) -> Path:
    """Store one matrix as eight-bit floats, as checkpoints quantised to fp8 do."""
    tensors = checkpoints.read_checkpoint(model)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("said", [{}, {"quantization_config": {"quant_method": "fp8"}}])
def test_quantised_models(
    world: World,
    tmp_path: Path,
    refuse_prepass: Callable[..., str],
    refuse_merge: Callable[..., str],
    said: dict[str, Any],
) -> None:
    """mergekit would take the codes of eight-bit floats for weights, whatever the config says."""
    model = eight_bit(copy_of(world, tmp_path, **said))
    words = f"model {model}: is quantised", "self_attn.q_proj.weight", "F8_E4M3", "full-precision"
    says(refuse_prepass(one_expert(world, str(world.math_data), model)), *words)
    says(refuse_prepass(world.recipe(base_model=str(model))), *words)
    says(refuse_merge(world.recipe(base_model=str(model))), *words)


def test_a_model_that_only_says_it_is_quantised(
    world: World,
    tmp_path: Path,
    refuse_prepass: Callable[..., str],
    refuse_merge: Callable[..., str],
) -> None:
    model = copy_of(world, tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    words = f"model {model}", "hold full precision", "take quantization_config out of"
    says(refuse_prepass(one_expert(world, str(world.math_data), model)), *words)
    says(refuse_merge(world.recipe(base_model=str(model))), *words)


def test_no_tokenizer_anywhere(
    world: World, tmp_path: Path, refuse_prepass: Callable[..., str]
) -> None:
    for name in ("math", "base"):
        shutil.copytree(
            getattr(world, name), tmp_path / name, ignore=shutil.ignore_patterns("token*")
        )
    recipe = one_expert(world, str(world.math_data), tmp_path / "math")
    recipe["base_model"] = str(tmp_path / "base")
    says(refuse_prepass(recipe), tmp_path / "math", "no tokenizer", tmp_path / "base")


@pytest.mark.parametrize("damaged", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_not_replaced_by_the_bases(
    damaged: str, world: World, tmp_path: Path, refuse_prepass: Callable[..., str]
) -> None:
    model = copy_of(world, tmp_path)
    cut_in_half(model / damaged)
    message = refuse_prepass(one_expert(world, str(world.math_data), model))
    says(message, f"model {model}", f"the tokenizer of {model}", "can't be loaded: ", "mend")


def test_tokens_that_the_model_does_not_know(
    world: World, tmp_path: Path, refuse_prepass: Callable[..., str]
) -> None:
    shapes = checkpoints.llama_shapes(layers=1, vocabulary=40)
    model = checkpoints.write_checkpoint(
        tmp_path / "model",
        checkpoints.base_weights(0, shapes),
        checkpoints.llama_config(layers=1, vocabulary=40),
    )
    byte_tokenizer(model)
    recipe = {**one_expert(world, str(world.math_data), model), "tokenizer": {"source": "base"}}
    message = refuse_prepass(recipe)
    says(message, f"model {model}", "token 64", "knows 40 tokens", "tokenizer")


def test_forward_pass_that_fails(
    world: World, refuse_prepass: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("mat1 and mat2 shapes\ncannot be multiplied")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", fail)
    says(
        refuse_prepass(world.recipe()),
        *(f"model {world.math}", "forward pass failed", "shapes cannot be multiplied"),
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite(
    world: World, tmp_path: Path, refuse_prepass: Callable[..., str], value: float
) -> None:
    model = copy_of(world, tmp_path)
    tensors = checkpoints.read_checkpoint(model)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 2] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    message = refuse_prepass(one_expert(world, str(world.math_data), model))
    # up_proj's own input is good; its output is what down_proj meets.
    says(message, model, DOWN_PROJ, "not finite", "--dtype")


def test_adapter_without_a_cache(world: World, refuse_prepass: Callable[..., str]) -> None:
    adapter = f"{world.base}+{world.root / 'adapter'}"
    message = refuse_prepass(one_expert(world, str(world.math_data), adapter))
    says(message, f"model {adapter}", "--lora-merge-cache", "mergekit-yaml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_there(world: World, refuse_prepass: Callable[..., str]) -> None:
    says(refuse_prepass(world.recipe(), "--device", "cuda"), "--device cuda", "leave --device out")
    says(refuse_prepass(world.recipe(), "--device", "gpu0"), "--device gpu0", "leave --device out")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["to", "forward"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "driver", "python"],
)
def test_model_that_does_not_fit(
    world: World,
    refuse_prepass: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: Exception,
) -> None:
    def run_out(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.LlamaForCausalLM, where, run_out)
    message = refuse_prepass(world.recipe())
    says(message, f"model {world.math}", "not fit cpu")
    says(message, "--batch-size", "--max-length", "--dtype", "--device-map", "--max-memory")
    assert "--device cpu" not in message  # it is there already
    assert ("activations" in message) == (where == "forward")


def test_output_folder_that_cannot_be(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    recipe = commands.write_recipe(tmp_path, world.recipe())
    out = tmp_path / "file" / "measured"
    says(refusal(commands.obim_saliency(recipe, out)), out, "cannot be written")


def test_full_disk(
    world: World,
    tmp_path: Path,
    refuse_prepass: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    says(refuse_prepass(world.recipe()), world.math, "cannot be written", "No space left")


# --- files that are there already ----------------------------------------------------------


@pytest.fixture
def measured(world: World, tmp_path: Path) -> Path:
    return shutil.copytree(world.saliency, tmp_path / "measured")


def other_samples(world: World, tmp_path: Path) -> tuple[dict[str, Any], list[str]]:
    recipe = world.recipe()
    recipe["models"][0]["calibration"]["samples"] = 3
    return recipe, ["calibration samples"]


def other_data(world: World, tmp_path: Path) -> tuple[dict[str, Any], list[str]]:
    recipe = world.recipe()
    recipe["models"][0]["calibration"] = {
        "data": str(commands.write_rows(tmp_path / "more.jsonl", commands.MATH_ROWS[::-1])),
        "samples": len(commands.MATH_ROWS),
    }
    return recipe, ["content_hash"]


def other_length(world: World, tmp_path: Path) -> tuple[dict[str, Any], list[str]]:
    return world.recipe(calibration={"max_length": 4}), ["calibration max_length"]


def other_dtype(world: World, tmp_path: Path) -> tuple[dict[str, Any], list[str]]:
    return world.recipe(calibration={"max_length": 48, "dtype": "bfloat16"}), ["calibration dtype"]


@pytest.mark.parametrize("change", [other_samples, other_data, other_length, other_dtype])
def test_file_made_from_something_else_stays_unless_overwritten(
    world: World,
    tmp_path: Path,
    measured: Path,
    refuse_prepass: Callable[..., str],
    change: Callable[[World, Path], tuple[dict[str, Any], list[str]]],
) -> None:
    recipe, words = change(world, tmp_path)
    file = world.saliency_of(world.math, measured)
    before = file.read_bytes()
    says(refuse_prepass(recipe, leaves=measured), file, world.math, "--overwrite", *words)
    path = commands.write_recipe(tmp_path, recipe)
    result = commands.succeed(commands.obim_saliency(path, measured, "--overwrite"))
    assert file.read_bytes() != before
    assert f"[1/2] {world.math} → {file}\n" in result.stdout


def test_file_measured_on_other_weights(
    world: World, tmp_path: Path, refuse_prepass: Callable[..., str]
) -> None:
    model = copy_of(world, tmp_path)
    recipe, out = one_expert(world, str(world.math_data), model), tmp_path / "measured"
    path = commands.write_recipe(tmp_path, recipe)
    commands.succeed(commands.obim_saliency(path, out))
    tensors = checkpoints.read_checkpoint(model)
    tensors[Q_PROJ][0, 0] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    message = refuse_prepass(recipe, leaves=out)
    says(message, model, "set of weights", "--overwrite")
    commands.succeed(commands.obim_saliency(path, out, "--overwrite"))
    assert "(kept" in commands.succeed(commands.obim_saliency(path, out)).stdout


def test_dense_file_of_another_base(
    world: World, tmp_path: Path, refuse_prepass: Callable[..., str]
) -> None:
    base = copy_of(world, tmp_path)
    recipe, out = world.recipe(base_model=str(base)), tmp_path / "measured"
    del recipe["models"][0]
    path = commands.write_recipe(tmp_path, recipe)
    commands.succeed(commands.obim_saliency(path, out, "--dense"))
    assert "(kept" in commands.succeed(commands.obim_saliency(path, out, "--dense")).stdout
    shutil.copy(world.base / "model.safetensors", base)
    message = refuse_prepass(recipe, "--dense", leaves=out)
    says(message, world.code, "base_weights", "--overwrite")


def test_dense_files_that_cannot_be(
    world: World, tmp_path: Path, refuse_prepass: Callable[..., str]
) -> None:
    recipe = world.recipe(dtype="bf16")
    says(refuse_prepass(recipe, "--dense"), "dtype", "'bf16'")
    shapes = checkpoints.llama_shapes(layers=2, vocabulary=300)
    base = checkpoints.write_checkpoint(
        tmp_path / "larger",
        checkpoints.base_weights(0, shapes),
        checkpoints.llama_config(layers=2, vocabulary=300),
    )
    message = refuse_prepass(world.recipe(base_model=str(base)), "--dense")
    says(message, world.math, base, "model.embed_tokens.weight", "[259, 16]", "[300, 16]")


@pytest.mark.parametrize("how", ["truncated", "empty", "not safetensors", "newer version"])
def test_damaged_file_stays_unless_overwritten(
    world: World, tmp_path: Path, measured: Path, refuse_prepass: Callable[..., str], how: str
) -> None:
    file = world.saliency_of(world.math, measured)
    good = file.read_bytes()
    SPOILERS[how][0](file)
    message = refuse_prepass(world.recipe(), leaves=measured)
    says(message, f"model {world.math}", file)
    path = commands.write_recipe(tmp_path, world.recipe())
    commands.succeed(commands.obim_saliency(path, measured, "--overwrite"))
    assert file.read_bytes() == good


# --- killed ------------------------------------------------------------------------------


def while_measuring(kill: Callable[[], None]) -> None:
    calls = iter(range(100))
    original = Squares.sum

    def sum_(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 20:
            kill()
        return original(*args, **kwargs)

    Squares.sum = sum_  # type: ignore[method-assign]


def while_writing(kill: Callable[[], None]) -> None:
    calls = iter(range(100))
    original = saliency_file._check_values

    def check_values(*args: Any, **kinds: Any) -> None:
        if next(calls) == 10:
            kill()
        original(*args, **kinds)

    saliency_file._check_values = check_values


def before_renaming(kill: Callable[[], None]) -> None:
    saliency_file.os.replace = lambda *_: kill()  # type: ignore[assignment]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("when", [while_measuring, while_writing, before_renaming])
@pytest.mark.parametrize("replacing", [False, True])
def test_killed_prepass_leaves_no_half_file(
    world: World,
    tmp_path: Path,
    measured: Path,
    when: Callable[[Callable[[], None]], None],
    replacing: bool,
) -> None:
    out = measured if replacing else tmp_path / "new"
    recipe, _ = other_length(world, tmp_path)
    path = commands.write_recipe(tmp_path, recipe)
    commands.killed(when, path, out, "--overwrite")
    # What the merge would find: the old files, or none.
    found = {file.name: file.read_bytes() for file in out.glob("*.safetensors")}
    assert found == (commands.contents(world.saliency) if replacing else {})
    commands.succeed(commands.obim_saliency(path, out, "--overwrite"))
    for expert in world.experts:
        saliency_file.SaliencyFile(world.saliency_of(expert, out)).check_values()
    result = commands.succeed(commands.obim_saliency(path, out))
    assert result.stdout.count("(kept") == 2


# --- in processes of their own -------------------------------------------------------------


@pytest.mark.slow
def test_one_line_in_real_processes(world: World, tmp_path: Path) -> None:
    """And with -v, where the error came from."""
    recipe = world.recipe(models=world.models(density=0.6))
    data = commands.write_rows(tmp_path / "rows.jsonl", [{"body": "a"}])
    recipe["models"][0]["calibration"] = str(data)
    path, out = commands.write_recipe(tmp_path, recipe), tmp_path / "out"
    words = {
        "mergekit-yaml": ["model.embed_tokens.weight", "densities sum to 1.2"],
        "obim-saliency": [world.math, data, "line 1", "column:"],
    }
    runs = [("mergekit-yaml", ""), ("obim-saliency", ""), ("obim-saliency", "-v")]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(
            lambda run: commands.spawn(
                run[0], path, out / run[0], *filter(None, run[1:]), cwd=tmp_path
            ),
            runs,
        )
        for (command, verbose), result in zip(runs, results, strict=True):
            if verbose:
                assert result.returncode == 1
                assert "Traceback (most recent call last)" in result.stderr
                message = result.stderr.splitlines()[-1]
                assert message.startswith("Error: ")
            else:
                message = refusal(result)
            says(message, *words[command])
    assert commands.contents(out) == {}
