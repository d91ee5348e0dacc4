"""``kernels.kinship`` beside numpy, on whole flattened task vectors in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_obim.errors import UnscorableError
from mergekit_obim.kernels import blocks
from mergekit_obim.kernels.kinship import Moments, moments

SHAPES = [(40, 33), (7,), (3, 4, 5), ()]


def family(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    base = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    shared = [0.1 * torch.randn(shape, generator=generator) for shape in SHAPES]
    experts = [
        [
            (b + sign * s + 0.1 * torch.randn(b.shape, generator=generator) + 0.02).to(dtype)
            for b, s in zip(base, shared, strict=True)
        ]
        for sign in (1, -1, 0.5)
    ]
    return base, experts


def flat(tensors: list[torch.Tensor]) -> np.ndarray:
    return torch.cat([tensor.double().reshape(-1) for tensor in tensors]).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_they_are_the_measures_of_the_flattened_vectors(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", 100)  # several blocks a tensor
    base, experts = family(dtype)
    total = Moments.zero(3)
    for k in range(len(SHAPES)):
        total += moments([expert[k] for expert in experts], base[k])
    deltas = np.stack([flat(expert) - flat(base) for expert in experts])
    np.testing.assert_allclose(total.pearson().numpy(), np.corrcoef(deltas), atol=1e-12)
    sizes = np.linalg.norm(deltas, axis=1)
    cosine = deltas @ deltas.T / np.outer(sizes, sizes)
    np.testing.assert_allclose(total.cosine().numpy(), cosine, atol=1e-12)
    assert total.cosine()[0, 1] < 0  # the sign is kept
    distances = np.linalg.norm(deltas[:, None] - deltas[None], axis=2)
    np.testing.assert_allclose(total.euclidean().numpy(), distances, atol=1e-6)
    expected = sizes / np.linalg.norm(flat(base))
    np.testing.assert_allclose(total.relative_sizes().numpy(), expected, rtol=1e-12)
    assert total.count == flat(base).size


def test_strided_inputs_are_left_as_they_are() -> None:
    base, experts = family(torch.float32)
    transposed = [expert[0].T for expert in experts]
    before = [tensor.clone() for tensor in transposed]
    found = moments(transposed, base[0].T)
    same = moments([expert[0] for expert in experts], base[0])
    assert torch.allclose(found.products, same.products, rtol=1e-12)
    for tensor, copy in zip(transposed, before, strict=True):
        assert torch.equal(tensor, copy)


def test_an_expert_that_is_the_base_has_no_direction() -> None:
    base, experts = family(torch.float32)
    found = moments([base[0], experts[0][0]], base[0])
    assert found.cosine()[0].isnan().all()
    assert found.pearson()[0].isnan().all()
    assert found.cosine()[1, 1] == 1
    assert found.relative_sizes()[0] == 0


def test_infinities_are_refused() -> None:
    base, experts = family(torch.float32)
    experts[0][0][3, 3] = float("inf")
    with pytest.raises(UnscorableError, match="not a finite number"):
        moments([expert[0] for expert in experts], base[0])
