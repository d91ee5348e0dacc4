"""How large a forward pass may be."""

from __future__ import annotations

import math
import os

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

# On a CPU memory runs out without an error that one could react to, and passes of this many
# tokens keep it busy.
_CPU_TOKENS = 2048
# Of a model that is read from the disk once for every pass, more.
_CPU_TOKENS_OFFLOADED = 16384
# The share of the memory that is free that Gram matrices may take: a quarter of theirs more is
# needed to write them, and the activations want some too.
_GRAM_SHARE = 0.5
# On accelerators half as many are tried where these do not fit. More would gain nothing, and take
# the inner activations of large models past 2**31 elements.
_TOKENS = 32768
# A line of packed rows is shorter, as the trial of it is short: Llama 4 scales its attention by the
# place in the line, whatever the positions say, from 8192 on.
_LINE_TOKENS = 4096


def most_tokens(model: nn.Module, device: torch.device) -> int:
    """Return how many tokens `batch_size: auto` tries in a forward pass, to begin with.

    Args:
        model: The model, on its device or offloaded.
        device: Where it computes.
    """
    if device.type not in ("cpu", "mps"):  # which share their memory with all else
        return _TOKENS
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    return _CPU_TOKENS_OFFLOADED if offloaded else _CPU_TOKENS


def packed_tokens(tokens: int, longest: int) -> int:
    """Return the most tokens of a pass of packed rows.

    Attention compares each token of such a pass with all others before it masks those of other
    rows. So many that its scores take no more memory, and no more time, than in a batch of the
    longest rows.

    Args:
        tokens: The most tokens of a batch of rows of one length.
        longest: The length of the longest row.
    """
    return min(tokens, math.isqrt(tokens * longest), _LINE_TOKENS)


def gram_budget(device: torch.device) -> float:
    """Return how many bytes of memory the Gram matrices of a run may take at a time.

    Args:
        device: Where the model computes, and sums are kept.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        # Other processes of the run on this machine have the same share of its memory.
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return _GRAM_SHARE * free


def out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out, on any device."""
    # accelerate knows what the allocators of CPUs and accelerators say; not the CUDA driver, which
    # speaks first where other processes hold the memory, nor, in its older versions, Metal.
    words = "out of memory" in str(error) or should_reduce_batch_size(error)
    return words or isinstance(error, MemoryError)
