"""The kernels beside the paper's own: whole tensors at a time, against the slow reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from kernel_inputs import (
    CUTS,
    SETTINGS,
    big_merge,
    candidates_of,
    cut_into,
    densities_of,
    merges,
    same_bits,
)
from mergekit_obim.errors import UnscorableError
from mergekit_obim.kernels import backend, blocks
from mergekit_obim.kernels.baselines.consensus import merge_consensus
from mergekit_obim.kernels.baselines.pcb import merge_pcb
from mergekit_obim.kernels.least_error import least_error_owners
from mergekit_obim.kernels.merging import merge_owned
from mergekit_obim.kernels.regmean import merge_regmean
from mergekit_obim.kernels.scores import Candidate, GivenScores, Magnitude, Saliency
from mergekit_obim.kernels.selection import FREE
from mergekit_obim.kernels.ties import merge_obm_sign, merge_ties
from reference import Expert

Merge = tuple[torch.Tensor, list[Expert], list[int], float]
Cut = tuple[int, tuple[int, int]]


def least_error(base: torch.Tensor, experts: Sequence[Expert]) -> list[int]:
    owner = least_error_owners(candidates_of(base, experts), [e.weight for e in experts])
    assert owner.shape == base.shape
    return [reference.BASE if k == FREE else k for k in owner.reshape(-1).tolist()]


def regmean(base: torch.Tensor, experts: Sequence[Expert], lambda_: float = 1.0) -> torch.Tensor:
    return merge_regmean(candidates_of(base, experts), [e.weight for e in experts], lambda_)


def obm_sign(
    base: torch.Tensor, experts: Sequence[Expert], lambda_: float = 1.0, normalize: bool = True
) -> torch.Tensor:
    weights = [e.weight for e in experts]
    densities = densities_of(experts)
    return merge_obm_sign(candidates_of(base, experts), densities, weights, lambda_, normalize)


def consensus(
    base: torch.Tensor, experts: Sequence[Expert], lambda_: float = 1.0, min_agreement: int = 2
) -> torch.Tensor:
    tensors, weights = [e.tensor for e in experts], [e.weight for e in experts]
    thresholds = [e.mask_threshold for e in experts]
    return merge_consensus(base, tensors, weights, thresholds, min_agreement, lambda_)


def pcb(base: torch.Tensor, experts: Sequence[Expert], lambda_: float = 1.0) -> torch.Tensor:
    tensors, weights = [e.tensor for e in experts], [e.weight for e in experts]
    densities = [0.1 if e.density is None else e.density for e in experts]
    return merge_pcb(base, tensors, densities, weights, lambda_)


def without_negative_weights(experts: Sequence[Expert]) -> None:
    for expert in experts:
        expert.weight = abs(expert.weight)


def unchanged(merge: Callable[[], torch.Tensor], inputs: Merge) -> torch.Tensor:
    """What it gives, having seen that no input was changed and that none is in the result."""
    base, experts, *_ = inputs
    tensors = [base, *(t for e in experts for t in (e.tensor, e.h, e.dense) if t is not None)]
    before = [t.clone() for t in tensors]
    merged = merge()
    assert all(map(same_bits, tensors, before)), "an input was changed"
    assert merged.is_contiguous()
    if base.numel():
        pointers = {t.untyped_storage().data_ptr() for t in tensors}
        assert merged.untyped_storage().data_ptr() not in pointers
    return merged


# --- least error ---------------------------------------------------------------------------


@SETTINGS
@given(merge=merges(), cut=CUTS, stretch=st.sampled_from([1.0, 0.0, 3**0.5, 2.0, 7.3]))
def test_least_error_is_the_reference(merge: Merge, cut: Cut, stretch: float) -> None:
    base, experts, _, lambda_ = merge
    without_negative_weights(experts)
    candidates, weights = candidates_of(base, experts), [e.weight for e in experts]
    with cut_into(*cut):
        owner = unchanged(lambda: least_error_owners(candidates, weights, stretch), merge)
    expected = reference.least_error_owners(reference.objective(base, experts), stretch)
    assert [reference.BASE if k == FREE else k for k in owner.reshape(-1).tolist()] == expected
    merged = merge_owned(base, [e.tensor for e in experts], owner, [lambda_] * len(experts))
    alike = [Expert(e.tensor) for e in experts]
    assert same_bits(merged, reference.merge_owned(base, alike, expected, lambda_))


@SETTINGS
@given(merge=merges())
def test_least_error_chooses_as_float64_would_but_for_rounding(merge: Merge) -> None:
    """Where it chooses otherwise, the two errors differ by no more than float32 can tell."""
    base, experts, _, _ = merge
    without_negative_weights(experts)
    chosen = least_error(base, experts)
    exact = reference.objective(base, experts, np.float64)
    best = reference.least_error_owners(exact)
    values = [*exact.deltas, np.zeros(base.numel())]  # BASE is the last
    precision = np.finfo(reference.arithmetic_dtype(base.dtype)).eps
    for i in [i for i in range(base.numel()) if chosen[i] != best[i]]:
        taken, better = values[chosen[i]][i], values[best[i]][i]
        at = [(exact.weights[k][i], exact.deltas[k][i]) for k in range(len(experts))]
        errors = [sum(a * (c - d) ** 2 for a, d in at) for c in (taken, better)]
        scale = sum(a * (abs(c) + abs(d)) ** 2 for c in (taken, better) for a, d in at)
        assert errors[0] - errors[1] <= (2 * len(experts) + 8) * precision * scale


@pytest.mark.parametrize("stretch", [1.0, 1.7])
def test_what_is_chosen_is_nearest_to_the_stretched_mean(stretch: float) -> None:
    """Of 0 and every δ, to γ Σ w h δ / Σ w h; γ √K long makes up for what a mean loses."""
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(4, 500, generator=generator, dtype=torch.float64)
    h = torch.rand(4, 500, generator=generator, dtype=torch.float64) + 0.1
    weights = [1.0, 2.0, 0.5, 1.0]
    base = torch.zeros(500, dtype=torch.float64)
    candidates = [Candidate(d, base, Saliency(x)) for d, x in zip(deltas, h, strict=True)]
    owner = least_error_owners(candidates, weights, stretch).long()
    counted = h * torch.tensor(weights, dtype=torch.float64)[:, None]
    target = stretch * (counted * deltas).sum(0) / counted.sum(0)
    values = torch.cat([deltas, base[None]])
    nearest = (values - target).abs().argmin(0)
    assert torch.equal(owner, torch.where(nearest == 4, FREE, nearest))


@settings(SETTINGS, max_examples=60)
@given(merge=merges())
def test_nothing_costs_less_than_what_is_chosen(merge: Merge) -> None:
    """The invariant by itself, on exact numbers: no other candidate has a smaller error."""
    base, experts, _, _ = merge
    without_negative_weights(experts)
    base = base.double()
    for expert in experts:
        expert.tensor = expert.tensor.double()
    chosen = least_error(base, experts)
    o = reference.objective(base, experts)
    candidates = np.stack([*o.deltas, np.zeros(base.numel())])
    errors = np.stack([o.error(c) for c in candidates])
    taken = errors[chosen, range(base.numel())]
    slack = 1e-12 * np.stack([o.error(-c) for c in candidates]).max(0) + 1e-300
    assert (taken <= errors.min(0) + slack).all()


def owners_of(deltas: Sequence[float], h: Sequence[float], *weights: float) -> list[int]:
    """Who owns the one position of a tensor whose base is 0."""
    base = torch.zeros(1)
    experts = [
        Expert(torch.tensor([delta]), h=torch.tensor([value]), weight=weight)
        for delta, value, weight in zip(deltas, h, weights or [1.0] * len(h), strict=True)
    ]
    return least_error(base, experts)


def test_one_expert_alone_takes_whatever_matters_to_it() -> None:
    base = torch.zeros(4)
    expert = Expert(torch.tensor([1.0, -2.0, 0.0, 3.0]), h=torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert least_error(base, [expert]) == [0, 0, reference.BASE, reference.BASE]


def test_ties_go_to_the_base_and_then_to_the_first() -> None:
    assert owners_of([1.0, 1.0], [1.0, 1.0]) == [0]  # the same value twice
    assert owners_of([1.0, -1.0], [1.0, 1.0]) == [reference.BASE]  # 2 against 4 and 4
    assert owners_of([2.0, 0.0], [1.0, 1.0]) == [reference.BASE]  # 4 against 4 and 4
    assert owners_of([3.0, 1.0, 2.0], [1.0, 1.0, 1.0]) == [2]  # the middle one
    assert owners_of([1.0, 3.0], [1.0, 1.0]) == [0]  # 4 each, and 10 for the base


def test_h_and_weight_say_whose_error_counts() -> None:
    assert owners_of([2.0, -1.0], [1.0, 9.0]) == [1]
    assert owners_of([2.0, -1.0], [1.0, 9.0], 20.0, 1.0) == [0]
    assert owners_of([2.0, -1.0], [1.0, 9.0], 1.0, 0.0) == [0]
    assert owners_of([2.0, -1.0], [0.0, 0.0]) == [reference.BASE]


def test_another_experts_value_can_serve_both() -> None:
    """The first expert does not care and is close to the second: its value is not needed."""
    assert owners_of([1.0, 1.1, 1.05], [1.0, 1.0, 0.0]) == [2]


def test_a_dense_file_knows_h_where_the_expert_differs() -> None:
    base = torch.zeros(3)
    dense = Expert(torch.tensor([2.0, 2.0, 0.0]), dense=torch.tensor([4.0, 400.0, 7.0]))
    factored = Expert(torch.tensor([-1.0, -1.0, -1.0]), h=torch.tensor([6.0]))
    # h = 1, 100 and, where δ is 0, unknown, which counts as 0.
    assert least_error(base, [dense, factored]) == [1, 0, 1]


def test_more_experts_than_labels_are_refused() -> None:
    candidate = Candidate(torch.ones(1), torch.zeros(1), Magnitude())
    with pytest.raises(ValueError, match="at most 254"):
        least_error_owners([candidate] * 255, [1.0] * 255)


# --- the means, signs and masks ------------------------------------------------------------


@SETTINGS
@given(merge=merges(), cut=CUTS)
def test_regmean_is_the_reference(merge: Merge, cut: Cut) -> None:
    base, experts, _, lambda_ = merge
    without_negative_weights(experts)
    kinds = {(e.h is None, e.dense is None) for e in experts}
    with cut_into(*cut):
        merged = unchanged(lambda: regmean(base, experts, lambda_), merge)
    if len(kinds) == 1:  # the reference makes them comparable, the kernel takes what it gets
        assert same_bits(merged, reference.regmean_diag(base, experts, lambda_=lambda_))


def test_regmean_weighs_by_h_and_weight() -> None:
    base = torch.tensor([1.0, 1.0, 1.0])
    a = Expert(torch.tensor([3.0, 3.0, 3.0]), h=torch.tensor([1.0, 0.0, 0.0]))
    b = Expert(torch.tensor([9.0, 9.0, 9.0]), h=torch.tensor([3.0, 2.0, 0.0]), weight=2.0)
    assert regmean(base, [a, b]).tolist() == pytest.approx([57 / 7, 9.0, 7.0])
    assert regmean(base, [a, b], 0.5).tolist() == pytest.approx([1 + 25 / 7, 5.0, 4.0])
    a.weight = b.weight = 0.0
    assert regmean(base, [a, b]).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.slow
@SETTINGS
@given(merge=merges(sums_over_one=True), cut=CUTS, normalize=st.booleans())
def test_obm_sign_is_the_reference(merge: Merge, cut: Cut, normalize: bool) -> None:
    base, experts, _, lambda_ = merge
    with cut_into(*cut):
        merged = unchanged(lambda: obm_sign(base, experts, lambda_, normalize), merge)
    expected = reference.obm_sign(base, experts, lambda_=lambda_, normalize=normalize)
    assert same_bits(merged, expected)


@settings(SETTINGS, max_examples=40)
@given(merge=merges(sums_over_one=True))
def test_obm_sign_by_magnitude_is_ties(merge: Merge) -> None:
    base, experts, _, lambda_ = merge
    for expert in experts:
        expert.h = expert.dense = None
    weights = [e.weight for e in experts]
    ties = merge_ties(candidates_of(base, experts), densities_of(experts), weights, lambda_)
    assert same_bits(obm_sign(base, experts, lambda_), ties)


def test_the_salient_outvote_the_many() -> None:
    base = torch.zeros(1)
    many = [Expert(torch.tensor([1.0]), 1.0, h=torch.tensor([1.0])) for _ in range(3)]
    salient = Expert(torch.tensor([-0.5]), 1.0, h=torch.tensor([20.0]))
    assert obm_sign(base, [*many, salient]).tolist() == [-0.5]
    salient.h = torch.tensor([8.0])  # 2 against 3
    assert obm_sign(base, [*many, salient]).tolist() == [1.0]


@SETTINGS
@given(
    merge=merges(),
    cut=CUTS,
    min_agreement=st.integers(0, 4),
    thresholds=st.lists(st.sampled_from([0.0, 0.2, 0.4, 1.0, 3.0]), min_size=8, max_size=8),
)
def test_consensus_is_the_reference(
    merge: Merge, cut: Cut, min_agreement: int, thresholds: list[float]
) -> None:
    base, experts, _, lambda_ = merge
    for expert, threshold in zip(experts, thresholds, strict=False):
        expert.mask_threshold = threshold
    with cut_into(*cut):
        merged = unchanged(lambda: consensus(base, experts, lambda_, min_agreement), merge)
    expected = reference.consensus_ta(base, experts, lambda_=lambda_, min_agreement=min_agreement)
    assert same_bits(merged, expected)


def test_consensus_drops_what_is_one_experts_own_or_nobodys() -> None:
    base = torch.tensor([5.0, 5.0, 5.0, -0.0])
    tuned = [[6.0, 6.0, 6.0, 0.0], [6.0, 5.0, 4.0, 0.0], [6.0, 5.0, 5.0, 0.0]]
    experts = [Expert(torch.tensor(values)) for values in tuned]
    # Needed by all three; by the first alone; by none, as they cancel; by none.
    assert same_bits(consensus(base, experts), torch.tensor([8.0, 5.0, 5.0, -0.0]))
    assert consensus(base, experts, min_agreement=1).tolist() == [8.0, 6.0, 5.0, 0.0]
    assert consensus(base, experts, min_agreement=0).tolist() == [8.0, 6.0, 5.0, 0.0]
    assert same_bits(consensus(base, experts, min_agreement=4), base)


# --- PCB -----------------------------------------------------------------------------------


@pytest.mark.slow
@SETTINGS
@given(merge=merges(), cut=CUTS)
def test_pcb_is_the_reference(merge: Merge, cut: Cut) -> None:
    base, experts, _, lambda_ = merge
    with cut_into(*cut):
        merged = unchanged(lambda: pcb(base, experts, lambda_), merge)
    assert same_bits(merged, reference.pcb(base, experts, lambda_=lambda_))


def published_pcb(deltas: torch.Tensor, ratio: float, weights: torch.Tensor) -> torch.Tensor:
    """The authors' steps on flattened task vectors [K, N], in matrices."""

    def normalize(x: torch.Tensor) -> torch.Tensor:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return (x - low) / (high - low)

    def clamp(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        ordered, size = x.sort(dim=1).values, x.shape[1]
        first, last = ordered[:, int(size * low)], ordered[:, int(size * (1 - high) - 1)]
        return x.clamp(first[:, None], last[:, None])

    size = clamp(deltas.abs(), 0.01, 0.01)
    between = (deltas * (deltas.sign() * normalize(size)).sum(0)).tanh()
    balance = (len(deltas) * normalize(size) ** 2).exp() * between
    share = normalize(clamp(balance, 1 - ratio, 0))
    merged = (deltas.sign() * size * weights[:, None] * share).sum(0)
    return merged / share.sum(0).clamp(min=1e-12)


def test_pcb_is_the_published_one() -> None:
    generator = torch.Generator().manual_seed(1)
    base, *tuned = torch.randn(4, 30, 40, generator=generator, dtype=torch.float64)
    experts = [Expert(t, 0.2, weight=w) for t, w in zip(tuned, (1.2, 0.7, -1.0), strict=True)]
    deltas = torch.stack([t - base for t in tuned]).flatten(1)
    weights = torch.tensor([e.weight for e in experts], dtype=torch.float64)
    expected = base + 0.8 * published_pcb(deltas, 0.2, weights).view(base.shape)
    torch.testing.assert_close(pcb(base, experts, 0.8), expected)


@pytest.mark.parametrize("value", [0.0, 2.0])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 4), (0, 3)])
def test_pcb_leaves_alone_what_does_not_compete(shape: tuple[int, ...], value: float) -> None:
    """All changes the same, or none: the original divides 0 by 0."""
    base = torch.ones(shape)
    assert same_bits(pcb(base, [Expert(base + value), Expert(base - value)]), base)


def test_pcb_with_many_experts_does_not_overflow() -> None:
    """exp(K) is infinite in float32 from K = 89 on."""
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(50)
    experts = [Expert(torch.randn(50, generator=generator), 0.5) for _ in range(100)]
    merged = pcb(base, experts)
    assert merged.isfinite().all()
    assert merged.any()
    torch.testing.assert_close(merged, reference.pcb(base, experts), rtol=1e-3, atol=1e-4)


# --- all of them ---------------------------------------------------------------------------

METHODS: dict[str, Callable[[torch.Tensor, Sequence[Expert]], torch.Tensor]] = {
    "least_error": lambda base, experts: least_error_owners(
        candidates_of(base, experts), [e.weight for e in experts]
    ),
    "regmean": regmean,
    "obm_sign": obm_sign,
    "consensus": consensus,
    "pcb": pcb,
}


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("method", METHODS)
def test_a_large_merge_is_the_same_with_any_cut_and_threads(method: str) -> None:
    base, experts, _ = big_merge()

    def merged(threads: int, block: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        with mock.patch.object(blocks, "CPU_BLOCK", block):
            return METHODS[method](base, experts)

    first = merged(1, blocks.CPU_BLOCK)
    assert torch.equal(first, merged(2, blocks.CPU_BLOCK))
    assert torch.equal(first, merged(2, 12345))


@pytest.mark.parametrize("method", METHODS)
def test_torchs_operations_give_what_numpys_do(method: str) -> None:
    """Which is what other devices use; here they run on the CPU."""
    base, experts, _ = big_merge()
    base, rows = base[:120], slice(0, 120)
    experts = [Expert(e.tensor[rows], e.density, h=e.h, weight=0.7) for e in experts]
    experts[2].dense = experts[0].tensor.float().abs()
    usual = METHODS[method](base, experts)
    with mock.patch.object(backend, "_uses_numpy", return_value=False):
        assert torch.equal(METHODS[method](base, experts), usual)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["base", "expert"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("error")
def test_weights_that_are_not_finite_are_refused(method: str, where: str, bad: float) -> None:
    for h, dense in ((None, None), (torch.ones(1, 30), None), (None, torch.ones(20, 30))):
        pair = {"base": torch.zeros(20, 30), "expert": torch.ones(20, 30)}
        pair[where][13, 7] = bad
        other = Expert(torch.full((20, 30), 2.0), 0.5, h=h, dense=dense)
        with pytest.raises(UnscorableError, match="not finite"):
            METHODS[method](pair["base"], [Expert(pair["expert"], 0.5, h=h, dense=dense), other])


def test_an_h_of_zero_hides_no_bad_weight() -> None:
    candidate = Candidate(torch.tensor([float("inf")]), torch.zeros(1), Saliency(torch.zeros(1)))
    with pytest.raises(UnscorableError, match="not finite"):
        least_error_owners([candidate], [1.0])


def test_a_dense_score_of_a_vanishing_difference_is_no_error() -> None:
    """δ² underflows to 0: nothing is known of h there."""
    tiny = Candidate(torch.tensor([1e-30]), torch.zeros(1), GivenScores(torch.zeros(1)))
    assert least_error_owners([tiny], [1.0]).tolist() == [FREE]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_gives_the_cpus_result(method: str) -> None:
    base, experts, _ = big_merge()
    cpu = METHODS[method](base, experts)
    there = [
        Expert(e.tensor.cuda(), e.density, h=None if e.h is None else e.h.cuda()) for e in experts
    ]
    cuda = METHODS[method](base.cuda(), there).cpu()
    if method == "pcb":  # exp and tanh differ in their last bits
        torch.testing.assert_close(cuda, cpu, rtol=1e-2, atol=1e-3)
    else:
        assert torch.equal(cuda, cpu)
