"""Exclusive assignments that were tried and are not in the package, beside those that are.

Merged in memory and scored on validation text: this is how a rule was chosen, before the
commands knew it. ``d`` are the task vectors δ_k and ``h`` their curvatures, [K, …].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.evidence.lab import BASE, TRIO, Lab
from benchmarks.tiny_llama import load

Rule = Callable[[Tensor, Tensor], Tensor]
Claims = Callable[[Tensor], Tensor]  # saliencies -> which may be chosen, both [K, …]


def nearest(stretch: float | None, *, zero: bool = True, among: Claims | None = None) -> Rule:
    """The candidate nearest to the stretched h-weighted mean.

    Args:
        stretch: None for what makes the mean of a tensor as long as its task vectors are.
        zero: 0, the base's value, is a candidate.
        among: Which of the task vectors' elements are.
    """

    def rule(d: Tensor, h: Tensor) -> Tensor:
        factor = _shrinkage(d, h) if stretch is None else stretch
        cost = d * (h.sum(0) * d - 2 * factor * (h * d).sum(0))
        if among:
            cost = cost.where(among(h * d * d), math.inf)
        least, who = cost.min(0)
        chosen = d.gather(0, who[None])[0]
        return chosen * (least < 0) if zero else chosen

    return rule


def _shrinkage(d: Tensor, h: Tensor) -> float:
    """The root mean square of the task vectors, by that of their mean: 1 if they agree."""
    total = h.sum(0)
    mean = (h * d).sum(0) / total.clamp_min(1e-30)
    return float(((total * d * d).sum() / len(d) / (total * mean * mean).sum()).sqrt())


def top(share: float) -> Claims:
    """Each expert's positions of the highest saliency, as large a share of the tensor."""

    def claims(s: Tensor) -> Tensor:
        count = max(1, round(share * s[0].numel()))
        least = s.flatten(1).topk(count).values[:, -1]
        return s >= least.view(-1, *[1] * (s.dim() - 1))

    return claims


def covering(share: float) -> Claims:
    """Each expert's fewest positions that hold as large a share of its saliency in the tensor."""

    def claims(s: Tensor) -> Tensor:
        values = s.flatten(1).double().sort(descending=True).values
        before = values.cumsum(1) - values
        inside = before < share * values.sum(1, keepdim=True)
        least = values.where(inside, math.inf).amin(1)
        return s >= least.view(-1, *[1] * (s.dim() - 1))

    return claims


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
    **{
        f"stretch √3, among each expert's top {share:.0%}": nearest(3**0.5, among=top(share))
        for share in (0.1, 0.2, 0.5)
    },
    **{
        f"stretch √3, among what holds {share:.0%} of its saliency": nearest(
            3**0.5, among=covering(share)
        )
        for share in (0.5, 0.8, 0.95)
    },
    "stretch by the data": nearest(None),
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
