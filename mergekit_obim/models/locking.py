"""Locks, so that of several processes one at a time makes a file or folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_PATIENCE_SECONDS = 1.0


@contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Be the only process on this file system that makes a file or folder.

    The lock is on a hidden file beside it, and is the operating system's: when the process that
    holds it is killed, it is free again.

    Args:
        path: The file or folder; that which it lies in is made if needed.
        waiting: Called about once a second while another process holds the lock. What it raises
            ends the waiting.

    Raises:
        OSError: There can be no lock here, as where the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=_PATIENCE_SECONDS)
        except Timeout:
            waiting()
    try:
        yield
    finally:
        # While it is held: whoever then gets a lock on the removed file notices, and makes another.
        # Windows removes no file that is open; there filelock does it when it lets go.
        with suppress(OSError):
            file.unlink()
        lock.release()
