"""Fingerprints of weights: small samples that tell whether a weight is the one that was measured.

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
    """A small sample of one weight, as a saliency file keeps it.

    Attributes:
        dtype: The weight's dtype, as torch names it, without ``torch.``.
        shape: The weight's shape.
        values: The bytes of the sampled values, in that dtype, in base64.
    """

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
    """Return the flat indices that a fingerprint samples of a tensor with so many elements.

    They are int64, on the CPU and ascending: [64], 16 runs of 4 from the first element to the
    last; of a smaller tensor all of them, [numel].
    """
    if numel <= _RUNS * _RUN_LENGTH:
        return torch.arange(numel, device="cpu")
    starts = [(numel - _RUN_LENGTH) * run // (_RUNS - 1) for run in range(_RUNS)]
    return torch.tensor([start + i for start in starts for i in range(_RUN_LENGTH)], device="cpu")


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values at :func:`sample_positions`, on the CPU.

    Args:
        tensor: Of any shape, dtype, strides and device.

    Returns:
        [at most 64], of the tensor's dtype.
    """
    positions = sample_positions(tensor.numel()).to(tensor.device)
    if tensor.is_contiguous():
        return tensor.detach().view(-1)[positions].cpu()
    # Indexing along every axis leaves a strided tensor (a transposed view, say) uncopied.
    return tensor.detach()[torch.unravel_index(positions, tensor.shape)].cpu()


def fingerprint(tensor: torch.Tensor) -> Fingerprint:
    """Take the fingerprint of a floating-point weight of any shape, dtype, strides and device."""
    values = sample(tensor).contiguous().view(torch.uint8).numpy().tobytes()
    return Fingerprint(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        values=base64.b64encode(values).decode("ascii"),
    )


def matches(recorded: Fingerprint, tensor: torch.Tensor) -> bool:
    """Return whether a weight can be the one that a fingerprint was taken from.

    Args:
        recorded: The fingerprint.
        tensor: The weight, of any dtype and device. It may have been rounded since, or be what
            the measured one was rounded from.
    """
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
    # Rounded since, or what the recorded one was rounded from; NaN is equal to NaN here.
    return any(
        torch.equal(then.to(coarser).nan_to_num(), now.to(coarser).nan_to_num())
        for coarser in (now.dtype, dtype)
    )
