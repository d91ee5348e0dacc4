"""The ledger of a calibration run: sums of squares per weight, and the mean of them, h.

:class:`Ledger` knows nothing of models or operations: it is told of each use of a weight
(:class:`~mergekit_obim.calibration.capture.calls.Use`), adds it up, and can be saved, loaded and
taken back to where it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_obim.calibration.capture.calls import Use

# An expert that saw fewer rows than this takes the mean over all of its layer's. A mean of n
# squares is off by about √(2/n): by a quarter at 32, while features differ by factors.
FEWEST_ROWS = 32


@dataclass(frozen=True)
class Curvature:
    """What a calibration run measured for one parameter.

    Attributes:
        h: float32 on the CPU, shaped to broadcast against the parameter: Linear [1, in],
            Conv1D [in, 1], embedding [vocab, 1], embedding tied to a head [vocab, d], norm gain
            [d], bias [1].
        rows: How many rows (tokens) h is the mean of; of tied terms, the largest.
        experts: Of fused experts, how many rows each saw.
    """

    h: Tensor
    rows: int
    experts: tuple[int, ...] = ()

    @property
    def pooled(self) -> tuple[int, ...]:
        """The experts that saw too few rows, whose h is the mean over all of them."""
        return tuple(e for e, rows in enumerate(self.experts) if rows < FEWEST_ROWS)


@dataclass
class Term:
    """A weight's sum over every operation of one kind.

    Attributes:
        total: Σ of squares, float64, which broadcasts against the weight. Of a weight that is used
            expert by expert, its first dim are the experts.
        rows: How many rows it is the sum over; int64 [experts], on the CPU, where each has its own.
    """

    total: Tensor
    rows: int | Tensor

    @classmethod
    def like(cls, use: Use) -> Term:
        """Return an empty term to which this use and its like can be added."""
        # A batch is summed in float32, but there may be thousands of batches: in float64 adding
        # them up loses nothing that h, in float32, would show. Metal has no float64; its sums stay
        # float32.
        dtype = torch.float32 if use.total.device.type == "mps" else torch.float64
        shape = list(use.total.shape)
        if use.expert is not None:
            shape.insert(0, use.weight.shape[0])
        total = torch.zeros(shape, dtype=dtype, device=use.total.device)
        if use.expert is None and not isinstance(use.rows, Tensor):
            return cls(total, 0)
        return cls(total, torch.zeros(shape[0], dtype=torch.int64, device="cpu"))

    def add(self, use: Use) -> None:
        """Add a use of the same kind."""
        if self.total.device != use.total.device:  # the state was loaded from a checkpoint
            self.total = self.total.to(use.total.device)
        if use.expert is None:
            self.total += use.total
            self.rows = self.rows + use.rows
        else:
            assert isinstance(self.rows, Tensor)
            self.total[use.expert] += use.total
            self.rows[use.expert] += use.rows

    def all_rows(self) -> int:
        """Return how many rows it is the sum over, those of all experts together."""
        return int(self.rows.sum()) if isinstance(self.rows, Tensor) else self.rows

    def experts(self) -> tuple[int, ...]:
        """Return how many rows each expert saw; nothing if experts are not told apart."""
        return tuple(self.rows.tolist()) if isinstance(self.rows, Tensor) else ()

    def mean(self) -> Tensor:
        """Return h = E[x²], float32, on the CPU.

        An expert that saw fewer than :data:`FEWEST_ROWS` rows gets the mean over all experts' rows.
        """
        if not isinstance(self.rows, Tensor):
            return (self.total / self.rows).to("cpu", torch.float32)
        total = self.total.cpu()
        rows = self.rows.view(-1, *[1] * (total.ndim - 1))
        pooled = total.sum(0) / rows.sum()  # each row counts once, whichever expert it went to
        return torch.where(rows < FEWEST_ROWS, pooled, total / rows.clamp(min=1)).float()

    def copy(self) -> Term:
        """Return the same sum, which does not change when this one is added to."""
        rows = self.rows.clone() if isinstance(self.rows, Tensor) else self.rows
        return Term(self.total.clone(), rows)

    @classmethod
    def from_state(cls, total: Tensor, rows: int | list[int]) -> Term:
        """Return the term that :meth:`Ledger.state` gave as this."""
        on_cpu = torch.tensor(rows, device="cpu") if isinstance(rows, list) else rows
        return cls(total.clone(), on_cpu)


class Ledger:
    """What a run has counted: sums for each parameter, and which parameters get no h, and why.

    Args:
        names: The model's parameters, in its order; a tied one once.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        self._terms: defaultdict[str, dict[str, Term]] = defaultdict(dict)
        self._refused: dict[str, str] = {}

    def add(self, use: Use) -> None:
        """Add what one operation says of a weight."""
        terms = self._terms[use.weight.name]
        if use.row not in terms:
            terms[use.row] = Term.like(use)
        terms[use.row].add(use)

    def refuse(self, name: str, reason: str) -> None:
        """Give a parameter no h, whatever else is added; the first reason counts."""
        self._refused.setdefault(name, reason)

    def curvatures(self) -> dict[str, Curvature]:
        """Return h of each measured parameter, in the model's order.

        A parameter that is used in several ways, as an embedding and as the head, has the sum of
        the means: what it would cost is the sum of what it would cost at each place.
        """
        measured = {}
        for name in self._names:
            terms = [t for t in self._terms.get(name, {}).values() if t.all_rows() > 0]
            if not terms or name in self._refused:
                continue
            most = max(terms, key=Term.all_rows)
            h = sum((term.mean() for term in terms[1:]), start=terms[0].mean())
            measured[name] = Curvature(h, most.all_rows(), most.experts())
        return measured

    def unscored(self) -> dict[str, str]:
        """Return every other parameter, with the reason why it has no h."""
        reasons = {}
        for name in self._names:
            terms = self._terms.get(name, {})
            if name in self._refused:
                reasons[name] = self._refused[name]
            elif not terms:
                reasons[name] = "never used in the calibration run"
            elif not any(term.all_rows() for term in terms.values()):
                reasons[name] = "no token reached it in the calibration run"
        return reasons

    def state(self) -> dict[str, Any]:
        """Return everything counted so far, in a form that can be saved.

        Returns:
            ``totals``: by ``kind:parameter``, tensors (float64, CPU), not copied where they are on
            the CPU anyway. ``rows``: by the same keys ints, or lists of ints for fused experts.
            ``unaccounted``: by parameter, why it gets no h.
        """
        terms = {
            f"{row}:{name}": term
            for name, by_row in self._terms.items()
            for row, term in by_row.items()
        }
        return {
            "totals": {key: term.total.cpu() for key, term in terms.items()},
            "rows": {key: list(term.experts()) or term.rows for key, term in terms.items()},
            "unaccounted": dict(self._refused),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave for the same model."""
        self._terms.clear()
        for key, total in state["totals"].items():
            row, _, name = key.partition(":")
            self._terms[name][row] = Term.from_state(total, state["rows"][key])
        self._refused = dict(state["unaccounted"])

    def snapshot(self) -> Ledger:
        """Return a copy, which does not change when this ledger is added to."""
        copy = Ledger(self._names)
        for name, by_row in self._terms.items():
            copy._terms[name] = {row: term.copy() for row, term in by_row.items()}
        copy._refused = dict(self._refused)
        return copy
