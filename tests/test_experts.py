"""h of fused experts, against loops over tokens and experts; convolutions against loops too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from architectures import ARCHITECTURES
from mergekit_obim.calibration.capture import Curvature, CurvatureCapture

pytestmark = pytest.mark.usefixtures("one_thread")

MIXTURES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "glm4moe", "deepseek_v3", "gpt_oss", "granitemoe"),
    *("llama4_text", "phimoe", "olmoe", "afmoe_partial", "qwen3_next"),
)
FEWEST_ROWS = 32
LENGTHS = (40, 30, 7)


def measured(model: Any, lengths: tuple[int, ...] = LENGTHS) -> CurvatureCapture:
    with CurvatureCapture(model) as capture:
        for ids in tiny_models.sequences(lengths):
            model(input_ids=ids[None])
    return capture


class NaiveExperts:
    """Σ x², Σ x xᵀ and the count of each expert's tokens, from what its module is called with."""

    def __init__(self, model: nn.Module) -> None:
        self.totals: dict[str, Tensor] = {}
        self.grams: dict[str, Tensor] = {}
        self.counts: dict[str, list[int]] = {}
        for name, module in model.named_modules():
            if any(p.ndim == 3 and "experts" in name for p in module.parameters(recurse=False)):
                module.register_forward_pre_hook(
                    lambda module, args, name=name: self.run(name, module, args)
                )

    def run(self, name: str, module: Any, args: tuple[Tensor, ...]) -> None:
        transposed = getattr(module, "is_transposed", True)  # Llama 4's are
        axis = 1 if transposed else 2
        for expert, x in self.routed(module, args):
            weight = module.gate_up_proj[expert].double()
            gate_up = x @ (weight if transposed else weight.T)
            if getattr(module, "has_bias", False):
                gate_up = gate_up + module.gate_up_proj_bias[expert].double()
                for bias in ("gate_up_proj_bias", "down_proj_bias"):
                    self.add(f"{name}.{bias}", module, expert, torch.ones(1), None)
            if hasattr(module, "_apply_gate"):
                inner = module._apply_gate(gate_up[None])[0]
            else:
                gate, up = gate_up.chunk(2)
                inner = up * module.act_fn(gate)
            self.add(f"{name}.gate_up_proj", module, expert, x, axis)
            self.add(f"{name}.down_proj", module, expert, inner, axis)

    def routed(self, module: Any, args: tuple[Tensor, ...]) -> Iterator[tuple[int, Tensor]]:
        """Every (expert, its token)."""
        if len(args) == 1:  # Llama 4: all tokens for each expert, zeros where it is not theirs
            for expert, tokens in enumerate(args[0].double().chunk(module.num_experts)):
                yield from ((expert, x) for x in tokens if x.abs().sum() > 0)
            return
        hidden, index, _ = args
        for token, slot in itertools.product(range(len(hidden)), range(index.shape[1])):
            yield int(index[token, slot]), hidden[token].double()

    def add(self, name: str, module: nn.Module, expert: int, x: Tensor, axis: int | None) -> None:
        parameter = module.get_parameter(name.rpartition(".")[2])
        shape = [len(parameter)] + [1] * (parameter.ndim - 1)
        if axis:
            shape[axis] = parameter.shape[axis]
        total = self.totals.setdefault(name, torch.zeros(shape, dtype=torch.float64))
        total[expert] += (x * x).reshape(shape[1:])
        outer = torch.outer(x, x).double()
        self.grams.setdefault(name, outer.new_zeros(len(parameter), *outer.shape))[expert] += outer
        self.counts.setdefault(name, [0] * len(parameter))[expert] += 1


def check(got: Curvature, total: Tensor, counts: list[int], name: str) -> None:
    pooled = total.sum(0) / sum(counts)
    wanted = torch.stack(
        [
            total[expert] / count if count >= FEWEST_ROWS else pooled
            for expert, count in enumerate(counts)
        ]
    )
    if name.endswith("bias"):  # the same for all
        torch.testing.assert_close(got.h, torch.ones(1, 1))
        return
    assert got.experts == tuple(counts)
    assert got.pooled == tuple(e for e, count in enumerate(counts) if count < FEWEST_ROWS)
    assert got.rows == sum(counts)
    torch.testing.assert_close(got.h.double(), wanted, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", MIXTURES)
def test_each_experts_h_is_that_of_the_tokens_routed_to_it(name: str) -> None:
    model = ARCHITECTURES[name].build()
    got = measured(model).curvatures()
    naive = NaiveExperts(model)
    with torch.no_grad():
        for ids in tiny_models.sequences(LENGTHS):
            model(input_ids=ids[None])
    fused = [n for n, p in model.named_parameters() if p.ndim == 3 and "experts" in n]
    assert fused
    assert set(fused) <= naive.totals.keys()
    for parameter, total in naive.totals.items():
        check(got[parameter], total, naive.counts[parameter], parameter)


def test_the_cases_have_experts_of_many_and_of_few_tokens() -> None:
    pooled = [c.pooled for c in measured(ARCHITECTURES["mixtral"].build()).curvatures().values()]
    assert any(pooled)
    assert any(0 < len(some) < 5 for some in pooled)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe", "deepseek_v3"])
def test_experts_run_one_by_one_have_the_same_h(name: str) -> None:
    model = ARCHITECTURES[name].build()
    grouped = measured(model).curvatures()
    model.set_experts_implementation("eager")
    capture = measured(model)
    one_by_one = capture.curvatures()
    assert one_by_one.keys() == grouped.keys()
    for parameter, curvature in grouped.items():
        h = one_by_one[parameter].h
        torch.testing.assert_close(h, curvature.h.expand_as(h))
        if curvature.experts:
            assert one_by_one[parameter].experts == curvature.experts


def test_experts_copied_for_each_token_are_named() -> None:
    model = ARCHITECTURES["mixtral"].build()
    model.set_experts_implementation("batched_mm")
    capture = measured(model, (5,))
    fused = {n for n, p in model.named_parameters() if p.ndim == 3}
    assert capture.unscored().keys() == fused
    assert "experts_implementation: grouped_mm" in " ".join(capture.unscored().values())


def test_transformers_own_grouped_product_is_known() -> None:
    """What it falls back to where torch has none; it is registered under a name of its own."""
    model = ARCHITECTURES["mixtral"].build()
    want = measured(model).curvatures()
    import transformers.integrations.moe as moe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
        got = measured(model).curvatures()
    assert got.keys() == want.keys()
    for parameter, curvature in want.items():
        torch.testing.assert_close(got[parameter].h, curvature.h)
        assert got[parameter].experts == curvature.experts


def test_an_expert_that_saw_nothing_takes_the_layers_h() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 2, 4))

        def forward(self, x: Tensor) -> None:
            x[:40] @ self.w[0].T
            x[40:] @ self.w[2].T

    x = torch.randn(45, 4, generator=torch.Generator().manual_seed(0))
    model = One()
    with CurvatureCapture(model) as capture:
        model(x)
    got = capture.curvatures()["w"]
    assert got.experts == (40, 0, 5)
    assert got.pooled == (1, 2)
    everything = x.pow(2).mean(0)
    torch.testing.assert_close(
        got.h, torch.stack([x[:40].pow(2).mean(0), everything, everything])[:, None]
    )
    with CurvatureCapture(model) as idle:
        model(x[:0])
    assert idle.unscored() == {"w": "no token reached it in the calibration run"}


# -- convolutions ------------------------------------------------------------------------------


def naive_convolution(module: Any, x: Tensor) -> tuple[Tensor, int]:
    """h of every weight element, from the output's change when that element alone is raised."""
    weight = module.weight.detach()
    h = torch.zeros(weight.shape, dtype=torch.float64)
    for element in itertools.product(*map(range, weight.shape)):
        module.weight.data = torch.zeros_like(weight)
        module.weight.data[element] = 1
        with torch.no_grad():
            out = module(x) - (0 if module.bias is None else module(torch.zeros_like(x)))
        # One element reaches one output channel.
        h[element] = out.double().square().sum() * out.shape[1] / out.numel()
    module.weight.data = weight
    return h, out.numel() // out.shape[1]


CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "1d strided, padded": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "1d depthwise, as in mamba": (nn.Conv1d(4, 4, 3, groups=4, padding=2), (2, 4, 7)),
    "1d groups, dilated": (nn.Conv1d(4, 6, 2, groups=2, dilation=2, bias=False), (1, 4, 9)),
    "1d circular": (nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 9)),
    "1d without a batch": (nn.Conv1d(3, 4, 3), (3, 9)),
    "2d patches": (nn.Conv2d(3, 5, 4, stride=4, bias=False), (2, 3, 8, 8)),
    "2d": (nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(1, 0), groups=2), (2, 2, 5, 6)),
    "3d": (nn.Conv3d(2, 3, (2, 2, 1), padding=1), (1, 2, 3, 3, 3)),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1), (2, 3, 5)),
    "transposed 2d, groups": (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (1, 4, 3, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    module, shape = CONVOLUTIONS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with CurvatureCapture(module) as capture:
        module(x)
    assert capture.unscored() == {}
    got = capture.curvatures()
    wanted, rows = naive_convolution(module, x if len(shape) == module.weight.ndim else x[None])
    assert got["weight"].rows == rows
    h = got["weight"].h.double().expand_as(wanted)
    torch.testing.assert_close(h, wanted, rtol=1e-5, atol=1e-6)
    if module.bias is not None:
        assert torch.equal(got["bias"].h, torch.ones(1))


def test_convolutions_add_up_over_batches_and_dtypes() -> None:
    module = nn.Conv1d(3, 4, 3)
    x = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(0))
    with CurvatureCapture(module) as whole:
        module(x)
    with CurvatureCapture(module) as parts:
        module(x[:1])
        module(x[1:])
    torch.testing.assert_close(parts.curvatures()["weight"].h, whole.curvatures()["weight"].h)
    narrow = module.bfloat16()
    with CurvatureCapture(narrow) as rounded:
        narrow(x.bfloat16())
    torch.testing.assert_close(
        rounded.curvatures()["weight"].h, whole.curvatures()["weight"].h, rtol=1e-2, atol=0
    )
