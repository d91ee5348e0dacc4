"""Which layer a tensor belongs to, and which expert comes first there.

The paper rotates the merging order from layer to layer (section 3.2) but does not say
what a layer's number is. Ours is the transformer block's number, read from the tensor's
name: tensors before the blocks (embeddings) count as layer 0, tensors after them (final
norm, head) as layer *number of blocks*.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import TypeVar

T = TypeVar("T")

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
# Names that transformers' architectures give to what stands before the blocks. GPT-NeoX's
# head is called embed_out, so an output embedding has to be excepted.
_BEFORE_BLOCKS = re.compile(r"embed(?!_out)|(?:^|\.)(?:wte|wpe|shared|project_in|conv1|conv2)\.")


def block_of(name: str) -> tuple[str, int] | None:
    """Return the stack of blocks that a tensor belongs to, and the block's number in it.

    >>> block_of("model.layers.3.mlp.up_proj.weight")
    ('model.layers', 3)
    """
    match = _BLOCK.search(name)
    return (name[: match.start()], int(match.group(1))) if match else None


def layer_indices(names: Iterable[str]) -> dict[str, int]:
    """Number the layer of every tensor of one model.

    Args:
        names: Names of all tensors of the (merged) model; which blocks there are is
            read from them.

    Returns:
        For each name its block's number; 0 before the blocks; the number of blocks after
        them. A model with several stacks (an encoder and a decoder) counts the stack
        whose name shares the longest prefix with the tensor's.

    >>> layer_indices(["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight",
    ...                "model.norm.weight"])
    {'model.embed_tokens.weight': 0, 'model.layers.1.mlp.up_proj.weight': 1, 'model.norm.weight': 2}
    """
    names = list(names)
    block_counts: dict[str, int] = {}
    for block in map(block_of, names):
        if block:
            stack, number = block
            block_counts[stack] = max(block_counts.get(stack, 0), number + 1)

    def index(name: str) -> int:
        block = block_of(name)
        if block:
            return block[1]
        if _BEFORE_BLOCKS.search(name):
            return 0
        parts = name.split(".")
        return max(
            block_counts.items(),
            key=lambda stack: (_shared_prefix(parts, stack[0].split(".")), stack[1]),
            default=("", 0),
        )[1]

    return {name: index(name) for name in names}


def _shared_prefix(a: Sequence[str], b: Sequence[str]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


def rotate(experts: Sequence[T], layer: int) -> list[T]:
    """Return a layer's order of the experts: the previous layer's, rotated left by one.

    Paper: section 3.2, "Formally, for layer l, we maintain a list …".

    >>> rotate(["lm", "math", "code"], 4)
    ['math', 'code', 'lm']
    """
    shift = layer % len(experts) if experts else 0
    return [*experts[shift:], *experts[:shift]]
