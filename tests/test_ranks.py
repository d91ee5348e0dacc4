"""Several processes that share the calibration data: real ones, under torchrun, over gloo."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commands
from architectures import ARCHITECTURES
from commands import World
from mergekit_obim.calibration.ranks import Ranks
from mergekit_obim.calibration.resume import INTERVAL
from mergekit_obim.commands import saliency as cli
from mergekit_obim.errors import CalibrationError
from mergekit_obim.models.locking import locked
from tiny_processors import write_charts
from tiny_tokenizers import VOCAB_SIZE, byte_tokenizer

pytestmark = pytest.mark.slow

# As docs/scaling.md has them: torchrun's, then accelerate's.
PAGE = (Path(__file__).resolve().parents[1] / "docs/scaling.md").read_text(encoding="utf-8")
LAUNCHED = re.findall(
    r"^```bash\n((?:torchrun --standalone|accelerate) [^`]*recipe.yml ./saliency)\n```",
    PAGE,
    re.MULTILINE,
)


def start(cwd: Path, command: str, **environment: str) -> subprocess.Popen[str]:
    binaries = Path(sys.executable).parent
    return subprocess.Popen(
        ["bash", "-euc", command],
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


def run(cwd: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    process = start(cwd, command, **environment)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class Pair:
    """Two processes of obim-saliency as torchrun starts them, but forked: nothing is imported.

    Args:
        cwd: Where they run; what they print goes to files there.
        args: The command's arguments.
        patch: What each does first, with its rank.
        environment: What is added to theirs.
    """

    def __init__(
        self,
        cwd: Path,
        *args: object,
        patch: Callable[[int], object] = lambda rank: None,
        **environment: str,
    ) -> None:
        # It outlives the first process, as the launcher's own does.
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.cwd, self.pids = cwd, set[int]()
        launched = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "HF_HUB_OFFLINE": "1",
        }
        for rank in range(2):
            child = os.fork()
            if child:
                self.pids.add(child)
                continue
            code = 70
            try:
                torch.set_num_threads(1)  # OpenMP's threads did not come along
                signal.alarm(300)
                os.environ |= {**launched, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
                os.environ |= environment
                os.chdir(cwd)
                sys.stdout, sys.stderr = (self.output(name).open("a", 1) for name in ("out", "err"))
                patch(rank)
                commands.forget_who_was_read()
                cli.main([*map(str, args)], "obim-saliency")
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)

    def output(self, name: str) -> Path:
        return self.cwd / f"std{name}.log"

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Their exit status, the first to fail taking the other along, and what they printed."""
        code = 0
        while self.pids:
            time.sleep(0.01)
            for pid in list(self.pids):
                ended, status = os.waitpid(pid, os.WNOHANG)
                self.pids.discard(ended)
                if status and not code:
                    code = os.waitstatus_to_exitcode(status)
                    self.kill(signal.SIGTERM)
        texts = [self.output(name).read_text(encoding="utf-8") for name in ("out", "err")]
        return subprocess.CompletedProcess("obim-saliency", code, *texts)

    def kill(self, how: signal.Signals) -> None:
        for pid in self.pids:
            os.kill(pid, how)


def run_pair(cwd: Path, *args: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return Pair(cwd, *args, **more).wait()


def same_but_for_rounding(file: Path, other: Path) -> None:
    assert commands.header(file) == commands.header(other)
    got, want = commands.entries(file), commands.entries(other)
    assert got.keys() == want.keys()
    for name, h in want.items():
        torch.testing.assert_close(got[name], h, rtol=1e-5, atol=1e-9, msg=name)


def test_the_page_shows_both_launchers() -> None:
    assert [command.split()[0] for command in LAUNCHED] == ["torchrun", "accelerate"]


@pytest.mark.parametrize("command", LAUNCHED, ids=lambda command: command.split()[0])
def test_two_processes_write_the_file_of_one(world: World, tmp_path: Path, command: str) -> None:
    commands.write_recipe(tmp_path, world.recipe())
    done = run(tmp_path, command)
    out = tmp_path / "saliency"
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
    command = "torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint "
    command += f"localhost:{port} --no-python obim-saliency {path} %s --device-map auto"
    outs = [tmp_path / "disk0", tmp_path / "disk1"]
    machines = [start(tmp_path, command % out) for out in outs]
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
    done = run_pair(tmp_path, path, tmp_path / "two", *options)
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
    done = run_pair(tmp_path, path, "two")
    assert done.returncode == 0, done.stderr
    same_but_for_rounding(*(next((tmp_path / out).glob("*.safetensors")) for out in ("two", "one")))


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("Error: ")]


def test_an_error_of_all_is_one_line(world: World, tmp_path: Path) -> None:
    recipe = world.recipe()
    recipe["models"][1]["calibration"] = str(tmp_path / "gone.jsonl")
    path = commands.write_recipe(tmp_path, recipe)
    done = run_pair(tmp_path, path, tmp_path / "out")
    assert done.returncode == 1
    [line] = errors(done.stderr)
    commands.says(line, "gone.jsonl", "no such file")
    assert commands.contents(tmp_path / "out") == {}


def only_in_the_second(module: str, name: str, fault: Callable[..., object]) -> Any:
    """What a pair of processes is patched with: `fault` instead of a function of calibration."""

    def patch(rank: int) -> None:
        if rank == 1:
            *owner, last = name.split(".")
            place = importlib.import_module(f"mergekit_obim.calibration.{module}")
            setattr(functools.reduce(getattr, owner, place), last, fault)

    return patch


def raises(error: Exception) -> Callable[..., object]:
    def fault(*_: object, **__: object) -> None:
        raise error

    return fault


@pytest.mark.parametrize(
    ("module", "name", "error", "words"),
    [
        ("passes", "feed", ValueError("a loose cable"), ["loose cable", "forward pass"]),
        ("opening", "prepare", CalibrationError("no data here"), ["no data here"]),
        ("run", "loaded", KeyError("a bug"), ["a bug"]),
    ],
)
def test_an_error_of_one_ends_all_with_one_line(
    world: World, tmp_path: Path, module: str, name: str, error: Exception, words: list[str]
) -> None:
    path = commands.write_recipe(tmp_path, world.recipe())
    patch = only_in_the_second(module, name, raises(error))
    done = run_pair(tmp_path, path, tmp_path / "out", patch=patch)
    assert done.returncode == 1
    [line] = errors(done.stderr)
    commands.says(line, *words)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_error_of_one_ends_all_under_torchrun_too(world: World, tmp_path: Path) -> None:
    # Both run this before anything else.
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import mergekit_obim.calibration.run as run\n"
        "    def loaded(*args, **kwargs):\n"
        "        raise KeyError('a bug')\n"
        "    run.loaded = loaded\n"
    )
    search = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    commands.write_recipe(tmp_path, world.recipe())
    started = time.monotonic()
    done = run(tmp_path, LAUNCHED[0], PYTHONPATH=search)
    assert done.returncode == 1
    [line] = errors(done.stderr)
    commands.says(line, "a bug")
    assert time.monotonic() - started < 120
    assert not list((tmp_path / "saliency").glob("*.safetensors"))


def test_processes_with_other_weights_are_refused(world: World, tmp_path: Path) -> None:
    """As on two machines, each with its own disk."""
    for rank, model in enumerate((world.math, world.code)):
        folder = tmp_path / f"machine{rank}"
        folder.mkdir()
        (folder / "model").symlink_to(model)
    models = [{"model": "./model", "calibration": str(world.math_data)}]
    path = commands.write_recipe(tmp_path, world.recipe(models=models))
    done = run_pair(tmp_path, path, "out", patch=lambda rank: os.chdir(tmp_path / f"machine{rank}"))
    assert done.returncode == 1
    [line] = errors(done.stderr)
    commands.says(line, "model ./model", "another set of weights than process", "same files")


def test_killed_together_they_go_on_to_the_same_bits(world: World, tmp_path: Path) -> None:
    path = commands.write_recipe(tmp_path, world.recipe())
    whole = run_pair(tmp_path, path, "whole", "--batch-size", "1")
    assert whole.returncode == 0, whole.stderr
    killed = Pair(tmp_path, path, "out", "--batch-size", "1", **{INTERVAL: "0"})
    until = time.monotonic() + 200
    while len(list((tmp_path / "out").glob(".*.sums"))) < 2:  # one of each process
        assert time.monotonic() < until
        time.sleep(0.001)
    killed.kill(signal.SIGKILL)
    assert killed.wait().returncode == -signal.SIGKILL
    again = run_pair(tmp_path, path, "out", "--batch-size", "1", **{INTERVAL: "0"})
    assert again.returncode == 0, again.stderr
    assert commands.contents(tmp_path / "out") == commands.contents(tmp_path / "whole")
    # Sums of two are not those of one.
    assert "starting over" not in again.stderr


def test_together_they_wait_for_another_command(world: World, tmp_path: Path) -> None:
    path = commands.write_recipe(tmp_path, world.recipe())
    options = ("--model", world.math)
    file = world.saliency_of(world.math, tmp_path / "out")
    with locked(file, waiting=lambda: None):
        pair = Pair(tmp_path, path, "out", *options)
        said, deadline = pair.output("err"), time.monotonic() + 100
        while not said.exists() or "waits" not in said.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        text = said.read_text()
        commands.says(text, f"{world.math}: waits for another command that writes out")
        assert "Measuring" not in text
    done = pair.wait()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("waits for another command") == 1
    same_but_for_rounding(file, world.saliency_of(world.math))
    assert set(commands.contents(tmp_path / "out")) == {file.name}


def test_sums_of_another_number_of_processes_are_not_used(world: World, tmp_path: Path) -> None:
    path = commands.write_recipe(tmp_path, world.recipe())
    broken = only_in_the_second("ranks", "Ranks.all_reduce", lambda *_: os._exit(9))
    done = run_pair(tmp_path, path, "out", patch=broken, **{INTERVAL: "0"})
    assert done.returncode == 9
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
