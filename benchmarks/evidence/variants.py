"""Exclusive assignments that were tried and are not in the package, beside those that are.

Merged in memory and scored on validation text: this is how a rule was chosen, before the
commands knew it. ``d`` are the task vectors δ_k and ``h`` their curvatures, [K, …].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.demo import load
from benchmarks.evidence.lab import BASE, TRIO, Lab

Rule = Callable[[Tensor, Tensor], Tensor]


def nearest(stretch: float, *, zero: bool = True) -> Rule:
    """The candidate nearest to the stretched h-weighted mean; ``zero``: 0 is a candidate."""

    def rule(d: Tensor, h: Tensor) -> Tensor:
        cost = d * (h.sum(0) * d - 2 * stretch * (h * d).sum(0))
        least, who = cost.min(0)
        chosen = d.gather(0, who[None])[0]
        return chosen * (least < 0) if zero else chosen

    return rule


def most_salient(d: Tensor, h: Tensor) -> Tensor:
    """The change with the highest saliency: each position is its keenest expert's."""
    return d.gather(0, (h * d * d).argmax(0)[None])[0]


def most_salient_of_elected_sign(d: Tensor, h: Tensor) -> Tensor:
    """The same among those with the sign that the saliency-weighted vote elects."""
    s = h * d * d
    agrees = d.sign() == (s * d.sign()).sum(0).sign()
    return most_salient(d * agrees, h)


def _even(d: Tensor, h: Tensor) -> Tensor:
    """h, scaled so that each expert's saliency sums to 1 in the tensor."""
    return h / (h * d * d).flatten(1).sum(1).clamp_min(1e-30).view(-1, *[1] * (d.dim() - 1))


RULES: dict[str, Rule] = {
    "least error (stretch 1)": nearest(1.0),
    "stretch 1, the base is no candidate": nearest(1.0, zero=False),
    "stretch 1, each expert's saliency summing to 1": lambda d, h: nearest(1.0)(d, _even(d, h)),
    "stretch 1, h = 1": lambda d, h: nearest(1.0)(d, torch.ones_like(h)),
    "nearest, stretch √3": nearest(3**0.5),
    "stretch √3, each expert's saliency summing to 1": lambda d, h: nearest(3**0.5)(d, _even(d, h)),
    "stretch √3, h = 1": lambda d, h: nearest(3**0.5)(d, torch.ones_like(h)),
    "nearest, stretch 2": nearest(2.0),
    "nearest, stretch 3": nearest(3.0),
    "nearest, stretch 100": nearest(100.0),
    "highest saliency": most_salient,
    "highest saliency of the elected sign": most_salient_of_elected_sign,
}


def table_variants(lab: Lab) -> dict[str, Any]:
    """Mean recoveries on validation text, of three experts."""
    base, *experts = (load_file(folder / "model.safetensors") for folder in lab.models(BASE, *TRIO))
    files = [load_file(lab.saliency(task)) for task in TRIO]
    model = load(*lab.models(BASE)).to(lab.device)

    def recovery(rule: Rule) -> dict[str, float]:
        merged = {}
        for name, weight in base.items():
            d = torch.stack([expert[name] - weight for expert in experts])
            h = torch.stack([file[name].expand_as(weight) for file in files])
            merged[name] = weight + rule(d, h)
        model.load_state_dict(merged)
        return lab.recovered(lab.measure(model, TRIO, "validation"), "validation")

    return {name: recovery(rule) for name, rule in RULES.items()}
