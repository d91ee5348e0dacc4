"""The ledger of a calibration run: sums of squares per weight, and the mean of them, h.

:class:`Ledger` knows nothing of models or operations: it is told of each use of a weight
(:class:`~mergekit_obim.calibration.capture.calls.Use`), adds it up, and can be saved, loaded and
taken back to where it was.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_obim.calibration.capture.calls import Use
from mergekit_obim.calibration.capture.weights import storage_of

# An expert that saw fewer rows than this takes the mean over all of its layer's. A mean of n
# squares is off by about √(2/n): by a quarter at 32, while features differ by factors.
FEWEST_ROWS = 32
# The row of a state under which sums of products stand, beside the kinds of use.
_PRODUCTS = "products"
# Uses of one input follow each other: q, k and v; gate and up.
_RECENT = 8


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
    def like(cls, use: Use, dtype: torch.dtype = torch.float64) -> Term:
        """Return an empty term to which this use and its like can be added."""
        # A batch is summed in float32, but there may be thousands of batches: in float64 adding
        # them up loses nothing that h, in float32, would show. Metal has no float64; its sums stay
        # float32.
        dtype = torch.float32 if use.total.device.type == "mps" else dtype
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

    Attributes:
        later: The weights whose products did not fit the budget, and were not counted.

    Args:
        names: The model's parameters, in its order; a tied one once.
        budget: The most bytes of memory that sums of products may take, but for the first. With a
            budget they are added up in float32, as they are large then.
        done: Weights whose products need not be counted.
    """

    def __init__(
        self, names: Iterable[str], budget: float = math.inf, done: Iterable[str] = ()
    ) -> None:
        self._names = tuple(names)
        self._budget = budget
        self._terms: defaultdict[str, dict[str, Term]] = defaultdict(dict)
        self._refused: dict[str, str] = {}
        # Weights that see one input have one sum, under the name of the first of them.
        self._products: dict[str, Term] = {}
        self._first_to_see: dict[str, str] = {}
        self._done = frozenset(done)
        self.later: set[str] = set()
        self._recent: deque[tuple[Tensor, str]] = deque(maxlen=_RECENT)

    def add(self, use: Use) -> None:
        """Add what one operation says of a weight."""
        terms = self._terms[use.weight.name]
        if use.row not in terms:
            terms[use.row] = Term.like(use)
        terms[use.row].add(use)
        if use.products is not None and len(terms) == 1:
            self._add_products(use)

    def _add_products(self, use: Use) -> None:
        name, sees = use.weight.name, storage_of(use.total)
        if name not in self._first_to_see:
            first = next((who for seen, who in self._recent if storage_of(seen) == sees), name)
            self._first_to_see[name] = first
        if self._first_to_see[name] != name:
            return
        self._recent.append((use.total, name))  # kept, so that no other sum gets its address
        if name in self.later or name in self._done:
            return
        if name not in self._products and not self._has_room(use):
            self.later.add(name)
            return
        assert use.products is not None
        products = use._replace(total=use.products())
        if name not in self._products:
            dtype = torch.float64 if math.isinf(self._budget) else torch.float32
            self._products[name] = Term.like(products, dtype)
        self._products[name].add(products)

    def _has_room(self, use: Use) -> bool:
        """Return whether the Gram matrix of a weight's input, [in, in], fits the budget."""
        if math.isinf(self._budget) or not self._products:
            return True
        counted = len(use.rows) if isinstance(use.rows, Tensor) else 1
        experts = counted if use.expert is None else use.weight.shape[0]
        features = use.total.numel() // counted
        taken = sum(term.total.nbytes for term in self._products.values())
        return taken + 4 * experts * features**2 <= self._budget

    def let_products_go(self) -> set[str]:
        """Free the memory of all products; returns the weights that they were counted for."""
        counted = set(self._products)
        self._products.clear()
        return counted

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

    def products(self) -> dict[str, tuple[str, ...]]:
        """Return the weights whose inputs' products were measured, by the first to see each input.

        Weights that share an input share its products. What was used in other ways too, or on
        other inputs than the first to see them, is left out.
        """
        measured: dict[str, tuple[str, ...]] = {}
        for name in self._names:
            first = self._first_to_see.get(name, "")
            if first not in self._products or self._refused.keys() & {name, first}:
                continue
            own, theirs = self._terms[name], self._terms[first]
            if len(own) != 1 or len(theirs) != 1:
                continue
            [own_term], [term] = own.values(), theirs.values()
            # Sums of squares are equal to the bit where all inputs were the same.
            same = torch.equal(own_term.total.flatten(), term.total.flatten())
            terms = (own_term, term, self._products[first])
            if same and len({(each.experts(), each.all_rows()) for each in terms}) == 1:
                measured[first] = (*measured.get(first, ()), name)
        return measured

    def mean_products(self, name: str) -> Tensor:
        """Return E[x (xᵀΩ)] of a weight's input: G Ω, float32, on the CPU.

        Args:
            name: A key of :meth:`products`.

        Returns:
            [in, r], or [experts, in, r]. An expert with too few rows has the mean over all.
        """
        return self._products[name].mean()

    def state(self) -> dict[str, Any]:
        """Return everything counted so far, in a form that can be saved.

        Returns:
            ``totals``: by ``kind:parameter``, tensors (float64, CPU), not copied where they are on
            the CPU anyway. ``rows``: by the same keys ints, or lists of ints for fused experts.
            ``unaccounted``: by parameter, why it gets no h. ``shared``: by weight, the first to see
            its input. ``later``: :attr:`later`, sorted.
        """
        terms = {
            f"{row}:{name}": term
            for name, by_row in self._terms.items()
            for row, term in by_row.items()
        }
        terms |= {f"{_PRODUCTS}:{name}": term for name, term in self._products.items()}
        return {
            "totals": {key: term.total.cpu() for key, term in terms.items()},
            "rows": {key: list(term.experts()) or term.rows for key, term in terms.items()},
            "unaccounted": dict(self._refused),
            "shared": dict(self._first_to_see),
            "later": sorted(self.later),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave for the same model."""
        self._terms.clear()
        self._products.clear()
        self._refused = dict(state["unaccounted"])
        self._first_to_see = dict(state["shared"])
        self.later = set(state["later"])
        for key, total in state["totals"].items():
            row, _, name = key.partition(":")
            term = Term.from_state(total, state["rows"][key])
            if row != _PRODUCTS:
                self._terms[name][row] = term
            elif name not in self.later:
                self._products[name] = term

    def snapshot(self) -> Ledger:
        """Return a copy, which does not change when this ledger is added to.

        With a budget it has no products: a second copy of them would break it.
        """
        copy = Ledger(self._names, self._budget, self._done)
        copy._first_to_see, copy.later = dict(self._first_to_see), set(self.later)
        if math.isinf(self._budget):
            copy._products = {name: term.copy() for name, term in self._products.items()}
        for name, by_row in self._terms.items():
            copy._terms[name] = {row: term.copy() for row, term in by_row.items()}
        copy._refused = dict(self._refused)
        return copy
