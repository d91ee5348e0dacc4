"""h of whole tiny models, against a slow float64 reference that knows modules, not operations."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import tiny_models
from mergekit_obim.calibration.capture import Curvature, CurvatureCapture
from mergekit_obim.errors import CalibrationError

pytestmark = pytest.mark.usefixtures("one_thread")

SCORED_WHOLE = [name for name in tiny_models.NAMES if name not in ("mixtral", "mamba")]
LENGTHS = (7, 5, 7, 3, 7, 5)


def capture_h(
    model: PreTrainedModel, batches: list[Tensor], **options: Any
) -> tuple[dict[str, Curvature], CurvatureCapture]:
    with CurvatureCapture(model, **options) as capture:
        for batch in batches:
            model(input_ids=batch)
    return capture.curvatures(), capture


def batched(size: int, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Batches of at most `size` sequences of one length each, shortest first."""
    by_length = defaultdict(list)
    for ids in tiny_models.sequences(lengths):
        by_length[len(ids)].append(ids)
    return [
        torch.stack(same[i : i + size])
        for _, same in sorted(by_length.items())
        for i in range(0, len(same), size)
    ]


# -- the reference -----------------------------------------------------------------------------


def reference_h(model: PreTrainedModel) -> dict[str, Tensor]:
    """h in float64, one sequence at a time, by what each *module* is: hooks and closed formulas."""
    sums: dict[tuple[str, str], Tensor] = {}
    counts: dict[tuple[str, str], int] = defaultdict(int)
    first_name = {id(p): name for name, p in model.named_parameters()}

    def add(parameter: Tensor | None, kind: str, total: Tensor, rows: int) -> None:
        if parameter is not None:
            key = (first_name[id(parameter)], kind)
            sums[key] = sums.get(key, torch.zeros_like(total)) + total
            counts[key] += rows

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kind = type(module).__name__
        x = args[0].double()
        rows = x.numel() // x.shape[-1] if x.ndim else 1
        if isinstance(module, nn.Embedding):
            ids = args[0].flatten()
            if kind == "OPTLearnedPositionalEmbedding":
                ids = torch.arange(args[0].shape[1]) + module.offset
            one_hot = torch.nn.functional.one_hot(ids, module.num_embeddings).double()
            scale = float(getattr(module, "scalar_embed_scale", 1.0))
            add(module.weight, "embedding", one_hot.sum(0)[:, None] * scale**2, len(ids))
        elif isinstance(module, nn.Linear | Conv1D):
            square = (x.reshape(rows, -1) ** 2).sum(0)
            shape = (-1, 1) if isinstance(module, Conv1D) else (1, -1)
            add(module.weight, "linear", square.reshape(shape), rows)
            add(module.bias, "bias", torch.full((1,), float(rows)).double(), rows)
        elif "Norm" in kind:
            eps = next(
                getattr(module, n) for n in ("eps", "variance_epsilon") if hasattr(module, n)
            )
            if "RMS" not in kind:
                x = x - x.mean(-1, keepdim=True)
            x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
            add(module.weight, "gain", (x.reshape(rows, -1) ** 2).sum(0), rows)
            add(getattr(module, "bias", None), "bias", torch.full((1,), float(rows)).double(), rows)

    handles = [
        module.register_forward_hook(hook)
        for module in model.modules()
        if not list(module.children()) and list(module.parameters(recurse=False))
    ]
    try:
        with torch.no_grad():
            for ids in tiny_models.sequences(LENGTHS):
                model(input_ids=ids[None])
    finally:
        for handle in handles:
            handle.remove()
    h: dict[str, Any] = {}
    for (name, kind), total in sums.items():
        h[name] = h.get(name, 0) + total / counts[name, kind]
    return h


@cache
def precise_h(name: str) -> dict[str, Tensor]:
    return reference_h(tiny_models.build(name, dtype=torch.float64))


def assert_same_h(got: dict[str, Curvature], want: dict[str, Tensor], rtol: float) -> None:
    assert sorted(got) == sorted(want)
    for name, h in want.items():
        torch.testing.assert_close(
            got[name].h.double(), h, rtol=rtol, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("name", SCORED_WHOLE)
def test_h_equals_the_float64_reference(name: str) -> None:
    want = precise_h(name)
    for dtype, rtol, sizes in ((torch.float64, 2e-6, (4,)), (torch.float32, 1e-5, (1, 2, 4))):
        model = tiny_models.build(name, dtype=dtype)
        for size in sizes:
            got, capture = capture_h(model, batched(size))
            assert_same_h(got, want, rtol)
            assert set(capture.unscored()) == set(dict(model.named_parameters())) - set(want)
    for parameter, curvature in got.items():
        assert curvature.h.dtype == torch.float32
        assert curvature.h.device.type == "cpu"
        assert curvature.rows > 0
        shape = model.get_parameter(parameter).shape
        assert torch.broadcast_shapes(curvature.h.shape, shape) == shape


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORED_WHOLE)
def test_bfloat16_models_are_squared_in_float32(name: str) -> None:
    # Against the model's own bf16 activations; against float32's, rounding in the model counts.
    model = tiny_models.build(name, dtype=torch.bfloat16)
    got, _ = capture_h(model, batched(1))
    assert_same_h(got, reference_h(model), rtol=1e-2)
    for parameter, h in precise_h(name).items():
        assert (got[parameter].h - h).norm() <= 5e-2 * h.norm(), parameter


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORED_WHOLE)
def test_skipping_logits_changes_nothing(name: str) -> None:
    model = tiny_models.build(name)
    full, _ = capture_h(model, batched(2))
    capture = CurvatureCapture(model, skip_logits=True)
    head = model.get_output_embeddings()
    assert capture.skips_logits == (head is not None)
    with capture:
        for batch in batched(2):
            logits = model(input_ids=batch).logits
            if head is not None:
                assert logits.shape == (*batch.shape, 0)
    without = capture.curvatures()
    assert sorted(full) == sorted(without)
    for parameter, curvature in full.items():
        assert torch.equal(curvature.h, without[parameter].h), parameter
        assert curvature.rows == without[parameter].rows
    assert capture.unscored() == {}
    assert model(input_ids=batch).logits.shape[-1] > 0  # the head is itself again


class AfterLogits(nn.Module):
    """A language model whose logits meet another weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.temperature = nn.Parameter(torch.tensor([2.0]))

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids)) * self.temperature


def test_logits_that_are_needed_are_not_skipped() -> None:
    model = AfterLogits()
    capture = CurvatureCapture(model, skip_logits=True)
    assert not capture.skips_logits
    with capture:
        logits = model(torch.tensor([[1, 2]]))
    assert logits.shape == (1, 2, 9)
    h = (logits / model.temperature).pow(2).mean()
    torch.testing.assert_close(capture.curvatures()["temperature"].h, h[None].detach())


def test_state_space_weights_without_a_linear_form_are_named() -> None:
    model = tiny_models.build("mamba")
    got, capture = capture_h(model, batched(2))
    assert set(got) | set(capture.unscored()) == set(dict(model.named_parameters()))
    reasons = {name.rsplit("mixer.")[1]: why for name, why in capture.unscored().items()}
    assert reasons == {"A_log": "no linear form is known for its operation (aten.exp)"}
    want = reference_h(model)
    assert_same_h(
        {n: got[n] for n in want if n in got}, {n: want[n] for n in got if n in want}, 1e-5
    )


# -- single operations -------------------------------------------------------------------------


class Lambda(nn.Module):
    """Parameters w (and others) and a forward made of a function of (self, x)."""

    def __init__(self, function: Any, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def measure(function: Any, x: Tensor, **shapes: tuple[int, ...]) -> CurvatureCapture:
    model = Lambda(function, **shapes)
    with CurvatureCapture(model) as capture:
        model(x)
    return capture


X = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[1, 2, 2], [0, 2, 5]])
FREQUENCY = torch.tensor([1, 1, 3, 0, 0, 1]) / 6
SQUARES = X.pow(2).mean((0, 1))
NORMED = X / (X.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
FUSED_RMS_NORM = getattr(torch.ops.aten, "_fused_rms_norm", None)  # not before torch 2.8


@pytest.mark.parametrize(
    ("function", "shape", "h"),
    [
        (lambda m, x: x @ m.w, (4, 2), SQUARES[:, None]),
        (lambda m, x: x @ m.w.T, (2, 4), SQUARES[None]),
        (lambda m, x: m.w @ x.mT, (2, 4), SQUARES[None]),
        (lambda m, x: torch.einsum("bsd,ed->bse", x, m.w), (2, 4), SQUARES[None]),
        (lambda m, x: x.bfloat16() @ m.w.bfloat16().T, (2, 4), None),
        (lambda m, x: x.transpose(0, 1) @ (m.w + 1).t(), (2, 4), SQUARES[None]),
        (lambda m, x: nn.functional.linear(x[:, 1], m.w), (2, 4), X[:, 1].pow(2).mean(0)[None]),
        (lambda m, x: nn.functional.conv1d(x.mT, m.w.unsqueeze(-1)), (2, 4), SQUARES[None]),
        (lambda m, x: nn.functional.conv1d(x.mT, m.w.mT), (2, 1, 4), SQUARES[None, None]),
        # Few rows: the mean over all.
        (lambda m, x: torch.bmm(x, m.w), (5, 4, 2), SQUARES[None, :, None].expand(5, 4, 1)),
        (lambda m, x: x * m.w, (4,), SQUARES),
        (lambda m, x: x * (1 + m.w), (4,), SQUARES),
        (lambda m, x: x * m.w[None, :, None], (3,), X.pow(2).mean((0, 2))),
        (lambda m, x: x * m.w.T, (4, 3), X.pow(2).mean(0).T),
        (lambda m, x: x * m.w, (), X.pow(2).mean()),
        (lambda m, x: x + m.w, (4,), torch.ones(1)),
        (lambda m, x: x.clone().add_(m.w), (3, 4), torch.ones(1, 1)),
        (lambda m, x: nn.functional.rms_norm(x, (4,), m.w), (4,), None),
        # What rms_norm becomes on accelerators.
        (lambda m, x: FUSED_RMS_NORM(x, [4], m.w, 1e-6), (4,), NORMED.pow(2).mean((0, 1))),
        # Twice the same kind of use: one mean over all rows. Two kinds: the sum of both means.
        (
            lambda m, x: (x @ m.w.T, x[:1] @ m.w.T),
            (2, 4),
            torch.cat([X, X[:1]]).pow(2).mean((0, 1))[None],
        ),
        (
            lambda m, x: (x @ m.w.T, x[:1] @ m.w),
            (4, 4),
            SQUARES[None] + X[:1].pow(2).mean((0, 1))[:, None],
        ),
        # Not as a whole, not linear, or no activation on the other side.
        (lambda m, x: x @ m.w[1:].T, (2, 4), "unscored"),
        (lambda m, x: (x @ m.w.T, m.w.exp()), (2, 4), "unscored"),
        (lambda m, x: (x @ m.w.T, m.w.norm()), (2, 4), "unscored"),
        (lambda m, x: x @ (m.w * 0.5).T, (2, 4), "unscored"),
        (lambda m, x: x @ (m.w * torch.tensor(0.5)).T, (2, 4), "unscored"),
        (lambda m, x: x @ (m.w * torch.ones(2, 4)).T, (2, 4), "unscored"),
        (lambda m, x: x @ (m.w + torch.ones(2, 4)).T, (2, 4), "unscored"),
        (lambda m, x: x @ (m.w @ m.w.T), (4, 4), "unscored"),
        (lambda m, x: x * (m.w / m.w.norm()), (4,), "unscored"),
        (lambda m, x: x * m.w * (m.w.tanh() * m.w), (4,), "unscored"),
        (lambda m, x: m.w[IDS % 5] @ x[0, 0], (5, 3, 4), "unscored"),
        (lambda m, x: (x[0] @ m.w[1], m.w[1].exp()), (5, 4, 2), "unscored"),
        (lambda m, x: x[0] @ m.w[:2].sum(0), (5, 4, 2), "unscored"),
        (lambda m, x: nn.functional.conv1d(x.mT, m.w.transpose(0, 1)), (4, 2, 1), "unscored"),
        (lambda m, x: torch.cat([x, m.w.expand(5, 1, 4)], 1), (1, 1, 4), "unscored"),
        (lambda m, x: (x @ m.w.T, m.w.add_(1)), (2, 4), "unscored"),
        (lambda m, x: torch.where(x > 0, x, m.w), (4,), "unscored"),
        (lambda m, x: torch.add(x, m.w, alpha=2), (4,), "unscored"),
        (lambda m, x: x, (4,), "unscored"),
        (lambda m, x: x[:0] * m.w, (4,), "unscored"),
    ],
)
def test_single_operations(function: Any, shape: tuple[int, ...], h: Any) -> None:
    if "FUSED_RMS_NORM" in function.__code__.co_names and FUSED_RMS_NORM is None:
        pytest.skip("this torch has no fused RMS norm")
    capture = measure(function, X, w=shape)
    if isinstance(h, str):
        assert capture.curvatures() == {}
        assert list(capture.unscored()) == ["w"]
        assert capture.unscored()["w"]
    else:
        assert capture.unscored() == {}
        if h is not None:
            torch.testing.assert_close(capture.curvatures()["w"].h, h)


@pytest.mark.parametrize(
    ("function", "scale"),
    [
        (lambda m, i: nn.functional.embedding(i, m.w) + 0, 1.0),
        (lambda m, i: m.w[i] + 0, 1.0),
        (lambda m, i: m.w[i - 6] + 0, 1.0),
        (lambda m, i: m.w.index_select(0, i.flatten()) + 0, 1.0),
        (lambda m, i: nn.functional.embedding(i, m.w) * 3.0 + 0, 3.0),
        (lambda m, i: nn.functional.embedding(i, m.w).mul_(3.0).view(-1) + 1, 3.0),
        (lambda m, i: torch.tensor(6.0) * nn.functional.embedding(i, m.w).double() / 2.0 + 0, 3.0),
        (lambda m, i: (nn.functional.embedding(i, m.w) * 3.0).softmax(-1), 3.0),
        (lambda m, i: torch.ones(4, 2, 3, 4) + nn.functional.embedding(i, m.w) + 0, 1.0),
        (lambda m, i: [e * 3.0 + e for e in [nn.functional.embedding(i, m.w)]], None),
        (lambda m, i: nn.functional.embedding(i, m.w.T.contiguous().T) + 0, 1.0),
        (lambda m, i: nn.functional.embedding(i, m.w[:6]) * 2 + m.w[:3].sum(), None),
        (lambda m, i: nn.functional.embedding(i, m.w.exp()), None),
        (lambda m, i: nn.functional.embedding(i, m.w), None),  # at what scale, nobody knows
    ],
)
def test_lookups_count_rows_at_their_scale(function: Any, scale: float | None) -> None:
    capture = measure(function, IDS, w=(6, 4))
    if scale is None:
        assert list(capture.unscored()) == ["w"]
    else:
        h = capture.curvatures()["w"].h
        torch.testing.assert_close(h, FREQUENCY[:, None] * scale**2)


def test_weights_made_of_weights_are_unscored() -> None:
    merged = measure(lambda m, x: x @ (m.w + m.b @ m.a).T, X, w=(2, 4), a=(1, 4), b=(2, 1))
    assert set(merged.unscored()) == {"w", "a", "b"}
    apart = measure(lambda m, x: x @ m.w.T + x @ m.a.T @ m.b.T, X, w=(2, 4), a=(1, 4), b=(2, 1))
    assert apart.unscored() == {}
    normed = measure(
        lambda m, x: x @ (m.g * (m.w / m.w.norm(dim=1, keepdim=True))).T, X, w=(2, 4), g=(2, 1)
    )
    assert set(normed.unscored()) == {"w", "g"}
    fused = measure(lambda m, x: torch.addmm(m.w, x[0], m.a), X, w=(3, 2), a=(4, 2))
    assert set(fused.unscored()) == {"w"}  # x may be another weight's


def test_parameters_that_share_a_storage_are_told_apart() -> None:
    flat = torch.randn(16)
    model = Lambda(lambda m, x: (x @ m.w.T, x @ m.v.T * m.g), w=(1, 4), v=(2, 4), g=(2,))
    model.w.data, model.v.data, model.g.data = (
        flat[:4].view(1, 4),
        flat[4:12].view(2, 4),
        flat[12:14],
    )
    with CurvatureCapture(model) as capture:
        model(X)
    got = capture.curvatures()
    torch.testing.assert_close(got["w"].h, SQUARES[None])
    torch.testing.assert_close(got["v"].h, SQUARES[None])
    assert got["g"].h.shape == (2,)


def test_shared_sums_never_outlive_their_input() -> None:
    """Inputs at recycled addresses, and inputs changed between two uses."""
    inputs = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(40)]

    def forward(m: Lambda, x: Tensor) -> None:
        for i, value in enumerate(inputs):
            (value * 1) @ getattr(m, f"w{i}").T  # a temporary: the next one may get its memory
        x = x.clone()
        x @ m.before.T
        x.mul_(2)
        x @ m.after.T

    shapes = {f"w{i}": (2, 4) for i in range(len(inputs))}
    got = measure(forward, X, **shapes, before=(2, 4), after=(2, 4)).curvatures()
    for i, value in enumerate(inputs):
        torch.testing.assert_close(got[f"w{i}"].h, value.pow(2).mean(0)[None])
    torch.testing.assert_close(got["before"].h, SQUARES[None])
    torch.testing.assert_close(got["after"].h, 4 * SQUARES[None])


def test_inputs_are_squared_once_for_all_that_see_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    isfinite = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda t: asked.append(1) or isfinite(t))
    capture_h(tiny_models.build("llama-untied"), batched(1)[:1])
    # Per layer: two norms, qkv, o, gate and up, down; then the last norm and the head.
    assert len(asked) == 6 * tiny_models.LAYERS + 2


# -- runs --------------------------------------------------------------------------------------


def test_a_tied_weight_is_measured_once_under_its_first_name() -> None:
    _, capture = capture_h(tiny_models.build("llama-tied"), batched(4))
    assert capture.tied == {"model.embed_tokens.weight": ("lm_head.weight",)}
    assert "lm_head.weight" not in {**capture.curvatures(), **capture.unscored()}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_activations_name_the_layer(bad: float) -> None:
    model = tiny_models.build("llama-untied")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = bad
    with pytest.raises(
        CalibrationError,
        match=r"LlamaForCausalLM: the input of model\.layers\.1\.self_attn\.o_proj",
    ):
        capture_h(model, batched(1))


def test_squares_that_overflow_are_refused() -> None:
    model = Lambda(lambda m, x: x @ m.w.T, w=(2, 4))
    with (
        pytest.raises(CalibrationError, match="the input of w is not finite"),
        CurvatureCapture(model),
    ):
        model(X * 1e25)


def test_a_run_goes_on_from_its_state() -> None:
    model = tiny_models.build("mixtral")
    batches = batched(2)
    whole, reference = capture_h(model, batches)
    _, first = capture_h(model, batches[:2])
    resumed = CurvatureCapture(model)
    resumed.ledger.load_state(first.ledger.state())
    with resumed:
        for batch in batches[2:]:
            model(input_ids=batch)
    assert resumed.unscored() == reference.unscored()
    got = resumed.curvatures()
    assert list(got) == list(whole)
    assert all(torch.equal(got[n].h, whole[n].h) and got[n].rows == whole[n].rows for n in whole)


def test_the_context_can_be_entered_again() -> None:
    model = tiny_models.build("gpt2")
    batches = batched(2)
    whole, _ = capture_h(model, batches)
    capture = CurvatureCapture(model, skip_logits=True)
    for batch in batches:
        with capture:
            model(input_ids=batch)
    assert_same_h(capture.curvatures(), {n: c.h.double() for n, c in whole.items()}, rtol=0)


def test_what_an_error_ends_counts_for_nothing() -> None:
    model = tiny_models.build("mixtral")
    batches = batched(2)
    _, capture = capture_h(model, batches[:1])
    before = capture.ledger.state()
    before["totals"] = {name: total.clone() for name, total in before["totals"].items()}

    def fail() -> None:
        with capture:
            model(input_ids=batches[1])
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail()
    after = capture.ledger.state()
    assert {key: after[key] for key in ("rows", "unaccounted")} == {
        key: before[key] for key in ("rows", "unaccounted")
    }
    assert after["totals"].keys() == before["totals"].keys()
    assert all(torch.equal(t, before["totals"][name]) for name, t in after["totals"].items())
    with capture:
        model(input_ids=batches[1])
    assert capture.ledger.state()["rows"] != before["rows"]


def test_gradients_are_off_and_inference_mode_is_left() -> None:
    model = tiny_models.build("gpt2")
    with torch.inference_mode():
        got, _ = capture_h(model, batched(4))
    want, _ = capture_h(model, batched(4))
    assert_same_h(got, {n: c.h.double() for n, c in want.items()}, rtol=0)
    with CurvatureCapture(model):
        assert not model(input_ids=batched(1)[0]).logits.requires_grad
    assert torch.is_grad_enabled()


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_models.build("gemma2")
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = batched(1)[0]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        with CurvatureCapture(model):
            during = model(input_ids=ids).logits
    assert torch.equal(logits, during)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with (
        pytest.raises(RuntimeError, match="in the forward"),
        CurvatureCapture(model, skip_logits=True),
    ):
        raise RuntimeError("in the forward")
    assert "forward" not in vars(model.lm_head)
