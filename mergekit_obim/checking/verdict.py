"""The result of ``--check``, as text for people and as JSON for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from mergekit_obim.checking.estimate import Cost
from mergekit_obim.models.task_vectors import MeasuredStretch
from mergekit_obim.recipe.faults import Fault, fold


@dataclass
class Verdict:
    """The result of a check.

    Attributes:
        errors: One line for each reason why one of the commands would fail, or its result would
            be pointless.
        warnings: One line for everything that is unusual, or could not be looked at.
        fallbacks: The tensors without saliency, grouped by ``model`` and ``outcome`` (what the
            merge does with them instead); ``tensors`` maps their names to the reason.
        distances: ‖δ‖ / ‖θ_B‖ of each expert, from a sample of the matrices.
        cosines: The cosine of each pair of task vectors, from the same sample.
        stretch: What was measured for ``stretch: auto``; empty where nothing needs it.
        cost: What each of the two commands will cost, as far as it can be estimated.
        changes: One line for each thing that `--fix` corrected in the recipe, with the reason.
        densities: The largest sum of one tensor's densities, if any sum is over 1.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    fallbacks: list[dict[str, Any]] = field(default_factory=list)
    distances: dict[str, float] = field(default_factory=dict)
    cosines: dict[str, dict[str, float]] = field(default_factory=dict)
    stretch: list[MeasuredStretch] = field(default_factory=list)
    cost: dict[str, Cost] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    densities: float | None = None

    def add(self, faults: Iterable[Fault]) -> None:
        """Add faults; the same fault of many tensors becomes one line."""
        for fault in fold(faults):
            if fault.kind == "densities":
                self.densities = fault.amount
            (self.warnings if fault.level == "warning" else self.errors).append(str(fault))

    def absorb(self, other: Verdict, label: str) -> None:
        """Add the verdict on another recipe of the same file, with a label before each line."""
        prefix = f"{label}: " if label else ""
        self.errors += [prefix + line for line in other.errors]
        self.warnings += [prefix + line for line in other.warnings]
        self.fallbacks += other.fallbacks
        self.distances |= other.distances
        self.cosines |= other.cosines
        self.stretch += other.stretch
        for command, cost in other.cost.items():
            before = self.cost.get(command)
            self.cost[command] = before.then(cost) if before else cost
        self.densities = other.densities

    def to_json(self) -> str:
        """Return the result as JSON for programs; ``ok`` says whether there are no errors."""
        content = {"ok": not self.errors, **asdict(self)}
        del content["densities"]  # for `--fix` alone: an error has the number too
        return json.dumps(content, indent=2)

    def lines(self) -> list[str]:
        """Return the result for people, as lines of text that end with the number of errors."""
        lines = [f"Changed: {line}" for line in self.changes]
        lines += [f"Error: {line}" for line in self.errors]
        lines += [f"Warning: {line}" for line in self.warnings]
        for fallback in self.fallbacks:
            for reason, count in Counter(fallback["tensors"].values()).items():
                names = [name for name, why in fallback["tensors"].items() if why == reason]
                lines.append(
                    f"Without saliency: model {fallback['model']}: {count} tensor"
                    f"{'s' * (count > 1)}, {fallback['outcome']}, as {reason}: {', '.join(names)}"
                )
        lines += [f"mergekit-yaml: {stretch}" for stretch in self.stretch]
        for command, cost in self.cost.items():
            lines.append(
                f"{command}: about {_size(cost.disk)} of disk, {_size(cost.memory)} of memory"
            )
        errors, warnings = len(self.errors), len(self.warnings)
        lines.append(
            f"{errors or 'no'} error{'s' * (errors != 1)}, "
            f"{warnings or 'no'} warning{'s' * (warnings != 1)}"
        )
        return lines


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
