"""Several processes that share the calibration data: under ``torchrun``, ``accelerate launch``.

Every process loads the model and measures its share of the sequences; the sums are added up over
all of them, and the first writes. Files, models and data may be on a disk that they share or on
one each. Sums go over gloo, from CPU to CPU, whatever device the models are on.

A process that fails leaves its message in the launcher's key-value store, where the first looks
between any two batches: it ends with that one line, and the launcher ends the others.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from mergekit_obim.calibration.capture import CurvatureCapture
from mergekit_obim.errors import ObimError, OtherProcessError, quoted

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
_POLL_SECONDS = 0.02
# How long a process that failed waits for the first to say so: it looks between batches.
_PATIENCE_SECONDS = 600
_SAYING_SECONDS = 5


class Ranks:
    """This process among the others; by default it is the only one.

    Attributes:
        rank: Its number, from 0.
        world: How many there are.
        local: Its number on its machine.
    """

    def __init__(
        self, rank: int = 0, world: int = 1, local: int = 0, store: Store | None = None
    ) -> None:
        self.rank, self.world, self.local = rank, world, local
        self._store = store
        self._meetings = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, ordered: Sequence[T]) -> Sequence[T]:
        """This process's share: every `world`-th, so that sorted lengths are shared evenly."""
        return ordered[self.rank :: self.world]

    def check(self) -> None:
        """Raises OtherProcessError if another process has failed."""
        if self._store is not None and self._store.check(["error"]):
            raise OtherProcessError(self._store.get("error").decode())

    def meet(self) -> None:
        """Wait for all others to get here.

        Raises:
            OtherProcessError: One will not.
        """
        if self._store is None:
            return
        self._meetings += 1
        key = f"meeting {self._meetings}"
        self._store.add(key, 1)
        while self._store.add(key, 0) < self.world:
            self.check()
            time.sleep(_POLL_SECONDS)

    def machine_by_machine(self, work: Callable[[], T]) -> T:
        """Do it in the first process of each machine, and only then in its others.

        What is downloaded or cached is then downloaded and cached once.
        """
        if self.local:
            self.meet()
        result = work()
        if not self.local:
            self.meet()
        return result

    def all(self, value: T) -> list[T]:
        """Every process's value (JSON-able), in their order; all processes call this together."""
        if self._store is None:
            return [value]
        self._store.set(f"value {self._meetings} {self.rank}", json.dumps(value))
        self.meet()
        keys = [f"value {self._meetings - 1} {rank}" for rank in range(self.world)]
        return [json.loads(text) for text in self._store.multi_get(keys)]

    def add_up(self, capture: CurvatureCapture) -> None:
        """Give every process's capture the sums of all; all processes call this together."""
        if self._store is None:
            return
        state = capture.ledger.state()
        terms = {
            key: (list(total.shape), state["rows"][key]) for key, total in state["totals"].items()
        }
        totals: dict[str, torch.Tensor] = {}
        rows: dict[str, Any] = {}
        unaccounted: dict[str, str] = {}
        for theirs, reasons in self.all((terms, state["unaccounted"])):
            unaccounted = {**reasons, **unaccounted}
            for key, (shape, count) in theirs.items():
                if key not in totals:
                    # A weight that no sequence of this process has reached adds nothing.
                    own = state["totals"].get(key)
                    totals[key] = (
                        torch.zeros(shape, dtype=torch.float64) if own is None else own.double()
                    )
                    rows[key] = count
                elif isinstance(count, list):
                    rows[key] = [a + b for a, b in zip(rows[key], count, strict=True)]
                else:
                    rows[key] += count
        for total in totals.values():
            dist.all_reduce(total)
        capture.ledger.load_state({"totals": totals, "rows": rows, "unaccounted": unaccounted})

    def end(self, error: BaseException) -> NoReturn:
        """End this process after an error, so that only one says what it was."""
        lost = isinstance(error, dist.DistError)
        if not self.first and not lost and not isinstance(error, ObimError):
            traceback.print_exception(error)
        try:
            told = self._tell(error)
        except dist.DistError:
            told = not self.first  # the store has gone with the first process
        if not told and lost:
            raise OtherProcessError(f"the processes lost each other: {quoted(error)}") from error
        if not told:
            raise error
        sys.exit(1)

    def _tell(self, error: BaseException) -> bool:
        """Have the first process say what the error was; whether it has, and this one need not."""
        assert self._store is not None
        if not isinstance(error, OtherProcessError):
            text = error.message if isinstance(error, ObimError) else repr(error)
            self._store.compare_set("error", "", text)
        if self.first:
            self._store.set("told", "")
            return False
        until = time.monotonic() + _PATIENCE_SECONDS
        while not self._store.check(["told"]):
            if time.monotonic() > until:
                return False
            time.sleep(_POLL_SECONDS)
        time.sleep(_SAYING_SECONDS)  # the launcher ends all as soon as one ends
        return True


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that it was launched with, or alone."""
    if not launched():
        yield Ranks()
        return
    # Not at the top: there are builds of torch without them.
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://"))
    dist.init_process_group("gloo", store=PrefixStore("group", store), rank=rank, world_size=world)
    ranks = Ranks(rank, world, int(os.environ.get("LOCAL_RANK", "0")), PrefixStore("obim", store))
    try:
        yield ranks
        ranks.meet()
    except Exception as error:
        ranks.end(error)
    dist.destroy_process_group()
