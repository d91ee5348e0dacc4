"""Models as users have them: sharded, pickled, on the Hub at a revision, with code of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers

import checkpoints
import commands
from commands import World, succeed


def both_commands(world: World, models: Mapping[str, object], folder: Path, *options: str) -> None:
    """Both commands on these base, math and code come to what they do on the world's."""
    recipe = world.recipe(base_model=str(models["base"]), parameters=None)
    for entry, name in zip(recipe["models"], ("math", "code"), strict=True):
        entry["model"] = str(models[name])
    recipe["parameters"] = {"saliency": str(folder / "measured")}
    path = commands.write_recipe(folder, recipe)
    succeed(commands.obim_saliency(path, folder / "measured", *options))
    for name, usual in zip(("math", "code"), world.experts, strict=True):
        file = folder / "measured" / commands.saliency_file_name(str(models[name]))
        commands.same_tensors(commands.entries(file), commands.entries(world.saliency_of(usual)))
    succeed(commands.mergekit_yaml(path, folder / "merged", *options))
    usual_path = commands.write_recipe(folder, world.recipe(), "usual.yml")
    succeed(commands.mergekit_yaml(usual_path, folder / "usual"))
    commands.same_tensors(
        checkpoints.read_checkpoint(folder / "merged"),
        checkpoints.read_checkpoint(folder / "usual"),
    )


# --- how weights are stored --------------------------------------------------------------------


def sharded(tensors: checkpoints.Tensors, folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def pickled(tensors: checkpoints.Tensors, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def pickled_and_sharded(tensors: checkpoints.Tensors, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        file = f"pytorch_model-{number + 1:05}-of-00003.bin"
        names = list(tensors)[number::3]
        torch.save({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.slow
@pytest.mark.parametrize("store", [sharded, pickled, pickled_and_sharded])
def test_how_the_weights_are_stored_changes_nothing(
    world: World, tmp_path: Path, store: Callable[[checkpoints.Tensors, Path], None]
) -> None:
    models = {}
    for name in ("base", "math", "code"):
        models[name] = shutil.copytree(world.root / name, tmp_path / name)
        store(checkpoints.read_checkpoint(models[name]), models[name])
    both_commands(world, models, tmp_path)


# --- the Hub -----------------------------------------------------------------------------------


def test_models_on_the_hub_at_a_revision(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))

    def list_repo_files(repo: str, *, revision: str | None = None, **_: object) -> list[str]:
        """mergekit asks the Hub for this, even of a model that it has."""
        return [path.name for path in Path(huggingface_hub.snapshot_download(repo)).iterdir()]

    monkeypatch.setattr("huggingface_hub.list_repo_files", list_repo_files)
    for name in ("base", "math", "code"):
        files = {file.name: file for file in (world.root / name).iterdir()}
        checkpoints.fake_hub(hub, f"org/{name}", files, ref="v2" if name == "math" else "main")
    # Without its revision, math would be another model.
    chat = {file.name: file for file in world.chat.iterdir()}
    checkpoints.fake_hub(hub, "org/math", chat)
    models = {"base": "org/base", "math": "org/math@v2", "code": "org/code"}
    both_commands(world, models, tmp_path)
    measured = {file.name: commands.header(file) for file in (tmp_path / "measured").iterdir()}
    of_math = measured[commands.saliency_file_name("org/math@v2")]
    assert (of_math["model"], of_math["revision"]) == ("org/math@v2", "v2")
    of_code = measured[commands.saliency_file_name("org/code")]
    assert of_code["revision"] == (hub / "models--org--code/refs/main").read_text()


# --- code that comes with a model ----------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({ran!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_own_code(folder: Path, ran: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own_llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(ran=str(ran)))


def test_code_of_a_model_runs_only_with_trust_remote_code(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules, ran = tmp_path / "modules", tmp_path / "ran"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    models = {}
    for name in ("base", "math", "code"):
        models[name] = shutil.copytree(world.root / name, tmp_path / name)
        with_own_code(models[name], ran)
    recipe = world.recipe(models=[{"model": str(models["math"]), "calibration": "none.txt"}])
    path = commands.write_recipe(tmp_path, recipe)
    message = commands.refusal(commands.obim_saliency(path, tmp_path / "out"))
    commands.says(message, f"model {models['math']}", "code of its own", "--trust-remote-code")
    assert not ran.exists()
    both_commands(world, models, tmp_path, "--trust-remote-code")
    assert ran.exists()


def test_a_tokenizers_code_is_not_replaced_by_the_bases_tokenizer(
    world: World, tmp_path: Path
) -> None:
    model = shutil.copytree(world.math, tmp_path / "math")
    (model / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "own.py").write_text("raise AssertionError('it ran')")
    recipe = world.recipe(models=[{"model": str(model), "calibration": str(world.math_data)}])
    path = commands.write_recipe(tmp_path, recipe)
    message = commands.refusal(commands.obim_saliency(path, tmp_path / "out"))
    commands.says(message, f"model {model}", "tokenizer", "--trust-remote-code")
