"""The kernels, whole tensors at a time, against the slow reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import reference
from kernel_inputs import (
    CUTS,
    DTYPES,
    SAMPLES,
    SETTINGS,
    big_merge,
    candidates_of,
    cut_into,
    densities_of,
    merges,
    same_bits,
    strided,
)
from mergekit_obim.errors import UnscorableError
from mergekit_obim.kernels import backend, blocks, selection
from mergekit_obim.kernels.iterative import iterative_owners
from mergekit_obim.kernels.merging import merge_owned
from mergekit_obim.kernels.scores import (
    Candidate,
    Criterion,
    GivenScores,
    Magnitude,
    RandomScores,
    Saliency,
    random_key,
)
from mergekit_obim.kernels.selection import FREE, claim_top
from mergekit_obim.kernels.ties import merge_ties


def obim(
    base: torch.Tensor,
    experts: Sequence[reference.Expert],
    order: Sequence[int],
    lambda_: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    owner = iterative_owners(candidates_of(base, experts), densities_of(experts), order)
    scales = [e.weight * lambda_ for e in experts]
    return owner, merge_owned(base, [e.tensor for e in experts], owner, scales)


def flat_owner(owner: torch.Tensor) -> list[int]:
    return [reference.BASE if k == FREE else k for k in owner.reshape(-1).tolist()]


# --- against the reference ----------------------------------------------------------------


@SETTINGS
@given(merge=merges(), cut=CUTS)
def test_obim_is_the_reference(
    merge: tuple[torch.Tensor, list[reference.Expert], list[int], float],
    cut: tuple[int, tuple[int, int]],
) -> None:
    base, experts, order, lambda_ = merge
    inputs = [base, *(t for e in experts for t in (e.tensor, e.h, e.dense) if t is not None)]
    before = [t.clone() for t in inputs]
    with cut_into(*cut):
        owner, merged = obim(base, experts, order, lambda_)

    expected = reference.owners(base, experts, order)
    assert flat_owner(owner) == expected
    assert same_bits(merged, reference.merge_owned(base, experts, expected, lambda_))
    assert all(map(same_bits, inputs, before)), "an input was changed"
    assert merged.is_contiguous()
    if base.numel():
        pointers = {t.untyped_storage().data_ptr() for t in [base, *(e.tensor for e in experts)]}
        assert merged.untyped_storage().data_ptr() not in pointers


@pytest.mark.slow
@SETTINGS
@given(merge=merges(sums_over_one=True), cut=CUTS, normalize=st.booleans())
def test_ties_is_the_reference(
    merge: tuple[torch.Tensor, list[reference.Expert], list[int], float],
    cut: tuple[int, tuple[int, int]],
    normalize: bool,
) -> None:
    base, experts, _, lambda_ = merge
    inputs = [base, *(t for e in experts for t in (e.tensor, e.h, e.dense) if t is not None)]
    before = [t.clone() for t in inputs]
    weights = [e.weight for e in experts]
    with cut_into(*cut):
        merged = merge_ties(
            candidates_of(base, experts), densities_of(experts), weights, lambda_, normalize
        )

    expected = reference.ties_obm(base, experts, lambda_=lambda_, normalize=normalize)
    assert same_bits(merged, expected)
    assert all(map(same_bits, inputs, before)), "an input was changed"


@settings(SETTINGS, max_examples=60)
@given(merge=merges())
def test_masks_are_disjoint_and_of_the_counts_asked_for(
    merge: tuple[torch.Tensor, list[reference.Expert], list[int], float],
) -> None:
    """The invariants of equation 7 by themselves, without the reference's word for it."""
    base, experts, order, _ = merge
    owner, _ = obim(base, experts, order)
    numel = base.numel()
    unclaimed = numel
    for k in order:
        scores = reference.scores(experts[k], base)
        mine = (owner == k).reshape(-1).numpy()
        later = [order[j] for j in range(order.index(k), len(order))]
        free = np.isin(owner.reshape(-1).numpy(), [FREE, *later])  # when it was k's turn
        wanted = min(round(experts[k].density * numel), unclaimed)
        assert mine.sum() == min(wanted, (scores[free] > 0).sum())
        assert (scores[mine] > 0).all(), "a position of zero saliency was claimed"
        left = scores[free & ~mine]
        assert not mine.any() or not left.size or scores[mine].min() >= left.max()
        unclaimed -= int(mine.sum())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_claimed_position_is_never_claimed_again(order: tuple[int, ...]) -> None:
    base = torch.zeros(6)
    experts = [reference.Expert(torch.full((6,), float(k + 1)), 1 / 3) for k in range(3)]
    owner, merged = obim(base, experts, order)
    assert owner.tolist() == [k for k in order for _ in range(2)]
    assert merged.tolist() == [k + 1.0 for k in order for _ in range(2)]


@pytest.mark.parametrize(
    ("density", "numel", "claimed"),
    [
        (0.5, 5, 2),
        (0.5, 7, 4),
        (0.1, 4, 0),
        (1.0, 5, 5),
        (0.0, 5, 0),
        (1 / 3, 3, 1),
        (0.29, 100, 29),
    ],
)
def test_keep_count_is_pythons_round(density: float, numel: int, claimed: int) -> None:
    owner, _ = obim(torch.zeros(numel), [reference.Expert(torch.ones(numel), density)], [0])
    assert owner.tolist() == [0] * claimed + [FREE] * (numel - claimed)  # ties: lowest index


def test_claims_end_where_nothing_is_left() -> None:
    """round(0.5 · 3) = 2 twice: the last expert gets what is left, not what it asked for."""
    experts = [reference.Expert(torch.ones(3), 0.5), reference.Expert(torch.ones(3) * 9, 0.5)]
    owner, _ = obim(torch.zeros(3), experts, [0, 1])
    assert owner.tolist() == [0, 0, 1]


def test_zero_saliency_leaves_the_position_to_later_experts() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    unmoved = reference.Expert(
        torch.tensor([1.0, 1.0, 2.0, 2.0]), 1.0, h=torch.tensor([1.0, 1, 1, 0])
    )
    later = reference.Expert(torch.tensor([3.0, 1.0, 3.0, 3.0]), 0.5, h=torch.ones(1))
    owner, merged = obim(base, [unmoved, later], [0, 1])
    assert owner.tolist() == [1, FREE, 0, 1]
    assert merged.tolist() == [3, 1, 2, 3]


def test_a_dense_score_without_a_difference_claims_nothing() -> None:
    base = torch.tensor([1.0, 1.0])
    expert = reference.Expert(torch.tensor([1.0, 2.0]), 0.5, dense=torch.tensor([9.0, 1.0]))
    owner, _ = obim(base, [expert], [0])
    assert owner.tolist() == [FREE, 0]


def test_unscaled_claims_are_bit_exact_copies() -> None:
    """θ_B + (θ_k − θ_B) is not θ_k: 1e8 + (1 − 1e8) would be 0 or 8 in float32."""
    base = torch.tensor([1e8, -0.0, 1e8], dtype=torch.float32)
    experts = [reference.Expert(torch.tensor([1.1, 0.0, 1e8]), 1.0)]
    _, merged = obim(base, experts, [0])
    assert same_bits(merged, torch.tensor([1.1, -0.0, 1e8]))


def test_scores_are_float32_for_low_precision_weights() -> None:
    """In bf16 the three δ² · h would be equal, and the first of them would win."""
    base = torch.zeros(3, dtype=torch.bfloat16)
    expert = reference.Expert(torch.ones(3, dtype=torch.bfloat16), 1 / 3)
    expert.h = torch.tensor([1.0, 1.001, 1.002])
    assert expert.h.bfloat16().unique().numel() == 1
    owner, _ = obim(base, [expert], [0])
    assert owner.tolist() == [FREE, FREE, 0]


def test_scores_are_float64_for_float64_weights() -> None:
    base = torch.zeros(2, dtype=torch.float64)
    moved = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    owner, _ = obim(base, [reference.Expert(moved, 0.5, h=torch.ones(1))], [0])
    assert owner.tolist() == [FREE, 0]


def test_scaled_sums_are_rounded_once() -> None:
    """bf16 has 8 bits: a δ that was rounded before the sum would give another result."""
    base = torch.tensor([-129.0], dtype=torch.bfloat16)
    expert = torch.tensor([128.0], dtype=torch.bfloat16)  # δ = 257: 256 or 258 in bf16
    _, merged = obim(base, [reference.Expert(expert, 1.0, weight=0.5)], [0])
    assert merged.tolist() == [-129 + 128.5]


# --- exact selection in large tensors -----------------------------------------------------


def top_of(scores: np.ndarray, count: int) -> np.ndarray:
    """The reference's rule again, fast enough for large tensors: stable sort, highest first."""
    keep = np.zeros(len(scores), dtype=bool)
    best = np.argsort(-scores, kind="stable")[:count]
    keep[best[scores[best] > 0]] = True
    return keep


def large_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(3000, generator=generator)
    clumps = torch.randint(0, 2, (3000,), generator=generator) * 1000 + noise.abs() / 1000
    return {
        "normal": noise,
        "ties": torch.ones(3000),
        "few": torch.randint(0, 3, (3000,), generator=generator).float(),
        "zeros": noise * (torch.rand(3000, generator=generator) < 0.01),
        "clumps": clumps,
        "sorted": torch.linspace(0, 1, 3000),
        "columns": (torch.arange(3000) % 8 == 0) * noise.abs() + 0.01,
        "one": (torch.arange(3000) == 1234).float(),
    }


@pytest.mark.parametrize("kind", large_inputs())
@pytest.mark.parametrize("sample", [(64, 1), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_selection_is_exact_whatever_the_sample_saw(
    kind: str, sample: tuple[int, int], dtype: torch.dtype
) -> None:
    tensor = large_inputs()[kind].view(60, 50).to(dtype)
    candidate = Candidate(tensor, torch.zeros_like(tensor), Magnitude())
    scores = tensor.double().abs().reshape(-1).numpy()
    for count in (0, 1, 29, 30, 31, 300, 1500, 2999, 3000, 5000):
        owner = torch.full(tensor.shape, FREE, dtype=torch.uint8)
        with cut_into(500, sample):
            claimed = claim_top(owner, 3, count, candidate)
        kept = top_of(scores, count)
        assert claimed == kept.sum()
        assert owner.reshape(-1).tolist() == np.where(kept, 3, FREE).tolist()


@settings(SETTINGS, max_examples=60)
@given(
    low=st.floats(0, 3, width=32),
    high=st.one_of(st.floats(0, 3, width=32), st.just(float("inf"))),
    count=st.integers(0, 600),
    seed=st.integers(0, 99),
)
@example(low=2.5, high=2.6, count=500, seed=0)  # too few above: give back and look at all
@example(low=0.0, high=0.1, count=5, seed=0)  # too many above
@example(low=0.5, high=0.5, count=200, seed=1)
def test_selection_is_exact_whatever_the_bracket(
    low: float, high: float, count: int, seed: int
) -> None:
    """The sample decides how fast a selection is, never what is selected."""
    assume(low <= high)
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(-6, 7, (20, 30), generator=generator) / 4
    claimed_before = torch.rand(20, 30, generator=generator) < 0.2
    owner = torch.where(claimed_before, 1, FREE).to(torch.uint8)
    candidate = Candidate(tensor, torch.zeros_like(tensor), Magnitude())
    with (
        cut_into(block=64, sample=(1, 1)),
        mock.patch.object(selection, "_bracket", return_value=(low, high)),
    ):
        claim_top(owner, 2, count, candidate)
    scores = (tensor.abs() * ~claimed_before).reshape(-1).numpy()
    expected = np.where(top_of(scores, count), 2, FREE)
    expected[claimed_before.reshape(-1).numpy()] = 1
    assert owner.reshape(-1).tolist() == expected.tolist()


@pytest.mark.slow
@SETTINGS
@given(merge=merges(), cut=CUTS)
def test_what_runs_on_other_devices_gives_the_same(
    merge: tuple[torch.Tensor, list[reference.Expert], list[int], float],
    cut: tuple[int, tuple[int, int]],
) -> None:
    """torch's operations instead of numpy's, here on the CPU; a GPU has a test below."""
    base, experts, order, lambda_ = merge
    owner, merged = obim(base, experts, order, lambda_)
    with cut_into(*cut), mock.patch.object(backend, "_uses_numpy", return_value=False):
        owner_2, merged_2 = obim(base, experts, order, lambda_)
    assert torch.equal(owner, owner_2)
    assert same_bits(merged, merged_2)


@pytest.mark.parametrize("kind", large_inputs())
def test_selection_on_other_devices_gives_the_same(kind: str) -> None:
    with mock.patch.object(backend, "_uses_numpy", return_value=False):
        test_selection_is_exact_whatever_the_sample_saw(kind, (64, 1), torch.bfloat16)


@pytest.mark.usefixtures("threads")
def test_a_large_merge_is_exact_with_one_thread_and_with_two() -> None:
    base, experts, order = big_merge()
    assert base.numel() > max(3 * blocks.CPU_BLOCK, 4 * selection._RUNS * selection._RUN_LENGTH)
    torch.set_num_threads(1)
    owner, merged = obim(base, experts, order, 0.7)
    torch.set_num_threads(2)
    owner_2, merged_2 = obim(base, experts, order, 0.7)
    assert torch.equal(owner, owner_2)
    assert same_bits(merged, merged_2)

    free = np.ones(base.numel(), dtype=bool)
    expected = np.full(base.numel(), FREE)
    for k in order:
        scores = np.where(free, reference.scores(experts[k], base), 0)
        mine = top_of(scores, round(experts[k].density * base.numel()))
        expected[mine], free = k, free & ~mine
    assert (owner.reshape(-1).numpy() == expected).all()


@pytest.mark.usefixtures("threads")
def test_a_large_ties_merge_is_the_same_with_any_cut_and_threads() -> None:
    base, experts, _ = big_merge()
    candidates = candidates_of(base, experts)

    def merged(threads: int, block: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        with mock.patch.object(blocks, "CPU_BLOCK", block):
            return merge_ties(candidates, [0.5, 1.0, 0.2], [1.0, -0.3, 2.0], 0.7)

    first = merged(1, blocks.CPU_BLOCK)
    assert same_bits(first, merged(2, blocks.CPU_BLOCK))
    assert same_bits(first, merged(2, 12345))


def test_weights_of_a_float64_merge_are_float64() -> None:
    base = torch.zeros(1, dtype=torch.float64)
    candidates = [Candidate(base + value, base, Magnitude()) for value in (1.0, 2.0)]
    merged = merge_ties(candidates, [1.0, 1.0], [0.3, 0.1], 1.0)
    assert merged.item() == (0.3 * 1.0 + 0.1 * 2.0) / (0.3 + 0.1)


def test_votes_are_counted_in_the_recipes_order() -> None:
    """Five votes that cancel to 0, but to −1 if the first and the last are added first."""
    votes = [1e8, -1.0, 0.0, 0.0, -1e8]
    for numel in (1, 2, 9):  # a reduction's own order depends on the shape
        base = torch.zeros(numel)
        candidates = [Candidate(base + vote, base, Magnitude()) for vote in votes]
        merged = merge_ties(candidates, [1.0] * 5, [1.0] * 5, 1.0)
        assert merged.tolist() == [1e8] * numel


# --- chance -------------------------------------------------------------------------------


def random_scores(key: int, numel: int) -> torch.Tensor:
    ones = torch.ones(numel)
    whole = blocks.Block((slice(None),), 0)
    return RandomScores(key)(ones, whole, ones.shape)


def test_random_ranking_is_splitmix64() -> None:
    """Vigna's published first outputs for seed 1234567, from the counter 1 on."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    expected = [(x >> 34) + 0x20000000 for x in published]  # positive normal float32 numbers
    assert random_scores(1234567, 6)[1:].view(torch.int32).tolist() == expected


def test_random_keys_are_the_same_on_every_machine() -> None:
    key = random_key(0, "model.layers.0.mlp.up_proj.weight", 1)
    assert key == GOLDEN_KEY
    assert random_scores(key, 10).argsort(descending=True).tolist() == GOLDEN_RANKING


GOLDEN_KEY = -964080202534455228
GOLDEN_RANKING = [1, 3, 2, 8, 9, 5, 4, 0, 7, 6]


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_ranking_depends_on_the_flat_index_alone(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(40, 30, generator=generator).to(dtype)
    candidate = Candidate(base + 1, base, RandomScores(random_key(3, "w", 0)))

    def owner(block: int, shape: tuple[int, ...]) -> list[int]:
        view = Candidate(candidate.expert.view(shape), base.view(shape), candidate.criterion)
        with mock.patch.object(blocks, "CPU_BLOCK", block):
            return iterative_owners([view], [0.3], [0]).reshape(-1).tolist()

    first = owner(1 << 16, (40, 30))
    assert first.count(0) == 360
    assert owner(7, (40, 30)) == first
    assert owner(1, (4, 10, 30)) == first
    transposed = Candidate(strided(candidate.expert, "transposed"), base, candidate.criterion)
    assert iterative_owners([transposed], [0.3], [0]).reshape(-1).tolist() == first


def test_random_rankings_differ_by_seed_tensor_and_expert() -> None:
    base, expert = torch.zeros(2000), torch.ones(2000)
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    masks = [
        iterative_owners([Candidate(expert, base, RandomScores(random_key(*key)))], [0.5], [0]) == 0
        for key in keys
    ]
    for mask in masks:
        assert mask.sum() == 1000
        # Neither half, nor the even positions, gets more than a fair share: 500 ± 16 · 4.
        assert 436 <= mask[:1000].sum() <= 564
        assert 436 <= mask[::2].sum() <= 564
    for a, b in itertools.combinations(masks, 2):
        assert 436 <= (a & b).sum() <= 564


def test_random_claims_nothing_that_does_not_differ() -> None:
    base = torch.zeros(100)
    expert = (torch.arange(100) % 4 == 0).float()
    owner = iterative_owners([Candidate(expert, base, RandomScores(7))], [0.5], [0])
    assert torch.equal(owner == 0, expert == 1)


# --- bad weights --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["base", "expert"])
@pytest.mark.parametrize(
    "criterion",
    [Magnitude(), Saliency(torch.ones(1, 30)), GivenScores(torch.ones(20, 30)), RandomScores(1)],
)
def test_weights_that_are_not_finite_are_refused(
    bad: float, where: str, criterion: Criterion
) -> None:
    for sample in SAMPLES:
        pair = {"base": torch.zeros(20, 30), "expert": torch.ones(20, 30)}
        pair[where][13, 7] = bad
        with cut_into(1 << 16, sample), pytest.raises(UnscorableError, match="not finite"):
            iterative_owners([Candidate(**pair, criterion=criterion)], [0.1], [0])


@pytest.mark.parametrize("kind", ["obim", "ties"])
def test_an_expert_that_claims_nothing_leaves_no_trace(kind: str) -> None:
    """Density 0, as for `unscored: base`: not even its infinities may show."""
    base = torch.tensor([1.0, 2.0])
    broken = Candidate(torch.tensor([float("inf"), float("nan")]), base, Magnitude())
    sound = Candidate(torch.tensor([3.0, 3.0]), base, Magnitude())
    if kind == "ties":
        merged = merge_ties([broken, sound], [0.0, 1.0], [1.0, 1.0], 1.0)
    else:
        owner = iterative_owners([broken, sound], [0.0, 1.0], [0, 1])
        merged = merge_owned(base, [broken.expert, sound.expert], owner, [0.5, 1.0])
    assert merged.tolist() == [3.0, 3.0]


def test_more_experts_than_labels_are_refused() -> None:
    candidate = Candidate(torch.ones(1), torch.zeros(1), Magnitude())
    with pytest.raises(ValueError, match="at most 254"):
        iterative_owners([candidate] * 255, [0.0] * 255, range(255))


# --- GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_cpus_result_bit_for_bit() -> None:
    base, experts, order = big_merge()
    chance = RandomScores(random_key(0, "w", 2))
    outcomes = []
    for device in ("cpu", "cuda"):
        there = base.to(device)
        candidates = [
            Candidate(
                e.tensor.to(device), there, chance if e.h is None else Saliency(e.h.to(device))
            )
            for e in experts
        ]
        owner = iterative_owners(candidates, densities_of(experts), order)
        scaled = merge_owned(there, [c.expert for c in candidates], owner, [0.3, 1.0, 0.7])
        ties = merge_ties(candidates, [0.5, 0.2, 0.2], [1.0, 0.3, -0.7], 0.7)
        outcomes.append([t.cpu() for t in (owner, scaled, ties)])
    for cpu, cuda in zip(*outcomes, strict=True):
        assert torch.equal(cpu, cuda)
