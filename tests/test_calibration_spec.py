"""The recipe's calibration keys: what a user may write, and what is said when it is wrong."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import yaml
from mergekit.common import ModelReference

from mergekit_obim.errors import RecipeError
from mergekit_obim.recipe import Document, recipe_faults
from mergekit_obim.recipe.calibration import Calibration, DataSource, is_local_file
from mergekit_obim.recipe.experts import Expert, find_experts
from mergekit_obim.recipe.faults import raise_errors
from mergekit_obim.recipe.keys import reference_string

CONTRACT_RECIPE = """
merge_method: obim
base_model: ./models/base
models:
  - model: ./models/math
    parameters: {density: 0.45}
    calibration: {data: data/math.jsonl, samples: 100}
  - model: ./models/code
    parameters: {density: 0.1}
    calibration: data/code.jsonl
parameters:
  saliency: ./saliency
  order: rotation
calibration: {max_length: 256}
dtype: bfloat16
"""


def recipe(*calibrations: Any, top: Any = None, **keys: Any) -> dict[str, Any]:
    models = [{"model": f"e{n}"} for n in range(len(calibrations))]
    for model, calibration in zip(models, calibrations, strict=True):
        if calibration is not ...:
            model["calibration"] = calibration
    config = {"merge_method": "obim", "base_model": "base", "models": models, **keys}
    return config if top is None else {**config, "calibration": top}


def read_experts(config: Any, overrides: Any = None, only: Any = ()) -> list[Expert]:
    """What the pre-pass makes of a recipe, before it imports mergekit."""
    document = Document(config)
    found = find_experts(document, overrides, only)
    raise_errors([*recipe_faults(document), *found.faults, *found.uncalibrated.values()])
    return found.measured


def only_calibration(*args: Any, overrides: Any = None, **kwargs: Any) -> Calibration:
    (expert,) = read_experts(recipe(*args, **kwargs), overrides)
    return expert.calibration


def error_of(config: Any, overrides: Any = None, only: Any = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        read_experts(config, overrides, only)
    return caught.value.message


def test_contract_recipe() -> None:
    math, code = read_experts(yaml.safe_load(CONTRACT_RECIPE))
    assert (math.model, code.model) == ("./models/math", "./models/code")
    assert math.calibration == Calibration(
        data=(DataSource(data="data/math.jsonl", samples=100),), max_length=256
    )
    assert code.calibration == Calibration(
        data=(DataSource(data="data/code.jsonl"),), max_length=256
    )


def test_defaults() -> None:
    calibration = only_calibration("a.jsonl")
    assert calibration.model_dump() == {
        "sources": (
            {
                "data": "a.jsonl",
                "config": None,
                "split": None,
                "revision": None,
                "column": None,
                "images": None,
                "include_completion": False,
                "samples": 100,
            },
        ),
        "max_length": 512,
        "batch_size": "auto",
        "seed": 0,
        "packing": False,
        "date": datetime.date(2025, 1, 1),
        "dtype": None,
        "sketch": 0,
    }


# --- one source and mixtures --------------------------------------------------------------


@pytest.mark.parametrize(
    "written",
    [
        "org/set",
        ["org/set"],
        {"data": "org/set"},
        {"data": ["org/set"]},
        {"data": {"data": "org/set"}},
        [{"data": "org/set"}],
        {"data": "org/set", "split": None},
    ],
)
def test_every_way_to_write_one_source(written: Any) -> None:
    assert only_calibration(written).sources == (DataSource(data="org/set"),)


def test_mixture_with_samples_of_its_own() -> None:
    calibration = only_calibration(
        {
            "data": [
                {"data": "a.jsonl", "samples": 70},
                "b.txt",
                {"data": "org/set", "config": "main", "split": "test", "column": "q"},
            ],
            "samples": 30,
            "column": "body",
            "include_completion": True,
            "packing": True,
        }
    )
    assert calibration.sources == (
        DataSource(data="a.jsonl", samples=70, column="body", include_completion=True),
        DataSource(data="b.txt", samples=30, column="body", include_completion=True),
        DataSource(
            data="org/set",
            config="main",
            split="test",
            samples=30,
            column="q",
            include_completion=True,
        ),
    )
    assert calibration.packing


def test_split_beside_a_mixture_is_for_its_data_sets() -> None:
    sources = only_calibration({"data": ["a.jsonl", "org/set"], "split": "test"}).sources
    assert [source.split for source in sources] == [None, "test"]


def test_split_of_a_file_is_an_error() -> None:
    message = error_of(recipe({"data": "a.jsonl", "split": "test"}))
    assert message == "model e0: calibration: split is for data sets, but a.jsonl is a file"


@pytest.mark.parametrize("data", ["a.jsonl", "d/A.JSON", "./x", "/x/y", "~/x", "../x", "x.parquet"])
def test_what_is_a_file(data: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # beside the clone there may be a folder called x
    assert is_local_file(data)


def test_what_is_not_a_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes").touch()
    assert not is_local_file("org/set")
    assert not is_local_file("./folder")
    assert is_local_file("notes")


# --- defaults for every model -------------------------------------------------------------


def test_top_level_data_is_for_models_without() -> None:
    top = {"data": "org/set", "config": "main", "split": "test", "samples": 5, "max_length": 64}
    first, second, third = read_experts(recipe(..., {"samples": 9}, "own.jsonl", top=top))
    source = DataSource(data="org/set", config="main", split="test", samples=5)
    assert first.calibration.sources == (source,)
    assert second.calibration.sources == (source.model_copy(update={"samples": 9}),)
    assert third.calibration.sources == (DataSource(data="own.jsonl", samples=5),)
    assert {e.calibration.max_length for e in (first, second, third)} == {64}


def test_own_data_set_does_not_take_the_default_ones_config() -> None:
    top = {"data": "org/set", "config": "main", "revision": "v1", "split": "test"}
    calibration = only_calibration("org/other", top=top)
    assert calibration.sources == (DataSource(data="org/other", split="test"),)
    without_data = only_calibration("org/other", top={"config": "main"})
    assert without_data.sources[0].config == "main"


def test_model_beats_top_level() -> None:
    calibration = only_calibration(
        {"data": "a.txt", "max_length": 32, "seed": 4}, top={"max_length": 64, "batch_size": 2}
    )
    assert (calibration.max_length, calibration.seed, calibration.batch_size) == (32, 4, 2)


def test_short_top_level() -> None:
    assert only_calibration(..., top="a.txt").sources == (DataSource(data="a.txt"),)


# --- options ------------------------------------------------------------------------------


def test_options_beat_the_recipe() -> None:
    calibration = only_calibration(
        {
            "data": [{"data": "a.txt", "samples": 70}, "b.txt"],
            "max_length": 32,
            "batch_size": 4,
            "seed": 1,
            "dtype": "float16",
        },
        top={"samples": 3},
        overrides={
            "samples": 10,
            "max_length": 16,
            "batch_size": "auto",
            "seed": 2,
            "dtype": "bfloat16",
        },
    )
    assert [source.samples for source in calibration.sources] == [10, 10]
    assert calibration.max_length == 16
    assert calibration.batch_size == "auto"
    assert calibration.seed == 2
    assert calibration.dtype == "bfloat16"


def test_options_not_given_change_nothing() -> None:
    calibration = only_calibration(
        {"data": "a.txt", "samples": 7}, overrides={"samples": None, "seed": None}
    )
    assert calibration.sources[0].samples == 7


def test_option_out_of_range() -> None:
    message = error_of(recipe("a.txt"), {"max_length": 0, "batch_size": "all"})
    assert "--max-length should be greater than or equal to 1, found 0" in message
    assert "--batch-size should be a whole number of at least 1, or 'auto'" in message


# --- who the experts are ------------------------------------------------------------------


def test_slices_and_base_in_them() -> None:
    config = yaml.safe_load("""
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: b, layer_range: [0, 2], calibration: b.txt}
      - {model: a, layer_range: [0, 2], calibration: {data: a.txt}}
  - sources:
      - {model: base, layer_range: [2, 4]}
      - {model: a, layer_range: [2, 4], calibration: a.txt}
      - {model: b, layer_range: [2, 4]}
""")
    experts = read_experts(config)
    assert [(e.model, e.calibration.sources[0].data) for e in experts] == [
        ("b", "b.txt"),
        ("a", "a.txt"),
    ]


def test_slice_with_its_own_base() -> None:
    source = {"layer_range": [0, 2], "calibration": "a.txt"}
    config = {
        "slices": [{"base_model": "base", "sources": [{"model": "base"}, {"model": "a", **source}]}]
    }
    assert [expert.model for expert in read_experts(config)] == ["a"]


def test_modules() -> None:
    config = yaml.safe_load("""
base_model: base
calibration: {data: all.txt}
modules:
  text_decoder:
    slices:
      - sources:
          - {model: base, layer_range: [0, 2]}
          - {model: a, layer_range: [0, 2]}
  vision_tower:
    models:
      - model: b
      - model: a
""")
    assert [expert.model for expert in read_experts(config)] == ["a", "b"]


def test_two_calibrations_of_one_expert() -> None:
    config = recipe("a.txt", "b.txt")
    config["models"][1]["model"] = "e0"
    assert error_of(config).splitlines()[1:] == [
        "  model e0: is listed twice: list each expert once",
        "  model e0: has two different calibrations; keep one of them",
    ]


def test_base_missing() -> None:
    config = recipe("a.txt")
    del config["base_model"]
    assert "no base_model" in error_of(config)


def test_base_among_the_experts() -> None:
    config = recipe("a.txt", ...)
    config["models"][1]["model"] = "base"
    assert [expert.model for expert in read_experts(config)] == ["e0"]


def test_no_experts() -> None:
    assert "no model besides the base" in error_of({"base_model": "base"})


@pytest.mark.parametrize(
    "models", ["e0", ["e0"], {"model": "e0"}, [{"calibration": "a.txt"}], [{"model": 3}]]
)
def test_models_of_the_wrong_shape(models: Any) -> None:
    assert "models" in error_of({"base_model": "base", "models": models})


@pytest.mark.parametrize(
    "reference",
    [
        "org/base@rev+org/lora@main",
        "./models/math",
        {"model": "org/base"},
        {"model": {"path": "org/base"}},
        {"model": {"path": "org/base", "revision": "v1"}},
        {"model": {"path": "org/base", "revision": "v1"}, "lora": "org/lora@v2"},
        {"model": "org/base@v1", "lora": {"path": "org/lora", "revision": "v2"}},
        {"model": "org/base", "lora": None, "override_architecture": "LlamaForCausalLM"},
    ],
)
def test_references_are_written_as_mergekit_writes_them(reference: Any) -> None:
    assert reference_string(reference) == str(ModelReference.model_validate(reference))
    config = recipe("a.txt")
    config["models"][0]["model"] = reference
    (expert,) = read_experts(config)
    assert expert.model == reference_string(reference)
    assert expert.reference == reference


@pytest.mark.parametrize("reference", ["a+b+c", "a@b@c", {"path": "a"}, {"model": {"p": "a"}}, 3])
def test_references_that_mergekit_refuses(reference: Any) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - mergekit's own kinds vary
        ModelReference.model_validate(reference)
    with pytest.raises(ValueError, match=r"(?i)model"):
        reference_string(reference)


def test_base_in_mapping_form() -> None:
    config = recipe("a.txt", base_model={"model": {"path": "e0"}})
    assert "no model besides the base" in error_of(config)


# --- only some ----------------------------------------------------------------------------


def test_only_some_experts() -> None:
    config = recipe("a.txt", ..., "c.txt")
    assert [e.model for e in read_experts(config, only=["e2", "e0"])] == ["e0", "e2"]
    assert "model e1: has no calibration data" in error_of(config)
    assert "--model e4: not an expert" in error_of(config, only=["e4"])


# --- what is wrong, all at once -----------------------------------------------------------


def test_no_data_names_the_model_and_the_way_out() -> None:
    assert error_of(recipe("a.txt", {"samples": 3})) == (
        "model e1: has no calibration data; beside '- model: e1' write 'calibration: FILE.jsonl', "
        "or for all models a top-level 'calibration: {data: FILE.jsonl}'"
    )


def test_misspelt_calibration() -> None:
    config = recipe(...)
    config["models"][0]["calibraton"] = "a.txt"
    assert "model e0: mergekit ignores the key 'calibraton'; did you mean calibration?" in (
        error_of(config)
    )


def test_all_faults_in_one_line() -> None:
    message = error_of(
        recipe(
            {"data": "a.txt", "sample": 3, "max_length": "long", "packing": 1},
            {"data": [{"data": "a.txt", "samples": 0}, {"split": "x"}, {"data": "b", "seed": 1}]},
            ...,
            top={"batchsize": 2, "dtype": "int8"},
        )
    )
    assert message.splitlines() == [
        "the recipe has 9 errors:",
        "  calibration: dtype should be 'float32', 'bfloat16', 'float16' or 'float64', found "
        "'int8'",
        "  calibration: unknown key 'batchsize' (did you mean 'batch_size'?)",
        "  model e0: calibration: max_length should be a valid integer, found 'long'",
        "  model e0: calibration: packing should be a valid boolean, found 1",
        "  model e0: calibration: unknown key 'sample' (did you mean 'samples'?)",
        "  model e1: calibration: data entry 1: samples should be greater than or equal to 1, "
        "found 0",
        "  model e1: calibration: data entry 2: data is missing",
        "  model e1: calibration: data entry 3: unknown key 'seed' (known: data, config, split, "
        "revision, column, images, include_completion, samples)",
        "  model e2: has no calibration data; beside '- model: e2' write 'calibration: "
        "FILE.jsonl', or for all models a top-level 'calibration: {data: FILE.jsonl}'",
    ]


@pytest.mark.parametrize(
    "calibration",
    [3, True, [], {"data": []}, {"data": 3}, {"data": ""}, [3], [[]], [{}], [None], {"data": {}}],
)
def test_data_of_the_wrong_shape(calibration: Any) -> None:
    assert error_of(recipe(calibration)).startswith("model e0: ")


@pytest.mark.parametrize("key", ["samples", "max_length", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "10"])
def test_counts_are_whole_and_positive(key: str, value: Any) -> None:
    assert f"{key} should be" in error_of(recipe({"data": "a.txt", key: value}))
