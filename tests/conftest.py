"""What many tests look at and none changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import commands
from mergekit_obim.kernels import blocks


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> commands.World:
    """Made once for each of the test processes."""
    return commands.build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much where others use the cores."""
    with blocks.one_thread():
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives torch back its number of threads, which the test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
