"""Weights in memory: which of them are one and the same tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def aliases_of(models: Sequence[Mapping[str, Tensor]]) -> dict[str, str]:
    """Map each further name of a tensor that goes by several to its first, if in every model."""
    found: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name in models[0]:
        if not all(name in weights and weights[name].numel() for weights in models):
            continue
        if any(weights[name].is_meta for weights in models):
            continue  # offloaded: all such have the address 0
        places = tuple(
            (t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (w[name] for w in models)
        )
        if (first := found.setdefault(places, name)) != name:
            aliases[name] = first
    return aliases
