"""What many tests look at and none changes."""

from __future__ import annotations

import pytest

import commands


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> commands.World:
    """Made once for each of the test processes."""
    return commands.build_world(tmp_path_factory.mktemp("world"))
