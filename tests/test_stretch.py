"""`stretch: auto`: the factor on the experts' mean follows from a sample of their cosines."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from mergekit.merge_methods.api import merge_state_dicts, merge_tensors

import checkpoints
import commands
import reference
from checkpoints import Tensors
from commands import World, refusal, says, succeed
from mergekit_obim.errors import RecipeError, UnscorableError
from mergekit_obim.kernels import lengths
from mergekit_obim.kernels.lengths import cosines, mean_cosine, products, stretch_to_one
from mergekit_obim.models import task_vectors
from mergekit_obim.models.task_vectors import Cosines
from planning import plan

EXPERTS = ("a", "b", "c")
ROWS = "model.layers.1.mlp.up_proj.weight"


def with_cosine(cosine: float, count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Random vectors of length 1, float64 [count, size], each two with exactly this cosine."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, count + 1, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(noise).Q.T  # orthonormal
    return math.sqrt(cosine) * directions[0] + math.sqrt(1 - cosine) * directions[1:]


def mean_of_pairs(matrix: np.ndarray) -> float:
    return float(matrix[~np.eye(len(matrix), dtype=bool)].mean())


def family(cosine: float, layers: int = 3) -> tuple[Tensors, dict[str, Tensors]]:
    """A base and three experts whose task vectors, over all tensors, have this cosine."""
    shapes = checkpoints.llama_shapes(layers=layers)
    base = checkpoints.base_weights(0, shapes)
    vectors = with_cosine(cosine, 3, sum(math.prod(s) for s in shapes.values()))
    experts = {}
    for k, (name, vector) in enumerate(zip(EXPERTS, vectors, strict=True)):
        parts = vector.split([math.prod(s) for s in shapes.values()])
        deltas = dict(zip(shapes, parts, strict=True))
        # Of different lengths, which cosines do not tell.
        experts[name] = {
            n: (base[n] + (k + 1) * deltas[n].view(shape)).float() for n, shape in shapes.items()
        }
    return base, experts


def write(root: Path, base: Tensors, experts: Mapping[str, Tensors]) -> dict[str, Any]:
    """The models as checkpoints, and a recipe for them that needs no saliency."""
    layers = sum("q_proj" in name for name in base)
    config = checkpoints.llama_config(layers=layers)
    for name, tensors in {"base": base, **experts}.items():
        checkpoints.write_checkpoint(root / name, tensors, config)
    return {
        "merge_method": "obim",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / name)} for name in experts],
        "parameters": {"criterion": "magnitude", "assignment": "nearest"},
    }


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models' tensors are larger than their samples: of 16 runs of 4 weights each."""
    monkeypatch.setattr(lengths, "RUN_LENGTH", 4)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged of stretches since this was called last."""

    def lines() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.name == task_vectors.LOG.name]
        caplog.clear()
        return found

    return lines


# --- the factor ----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 2.0, 0.5), (1.0, 0.0, 0.0)])
def test_the_factor_gives_the_mean_the_length_of_one(weights: Sequence[float]) -> None:
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    vectors /= vectors.norm(dim=1, keepdim=True)
    mean = (torch.tensor(weights, dtype=torch.float64)[:, None] * vectors).sum(0) / sum(weights)
    factor = stretch_to_one(weights, vectors @ vectors.T)
    assert factor * float(mean.norm()) == pytest.approx(1, rel=1e-12)


def test_with_equal_weights_it_is_the_formula() -> None:
    for count in (2, 3, 8):
        for cosine in (-0.1, 0.0, 0.3, 1.0):
            matrix = torch.full((count, count), cosine, dtype=torch.float64).fill_diagonal_(1)
            expected = math.sqrt(count / (1 + (count - 1) * cosine))
            assert stretch_to_one([2.0] * count, matrix) == pytest.approx(expected, rel=1e-12)


def test_weights_of_zero_and_vectors_that_cancel() -> None:
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert stretch_to_one([0.0, 0.0], opposite) == 1
    assert stretch_to_one([1.0, 1.0], opposite) == math.inf


def test_a_vector_of_zeros_is_like_none() -> None:
    found = cosines(torch.tensor([[4.0, 0.0, 2.0], [0.0, 0.0, 0.0], [2.0, 0.0, 4.0]]))
    assert found.tolist() == [[1.0, 0.0, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 1.0]]


# --- the sample ----------------------------------------------------------------------------


def tensors(size: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and three experts with heavy tails, and rows that differ in size."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator)
    rows = torch.rand(size[0], 1, generator=generator) * 3
    common = torch.randn(size, generator=generator)
    return base, [base + rows * (common + torch.randn(size, generator=generator) ** 3)] + [
        base + rows * (0.5 * common + torch.randn(size, generator=generator)) for _ in range(2)
    ]


def exact(base: torch.Tensor, experts: Sequence[torch.Tensor]) -> torch.Tensor:
    deltas = torch.stack([(e.double() - base.double()).flatten() for e in experts])
    return deltas @ deltas.T


@pytest.mark.parametrize("layout", ["plain", "transposed", "expanded", "scalar", "empty"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_small_tensors_are_read_whole(layout: str, dtype: torch.dtype) -> None:
    base, experts = tensors((30, 20))
    change: Callable[[torch.Tensor], torch.Tensor] = {
        "plain": lambda t: t,
        "transposed": lambda t: t.T,
        "expanded": lambda t: t[:1].expand(30, 20),
        "scalar": lambda t: t[3, 4],
        "empty": lambda t: t[:0],
    }[layout]
    base, *experts = (change(t.to(dtype)) for t in (base, *experts))
    found = products(base, experts, "name")
    assert found.shape == (16, 3, 3)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.sum(0), exact(base, experts), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[3], found[7], rtol=0, atol=0)


@pytest.mark.parametrize("size", [64, 65, 200, 4097])
def test_the_sample_is_a_run_of_each_sixteenth(size: int, short_runs: None) -> None:
    places = set()
    for name in ("a", "b"):
        positions = lengths._positions(size, name).view(16, 4)
        assert torch.equal(positions, positions[:, :1] + torch.arange(4))
        starts = positions[:, 0].sort().values.tolist()
        for part, start in enumerate(starts):
            assert size * part // 16 <= start <= size * (part + 1) // 16 - 4
        assert torch.equal(positions, lengths._positions(size, name).view(16, 4))
        places.add(tuple(positions[:, 0].tolist()))
    assert len(places) == 2, "another tensor is sampled elsewhere"


def test_a_sampled_tensor_is_its_runs_times_its_size(short_runs: None) -> None:
    base, experts = tensors((30, 20))
    positions = lengths._positions(600, "name")
    rows = torch.stack([(e.double() - base.double()).flatten()[positions] for e in experts])
    expected = torch.stack([part @ part.T for part in rows.view(3, 16, 4).unbind(1)]) * 600 / 64
    found = products(base, experts, "name")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    strided = products(base.T.contiguous().T, [e.T.contiguous().T for e in experts], "name")
    assert torch.equal(found, strided)


def test_the_mean_cosine_is_within_its_error(short_runs: None) -> None:
    """Over many samples, the differences from the truth are as large as the errors say."""
    models = [tensors((40, 30), seed) for seed in range(6)]
    [truth] = [mean_cosine((sum(exact(*m) for m in models) / 16).expand(16, 3, 3))]
    assert truth[1] == pytest.approx(0, abs=1e-9)
    ratios = []
    for sample in range(60):
        runs = sum(products(*m, f"{sample} {number}") for number, m in enumerate(models))
        assert isinstance(runs, torch.Tensor)
        cosine, error = mean_cosine(runs)
        ratios.append((cosine - truth[0]) / error)
    assert 0.7 < np.sqrt(np.mean(np.square(ratios))) < 1.4
    assert max(map(abs, ratios)) < 4.5


def test_the_error_is_the_jackknifes() -> None:
    base, experts = tensors((400, 300))
    runs = products(base, experts, "name").numpy()

    def rho(total: np.ndarray) -> float:
        size = np.sqrt(total.diagonal())
        return mean_of_pairs(total / np.outer(size, size))

    each = [rho(np.delete(runs, k, axis=0).sum(0)) for k in range(16)]
    error = math.sqrt(15 / 16 * sum((one - np.mean(each)) ** 2 for one in each))
    assert mean_cosine(torch.from_numpy(runs)) == pytest.approx((rho(runs.sum(0)), error))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    base, [expert, *_] = tensors((3, 3))
    expert[1, 1] = bad
    with pytest.raises(UnscorableError):
        products(base, [expert, base], "name")
    ours = Cosines("base", ["x", "y"])
    ours.add("the.weight", {"base": base, "x": expert, "y": base})
    with pytest.raises(UnscorableError, match=r"tensor the\.weight.*x, y"):
        ours.stretch({"x": 1.0, "y": 1.0})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_cpus_result() -> None:
    base, experts = tensors((400, 300))
    found = products(base.cuda(), [e.cuda() for e in experts], "name")
    assert torch.equal(found, products(base, experts, "name"))


# --- whole models ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cosine", "stretch"),
    [
        (0.0, math.sqrt(3)),  # unrelated experts
        (0.3, math.sqrt(3 / 1.6)),
        (0.9, math.sqrt(3 / 2.8)),  # checkpoints of one run
        (1.0, 1.0),
    ],
)
def test_whole_models_with_known_cosines(
    cosine: float, stretch: float, tmp_path: Path, told: Callable[[], list[str]]
) -> None:
    base, experts = family(cosine)
    path = commands.write_recipe(tmp_path, write(tmp_path, base, experts))
    succeed(commands.mergekit_yaml(path, tmp_path / "out"))
    [line] = told()
    found, *measured = map(float, re.findall(r"-?\d+(?:\.\d+)?", line)[:3])
    assert found == pytest.approx(stretch, abs=1e-3)
    assert measured == pytest.approx([cosine, 0], abs=1e-4)
    says(line, *(tmp_path / name for name in EXPERTS))


def test_a_sample_of_whole_models_is_within_its_error(short_runs: None) -> None:
    for cosine in (0.05, 0.5, 0.9):
        base, experts = family(cosine)
        ours = Cosines("base", EXPERTS)
        for name in base:
            ours.add(name, {"base": base[name], **{k: e[name] for k, e in experts.items()}})
        ours.expect(dict.fromkeys(EXPERTS, 1.0))
        outcome = ours.outcome()
        assert outcome
        assert 0 < outcome.error < 0.05
        assert abs(outcome.cosine - cosine) < 4 * outcome.error
        expected = math.sqrt(3 / (1 + 2 * outcome.cosine))
        assert outcome.stretch == [pytest.approx(expected, abs=2e-3)]
        assert outcome.stretch[0] == round(outcome.stretch[0], 4)


def test_all_ways_to_merge_measure_the_same(
    short_runs: None, tmp_path: Path, told: Callable[[], list[str]], threads: None
) -> None:
    """Whatever the threads, the order of the tensors and what reads them; and merge the same."""
    base, experts = family(0.4)
    recipe = write(tmp_path, base, experts)
    recipe["models"][1]["parameters"] = {"weight": 0.5}
    path = commands.write_recipe(tmp_path, recipe)
    other = commands.write_recipe(tmp_path, checkpoints.of_files(recipe), "raw.yml")
    lines, merged = [], []
    for number, run in enumerate(
        [
            lambda out: commands.mergekit_yaml(path, out, "-j", 1),
            lambda out: commands.mergekit_yaml(path, out, "-j", 4),
            lambda out: commands.mergekit_pytorch(other, out),
        ]
    ):
        torch.set_num_threads(4)
        # mergekit sets how many threads work beside each other, which torch allows only once.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "set_num_interop_threads", lambda number: None)
            succeed(run(tmp_path / f"out{number}"))
        merged.append(checkpoints.read_checkpoint(tmp_path / f"out{number}"))
        lines += told()
    for names in (list(base), list(reversed(base))):
        models = {"the base": base, **experts}
        merged.append(
            merge_state_dicts(
                {model: {n: tensors[n] for n in names} for model, tensors in models.items()},
                "obim",
                base="the base",
                parameters={
                    "criterion": "magnitude",
                    "assignment": "nearest",
                    "weight": {"a": 1.0, "b": 0.5, "c": 1.0},
                },
            )
        )
        lines += told()
    assert len({line.partition(" (")[0] for line in lines}) == 1
    assert len(lines) == 5, "one line a merge"
    for one in merged[1:]:
        commands.same_tensors(merged[0], one)


def test_what_is_written_into_the_recipe_merges_the_same(
    tmp_path: Path, told: Callable[[], list[str]]
) -> None:
    recipe = write(tmp_path, *family(0.4))
    for method, shared in (("obim", {"assignment": "nearest"}), ("regmean_diag", {})):
        recipe |= {"merge_method": method}
        merged = []
        for stretch in ("auto", None):
            if stretch is None:
                [line] = told()
                [stretch] = re.findall(r"stretch (\S+):", line)
                stretch = float(stretch)
            recipe["parameters"] = {"criterion": "magnitude", **shared, "stretch": stretch}
            path = commands.write_recipe(tmp_path, recipe)
            succeed(commands.mergekit_yaml(path, tmp_path / f"{method}-{stretch}"))
            merged.append(checkpoints.read_checkpoint(tmp_path / f"{method}-{stretch}"))
        assert told() == [], "nothing is measured that is not needed"
        commands.same_tensors(*merged)


def test_nothing_is_read_where_nothing_is_stretched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(task_vectors, "products", lambda *args: pytest.fail("it was measured"))
    recipe = write(tmp_path, *family(0.4))
    for number, shared in enumerate(
        [{}, {"assignment": "least_error"}, {"assignment": "nearest", "stretch": 2}]
    ):
        recipe["parameters"] = {"criterion": "magnitude", **shared}
        path = commands.write_recipe(tmp_path, recipe)
        succeed(commands.mergekit_yaml(path, tmp_path / f"yaml{number}"))
        path = commands.write_recipe(tmp_path, checkpoints.of_files(recipe))
        succeed(commands.mergekit_pytorch(path, tmp_path / f"pytorch{number}"))
    recipe |= {"models": recipe["models"][:1], "parameters": {**shared, "criterion": "magnitude"}}
    del recipe["parameters"]["stretch"]
    succeed(commands.mergekit_yaml(commands.write_recipe(tmp_path, recipe), tmp_path / "single"))
    assert told() == []


def test_slices_compare_the_layers_that_are_merged(
    tmp_path: Path, told: Callable[[], list[str]]
) -> None:
    """Pairs of tensors as the plan pairs them; a slice of other experts has its own stretch."""
    base, experts = family(0.6)
    recipe = write(tmp_path, base, experts)
    del recipe["models"]
    layers = [({"base": 0, "a": 1, "b": 2, "c": 0}, 2), ({"base": 1, "c": 0, "b": 0}, 1)]
    layers[0][0]["b"] = 1
    recipe["slices"] = [
        {
            "sources": [
                {"model": str(tmp_path / name), "layer_range": [first, first + count]}
                for name, first in starts.items()
            ]
        }
        for starts, count in layers
    ]
    recipe["slices"].append(recipe["slices"][0])
    succeed(commands.mergekit_yaml(commands.write_recipe(tmp_path, recipe), tmp_path / "out"))
    expected = []
    for number, (starts, count) in enumerate(layers):
        pairs: dict[str, Tensors] = {model: {} for model in starts}
        for model, first in starts.items():
            tensors = {"base": base, **experts}[model]
            for name, tensor in tensors.items():
                layer = reference.layer_index(name, 3) if ".layers." in name else -1
                if first <= layer < first + count:
                    shifted = name.replace(f".{layer}.", f".{layer - first}.")
                    pairs[model][shifted] = tensor
                    if not number:
                        pairs[model][f"again {shifted}"] = tensor
                elif layer < 0 and not number:
                    pairs[model][name] = tensor
        own = [pairs[model] for model in starts if model != "base"]
        matrix = reference.cosines(pairs["base"], own)
        ones = [reference.Expert(base[ROWS])] * len(own)
        expected.append((reference.stretch_to_one(ones, matrix), mean_of_pairs(matrix)))
    lines = told()
    found = [tuple(map(float, re.findall(r"-?\d+\.\d+", line)[:2])) for line in lines]
    assert found == [pytest.approx(one, abs=1e-4) for one in expected]
    says(lines[1], tmp_path / "c", tmp_path / "b")
    assert str(tmp_path / "a") not in lines[1]


def test_rows_that_the_tokenizer_options_move_are_left_out(
    world: World, told: Callable[[], list[str]]
) -> None:
    found = []
    for more in ({}, {"tokenizer": {"source": "base"}}):
        parameters = {"criterion": "magnitude", "assignment": "nearest"}
        recipe = world.recipe(models=world.models(), parameters=parameters, **more)
        for model in recipe["models"]:
            del model["calibration"]
        plan(recipe)
        [line] = told()
        found += re.findall(r"cosine is (\S+)", line)
    base, *experts = (checkpoints.read_checkpoint(p) for p in (world.base, *world.experts))
    rows = ("model.embed_tokens.weight", "lm_head.weight")
    for cosine, names in zip(found, [list(base), [n for n in base if n not in rows]], strict=True):
        own = [{n: e[n] for n in names} for e in experts]
        expected = mean_of_pairs(reference.cosines({n: base[n] for n in names}, own))
        assert float(cosine) == pytest.approx(expected, abs=1e-4)
    assert found[0] != found[1]


def test_what_not_every_expert_has_is_left_out(
    tmp_path: Path, told: Callable[[], list[str]]
) -> None:
    """As mergekit-pytorch merges it with --tensor-union, by those that have it."""
    base, experts = family(0.4)
    extra = {model: tensors.pop(ROWS) for model, tensors in experts.items() if model != "a"}
    assert len(extra) == 2
    path = commands.write_recipe(tmp_path, checkpoints.of_files(write(tmp_path, base, experts)))
    succeed(commands.mergekit_pytorch(path, tmp_path / "out", "--tensor-union"))
    [line] = told()
    names = [name for name in base if name != ROWS]
    own = [{n: e[n] for n in names} for e in experts.values()]
    expected = mean_of_pairs(reference.cosines({n: base[n] for n in names}, own))
    assert float(re.findall(r"cosine is (\S+)", line)[0]) == pytest.approx(expected, abs=1e-4)
    # The one expert that has the tensor is no mean of others: nothing is stretched.
    merged = checkpoints.read_checkpoint(tmp_path / "out")
    assert torch.equal(merged[ROWS], experts["a"][ROWS])


def test_threads_that_merge_at_once_measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args)
        return products(*args)

    monkeypatch.setattr(task_vectors, "products", counted)
    base, experts = tensors((30, 20))
    ours = Cosines("base", EXPERTS)
    ours.add("weight", {"base": base, **dict(zip(EXPERTS, experts, strict=True))})
    weights = dict.fromkeys(EXPERTS, 1.0)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: ours.stretch(weights), range(32)))
    assert (len(found), len(calls)) == (1, 1)


# --- what it is told by -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "shared", "words"),
    [
        ("obim", {"assignment": "nearest", "stretch": "long"}, ["stretch", "'long'", "auto"]),
        ("obim", {"assignment": "nearest", "stretch": -1}, ["stretch", "-1", "negative"]),
        ("obim", {"assignment": "least_error", "stretch": "auto"}, ["stretch", "least_error"]),
        ("obim", {"stretch": "auto"}, ["stretch", "iterative"]),
        ("regmean_diag", {"stretch": ["auto", "shrt"]}, ["stretch", "'shrt'", "auto"]),
        ("ties_obm", {"stretch": "auto"}, ["obim", "stretch"]),
    ],
)
def test_other_words_are_refused(
    method: str, shared: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    recipe = write(tmp_path, *family(0.4))
    recipe |= {"merge_method": method, "parameters": {"criterion": "magnitude", **shared}}
    path = commands.write_recipe(tmp_path, recipe)
    if method == "ties_obm":  # a parameter of another method is only ignored
        says(succeed(commands.obim_saliency("--check", path)).stdout, "Warning", "stretch")
        return
    error = refusal(commands.mergekit_yaml(path, tmp_path / "out"))
    says(error, *words)
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_task_vectors_that_cancel_are_refused_before_anything_is_merged(tmp_path: Path) -> None:
    base, experts = family(0.4)
    opposite = {name: 2 * base[name] - tensor for name, tensor in experts["a"].items()}
    recipe = write(tmp_path, base, {"a": experts["a"], "b": opposite})
    path = commands.write_recipe(tmp_path, recipe)
    error = refusal(commands.mergekit_yaml(path, tmp_path / "out"))
    says(error, tmp_path / "a", tmp_path / "b", "cancel", "set stretch to a number")
    assert not list(tmp_path.glob("out/*.safetensors"))
    result = commands.obim_saliency("--check", path)
    assert result.exit_code == 1
    says(result.stdout, "cancel")


def test_models_without_a_common_tensor_are_refused() -> None:
    ours = Cosines("base", ["a", "b"])
    ours.add("weight", {"base": torch.ones(3), "a": torch.ones(3), "b": None})
    ours.add("other", {"base": torch.ones(3), "a": torch.ones(3), "b": torch.ones(4)})
    ours.add("count", {model: torch.ones(3, dtype=torch.int64) for model in ("base", "a", "b")})
    with pytest.raises(RecipeError, match=r"a, b and the base base.*set stretch to a number"):
        ours.stretch({"a": 1.0, "b": 1.0})


def test_unnamed_tensors_are_all_compared(told: Callable[[], list[str]]) -> None:
    base, experts = tensors((30, 20))
    merge_tensors(
        [base, *experts],
        "obim",
        base_index=0,
        parameters={"criterion": "magnitude", "assignment": "nearest"},
    )
    [line] = told()
    size = exact(base, experts).diagonal().sqrt()
    expected = mean_of_pairs((exact(base, experts) / torch.outer(size, size)).numpy())
    assert float(re.findall(r"cosine is (\S+)", line)[0]) == pytest.approx(expected, abs=1e-4)


def test_weights_that_differ_by_tensor_give_a_range(
    tmp_path: Path, told: Callable[[], list[str]]
) -> None:
    base, experts = family(0.0)
    recipe = write(tmp_path, base, experts)
    recipe["models"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": 4.0}, {"value": 1}]}
    path = commands.write_recipe(tmp_path, recipe)
    succeed(commands.mergekit_yaml(path, tmp_path / "out"))
    [line] = told()
    low, high = re.findall(r"stretch (\S+) to (\S+):", line)[0]
    assert float(low) == pytest.approx(6 / math.sqrt(18), abs=1e-3)
    assert float(high) == pytest.approx(math.sqrt(3), abs=1e-3)


def test_the_line_is_shown_without_being_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """mergekit shows warnings only; it is no warning."""
    recipe = commands.write_recipe(tmp_path, write(tmp_path, *family(0.4)))
    caplog.set_level(logging.WARNING)  # mergekit's, without -v
    caplog.handler.setLevel(logging.NOTSET)  # as the handlers are that mergekit adds
    succeed(commands.mergekit_yaml(recipe, tmp_path / "out"))
    [record] = [r for r in caplog.records if "stretch" in r.getMessage()]
    assert record.levelno == logging.INFO


def nearest(world: World) -> dict[str, Any]:
    shared = {"saliency": str(world.saliency), "assignment": "nearest"}
    return world.recipe(models=world.models(), parameters=shared)


def test_check_report_and_card_tell_it(world: World, tmp_path: Path) -> None:
    base, *experts = (checkpoints.read_checkpoint(p) for p in (world.base, *world.experts))
    matrix = reference.cosines(base, experts)
    factor = reference.stretch_to_one([reference.Expert(base[ROWS])] * 2, matrix)
    line = f"stretch {factor:g}: the task vectors' mean cosine is {matrix[0, 1]:.4f} ± 0.0000"
    path = commands.write_recipe(tmp_path, nearest(world))

    def run(command: Callable[..., Result], *args: object) -> str:
        return succeed(command(*args)).stdout

    says(run(commands.obim_saliency, "--check", path), line)
    [checked] = json.loads(run(commands.obim_saliency, "--check", "--json", path))["stretch"]
    [reported] = json.loads(run(commands.obim_report, path, "--json", "--quiet"))["stretch"]
    assert checked == reported
    assert reported["experts"] == [str(expert) for expert in world.experts]
    assert reported["stretch"] == [factor]
    assert reported["cosine"] == pytest.approx(matrix[0, 1], rel=1e-9)
    run(commands.obim_report, path, "-o", tmp_path / "page.html")
    assert line.replace("'", "&#39;") in (tmp_path / "page.html").read_text(encoding="utf-8")
    run(commands.mergekit_yaml, path, tmp_path / "merged")
    for options in ([], ["--no-shares"]):
        run(commands.obim_card, tmp_path / "merged", *options)
        says((tmp_path / "merged" / "README.md").read_text(encoding="utf-8"), line)


def test_check_tells_it_before_the_saliency_is_measured(world: World, tmp_path: Path) -> None:
    path = commands.write_recipe(
        tmp_path, world.recipe(parameters={"saliency": "new", "assignment": "nearest"})
    )
    says(succeed(commands.obim_saliency("--check", path, tmp_path / "new")).stdout, "stretch 1.")
    path = commands.write_recipe(tmp_path, world.recipe())
    assert "stretch" not in succeed(commands.obim_saliency("--check", path)).stdout
