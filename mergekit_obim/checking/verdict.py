"""What a check found, for people and for machines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from mergekit_obim.checking.estimate import Cost
from mergekit_obim.models.findings import Finding
from mergekit_obim.recipe.faults import Fault, fold


@dataclass
class Verdict:
    """What a check found.

    Attributes:
        errors: What makes one of the commands fail, or its result pointless; a line each.
        warnings: What is unusual, or was not looked at.
        fallbacks: Tensors that have no saliency: model, what becomes of them, tensors with why.
        distances: ‖δ‖ / ‖θ_B‖ of each expert, from a sample of the matrices.
        cosines: Of each two experts' task vectors, from the same sample.
        cost: Of both commands, as far as it can be said.
        changes: What `--fix` put right in the recipe that was checked, and why; a line each.
        densities: The most that one tensor's densities sum to, where that is over 1.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    fallbacks: list[dict[str, Any]] = field(default_factory=list)
    distances: dict[str, float] = field(default_factory=dict)
    cosines: dict[str, dict[str, float]] = field(default_factory=dict)
    cost: dict[str, Cost] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    densities: float | None = None

    def add(self, faults: Iterable[Fault]) -> None:
        """Tell of faults, those of many tensors once."""
        for fault in fold(faults):
            if fault.kind == "densities":
                self.densities = fault.amount
            (self.errors if fault.level == "error" else self.warnings).append(str(fault))

    def note(self, findings: Iterable[Finding]) -> None:
        """Add what was found of models."""
        for finding in findings:
            lines = self.warnings if finding.severity == "warning" else self.errors
            lines.append(finding.message)

    def absorb(self, other: Verdict, label: str) -> None:
        """Add what was found of another recipe of the same file, each line after its label."""
        prefix = f"{label}: " if label else ""
        self.errors += [prefix + line for line in other.errors]
        self.warnings += [prefix + line for line in other.warnings]
        self.fallbacks += other.fallbacks
        self.distances |= other.distances
        self.cosines |= other.cosines
        for command, cost in other.cost.items():
            before = self.cost.get(command)
            self.cost[command] = before.then(cost) if before else cost
        self.densities = other.densities

    def to_json(self) -> str:
        """For machines: also whether it is all right."""
        told = {"ok": not self.errors, **asdict(self)}
        del told["densities"]  # which an error tells of
        return json.dumps(told, indent=2)

    def lines(self) -> list[str]:
        """For people: a line each."""
        lines = [f"Changed: {line}" for line in self.changes]
        lines += [f"Error: {line}" for line in self.errors]
        lines += [f"Warning: {line}" for line in self.warnings]
        for fallback in self.fallbacks:
            for reason, count in Counter(fallback["tensors"].values()).items():
                names = [name for name, why in fallback["tensors"].items() if why == reason]
                lines.append(
                    f"Without saliency: model {fallback['model']}: {count} tensor"
                    f"{'s' * (count > 1)}, {fallback['fate']}, as {reason}: {', '.join(names)}"
                )
        for command, cost in self.cost.items():
            lines.append(
                f"{command}: about {_size(cost.disk)} of disk, {_size(cost.memory)} of memory, "
                f"{_duration(cost.seconds)} (rough)"
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


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
