"""The divergence over {top k, rest}: beside a slow float64 reference, and beside the exact one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mergekit_obim.kernels.divergence import divergence, top_tokens

POSITIONS, VOCABULARY = 7, 50


def softmax(logits: Tensor) -> list[list[float]]:
    rows = []
    for row in logits.double().tolist():
        powers = [math.exp(value - max(row)) for value in row]
        rows.append([power / math.fsum(powers) for power in powers])
    return rows


def reference(teacher: Tensor, student: Tensor, k: int) -> Tensor:
    """Σ p · log(p / q) over the teacher's k likeliest tokens, and all others taken together."""
    result = []
    for p, q in zip(softmax(teacher), softmax(student), strict=True):
        order = sorted(range(len(p)), key=lambda token: -p[token])
        parts = [(p[token], q[token]) for token in order[:k]]
        if order[k:]:
            parts.append(
                (math.fsum(p[token] for token in order[k:]), math.fsum(q[t] for t in order[k:]))
            )
        result.append(math.fsum(a * math.log(a / b) for a, b in parts))
    return torch.tensor(result, dtype=torch.float64)


def logits(seed: int, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(POSITIONS, VOCABULARY, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 4, 49, 50, 1000])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_is_the_reference(k: int, dtype: torch.dtype, close: float) -> None:
    teacher, student = logits(0).to(dtype), logits(1).to(dtype)
    before = teacher.clone(), student.clone()
    kept = top_tokens(teacher, k)
    found = divergence(kept, student)
    assert kept.ids.shape == kept.logs.shape == (POSITIONS, min(k, VOCABULARY))
    assert found.dtype == kept.logs.dtype == dtype
    torch.testing.assert_close(
        found.double(), reference(teacher, student, k), rtol=close, atol=close
    )
    assert torch.equal(teacher, before[0])
    assert torch.equal(student, before[1])


def test_half_precision_is_computed_in_float32() -> None:
    teacher, student = logits(0).bfloat16(), logits(1).bfloat16()
    found = divergence(top_tokens(teacher, 5), student)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), reference(teacher, student, 5), rtol=1e-5, atol=1e-5)


def test_more_tokens_come_closer_from_below_and_all_are_exact() -> None:
    teacher, student = logits(0), logits(1)
    exact = reference(teacher, student, VOCABULARY)
    bounds = [divergence(top_tokens(teacher, k), student) for k in range(1, VOCABULARY + 1)]
    for less, more in itertools.pairwise(bounds):
        assert (less <= more + 1e-12).all()
    torch.testing.assert_close(bounds[-1], exact, rtol=1e-12, atol=1e-12)


def test_few_tokens_are_enough_for_models_that_are_alike() -> None:
    """What the default relies on: of a student near its teacher, the rest hides next to nothing."""
    generator = torch.Generator().manual_seed(0)
    # Zipf's law over a vocabulary of 32,000, as next-token distributions roughly have it.
    teacher = -1.1 * torch.arange(1, 32001, dtype=torch.float64).log().repeat(20, 1)
    student = teacher + 0.3 * torch.randn(teacher.shape, generator=generator, dtype=torch.float64)
    exact = divergence(top_tokens(teacher, 32000), student).mean()
    kept = divergence(top_tokens(teacher, 256), student).mean()
    assert 0.5 * exact < kept < exact
    # What is lost is the same for students that differ by a factor: the ranking stays.
    for factor in (0.5, 2.0):
        other = teacher + factor * (student - teacher)
        lost = divergence(top_tokens(teacher, 256), other).mean() / (
            divergence(top_tokens(teacher, 32000), other).mean()
        )
        assert lost == pytest.approx(float(kept / exact), rel=0.1)


def test_the_same_distribution_has_none_and_a_shift_changes_nothing() -> None:
    teacher = logits(0)
    kept = top_tokens(teacher, 5)
    torch.testing.assert_close(
        divergence(kept, teacher + 100.0), torch.zeros(POSITIONS).double(), rtol=0, atol=1e-12
    )


def test_what_is_excluded() -> None:
    teacher, student = logits(0), logits(1)
    teacher[:, 3] = -torch.inf
    found = divergence(top_tokens(teacher, VOCABULARY), student)
    keep = [token for token in range(VOCABULARY) if token != 3]
    q = torch.tensor(softmax(student), dtype=torch.float64)[:, keep]
    p = torch.tensor(softmax(teacher[:, keep]), dtype=torch.float64)
    torch.testing.assert_close(found, (p * (p / q).log()).sum(-1))
    # The other way round, the student cannot say what the teacher says.
    assert divergence(top_tokens(student, VOCABULARY), teacher).isposinf().all()
    student[0, 0] = torch.nan
    assert divergence(top_tokens(teacher, 5), student)[0].isnan()
