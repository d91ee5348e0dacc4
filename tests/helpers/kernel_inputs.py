"""Tensors for tests of the kernels: every dtype and stride, ties, zeros, blocks of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from hypothesis import settings
from hypothesis import strategies as st

import reference
from mergekit_obim.kernels import blocks, selection
from mergekit_obim.kernels.scores import Candidate, Criterion, GivenScores, Magnitude, Saliency

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SETTINGS = settings(max_examples=100, deadline=None)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in every bit: torch.equal would let 0 pass for -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = BITS[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def criterion_of(expert: reference.Expert) -> Criterion:
    if expert.dense is not None:
        return GivenScores(expert.dense)
    return Saliency(expert.h) if expert.h is not None else Magnitude()


def candidates_of(base: torch.Tensor, experts: Sequence[reference.Expert]) -> list[Candidate]:
    return [Candidate(e.tensor, base, criterion_of(e)) for e in experts]


def densities_of(experts: Sequence[reference.Expert]) -> list[float]:
    return [1 / len(experts) if e.density is None else e.density for e in experts]


def strided(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in other strides."""
    if layout == "transposed" and tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced" and tensor.ndim > 0:
        wide = torch.stack([tensor, torch.full_like(tensor, 77)], dim=-1)
        return wide.flatten(-2)[..., ::2]
    if layout == "offset":
        return torch.cat([torch.full((3,), 77, dtype=tensor.dtype), tensor.reshape(-1)])[3:].view(
            tensor.shape
        )
    return tensor


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Values of one of several kinds, from few and clumped to all different."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["few", "normal", "sparse", "wide"]))
    if kind == "few":
        values = torch.randint(-2, 3, shape, generator=generator) / 2
    elif kind == "normal":
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
    elif kind == "sparse":
        values = torch.randn(shape, generator=generator).mul(
            torch.rand(shape, generator=generator) < 0.1
        )
    else:  # magnitudes from 1e-4 to 1e4
        exponents = torch.rand(shape, generator=generator) * 8 - 4
        values = 10**exponents * torch.randn(shape, generator=generator).sign()
    layout = draw(st.sampled_from(["plain", "transposed", "sliced", "offset"]))
    return strided(values.to(dtype), layout)


@st.composite
def saliencies(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    """A factored h of any shape that broadcasts against `shape`."""
    size = [draw(st.sampled_from([1, full])) for full in shape]
    size = size[draw(st.integers(0, len(size))) :]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if draw(st.booleans()):
        return torch.randint(0, 4, size, generator=generator) / 2
    return torch.rand(size, generator=generator) * 10


@st.composite
def merges(
    draw: st.DrawFn, *, sums_over_one: bool = False
) -> tuple[torch.Tensor, list[reference.Expert], list[int], float]:
    shape = draw(
        st.one_of(
            st.just(()),
            st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple),
            st.just((23, 9)),
        )
    )
    dtype = draw(st.sampled_from(DTYPES))
    base = draw(tensors(shape, dtype))
    if draw(st.integers(0, 9)) == 0 and shape:
        base = base.narrow(0, 0, min(1, shape[0])).expand(shape)
    count = draw(st.integers(1, 8))
    shares = draw(st.lists(st.sampled_from([0, 1, 1, 2, 5]), min_size=count, max_size=count))
    total = sum(shares) / draw(st.sampled_from([1, 1, 0.7, 0.25])) or 1
    scaled = draw(st.booleans())
    experts = []
    for share in shares:
        tensor = draw(tensors(shape, dtype))
        # Partly the base's own values, as after a sparse fine-tune.
        if draw(st.booleans()):
            tensor = torch.where(tensor.abs() > 0.5, tensor, base)
        density = draw(st.sampled_from([0, 0.3, 1])) if sums_over_one else share / total
        expert = reference.Expert(tensor, density)
        kind = draw(st.sampled_from(["h", "dense", "magnitude"]))
        if kind == "h":
            expert.h = draw(saliencies(shape))
        elif kind == "dense":
            expert.dense = draw(tensors(shape, torch.float32)).abs()
        if scaled:
            expert.weight = draw(st.sampled_from([1.0, 0.3, 2.0, -1.0, 0.0]))
        experts.append(expert)
    order = draw(st.permutations(range(count)))
    return base, experts, list(order), draw(st.sampled_from([1.0, 0.7])) if scaled else 1.0


# Any block size and any sample that brackets thresholds: so many runs, of so many positions.
SAMPLES = [(1, 1), (4, 1), (25, 2), (1 << 10, 16)]
CUTS = st.tuples(st.sampled_from([1, 3, 7, 64, 1 << 16]), st.sampled_from(SAMPLES))


@contextmanager
def cut_into(block: int, sample: tuple[int, int]) -> Iterator[None]:
    with (
        mock.patch.object(blocks, "CPU_BLOCK", block),
        mock.patch.multiple(selection, _RUNS=sample[0], _RUN_LENGTH=sample[1]),
    ):
        yield


def big_merge() -> tuple[torch.Tensor, list[reference.Expert], list[int]]:
    """Several blocks of the real size, so large enough for several threads to share the work."""
    generator = torch.Generator().manual_seed(0)
    shape = (900, 950)
    base = torch.randn(shape, generator=generator).bfloat16()
    experts = []
    for density in (0.2, 0.5, 0.1):
        delta = torch.randn(shape, generator=generator) * 0.05
        h = torch.rand(1, shape[1], generator=generator) ** 4
        experts.append(reference.Expert((base + delta).bfloat16(), density, h=h))
    experts[2].h = None
    return base, experts, [1, 2, 0]
