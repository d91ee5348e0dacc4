"""Going on where a killed run stopped: the sums so far, in a hidden file beside the one to come.

A checkpoint is taken between two batches, and is whole or not there at all. It holds the sums in
the dtype that they are added up in, and the order in which they were begun, so that a run that
goes on from it ends with the same bits as one that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mergekit_obim.errors import SaliencyFileError, one_line
from mergekit_obim.saliency.file import atomic_write

# How often sums are saved, in seconds; 0 is after every batch.
INTERVAL = "MERGEKIT_OBIM_CHECKPOINT_SECONDS"
_DEFAULT_INTERVAL = 30.0
# Where the sums of a mixture of experts are large, saving them takes a 20th of the time at most.
_INTERVAL_PER_SAVING = 20


@dataclass(frozen=True)
class Sums:
    """The sums of a run that is not over, and how far it has come.

    Attributes:
        done: How many of the ordered sequences are in the sums.
        tokens: With `batch_size: auto`, the most tokens of a forward pass, as found so far.
        state: `Ledger.state()`.
    """

    done: int
    tokens: int
    state: dict[str, Any]


def different(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """Return the keys that do not have the same value in two mappings, sorted."""
    return [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]


class Checkpoint:
    """The checkpoint of one expert's run, in one process.

    Attributes:
        path: The checkpoint's own file.
        measurement: A hash of each thing that decides the sums, under the words to name it by.

    Args:
        path: The saliency file that the run is to write.
        measurement: All that decides the sums, JSON-able, under the words to name it by.
        rank: Of the process, which has its own share of the data.
    """

    def __init__(self, path: Path, measurement: Mapping[str, object], rank: int = 0):
        self.path = path.with_name(f".{path.name}.{rank}.sums")
        self.measurement = {words: _hash(value) for words, value in measurement.items()}
        self._interval = float(os.environ.get(INTERVAL, _DEFAULT_INTERVAL))
        self._next = time.monotonic() + self._interval

    def of_part(self, part: int, done: Sequence[str]) -> Checkpoint:
        """Return the checkpoint of a further run over the same data.

        Args:
            part: The number of the run; 0 for this checkpoint itself.
            done: What earlier runs have measured, which this one leaves out.
        """
        if not part:
            return self
        other = copy(self)
        other.path = self.path.with_name(f"{self.path.stem}-{part}.sums")
        other.measurement = {**self.measurement, "earlier runs": _hash([part, *done])}
        return other

    def load(self) -> tuple[Sums | None, str]:
        """Read the sums to go on from.

        Returns:
            The sums, with tensors on the CPU, or None; and why those that are there will not do,
            which is empty where there are none.
        """
        if not self.path.exists():
            return None, ""
        try:
            with safe_open(str(self.path), framework="pt", device="cpu") as file:
                header = json.loads(file.metadata()["obim"])
                if differing := different(header["measurement"], self.measurement):
                    return None, f"are of something else (another {', '.join(differing)})"
                totals = {name: file.get_tensor(str(i)) for i, name in enumerate(header["names"])}
                state = {"totals": totals, **header["state"]}
                return Sums(header["done"], header["tokens"], state), ""
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            return None, f"cannot be read ({one_line(error)})"

    def due(self) -> bool:
        """Return whether it is time to save the sums again."""
        return time.monotonic() >= self._next

    def save(self, sums: Sums) -> None:
        """Write the sums in place of the earlier ones.

        Raises:
            SaliencyFileError: They cannot be written; the earlier ones stay.
        """
        start = time.monotonic()
        totals = list(sums.state["totals"].values())
        header = {
            "measurement": self.measurement,
            "done": sums.done,
            "tokens": sums.tokens,
            "names": list(sums.state["totals"]),  # safetensors keeps no order
            "state": {key: value for key, value in sums.state.items() if key != "totals"},
        }
        tensors: dict[str, torch.Tensor] = {str(i): t.contiguous() for i, t in enumerate(totals)}
        try:
            with atomic_write(self.path) as file:
                file.write(save(tensors, metadata={"obim": json.dumps(header)}))
        except OSError as error:
            raise SaliencyFileError(
                f"{self.path}: the sums so far cannot be saved: {one_line(error)}; with that "
                "mended, the same command goes on from those saved before"
            ) from error
        end = time.monotonic()
        if self._interval:
            self._next = end + max(self._interval, _INTERVAL_PER_SAVING * (end - start))


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def remove_leftovers(path: Path, *, sums: bool = True) -> None:
    """Remove what killed runs left beside a saliency file.

    Args:
        path: The saliency file.
        sums: Whether to remove their sums as well, and not only half-written and offloaded files.
    """
    number = r"\d+(-\d+)?"
    left = rf"({number}\.sums\.)?\w+\.part|\d+\.offload|{number}\.gram"
    left += rf"|{number}\.sums" if sums else ""
    for found in path.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(path.name)}\.({left})", found.name):
            if found.is_dir():
                shutil.rmtree(found, ignore_errors=True)
            else:
                found.unlink(missing_ok=True)
