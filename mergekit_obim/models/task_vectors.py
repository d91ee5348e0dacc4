"""The cosines of experts' task vectors over a whole model, for how much their mean is stretched.

A merge goes tensor by tensor, and this takes the whole model. So while the merge is planned,
:class:`Cosines` is told where every tensor is; before the first one is merged, it reads a sample of
each (``kernels.lengths``): some 40 MB of a model of 8B weights.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from mergekit.io import LazyTensorLoader

from mergekit_obim.errors import RecipeError, UnscorableError
from mergekit_obim.kernels.blocks import one_thread
from mergekit_obim.kernels.lengths import RUNS, cosines, mean_cosine, products, stretch_to_one
from mergekit_obim.models.checkpoint import StreamingReader

LOG = logging.getLogger("mergekit_obim.stretch")
# mergekit shows warnings only, unless it is asked for more. What a default came to is no warning,
# and has to be seen.
LOG.setLevel(logging.INFO)

# Where a tensor is: in memory, or under its name in a checkpoint.
Place: TypeAlias = torch.Tensor | tuple[LazyTensorLoader, str]

# Digits after the point. More would depend on the machine's rounding, and a stretch that is copied
# from the message into a recipe makes the same merge.
_DIGITS = 4
_LONGEST = 100.0


@dataclass(frozen=True)
class MeasuredStretch:
    """A stretch that was measured.

    Attributes:
        experts: The K experts.
        cosine: ρ, the mean pairwise cosine of their task vectors.
        error: Its standard error.
        stretch: The factors that follow, from the smallest to the largest: more than one only if
            the experts' weights differ from tensor to tensor.
    """

    experts: list[str]
    cosine: float
    error: float
    stretch: list[float]

    def __str__(self) -> str:
        factors = " to ".join(f"{s:g}" for s in dict.fromkeys((self.stretch[0], self.stretch[-1])))
        return (
            f"stretch {factors}: the task vectors' mean cosine is {self.cosine:.4f} ± "
            f"{self.error:.4f} ({', '.join(self.experts)})"
        )


class Cosines:
    """The cosines between the task vectors of some experts, measured once and when first needed.

    Args:
        base: The base.
        experts: The experts.
    """

    def __init__(self, base: Hashable, experts: Sequence[Hashable]) -> None:
        self._models = (base, *experts)
        self._places: dict[str, list[Place]] = {}
        self._weights: dict[tuple[float, ...], None] = {}
        self._lock = threading.RLock()  # mergekit merges on several GPUs in as many threads
        self._runs: torch.Tensor | None = None
        self._announced = False

    def add(self, name: str, places: Mapping[Hashable, Place | None]) -> None:
        """Tell where a tensor is.

        Args:
            name: The merged tensor's name.
            places: Where each model has it. Where one has none, the tensor is left out.
        """
        found = [place for model in self._models if (place := places.get(model)) is not None]
        if len(found) == len(self._models):
            self._places[name] = found

    def expect(self, weights: Mapping[Hashable, float]) -> None:
        """Tell that a tensor will be merged with these weights of the experts, and stretched."""
        self._weights[tuple(weights.get(expert, 0.0) for expert in self._models[1:])] = None

    def stretch(self, weights: Mapping[Hashable, float]) -> float:
        """Return γ, which makes the weighted mean of these experts as long as each of them.

        Args:
            weights: The experts that take part in a tensor, and their weights w_k.

        Returns:
            :func:`~mergekit_obim.kernels.lengths.stretch_to_one`, to four digits after the point.

        Raises:
            RecipeError: The task vectors cancel, or there are none.
            UnscorableError: A weight of a model is not a finite number.
            CheckpointError: A model's file cannot be read any more.
        """
        listed = [weights.get(expert, 0.0) for expert in self._models[1:]]
        factor = stretch_to_one(listed, cosines(self._measured().sum(0)))
        if factor > _LONGEST:
            names = ", ".join(str(model) for model, w in weights.items() if w)
            raise RecipeError(
                f"stretch: the task vectors of {names} cancel in their mean, so that no factor "
                "makes it as long as one of them; set stretch to a number"
            )
        return round(factor, _DIGITS)

    def outcome(self) -> MeasuredStretch | None:
        """Return the stretch of the whole merge; None if no tensor needs one, or has two experts.

        Raises:
            RecipeError: As :meth:`stretch`, which raises the others too.
        """
        experts = self._models[1:]
        if not self._weights or len(experts) < 2:
            return None
        factors = {self.stretch(dict(zip(experts, w, strict=True))) for w in self._weights}
        found, error = mean_cosine(self._measured())
        return MeasuredStretch([str(e) for e in experts], found, error, sorted(factors))

    def announce(self) -> None:
        """Measure, if a tensor needs it, and log what came of it; doing it again does nothing."""
        with self._lock:
            outcome = None if self._announced else self.outcome()
            self._announced = True
        if outcome:
            LOG.info(str(outcome))

    def _measured(self) -> torch.Tensor:
        """Return the sums of ``kernels.lengths.products`` over all tensors, [RUNS, K, K]."""
        with self._lock:
            if self._runs is None:
                # Two threads would take longer, and round otherwise.
                with one_thread():
                    self._runs = self._measure()
                self._places.clear()  # they may hold whole models
            return self._runs

    def _measure(self) -> torch.Tensor:
        count = len(self._models) - 1
        total = torch.zeros(RUNS, count, count, dtype=torch.float64)
        if count == 1:
            return total
        readers: dict[int, StreamingReader] = {}
        compared = False

        def read(place: Place) -> torch.Tensor:
            if isinstance(place, torch.Tensor):
                return place
            loader, name = place
            if id(loader) not in readers:
                readers[id(loader)] = StreamingReader(loader, len(self._models))
            return readers[id(loader)].load(name)

        # In the order of their layers, whatever order they were planned in: mergekit-pytorch's
        # changes from run to run. Files that are loaded whole are then loaded once.
        for name in sorted(self._places, key=_natural):
            base, *experts = (read(place) for place in self._places[name])
            if any(t.shape != base.shape or not t.is_floating_point() for t in (base, *experts)):
                continue
            try:
                total += products(base, experts, name)
            except UnscorableError as error:
                raise error.of(name, self._models) from error
            compared = True
        for reader in readers.values():
            reader.close()
        if not compared:
            models = ", ".join(map(str, self._models[1:]))
            raise RecipeError(
                f"stretch: {models} and the base {self._models[0]} have no tensor in common by "
                "which to measure it; set stretch to a number"
            )
        return total


def _natural(name: str) -> list[tuple[str, int]]:
    """Return a key that sorts names with the numbers in them as numbers."""
    return [(text, int(number or -1)) for text, number in re.findall(r"(\D*)(\d*)", name)]
