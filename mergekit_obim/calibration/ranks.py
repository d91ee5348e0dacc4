"""Several processes that share the calibration data, under ``torchrun`` or ``accelerate launch``.

Every process loads the model and measures its share of the sequences; the sums are added up over
all of them, and the first writes. Files, models and data may be on a disk that they share or on
one each. Sums go over gloo, from CPU to CPU, whatever device the models are on.

A process that fails leaves its message in the launcher's key-value store, where the first looks
between any two batches: it ends with that one line, and the launcher ends the others.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, TypeVar

import torch
import torch.distributed as dist

from mergekit_obim.calibration.capture import Ledger
from mergekit_obim.errors import ObimError, OtherProcessError, quoted

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
_POLL_SECONDS = 0.02
# How long a process that failed waits for the first to say so: it looks between batches, and one
# of an offloaded model may take minutes.
_PATIENCE_SECONDS = 600
# How long it then leaves the first to end with its line before it ends itself, on which the
# launcher ends all.
_SAYING_SECONDS = 5


class Ranks:
    """This process among the others; by default it is the only one.

    Attributes:
        rank: Its number, from 0.
        world: How many processes there are.
        local: Its number on its machine, from 0.

    Args:
        rank, world, local: As the attributes.
        store: The launcher's key-value store, if there are others; then torch's process group
            has been initialised.
    """

    def __init__(
        self, rank: int = 0, world: int = 1, local: int = 0, store: Store | None = None
    ) -> None:
        self.rank, self.world, self.local = rank, world, local
        self._store = store
        self._barriers = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks to the user."""
        return self.rank == 0

    def share(self, ordered: Sequence[T]) -> Sequence[T]:
        """Return every `world`-th item, so that sequences sorted by length are shared evenly."""
        return ordered[self.rank :: self.world]

    def check(self) -> None:
        """Look whether another process has failed.

        Raises:
            OtherProcessError: One has; the message is that of its error.
        """
        if self._store is not None and self._store.check(["error"]):
            raise OtherProcessError(self._store.get("error").decode())

    def barrier(self) -> None:
        """Wait until all other processes have got here.

        Raises:
            OtherProcessError: One of them has failed, and will not get here.
        """
        if self._store is None:
            return
        # A count in the store, and not torch's barrier or that of accelerate's PartialState, which
        # calls torch's: it would wait on for a process that has failed.
        self._barriers += 1
        key = f"barrier {self._barriers}"
        self._store.add(key, 1)
        while self._store.add(key, 0) < self.world:
            self.check()
            time.sleep(_POLL_SECONDS)

    def local_first(self, work: Callable[[], T]) -> T:
        """Do some work in the first process of each machine, and only then in its others.

        What is downloaded or cached is then downloaded and cached once.

        Args:
            work: What to do; every process does it.

        Returns:
            What it returns here.

        Raises:
            OtherProcessError: Another process has failed.
        """
        if self.local:
            self.barrier()
        result = work()
        if not self.local:
            self.barrier()
        return result

    def all_gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of ranks; all processes call this together.

        Args:
            value: This process's, which can be pickled.

        Raises:
            OtherProcessError: Another process has failed.
        """
        if self._store is None:
            return [value]
        self.barrier()  # which ends if one fails; what follows would not
        values = [value] * self.world
        dist.all_gather_object(values, value)
        return values

    def all_reduce(self, ledger: Ledger) -> None:
        """Give every process's ledger the sums of all; all processes call this together.

        Args:
            ledger: This process's; changed in place.

        Raises:
            OtherProcessError: Another process has failed.
        """
        if self._store is None:
            return
        state = ledger.state()
        own, counts = state["totals"], state["rows"]
        known = {key: (total.shape, total.dtype, counts[key]) for key, total in own.items()}
        shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        rows: dict[str, torch.Tensor] = {}
        refused: dict[str, str] = {}
        shared: dict[str, str] = {}
        later: set[str] = set()
        found = (known, state["unaccounted"], state["shared"], state["later"])
        for theirs, reasons, first, left in self.all_gather(found):
            refused, shared, later = reasons | refused, first | shared, later.union(left)
            for key, (shape, dtype, count) in theirs.items():
                shapes[key] = shape, dtype
                rows[key] = torch.tensor(count) + rows.get(key, 0)
        totals = {}
        for key, (shape, dtype) in shapes.items():  # in the same order everywhere
            # A weight that no sequence of this process has reached adds nothing.
            totals[key] = own[key].clone() if key in own else torch.zeros(shape, dtype=dtype)
            dist.all_reduce(totals[key])
        added = {key: count.tolist() for key, count in rows.items()}
        ledger.load_state(
            {
                "totals": totals,
                "rows": added,
                "unaccounted": refused,
                "shared": shared,
                "later": sorted(later),
            }
        )

    def end(self, error: BaseException) -> NoReturn:
        """End this process after an error, so that only one process says what it was.

        Args:
            error: What ended its work.

        Raises:
            OtherProcessError: This is the process that has to say it, and the error was another's,
                or a lost connection.
            BaseException: The error itself, where this process has to say it.
        """
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
        """Have the first process say what the error was.

        Returns:
            Whether it has said it, so that this process need not.
        """
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
    """Return whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that this one was launched with, if any, for the time of the context.

    Yields:
        This process among them.
    """
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
        ranks.barrier()
    except Exception as error:
        ranks.end(error)
    dist.destroy_process_group()
