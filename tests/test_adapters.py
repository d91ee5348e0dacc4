"""Merged adapters are used only if they are whole and made from what their parts are now."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mergekit.common import ModelPath, ModelReference
from safetensors.torch import save_file

import checkpoints
import commands
from commands import World, refusal, says, succeed
from mergekit_obim.errors import AdapterError
from mergekit_obim.models import adapters
from mergekit_obim.saliency.file import saliency_file_name

WIDTH = checkpoints.HIDDEN
Q_PROJ = "model.layers.1.self_attn.q_proj"
PREFIX = "base_model.model."


@pytest.fixture(autouse=True)
def mergekit_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests in this process may have had it find adapters our way already."""
    monkeypatch.setattr(ModelReference, "merged", adapters._merge_by_mergekit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write_adapter(
    folder: Path,
    seed: int = 0,
    *,
    module: str = Q_PROJ,
    size: tuple[int, int] = (WIDTH, WIDTH),
    also: dict[str, torch.Tensor] | None = None,
    **config: Any,
) -> Path:
    """An adapter of rank 2 on one module, as peft saves it."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(2, size[1], generator=generator),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(size[0], 2, generator=generator),
    }
    folder.mkdir(exist_ok=True)
    save_file({**factors, **(also or {})}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [module]}
    text = json.dumps({**settings, "task_type": "CAUSAL_LM", **config})
    (folder / "adapter_config.json").write_text(text)
    return folder


def change_of(adapter: Path) -> torch.Tensor:
    """What the adapter adds to its module's weight."""
    factors = commands.entries(adapter / "adapter_model.safetensors")
    first, second = (factors[f"{PREFIX}{Q_PROJ}.lora_{side}.weight"] for side in "AB")
    return second @ first


class Setting:
    """A model of its own, an adapter on it, and a recipe that merges it with another expert."""

    def __init__(self, world: World, root: Path) -> None:
        self.world, self.root = world, root
        self.model = Path(shutil.copytree(world.base, root / "model"))
        self.adapter = write_adapter(root / "adapter")
        self.cache, self.saliency = root / "cache", root / "saliency"
        self.reference = ModelReference.parse(f"{self.model}+{self.adapter}")
        lora = {
            "model": str(self.reference),
            "parameters": {"density": 0.5},
            "calibration": {"data": str(world.math_data), "samples": 2},
        }
        parameters = {"saliency": str(self.saliency)}
        other = {
            **world.recipe()["models"][1],
            "parameters": {"density": 0.1, "saliency": str(world.saliency)},
        }
        self.recipe = world.recipe(models=[lora, other], parameters=parameters)

    def write(self, **changes: Any) -> Path:
        return commands.write_recipe(self.root, {**self.recipe, **changes})

    def pre_pass(self, *options: object) -> Any:
        reference = str(self.reference)
        only = ("--model", reference, "--lora-merge-cache", self.cache)
        return commands.obim_saliency(self.write(), self.saliency, *only, *options)

    def check(self, *where: object) -> tuple[list[str], list[str]]:
        options = ("--check", "--json", "--lora-merge-cache", self.cache)
        result = commands.obim_saliency(self.write(), *where, *options)
        found = json.loads(result.stdout)
        assert result.exit_code == bool(found["errors"])
        return found["errors"], found["warnings"]

    def merge(self, **changes: Any) -> Any:
        return commands.mergekit_yaml(
            self.write(**changes), self.root / "merged", "--lora-merge-cache", self.cache
        )

    def merged(self) -> ModelReference:
        return adapters.merged(self.reference, str(self.cache))

    def is_right(self) -> None:
        """What is in the cache is the model as it is now and the adapter as it is now."""
        assert [path for path in self.cache.iterdir() if path != self.folder] == []
        was = checkpoints.read_checkpoint(self.model)
        now = checkpoints.read_checkpoint(self.folder)
        weight = f"{Q_PROJ}.weight"
        torch.testing.assert_close(now[weight], was[weight] + change_of(self.adapter))
        commands.same_tensors({**now, weight: was[weight]}, was)

    @property
    def folder(self) -> Path:
        return adapters.look_up(self.reference, str(self.cache)).folder


@pytest.fixture
def setting(world: World, tmp_path: Path) -> Setting:
    return Setting(world, tmp_path)


# --- what is in the cache --------------------------------------------------------------------


def nothing(setting: Setting, folder: Path) -> None:
    folder.mkdir()


def only_a_config(setting: Setting, folder: Path) -> None:
    folder.mkdir()
    shutil.copy(setting.model / "config.json", folder)


def of_another_adapter(setting: Setting, folder: Path) -> None:
    """Whole, made by mergekit itself, but of what the adapter was before."""
    write_adapter(setting.adapter, seed=1)
    adapters._merge_by_mergekit(setting.reference, str(setting.cache))
    write_adapter(setting.adapter)


def cut_short(setting: Setting, folder: Path) -> None:
    setting.merged()
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def without_weights(setting: Setting, folder: Path) -> None:
    setting.merged()
    (folder / "model.safetensors").unlink()


def of_another_base(setting: Setting, folder: Path) -> None:
    """Changed between the places that are sampled, which only the file's time tells."""
    setting.merged()
    tensors = checkpoints.read_checkpoint(setting.model)
    tensors["model.embed_tokens.weight"].view(-1)[9] += 1
    save_file(tensors, setting.model / "model.safetensors", {"format": "pt"})


def of_another_base_of_the_same_time(setting: Setting, folder: Path) -> None:
    setting.merged()
    path = setting.model / "model.safetensors"
    stat = path.stat()
    tensors = checkpoints.read_checkpoint(setting.world.math)
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size


def a_killed_merge(setting: Setting, folder: Path) -> None:
    def kill_while_saving(kill: Callable[[], None]) -> None:
        def save_pretrained(model: Any, folder: str, **options: Any) -> None:
            model.config.save_pretrained(folder)
            kill()

        transformers.PreTrainedModel.save_pretrained = save_pretrained

    options = ("--lora-merge-cache", setting.cache)
    commands.killed(kill_while_saving, setting.write(), setting.saliency, *options)
    (left,) = setting.cache.glob("*.part")
    assert [path.name for path in left.rglob("config.json")] == ["config.json"]


LEFT = [
    nothing,
    only_a_config,
    of_another_adapter,
    cut_short,
    without_weights,
    of_another_base,
    of_another_base_of_the_same_time,
    a_killed_merge,
]


@pytest.mark.slow
@pytest.mark.parametrize("left", LEFT)
def test_what_is_left_is_never_taken_for_the_merged_model(
    left: Callable[[Setting, Path], None], setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    setting.cache.mkdir()
    left(setting, setting.folder)
    there = setting.folder.exists()
    caplog.clear()
    # mergekit merges adapters before it asks our method anything.
    succeed(setting.merge(parameters={"criterion": "magnitude"}))
    setting.is_right()
    told = [record.message for record in caplog.records if "merging it again" in record.message]
    assert len(told) == there
    if there:
        says(told[0], f"model {setting.reference}")


def test_what_is_right_is_not_made_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.merged()
    before = commands.contents(setting.cache)
    monkeypatch.setattr(adapters, "_merge_by_mergekit", None)
    assert setting.merged() == ModelReference(model=ModelPath(path=str(setting.folder)))
    assert commands.contents(setting.cache) == before


def test_other_methods_are_left_to_mergekit(setting: Setting) -> None:
    setting.recipe["models"] = [{"model": m["model"]} for m in setting.recipe["models"]]
    setting.recipe |= {"merge_method": "linear", "parameters": {"weight": 0.5}}
    succeed(setting.merge())
    assert ModelReference.merged is adapters._merge_by_mergekit
    assert not (setting.folder / adapters.RECORD).exists()


def test_two_processes_merge_once(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    log = setting.root / "log"

    def merge(*args: Any) -> Any:
        with log.open("a") as file:
            file.write("merged\n")
        time.sleep(0.2)  # the other one is at the lock by then
        torch.set_num_threads(1)  # OpenMP's threads did not come along
        return by_mergekit(*args)

    by_mergekit = adapters._merge_by_mergekit
    monkeypatch.setattr(adapters, "_merge_by_mergekit", merge)
    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            code = 1
            try:
                setting.merged()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert log.read_text() == "merged\n"
    setting.is_right()


def test_an_adapter_that_is_written_meanwhile(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_mergekit = adapters._merge_by_mergekit

    def merge(*args: Any) -> Any:
        made = by_mergekit(*args)
        write_adapter(setting.adapter, seed=1)
        return made

    monkeypatch.setattr(adapters, "_merge_by_mergekit", merge)
    with pytest.raises(AdapterError, match="written to while they were merged"):
        setting.merged()
    assert list(setting.cache.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("changes", ["adapter", "base"])
def test_saliency_of_what_an_adapter_was_before(setting: Setting, changes: str) -> None:
    says(succeed(setting.pre_pass()).output, "scored")
    says(succeed(setting.pre_pass()).output, "kept")
    assert setting.check(setting.saliency)[0] == setting.check()[0] == []
    if changes == "adapter":
        write_adapter(setting.adapter, seed=1)
    else:
        of_another_base_of_the_same_time(setting, setting.folder)
    path = setting.saliency / saliency_file_name(str(setting.reference))
    for faults, warnings in (setting.check(setting.saliency), setting.check()):
        (fault,) = faults
        says(fault, path, f"model {setting.reference}", "other weights", "--overwrite")
        assert any("has changed since they were merged" in line for line in warnings)
    assert setting.check(setting.saliency, "--overwrite")[0] == []
    before = path.read_bytes()
    says(refusal(setting.pre_pass()), path, "another set of weights", "--overwrite")
    says(refusal(setting.merge()), path, "other weights", "--overwrite")
    assert path.read_bytes() == before
    succeed(setting.pre_pass("--overwrite"))
    assert path.read_bytes() != before
    succeed(setting.merge())
    setting.is_right()


def test_the_other_commands_see_the_adapter_as_it_is(setting: Setting) -> None:
    of_another_adapter(setting, setting.folder)
    succeed(
        commands.obim_kinship(
            setting.reference, setting.world.code, "--base", setting.world.base,
            "--lora-merge-cache", setting.cache,
        )
    )  # fmt: skip
    setting.is_right()
    write_adapter(setting.adapter, seed=1)
    recipe = setting.write(parameters={"criterion": "magnitude"})
    succeed(commands.obim_report(recipe, "--json", "--lora-merge-cache", setting.cache))
    setting.is_right()


# --- adapters that cannot be merged ----------------------------------------------------------


def no_config(setting: Setting) -> None:
    (setting.adapter / "adapter_config.json").unlink()


def no_weights(setting: Setting) -> None:
    (setting.adapter / "adapter_model.safetensors").unlink()


def no_folder(setting: Setting) -> None:
    shutil.rmtree(setting.adapter)


def cut_short_adapter(setting: Setting) -> None:
    with (setting.adapter / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)


def prompt_tuning(setting: Setting) -> None:
    write_adapter(setting.adapter, peft_type="PROMPT_TUNING", num_virtual_tokens=3)


def other_width(setting: Setting) -> None:
    write_adapter(setting.adapter, size=(24, 32), base_model_name_or_path="org/wider")


def other_layers(setting: Setting) -> None:
    write_adapter(setting.adapter, module=Q_PROJ.replace("1", "2"))


def other_names(setting: Setting) -> None:
    write_adapter(setting.adapter, module="language_model." + Q_PROJ, target_modules=["q_proj"])


def resized(setting: Setting) -> None:
    head = torch.zeros(commands.VOCAB_SIZE + 2, WIDTH)
    write_adapter(setting.adapter, also={f"{PREFIX}lm_head.weight": head})


def an_adapter_in_the_model(setting: Setting) -> None:
    shutil.copy(setting.adapter / "adapter_config.json", setting.model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_config, ["no adapter_config.json"]),
        (no_weights, ["no adapter_model.safetensors or adapter_model.bin"]),
        (no_folder, ["no adapter_config.json"]),
        (cut_short_adapter, ["cannot be merged", "header"]),
        (prompt_tuning, ["PROMPT_TUNING", "leave it out"]),
        (other_width, [Q_PROJ, "[24, 32]", "[16, 16]", "trained on org/wider"]),
        (other_layers, ["model.layers.2", "which the model does not have"]),
        (other_names, ["missing adapter keys", Q_PROJ]),
        (resized, ["lm_head.weight", "resize_token_embeddings(261)", "[259, 16]"]),
        (an_adapter_in_the_model, ["adapter_config.json beside its weights", "elsewhere"]),
    ],
)
def test_an_adapter_that_does_not_fit(
    setting: Setting, spoil: Callable[[Setting], None], words: list[str]
) -> None:
    spoil(setting)
    message = refusal(setting.pre_pass())
    says(message, f"model {setting.reference}", *words)
    assert not setting.cache.exists() or list(setting.cache.iterdir()) == []
    assert refusal(setting.merge(parameters={"criterion": "magnitude"})) == message
    faults, _ = setting.check(setting.saliency)
    if spoil is not other_names:  # which transformers may rename, so that only merging tells
        assert faults == [message.removeprefix("Error: ")]
    # Nothing that was left stands in the way of what is mended.
    shutil.rmtree(setting.model)
    shutil.copytree(setting.world.base, setting.model)
    write_adapter(setting.adapter)
    setting.merged()
    setting.is_right()


def test_an_adapter_on_the_hub(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.reference = ModelReference.parse(f"{setting.model}+org/adapter@v1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(setting.root / "hub"))
    with pytest.raises(AdapterError, match="org/adapter on the Hub was not asked, as HF_HUB_OFF"):
        setting.merged()
    files = {path.name: path for path in setting.adapter.iterdir()}
    checkpoints.fake_hub(setting.root / "hub", "org/adapter", files, ref="v1")
    adapters.check_adapter(setting.reference)
    there = adapters.look_up(setting.reference, str(setting.cache))
    assert there.rebuild_reason == "the adapter has not been merged into its model yet"
    setting.merged()
    setting.is_right()


@pytest.mark.parametrize(
    ("trained_on", "expected"),
    [
        ("model", False),
        ("elsewhere", False),  # a copy
        ("math", True),
        ("org/model", False),  # what the folder is a copy of is not known
        ("/home/me/model", False),
        (None, False),
    ],
)
def test_what_an_adapter_says_it_was_trained_on(
    setting: Setting, trained_on: str | None, expected: bool
) -> None:
    shutil.copytree(setting.model, setting.root / "elsewhere")
    shutil.copytree(setting.world.math, setting.root / "math")
    named = setting.root / trained_on if trained_on and "/" not in trained_on else trained_on
    write_adapter(setting.adapter, base_model_name_or_path=named and str(named))
    _, warnings = setting.check(setting.saliency)
    lines = [line for line in warnings if "was trained on" in line]
    assert len(lines) == expected
    for line in lines:
        says(line, f"model {setting.reference}", named, "the same model?")


def test_adapters_of_peft_with_more_than_factors(setting: Setting) -> None:
    """DoRA, and modules that were trained whole."""
    head = torch.ones(commands.VOCAB_SIZE, WIDTH)
    magnitudes = torch.full((WIDTH,), 2.0)
    also = {
        f"{PREFIX}lm_head.weight": head,
        f"{PREFIX}{Q_PROJ}.lora_magnitude_vector": magnitudes,
    }
    write_adapter(setting.adapter, also=also, use_dora=True, modules_to_save=["lm_head"])
    setting.merged()
    tensors = checkpoints.read_checkpoint(setting.folder)
    assert torch.equal(tensors["lm_head.weight"], head)
    base = checkpoints.read_checkpoint(setting.model)[f"{Q_PROJ}.weight"]
    moved = base + change_of(setting.adapter)
    expected = 2 * moved / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(tensors[f"{Q_PROJ}.weight"], expected)
