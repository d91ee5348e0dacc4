"""How a merge is run changes nothing in it: devices, executors, threads, blocks and samples."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from mergekit import multigpu_executor

import checkpoints
import commands
from commands import World, succeed
from mergekit_obim.kernels import blocks, selection

METHODS = ["obim", "ties_obm"]


def merge(world: World, method: str, folder: Path, *options: str) -> dict[str, torch.Tensor]:
    """One merge with every way of ranking in it, scaled so that sums are rounded."""
    parameters = {
        "saliency": str(world.saliency),
        "criterion": [
            {"filter": "embed", "value": "random"},
            {"filter": "mlp", "value": "magnitude"},
            {"value": "saliency"},
        ],
        "lambda": 0.7,
    }
    recipe = world.recipe(merge_method=method, parameters=parameters, dtype="bfloat16")
    path = commands.write_recipe(folder, recipe)
    succeed(commands.mergekit_yaml(path, folder / "out", "--no-copy-tokenizer", *options))
    return checkpoints.read_checkpoint(folder / "out")


@pytest.fixture(scope="session")
def plain(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    return {method: merge(world, method, tmp_path_factory.mktemp(method)) for method in METHODS}


@contextlib.contextmanager
def two_devices() -> Iterator[set[str]]:
    """mergekit's executor for several GPUs, on two devices that are both this CPU.

    Yields:
        The devices that tasks were run on, filled in by then.
    """
    used: set[str] = set()
    device_worker = multigpu_executor.MultiGPUExecutor._device_worker

    def worker(self: Any, task_list: Any, **settings: Any) -> None:
        used.add(str(settings["device"]))
        device_worker(self, task_list, **settings)

    with (
        mock.patch.multiple(
            multigpu_executor,
            get_torch_accelerator_type=lambda *_: "cpu",
            get_torch_accelerator_count=lambda *_: 2,
            get_torch_accelerator_module=lambda *_: SimpleNamespace(synchronize=lambda device: 0),
        ),
        mock.patch.object(multigpu_executor.MultiGPUExecutor, "_device_worker", worker),
        mock.patch.object(torch.cuda, "Stream"),
        mock.patch.object(torch.cuda, "stream"),
    ):
        yield used


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [(), ("--low-cpu-memory",)])
def test_several_devices(
    options: tuple[str, ...],
    method: str,
    world: World,
    plain: dict[str, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    with two_devices() as used:
        merged = merge(world, method, tmp_path, "--multi-gpu", *options)
    assert used == {"cpu:0", "cpu:1"}
    commands.same_tensors(merged, plain[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [
        ("--low-cpu-memory", "--device", "cpu"),
        ("--read-to-gpu", "--device", "cpu"),
        ("--low-cpu-memory", "--read-to-gpu", "--lazy-unpickle", "--device", "cpu"),
    ],
    ids=" ".join,
)
def test_where_tensors_are_kept(
    options: tuple[str, ...],
    method: str,
    world: World,
    plain: dict[str, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    commands.same_tensors(merge(world, method, tmp_path, *options), plain[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("block", "runs"), [(77, 4), (1000, 16), (1 << 18, 1)])
def test_how_tensors_are_cut_and_sampled(
    block: int,
    runs: int,
    method: str,
    world: World,
    plain: dict[str, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    with (
        mock.patch.object(blocks, "CPU_BLOCK", block),
        mock.patch.object(selection, "_RUNS", runs),
        mock.patch.object(selection, "_bracket", wraps=selection._bracket) as bracket,
    ):
        merged = merge(world, method, tmp_path)
    assert bracket.called
    commands.same_tensors(merged, plain[method])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("number", [1, 2])
def test_threads(
    number: int, world: World, plain: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    # mergekit's -j in a process of its own is in test_methods.
    torch.set_num_threads(number)
    inside = []

    def bracket(*arguments: Any) -> tuple[float, float]:
        inside.append(torch.get_num_threads())
        return found(*arguments)

    found = selection._bracket
    with (
        mock.patch.object(selection, "_bracket", bracket),
        mock.patch.multiple(selection, _RUNS=1, _RUN_LENGTH=4),
    ):
        commands.same_tensors(merge(world, "obim", tmp_path), plain["obim"])
    assert torch.get_num_threads() == number  # what else the process does keeps them
    assert set(inside) == {1}


@pytest.mark.usefixtures("threads")
def test_threads_come_back_after_nested_uses_and_errors() -> None:
    torch.set_num_threads(2)
    with contextlib.suppress(ValueError), blocks.one_thread():
        with blocks.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
        raise ValueError
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("threads")
def test_threads_come_back_after_merges_that_overlap() -> None:
    """The second begins while the first runs, and outlives it."""
    torch.set_num_threads(2)
    both, first_left = threading.Barrier(2, timeout=60), threading.Event()

    def first() -> int:
        with blocks.one_thread():
            both.wait()  # the second may begin
            both.wait()  # it has
        first_left.set()
        return torch.get_num_threads()

    def second() -> int:
        both.wait()
        with blocks.one_thread():
            both.wait()
            assert first_left.wait(60)
            assert torch.get_num_threads() == 1
        return torch.get_num_threads()

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(first), pool.submit(second)]
        assert [future.result() for future in futures] == [2, 2]
    with ThreadPoolExecutor(1) as pool:  # a thread that is new
        assert pool.submit(torch.get_num_threads).result() == 2
    assert torch.get_num_threads() == 2


def test_files_let_go_of_in_between(
    world: World, plain: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    with mock.patch("mergekit_obim.methods.base._OPEN_BYTES", 1):
        commands.same_tensors(merge(world, "obim", tmp_path), plain["obim"])
