"""``--fix``: what is put right in a recipe's text, and that all the rest stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import commands
from commands import World, refusal, says, succeed
from mergekit_obim.methods.planning import registry
from mergekit_obim.recipe import recipe_faults
from mergekit_obim.recipe.edit import NoSuchPlaceError, added, removed, renamed, replaced
from mergekit_obim.recipe.experts import find_experts
from mergekit_obim.recipe.faults import Path as KeyPath
from mergekit_obim.recipe.fix import change_lines, mend, scale_densities

# --- the text ---------------------------------------------------------------------------------

TEXT = """\
# on top
base: b  # the base
models:
- model: a   # the first
  # about density
  density: 0.5 # half
  # below density

  weight: [1,
    2]  # two
- {model: "b", density: 0.5, weight: 1}   # flow
parameters:
  # about the only one
  only: 1
  # after it
empty:

# at the end
last: |
  text
"""


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (("base",), "base: b  # the base\n", ""),
        (("models", 0, "density"), "  density: 0.5 # half\n", ""),
        (("models", 0, "weight"), "  weight: [1,\n    2]  # two\n", ""),
        (("models", 0, "model"), "- model: a   # the first\n  # about density\n  d", "- d"),
        (("models", 1, "model"), '{model: "b", d', "{d"),
        (("models", 1, "density"), "density: 0.5, w", "w"),
        (("models", 1, "weight"), ", weight: 1", ""),
        (("parameters", "only"), "parameters:\n  # about the only one\n  only: 1\n",
         "  # about the only one\n"),
        (("empty",), "empty:\n", ""),
        (("last",), "last: |\n  text\n", ""),
    ],
)  # fmt: skip
def test_out(path: KeyPath, old: str, new: str) -> None:
    assert TEXT.count(old) == 1
    assert removed(TEXT, path) == TEXT.replace(old, new)


@pytest.mark.parametrize(
    ("path", "value", "old", "new"),
    [
        (("new",), 1, "  text\n", "  text\nnew: 1\n"),
        (("models", 0, "c"), {"a": "x, y"}, "# two\n", "# two\n  c: {a: 'x, y'}\n"),
        (("models", 1, "c"), [0.25], "weight: 1}", "weight: 1, c: [0.25]}"),
        (("parameters", "c"), True, "only: 1\n", "only: 1\n  c: true\n"),
        (("empty", "c"), 1, "empty:\n", "empty: {c: 1}\n"),
    ],
)
def test_in(path: KeyPath, value: object, old: str, new: str) -> None:
    text = added(TEXT, path, value)
    assert text == TEXT.replace(old, new)
    assert yaml.safe_load(text) != yaml.safe_load(TEXT)


def test_other_names_and_values() -> None:
    assert renamed(TEXT, ("models", 0, "density"), "d") == TEXT.replace("  density:", "  d:")
    assert renamed(TEXT, ("base",), "last") == removed(TEXT, ("base",))  # which is there already
    assert replaced(TEXT, ("models", 1, "model"), "./b") == TEXT.replace('"b"', "./b")
    assert replaced(TEXT, ("models", 0, "weight", 1), 0.5) == TEXT.replace("2]", "0.5]")
    assert replaced(TEXT, ("empty",), 3) == TEXT.replace("empty:", "empty: 3")
    assert added("{a: 1}", ("b",), None) == "{a: 1, b: null}"
    assert added("{}", ("b",), 2) == "{b: 2}"
    assert added("a: 1", ("b",), 2) == "a: 1\nb: 2\n"
    assert removed("a: 1\r\nb: 2 # c\r\n", ("b",)) == "a: 1\r\n"


@pytest.mark.parametrize("path", [("none",), ("base", "b"), ("models", 7, "model"), ("b", "c")])
def test_what_is_not_written_there(path: KeyPath) -> None:
    for edit in (removed, lambda *args: renamed(*args, "x"), lambda *args: replaced(*args, 1)):
        with pytest.raises(NoSuchPlaceError):
            edit(TEXT, path)


def test_nothing_is_put_into_what_is_no_mapping() -> None:
    with pytest.raises(NoSuchPlaceError):
        added(TEXT, ("models", "x"), 1)


# --- what is wrong -------------------------------------------------------------------------


def mended(text: str) -> tuple[str, str]:
    """The text put right, and what is said of it."""
    new, changes = mend(
        text,
        lambda document: [
            *recipe_faults(document, registry()),
            *find_experts(document).faults,
        ],
    )
    return new, "\n".join(change_lines(changes))


HEAD = "merge_method: obim\nbase_model: b\n"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("models: [{model: a}]\ndytpe: x\n", "models: [{model: a}]\ndtype: x\n", "dytpe → dtype"),
        (
            "models: [{model: a}]\nparameters: {lamda: 1, smooth: 2}\n",
            "models: [{model: a}]\nparameters: {lambda: 1}\n",
            "parameters.smooth taken out: no merge method",
        ),
        (
            "models: [{model: a, parameters: {gama: 1, density: 1}}]\n",
            "models: [{model: a, parameters: {density: 1}}]\n",
            "parameters.gama → gamma: it was misspelt",
        ),
        (
            "models:\n  - model: a\n    density: [0.5, 1]  # much\n",
            "models:\n  - model: a\n    parameters: {density: [0.5, 1]}\n",
            "models[0].density moved to models[0].parameters.density",
        ),
        (
            "models:\n  - model: a\n    parameters: {order: recipe}\n",
            "models:\n  - model: a\nparameters: {order: recipe}\n",
            "models[0].parameters.order moved to parameters.order: it is shared",
        ),
        (
            "models:\n  - model: a\n    calibration: {data: a.txt, max_lenght: 3}\n",
            "models:\n  - model: a\n    calibration: {data: a.txt, max_length: 3}\n",
            "models[0].calibration.max_lenght → max_length",
        ),
        (
            "models: [{model: a, parameters: {weight: [{fliter: x, value: 1}]}}]\n",
            "models: [{model: a, parameters: {weight: [{filter: x, value: 1}]}}]\n",
            "weight[0].fliter → filter",
        ),
        # What nobody but the user can know stays.
        ("models: [{model: a}]\nparameters: {order: x}\n", None, ""),
        ("models: [{model: a}]\nnote: mine\n", None, ""),
    ],
)
def test_mended(old: str, new: str | None, words: str) -> None:
    text, changes = mended(HEAD + old)
    assert text == HEAD + (old if new is None else new)
    says(changes, words)


def test_a_misspelt_method() -> None:
    text, changes = mended("merge_method: obmi # x\nbase_model: b\nmodels: [{model: a}]\n")
    assert text.startswith("merge_method: obim # x\n")
    says(changes, "merge_method: obim: it was misspelt")


@pytest.mark.parametrize(
    ("before", "total", "after"),
    [
        # Each expert's own.
        (
            "models:\n- {model: a, parameters: {density: 0.9}}\n"
            "- {model: c, parameters: {density: 0.6}}\n",
            1.5,
            "models:\n- {model: a, parameters: {density: 0.6}}\n"
            "- {model: c, parameters: {density: 0.4}}\n",
        ),
        # A gradient and filters; what has none means 1/K.
        (
            "models:\n- model: a\n  parameters:\n    density: [0.75, 0.25]\n- model: c\n",
            1.25,
            "models:\n- model: a\n  parameters:\n    density: [0.6, 0.2]\n- model: c\n"
            "parameters: {density: 0.4}\n",
        ),
        (
            "models:\n- model: a\n- model: c\nparameters:\n  density:\n"
            "  - filter: mlp\n    value: 0.75  # more\n",
            1.5,
            "models:\n- model: a\n- model: c\nparameters:\n  density:\n"
            "  - filter: mlp\n    value: 0.5  # more\n  - {value: 0.3333}\n",
        ),
        (
            "models:\n- model: a\n- model: c\nparameters:\n  density:\n"
            "    filter: mlp\n    value: 0.75\n",
            1.5,
            "models:\n- model: a\n- model: c\n"
            "parameters: {density: [{filter: mlp, value: 0.5}, {value: 0.3333}]}\n",
        ),
        (
            "models: [{model: a}, {model: c}]\nparameters: {density: [{filter: m, value: 0.8}]}\n",
            1.6,
            "models: [{model: a}, {model: c}]\n"
            "parameters: {density: [{filter: m, value: 0.5}, {value: 0.3125}]}\n",
        ),
        # The base's own counts for nothing.
        (
            "models:\n- {model: b, parameters: {density: 1}}\n"
            "- {model: a, parameters: {density: 1}}\n"
            "- {model: c, parameters: {density: 1.0}}\n",
            2.0,
            "models:\n- {model: b, parameters: {density: 1}}\n"
            "- {model: a, parameters: {density: 0.5}}\n"
            "- {model: c, parameters: {density: 0.5}}\n",
        ),
    ],
)  # fmt: skip
def test_densities_are_scaled_in_proportion(before: str, total: float, after: str) -> None:
    text, changes = scale_densities(HEAD + before, total)
    assert text == HEAD + after
    says("\n".join(change_lines(changes)), f"the densities summed to {total:g}")


# --- the command -----------------------------------------------------------------------------


def test_it_is_written_whole_where_nothing_is(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(models=world.models(densty=0.6))
    path, new = commands.write_recipe(tmp_path, recipe), tmp_path / "new.yml"
    before = path.read_bytes()
    result = succeed(commands.obim_saliency("--check", path, "--fix", new))
    says(result.stdout, "densty → density", "0.6 → 0.5: the densities summed to 1.2", "no errors")
    says(result.stderr, f"{new}: written")
    succeed(commands.mergekit_yaml(new, tmp_path / "merged"))

    written = new.read_bytes()
    says(refusal(commands.obim_saliency("--check", path, "--fix", new)), new, "there already")
    says(refusal(commands.obim_saliency("--check", path, "--fix", path)), "the recipe itself")
    overwrite = ("--check", path, "--fix", path, "--overwrite")
    says(refusal(commands.obim_saliency(*overwrite)), "the recipe itself")
    assert (path.read_bytes(), new.read_bytes()) == (before, written)
    succeed(commands.obim_saliency("--check", path, "--fix", new, "--overwrite"))
    nowhere = tmp_path / "recipe.yml" / "new.yml"
    says(refusal(commands.obim_saliency("--check", path, "--fix", nowhere)), "cannot be written")


def test_what_is_left_is_said(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(parameters={"saliency": str(world.saliency), "order": "x"})
    path, new = commands.write_recipe(tmp_path, recipe), tmp_path / "new.yml"
    result = commands.obim_saliency("--check", "--json", path, "--fix", new)
    verdict = json.loads(result.stdout)
    assert (result.exit_code, verdict["changes"], len(verdict["errors"])) == (1, [], 1)
    says(result.stderr, f"{new}: not written")
    assert not new.exists()
    recipe["parameters"]["lamda"] = 1
    path = commands.write_recipe(tmp_path, recipe)
    result = commands.obim_saliency("--check", "--json", path, "--fix", new)
    verdict = json.loads(result.stdout)
    assert (result.exit_code, len(verdict["changes"]), len(verdict["errors"])) == (1, 1, 1)
    assert yaml.safe_load(new.read_text())["parameters"]["lambda"] == 1


def test_a_recipe_in_which_nothing_is_wrong_is_written_as_it_is(
    world: World, tmp_path: Path
) -> None:
    path, new = commands.write_recipe(tmp_path, world.recipe()), tmp_path / "new.yml"
    succeed(commands.obim_saliency("--check", path, "--fix", new))
    assert new.read_bytes() == path.read_bytes()
    assert commands.obim_saliency(path, tmp_path / "out", "--fix", new).exit_code == 2


def test_folders_that_look_like_names_on_the_hub(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.root)
    recipe = world.recipe(base_model="base", parameters={"criterion": "magnitude"})
    recipe["models"][0]["model"] = {"model": {"path": "math"}}
    path, new = commands.write_recipe(tmp_path, recipe), tmp_path / "new.yml"
    checked = succeed(commands.obim_saliency("--check", path)).stdout
    says(checked, "the folder base is a model there", "write ./base", "--no-write-model-card")
    assert checked.count("asks the Hub") == 2
    succeed(commands.obim_saliency("--check", path, "--fix", new))
    mended = yaml.safe_load(new.read_text())
    assert mended["base_model"] == "./base"
    assert mended["models"][0]["model"] == {"model": {"path": "./math"}}
    # What was measured under the one name is known under the other.
    succeed(commands.obim_saliency(path, tmp_path / "out", "--model", "math"))
    kept = commands.obim_saliency(new, tmp_path / "out", "--model", "./math")
    assert "(kept" in succeed(kept).stdout
