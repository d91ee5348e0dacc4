"""Tensors as large as real ones, and larger than 32 bits count: exact, in bounded memory.

Needs 20 GB and minutes, so `make test` leaves it out; `make test-large` runs it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.large
ROOT = Path(__file__).resolve().parent.parent

# In a process of its own: what was the largest resident memory, before and after.
PEAK = """
import json, re, sys
import numpy as np
import torch
from mergekit_obim.kernels.iterative import iterative_owners
from mergekit_obim.kernels.merging import merge_owned
from mergekit_obim.kernels.scores import Candidate, Saliency
from mergekit_obim.kernels.selection import FREE

def resident(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def check(owner, candidates, counts):
    '''Every expert's claims are the top of what was free in its turn, ties by lowest index.'''
    rows = max(1, (1 << 24) // owner.shape[1])
    parts = [slice(i, i + rows) for i in range(0, len(owner), rows)]
    later = [*range(len(candidates)), FREE]
    for k, (candidate, count) in enumerate(zip(candidates, counts)):
        later.remove(k)
        def scores(part):
            delta = candidate.expert[part].float() - candidate.base[part].float()
            return (delta * delta * candidate.criterion.h.expand(owner.shape)[part]).numpy()
        claimed, lowest = 0, np.inf
        for part in parts:
            mine = (owner[part] == k).numpy()
            claimed += np.count_nonzero(mine)
            lowest = min(lowest, scores(part)[mine].min(initial=np.inf))
        assert claimed == count, (k, claimed, count)
        passed_over = False  # a position of the lowest score was free and not claimed
        for part in parts:
            mine, s = (owner[part] == k).numpy(), scores(part)
            left = np.isin(owner[part].numpy(), later)
            assert not (left & (s > lowest)).any(), k
            tied_mine, tied_left = mine & (s == lowest), left & (s == lowest)
            if tied_mine.any():
                assert not passed_over, k
                if tied_left.any():
                    assert np.flatnonzero(tied_mine)[-1] < np.flatnonzero(tied_left)[0], k
            passed_over |= bool(tied_left.any())
"""

EMBEDDING = """
shape, generator = (128256, 8192), torch.Generator().manual_seed(0)
base = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
experts = []
for k in range(3):
    expert = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.001, generator=generator)
    experts.append(expert.add_(base))
candidates = [
    Candidate(expert, base, Saliency(torch.rand(1, shape[1], generator=generator)))
    for expert in experts
]
before = resident("VmRSS")
assert before > 4 * base.nbytes, "the inputs are in memory"
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
owner = iterative_owners(candidates, [0.4, 0.35, 0.25], [0, 1, 2])
merged = merge_owned(base, experts, owner, [1.0] * 3)
extra = (resident("VmHWM") - before) / base.numel()
check(owner, candidates, [round(d * base.numel()) for d in (0.4, 0.35)])
for k, expert in enumerate([*experts, base]):
    there = owner == (k if k < 3 else FREE)
    assert torch.equal(merged[there], expert[there]), k
    del there
print(json.dumps({"bytes_per_element": extra}))
"""

# 2^31 elements of which the inputs hold one row each: views may repeat memory.
INDICES = """
shape, generator = (1 << 15, 1 << 16), torch.Generator().manual_seed(0)
base = torch.zeros(1, 1, dtype=torch.bfloat16).expand(shape)
row = torch.randn(1, shape[1], generator=generator).bfloat16().expand(shape)
column = torch.rand(shape[0], 1, generator=generator)
ones = torch.ones(1, 1, dtype=torch.bfloat16).expand(shape)
candidates = [
    Candidate(row, base, Saliency(column)),
    Candidate(ones, base, Saliency(torch.ones(1, 1))),  # all tied
]
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
owner = iterative_owners(candidates, [0.3, 0.3], [0, 1])
extra = (resident("VmHWM") - before) / owner.numel()
check(owner, candidates, [round(0.3 * owner.numel())] * 2)
print(json.dumps({"bytes_per_element": extra}))
"""


SKETCHES = """
from mergekit_obim.kernels.nystrom import nystrom_factor
from mergekit_obim.kernels.gram import draw_test_matrix
from mergekit_obim.kernels.regmean_gram import Gram, merge_regmean_layers

shape, generator = (4096, 14336), torch.Generator().manual_seed(0)
base = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.002, generator=generator)
experts, layers = [], []
for k in range(3):
    expert = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.001, generator=generator)
    experts.append(expert.add_(base))
    inputs = torch.randn(64, shape[1], generator=generator)
    h, omega = inputs.square().mean(0), draw_test_matrix(shape[1], 16)
    factor = nystrom_factor(inputs.T @ (inputs @ omega) / 64, h)
    layers.append(lambda _, gram=Gram(h, factor): gram)
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
merged = merge_regmean_layers(base, experts, -1, layers, [1.0] * 3, 0.95, 1.0)
extra = (resident("VmHWM") - before) / base.numel()
rows = merged[:64].double() - base[:64].double()
grams = [known(0) for known in layers]
# The equations hold: sum of (D - delta) G is 0 but for the rounding of the result to bfloat16.
pull = scale = 0
for expert, gram in zip(experts, grams):
    off = rows - (expert[:64].double() - base[:64].double())
    u, h = gram.factor, gram.h.double()
    part = 0.95 * (off @ u) @ u.T + off * (h - 0.95 * u.square().sum(1))
    pull, scale = pull + part, scale + part.square().mean()
assert pull.square().mean() < 0.01 * scale, (pull.square().mean(), scale)
print(json.dumps({"bytes_per_element": extra}))
"""


def run(code: str) -> dict[str, float]:
    command = [sys.executable, "-c", PEAK + code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    figures: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return figures


def test_a_large_embedding_needs_8_bytes_an_element_beside_its_inputs() -> None:
    assert 3 <= run(EMBEDDING)["bytes_per_element"] <= 8  # the owners' map and the result are 3


def test_sketches_of_a_wide_layer_need_little_beside_its_inputs() -> None:
    assert 2 <= run(SKETCHES)["bytes_per_element"] <= 4  # the result is 2


def test_indices_beyond_31_bits() -> None:
    assert 1 <= run(INDICES)["bytes_per_element"] <= 4
