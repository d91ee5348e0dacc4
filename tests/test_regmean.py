"""RegMean by Gram matrices, sketched and whole: against the equations, solved in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import reference
from kernel_inputs import same_bits, strided
from mergekit_obim.errors import UnscorableError
from mergekit_obim.kernels import blocks, regmean_gram
from mergekit_obim.kernels.blocks import one_thread
from mergekit_obim.kernels.gram import draw_test_matrix
from mergekit_obim.kernels.nystrom import nystrom_factor
from mergekit_obim.kernels.regmean import merge_regmean
from mergekit_obim.kernels.regmean_gram import (
    Gram,
    Layers,
    merge_regmean_gram,
    merge_regmean_layers,
    task_vector_layers,
)
from mergekit_obim.kernels.scores import Candidate, Saliency
from reference import gram_estimate as estimate

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = torch.float64
WEIGHTS = [1.0, 0.5, 2.0]


@dataclass
class Layer:
    """A base's weight [out, d], those of its experts, and the Gram matrices of their inputs."""

    base: Tensor
    experts: list[Tensor]
    grams: list[Tensor]

    def to(self, dtype: torch.dtype) -> Layer:
        return Layer(self.base.to(dtype), [e.to(dtype) for e in self.experts], self.grams)


def a_layer(
    seed: int = 0, *, out: int = 7, d: int = 20, tokens: int = 200, count: int = 3
) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    base = random(out, d)
    experts = [base + 0.1 * random(out, d) for _ in range(count)]
    # Inputs of few directions, some features large, as in a language model.
    inputs = [random(tokens, d) @ random(d, d) * (random(d) + 0.1) for _ in range(count)]
    return Layer(base, experts, [x.T @ x / tokens for x in inputs])


def solved(layer: Layer, estimates: Sequence[Tensor], weights: Sequence[float] = WEIGHTS) -> Tensor:
    return reference.regmean(layer.base, layer.experts, estimates, weights)


def sketched(gram: Tensor, columns: int) -> Gram:
    """As a saliency file has it, in float32."""
    h, omega = gram.diagonal().float(), draw_test_matrix(len(gram), columns)
    return Gram(h, nystrom_factor((gram @ omega.double()).float(), h))


def by_five(gram: Tensor) -> Gram:
    return sketched(gram, 5)


def whole(gram: Tensor) -> Gram:
    return Gram(gram.diagonal(), full=lambda: gram)


def diagonal(gram: Tensor) -> Gram:
    return Gram(gram.diagonal())


def merge(
    layer: Layer,
    grams: Sequence[Gram],
    shrink: float,
    weights: Sequence[float] = WEIGHTS,
    scale: float = 1.0,
) -> Tensor:
    merged = torch.empty_like(layer.base)
    kept = [t.clone() for t in (layer.base, *layer.experts)]
    merge_regmean_gram(layer.base, layer.experts, grams, weights, shrink, scale, merged)
    assert all(map(same_bits, (layer.base, *layer.experts), kept)), "an input was changed"
    return merged


def close(merged: Tensor, expected: Tensor, layer: Layer, tolerance: float) -> None:
    """No element is further off than a share of the largest step from the base."""
    step = (expected.double() - layer.base.double()).abs().max()
    torch.testing.assert_close(
        merged.double(), expected.double(), rtol=0, atol=tolerance * float(step)
    )


# --- Nyström's factor ----------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 5, 20])
def test_the_factor_is_nystroms_approximation_and_never_more_than_the_matrix(columns: int) -> None:
    gram = a_layer().grams[0]
    factor = sketched(gram, columns).factor
    assert factor is not None
    assert factor.shape == (20, columns)
    low = factor @ factor.T
    rounding = 1e-6 * float(gram.diagonal().max())
    expected = estimate(gram, 1.0, columns)
    expected.diagonal().copy_(low.diagonal())
    torch.testing.assert_close(low, expected, rtol=0, atol=rounding)
    assert torch.linalg.eigvalsh(gram - low).min() > -rounding
    assert (low.diagonal() <= gram.diagonal() * (1 + 1e-6)).all()


def test_what_a_sketch_lacks_in_rank_and_precision_is_left_out() -> None:
    gram = a_layer(tokens=4).grams[0]  # of rank 4
    for columns in (4, 9, 20):
        factor = sketched(gram, columns).factor
        assert factor is not None
        assert factor.shape[1] == 4
        torch.testing.assert_close(factor @ factor.T, gram, rtol=0, atol=1e-4)
    omega = draw_test_matrix(20, 9)
    rough = (gram @ omega.double()).bfloat16().float()
    factor = nystrom_factor(rough, gram.diagonal())
    assert factor.shape[1] <= 4
    assert (factor.square().sum(1) <= gram.diagonal() * (1 + 1e-12)).all()


def test_a_feature_that_no_token_has_has_no_part_in_the_factor() -> None:
    gram = a_layer().grams[0]
    gram[3], gram[:, 3] = 0, 0
    factor = sketched(gram, 6).factor
    assert factor is not None
    assert not factor[3].any()
    assert factor.isfinite().all()
    assert nystrom_factor(torch.zeros(20, 6), torch.zeros(20)).shape == (20, 0)


# --- the minimum ---------------------------------------------------------------------------


@pytest.mark.parametrize("shrink", [0.3, 0.95, 1.0])
@pytest.mark.parametrize("columns", [1, 6, 20])
@pytest.mark.parametrize("shape", [(7, 20), (65, 33)])
def test_sketches_give_the_minimum(shape: tuple[int, int], columns: int, shrink: float) -> None:
    """By Woodbury what a solution with the explicit matrices is; 60 columns of 20 features too."""
    layer = a_layer(out=shape[0], d=shape[1])
    expected = solved(layer, [estimate(g, shrink, columns) for g in layer.grams])
    merged = merge(layer, [sketched(g, columns) for g in layer.grams], shrink)
    close(merged, expected, layer, 1e-5)


@pytest.mark.parametrize("shrink", [0.5, 1.0])
def test_as_many_columns_as_features_are_regmean(shrink: float) -> None:
    layer = a_layer()
    expected = solved(layer, [estimate(g, shrink, None) for g in layer.grams])
    close(merge(layer, [sketched(g, 20) for g in layer.grams], shrink), expected, layer, 2e-5)


@pytest.mark.parametrize("limit", [0, 1024])
@pytest.mark.parametrize("shrink", [0.5, 0.95, 1.0])
def test_whole_matrices_are_regmean(
    shrink: float, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, and in float32 as for layers with many features."""
    monkeypatch.setattr(regmean_gram, "_FLOAT64_FEATURES", limit)
    layer = a_layer(d=33).to(torch.float64 if limit else torch.float32)
    expected = solved(layer, [estimate(g, shrink, None) for g in layer.grams])
    merged = merge(layer, [whole(g) for g in layer.grams], shrink)
    if limit:
        close(merged, expected, layer, 1e-6 if shrink == 1 else 1e-12)
    else:
        close(merged, expected, layer, 2e-2 if shrink == 1 else 1e-5)


@pytest.mark.parametrize("kinds", list(itertools.permutations([whole, by_five, diagonal])))
def test_experts_may_be_known_to_different_degrees(
    kinds: Sequence[Callable[[Tensor], Gram]],
) -> None:
    layer = a_layer()
    mean = {
        whole: lambda g: estimate(g, 0.9, None),
        by_five: lambda g: estimate(g, 0.9, 5),
        diagonal: lambda g: g.diagonal().diag(),
    }
    estimates = [mean[kind](g) for g, kind in zip(layer.grams, kinds, strict=True)]
    grams = [kind(g) for g, kind in zip(layer.grams, kinds, strict=True)]
    close(merge(layer, grams, 0.9), solved(layer, estimates), layer, 1e-5)


def test_a_sketch_beside_diagonals() -> None:
    layer = a_layer()
    grams = [sketched(layer.grams[0], 5), *(diagonal(g) for g in layer.grams[1:])]
    estimates = [estimate(layer.grams[0], 0.9, 5), *(g.diagonal().diag() for g in layer.grams[1:])]
    close(merge(layer, grams, 0.9), solved(layer, estimates), layer, 1e-5)


@pytest.mark.parametrize("known", [whole, by_five])
def test_no_shrink_is_the_diagonal_mean(known: Callable[[Tensor], Gram]) -> None:
    layer = a_layer()
    candidates = [
        Candidate(e, layer.base, Saliency(g.diagonal()[None]))
        for e, g in zip(layer.experts, layer.grams, strict=True)
    ]
    expected = merge_regmean(candidates, WEIGHTS, 0.7)
    merged = merge(layer, [known(g) for g in layer.grams], 0.0, scale=0.7)
    close(merged, expected, layer, 1e-6)


@pytest.mark.parametrize("known", [whole, by_five])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_is_rounded_once(known: Callable[[Tensor], Gram], dtype: torch.dtype) -> None:
    layer = a_layer(out=90).to(dtype)
    columns = None if known is whole else 5
    exact = solved(layer, [estimate(g, 0.9, columns) for g in layer.grams])
    merged = merge(layer, [known(g) for g in layer.grams], 0.9)
    assert merged.dtype == dtype
    if dtype.itemsize == 2:
        # Where the sum falls between two numbers, float32 may take it for the other.
        assert (merged == exact.to(dtype)).float().mean() > 0.99
    close(merged, exact, layer, {2: 0.05, 4: 1e-5, 8: 1e-5}[dtype.itemsize])


@pytest.mark.parametrize("known", [whole, by_five])
def test_experts_that_agree_are_what_they_agree_on(known: Callable[[Tensor], Gram]) -> None:
    layer = a_layer()
    layer.experts = [layer.experts[0]] * 3
    grams = [known(g) for g in layer.grams]
    for shrink in (0.9, 1.0):
        close(merge(layer, grams, shrink), layer.experts[0], layer, 1e-6)
        alone = Layer(layer.base, layer.experts[:1], layer.grams[:1])
        close(merge(alone, grams[:1], shrink, [0.3]), layer.experts[0], layer, 1e-6)


@pytest.mark.parametrize("known", [whole, by_five, diagonal])
def test_a_weight_of_0_counts_for_nothing(known: Callable[[Tensor], Gram]) -> None:
    layer = a_layer()
    grams = [known(g) for g in layer.grams]
    without = Layer(layer.base, layer.experts[1:], layer.grams[1:])
    expected = merge(without, grams[1:], 0.9, [1.0, 2.0])
    close(merge(layer, grams, 0.9, [0.0, 1.0, 2.0]), expected, layer, 1e-6)
    assert same_bits(merge(layer, grams, 0.9, [0.0] * 3), layer.base)


@pytest.mark.parametrize("shrink", [0.9, 1.0])
@pytest.mark.parametrize("known", [whole, by_five])
def test_features_that_no_expert_saw_get_the_mean(
    known: Callable[[Tensor], Gram], shrink: float
) -> None:
    layer = a_layer()
    for gram in layer.grams:
        gram[4:6], gram[:, 4:6] = 0, 0
    layer.grams[1][9], layer.grams[1][:, 9] = 0, 0  # one expert's alone
    merged = merge(layer, [known(g) for g in layer.grams], shrink)
    mean = sum(w * e for w, e in zip(WEIGHTS, layer.experts, strict=True)) / sum(WEIGHTS)
    close(merged[:, 4:6], mean[:, 4:6], Layer(layer.base[:, 4:6], [], []), 1e-6)
    seen = [j for j in range(20) if j not in (4, 5)]
    reduced = Layer(layer.base[:, seen], [e[:, seen] for e in layer.experts], [])
    estimates = [estimate(g, shrink, None if known is whole else 5) for g in layer.grams]
    expected = solved(reduced, [g[seen][:, seen] for g in estimates])
    close(merged[:, seen], expected, reduced, 1e-5)


def output_error(layer: Layer, merged: Tensor) -> float:
    """Σ w tr((W − W_k) G_k (W − W_k)ᵀ), with the true matrices."""
    errors = [
        w * ((merged - e) @ g * (merged - e)).sum()
        for w, e, g in zip(WEIGHTS, layer.experts, layer.grams, strict=True)
    ]
    return float(sum(errors))


def test_the_more_is_known_of_the_inputs_the_nearer_are_the_outputs() -> None:
    """For inputs of few strong directions, as those of language models are."""
    layer = a_layer(d=48)
    generator = torch.Generator().manual_seed(9)
    decay = torch.arange(1, 49, dtype=DOUBLE) ** -1.5
    for k in range(3):
        mixing = torch.randn(48, 48, generator=generator, dtype=DOUBLE) * decay
        layer.grams[k] = mixing @ mixing.T
    kinds = [diagonal, *(lambda g, r=r: sketched(g, r) for r in (4, 16)), whole]
    errors = [output_error(layer, merge(layer, [f(g) for g in layer.grams], 1.0)) for f in kinds]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.2 * errors[0]
    assert errors[2] < 2 * errors[3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_singular_system_is_solved_with_the_shrink_that_it_bears(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five tokens of 40 features each, and no damping; also of matrices that were rounded."""
    monkeypatch.setattr(regmean_gram, "_FLOAT64_FEATURES", 0 if dtype == torch.float32 else 1024)
    layer = a_layer(d=40, tokens=5)
    matrix = sum(w * g for w, g in zip(WEIGHTS, layer.grams, strict=True))
    assert torch.linalg.matrix_rank(matrix) == 15
    pulls = sum(
        w * (e - layer.base) @ g
        for w, e, g in zip(WEIGHTS, layer.experts, layer.grams, strict=True)
    )
    best = layer.base + pulls @ torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10)
    rounded = [whole(g.to(dtype).double()) for g in layer.grams]
    work = layer if dtype != torch.float32 else layer.to(torch.float32)
    merged = merge(work, rounded, 1.0).double()
    by_diagonal = output_error(layer, merge(layer, [diagonal(g) for g in layer.grams], 1.0))
    least, found = output_error(layer, best), output_error(layer, merged)
    share = {torch.float64: 1e-5, torch.float32: 1e-2, torch.bfloat16: 0.2}[dtype]
    assert found - least <= share * (by_diagonal - least)
    largest = max(float((e - layer.base).norm()) for e in layer.experts)
    assert (merged - layer.base).norm() <= 3 * largest  # nothing blown up where nothing is known
    if dtype == torch.float64:
        sketches = [sketched(g, 40) for g in layer.grams]
        found = output_error(layer, merge(layer, sketches, 1.0))
        assert found - least <= 1e-4 * (by_diagonal - least)


@pytest.mark.parametrize("known", [whole, by_five, diagonal])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(known: Callable[[Tensor], Gram], value: float) -> None:
    layer = a_layer()
    grams = [known(g) for g in layer.grams]
    for tensor in (layer.base, *layer.experts):
        kept, tensor[2, 3] = float(tensor[2, 3]), value
        with pytest.raises(UnscorableError, match="not finite"):
            merge_regmean_gram(
                layer.base, layer.experts, grams, WEIGHTS, 0.9, 1.0, torch.empty_like(layer.base)
            )
        tensor[2, 3] = kept
    gram = layer.grams[0]
    gram[0, 1] = gram[1, 0] = gram[1, 1] = value
    with pytest.raises(UnscorableError, match="not finite"):
        merge(layer, [known(g) for g in layer.grams], 0.9)


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "offset"])
@pytest.mark.parametrize("known", [whole, by_five])
def test_neither_strides_nor_blocks_nor_threads_matter(
    known: Callable[[Tensor], Gram], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = a_layer(out=130)
    grams = [known(g) for g in layer.grams]
    whole_blocks = merge(layer, grams, 0.9)
    torch.set_num_threads(2)
    with one_thread():
        assert same_bits(merge(layer, grams, 0.9), whole_blocks)
    moved = Layer(strided(layer.base, layout), [strided(e, layout) for e in layer.experts], [])
    close(merge(moved, grams, 0.9), whole_blocks, layer, 1e-12)
    monkeypatch.setattr(blocks, "CPU_BLOCK", 1)
    monkeypatch.setattr(blocks, "_FEWEST_ROWS", 3)
    close(merge(layer, grams, 0.9), whole_blocks, layer, 1e-12)


# --- stacks and transposed layers ----------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("known", [whole, by_five])
def test_a_mixture_is_merged_expert_by_expert(known: Callable[[Tensor], Gram], axis: int) -> None:
    """And Conv1D, which is the transposed problem."""
    layers = [a_layer(seed) for seed in range(4)]
    expected = torch.stack([merge(x, [known(g) for g in x.grams], 0.9) for x in layers])

    def lie(weights: Sequence[Tensor]) -> Tensor:
        stack = torch.stack(list(weights))
        return stack if axis == -1 else stack.mT.contiguous()

    base = lie([x.base for x in layers])
    experts = [lie([x.experts[k] for x in layers]) for k in range(3)]

    def layers_of(k: int) -> Layers:
        return lambda index: known(layers[index].grams[k])

    merged = merge_regmean_layers(
        base, experts, axis, [layers_of(k) for k in range(3)], WEIGHTS, 0.9, 1.0
    )
    assert merged.is_contiguous()
    step = float((expected - torch.stack([x.base for x in layers])).abs().max())
    torch.testing.assert_close(merged, lie(list(expected)), rtol=0, atol=1e-12 * step)
    one = merge_regmean_layers(
        base[1], [e[1] for e in experts], axis, [lambda _, k=k: layers_of(k)(1) for k in range(3)],
        WEIGHTS, 0.9, 1.0,
    )  # fmt: skip
    assert same_bits(one, merged[1])
    nothing = torch.zeros(2, 0, 5)
    none = [lambda _: diagonal(torch.eye(5))]
    assert merge_regmean_layers(nothing, [nothing], -1, none, [1.0], 0.9, 1.0).shape == (2, 0, 5)


# --- task vectors in the place of inputs -----------------------------------------------------


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("features", [20, 120])
def test_without_data_the_task_vectors_are_the_inputs(features: int, axis: int) -> None:
    """Exact where three sketches would have as many columns, else by 32."""
    layer = a_layer(out=50, d=features)
    deltas = [e - layer.base for e in layer.experts]
    layer.grams = [delta.T @ delta * features / delta.square().sum() for delta in deltas]
    assert all(float(g.diagonal().mean()) == pytest.approx(1) for g in layer.grams)
    columns = None if features == 20 else 32
    expected = solved(layer, [estimate(g, 0.5, columns) for g in layer.grams])

    def lie(weight: Tensor) -> Tensor:
        return weight if axis == -1 else weight.T.contiguous()

    base, experts = lie(layer.base), [lie(e) for e in layer.experts]
    known = task_vector_layers(base, experts, axis)
    merged = merge_regmean_layers(base, experts, axis, known, WEIGHTS, 0.5, 1.0)
    close(merged, lie(expected), Layer(base, [], []), 1e-6)


def test_an_expert_like_its_base_tells_nothing_of_its_inputs() -> None:
    layer = a_layer()
    layer.experts[1] = layer.base.clone()
    known = task_vector_layers(layer.base, layer.experts, -1)
    assert torch.equal(known[1](0).h, torch.ones(20, dtype=DOUBLE))
    deltas = [e - layer.base for e in layer.experts]
    grams = [d.T @ d * 20 / (d.square().sum() or 1) for d in deltas]
    grams[1] = torch.eye(20, dtype=DOUBLE)
    expected = solved(layer, [estimate(g, 0.5, None) for g in grams])
    merged = merge_regmean_layers(layer.base, layer.experts, -1, known, WEIGHTS, 0.5, 1.0)
    close(merged, expected, layer, 1e-6)
