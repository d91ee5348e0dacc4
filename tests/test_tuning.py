"""obim-tune: what is scored is what mergekit-yaml merges, and the search goes on after a kill."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.common import ModelReference
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import checkpoints
import mergekit_obim
from checkpoints import read_checkpoint, write_checkpoint
from commands import (
    World,
    killed,
    mergekit_yaml,
    obim_saliency,
    obim_tune,
    refusal,
    same_tensors,
    says,
    succeed,
    write_recipe,
    write_rows,
)
from mergekit_obim.calibration.data import TokenSequence
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.dry_run import read_config
from mergekit_obim.errors import RecipeError
from mergekit_obim.methods.planning import registry
from mergekit_obim.models.opened import open_model
from mergekit_obim.recipe.document import parse
from mergekit_obim.tuning import merged, scoring, search
from mergekit_obim.tuning.candidates import (
    AS_WRITTEN,
    AVERAGE,
    BASE,
    DEFAULT_SPACE,
    Candidate,
    Defaults,
    first_candidates,
    read_space,
)
from mergekit_obim.tuning.search import Objective
from tiny_models import build
from tiny_tokenizers import VOCAB_SIZE, byte_tokenizer

OPTIONS = RunOptions(quiet=True)
FAST = ("--quiet", "--rows", 4, "--batch-size", 4)


@pytest.fixture(scope="module")
def family(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The world's recipe with rows beyond those that are measured."""
    root = tmp_path_factory.mktemp("family")
    math_rows = write_rows(
        root / "math.jsonl", [f"{a} + {a % 7} = {a + a % 7}." for a in range(40)]
    )
    code_rows = write_rows(root / "code.jsonl", [f"def f{n}(x): return x * {n}" for n in range(40)])
    recipe = world.recipe(parameters={"saliency": str(root / "saliency")})
    for model, rows in zip(recipe["models"], (math_rows, code_rows), strict=True):
        model["calibration"] = {"data": str(rows), "samples": 10}
    succeed(obim_saliency(write_recipe(root, recipe), root / "saliency", "--quiet"))
    return recipe


def space(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "space.yml"
    path.write_text(yaml.safe_dump(list(entries)))
    return path


ARITHMETIC = {
    "merge_method": "task_arithmetic",
    "parameters": {"weight": {"low": 0.1, "high": 2, "log": True}},
}


def tuned(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


# --- scores -------------------------------------------------------------------------------


def sequences(*texts: str) -> list[TokenSequence]:
    tokenizer = byte_tokenizer()
    return [TokenSequence(tokenizer(text)["input_ids"]) for text in texts]


def reference(teacher: PreTrainedModel, model: PreTrainedModel, rows: list[TokenSequence]) -> Any:
    """Row by row in float64: the divergence over all tokens, and the loss."""
    divergences, losses = [], []
    for row in rows:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            p, q = (one(ids).logits[0, :-1].double().log_softmax(-1) for one in (teacher, model))
        divergences.append((p.exp() * (p - q)).sum(-1))
        losses.append(-q[torch.arange(len(q)), ids[0, 1:]])
    return tuple(float(torch.cat(all_of).mean()) for all_of in (divergences, losses))


@pytest.mark.parametrize("batch_size", ["auto", 1, 2])
def test_a_score_is_the_reference(world: World, batch_size: Any) -> None:
    teacher, model = (
        AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (world.math, world.base)
    )
    rows = sequences("1 + 1 = 2", "5 + 3 = 8", "a longer row, alone", "x")
    settings: dict[str, Any] = {"label": "m", "batch_size": batch_size}
    lesson = scoring.teach(teacher, rows, likeliest=VOCAB_SIZE, quiet=True, **settings)
    divergence, loss = reference(teacher, model, rows)
    found = scoring.score(model, lesson, **settings)
    assert found.divergence == pytest.approx(divergence, rel=1e-4)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert lesson.loss == pytest.approx(reference(teacher, teacher, rows)[1], rel=1e-6)
    assert scoring.score(teacher, lesson, **settings).divergence == 0
    few = scoring.teach(teacher, rows, likeliest=5, quiet=True, **settings)
    assert 0 < scoring.score(model, few, **settings).divergence < divergence


def test_where_memory_does_not_suffice_for_a_batch_half_is_tried(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.math).eval()
    rows = sequences(*["1 + 1 = 2"] * 8)
    settings: dict[str, Any] = {"label": "m", "likeliest": 9, "quiet": True}
    whole = scoring.teach(model, rows, batch_size="auto", **settings)
    sizes = []

    def feed(model: Any, ids: Tensor, images: Any) -> Tensor:
        sizes.append(len(ids))
        if len(ids) > 2:
            raise MemoryError("out of memory")
        return original(model, ids, images)

    original = scoring.feed
    monkeypatch.setattr(scoring, "feed", feed)
    halved = scoring.teach(model, rows, batch_size="auto", **settings)
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert halved.loss == pytest.approx(whole.loss, rel=1e-6)
    with pytest.raises(MemoryError, match="--batch-size 1"):
        scoring.teach(model, rows, batch_size=8, **settings)


def test_an_encoder_has_divergences_and_no_loss() -> None:
    teacher, model = build("bert-masked"), build("bert-masked", seed=1)
    rows = [TokenSequence([3, 4, 5]), TokenSequence([7, 8])]
    settings: dict[str, Any] = {"label": "m", "batch_size": "auto"}
    lesson = scoring.teach(teacher, rows, likeliest=5, quiet=True, **settings)
    assert lesson.loss is None
    assert sum(len(top.ids) for top in lesson.tops) == 5
    found = scoring.score(model, lesson, **settings)
    assert found.loss is None
    assert found.divergence > 0
    assert scoring.score(teacher, lesson, **settings).divergence == 0
    with pytest.raises(RecipeError, match="predicts no next tokens"):
        Objective("loss", False, {"m": None}).of({"m": found})


def test_what_a_value_is() -> None:
    score = scoring.Score
    scores = {"a": score(1.0, 5.0), "b": score(2.0, 3.0)}
    losses = {"a": 4.5, "b": 1.0}
    assert Objective("kl", False, losses).of(scores) == 1.5
    assert Objective("kl", True, losses).of(scores) == 2.0
    assert Objective("loss", False, losses).of(scores) == 1.25
    assert Objective("loss", True, losses).of(scores) == 2.0
    for wrong in (math.nan, math.inf):
        for order in (("a", "b"), ("b", "a")):
            broken = {"a": score(wrong, 5.0), "b": score(2.0, 3.0)}
            assert Objective("kl", True, losses).of({k: broken[k] for k in order}) == math.inf


# --- candidates ---------------------------------------------------------------------------

RECIPE = """\
# mine
merge_method: ties
base_model: ./base
models:
  - model: ./math   # the first
    parameters: {density: 0.45, weight: [{filter: mlp, value: 1}, {value: 0.5}]}
  - model: ./code
  - model: ./base
    parameters:
      weight: 3
parameters:
  saliency: ./saliency   # measured
  normalize: true
calibration: {data: x.jsonl}
"""


def test_a_candidate_is_the_recipe_with_other_settings() -> None:
    mergekit_obim.register()
    methods = registry()
    own = Candidate(
        "c", "ties_obm", {"lambda": 0.5}, {"./math": {"density": 0.2}, "./code": {"density": 0.3}}
    )
    assert (
        own.recipe(RECIPE, methods)
        == """\
# mine
merge_method: ties_obm
base_model: ./base
models:
  - model: ./math   # the first
    parameters: {density: 0.2}
  - model: ./code
    parameters: {density: 0.3}
  - model: ./base
parameters:
  saliency: ./saliency   # measured
  lambda: 0.5
calibration: {data: x.jsonl}
"""
    )
    base, average, written = first_candidates(2)
    assert written.recipe(RECIPE, methods) == RECIPE
    assert yaml.safe_load(average.recipe(RECIPE, methods))["parameters"] == {"weight": 0.5}
    assert yaml.safe_load(base.recipe(RECIPE, methods))["parameters"]["lambda"] == 0
    assert own.settings() == "lambda 0.5, density 0.2 0.3"


def test_a_parameter_that_is_merged_in_cannot_be_changed() -> None:
    mergekit_obim.register()
    text = RECIPE.replace("  normalize: true", "  <<: {normalize: true}")
    with pytest.raises(RecipeError, match="write it out"):
        Candidate("c", "obim").recipe(text, registry())


def test_the_default_space() -> None:
    mergekit_obim.register()
    methods = registry()
    entries = read_space(DEFAULT_SPACE, methods, weights=False)
    assert len({entry.label for entry in entries}) == len(entries) > 4
    for count in (1, 2, 3, 7):
        experts = [f"e{k}" for k in range(count)]
        for entry in read_space(DEFAULT_SPACE, methods, weights=True):
            found = entry.candidate(Defaults(), experts)
            weighted = methods[entry.method].parameters.keys() & {"weight"}
            assert all(settings.keys() == weighted for settings in found.own.values())
            assert len(found.own) == count
        for entry in entries:
            found = entry.candidate(Defaults(), experts)
            if entry.method == "obim" and "density" in found.shared:
                assert 0.95 < found.shared["density"] * count <= 1


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"merge_method": "tise"}, ["entry 1", "did you mean ties"]),
        ({"merge_method": "obim", "parameters": {"densty": 1}}, ["densty", "did you mean density"]),
        ({"merge_method": "obim", "parametres": {}}, ["'parametres'"]),
        ({"merge_method": "obim", "parameters": 3}, ["a mapping"]),
        ({"merge_method": "obim", "parameters": {"lambda": []}}, ["lambda", "no choices"]),
        ({"merge_method": "obim", "parameters": {"lambda": {"low": 1}}}, ["lambda: high"]),
        (
            {"merge_method": "obim", "parameters": {"lambda": {"low": 2, "high": 1}}},
            ["low 2 is over high 1"],
        ),
        (
            {"merge_method": "obim", "parameters": {"lambda": {"low": 0, "high": 1, "log": True}}},
            ["log needs a low over 0"],
        ),
        (
            {
                "merge_method": "obim",
                "parameters": {"lambda": {"low": 0, "high": 1, "per_expert": True}},
            },
            ["lambda", "shared by all"],
        ),
    ],
)
def test_what_is_no_space(entry: Any, words: list[str], tmp_path: Path) -> None:
    mergekit_obim.register()
    with pytest.raises(RecipeError) as told:
        read_space(space(tmp_path, entry), registry(), weights=False)
    assert "\n" not in told.value.message
    says(told.value.message, *words)


# --- merging ------------------------------------------------------------------------------


@contextmanager
def merger(recipe: dict[str, Any], folder: Path, options: RunOptions) -> Iterator[Any]:
    base = open_model(ModelReference.parse(recipe["base_model"]), options)
    with merged.merging(base, read_config(recipe), None, folder / "scratch", options) as merge:
        yield merge


def candidates() -> list[Candidate]:
    mergekit_obim.register()
    entries = read_space(DEFAULT_SPACE, registry(), weights=False)
    found = [entry.candidate(Defaults(), ["a", "b"]) for entry in entries]
    # One after another in one model: nothing of a candidate is left in the next.
    return [*first_candidates(2), *found, *first_candidates(2)]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"out_dtype": "float16"}])
def test_what_is_scored_is_what_mergekit_yaml_merges(
    family: dict[str, Any], changes: Any, tmp_path: Path
) -> None:
    recipe = {**family, **changes}
    text = yaml.safe_dump(recipe, sort_keys=False)
    with merger(recipe, tmp_path, OPTIONS) as merge:
        for number, candidate in enumerate(candidates()):
            content = parse(candidate.recipe(text, registry()))[0].content
            with merge(read_config(content)) as model:
                found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            out = tmp_path / str(number)
            succeed(mergekit_yaml(write_recipe(tmp_path, content), out, "--quiet"))
            same_tensors(found, read_checkpoint(out))
    assert not (tmp_path / "scratch").exists()  # nothing was written


def untouched(merge: Any, recipe: dict[str, Any], folder: Path) -> tuple[PreTrainedModel, Any]:
    with merge(read_config(recipe)) as model:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    succeed(mergekit_yaml(write_recipe(folder, recipe), folder / "out", "--quiet"))
    return state, AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()


@pytest.mark.parametrize("name", ["mixtral", "llama-tied", "gpt2"])
def test_models_that_are_stored_in_another_way(name: str, tmp_path: Path) -> None:
    for seed, folder in enumerate(("base", "one", "two")):
        model = build(name, seed=0)
        if seed:
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / folder)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / one)} for one in ("one", "two")],
        "parameters": {"weight": 0.5},
        "dtype": "float32",
    }
    with merger(recipe, tmp_path, OPTIONS) as merge:
        found, expected = untouched(merge, recipe, tmp_path)
    same_tensors(found, expected)


def test_offloaded_models_are_merged_to_disk(family: dict[str, Any], tmp_path: Path) -> None:
    options = replace(OPTIONS, device_map="auto", max_memory={"cpu": "30KiB"})
    lesson = scoring.teach(
        AutoModelForCausalLM.from_pretrained(family["models"][0]["model"]).eval(),
        sequences("1 + 1 = 2"),
        label="m",
        batch_size=1,
        likeliest=9,
        quiet=True,
    )
    values = []
    for how in (OPTIONS, options):
        with merger(family, tmp_path, how) as merge, merge(read_config(family)) as model:
            values.append(scoring.score(model, lesson, label="m", batch_size=1))
            assert (tmp_path / "scratch").exists() == (how is options)
    assert values[0].divergence == pytest.approx(values[1].divergence, rel=1e-5)
    assert values[0].loss == pytest.approx(values[1].loss, rel=1e-6)
    assert not list((tmp_path / "scratch").iterdir())


# --- the whole ----------------------------------------------------------------------------


def test_one_expert_merged_whole_is_itself(family: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**family, "models": family["models"][:1]}
    own = space(
        tmp_path, {"merge_method": "obim", "parameters": {"density": 1, "lambda": [0.5, 1, 2]}}
    )
    out = tmp_path / "tuned.yml"
    arguments = ("-o", out, "--space", own, "--trials", 14, "--rows", 4)
    shown = succeed(obim_tune(write_recipe(tmp_path, recipe), *arguments)).stdout.splitlines()
    values = {line.split("  ")[-1]: line.split()[0] for line in shown if "  " in line}
    assert values["the even average: weight 1"] == values["obim: density 1, lambda 1"] == "0"
    assert all(float(values[f"obim: density 1, lambda {other}"]) > 0 for other in (0.5, 2))
    # A merge of the tuned recipe is the expert.
    succeed(mergekit_yaml(out, tmp_path / "merged", "--quiet"))
    same_tensors(
        read_checkpoint(tmp_path / "merged"), read_checkpoint(Path(recipe["models"][0]["model"]))
    )


def unheard_of(folder: Path) -> dict[str, Any]:
    """Two experts that differ from the base only in what they do with the other's text.

    On its own rows each is the base, so whatever a merge takes of them is harm.
    """
    shapes = checkpoints.llama_shapes(layers=1, vocabulary=VOCAB_SIZE)
    config = checkpoints.llama_config(layers=1, vocabulary=VOCAB_SIZE)
    base = checkpoints.base_weights(0, shapes)
    texts = {"digits": "1234567890", "letters": "abcdefghij"}
    write_checkpoint(folder / "base", base, config)
    models = []
    for name, other in (("digits", "letters"), ("letters", "digits")):
        embeddings = base["model.embed_tokens.weight"].clone()
        embeddings[byte_tokenizer()(texts[other], add_special_tokens=False)["input_ids"]] += 3
        write_checkpoint(folder / name, {**base, "model.embed_tokens.weight": embeddings}, config)
        rows = write_rows(folder / f"{name}.jsonl", [texts[name][n:] for n in range(8)])
        calibration = {"data": str(rows), "samples": 4}
        models.append({"model": str(folder / name), "calibration": calibration})
    for name in ("base", "digits", "letters"):
        byte_tokenizer(folder / name)
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": models,
        "parameters": {"weight": 1.0},
        "dtype": "float32",
    }


@pytest.mark.parametrize("more", [(), ("--worst-case",)])
def test_the_base_wins_where_merging_only_harms(more: tuple[str, ...], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, unheard_of(tmp_path))
    out = tmp_path / "tuned.yml"
    own = space(tmp_path, {**ARITHMETIC, "parameters": {"weight": {"low": 0.5, "high": 1}}})
    succeed(obim_tune(recipe, "-o", out, "--space", own, "--trials", 6, *FAST, *more))
    assert tuned(out)["parameters"] == {"weight": 1.0, "lambda": 0.0}
    succeed(mergekit_yaml(out, tmp_path / "merged", "--quiet"))
    same_tensors(read_checkpoint(tmp_path / "merged"), read_checkpoint(tmp_path / "base"))


def test_the_objective_may_be_the_rows_own_tokens(family: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "tuned.yml"
    arguments = ("--objective", "loss", "--trials", 6, "--space", space(tmp_path, ARITHMETIC))
    shown = succeed(
        obim_tune(write_recipe(tmp_path, family), "-o", out, "--rows", 4, *arguments)
    ).stdout.splitlines()
    assert shown[0].startswith("Ranked by the excess loss, mean over the experts")
    start = next(n for n, line in enumerate(shown) if line.endswith("merge")) + 1
    table = [[float(one) for one in line.split()[:3]] for line in shown[start:-2]]
    # Every line has the losses; the value is how much they exceed the experts' own.
    own = [(math + code) / 2 - value for value, math, code in table]
    assert own == pytest.approx([own[0]] * len(own), abs=2e-3)
    assert [row[0] for row in table] == sorted(row[0] for row in table)
    assert len(table) == 6


def test_guard_rows_have_the_base_as_their_teacher(family: dict[str, Any], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "guard.jsonl", [f"what everybody knows, {n}" for n in range(9)])
    own = space(tmp_path, ARITHMETIC)
    out = tmp_path / "tuned.yml"
    recipe = {**family, "guard": {"data": str(rows), "samples": 5}}
    arguments = ("-o", out, "--space", own, "--trials", 6, "--rows", 4)
    shown = succeed(obim_tune(write_recipe(tmp_path, recipe), *arguments)).stdout.splitlines()
    head = next(line for line in shown if line.endswith("merge"))
    assert head.split() == ["math", "code", "guard", "merge"]
    [base] = [line.split() for line in shown if BASE in line]
    assert float(base[3]) == 0
    values = [float(one) for one in base[1:4]]
    assert float(base[0]) == pytest.approx(sum(values) / 3, rel=1e-3)
    [average] = [line.split() for line in shown if AVERAGE in line]
    assert float(average[3]) > 0


def test_no_candidate_is_better_and_comments_stay(family: dict[str, Any], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, family)
    recipe.write_text("# my own\n" + recipe.read_text())
    out = tmp_path / "new" / "tuned.yml"
    shown = succeed(obim_tune(recipe, "-o", out, "--trials", 12, "--rows", 4)).stdout.splitlines()
    start = next(n for n, line in enumerate(shown) if line.endswith("merge")) + 1
    table = [line for line in shown[start:] if line[:1] == " " or line[:1].isdigit()]
    values = [float(line.split()[0]) for line in table]
    assert values == sorted(values)
    for label in (BASE, AVERAGE, AS_WRITTEN):
        assert any(label in line for line in table)
    text = out.read_text()
    assert "# my own\n" in text
    assert text.startswith("# Tuned by obim-tune")
    assert f"#   {values[0]:<8.4g}" in text.replace("\n", " \n")
    best = table[0].split("  ")[-1].partition(":")[0]
    assert shown[-1] == f"{out}: {best}"
    # It is an ordinary recipe, and merges to what was scored.
    succeed(mergekit_yaml(out, tmp_path / "merged", "--quiet"))
    with merger(family, tmp_path, OPTIONS) as merge, merge(read_config(tuned(out))) as model:
        same_tensors(model.state_dict(), read_checkpoint(tmp_path / "merged"))
    # It is not replaced by accident.
    message = refusal(obim_tune(recipe, "-o", out, *FAST))
    says(message, out, "is there already", "--overwrite")


@pytest.mark.slow
def test_the_same_seed_finds_the_same_and_a_kill_changes_nothing(
    family: dict[str, Any], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, family)
    arguments = ("--trials", 17, "--space", space(tmp_path, ARITHMETIC), *FAST)
    outs = {name: tmp_path / f"{name}.yml" for name in ("one", "other", "killed")}
    succeed(obim_tune(recipe, "-o", outs["one"], *arguments))
    succeed(obim_tune(recipe, "-o", outs["other"], *arguments, "--seed", 1))
    assert outs["one"].read_bytes() != outs["other"].read_bytes()

    def die_on_the_way(kill: Callable[[], None]) -> None:
        keep = search.Search._keep

        def kept(self: search.Search, *args: Any) -> None:
            keep(self, *args)
            if len(self.tried) == 15:  # when the estimator is at work
                kill()

        search.Search._keep = kept  # type: ignore[method-assign]

    killed(die_on_the_way, recipe, "-o", outs["killed"], *arguments, command=obim_tune)
    assert not outs["killed"].exists()
    shown = succeed(obim_tune(recipe, "-o", outs["killed"], *arguments[:-5], *arguments[-4:]))
    assert "Goes on after 15 merges" in shown.stderr
    assert outs["killed"].read_bytes() == outs["one"].read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"{name}.yml" for name in outs),
        *(f"{name}.yml.trials" for name in outs),
        "recipe.yml",
        "space.yml",
    }
    # Nothing is left to do, and then more.
    again = succeed(
        obim_tune(recipe, "-o", outs["one"], *arguments[2:], "--trials", 17, "--overwrite")
    )
    assert not again.stdout
    assert outs["one"].read_bytes() == outs["killed"].read_bytes()
    # Other rows are another search.
    rows = ("--rows", 3, "--batch-size", 4)
    fewer = ("--trials", 4, "--overwrite", *arguments[2:4])
    other = succeed(obim_tune(recipe, "-o", outs["one"], *fewer, *rows))
    assert "Starts over" in other.stderr


def test_methods_that_cannot_be_planned_are_left_out(
    family: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = {**family, "merge_method": "task_arithmetic", "parameters": {"weight": 0.5}}
    out = tmp_path / "tuned.yml"
    shown = succeed(obim_tune(write_recipe(tmp_path, recipe), "-o", out, *FAST, "--trials", 4))
    assert tuned(out)["merge_method"] == "task_arithmetic"
    assert (
        "left out of the search: regmean_diag, regmean, obim (assignment: nearest)" in caplog.text
    )
    own = space(tmp_path, {"merge_method": "regmean_diag"})
    message = refusal(
        obim_tune(tmp_path / "recipe.yml", "-o", out, "--overwrite", "--space", own, *FAST)
    )
    says(message, own, "regmean_diag", "no saliency")
    assert not shown.stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guard": {"samples": 3}}, ["guard", "data is missing"]),
        ({"guard": {"data": "x.jsonl", "sampels": 3}}, ["guard", "did you mean 'samples'"]),
        ({"calibration": {"max_lenght": 3}}, ["calibration", "max_length"]),
        ({"tokenizer": {"source": "base"}}, ["tokenizer", "cannot be compared yet"]),
        ({"merge_method": "obmi"}, ["did you mean obim"]),
    ],
)
def test_what_cannot_be_tuned_is_told(
    changes: Any, words: list[str], family: dict[str, Any], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, {**family, **changes})
    message = refusal(obim_tune(recipe, "-o", tmp_path / "tuned.yml", *FAST))
    says(message, *words)
    assert not (tmp_path / "tuned.yml").exists()


def test_a_file_that_holds_no_trials(family: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tuned.yml.trials").write_text("this is no journal\n")
    recipe = write_recipe(tmp_path, family)
    message = refusal(obim_tune(recipe, "-o", tmp_path / "tuned.yml", *FAST))
    says(message, tmp_path / "tuned.yml.trials", "remove it to start over")


def test_the_recipe_is_not_written_over(family: dict[str, Any], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, family)
    says(refusal(obim_tune(recipe, "-o", recipe, "--overwrite")), "is the recipe itself")
