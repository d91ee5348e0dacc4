"""Several processes that share the calibration data: real ones, under torchrun, over gloo."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import commands
from architectures import ARCHITECTURES
from commands import World
from mergekit_obim.calibration.ranks import Ranks
from mergekit_obim.calibration.resume import INTERVAL
from tiny_processors import write_charts
from tiny_tokenizers import VOCAB_SIZE, byte_tokenizer

pytestmark = pytest.mark.slow

TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")
TORCHRUN += ("--rdzv-endpoint", "localhost:0")  # any free port
LAUNCHERS: dict[str, Sequence[str]] = {
    "torchrun": (*TORCHRUN, "--no-python", "obim-saliency"),
    "accelerate": (
        *(
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
        ),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        *("--no_python", "obim-saliency"),
    ),
}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return commands.build_world(tmp_path_factory.mktemp("ranks"))


def start(cwd: Path, *args: object, **environment: str) -> subprocess.Popen[str]:
    binaries = Path(sys.executable).parent
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, args)],
        cwd=cwd,
        env={
            **os.environ,
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(cwd: Path, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    process = start(cwd, *args, **environment)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def same_but_for_rounding(file: Path, other: Path) -> None:
    assert commands.header(file) == commands.header(other)
    got, want = commands.entries(file), commands.entries(other)
    assert got.keys() == want.keys()
    for name, h in want.items():
        torch.testing.assert_close(got[name], h, rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_write_the_file_of_one(world: World, tmp_path: Path, launcher: str) -> None:
    path, out = commands.write_recipe(tmp_path, world.recipe()), tmp_path / "out"
    done = run(tmp_path, *LAUNCHERS[launcher], path, out)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in out.iterdir()} == {f.name for f in world.saliency.iterdir()}
    for expert in world.experts:
        same_but_for_rounding(world.saliency_of(expert, out), world.saliency_of(expert))
    # Said once, although two ran: half of the tokens in the first.
    assert done.stdout.count("→") == 2
    assert done.stderr.count("has 10 usable rows") == 1
    assert "60/60" in done.stderr
    assert "120/120" not in done.stderr


def test_two_machines_each_with_its_own_disk(world: World, tmp_path: Path) -> None:
    path = commands.write_recipe(tmp_path, world.recipe())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
    launcher += ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--no-python")
    outs = [tmp_path / "disk0", tmp_path / "disk1"]
    command = (*launcher, "obim-saliency", path)
    machines = [start(tmp_path, *command, out, "--device-map", "auto") for out in outs]
    try:
        for machine in machines:
            _, text = machine.communicate(timeout=300)
            assert machine.returncode == 0, text
    finally:
        for machine in machines:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)
    written, empty = sorted(outs, key=lambda out: len(commands.contents(out)), reverse=True)
    assert commands.contents(empty) == {}
    for expert in world.experts:
        same_but_for_rounding(world.saliency_of(expert, written), world.saliency_of(expert))


def test_experts_and_their_counts_are_added_up(world: World, tmp_path: Path) -> None:
    """Also where a process has no sequence at all, and where the model is partly on disk."""
    model = ARCHITECTURES["qwen3_moe"].build()
    model.resize_token_embeddings(VOCAB_SIZE, mean_resizing=False)
    model.save_pretrained(tmp_path / "moe")
    byte_tokenizer(tmp_path / "moe")
    rows = commands.write_rows(tmp_path / "rows.jsonl", ["one row of three", "another row", "last"])
    single = commands.write_rows(tmp_path / "single.jsonl", ["a single one"])
    recipe = world.recipe(models=[
        {"model": str(tmp_path / "moe"), "calibration": str(rows)},
        {"model": str(world.math), "calibration": str(single)},
    ])  # fmt: skip
    path = commands.write_recipe(tmp_path, recipe)
    commands.succeed(commands.obim_saliency(path, tmp_path / "one"))
    options = ("--device-map", "auto", "--max-memory", "cpu=40KiB")
    done = run(tmp_path, *LAUNCHERS["torchrun"], path, tmp_path / "two", *options)
    assert done.returncode == 0, done.stderr
    for model_path in (tmp_path / "moe", world.math):
        files = [world.saliency_of(model_path, tmp_path / folder) for folder in ("two", "one")]
        same_but_for_rounding(*files)
    experts = json.loads(commands.header(files[0]).get("experts", "{}"))
    experts |= json.loads(
        commands.header(world.saliency_of(tmp_path / "moe", tmp_path / "two"))["experts"]
    )
    tokens = len("one row of three" + "another row" + "last")
    assert [sum(found["tokens"]) for found in experts.values()] == [2 * tokens] * len(experts)


def test_rows_with_images_are_shared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_charts(tmp_path)
    models = [{"model": "models/charts", "calibration": {"data": "data/charts.jsonl"}}]
    recipe = {"merge_method": "obim", "base_model": "models/vision-base", "models": models}
    path = commands.write_recipe(tmp_path, recipe)
    commands.succeed(commands.obim_saliency(path, "one"))
    done = run(tmp_path, *LAUNCHERS["torchrun"], path, "two")
    assert done.returncode == 0, done.stderr
    same_but_for_rounding(*(next((tmp_path / out).glob("*.safetensors")) for out in ("two", "one")))


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("Error: ")]


def test_an_error_of_all_is_one_line(world: World, tmp_path: Path) -> None:
    recipe = world.recipe()
    recipe["models"][1]["calibration"] = str(tmp_path / "gone.jsonl")
    path = commands.write_recipe(tmp_path, recipe)
    done = run(tmp_path, *LAUNCHERS["torchrun"], path, tmp_path / "out")
    assert done.returncode == 1
    [line] = errors(done.stderr)
    commands.says(line, "gone.jsonl", "no such file")
    assert commands.contents(tmp_path / "out") == {}


# What only the second process does: sitecustomize runs in both before anything else.
FAILING = """
import os
if os.environ.get("RANK") == "1":
    import mergekit_obim.calibration.{module} as module
    def fail(*args, **kwargs):
        {fault}
    module.{name} = fail
"""


@pytest.mark.parametrize(
    ("module", "name", "fault", "words"),
    [
        ("passes", "feed", "raise ValueError('a loose cable')", ["loose cable", "forward pass"]),
        ("run", "prepare", "raise module.CalibrationError('no data here')", ["no data here"]),
        ("run", "loaded", "raise KeyError('a bug')", ["a bug"]),
    ],
)
def test_an_error_of_one_ends_all_with_one_line(
    world: World, tmp_path: Path, module: str, name: str, fault: str, words: list[str]
) -> None:
    code = FAILING.format(module=module, name=name, fault=fault)
    (tmp_path / "sitecustomize.py").write_text(code)
    search = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    path = commands.write_recipe(tmp_path, world.recipe())
    started = time.monotonic()
    done = run(tmp_path, *LAUNCHERS["torchrun"], path, tmp_path / "out", PYTHONPATH=search)
    assert done.returncode == 1
    [line] = errors(done.stderr)
    commands.says(line, *words)
    assert time.monotonic() - started < 120
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_processes_with_other_weights_are_refused(world: World, tmp_path: Path) -> None:
    """As on two machines, each with its own disk."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        f"os.chdir({str(tmp_path)!r} + '/machine' + os.environ.get('RANK', '0'))\n"
    )  # fmt: skip
    for rank, model in enumerate((world.math, world.code)):
        folder = tmp_path / f"machine{rank}"
        folder.mkdir()
        (folder / "model").symlink_to(model)
    models = [{"model": "./model", "calibration": str(world.math_data)}]
    path = commands.write_recipe(tmp_path, world.recipe(models=models))
    search = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run(tmp_path, *LAUNCHERS["torchrun"], path, "out", PYTHONPATH=search)
    assert done.returncode == 1
    [line] = errors(done.stderr)
    commands.says(line, "model ./model", "another set of weights than process", "same files")


def test_killed_together_they_go_on_to_the_same_bits(world: World, tmp_path: Path) -> None:
    path = commands.write_recipe(tmp_path, world.recipe())
    command = (*LAUNCHERS["torchrun"], path)
    whole = run(tmp_path, *command, "whole", "--batch-size", "1")
    assert whole.returncode == 0, whole.stderr
    killed = start(tmp_path, *command, "out", "--batch-size", "1", **{INTERVAL: "0"})
    try:
        until = time.monotonic() + 200
        while len(list((tmp_path / "out").glob(".*.sums"))) < 2:  # one of each process
            assert killed.poll() is None, killed.communicate()
            assert time.monotonic() < until
            time.sleep(0.001)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        kill_workers(tmp_path)
        killed.communicate()
    again = run(tmp_path, *command, "out", "--batch-size", "1", **{INTERVAL: "0"})
    assert again.returncode == 0, again.stderr
    assert commands.contents(tmp_path / "out") == commands.contents(tmp_path / "whole")
    # Sums of two are not those of one.
    assert "starting over" not in again.stderr


def kill_workers(cwd: Path) -> None:
    """The launcher's workers have sessions of their own; those that run in this folder are ours."""
    import psutil

    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] == str(cwd):
            process.kill()
            process.wait(60)


def test_sums_of_another_number_of_processes_are_not_used(world: World, tmp_path: Path) -> None:
    path = commands.write_recipe(tmp_path, world.recipe())
    broken = FAILING.format(module="ranks", name="Ranks.add_up", fault="os._exit(9)")
    (tmp_path / "sitecustomize.py").write_text(broken)
    search = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run(tmp_path, *LAUNCHERS["torchrun"], path, "out", PYTHONPATH=search, **{INTERVAL: "0"})
    assert done.returncode == 1
    assert len(list((tmp_path / "out").glob(".*.sums"))) == 2
    result = commands.succeed(commands.obim_saliency(path, tmp_path / "out"))
    commands.says(result.stderr, "starting over", "another number of processes")
    assert commands.contents(tmp_path / "out") == commands.contents(world.saliency)


def test_shares_are_disjoint_and_even() -> None:
    ordered: list[Any] = list(range(11))
    shares = [Ranks(rank, 3).share(ordered) for rank in range(3)]
    assert sorted(index for share in shares for index in share) == ordered
    assert {len(share) for share in shares} == {3, 4}
    assert Ranks().share(ordered) == ordered
