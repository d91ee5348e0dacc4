"""What ranks the positions of one expert's tensor: saliency, magnitude or chance.

The paper scores a weight by what its layer's output loses without it, s_ij = δ_ij² · h_j with
h_j = E[x_j²], the mean square of input feature j over the expert's calibration tokens (equations 5
and 6). h is the field's importance matrix: what llama.cpp's imatrix files hold, and per token
the square of the activation norm in Wanda's pruning score |W_ij| · ‖x_j‖ (arXiv 2306.11695).

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
    """Return the dtype in which a merge of weights of some dtype computes.

    It is float32 for every checkpoint dtype and float64 for float64. bf16 has 8 significant bits:
    float32 holds the difference of two such weights, and its square, which bf16 would round away.

    Args:
        dtype: Of the base's tensor.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def task_vector(
    expert: torch.Tensor, base: torch.Tensor, memory: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the task vector δ = θ_k − θ_B of equation 1.

    Args:
        expert: θ_k, any shape and floating dtype.
        base: θ_B, same shape, dtype and device.
        memory: Where the result is to lie, of the working dtype, [elements]; otherwise it
            is new memory.

    Returns:
        δ in the :func:`working_dtype`, contiguous, of the tensors' shape.
    """
    if memory is None:
        dtype = working_dtype(base.dtype)
        memory = torch.empty(expert.numel(), dtype=dtype, device=base.device)
    # The subtraction is done after the upcast: in bf16 it would be rounded to 8 bits.
    return memory.view(expert.shape).copy_(expert).sub_(base)


@dataclass(frozen=True)
class Saliency:
    """Ranks by s = δ² · h, the layer's output error if δ were dropped (equations 5 and 6).

    The paper's ½ and the 2 of its Hessian 2 X Xᵀ cancel; no constant would change a ranking within
    one tensor anyway.

    Attributes:
        h: E[x²] per input feature, or what stands for it in another operation (docs/method.md);
            float32, broadcastable to the tensor.
    """

    h: torch.Tensor

    def __call__(self, delta: torch.Tensor, part: Part, shape: torch.Size) -> torch.Tensor:
        # h stays as small as it is: `expand` makes a view, of which the part is another.
        return delta.square_().mul_(part.of(self.h.expand(shape)))


@dataclass(frozen=True)
class GivenScores:
    """Ranks by the scores of a dense saliency file: δ²·h, or any other tool's, one per element.

    Attributes:
        values: Non-negative, float32, of the tensor's shape.
    """

    values: torch.Tensor

    def __call__(self, delta: torch.Tensor, part: Part, shape: torch.Size) -> torch.Tensor:
        scores = array(_differs(delta))
        scores *= array(part.of(self.values))
        return delta


@dataclass(frozen=True)
class Magnitude:
    """Ranks by s = |δ|, as TIES does (the paper's TIES+IM, table 3)."""

    def __call__(self, delta: torch.Tensor, part: Part, shape: torch.Size) -> torch.Tensor:
        return delta.abs_()


@dataclass(frozen=True)
class RandomScores:
    """Ranks at random, by key and flat index alone (paper, end of section 3.1).

    The numbers come from a counter-based hash and not from a generator, so that every part of the
    tensor can be ranked by itself, on any device, in any order.

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
    """Turn δ into 1 where it is not 0, else 0, and NaN where it is not finite, in place."""
    score = array(delta)
    differs = score != 0
    score *= 0  # 0 · ∞ is NaN, which who asks for scores looks for
    score += differs
    return delta


def random_key(*parts: object) -> int:
    """Return a key for :class:`RandomScores`, the same on every machine.

    Args:
        parts: A seed, a tensor's name and whatever else tells two rankings apart.

    Returns:
        A signed integer of 64 bits.
    """
    # Python's own hash() differs from process to process.
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _splitmix(counter: torch.Tensor, key: int) -> torch.Tensor:
    """Return 31 random bits per counter, int64, by the finaliser of SplitMix64.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
    """
    # torch has no unsigned 64-bit arithmetic; two's complement products wrap to the same bits.
    x = (counter * _signed(0x9E3779B97F4A7C15)).add_(key)
    x.bitwise_xor_(_shift(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(_shift(x, 27)).mul_(_signed(0x94D049BB133111EB))
    return _shift(x.bitwise_xor_(_shift(x, 31)), 33)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 right with zeros coming in; int64's own shift copies the sign."""
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
        """Return the scores of a part of the tensor.

        Args:
            part: Which positions.
            memory: Where the scores are to lie, as for :func:`task_vector`.

        Returns:
            Scores in the working dtype, shaped like the part, contiguous. Where the expert or the
            base is not finite, neither are they: the caller looks for that.
        """
        # numpy need not warn of what the caller looks for.
        with np.errstate(invalid="ignore", over="ignore"):
            delta = task_vector(part.of(self.expert), part.of(self.base), memory)
            return self.criterion(delta, part, self.base.shape)
