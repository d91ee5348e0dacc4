"""The names that a weight has in an expert's checkpoint, as mergekit looks for it there."""

from __future__ import annotations

from typing import Any

from mergekit.io import LazyTensorLoader


def possible_names(info: Any) -> tuple[str, ...]:
    """The names that mergekit loads a weight by, of which the first that exists counts."""
    return (info.name, *(info.aliases or ()), *(info.tied_names or ()))


def stored_name(loader: LazyTensorLoader, info: Any) -> str | None:
    """The name under which a checkpoint has the weight, if it has it."""
    paths = loader.index.tensor_paths
    return next((name for name in possible_names(info) if name in paths), None)


def scored_names(loader: LazyTensorLoader, info: Any) -> tuple[str, ...]:
    """The names to look the weight's saliency up by.

    A head that is there by itself is not ranked by the saliency of the embeddings, which it would
    be tied to otherwise.
    """
    tied = info.tied_names or ()
    stored = stored_name(loader, info)
    by_itself = stored is not None and stored not in tied
    return tuple(name for name in possible_names(info) if not (by_itself and name in tied))
