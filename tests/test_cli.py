"""obim-saliency: its options, what it writes and what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from click.testing import Result

import checkpoints
import commands
import tiny_models
from commands import CODE_ROWS, MATH_ROWS, World, succeed
from mergekit_obim import __version__
from tiny_tokenizers import VOCAB_SIZE, byte_tokenizer

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "measured"


def measure(recipe: dict[str, Any], out: Path, *options: object) -> Result:
    path = commands.write_recipe(out.parent, recipe)
    return succeed(commands.obim_saliency(path, out, *options))


def calibration_of(file: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(commands.header(file)["calibration"])
    return record


def tokens(rows: list[str], cut: int = 48) -> int:
    """One token per byte, no special ones."""
    return sum(min(cut, len(row.encode())) for row in rows)


# --- help, and what it costs -----------------------------------------------------------------

HEAVY = {"datasets", "mergekit", "numpy", "pydantic", "torch", "transformers"}


def alone(*args: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run the command in a process of its own; also which modules it had loaded at its end."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('LOADED', *sys.modules))\n"
        "from mergekit_obim.commands.saliency import main\n"
        f"main({list(args)!r}, prog_name='obim-saliency')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    text, _, loaded = done.stdout.partition("LOADED")
    done.stdout = text
    return done, {name.partition(".")[0] for name in loaded.split()}


def test_help_is_grouped_and_loads_nothing_heavy() -> None:
    done, loaded = alone("--help")
    assert done.returncode == 0
    assert not loaded & HEAVY
    sections = dict(re.findall(r"^(\w[\w ]*):\n((?:  .*\n|\n)+)", done.stdout, re.MULTILINE))
    options = {
        "Calibration": "--samples --max-length --batch-size --seed --dtype --model",
        "Correlations": "--sketch --full-gram",
        "Output": "--dense --overwrite --quiet -v",
        "Check": "--check --fix --json",
        "Publish": "--push --create-pr --private",
        "Combine": "--combine -o",
        "Imatrix": "--from-imatrix --to-imatrix",
        "Hardware": "--device --device-map --max-memory",
        "Storage": "--transformers-cache --lora-merge-cache",
        "Dangerous Options": "--trust-remote-code",
        "Other": "--version --help",
    }
    assert {
        title: " ".join(re.findall(r"^  (-[\w-]+)", text, re.MULTILINE))
        for title, text in sections.items()
    } == options
    assert "CONFIG OUT_DIR" in done.stdout


def test_a_faulty_recipe_is_told_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    recipe = {"base_model": "base", "models": [{"model": "a", "calibraton": "a.txt"}]}
    path = commands.write_recipe(tmp_path, recipe)
    done, loaded = alone(str(path), str(tmp_path / "out"))
    commands.says(commands.refusal(done), "'calibraton'", "did you mean calibration?")
    assert not loaded & (HEAVY - {"pydantic"})


def test_version() -> None:
    assert __version__ in succeed(commands.obim_saliency("--version")).output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--samples", "0"], "--samples"),
        (["--batch-size", "0"], "neither a positive number nor 'auto'"),
        (["--batch-size", "-1"], "neither a positive number nor 'auto'"),
        (["--batch-size", "some"], "neither a positive number nor 'auto'"),
        (["--max-memory", "20GiB"], "DEVICE=SIZE"),
        (["--max-memory", "cpu=20Gib/s"], "DEVICE=SIZE"),
        (["--max-memory", "cpu=much"], "DEVICE=SIZE"),
        (["--max-memory", "cpu=1GiB"], "--device-map"),
        (["--dtype", "int8"], "bfloat16"),
        (["--sampels", "3"], "--samples"),
    ],
)
def test_wrong_usage(world: World, out: Path, options: list[str], words: str) -> None:
    path = commands.write_recipe(out.parent, world.recipe())
    result = commands.obim_saliency(path, out, *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not out.exists()


# --- what is written -------------------------------------------------------------------------


def test_one_file_per_expert_named_after_it(world: World) -> None:
    assert {path.name for path in world.saliency.iterdir()} == {
        world.saliency_of(expert).name for expert in world.experts
    }
    for expert in world.experts:
        assert world.saliency_of(expert).name.endswith(".safetensors")
        assert expert.name in world.saliency_of(expert).name


def test_a_relative_path_gives_a_readable_name(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(world.math, tmp_path / "models" / "math")
    monkeypatch.chdir(tmp_path)
    recipe = world.recipe(models=[{"model": "./models/math", "calibration": "rows.jsonl"}])
    commands.write_rows(Path("rows.jsonl"), MATH_ROWS)
    succeed(commands.obim_saliency(commands.write_recipe(tmp_path, recipe), "saliency"))
    assert os.listdir("saliency") == ["models--math.safetensors"]


def test_entries_are_float32_and_broadcast(world: World) -> None:
    h = commands.entries(world.saliency_of(world.math))
    weights = checkpoints.read_checkpoint(world.math)
    assert h.keys() == weights.keys()
    for name, values in h.items():
        assert values.dtype == torch.float32
        assert torch.broadcast_shapes(values.shape, weights[name].shape) == weights[name].shape
        assert values.isfinite().all()
        assert (values >= 0).all()
    assert h[Q_PROJ].shape == (1, 16)
    assert h[EMBEDDING].shape == (VOCAB_SIZE, 1)
    assert h["model.norm.weight"].shape == (16,)


def test_header_is_complete(world: World) -> None:
    header = commands.header(world.saliency_of(world.math))
    assert header.keys() == {
        *("format", "format_version", "form", "model", "revision", "architecture"),
        *("calibration", "unscored", "fingerprint", "mergekit_obim_version"),
    }
    assert header["format"] == "mergekit-obim-saliency"
    assert header["format_version"] == "1"
    assert header["form"] == "factored"
    assert header["model"] == str(world.math)
    assert header["architecture"] == "LlamaForCausalLM"
    assert header["mergekit_obim_version"] == __version__
    assert json.loads(header["unscored"]) == {}
    fingerprint = json.loads(header["fingerprint"])
    assert fingerprint.keys() == checkpoints.read_checkpoint(world.math).keys()
    calibration = json.loads(header["calibration"])
    assert calibration.keys() >= {
        *("sources", "content_hash", "samples", "tokens", "max_length", "seed", "template"),
    }
    (source,) = calibration["sources"]
    assert source["data"] == str(world.math_data)
    assert source["rows"] == source["sampled"] == calibration["samples"] == len(MATH_ROWS)
    assert calibration["tokens"] == tokens(MATH_ROWS)
    assert calibration["max_length"] == 48
    assert calibration["seed"] == 0
    assert calibration["template"] is None
    assert re.fullmatch("[0-9a-f]{64}", calibration["content_hash"])


def test_the_same_run_writes_the_same_bytes(world: World, out: Path) -> None:
    measure(world.recipe(), out)
    assert commands.contents(out) == commands.contents(world.saliency)


def test_dense_files_hold_delta_squared_times_h(world: World, out: Path) -> None:
    measure(world.recipe(), out, "--dense")
    base = checkpoints.read_checkpoint(world.base)
    for expert in world.experts:
        file = world.saliency_of(expert, out)
        assert commands.header(file)["form"] == "dense"
        dense, weights = commands.entries(file), checkpoints.read_checkpoint(expert)
        h = commands.entries(world.saliency_of(expert))
        assert dense.keys() == h.keys()
        for name, values in dense.items():
            assert values.shape == weights[name].shape
            delta = weights[name].double() - base[name].double()
            torch.testing.assert_close(values.double(), delta**2 * h[name].double())


def test_dense_and_factored_do_not_replace_each_other(world: World, out: Path) -> None:
    path = commands.write_recipe(out.parent, world.recipe())
    succeed(commands.obim_saliency(path, out))
    message = commands.refusal(commands.obim_saliency(path, out, "--dense"))
    commands.says(message, world.math, "form", "--overwrite")


# --- kept files ------------------------------------------------------------------------------


def test_files_that_are_still_right_are_kept_untouched(world: World, out: Path) -> None:
    shutil.copytree(world.saliency, out)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    # Neither where nor how fast it runs, nor its layout, makes a measurement another one.
    result = measure(
        world.recipe(dtype="bfloat16", parameters={"saliency": "elsewhere"}),
        out,
        *("--batch-size", 3, "--device", "cpu"),
    )
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    for number, expert in enumerate(world.experts, 1):
        kept = f"[{number}/2] {expert} → {world.saliency_of(expert, out)} (kept: nothing has "
        assert kept in result.stdout
    assert "Measuring" not in result.stderr


def test_kept_files_are_not_measured_again_with_overwrite(world: World, out: Path) -> None:
    shutil.copytree(world.saliency, out)
    recipe = world.recipe()
    recipe["models"][1]["calibration"] = {"data": str(world.code_data), "samples": 4}
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    result = measure(recipe, out, "--overwrite")
    after = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    math, code = (world.saliency_of(expert).name for expert in world.experts)
    assert after[math] == before[math]
    assert after[code] != before[code]
    assert result.stdout.count("(kept") == 1


# --- options ---------------------------------------------------------------------------------


def test_options_beat_the_recipe(world: World, out: Path) -> None:
    recipe = world.recipe(
        calibration={"max_length": 48, "seed": 1, "dtype": "bfloat16", "batch_size": 2}
    )
    measure(
        recipe,
        out,
        *("--samples", 4, "--max-length", 7, "--seed", 5, "--dtype", "float64"),
        *("--batch-size", "auto"),
    )
    for expert in world.experts:
        calibration = calibration_of(world.saliency_of(expert, out))
        assert calibration["samples"] == 4
        assert calibration["tokens"] == 4 * 7
        assert calibration["max_length"] == 7
        assert calibration["seed"] == 5
        assert calibration["dtype"] == "float64"


def test_a_models_own_calibration_beats_the_shared_one(world: World, out: Path) -> None:
    recipe = world.recipe(calibration={"data": str(world.math_data), "samples": 3, "seed": 2})
    recipe["models"][0]["calibration"] = {"samples": 5}
    recipe["models"][1]["calibration"] = str(world.code_data)
    measure(recipe, out)
    math, code = (calibration_of(world.saliency_of(expert, out)) for expert in world.experts)
    assert (math["samples"], math["seed"], math["sources"][0]["data"]) == (
        *(5, 2),
        str(world.math_data),
    )
    assert (code["samples"], code["seed"], code["sources"][0]["data"]) == (
        *(3, 2),
        str(world.code_data),
    )


def test_only_these_experts(world: World, out: Path) -> None:
    recipe = world.recipe()
    recipe["models"].append({"model": str(world.chat), "calibration": str(world.code_data)})
    result = measure(recipe, out, "--model", world.chat, "--model", world.math)
    assert {path.name for path in out.iterdir()} == {
        world.saliency_of(expert).name for expert in (world.math, world.chat)
    }
    assert f"[1/2] {world.math} → " in result.stdout
    assert f"[2/2] {world.chat} → " in result.stdout
    assert str(world.code) not in result.stdout


def test_experts_left_out_need_no_calibration(world: World, out: Path) -> None:
    recipe = world.recipe()
    del recipe["models"][1]["calibration"]
    measure(recipe, out, "--model", world.math)
    assert [path.name for path in out.iterdir()] == [world.saliency_of(world.math).name]


@pytest.mark.parametrize("size", [1, 5])
def test_the_batch_size_changes_nothing_but_rounding(world: World, out: Path, size: int) -> None:
    measure(world.recipe(), out, "--batch-size", size)
    for expert in world.experts:
        file, usual = world.saliency_of(expert, out), world.saliency_of(expert)
        assert commands.header(file) == commands.header(usual)
        torch.testing.assert_close(
            commands.entries(file), commands.entries(usual), rtol=1e-5, atol=1e-9
        )


def test_batches_are_as_large_as_asked_for(
    world: World, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, ...]] = []
    forward = transformers.LlamaForCausalLM.forward

    def spy(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        sizes.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", spy)
    # Twelve rows of 10 tokens each, so nothing but the option decides.
    recipe = world.recipe(calibration={"max_length": 8})
    measure(recipe, out, "--model", world.math, "--batch-size", 5)
    # Before them, the capture tries the model on a token.
    assert [size for size in sizes if size[1] > 1] == [(5, 8), (5, 8), (2, 8)]
    sizes.clear()
    measure(recipe, out / "auto", "--model", world.math)
    assert [size for size in sizes if size[1] > 1] == [(12, 8)]


def test_the_forward_pass_runs_in_the_dtype_asked_for(
    world: World, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()
    forward = transformers.LlamaForCausalLM.forward

    def spy(self: Any, **kwargs: Any) -> Any:
        seen.update(p.dtype for p in self.parameters())
        return forward(self, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", spy)
    measure(world.recipe(), out, "--dtype", "bfloat16")
    assert seen == {torch.bfloat16}
    exact = commands.entries(world.saliency_of(world.math))
    rounded = commands.entries(world.saliency_of(world.math, out))
    assert not torch.equal(exact[Q_PROJ], rounded[Q_PROJ])
    torch.testing.assert_close(exact[Q_PROJ], rounded[Q_PROJ], rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("options", [["--device", "cpu"], ["--device-map", "cpu"]])
def test_placement_changes_nothing(world: World, out: Path, options: list[str]) -> None:
    measure(world.recipe(), out, *options)
    assert commands.contents(out) == commands.contents(world.saliency)


def test_a_mixture_is_measured_as_one(world: World, out: Path) -> None:
    sources = [{"data": str(world.math_data), "samples": 5}, str(world.code_data)]
    recipe = world.recipe(
        models=[{"model": str(world.chat), "calibration": {"data": sources, "samples": 7}}]
    )
    measure(recipe, out)
    calibration = calibration_of(world.saliency_of(world.chat, out))
    assert [source["sampled"] for source in calibration["sources"]] == [5, 7]
    assert calibration["samples"] == 12
    # And as the rows of both would be in one file.
    joined = commands.write_rows(out.parent / "both.jsonl", [*MATH_ROWS, *CODE_ROWS])
    whole = world.recipe(models=[{"model": str(world.chat), "calibration": str(joined)}])
    both = world.recipe(
        models=[
            {
                "model": str(world.chat),
                "calibration": [{"data": str(world.math_data)}, str(world.code_data)],
            }
        ]
    )
    measure(whole, out / "whole")
    measure(both, out / "both")
    commands.same_tensors(
        commands.entries(world.saliency_of(world.chat, out / "whole")),
        commands.entries(world.saliency_of(world.chat, out / "both")),
    )


def test_the_short_and_the_long_form_are_one(world: World, out: Path) -> None:
    long = world.recipe()
    long["models"][1]["calibration"] = [{"data": str(world.code_data), "samples": 100}]
    shutil.copytree(world.saliency, out)
    assert measure(long, out).stdout.count("(kept") == 2


def test_messages_go_through_the_chat_template(world: World, out: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": text}]} for text in MATH_ROWS]
    data = commands.write_rows(out.parent / "chat.jsonl", rows)
    recipe = world.recipe(models=[{"model": str(world.chat), "calibration": str(data)}])
    measure(recipe, out)
    calibration = calibration_of(world.saliency_of(world.chat, out))
    assert calibration["tokens"] == tokens([f"<user>{text}" for text in MATH_ROWS])
    assert re.fullmatch("[0-9a-f]{64}", calibration["template"])


def test_packing_fills_segments(world: World, out: Path) -> None:
    recipe = world.recipe(calibration={"packing": True, "max_length": 16})
    measure(recipe, out, "--model", world.math)
    calibration = calibration_of(world.saliency_of(world.math, out))
    assert calibration["packing"] is True
    joined = tokens(MATH_ROWS) + len(MATH_ROWS) - 1  # with </s> between rows
    assert calibration["tokens"] == joined - joined % 16


def test_experts_in_slices_are_measured_once_each(world: World, out: Path) -> None:
    def source(model: Path, *layers: int) -> dict[str, Any]:
        return {
            "model": str(model),
            "layer_range": list(layers),
            "calibration": str(world.math_data),
        }

    slices = [
        {"sources": [source(world.math, 0, 1), source(world.base, 0, 1)]},
        {"sources": [source(world.math, 1, 2), source(world.base, 1, 2)]},
        {"sources": [source(world.code, 0, 1), source(world.base, 0, 1)]},
    ]
    result = measure(world.recipe(models=None, slices=slices), out)
    assert {path.name for path in out.iterdir()} == {
        world.saliency_of(expert).name for expert in world.experts
    }
    assert result.stdout.count("→") == 2


def test_a_base_of_the_slices_only(world: World, out: Path) -> None:
    sources = [
        {"model": str(world.math), "layer_range": [0, 2], "calibration": str(world.math_data)},
        {"model": str(world.base), "layer_range": [0, 2]},
    ]
    recipe = world.recipe(
        models=None,
        base_model=None,
        slices=[{"sources": sources, "base_model": str(world.base)}],
    )
    measure(recipe, out)
    assert [path.name for path in out.iterdir()] == [world.saliency_of(world.math).name]
    path = commands.write_recipe(out.parent, recipe)
    message = commands.refusal(commands.obim_saliency(path, out, "--dense", "--overwrite"))
    commands.says(message, world.math, "--dense", "base_model")


def test_an_expert_without_tokenizer_takes_the_bases(world: World, out: Path) -> None:
    bare = out.parent / "math"
    shutil.copytree(world.math, bare, ignore=shutil.ignore_patterns("token*"))
    models = [{"model": str(bare), "calibration": str(world.math_data)}]
    measure(world.recipe(models=models), out)
    commands.same_tensors(
        commands.entries(world.saliency_of(bare, out)),
        commands.entries(world.saliency_of(world.math)),
    )


# --- what is said ----------------------------------------------------------------------------


def test_summary_progress_and_warnings(world: World, out: Path) -> None:
    result = measure(world.recipe(), out)
    count = len(checkpoints.read_checkpoint(world.math))
    assert result.stdout == (
        f"[1/2] {world.math} → {world.saliency_of(world.math, out)}\n"
        f"      scored {count} of {count} tensors on {tokens(MATH_ROWS):,} tokens "
        f"in {len(MATH_ROWS)} samples\n"
        f"[2/2] {world.code} → {world.saliency_of(world.code, out)}\n"
        f"      scored {count} of {count} tensors on {tokens(CODE_ROWS):,} tokens "
        f"in {len(CODE_ROWS)} samples\n"
    )
    for expert, rows in ((world.math, MATH_ROWS), (world.code, CODE_ROWS)):
        bar = rf"Measuring {re.escape(str(expert))}: 100%.*{tokens(rows)}/{tokens(rows)} .*tok/s"
        assert re.search(bar, result.stderr)
    # The default is 100 samples, and code's file has fewer rows; math's recipe asks for all.
    assert f"Warning: {world.code}: {world.code_data} has {len(CODE_ROWS)} usable rows, fewer " in (
        result.stderr
    )
    assert f"Warning: {world.math}" not in result.stderr


def test_quiet_says_only_what_matters(world: World, out: Path) -> None:
    result = measure(world.recipe(), out, "--quiet")
    assert result.stdout == ""
    assert "Measuring" not in result.stderr
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["Warning"]
    assert commands.contents(out) == commands.contents(world.saliency)
    again = measure(world.recipe(), out, "--quiet", "--samples", 3, "--overwrite")
    assert again.output == ""


def test_rows_longer_than_the_tokenizer_says_are_cut_with_a_warning(
    world: World, out: Path
) -> None:
    model = shutil.copytree(world.math, out.parent / "math")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 6}))
    models = [{"model": str(model), "calibration": str(world.math_data)}]
    result = measure(world.recipe(models=models), out)
    assert f"Warning: {model}: max_length is 6, the longest that the model takes" in result.stderr
    assert calibration_of(world.saliency_of(model, out))["tokens"] == 6 * len(MATH_ROWS)


def test_rows_longer_than_the_models_positions_are_cut_with_a_warning(
    world: World, out: Path
) -> None:
    model = save_tiny("gpt2", out.parent / "gpt2")  # it has 64, its tokenizer does not say
    data = commands.write_rows(out.parent / "long.jsonl", ["long " * 100])
    models = [{"model": str(model), "calibration": str(data)}]
    result = measure(world.recipe(models=models, calibration=None), out)
    assert f"Warning: {model}: max_length is 64, the longest that the model takes" in result.stderr
    assert calibration_of(world.saliency_of(model, out))["tokens"] == 64


# --- other architectures -----------------------------------------------------------------------


def save_tiny(name: str, folder: Path) -> Path:
    model = tiny_models.build(name)
    model.resize_token_embeddings(VOCAB_SIZE, mean_resizing=False)
    model.save_pretrained(folder)
    byte_tokenizer(folder, add_eos=True)
    return folder


@pytest.mark.parametrize(
    ("name", "weight", "shape"),
    [
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", (16, 1)),
        ("gpt2", "transformer.wte.weight", (VOCAB_SIZE, 16)),
        ("bert-masked", "bert.encoder.layer.1.intermediate.dense.weight", (1, 16)),
        ("bert-masked", "bert.embeddings.token_type_embeddings.weight", (2, 1)),
        ("roberta-classifier", "classifier.dense.weight", (1, 16)),
    ],
)
def test_other_architectures(
    world: World, out: Path, name: str, weight: str, shape: tuple[int, ...]
) -> None:
    model = save_tiny(name, out.parent / name)
    models = [{"model": str(model), "calibration": str(world.math_data)}]
    result = measure(world.recipe(models=models, calibration={"max_length": 20}), out)
    file = world.saliency_of(model, out)
    h, stored = commands.entries(file), checkpoints.read_checkpoint(model)
    assert h[weight].shape == shape
    unscored = json.loads(commands.header(file)["unscored"])
    buffers = {key for key, tensor in stored.items() if not tensor.is_floating_point()}
    assert h.keys() | unscored.keys() >= stored.keys() - buffers
    assert not h.keys() & unscored.keys()
    assert f"{tokens([row + '.' for row in MATH_ROWS], 20):,} tokens" in result.stdout  # and </s>


def test_what_has_no_h_is_named_with_the_reason(world: World, out: Path) -> None:
    model = save_tiny("mamba", out.parent / "mamba")
    models = [{"model": str(model), "calibration": str(world.math_data)}]
    result = measure(world.recipe(models=models, calibration={"max_length": 6}), out)
    file = world.saliency_of(model, out)
    unscored = json.loads(commands.header(file)["unscored"])
    a_logs = [f"backbone.layers.{layer}.mixer.A_log" for layer in range(tiny_models.LAYERS)]
    assert set(a_logs) <= unscored.keys()
    scored = len(commands.entries(file))
    assert f"scored {scored} of {scored + len(unscored)} tensors" in result.stdout
    lines = [line for line in result.stdout.splitlines() if "unscored, " in line]
    told = {
        name.strip(): reason
        for reason, names in (line.strip().removeprefix("unscored, ").split(": ") for line in lines)
        for name in names.split(",")
    }
    assert told == unscored


def test_the_recipe_may_be_any_yaml(world: World, out: Path) -> None:
    """Anchors, merges and references as mappings, as mergekit reads them."""
    text = f"""
    merge_method: obim
    base_model: {{model: {{path: {world.base}}}}}
    models:
      - model: {{model: {{path: {world.math}}}}}
        calibration: &common {{data: {world.math_data}, samples: 12}}
      - model: {world.code}
        calibration: {{<<: *common, data: {world.code_data}}}
    calibration: {{max_length: 48}}
    """
    assert yaml.safe_load(text)
    path = out.parent / "recipe.yml"
    path.write_text(text)
    succeed(commands.obim_saliency(path, out))
    assert world.saliency_of(world.math, out).read_bytes() == (
        world.saliency_of(world.math).read_bytes()
    )
