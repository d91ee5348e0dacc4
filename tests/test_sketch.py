"""Sketches of Gram matrices, and the matrices, from the forward pass to the saliency file."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mergekit.common import get_auto_cls
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import commands
import mergekit_obim
import tiny_models
from architectures import ARCHITECTURES
from commands import MATH_ROWS, World, refusal, says, succeed
from mergekit_obim.calibration import passes, products, resume
from mergekit_obim.calibration.capture import CurvatureCapture
from mergekit_obim.errors import SaliencyFileError
from mergekit_obim.kernels.gram import draw_test_matrix, pack_triangle, unpack_triangle
from mergekit_obim.saliency.file import SaliencyFile
from test_experts import FEWEST_ROWS, LENGTHS, MIXTURES, NaiveExperts
from test_mixtures import recipe_for, write_models
from tiny_tokenizers import byte_ids

pytestmark = pytest.mark.usefixtures("one_thread")

R = 8


# --- the reference ---------------------------------------------------------------------------


def gram_matrices(model: nn.Module, sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """E[x xᵀ] of every linear layer's input in float64, one sequence at a time."""
    totals: dict[str, Tensor] = {}
    rows: dict[str, int] = defaultdict(int)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str) -> None:
        x = args[0].double().reshape(-1, args[0].shape[-1])
        totals[name] = totals.get(name, 0) + x.T @ x
        rows[name] += len(x)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_hook(lambda m, i, o, name=f"{name}.weight": hook(m, i, o, name))
    with torch.no_grad():
        for ids in sequences:
            model(input_ids=torch.tensor([list(ids)]))
    return {name: total / rows[name] for name, total in totals.items()}


def reference_of(folder: Path, rows: Sequence[str], length: int = 48) -> dict[str, Tensor]:
    config = transformers.AutoConfig.from_pretrained(folder)
    model = get_auto_cls(config.architectures[0]).from_pretrained(folder, dtype=torch.float64)
    return gram_matrices(model.eval(), [byte_ids(row)[:length] for row in rows])


def close_to(sketch: Tensor | None, gram: Tensor, columns: int = R) -> None:
    assert sketch is not None
    want = gram @ draw_test_matrix(gram.shape[-1], columns).double()
    torch.testing.assert_close(sketch.double(), want, rtol=1e-4, atol=1e-5 * want.abs().max())


# --- Ω and the packed triangle ---------------------------------------------------------------


def test_the_test_matrix_is_what_the_specification_says() -> None:
    omega = draw_test_matrix(37, 5)
    assert omega.shape == (37, 5)
    assert set(omega.unique().tolist()) == {-1.0, 1.0}
    # Written once, and the same for ever: files hold G Ω, and not Ω.
    signs = ["".join("-+"[int(x > 0)] for x in column) for column in draw_test_matrix(12, 3).T]
    assert signs == ["+++------+--", "+-+-+-++++++", "+-+++--++--+"]
    assert torch.equal(draw_test_matrix(37, 3), omega[:, :3])
    assert torch.equal(draw_test_matrix(4, 4), torch.eye(4))
    assert torch.equal(draw_test_matrix(4, 9), torch.eye(4))


def test_signs_are_as_balanced_and_as_uncorrelated_as_chance_has_them() -> None:
    omega = draw_test_matrix(4096, 16).double()
    products = omega.T @ omega / 4096 - torch.eye(16)
    assert products.abs().max() < 5 / 64  # five standard deviations
    assert omega.mean(0).abs().max() < 5 / 64


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (7, 7), (3, 5, 5)])
def test_a_packed_triangle_gives_the_matrix_back(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape).bfloat16().float()
    matrix = matrix + matrix.mT
    packed = pack_triangle(matrix)
    assert packed.shape == (*shape[:-2], shape[-1] * (shape[-1] + 1) // 2)
    assert torch.equal(unpack_triangle(packed), matrix.bfloat16().float())


# --- the capture -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "bert", "phi3"])
@pytest.mark.parametrize("columns", [R, "full"])
def test_what_is_measured_is_the_gram_matrix(name: str, columns: Any) -> None:
    model = ARCHITECTURES[name].build()
    sequences = tiny_models.sequences(LENGTHS)
    with CurvatureCapture(model, columns=columns) as capture:
        for ids in sequences:
            model(input_ids=ids[None])
    grams = gram_matrices(model, [ids.tolist() for ids in sequences])
    parameters = dict(model.named_parameters())
    sketches = {
        name: capture.ledger.mean_products(first)
        for first, names in capture.ledger.products().items()
        for name in names
    }
    tied = set(capture.tied)
    # A head that is tied to the embedding is no linear layer alone.
    assert sketches.keys() == grams.keys() & parameters.keys() - tied
    for weight, sketch in sketches.items():
        close_to(sketch, grams[weight], 10**9 if columns == "full" else R)


@pytest.mark.parametrize("name", MIXTURES)
def test_each_experts_gram_matrix_is_that_of_its_own_tokens(name: str) -> None:
    model = ARCHITECTURES[name].build()
    with CurvatureCapture(model, columns=R) as capture:
        for ids in tiny_models.sequences(LENGTHS):
            model(input_ids=ids[None])
    naive = NaiveExperts(model)
    with torch.no_grad():
        for ids in tiny_models.sequences(LENGTHS):
            model(input_ids=ids[None])
    fused = [n for n, p in model.named_parameters() if p.ndim == 3 and "experts" in n]
    found = capture.ledger.products()
    assert set(fused) <= found.keys()
    for weight in fused:
        total, counts = naive.grams[weight], torch.tensor(naive.counts[weight])
        mean = total / counts.clamp(min=1)[:, None, None]
        wanted = torch.where(
            (counts < FEWEST_ROWS)[:, None, None], total.sum(0) / counts.sum(), mean
        )
        close_to(capture.ledger.mean_products(weight), wanted)


def test_weights_that_see_one_input_share_one_sketch() -> None:
    model = ARCHITECTURES["llama"].build()
    with CurvatureCapture(model, columns=R) as capture:
        model(input_ids=torch.arange(9)[None])
    layer = "model.layers.0."
    shared = capture.ledger.products()
    attention = tuple(f"{layer}self_attn.{x}_proj.weight" for x in "qkv")
    assert shared[attention[0]] == attention
    mlp = tuple(f"{layer}mlp.{x}_proj.weight" for x in ("gate", "up"))
    assert shared[mlp[0]] == mlp


class Shares(nn.Module):
    """b sees what a sees, but not always; c only at times what a saw first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 3, bias=False) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.b(y) + self.c(y)


def test_a_sketch_of_other_inputs_is_not_taken_for_a_weights_own() -> None:
    model = Shares()
    x, y = torch.randn(2, 6, 4)
    with CurvatureCapture(model, columns=2) as capture:
        model(x, y)
    found = capture.ledger.products()
    assert "b.weight" not in {name for names in found.values() for name in names}
    assert found["a.weight"] == ("a.weight",)
    close_to(capture.ledger.mean_products("a.weight"), (x.mT @ x / 6).double(), 2)


# --- the pre-pass ----------------------------------------------------------------------------


def measured(world: World, out: Path, *args: object, **changes: Any) -> Path:
    path = commands.write_recipe(out.parent, world.recipe(**changes))
    succeed(commands.obim_saliency(path, out, *args))
    return world.saliency_of(world.math, out)


@pytest.fixture(scope="module")
def grams(world: World) -> dict[str, Tensor]:
    return reference_of(world.math, MATH_ROWS)


@pytest.fixture(scope="module")
def sketched(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured(world, tmp_path_factory.mktemp("sketched") / "out", "--sketch", R)


def test_a_file_with_sketches_has_the_same_h_and_the_sketches(
    world: World, sketched: Path, grams: dict[str, Tensor]
) -> None:
    file, usual = SaliencyFile(sketched), SaliencyFile(world.saliency_of(world.math))
    assert file.shapes == usual.shapes
    for name in usual.shapes:
        assert torch.equal(file[name], usual[name])
    assert file.metadata.calibration["sketch"] == R
    for name, gram in grams.items():
        close_to(file.sketch(name), gram)
        assert file.gram(name) is None
    for name in file.shapes.keys() - grams.keys():
        assert file.sketch(name) is None
    # q, k and v see one input, gate and up another: each is there once.
    entries = set(load_file(sketched)) - file.shapes.keys()
    assert len(entries) == 4 * commands.LAYERS + 1
    assert all(entry.startswith("sketch/") for entry in entries)


def test_a_file_without_sketches_is_what_it_always_was(world: World) -> None:
    header = commands.header(world.saliency_of(world.math))
    assert "gram" not in header
    assert "sketch" not in json.loads(header["calibration"])


@pytest.mark.parametrize(
    "args", [("--batch-size", 1), ("--batch-size", 5)], ids=["one by one", "five"]
)
def test_the_batch_size_changes_the_rounding_only(
    world: World, sketched: Path, tmp_path: Path, args: tuple[object, ...]
) -> None:
    other = SaliencyFile(measured(world, tmp_path / "out", "--sketch", R, *args))
    file = SaliencyFile(sketched)
    for name in file.shapes:
        if (want := file.sketch(name)) is not None:
            got = other.sketch(name)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_the_recipe_can_ask_for_them(world: World, sketched: Path, tmp_path: Path) -> None:
    asked = {"max_length": 48, "sketch": R}
    path = measured(world, tmp_path / "out", calibration=asked)
    assert path.read_bytes() == sketched.read_bytes()
    off = measured(world, tmp_path / "none", "--sketch", 0, calibration=asked)
    assert off.read_bytes() == world.saliency_of(world.math).read_bytes()


def test_more_columns_than_features_are_the_matrix(
    world: World, tmp_path: Path, grams: dict[str, Tensor]
) -> None:
    file = SaliencyFile(measured(world, tmp_path / "out", "--sketch", 1000, "--model", world.math))
    for name, gram in grams.items():
        close_to(file.sketch(name), gram, 1000)


def test_a_kept_file_may_have_more_than_is_asked_for(
    world: World, sketched: Path, tmp_path: Path
) -> None:
    out = sketched.parent
    path = commands.write_recipe(tmp_path, world.recipe())
    for fewer in (("--sketch", R - 1), ("--sketch", 0), ()):
        result = succeed(commands.obim_saliency(path, out, *fewer))
        assert result.stdout.count("(kept") == 2
    says(
        refusal(commands.obim_saliency(path, out, "--sketch", R + 1)),
        "calibration sketch",
        "--overwrite",
    )


def test_what_does_not_go_together(world: World, tmp_path: Path) -> None:
    path = commands.write_recipe(tmp_path, world.recipe())
    both = commands.obim_saliency(path, tmp_path / "out", "--sketch", 4, "--full-gram")
    assert both.exit_code == 2
    says(both.output, "--full-gram", "--sketch")
    dense = commands.obim_saliency(path, tmp_path / "out", "--sketch", 4, "--dense")
    says(refusal(dense), str(world.math), "--dense", "--sketch 0")
    path = commands.write_recipe(tmp_path, world.recipe(calibration={"sketch": "some"}))
    says(refusal(commands.obim_saliency(path, tmp_path / "out")), "sketch", "'some'", "'full'")


@pytest.mark.parametrize("sketch", [("--sketch", R), ("--full-gram",)], ids=["sketch", "full"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_it_goes_on_to_the_same_bits(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sketch: tuple[object, ...]
) -> None:
    monkeypatch.setenv(resume.INTERVAL, "0")
    args = (*sketch, "--batch-size", 3, "--model", world.math)
    whole = measured(world, tmp_path / "whole", *args).read_bytes()
    path, out = commands.write_recipe(tmp_path, world.recipe()), tmp_path / "out"

    def patch(kill: Any) -> None:
        feed, calls = passes.feed, iter(range(100))
        passes.feed = lambda *a: kill() if next(calls) == 2 else feed(*a)

    commands.killed(patch, path, out, *args)
    result = succeed(commands.obim_saliency(path, out, *args))
    assert "of an interrupted run" in result.stderr
    assert commands.contents(out) == {world.saliency_of(world.math).name: whole}


# --- whole matrices --------------------------------------------------------------------------


def test_whole_matrices_in_one_run_or_in_many(
    world: World,
    tmp_path: Path,
    grams: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = measured(world, tmp_path / "one", "--full-gram", "--model", world.math)
    file = SaliencyFile(path)
    for name, gram in grams.items():
        got = file.gram(name)
        assert got is not None
        assert torch.equal(got, got.mT)
        scale = float(gram.diagonal().mean())
        torch.testing.assert_close(got.double(), gram, rtol=2**-7, atol=1e-5 * scale)
        assert file.sketch(name) is None
    stored = load_file(path)
    assert {t.dtype for n, t in stored.items() if n.startswith("gram/")} == {torch.bfloat16}

    # Room for one matrix at a time: as many runs as there are inputs, and the same file.
    runs = []
    original = products.run_through
    monkeypatch.setattr(products, "gram_budget", lambda device: 1.0)
    monkeypatch.setattr(
        products, "run_through", lambda *a, **kw: runs.append(kw["done"]) or original(*a, **kw)
    )
    many = measured(world, tmp_path / "many", "--full-gram", "--model", world.math)
    assert len(runs) == 4 * commands.LAYERS + 1
    assert many.read_bytes() == path.read_bytes()
    assert commands.contents(tmp_path / "many").keys() == {many.name}


@pytest.mark.parametrize("moment", [3, 6, 14])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_in_any_run_it_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    monkeypatch.setenv(resume.INTERVAL, "0")
    args = ("--full-gram", "--batch-size", 6, "--model", world.math)
    whole = measured(world, tmp_path / "whole", *args)
    path, out = commands.write_recipe(tmp_path, world.recipe()), tmp_path / "out"
    monkeypatch.setattr(products, "gram_budget", lambda device: 1.0)
    feed, ran = passes.feed, []

    def patch(kill: Any) -> None:
        calls = iter(range(100))
        passes.feed = lambda *a: kill() if next(calls) == moment else feed(*a)

    commands.killed(patch, path, out, *args)
    monkeypatch.setattr(passes, "feed", lambda *a: ran.append(1) or feed(*a))
    succeed(commands.obim_saliency(path, out, *args))
    assert world.saliency_of(world.math, out).read_bytes() == whole.read_bytes()
    # 12 rows are two passes a run, and those that were finished are not run again.
    assert len(ran) == 2 * (4 * commands.LAYERS + 1) - moment


def test_a_mixtures_stored_experts_find_their_own(tmp_path: Path) -> None:
    folders = write_models("mixtral", tmp_path)
    path = commands.write_recipe(tmp_path, recipe_for(folders, tmp_path, ""))
    files = {}
    for columns in (("--sketch", R), ("--full-gram",)):
        out = tmp_path / columns[0]
        succeed(commands.obim_saliency(path, out, *columns))
        files[columns[0]] = SaliencyFile(out / commands.saliency_file_name(str(folders[1])))
    sketched, whole = files.values()
    stored = [name for name in sketched.shapes if re.search(r"\.experts\.\d+\.w1\.", name)]
    assert stored
    for name in stored:
        layer, _, number = name.removesuffix(".w1.weight").rpartition(".")
        fused = sketched.sketch(f"{layer.replace('block_sparse_moe', 'mlp')}.gate_up_proj")
        own = sketched.sketch(name)
        assert fused is not None
        assert own is not None
        assert torch.equal(own, fused[int(number)])
        gram = whole.gram(name)
        assert gram is not None
        torch.testing.assert_close(gram.diagonal(), sketched[name].flatten(), rtol=2**-7, atol=1e-6)


# --- the format ------------------------------------------------------------------------------


def rewritten(source: Path, target: Path, gram: Any = None, **tensors: Tensor) -> Path:
    entries, header = load_file(source), commands.header(source)
    if gram is not None:
        header["gram"] = json.dumps({**json.loads(header["gram"]), **gram})
    save_file({**entries, **tensors}, target, metadata=header)
    return target


def test_what_a_file_with_sketches_may_not_be(sketched: Path, tmp_path: Path) -> None:
    entry = next(name for name in sorted(load_file(sketched)) if name.startswith("sketch/"))
    target = tmp_path / "x.safetensors"
    narrow = load_file(sketched)[entry][:, 1:].contiguous()
    with pytest.raises(SaliencyFileError, match=r"entry sketch/.* is not the Gram matrix"):
        SaliencyFile(rewritten(sketched, target, **{entry: narrow}))
    with pytest.raises(SaliencyFileError, match="is F16; format 1 wants float32"):
        SaliencyFile(rewritten(sketched, target, **{entry: load_file(sketched)[entry].half()}))
    with pytest.raises(SaliencyFileError, match="is not the Gram matrix"):
        SaliencyFile(rewritten(sketched, target, {"inputs": {"lm_head.weight": "sketch/none"}}))
    infinite = load_file(sketched)[entry].clone()
    infinite[0, 0] = float("nan")
    file = SaliencyFile(rewritten(sketched, target, **{entry: infinite}))
    with pytest.raises(SaliencyFileError, match="not finite"):
        file.check_values()
    name = next(iter(json.loads(commands.header(sketched)["gram"])["inputs"]))
    other = SaliencyFile(rewritten(sketched, target, {"test_matrix": "gaussian-philox"}))
    with pytest.raises(SaliencyFileError, match=r"'gaussian-philox'.*upgrade it, or measure"):
        other.sketch(name)
    assert other[name].shape == SaliencyFile(sketched)[name].shape  # h needs no Ω


def test_from_python_and_back(sketched: Path, tmp_path: Path) -> None:
    saliency = mergekit_obim.read_saliency(sketched)
    assert all(not name.startswith("sketch/") for name in saliency)
    path = mergekit_obim.write_saliency(tmp_path / "copy.safetensors", saliency)
    assert path.read_bytes() == sketched.read_bytes()


def test_measure_takes_it_too(world: World, grams: dict[str, Tensor], tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(world.math, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.math)
    for sketch in (R, "full"):
        saliency = mergekit_obim.measure(
            model, MATH_ROWS, tokenizer=tokenizer, max_length=48, sketch=sketch, quiet=True
        )
        path = mergekit_obim.write_saliency(tmp_path / f"{sketch}.safetensors", saliency)
        file = SaliencyFile(path)
        for name, gram in grams.items():
            if sketch == R:
                close_to(file.sketch(name), gram)
            else:
                got = file.gram(name)
                assert got is not None
                torch.testing.assert_close(got.double(), gram, rtol=2**-7, atol=1e-3)


def test_combined_sketches_are_those_of_all_rows(world: World, sketched: Path) -> None:
    code = world.saliency_of(world.code, sketched.parent)
    combined = sketched.parent.parent / "both.safetensors"
    succeed(commands.obim_saliency("--combine", sketched, code, "-o", combined))
    files = [SaliencyFile(path) for path in (sketched, code)]
    tokens = [file.metadata.calibration["tokens"] for file in files]
    both = SaliencyFile(combined)
    for name in files[0].metadata.gram.inputs:  # type: ignore[union-attr]
        parts = [file.sketch(name) for file in files]
        want = sum(t * p.double() for t, p in zip(tokens, parts, strict=True)) / sum(tokens)  # type: ignore[union-attr]
        torch.testing.assert_close(both.sketch(name), want.float())  # type: ignore[union-attr]
