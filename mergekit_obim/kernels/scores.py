"""What ranks the positions of one expert's tensor: saliency, magnitude or chance.

Every score is non-negative, and exactly zero where the expert does not differ from the
base: such a position is never claimed, since claiming it would change nothing and only
block later experts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from mergekit_obim.kernels.backend import array
from mergekit_obim.kernels.blocks import Part


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The one accumulation dtype: float32 for every checkpoint dtype, float64 for float64 inputs.

    bf16 has 8 significant bits: a difference of two bf16 weights is exact in float32, its
    square is not in bf16.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def task_vector(
    expert: torch.Tensor, base: torch.Tensor, memory: torch.Tensor | None = None
) -> torch.Tensor:
    """δ = θ_k − θ_B (equation 1), in :func:`working_dtype`.

    Args:
        expert: θ_k, any shape and floating dtype.
        base: θ_B, same shape, dtype and device.
        memory: Where the result is to lie, of the working dtype, [elements]; otherwise it
            is new memory.
    """
    if memory is None:
        dtype = working_dtype(base.dtype)
        memory = torch.empty(expert.numel(), dtype=dtype, device=base.device)
    # The subtraction is done after the upcast: in bf16 it would be rounded to 8 bits.
    return memory.view(expert.shape).copy_(expert).sub_(base)


@dataclass(frozen=True)
class Saliency:
    """s = δ² · h: the layer's output error if δ were dropped (equations 5 and 6).

    Attributes:
        h: E[x²] per input feature and its kin (docs/method.md), float32, broadcastable to
            the tensor.
    """

    h: torch.Tensor

    def __call__(self, delta: torch.Tensor, part: Part, shape: torch.Size) -> torch.Tensor:
        return delta.square_().mul_(part.of(self.h.expand(shape)))


@dataclass(frozen=True)
class GivenScores:
    """Scores from a dense saliency file: δ²·h, or any other tool's, one per element.

    Attributes:
        values: Non-negative, of the tensor's shape.
    """

    values: torch.Tensor

    def __call__(self, delta: torch.Tensor, part: Part, shape: torch.Size) -> torch.Tensor:
        scores = array(_differs(delta))
        scores *= array(part.of(self.values))
        return delta


@dataclass(frozen=True)
class Magnitude:
    """s = |δ|: TIES' ranking (the paper's TIES+IM, table 3)."""

    def __call__(self, delta: torch.Tensor, part: Part, shape: torch.Size) -> torch.Tensor:
        return delta.abs_()


@dataclass(frozen=True)
class RandomScores:
    """A random ranking, by key and flat index alone (paper, end of section 3.1).

    A counter-based hash and no generator: every part of the tensor can be ranked by
    itself, on any device, in any order.

    Attributes:
        key: Any integer of 64 bits; see :func:`random_key`.
    """

    key: int

    def __call__(self, delta: torch.Tensor, part: Part, shape: torch.Size) -> torch.Tensor:
        ranking = _splitmix(part.positions(shape, delta.device), self.key)
        # The bits of a positive float32 sort like the integer they spell, so 30 random
        # bits make a ranking without the ties that 24 bits of mantissa would have. From
        # 2^29 on they spell normal numbers; a device may flush others to zero.
        spelled = ranking.bitwise_right_shift_(1).add_(1 << 29).to(torch.int32)
        scores = array(_differs(delta))
        scores *= array(spelled.view(torch.float32))
        return delta


def _differs(delta: torch.Tensor) -> torch.Tensor:
    """1 where δ is not 0, else 0; NaN where δ is not finite, so that it is found. Uses δ up."""
    score = array(delta)
    differs = score != 0
    score *= 0
    score += differs
    return delta


def random_key(*parts: object) -> int:
    """A 64-bit key from a seed, a tensor's name and whatever else tells two rankings apart."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _splitmix(counter: torch.Tensor, key: int) -> torch.Tensor:
    """31 random bits per counter: Steele, Lea and Flood's SplitMix64 finaliser (OOPSLA 2014)."""
    x = (counter * _signed(0x9E3779B97F4A7C15)).add_(key)
    x.bitwise_xor_(_shift(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(_shift(x, 27)).mul_(_signed(0x94D049BB133111EB))
    return _shift(x.bitwise_xor_(_shift(x, 31)), 33)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right without copying the sign, which int64's own shift does."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


Criterion = Saliency | GivenScores | Magnitude | RandomScores


@dataclass(frozen=True)
class Candidate:
    """One expert's tensor and what ranks its positions.

    Attributes:
        expert: θ_k, same shape, dtype and device as ``base``.
        base: θ_B.
        criterion: Ranks the positions.
    """

    expert: torch.Tensor
    base: torch.Tensor
    criterion: Criterion

    def scores(self, part: Part, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of a part of the tensor, in the working dtype, shaped like the part; contiguous.

        ``memory`` is where to put them, as for :func:`task_vector`.
        """
        # Who asks looks whether they are finite; numpy need not warn of it.
        with np.errstate(invalid="ignore", over="ignore"):
            delta = task_vector(part.of(self.expert), part.of(self.base), memory)
            return self.criterion(delta, part, self.base.shape)
