"""What passes for the weight that was measured, and what does not."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from mergekit_obim.saliency.fingerprint import Fingerprint, fingerprint, matches, sample_positions

SHAPES = [(), (1,), (0,), (63,), (64,), (65,), (40, 30), (3, 5, 7)]
CASTS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float16),
]


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_is_itself_also_after_json(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = weight(*shape, dtype=dtype)
    recorded = Fingerprint.model_validate_json(fingerprint(tensor).model_dump_json())
    assert recorded == fingerprint(tensor)
    assert matches(recorded, tensor)
    assert len(recorded.values) <= 64 * 8 * 4 / 3 + 4


@pytest.mark.parametrize(("measured", "merged"), CASTS)
def test_a_cast_copy_passes(measured: torch.dtype, merged: torch.dtype) -> None:
    tensor = weight(40, 30, dtype=measured)
    assert matches(fingerprint(tensor), tensor.to(merged))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fine_tune_does_not_pass(dtype: torch.dtype) -> None:
    tensor = weight(40, 30, dtype=dtype)
    assert not matches(fingerprint(tensor), tensor * 1.01)
    assert not matches(fingerprint(tensor.float()), (tensor * 1.01).bfloat16())
    assert not matches(fingerprint(tensor), weight(40, 30, dtype=dtype, seed=1))


def test_every_sampled_position_counts() -> None:
    tensor = weight(37, 41)
    recorded = fingerprint(tensor)
    positions = sample_positions(tensor.numel()).tolist()
    assert len(positions) == len(set(positions)) == 64
    assert {0, tensor.numel() - 1} <= set(positions)
    for position in positions:
        changed = tensor.clone()
        changed.view(-1)[position] += 1
        assert not matches(recorded, changed)


def test_other_shapes_do_not_pass() -> None:
    tensor = weight(4, 6)
    assert not matches(fingerprint(tensor), tensor.view(6, 4))
    assert not matches(fingerprint(tensor), tensor[:3])
    assert not matches(fingerprint(weight(8)), weight(9))


def test_strides_do_not_matter() -> None:
    tensor = weight(40, 30)
    strided = tensor.t().contiguous().t()
    assert not strided.is_contiguous()
    assert fingerprint(strided) == fingerprint(tensor)
    assert matches(fingerprint(tensor), strided)
    row = weight(1, 30)
    assert matches(fingerprint(row.repeat(40, 1)), row.expand(40, 30))


def test_a_weight_with_gradients_is_only_read() -> None:
    tensor = torch.nn.Parameter(weight(40, 30))
    assert matches(fingerprint(tensor), tensor)


@pytest.mark.parametrize(
    "changes", [{"dtype": "float33"}, {"dtype": "float64"}, {"values": "AAA="}]
)
def test_a_damaged_fingerprint_matches_nothing(changes: dict[str, str]) -> None:
    tensor = weight(40, 30)
    assert not matches(fingerprint(tensor).model_copy(update=changes), tensor)


def test_values_that_are_not_base64_are_refused() -> None:
    with pytest.raises(ValidationError, match="values"):
        Fingerprint(dtype="float32", shape=(1,), values="AAA")
