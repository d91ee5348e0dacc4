"""``obim-saliency --check``: every fault at once, a line each, and nothing done."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import Result
from safetensors.torch import save_file

import checkpoints
import commands
from commands import World, refusal, says, succeed
from mergekit_obim.calibration import run
from mergekit_obim.recipe import Document, recipe_faults
from mergekit_obim.saliency.locate import locate

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


Check = Callable[..., tuple[list[str], list[str]]]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Checks a recipe: its faults and its warnings, having made sure that it ends as it should."""

    def run(recipe: object, *options: object) -> tuple[list[str], list[str]]:
        path = commands.write_recipe(tmp_path, recipe)
        before = commands.contents(tmp_path)
        result = commands.obim_saliency("--check", path, *options)
        assert isinstance(result.exception, SystemExit | None), result.exception
        assert commands.contents(tmp_path) == before
        lines = result.stdout.splitlines()
        faults = [line for line in lines if line.startswith("Error: ")]
        assert result.exit_code == bool(faults), result.output
        return faults, [line for line in lines if line.startswith("Warning: ")]

    return run


def only(lines: list[str], *words: object) -> None:
    """There is one line, with all these words."""
    assert len(lines) == 1, lines
    says(lines[0], *words)


def as_json(tmp_path: Path, recipe: object, *options: object) -> dict[str, Any]:
    path = commands.write_recipe(tmp_path, recipe)
    result: Result = commands.obim_saliency("--check", "--json", path, *options)
    verdict: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (not verdict["ok"])
    return verdict


def altered(
    world: World, folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any
) -> Path:
    """The math expert with its tensors changed in place, and its configuration."""
    shutil.copytree(world.math, folder)
    tensors = checkpoints.read_checkpoint(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def with_expert(world: World, folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe that needs no saliency, with this expert in place of math."""
    recipe = world.recipe(**changes)
    recipe["models"][0]["model"] = str(folder)
    recipe["parameters"] = {"criterion": "magnitude"}
    return recipe


# --- what is right ------------------------------------------------------------------------


def test_a_sound_recipe_has_no_fault(world: World, tmp_path: Path, check: Check) -> None:
    assert check(world.recipe()) == ([], [])
    verdict = as_json(tmp_path, world.recipe())
    assert verdict["ok"]
    assert verdict["errors"] == verdict["warnings"] == verdict["fallbacks"] == []
    whole = []
    for expert in world.experts:
        tensors = [checkpoints.read_checkpoint(folder) for folder in (expert, world.base)]
        matrices = [n for n, weight in tensors[1].items() if weight.ndim > 1]
        whole.append([torch.cat([t[n].double().flatten() for n in matrices]) for t in tensors])
    deltas = [expert - base for expert, base in whole]
    for expert, delta in zip(world.experts, deltas, strict=True):
        size = float(delta.norm() / whole[0][1].norm())
        assert verdict["distances"][str(expert)] == pytest.approx(size, rel=0.1)
    cosine = float(torch.cosine_similarity(*deltas, dim=0))
    found = verdict["cosines"][str(world.math)][str(world.code)]
    assert found == pytest.approx(cosine, abs=0.1)
    # Measured already: what is left is the merge.
    assert set(verdict["cost"]) == {"mergekit-yaml"}


def test_missing_saliency_is_a_fault_of_the_merge_only(
    world: World, tmp_path: Path, check: Check
) -> None:
    recipe = world.recipe(parameters={"saliency": str(tmp_path / "none")})
    faults, _ = check(recipe)
    assert len(faults) == 2
    for fault, expert in zip(sorted(faults), sorted(world.experts), strict=True):
        says(fault, f"no saliency for model {expert}", "obim-saliency RECIPE OUT_DIR")
    # The pre-pass is going to make it.
    faults, warnings = check(recipe, tmp_path / "none")
    assert not faults
    only(warnings, world.code, "fewer than the 100 samples")
    _, warnings = check(recipe, tmp_path / "elsewhere")
    only(warnings[:1], "none", "would write to", "elsewhere")


def test_calibration_is_looked_at_where_it_is_needed(
    world: World, tmp_path: Path, check: Check
) -> None:
    recipe = world.recipe()
    del recipe["models"][0]["calibration"]
    assert check(recipe) == ([], [])  # its saliency is there
    faults, _ = check(recipe, world.saliency)
    only(faults, world.math, "has no calibration data", "calibration: FILE.jsonl")
    recipe = world.recipe(parameters={"saliency": str(tmp_path / "none")})
    recipe["models"][0]["calibration"] = str(tmp_path / "gone.jsonl")
    faults, _ = check(recipe, tmp_path / "none")
    only(faults, world.math, "gone.jsonl")


def test_the_estimate_is_near_what_is_written(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(parameters={"saliency": str(tmp_path / "none")})
    cost = as_json(tmp_path, recipe, tmp_path / "none")["cost"]
    written = sum(path.stat().st_size for path in world.saliency.glob("*.safetensors"))
    assert written / 2 < cost["obim-saliency"]["disk"] < written * 2
    succeed(commands.mergekit_yaml(commands.write_recipe(tmp_path, world.recipe()), tmp_path / "m"))
    merged = sum(path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors"))
    assert 0.8 * merged < cost["mergekit-yaml"]["disk"] < 1.2 * merged
    for command in cost.values():
        assert set(command) == {"disk", "memory"}
        assert 1e8 < command["memory"] < 1e10


# --- what is wrong with the recipe -----------------------------------------------------------


def test_every_fault_is_told_at_once(world: World, tmp_path: Path, check: Check) -> None:
    models = world.models(density=0.8, wieght=2)
    recipe = world.recipe(
        models=models, parametres={"order": "recipe"}, parameters={"saliency": "none", "order": "x"}
    )
    faults, _ = check(recipe)
    expected = [
        ("'parametres'", "did you mean parameters"),
        ("parameter order", "rotation, recipe"),
        (world.math, "'wieght'", "did you mean weight"),
        (world.code, "'wieght'", "did you mean weight"),
        ("densities sum to 1.6", "more tensors"),
        ("no saliency", world.math),
        ("no saliency", world.code),
    ]
    assert len(faults) == len(expected), faults
    for words in expected:
        assert any(all(str(word) in fault for word in words) for fault in faults), (words, faults)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"merge_method": "obmi"}, ("'obmi'", "did you mean obim")),
        ({"base_modle": "x"}, ("'base_modle'", "did you mean base_model")),
        ({"base_model": None}, ("no base_model", "add 'base_model: …'")),
        ({"dtype": "float7"}, ("float7", "bfloat16")),
        ({"parameters": {"saliency": "{saliency}", "lamda": 1}}, ("'lamda'", "mean lambda")),
        ({"parameters": {"saliency": "{saliency}", "unscored": "x"}}, ("unscored", "magnitude")),
        ({"slices": []}, ("Exactly one of",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_fault_of_the_recipe(
    world: World, check: Check, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    if "parameters" in change:
        change["parameters"]["saliency"] = str(world.saliency)
    if "slices" in change:
        change = {"slices": [{"sources": [{"model": "x", "layer_range": [0, 1]}]}]}
    faults, _ = check(world.recipe(**change))
    assert any(all(word in fault for word in words) for fault in faults), faults


def test_an_unknown_key_that_is_like_none_is_only_named() -> None:
    recipe = {"base_model": "b", "note": 1, "models": [{"model": "a", "licence": 2}]}
    faults = list(recipe_faults(Document(recipe)))
    assert [fault.level for fault in faults] == ["warning", "warning"]
    says(faults[0].message, "the recipe", "'note'")
    says(faults[1].message, "model a", "'licence'", "calibration")


def test_keys_are_known_wherever_mergekit_reads_them(world: World) -> None:
    source = {"model": "a", "layer_range": [0, 1], "parameters": {}, "calibration": "a.txt"}
    part = {"slices": [{"sources": [source], "base_model": "b", "parameters": {}}]}
    recipe = {**world.recipe(models=None), **part, "tokenizer": {"source": "base"}}
    assert not list(recipe_faults(Document(recipe)))
    modules = {"modules": {"text": {**part, "parameters": {}}}}
    assert not list(recipe_faults(Document(modules)))
    modules["modules"]["text"]["slice"] = []
    [fault] = recipe_faults(Document(modules))
    says(fault.message, "modules.text", "'slice'", "slices")
    assert str(fault.place) == "modules.text.slice"


# --- what is wrong with the models --------------------------------------------------------


def test_stale_saliency(world: World, tmp_path: Path, check: Check) -> None:
    stale = tmp_path / "stale"
    stale.mkdir()
    for expert, other in zip(world.experts, reversed(world.experts), strict=True):
        shutil.copy(world.saliency_of(expert), world.saliency_of(other, stale))
    faults, _ = check(world.recipe(parameters={"saliency": str(stale)}))
    assert len(faults) == 2
    for fault, expert in zip(sorted(faults), sorted(world.experts), strict=True):
        says(fault, "measured on other weights", expert, "--overwrite")


def test_tensors_that_fall_back_are_named_with_the_reason(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "poor"
    for expert in world.experts:
        path = locate(str(world.saliency), str(expert))
        entries, header = commands.entries(path), commands.header(path)
        del entries[Q_PROJ], entries[NORM]
        header["unscored"] = json.dumps({Q_PROJ: "it never ran"})
        folder.mkdir(exist_ok=True)
        save_file(entries, folder / path.name, metadata=header)
    recipe = world.recipe(parameters={"saliency": str(folder), "unscored": "base"})
    verdict = as_json(tmp_path, recipe)
    assert verdict["ok"]
    assert verdict["fallbacks"] == [
        {
            "model": str(expert),
            "outcome": "left at the base's values",
            "tensors": {Q_PROJ: "it never ran", NORM: "its saliency file has no entry for it"},
        }
        for expert in world.experts
    ]
    path = commands.write_recipe(tmp_path, recipe)
    output = succeed(commands.obim_saliency("--check", path)).output
    says(output, f"model {world.math}: 1 tensor, left at the base's values", "as it never ran")


def test_an_expert_that_is_the_base(world: World, tmp_path: Path, check: Check) -> None:
    shutil.copytree(world.base, tmp_path / "copy")
    faults, _ = check(with_expert(world, tmp_path / "copy"))
    only(faults, tmp_path / "copy", "is the base", "remove it")


def test_an_expert_that_is_another_s_twin(world: World, tmp_path: Path, check: Check) -> None:
    shutil.copytree(world.code, tmp_path / "copy")
    faults, _ = check(with_expert(world, tmp_path / "copy"))
    only(faults, tmp_path / "copy", world.code, "same model")


def test_an_expert_of_another_base(world: World, tmp_path: Path, check: Check) -> None:
    def other(tensors: dict[str, torch.Tensor]) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        tensors |= {n: t * 0.5 for n, t in checkpoints.base_weights(9, shapes).items()}

    faults, _ = check(with_expert(world, altered(world, tmp_path / "stranger", other)))
    only(faults, tmp_path / "stranger", "is not a fine-tune of", world.base, "set base_model")
    assert re.search(r"differ by 1\.[345]", faults[0])  # √2: neither knows of the other


@pytest.mark.parametrize(
    ("step", "cosine"), [(1 / 256, "0.99"), (1 / 48, "0.9"), (1 / 16, None)], ids=str
)
def test_experts_that_share_an_ancestor_after_the_base(
    world: World, tmp_path: Path, check: Check, step: float, cosine: str | None
) -> None:
    base = checkpoints.read_checkpoint(world.base)
    middle = checkpoints.fine_tuned(base, 7, step=1 / 16)
    recipe = world.recipe(parameters={"criterion": "magnitude"})
    for k in range(2):
        near = checkpoints.fine_tuned(middle, 20 + k, step=step)
        folder = altered(world, tmp_path / f"late{k}", lambda tensors, near=near: tensors | near)
        save_file(near, folder / "model.safetensors", metadata={"format": "pt"})
        recipe["models"][k]["model"] = str(folder)
    faults, warnings = check(recipe)
    assert not faults
    if cosine:
        only(warnings, "late0", "late1", "in the same direction", cosine)
    else:  # two children that have gone as far as their parent did
        assert not warnings


def far(tensors: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(5)
    for name in tensors:
        tensors[name] += 0.35 * torch.randn(tensors[name].shape, generator=generator)


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ][:8].clone()


def fewer_tokens(tensors: dict[str, torch.Tensor]) -> None:
    for name in (EMBEDDING, "lm_head.weight"):
        tensors[name] = tensors[name][:-3].clone()


def broken(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ][:] = float("nan")


def integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ.replace("weight", "qweight")] = torch.zeros(4, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (narrow, {}, (Q_PROJ, "[8, 16]", "[16, 16]", "set base_model")),
        (fewer_tokens, {"vocab_size": 256}, ("another vocabulary", "[256, 16]", "source: base")),
        (broken, {}, (Q_PROJ, "not finite")),
        (integers, {}, ("qweight", "quantised", "full-precision")),
        (
            lambda t: t,
            {"quantization_config": {"quant_method": "gptq"}},
            ("says that it is quantised", "take quantization_config out"),
        ),
        (lambda t: t.pop(NORM), {}, (f"has no tensor {NORM}", "not complete")),
        (lambda t: t, {"architectures": ["LlamaModel"]}, ("LlamaModel", "LlamaForCausalLM")),
        (lambda t: t, {"architectures": None}, ("has no `architectures`", "LlamaForCausalLM")),
        (lambda t: t, {"hidden_act": "relu"}, ('hidden_act "relu"', "mean something else")),
    ],
    ids=[
        *("shape", "vocabulary", "nan", "integers", "quantised", "missing", "architecture", "none"),
        "activation",
    ],
)
def test_an_expert_that_cannot_be_merged(
    world: World,
    tmp_path: Path,
    check: Check,
    change: Callable[[dict[str, torch.Tensor]], object],
    config: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    folder = altered(world, tmp_path / "odd", change, **config)
    faults, _ = check(with_expert(world, folder))
    only(faults, folder, *words)


def test_a_vocabulary_that_the_recipe_aligns_is_no_fault(
    world: World, tmp_path: Path, check: Check
) -> None:
    folder = altered(world, tmp_path / "odd", fewer_tokens)
    faults, _ = check(with_expert(world, folder, tokenizer={"source": "base"}))
    assert not faults


def words_of(folder: Path, change: Callable[[dict[str, int]], object]) -> Path:
    """A model whose tokenizer has its vocabulary changed in place."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    change(tokenizer["model"]["vocab"])
    path.write_text(json.dumps(tokenizer))
    return folder


def two_swapped(vocabulary: dict[str, int]) -> None:
    a, b = list(vocabulary)[5:7]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def test_tokens_with_other_numbers(world: World, tmp_path: Path, check: Check) -> None:
    folder = words_of(altered(world, tmp_path / "odd", lambda tensors: None), two_swapped)
    faults, _ = check(with_expert(world, folder))
    only(faults, folder, f"has number 5 in {folder}, but 6 in the base {world.base}")
    only(faults, "number 6 in", "source: base")
    assert check(with_expert(world, folder, tokenizer={"source": "base"})) == ([], [])


def clashing(world: World, folder: Path) -> dict[str, Any]:
    """A recipe with two experts that have put tokens of their own at the base's spare number."""
    models = {}
    for name, model in (("base", world.base), ("math", world.math), ("code", world.code)):
        models[name] = Path(shutil.copytree(model, folder / name))
        token = {"math": "<|im_start|>", "code": "<|tool|>"}.get(name)

        def change(vocabulary: dict[str, int], token: str | None = token) -> None:
            last = vocabulary.pop(max(vocabulary, key=vocabulary.__getitem__))
            vocabulary |= {token: last} if token else {}

        words_of(models[name], change)
    recipe = world.recipe(base_model=str(models["base"]), parameters={"criterion": "magnitude"})
    for entry, name in zip(recipe["models"], ("math", "code"), strict=True):
        entry["model"] = str(models[name])
    return recipe


def settings_of(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> type[Exception]:
    """Raised where the pre-pass begins to measure."""

    class ReachedError(Exception):
        pass

    def measure(*args: Any) -> Any:
        raise ReachedError

    monkeypatch.setattr(run, "measure", measure)
    return ReachedError


def test_all_commands_compare_tokens_and_settings_in_the_same_words(
    world: World,
    tmp_path: Path,
    check: Check,
    reached: type[Exception],
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = clashing(world, tmp_path)
    settings_of(tmp_path / "math", rms_norm_eps=0.5)
    faults, warnings = check(recipe)
    only(faults, "models", "number 258 is '<|tool|>' in", "but '<|im_start|>' in", "source: union")
    only(warnings, tmp_path / "math", "rms_norm_eps 0.5 (the base's: 1e-06)")
    said = [line.split(": ", 1)[1] for line in (*warnings, *faults)]
    path = commands.write_recipe(tmp_path, recipe)
    result = commands.obim_saliency(path, tmp_path / "saliency")
    assert isinstance(result.exception, reached)
    assert [line for line in result.stderr.splitlines() if "Warning: model" in line] == [
        f"Warning: {line}" for line in said
    ]
    with caplog.at_level(logging.WARNING, logger="mergekit_obim"):
        succeed(commands.mergekit_yaml(path, tmp_path / "merged"))
    assert [r.message for r in caplog.records if r.name == "mergekit_obim"] == said


def test_mergekit_pytorch_compares_the_folders_around_its_files(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = clashing(world, tmp_path)
    settings_of(tmp_path / "math", rms_norm_eps=0.5)
    file = "{}/model.safetensors".format
    raw = {
        "merge_method": "obim",
        "base_model": file(recipe["base_model"]),
        "models": [{"model": file(entry["model"])} for entry in recipe["models"]],
        "parameters": {"criterion": "magnitude"},
    }
    path = commands.write_recipe(tmp_path, raw)
    with caplog.at_level(logging.WARNING, logger="mergekit_obim"):
        succeed(commands.mergekit_pytorch(path, tmp_path / "merged"))
    [settings, tokens] = [record.message for record in caplog.records]
    says(settings, f"model {tmp_path / 'math'}:", "rms_norm_eps 0.5")
    says(tokens, "number 258", "`tokenizer: {source: union}` to a recipe for mergekit-yaml")


def test_a_head_that_the_merged_config_denies(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = clashing(world, tmp_path)
    weights = checkpoints.read_checkpoint(tmp_path / "base")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    settings_of(tmp_path / "base", tie_word_embeddings=True)
    path = commands.write_recipe(tmp_path, {**recipe, "tokenizer": {"source": "union"}})
    with caplog.at_level(logging.WARNING, logger="mergekit_obim"):
        succeed(commands.mergekit_yaml(path, tmp_path / "merged"))
    [line] = [record.message for record in caplog.records if record.name == "mergekit_obim"]
    says(line, "lm_head.weight of its own", "tie_word_embeddings to false in the merged config")
    # As the line says:
    assert "lm_head.weight" in checkpoints.read_checkpoint(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]


def test_the_pre_pass_refuses_a_config_that_mergekit_could_not_plan(
    world: World, tmp_path: Path, reached: type[Exception]
) -> None:
    folder = altered(world, tmp_path / "odd", lambda tensors: None, architectures=None)
    path = commands.write_recipe(tmp_path, with_expert(world, folder))
    message = refusal(commands.obim_saliency(path, tmp_path / "out"))
    says(message, folder, "config.json has no `architectures`", '["LlamaForCausalLM"]')


def test_an_unusual_distance_is_only_named(world: World, tmp_path: Path, check: Check) -> None:
    faults, warnings = check(with_expert(world, altered(world, tmp_path / "far", far)))
    assert not faults
    only(warnings, tmp_path / "far", "0.7", "is base_model what it was trained from?")


def test_a_model_that_is_not_there(world: World, tmp_path: Path, check: Check) -> None:
    faults, _ = check(with_expert(world, tmp_path / "nowhere"))
    only(faults, tmp_path / "nowhere", "neither a model folder nor a model on the Hub")


def test_adapters_are_not_merged_for_a_look(world: World, tmp_path: Path, check: Check) -> None:
    recipe = with_expert(world, Path(f"{world.math}+{tmp_path / 'adapter'}"))
    _, warnings = check(recipe, "--lora-merge-cache", tmp_path / "cache")
    assert any("adapter has not been merged" in line for line in warnings), warnings
    faults, _ = check(recipe)
    only(faults, "--lora-merge-cache")


# --- the two commands ------------------------------------------------------------------------


def test_the_pre_pass_refuses_what_the_merge_would(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(models=world.models(densty=0.1), lamda=1)
    path = commands.write_recipe(tmp_path, recipe)
    message = refusal(commands.obim_saliency(path, tmp_path / "out"))
    says(message, "'densty'", "did you mean density", world.math, world.code)
    assert not (tmp_path / "out").exists()


def test_the_pre_pass_needs_no_base_to_compare_with(
    world: World, tmp_path: Path, reached: type[Exception]
) -> None:
    recipe = with_expert(world, world.math, base_model="nobody/nothing")
    path = commands.write_recipe(tmp_path, recipe)
    result = commands.obim_saliency(path, tmp_path / "out")
    assert isinstance(result.exception, reached), result.output


def test_the_pre_pass_says_that_an_expert_is_the_base(
    world: World, tmp_path: Path, reached: type[Exception]
) -> None:
    shutil.copytree(world.base, tmp_path / "copy")
    recipe = with_expert(world, tmp_path / "copy")
    path = commands.write_recipe(tmp_path, recipe)
    result = commands.obim_saliency(path, tmp_path / "out")
    assert isinstance(result.exception, reached)
    says(result.stderr, f"Warning: model {tmp_path / 'copy'}", "is the base")


def test_the_merge_says_that_an_expert_is_the_base(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(world.base, tmp_path / "copy")
    path = commands.write_recipe(tmp_path, with_expert(world, tmp_path / "copy"))
    with caplog.at_level(logging.WARNING, logger="mergekit_obim"):
        succeed(commands.mergekit_yaml(path, tmp_path / "merged"))
    assert sum("is the base" in record.message for record in caplog.records) == 1


def test_usage(world: World, tmp_path: Path) -> None:
    path = commands.write_recipe(tmp_path, world.recipe())
    result = commands.obim_saliency("--json", path, tmp_path / "out")
    assert result.exit_code == 2
    says(result.stderr, "--check")
    assert commands.obim_saliency(path).exit_code == 2
