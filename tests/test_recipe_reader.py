"""The one reader of recipes: what it knows, what it finds, and that everybody says its words."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.tokenizer.config import TokenEmbeddingConfig, TokenizerConfig
from pydantic import BaseModel

import checkpoints
import commands
from commands import World, refusal, says, succeed
from mergekit_obim.errors import RecipeError, SaliencyNotFoundError
from mergekit_obim.methods.planning import registry
from mergekit_obim.recipe import Document, Fault, recipe_faults
from mergekit_obim.recipe.document import read_document, read_documents
from mergekit_obim.recipe.experts import find_experts
from mergekit_obim.recipe.faults import Place, fold, raise_errors
from mergekit_obim.recipe.keys import SECTIONS, Part, walk

MERGEKITS: dict[str, type[BaseModel]] = {
    "recipe": MergeConfiguration,
    "module": OutputModuleDefinition,
    "slice": OutputSliceDefinition,
    "model": InputModelDefinition,
    "source": InputSliceDefinition,
    "tokenizer": TokenizerConfig,
    "token": TokenEmbeddingConfig,
    "condition": ConditionalParameter,
}


def found_in(text: str, folder: Path) -> list[Fault]:
    """What is wrong with a recipe's text, its calibration included."""
    path = folder / "recipe.yml"
    path.write_text(text)
    document = read_document(path)
    return [*recipe_faults(document, registry()), *find_experts(document).faults]


@pytest.mark.parametrize("kind", SECTIONS)
def test_the_keys_are_mergekits(kind: str) -> None:
    assert set(SECTIONS[kind].keys) == set(MERGEKITS[kind].model_fields)
    assert {key for key, _, _ in SECTIONS[kind].below} <= set(SECTIONS[kind].keys)


def test_parts_are_walked_in_order_with_the_base_that_holds_there() -> None:
    source = {"model": "a", "layer_range": [0, 1]}
    recipe = {
        "base_model": "base",
        "modules": {
            "text": {"slices": [{"sources": [source], "base_model": "own"}]},
            "vision": {"models": [{"model": {"model": "b", "lora": "l"}}, {"model": "base"}]},
        },
        "tokenizer": {"tokens": {"<x>": {"source": "a"}}},
    }
    parts = [part for part in walk(Document(recipe)) if isinstance(part, Part)]
    assert [(str(Place(part.path)), part.kind, part.base, part.model) for part in parts] == [
        ("", "recipe", "base", None),
        ("modules.text", "module", "base", None),
        ("modules.text.slices[0]", "slice", "own", None),
        ("modules.text.slices[0].sources[0]", "source", "own", "a"),
        ("modules.vision", "module", "base", None),
        ("modules.vision.models[0]", "model", "base", "b+l"),
        ("modules.vision.models[1]", "model", "base", "base"),
        ("tokenizer", "tokenizer", "base", None),
        ("tokenizer.tokens.<x>", "token", "base", None),
    ]
    assert [part.is_base for part in parts].count(True) == 1


FAULTY = """\
merge_method: obim
base_model: base
dype: float16
select_topk: 0.5
seed: 3
models:
  - model: a
    density: 0.5
    parameters:
      densty: 0.3
      epsilon: 0.1
      order: recipe
      weight:
        - {fliter: mlp, value: 1}
        - {value: heavy}
    calibration:
      data:
        - a.txt
        - {data: b.txt, sample: 3}
  - model: base
    parameters: {density: 7, wieght: 1}
parameters:
  lamda: 1
  normalize: true
  unscored: [magnitude,
    skip]
"""


def test_every_fault_has_its_line_and_its_path(tmp_path: Path) -> None:
    faults = found_in(FAULTY, tmp_path)
    assert [(f.level, f.place.line, str(f.place), f.kind, f.nearest) for f in faults] == [
        ("error", 3, "dype", "key", "dtype"),
        ("error", 5, "seed", "misplaced", "seed"),
        ("error", 23, "parameters.lamda", "parameter", "lambda"),
        ("error", 26, "parameters.unscored[1]", "value", None),
        ("error", 8, "models[0].density", "misplaced", "density"),
        ("error", 10, "models[0].parameters.densty", "parameter", "density"),
        ("error", 12, "models[0].parameters.order", "scope", None),
        ("error", 14, "models[0].parameters.weight[0].fliter", "key", "filter"),
        ("error", 15, "models[0].parameters.weight[1].value", "value", None),
        # The base's own parameters count for nothing: only their names are looked at.
        ("error", 21, "models[1].parameters.wieght", "parameter", "weight"),
        ("warning", 4, "select_topk", "foreign", None),
        ("error", 19, "models[0].calibration.data[1].sample", "calibration", "samples"),
    ]
    assert str(faults[0]) == (
        "line 3: the recipe: mergekit ignores the key 'dype'; did you mean dtype?"
    )
    says(faults[1].message, "'seed'", "stand under `parameters`")
    foreign = faults[-2]
    assert foreign.message.endswith(": select_topk (beside `parameters`), normalize, epsilon")
    assert [place.line for place in foreign.others] == [24, 11]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [a]", ["models[0]: should be a mapping, found a text"]),
        ("models: {a: b}", ["models: should be a list of mappings, found a mapping"]),
        ("models: [{model: a, parameters: [1]}]", ["models[0].parameters: should be a mapping"]),
        ("models: [{density: 1}]", ["models[0]: has no 'model'"]),
        ("models: [{model: a+b+c}]", ["models[0].model: 'a+b+c' is not of the form"]),
        ("models: [{model: a}, {model: a}]", ["model a: is listed twice"]),
        ("modules: []", ["modules: should be a mapping of mappings"]),
        ("tokenizer: union", ["tokenizer: should be a mapping, found a text"]),
        ("slices: [{sources: [{model: b}]}]", ["no model besides the base"]),
    ],
)
def test_what_cannot_be_read(text: str, words: list[str], tmp_path: Path) -> None:
    faults = found_in(f"merge_method: obim\nbase_model: b\n{text}\n", tmp_path)
    assert len(faults) >= 1
    says(faults[0].message, *words)
    assert faults[0].place.line in (3, None)


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    text = "base_model: b\nmodels: [{model: a}]\nmerge_method: ties\nmerge_method: obim\n"
    [fault] = found_in(text, tmp_path)
    assert (fault.level, fault.place.line) == ("warning", 4)
    says(fault.message, "merge_method", "twice")


def test_anchors(tmp_path: Path) -> None:
    text = """\
base_model: b
models:
  - &first
    model: a
    parameters: {densty: 1}
  - <<: *first
    model: c
  - &itself
    model: d
    note: *itself
"""
    faults = found_in("merge_method: obim\n" + text, tmp_path)
    assert [fault.place.line for fault in faults] == [6, 7, 11]


def test_several_recipes_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "multi.yml"
    path.write_text("name: one\n---\nname: two\nbase_model: x\n")
    one, two = read_documents(path)
    assert (one.content["name"], two.place("base_model").line) == ("one", 4)
    with pytest.raises(RecipeError, match=r"multi.yml: is a mergekit-multi recipe of 2 documents"):
        read_document(path)


def test_only_names_that_no_method_knows_are_errors() -> None:
    shared = {"int8_mask": True, "t": 1, "r": 1, "filter_wise": True, "densities": 1, "smooth": 1}
    model = {"model": "a", "parameters": {"gamma": 0.1, "tensor_name": "x"}}
    recipe = {
        "merge_method": "regmean_diag",
        "base_model": "b",
        "models": [model],
        "parameters": {**shared, "density": 0.5},
    }
    faults = list(recipe_faults(Document(recipe), registry()))
    assert [(f.level, f.place.path[-1]) for f in faults] == [
        ("error", "densities"),
        ("error", "smooth"),
        ("error", "tensor_name"),
        ("warning", "int8_mask"),
    ]
    assert faults[-1].message == (
        "regmean_diag ignores parameters of other merge methods: "
        "int8_mask, t, r, filter_wise, density, gamma"
    )


@pytest.mark.parametrize(
    ("weights", "shared", "shares"),
    [
        ([0.5, 0.3], {}, True),
        ([[0.5], [0.7]], {}, True),
        ([[{"filter": "mlp", "value": 0.35}, {"value": 0.2}], 0.4], {}, True),
        ([1.0, 0.01], {}, True),
        ([None, None], {"weight": 0.25}, True),
        ([1.0, 0.8], {}, False),
        ([1.0, -0.5], {}, False),  # a skill taken away
        ([[0, 0.3, 1], 1.0], {}, False),  # left out of some layers
        ([0.5, 0.3], {"assignment": "nearest"}, False),  # says how much an error counts
        ([None, None], {}, False),
    ],
)
def test_weights_that_were_shares_of_a_sum(
    weights: list[Any], shared: dict[str, Any], shares: bool
) -> None:
    models = [
        {"model": f"e{k}", "parameters": {} if weight is None else {"weight": weight}}
        for k, weight in enumerate(weights)
    ]
    models.append({"model": "base", "parameters": {"weight": 0.2}})
    recipe = {"base_model": "base", "models": models, "parameters": shared}
    for method in ("obim", "ties_obm"):
        found = recipe_faults(Document({"merge_method": method, **recipe}), registry())
        kinds = [(fault.kind, fault.level) for fault in found if fault.kind != "foreign"]
        assert kinds == ([("shares", "warning")] if shares and method == "obim" else [])


# --- faults as values ---------------------------------------------------------------------


def test_faults_of_many_tensors_are_told_once() -> None:
    same = [Fault("tensor", f"tensor {n}: is bad", tensor=n) for n in ("w0", "w1", "w2")]
    sums = [
        Fault("densities", f"tensor {name}: {amount}", tensor=name, amount=amount)
        for name, amount in (("w0", 1.2), ("w1", 1.5))
    ]
    assert [fault.message for fault in fold([*same, *sums, Fault("key", "one")])] == [
        "tensor w0: is bad (and 2 more tensors)",
        "tensor w1: 1.5 (and 1 more tensors)",
        "one",
    ]


def test_several_errors_are_raised_as_one() -> None:
    missing = Fault("saliency", "none", error=SaliencyNotFoundError)
    raise_errors([Fault("key", "only a warning", level="warning")])
    with pytest.raises(SaliencyNotFoundError, match=r"^none$"):
        raise_errors([missing, missing])
    two = [missing, Fault("saliency", "nor here", Place((), 3), error=SaliencyNotFoundError)]
    with pytest.raises(SaliencyNotFoundError) as caught:
        raise_errors(two)
    assert str(caught.value) == "the recipe has 2 errors:\n  none\n  line 3: nor here"
    with pytest.raises(RecipeError, match="2 errors"):
        raise_errors([missing, Fault("key", "else")])


# --- everybody says the same ---------------------------------------------------------------


def test_the_three_who_read_a_recipe_say_the_same_words(world: World, tmp_path: Path) -> None:
    models = world.models(densty=0.3, order="recipe", density=1.5)
    shared = {"saliency": str(world.saliency), "lamda": 1, "unscored": "skip"}
    path = commands.write_recipe(tmp_path, world.recipe(models=models, parameters=shared))
    prepass = refusal(commands.obim_saliency(path, tmp_path / "out"))
    merge = refusal(commands.mergekit_yaml(path, tmp_path / "out"))
    check = commands.obim_saliency("--check", path).stdout
    lines = [line.strip() for line in merge.splitlines()[1:]]
    assert len(lines) == 8
    for line in lines:
        assert line in prepass
        assert line in check
    assert "line 20: parameters: obim has no parameter 'lamda'" in prepass


def test_the_merge_leaves_the_recipe_as_it_was_given(world: World, tmp_path: Path) -> None:
    models = world.models(densty=0.3, weight="heavy")
    config = MergeConfiguration.model_validate(world.recipe(models=models))
    settings = [model.parameters for model in config.models or ()]
    before = copy.deepcopy(settings)
    with pytest.raises(RecipeError, match="4 errors"):
        run_merge(config, str(tmp_path / "out"), MergeOptions(quiet=True))
    assert settings == before


def test_what_is_wrong_is_put_right_to_find_the_rest(world: World, tmp_path: Path) -> None:
    """A misspelt density is taken for what it should be; a wrong one for nothing."""
    models = world.models(densty=0.6)
    path = commands.write_recipe(tmp_path, world.recipe(models=models))
    message = refusal(commands.mergekit_yaml(path, tmp_path / "out"))
    says(message, "the recipe has 3 errors", "'densty'", "densities sum to 1.2, over 1")
    models = [world.models(density=0.9)[0], world.models(density="most")[1]]
    path = commands.write_recipe(tmp_path, world.recipe(models=models))
    says(refusal(commands.mergekit_yaml(path, tmp_path / "out")), "Error: model", "'most'")


def test_the_merge_warns_of_what_it_ignores_once(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = {"saliency": str(world.saliency), "normalize": True}
    models = world.models(density=0.3, epsilon=0.1)
    recipe = world.recipe(models=models, parameters=shared, int8_mask=True)
    path = commands.write_recipe(tmp_path, recipe)
    with caplog.at_level(logging.WARNING, logger="mergekit_obim"):
        succeed(commands.mergekit_yaml(path, tmp_path / "out"))
    ignored = "obim ignores parameters of other merge methods: "
    assert [r.getMessage() for r in caplog.records if r.name == "mergekit_obim"] == [
        f"{ignored}normalize, epsilon"
    ]
    # What stands beside `parameters` mergekit has dropped by then; the others see it.
    stderr = succeed(commands.obim_saliency(path, tmp_path / "measured")).stderr
    assert f"{ignored}int8_mask (beside `parameters`), normalize, epsilon" in stderr
    checked = commands.obim_saliency("--check", "--json", path, tmp_path / "measured")
    assert f"{ignored}int8_mask (beside" in json.loads(checked.stdout)["warnings"][0]


def test_a_base_with_parameters_in_a_slice_is_no_expert(world: World, tmp_path: Path) -> None:
    sources: list[dict[str, Any]] = [
        {"model": str(model), "layer_range": [0, commands.LAYERS]}
        for model in (world.math, world.base, world.code)
    ]
    recipe = world.recipe(models=None, slices=[{"sources": sources}])
    for name in ("without", "with"):
        path = commands.write_recipe(tmp_path, recipe)
        succeed(commands.mergekit_yaml(path, tmp_path / name))
        sources[1]["parameters"] = {"density": 0.9, "weight": -1}
    merged = [checkpoints.read_checkpoint(tmp_path / name) for name in ("without", "with")]
    commands.same_tensors(*merged)


def test_names_with_spaces(world: World, tmp_path: Path) -> None:
    models = world.models(density=0.3)
    shutil.copytree(world.math, tmp_path / "our math")
    models[0] |= {"model": str(tmp_path / "our math"), "calibration": str(world.math_data)}
    models[0]["parameters"]["criterion"] = "magnitude"
    path = commands.write_recipe(tmp_path, world.recipe(models=models))
    succeed(commands.mergekit_yaml(path, tmp_path / "out"))
    models[0]["parameters"]["densty"] = 1
    path = commands.write_recipe(tmp_path, world.recipe(models=models))
    says(refusal(commands.mergekit_yaml(path, tmp_path / "out2")), "our math", "'densty'")
