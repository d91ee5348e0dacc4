"""A small sample of a weight, enough to tell that another weight is not the one measured.

A fingerprint keeps up to 64 stored values (16 runs of 4, evenly spaced over the flattened
tensor), so that comparing a whole model reads a few pages of its files and not all of
them. Comparing in the coarser of the two dtypes lets a bf16 copy of an fp32 checkpoint
pass for the same weights; a fine-tune of them does not.
"""

from __future__ import annotations

import base64
from functools import lru_cache

import torch
from pydantic import BaseModel, ConfigDict, field_validator

_RUNS = 16
_RUN_LENGTH = 4


class Fingerprint(BaseModel):
    """What is kept of one weight: dtype name, shape, and the sampled values' bytes in base64."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    shape: tuple[int, ...]
    values: str

    @field_validator("values")
    @classmethod
    def _is_base64(cls, values: str) -> str:
        base64.b64decode(values, validate=True)
        return values


@lru_cache  # a model has few sizes of tensors, and each is looked at in every model
def sample_positions(numel: int) -> torch.Tensor:
    """Flat indices that a fingerprint samples, int64: 16 runs of 4, from the first to the last."""
    if numel <= _RUNS * _RUN_LENGTH:
        return torch.arange(numel, device="cpu")
    starts = [(numel - _RUN_LENGTH) * run // (_RUNS - 1) for run in range(_RUNS)]
    return torch.tensor([start + i for start in starts for i in range(_RUN_LENGTH)], device="cpu")


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """The values at these positions, on the CPU: [at most 64], of the tensor's dtype."""
    positions = sample_positions(tensor.numel()).to(tensor.device)
    if tensor.is_contiguous():
        return tensor.detach().view(-1)[positions].cpu()
    # Indexing along every axis leaves a strided tensor (a transposed view, say) uncopied.
    return tensor.detach()[torch.unravel_index(positions, tensor.shape)].cpu()


def fingerprint(tensor: torch.Tensor) -> Fingerprint:
    """Sample a floating-point weight of any shape, dtype, strides and device."""
    values = sample(tensor).contiguous().view(torch.uint8).numpy().tobytes()
    return Fingerprint(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        values=base64.b64encode(values).decode("ascii"),
    )


def matches(recorded: Fingerprint, tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` can be the weight that ``recorded`` was taken from."""
    if tuple(tensor.shape) != recorded.shape:
        return False
    dtype = getattr(torch, recorded.dtype, None)
    if not isinstance(dtype, torch.dtype):
        return False
    now = sample(tensor)
    raw = bytearray(base64.b64decode(recorded.values))
    if len(raw) != now.numel() * dtype.itemsize:
        return False
    then = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    if dtype != now.dtype:
        coarser = min(dtype, now.dtype, key=lambda d: (d.itemsize, -torch.finfo(d).eps))
        then, now = then.to(coarser), now.to(coarser)
    return bool(torch.equal(then, now))
