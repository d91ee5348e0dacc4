"""Killed at any moment, the pre-pass goes on, and ends with the bits of a run that was not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import checkpoints
import commands
from architectures import ARCHITECTURES
from commands import MATH_ROWS, World, succeed
from mergekit_obim.calibration import passes, recording, resume
from mergekit_obim.calibration.data import TokenSequence
from mergekit_obim.calibration.passes import run_through
from mergekit_obim.calibration.ranks import Ranks
from mergekit_obim.calibration.resume import INTERVAL, Checkpoint, Sums, remove_leftovers
from mergekit_obim.errors import SaliencyFileError
from mergekit_obim.models import locking
from mergekit_obim.saliency import file as saliency_file

Kill = Callable[[], None]
# So every expert takes several passes: of 12 rows and of 10.
SMALL_BATCHES = ("--batch-size", 2)


@pytest.fixture(scope="session")
def whole(world: World) -> dict[str, bytes]:
    """The files of a run that nothing interrupted."""
    path = commands.write_recipe(world.root, world.recipe())
    succeed(commands.obim_saliency(path, world.root / "whole", *SMALL_BATCHES))
    return commands.contents(world.root / "whole")


@pytest.fixture(autouse=True)
def save_after_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERVAL, "0")


def at_call(number: int, owner: Any, name: str, kill: Kill, *, after: bool = False) -> None:
    """Kill at the n-th call of a function, before it or after it."""
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def patched(*args: Any, **kwargs: Any) -> Any:
        call = next(calls)
        if call == number and not after:
            kill()
        result = original(*args, **kwargs)
        if call == number:
            kill()
        return result

    setattr(owner, name, patched)


# Six passes and six checkpoints for math, then its file; five for code.
MOMENTS: dict[str, Callable[[Kill], None]] = {
    "in the first pass": lambda kill: at_call(1, passes, "feed", kill),
    "before the first checkpoint": lambda kill: at_call(1, passes, "feed", kill, after=True),
    "in the middle of a model": lambda kill: at_call(4, passes, "feed", kill),
    "while a checkpoint is written": lambda kill: at_call(3, resume, "save", kill, after=True),
    "before a checkpoint is in place": lambda kill: at_call(3, saliency_file.os, "replace", kill),
    "before the file is in place": lambda kill: at_call(7, saliency_file.os, "replace", kill),
    "once the file is in place": (
        lambda kill: at_call(7, saliency_file.os, "replace", kill, after=True)
    ),
    "while the file is written": (
        lambda kill: at_call(5, saliency_file, "_check_values", kill, after=True)
    ),
    "in the second model": lambda kill: at_call(9, passes, "feed", kill),
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(
    world: World, whole: dict[str, bytes], tmp_path: Path, moment: str
) -> None:
    path, out = commands.write_recipe(tmp_path, world.recipe()), tmp_path / "out"
    commands.killed(MOMENTS[moment], path, out, *SMALL_BATCHES)
    found = {file.name for file in out.glob("*.safetensors")}
    assert found <= whole.keys()
    result = succeed(commands.obim_saliency(path, out, *SMALL_BATCHES))
    assert commands.contents(out) == whole  # and nothing hidden beside them
    assert result.stdout.count("(kept") == len(found)
    started_over = moment in ("in the first pass", "before the first checkpoint")
    no_sums = started_over or moment == "once the file is in place"
    assert ("of an interrupted run" in result.stderr) == (not no_sums)
    assert "starting over" not in result.stderr


def test_no_pass_is_run_twice(
    world: World, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after every single pass, each time by an error of another kind."""
    path, out = commands.write_recipe(tmp_path, world.recipe()), tmp_path / "out"
    feed, rows = passes.feed, []

    def fail_next(model: Any, ids: torch.Tensor, *images: Any) -> None:
        if fail_next.passes == 0:
            raise RuntimeError("a loose cable")
        fail_next.passes -= 1
        feed(model, ids, *images)
        rows.extend(map(tuple, ids.tolist()))

    monkeypatch.setattr(passes, "feed", fail_next)
    for attempt in range(6):
        fail_next.passes = 1
        result = commands.obim_saliency(path, out, *SMALL_BATCHES, "--model", world.math)
        gone = f"goes on after {20 * attempt} tokens"
        assert (gone in result.stderr) == (attempt > 0)
        commands.says(result.stderr.splitlines()[-1], "loose cable" if attempt < 5 else "100%")
    assert len(rows) == len(set(rows)) == len(MATH_ROWS)
    name = world.saliency_of(world.math).name
    assert commands.contents(out) == {name: whole[name]}


@pytest.mark.slow
def test_a_real_process_killed_whenever(
    world: World, whole: dict[str, bytes], tmp_path: Path
) -> None:
    path, out = commands.write_recipe(tmp_path, world.recipe()), tmp_path / "out"
    command = [Path(sys.executable).parent / "obim-saliency", path, out, *SMALL_BATCHES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 120
    while not list(out.glob(".*.sums")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    succeed(commands.obim_saliency(path, out, *SMALL_BATCHES))
    assert commands.contents(out) == whole


# --- two commands at once --------------------------------------------------------------------


def until(there: Path) -> None:
    deadline = time.monotonic() + 100
    while not there.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("killed", [False, True], ids=["ends", "killed"])
def test_a_command_waits_for_another_that_measures_the_same_expert(
    world: World,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed: bool,
) -> None:
    path, out = commands.write_recipe(tmp_path, world.recipe()), tmp_path / "out"
    args = (path, out, *SMALL_BATCHES, "--model", world.math)
    amid, waiting = tmp_path / "amid", tmp_path / "waiting"
    feed, check = passes.feed, Ranks.check

    def hold(*inputs: Any) -> None:
        if list(out.glob(".*.sums")):  # one pass is done
            amid.touch()
            until(waiting)
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
        feed(*inputs)

    def wait(ranks: Ranks) -> None:
        waiting.touch()
        check(ranks)

    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # OpenMP's threads did not come along
        signal.alarm(120)
        code = 70
        with contextlib.suppress(BaseException):
            passes.feed = hold
            code = commands.obim_saliency(*args).exit_code
        os._exit(code)
    until(amid)
    monkeypatch.setattr(Ranks, "check", wait)
    result = succeed(commands.obim_saliency(*args))
    _, status = os.waitpid(child, 0)
    assert status == (signal.SIGKILL if killed else 0)
    commands.says(result.stderr, f"{world.math}: waits for another command that writes {out}")
    assert ("(kept" in result.stdout) == (not killed)
    assert ("goes on after" in result.stderr) == killed
    name = world.saliency_of(world.math).name
    assert commands.contents(out) == {name: whole[name]}


def test_where_nothing_can_be_written_what_is_there_is_kept(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(locking.FileLock, "acquire", refuse)
    path = commands.write_recipe(tmp_path, world.recipe())
    result = succeed(commands.obim_saliency(path, world.saliency))
    assert result.stdout.count("(kept") == 2
    message = commands.refusal(commands.obim_saliency(path, tmp_path / "out"))
    commands.says(message, world.math, "cannot be written", "Read-only file system")


# --- what is not the same any more -----------------------------------------------------------


def interrupted(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> tuple[dict[str, Any], Path]:
    """A run of a copied expert on copied data, stopped after its third pass; recipe and folder."""
    data = commands.write_rows(tmp_path / "rows.jsonl", MATH_ROWS)
    calibration = {"data": str(data), "max_length": 48}
    recipe = world.recipe(models=[{"model": str(model), "calibration": calibration}])
    original, calls = passes.feed, iter(range(3))

    def feed(*args: Any) -> None:
        if next(calls, None) is None:
            raise RuntimeError("stopped")
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(passes, "feed", feed)
        path = commands.write_recipe(tmp_path, recipe)
        result = commands.obim_saliency(path, tmp_path / "out", *SMALL_BATCHES)
    commands.says(result.stderr, "stopped")
    return recipe, tmp_path / "out"


def changed_recipe(recipe: dict[str, Any], patch: pytest.MonkeyPatch) -> str:
    recipe["models"][0]["calibration"]["max_length"] = 5
    return "another calibration content_hash, calibration max_length"


def changed_data(recipe: dict[str, Any], patch: pytest.MonkeyPatch) -> str:
    file = Path(recipe["models"][0]["calibration"]["data"])
    file.write_text(file.read_text().replace("2 + 3", "3 + 2"))
    return "another calibration content_hash)"


def changed_model(recipe: dict[str, Any], patch: pytest.MonkeyPatch) -> str:
    model = Path(recipe["models"][0]["model"])
    tensors = checkpoints.read_checkpoint(model)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return "another set of weights)"


def changed_version(recipe: dict[str, Any], patch: pytest.MonkeyPatch) -> str:
    patch.setattr(recording, "__version__", "99.0")
    return "another version of mergekit-obim)"


def damaged(recipe: dict[str, Any], patch: pytest.MonkeyPatch) -> str:
    [sums] = (Path(recipe["models"][0]["model"]).parent / "out").glob(".*.sums")
    sums.write_bytes(sums.read_bytes()[:-1])
    return "cannot be read ("


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [changed_recipe, changed_data, changed_model, changed_version, damaged]
)
def test_sums_of_something_else_are_not_used(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any], pytest.MonkeyPatch], str],
) -> None:
    model = tmp_path / "model"
    checkpoints.write_checkpoint(
        model, checkpoints.read_checkpoint(world.math), checkpoints.llama_config(
            layers=commands.LAYERS, vocabulary=commands.VOCAB_SIZE
        )
    )  # fmt: skip
    commands.byte_tokenizer(model)
    recipe, out = interrupted(world, tmp_path, monkeypatch, model)
    words = change(recipe, monkeypatch)
    path = commands.write_recipe(tmp_path, recipe)
    result = succeed(commands.obim_saliency(path, out, *SMALL_BATCHES))
    [line] = [line for line in result.stderr.splitlines() if "starting over" in line]
    commands.says(line, f"Warning: {model}: starting over", words)
    fresh = tmp_path / "fresh"
    succeed(commands.obim_saliency(path, fresh, *SMALL_BATCHES))
    assert commands.contents(out) == commands.contents(fresh)


# --- checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "t5"])
def test_every_kind_of_sum_goes_on_to_the_same_bits(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of experts and their counts, tied weights, weights without an h."""
    model = ARCHITECTURES[name].build()
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(5, 40, (n,), generator=generator).tolist() for n in (3, 7, 7, 4, 7)]
    feed = passes.feed

    def measured(file: str) -> Any:
        return run_through(
            model, [TokenSequence(ids) for ids in sequences], label=name, batch_size=1,
            checkpoint=Checkpoint(tmp_path / file, {"all": 1}), ranks=Ranks(), quiet=True,
        )  # fmt: skip

    def stop(model: Any, ids: torch.Tensor, *images: Any) -> None:
        feed(model, ids, *images)
        if ids.shape[1] == 4:
            raise RuntimeError("stopped")

    want = measured("whole")
    monkeypatch.setattr(passes, "feed", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        measured("stopped")
    monkeypatch.setattr(passes, "feed", feed)
    got = measured("stopped")
    assert got.unscored() == want.unscored()
    h = want.curvatures()
    assert h
    for parameter, curvature in got.curvatures().items():
        assert torch.equal(curvature.h, h[parameter].h), parameter
        assert curvature.experts == h[parameter].experts


def test_sums_are_saved_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERVAL, "30")
    now = 0.0
    monkeypatch.setattr(resume.time, "monotonic", lambda: now)
    checkpoint = Checkpoint(tmp_path / "a.safetensors", {})
    sums = Sums(3, 2048, {"totals": {"linear:w": torch.rand(2, dtype=torch.float64)}, "rows": {}})
    assert checkpoint.load() == (None, "")
    now = 29.9
    assert not checkpoint.due()
    now = 30.0
    assert checkpoint.due()

    def slow(*args: Any, **kwargs: Any) -> bytes:
        nonlocal now
        now += 10
        return b""

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save", slow)
        checkpoint.save(sums)
    now = 40 + 199.9
    assert not checkpoint.due()  # it took 10 seconds
    now = 40 + 200.0
    assert checkpoint.due()
    checkpoint.save(sums)
    loaded, _ = checkpoint.load()
    assert loaded is not None
    assert (loaded.done, loaded.tokens, loaded.state["rows"]) == (3, 2048, {})
    assert torch.equal(loaded.state["totals"]["linear:w"], sums.state["totals"]["linear:w"])


def test_sums_that_cannot_be_saved_leave_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path / "a.safetensors", {})
    checkpoint.save(Sums(1, 1, {"totals": {}}))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaliencyFileError, match=r"a\.safetensors.*No space left.*goes on"):
        checkpoint.save(Sums(2, 1, {"totals": {}}))
    loaded, _ = checkpoint.load()
    assert loaded is not None
    assert loaded.done == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_only_its_own_leftovers_are_removed(tmp_path: Path) -> None:
    own = [".a.safetensors.x_9.part", ".a.safetensors.0.sums.ab.part", ".a.safetensors.12.sums"]
    folder = tmp_path / ".a.safetensors.3.offload"
    folder.mkdir()
    others = ["a.safetensors", ".b.safetensors.x.part", ".a.safetensors.b.safetensors.0.sums"]
    for name in (*own, *others):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "a.safetensors", sums=False)
    assert not folder.exists()
    assert set(os.listdir(tmp_path)) == {own[2], *others}
    remove_leftovers(tmp_path / "a.safetensors")
    assert set(os.listdir(tmp_path)) == set(others)
