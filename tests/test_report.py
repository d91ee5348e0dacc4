"""``obim-report``: its numbers beside the merge's own tensors and float64 references."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import checkpoints
import commands
import reference
from checkpoints import Tensors
from commands import refusal, says, succeed
from mergekit_obim.report.gather import SHARES
from mergekit_obim.saliency.file import saliency_file_name

DENSITIES = (0.3, 0.2, 0.1)
SCALES = (1.5, 1.0, 0.5)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


class Family:
    """A base and three experts that differ from it, and from each other, at every position."""

    def __init__(self, root: Path, dtype: torch.dtype = torch.float32) -> None:
        self.root = root
        shapes, config = checkpoints.llama_shapes(), checkpoints.llama_config()
        base = checkpoints.base_weights(0, shapes)
        self.base: Tensors = {name: tensor.to(dtype) for name, tensor in base.items()}
        checkpoints.write_checkpoint(root / "base", self.base, config)
        self.names = [str(root / f"expert{k}") for k in range(3)]
        self.experts: list[Tensors] = []
        self.h: list[Tensors] = []
        for k, name in enumerate(self.names):
            noise = checkpoints.base_weights(10 + k, shapes)
            expert = {n: (b + 0.1 * noise[n]).to(dtype) for n, b in base.items()}
            self.experts.append(expert)
            checkpoints.write_checkpoint(Path(name), expert, config)
            self.h.append(checkpoints.factored_saliency(shapes, 100 + k))
            path = root / "saliency" / saliency_file_name(name)
            checkpoints.write_saliency_file(path, self.h[k], model=name)

    def recipe(self, **changes: Any) -> dict[str, Any]:
        models = [
            {"model": name, "parameters": {"density": density}}
            for name, density in zip(self.names, DENSITIES, strict=True)
        ]
        return {
            "merge_method": "obim",
            "base_model": str(self.root / "base"),
            "models": models,
            "parameters": {"saliency": str(self.root / "saliency")},
            "dtype": "float32",
            **changes,
        }

    def merged(self, recipe: Mapping[str, Any], folder: Path) -> Tensors:
        path = commands.write_recipe(folder, recipe, "merge.yml")
        succeed(commands.mergekit_yaml(path, folder / "merged"))
        return checkpoints.read_checkpoint(folder / "merged")


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("report"))


def report(recipe: Mapping[str, Any], folder: Path, *options: object) -> dict[str, Any]:
    path = commands.write_recipe(folder, recipe)
    result = succeed(commands.obim_report(path, "--json", "--quiet", *options))
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def owners(family: Family, merged: Tensors, name: str, scales: Sequence[float]) -> np.ndarray:
    """Whose the merged values are, told by the values alone: 3 for the base."""
    base = family.base[name].double()
    owner = np.full(base.shape, -1)
    owner[(merged[name] == family.base[name]).numpy()] = 3
    for k, expert in enumerate(family.experts):
        value = base + scales[k] * (expert[name].double() - base)
        near = torch.isclose(merged[name].double(), value, rtol=1e-6, atol=1e-7)
        owner[near.numpy() & (owner == -1)] = k
    assert (owner >= 0).all()
    return owner


def h_of(family: Family, k: int, name: str) -> np.ndarray | float:
    h = family.h[k].get(name)
    return 1.0 if h is None else h.double().numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({}, (1, 1, 1)),
        ({"parameters": {"order": "recipe", "lambda": 1.5}}, (1.5, 1.5, 1.5)),
        ({"parameters": {"assignment": "least_error"}}, (1, 1, 1)),
        ({"parameters": {"assignment": "nearest"}}, (1, 1, 1)),
        ({"parameters": {"assignment": "nearest", "stretch": 1.2, "lambda": 0.5}}, (0.5,) * 3),
    ],
    ids=["rotation", "scaled", "least_error", "nearest", "nearest, stretched and scaled"],
)
def test_the_numbers_are_those_of_the_merge(
    family: Family, tmp_path: Path, changes: dict[str, Any], scales: Sequence[float]
) -> None:
    shared = {"saliency": str(family.root / "saliency"), **changes.get("parameters", {})}
    recipe = family.recipe(parameters=shared)
    merged = family.merged(recipe, tmp_path)
    found = report(recipe, tmp_path, "--merged", tmp_path / "merged")
    assert found["differing"] == []
    assert [tensor["name"] for tensor in found["tensors"]] == list(checkpoints.llama_shapes())
    owned = np.zeros(4, dtype=int)
    for tensor in found["tensors"]:
        name = tensor["name"]
        owner = owners(family, merged, name, scales)
        assert tensor["elements"] == owner.size
        assert tensor["owned"] == [int((owner == k).sum()) for k in range(4)], name
        owned += tensor["owned"]
        for k, expert in enumerate(family.experts):
            h = h_of(family, k, name)
            own = expert[name].double().numpy()
            s = h * (own - family.base[name].double().numpy()) ** 2
            np.testing.assert_allclose(
                tensor["saliency"][k],
                [s[owner == j].sum() for j in range(4)],
                rtol=1e-5,
                atol=1e-6 * s.sum(),
                err_msg=name,
            )
            error = (h * (merged[name].double().numpy() - own) ** 2).sum()
            np.testing.assert_allclose(
                tensor["error"][k], error, rtol=1e-4, atol=1e-6 * s.sum(), err_msg=name
            )
    assert found["owned"] == owned.tolist()
    for k, shares in enumerate(found["experts_total"]):
        measured = [t for t in found["tensors"] if t["name"] in family.h[0]]
        total = sum(sum(t["saliency"][k]) for t in measured)
        assert shares["kept"] == pytest.approx(sum(t["saliency"][k][k] for t in measured) / total)
        assert shares["error"] == pytest.approx(sum(t["error"][k] for t in measured) / total)
        parts = shares["kept"] + shares["overwritten"] + shares["dropped"]
        assert parts == pytest.approx(1)


@pytest.mark.parametrize("assignment", ["least_error", "nearest"])
def test_shares_without_densities_are_the_merged_model_s(
    family: Family, tmp_path: Path, assignment: str
) -> None:
    """Told weight by weight, to the bit, from whose value the merged model has there."""
    parameters = {"saliency": str(family.root / "saliency"), "assignment": assignment}
    models = family.recipe()["models"]
    for model, weight in zip(models, (1.0, 0.5, 2.0), strict=True):
        model["parameters"] = {"weight": weight}
    recipe = family.recipe(parameters=parameters, models=models)
    merged = family.merged(recipe, tmp_path)
    counts: dict[str, list[int]] = {}
    for name, tensor in merged.items():
        values = [*(expert[name] for expert in family.experts), family.base[name]]
        same = torch.stack([tensor == value for value in values])
        assert bool((same.sum(0) == 1).all()), name  # the values are distinct: one owner each
        counts[name] = same.flatten(1).sum(1).tolist()
    found = report(recipe, tmp_path, "--merged", tmp_path / "merged")
    assert {tensor["name"]: tensor["owned"] for tensor in found["tensors"]} == counts
    total = np.sum(list(counts.values()), axis=0).tolist()
    assert found["owned"] == total
    assert min(total) > 0  # each expert and the base have some
    for level in ("layers", "cells"):
        assert np.sum([part["owned"] for part in found[level]], axis=0).tolist() == total
    layer = next(part for part in found["layers"] if part["place"] == "model.layers.1")
    inside = [counts[name] for name in counts if name.startswith("model.layers.1.")]
    assert layer["owned"] == np.sum(inside, axis=0).tolist()
    assert found["differing"] == []


@pytest.mark.slow
@pytest.mark.parametrize("assignment", ["least_error", "nearest"])
def test_the_page_without_densities_has_the_same_parts(
    family: Family, tmp_path: Path, assignment: str
) -> None:
    pages = {}
    for name in ("iterative", assignment):
        parameters = {"saliency": str(family.root / "saliency"), "assignment": name}
        path = commands.write_recipe(tmp_path, family.recipe(parameters=parameters))
        succeed(commands.obim_report(path, "-o", tmp_path / f"{name}.html", "--quiet"))
        pages[name] = (tmp_path / f"{name}.html").read_text(encoding="utf-8")
    page = pages[assignment]
    assert re.findall(r"<h2>.*?</h2>", page) == re.findall(r"<h2>.*?</h2>", pages["iterative"])
    # A share map and an error chart an expert, and kinship; nothing is contested, nothing varies.
    assert page.count("<svg") == page.count("<figcaption") == 3 + 3 + 1
    says(page, f"assignment: {assignment}", "no densities", "no order")
    assert "density</th>" in pages["iterative"]
    assert "density</th>" not in page
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)


def test_what_is_contested(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe()
    merged = family.merged(recipe, tmp_path)
    found = report(recipe, tmp_path)
    some = 0
    for tensor in found["tensors"]:
        name = tensor["name"]
        wanted = np.zeros(tensor["elements"], dtype=int)
        for k in range(3):
            h = family.h[k].get(name)
            expert = reference.Expert(family.experts[k][name], density=DENSITIES[k], h=h)
            scores = reference.scores(expert, family.base[name])
            count = reference.keep_count(expert, 3, tensor["elements"])
            wanted[reference.best_positions(scores, count)] += 1
        owner = owners(family, merged, name, (1, 1, 1)).reshape(-1)
        expected = [int(((owner == k) & (wanted > 1)).sum()) for k in range(4)]
        assert tensor["contested"] == expected, name
        assert expected[3] == 0  # who wants it and comes first gets it
        some += sum(expected)
    assert sum(found["contested"]) == some > 0


def test_the_curve_passes_through_the_recipe(family: Family, tmp_path: Path) -> None:
    found = report(family.recipe(), tmp_path)
    assert sum(found["densities"]) == pytest.approx(0.6)
    assert 0.6 in SHARES
    at = {(point["order"], point["density"]): point["experts"] for point in found["curve"]}
    # These tensors are small enough to be in the sample whole.
    assert len(at) == 3 * len(SHARES)
    everything = {**dict.fromkeys(("kept", "dropped", "error"), 0.0)}
    for k in range(3):
        total = sum(sum(tensor["saliency"][k]) for tensor in found["tensors"])
        everything["kept"] = sum(t["saliency"][k][k] for t in found["tensors"]) / total
        everything["dropped"] = sum(t["saliency"][k][3] for t in found["tensors"]) / total
        everything["error"] = sum(t["error"][k] for t in found["tensors"]) / total
        for key, value in everything.items():
            assert at["rotation", 0.6][k][key] == pytest.approx(value, rel=1e-5), key
    recipe = family.recipe(
        parameters={"saliency": str(family.root / "saliency"), "order": "recipe"}
    )
    found = report(recipe, tmp_path)
    total = sum(sum(tensor["saliency"][0]) for tensor in found["tensors"])
    kept = sum(t["saliency"][0][0] for t in found["tensors"]) / total
    assert at["recipe", 0.6][0]["kept"] == pytest.approx(kept, rel=1e-5)
    assert at["recipe", 0.6][0]["kept"] > at["recipe reversed", 0.6][0]["kept"]


def test_large_tensors_are_sampled_for_the_curve(tmp_path: Path) -> None:
    from mergekit_obim.kernels.iterative import iterative_owners
    from mergekit_obim.kernels.scores import Candidate, Saliency
    from mergekit_obim.methods.obim import Assignment
    from mergekit_obim.report import gather

    generator = torch.Generator().manual_seed(0)
    shape = (600, 700)
    base = torch.randn(shape, generator=generator)
    experts = [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(2)]
    h = Saliency(torch.rand((1, 700), generator=generator))
    candidates = [Candidate(expert, base, h) for expert in experts]
    owner = iterative_owners(candidates, [0.3, 0.3], [0, 1])
    exact = gather.tally(candidates, owner, [1, 1])
    curve: dict[tuple[str, float], Any] = {}
    assignment = Assignment(candidates, owner, [1, 1], [0.3, 0.3], [0, 1])
    sampled = [gather._sampled(candidate, owner.shape) for candidate in candidates]
    assert {c.base.numel() for c in sampled} == {2048}
    gather._add_to_curve(curve, assignment, sampled, {"layer": 0})
    estimate = curve["recipe", 0.6]
    np.testing.assert_allclose(estimate.saliency, exact.saliency, rtol=0.15)
    np.testing.assert_allclose(estimate.error, exact.error, rtol=0.15)
    assert estimate.owned.sum() == pytest.approx(600 * 700)
    everywhere = [
        Candidate(e.view(-1), base.view(-1), Saliency(h.h.expand(shape).reshape(-1)))
        for e in experts
    ]
    whole = (gather.claim_counts(everywhere, [0.3, 0.3]) > 1).mean()
    assert (gather.claim_counts(sampled, [0.3, 0.3]) > 1).mean() == pytest.approx(whole, abs=0.02)


def test_kinship_is_that_of_the_task_vectors(family: Family, tmp_path: Path) -> None:
    found = report(family.recipe(), tmp_path)["kinship"]
    deltas = np.stack([
        np.concatenate([
            (expert[n].double() - family.base[n].double()).numpy().reshape(-1) for n in family.base
        ])
        for expert in family.experts
    ])  # fmt: skip
    np.testing.assert_allclose(found["pearson"], np.corrcoef(deltas), atol=1e-5)
    size = np.linalg.norm(deltas, axis=1)
    np.testing.assert_allclose(found["cosine"], deltas @ deltas.T / np.outer(size, size), atol=1e-5)
    distance = np.linalg.norm(deltas[:, None] - deltas[None], axis=2)
    np.testing.assert_allclose(found["euclidean"], distance, rtol=1e-4, atol=0.01)


def test_what_fell_back_and_what_was_left_out(family: Family, tmp_path: Path) -> None:
    parameters = {"saliency": str(family.root / "saliency"), "unscored": "base"}
    found = report(family.recipe(parameters=parameters), tmp_path)
    norms = [name for name in family.base if "norm" in name]
    assert {f["tensor"] for f in found["fallbacks"]} == set(norms)
    assert {f["reason"] for f in found["fallbacks"]} == {"not in the saliency file"}
    for tensor in found["tensors"]:
        if tensor["name"] in norms:
            assert tensor["owned"] == [0, 0, 0, tensor["elements"]]
    models = family.recipe()["models"]
    models[1]["parameters"]["criterion"] = "magnitude"
    found = report(family.recipe(models=models), tmp_path)
    assert set(found["calibration"]) == {family.names[0], family.names[2]}
    assert {t["ranked"][1] for t in found["tensors"]} == {"magnitude"}
    assert {f["reason"] for f in found["fallbacks"] if f["expert"] == family.names[1]} == {
        "the recipe asks for it"
    }
    assert not found["measured"]
    # What adds up the experts' errors needs all of them: one without saliency decides for all.
    parameters["assignment"] = "nearest"
    found = report(family.recipe(models=models, parameters=parameters), tmp_path)
    reasons = {(f["expert"], f["reason"]) for f in found["fallbacks"] if f["tensor"] == Q_PROJ}
    assert reasons == {
        (family.names[0], "another expert has no saliency for it"),
        (family.names[1], "the recipe asks for it"),
        (family.names[2], "another expert has no saliency for it"),
    }
    # A file that says why it has no entry is quoted.
    name = family.names[0]
    path = tmp_path / saliency_file_name(name)
    unscored = json.dumps(dict.fromkeys(norms, "never used"))
    checkpoints.write_saliency_file(path, family.h[0], model=name, unscored=unscored)
    models = family.recipe()["models"]
    models[0]["parameters"]["saliency"] = str(path)
    found = report(family.recipe(models=models), tmp_path)
    reasons = {(f["expert"], f["reason"]) for f in found["fallbacks"]}
    assert (name, "never used") in reasons
    assert (family.names[1], "not in the saliency file") in reasons


@pytest.mark.slow
def test_a_merged_model_of_another_recipe(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe()
    tensors = family.merged(recipe, tmp_path)
    tensors[Q_PROJ] = tensors[Q_PROJ] + 1
    [path] = (tmp_path / "merged").glob("*.safetensors")
    save_file(tensors, path, metadata={"format": "pt"})
    assert report(recipe, tmp_path, "--merged", tmp_path / "merged")["differing"] == [Q_PROJ]
    out = tmp_path / "r.html"
    path = commands.write_recipe(tmp_path, recipe)
    result = commands.obim_report(path, "--merged", tmp_path / "merged", "-o", out)
    says(succeed(result).stderr, "Warning", Q_PROJ)
    says(out.read_text(encoding="utf-8"), "is not what this recipe makes", Q_PROJ)
    empty = tmp_path / "empty"
    empty.mkdir()
    says(refusal(commands.obim_report(path, "--merged", empty)), empty, "mergekit-yaml wrote")


def test_refusals(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = commands.write_recipe(tmp_path, family.recipe(merge_method="consensus_ta"))
    says(refusal(commands.obim_report(path)), "consensus_ta", "reads no saliency files", "ties_obm")
    path = commands.write_recipe(tmp_path, family.recipe(parameters={"saliency": "nowhere"}))
    says(refusal(commands.obim_report(path)), "no saliency", family.names[0])
    path = commands.write_recipe(tmp_path, family.recipe())
    import mergekit_obim.report

    for name in ("page", "figures"):
        monkeypatch.delitem(sys.modules, f"mergekit_obim.report.{name}", raising=False)
        monkeypatch.delattr(mergekit_obim.report, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    says(refusal(commands.obim_report(path)), "pip install 'mergekit-obim[report]'", "--json")
    succeed(commands.obim_report(path, "--json"))


def test_nothing_is_merged_and_nothing_else_is_disturbed(
    family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = family.recipe()
    before = family.merged(recipe, tmp_path)
    with caplog.at_level(logging.WARNING, logger="mergekit_obim"):
        report(recipe, tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    commands.same_tensors(before, family.merged(recipe, again))
