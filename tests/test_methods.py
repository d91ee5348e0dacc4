"""Our methods through mergekit itself, every output tensor against the slow reference."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.api import merge_state_dicts, merge_tensors
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import SimpleLoaderCache
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import checkpoints
import reference
from checkpoints import Family, Tensors
from mergekit_obim.errors import RecipeError, SaliencyFileError, SaliencyNotFoundError
from mergekit_obim.kernels.blocks import Block
from mergekit_obim.kernels.scores import RandomScores, random_key
from mergekit_obim.methods import METHODS, register
from mergekit_obim.methods.saliency import saliency_of
from mergekit_obim.saliency.file import (
    PUBLISHED_NAME,
    SaliencyMetadata,
    saliency_file_name,
    write_saliency,
)
from mergekit_obim.saliency.fingerprint import fingerprint
from reference import Expert

pytestmark = pytest.mark.usefixtures("one_thread")

register()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return checkpoints.write_family(tmp_path_factory.mktemp("family"))


def recipe(family: Family, *, method: str = "obim", **more: Any) -> dict[str, Any]:
    return checkpoints.recipe_of(family, method=method, **more)


def merge(config: dict[str, Any], out: Path, **options: Any) -> Tensors:
    options = {"copy_tokenizer": False, "write_model_card": False, "quiet": True} | options
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(**options))
    return checkpoints.read_checkpoint(out)


def assert_same(merged: Tensors, expected: Tensors) -> None:
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        assert merged[name].dtype == tensor.dtype, name
        differing = int((merged[name] != tensor).count_nonzero())
        assert not differing, f"{name}: {differing} of {tensor.numel()} elements differ"


def chance(seed: int, name: str, k: int, like: torch.Tensor) -> torch.Tensor:
    """The random ranking of a tensor, which only its own definition can give."""
    ones = torch.ones(like.numel())
    whole = Block((slice(None),), 0)
    return RandomScores(random_key(seed, name, k))(ones, whole, ones.shape).view(like.shape)


Tune = Callable[[str, int, Expert], None]


@dataclass
class Case:
    """A recipe's settings and what they mean to the reference."""

    per_model: list[dict[str, Any]] | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    method: str = "obim"
    tune: Tune = lambda name, k, expert: None
    reference: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    form: str = "factored"
    auto: bool = False  # the stretch is what the whole model's task vectors come to

    @property
    def merged_by(self) -> str:
        """The reference's function."""
        assignment = self.shared.get("assignment", "iterative")
        return self.method if assignment == "iterative" else assignment


def expected_merge(family: Family, case: Case) -> Tensors:
    expected = {}
    for name, base in family.base_tensors.items():
        base = base.to(case.dtype or base.dtype)
        experts = []
        for k, tensors in enumerate(family.expert_tensors):
            expert = Expert(tensors[name].to(base.dtype), h=family.h[k].get(name))
            if case.form == "dense" and expert.h is not None:
                dense = checkpoints.dense_saliency(family.h[k], tensors, family.base_tensors)
                expert.h, expert.dense = None, dense[name]
            case.tune(name, k, expert)
            experts.append(expert)
        settings = dict(case.reference)
        if case.auto:
            settings["stretch"] = reference.cosines(family.base_tensors, family.expert_tensors)
        if case.merged_by == "obim":
            settings["layer"] = reference.layer_index(name, family.layers)
        merged = getattr(reference, case.merged_by)(base, experts, **settings)
        expected[name] = merged.to(case.out_dtype or merged.dtype)
    return expected


# --- what the settings mean to the reference ---


def scaled(name: str, k: int, expert: Expert) -> None:
    expert.density, expert.weight = [0.5, 0.3, 0.1][k], [1.0, 0.5, -1.5][k]


def by_magnitude(name: str, k: int, expert: Expert) -> None:
    expert.h = None


def second_by_magnitude(name: str, k: int, expert: Expert) -> None:
    if k == 1:
        expert.h = None


def norms_by_chance(seed: int) -> Tune:
    def tune(name: str, k: int, expert: Expert) -> None:
        if "norm" in name:
            expert.dense = chance(seed, name, k, expert.tensor)

    return tune


def all_by_chance(name: str, k: int, expert: Expert) -> None:
    expert.h, expert.dense = None, chance(0, name, k, expert.tensor)


def norms_barred(name: str, k: int, expert: Expert) -> None:
    expert.barred = "norm" in name


def together(*tunes: Tune) -> Tune:
    def tune(name: str, k: int, expert: Expert) -> None:
        for each in tunes:
            each(name, k, expert)

    return tune


def filtered(name: str, k: int, expert: Expert) -> None:
    expert.density = 0.1 if "mlp" in name else 0.25


def graded(name: str, k: int, expert: Expert) -> None:
    layer = reference.layer_index(name, 0) if ".layers." in name else 0
    expert.density = [0.05, 0.15, 0.25][layer]


def weighed(name: str, k: int, expert: Expert) -> None:
    expert.weight = [1.0, 0.5, 2.0][k]


def balanced(name: str, k: int, expert: Expert) -> None:
    expert.weight, expert.mask_threshold = [1.0, 0.5, -1.5][k], [0.2, 0.4, 1.5][k]


LEAST = {"assignment": "least_error"}
NEAREST = {"assignment": "nearest"}
WEIGHED = [{}, {"weight": 0.5}, {"weight": 2.0}]
SCALED = [
    {"density": 0.5},
    {"density": 0.3, "weight": 0.5},
    {"density": 0.1, "weight": -1.5},
]
CASES = {
    "defaults": Case(),
    "dense": Case(form="dense"),
    "density and weight": Case(SCALED, tune=scaled),
    "lambda": Case(SCALED, {"lambda": 0.7}, tune=scaled, reference={"lambda_": 0.7}),
    "recipe order": Case(shared={"order": "recipe"}, reference={"order": "recipe"}),
    "magnitude": Case(shared={"criterion": "magnitude"}, tune=by_magnitude, form="none"),
    "random": Case(shared={"criterion": "random"}, tune=all_by_chance, form="none"),
    "one by magnitude": Case([{}, {"criterion": "magnitude"}, {}], tune=second_by_magnitude),
    "unscored random": Case(
        shared={"unscored": "random", "seed": 5}, tune=norms_by_chance(5), form="factored"
    ),
    "unscored base": Case(shared={"unscored": "base"}, tune=norms_barred),
    "the paper's norms": Case(
        shared={"criterion": [{"filter": "norm", "value": "random"}, {"value": "saliency"}]},
        tune=norms_by_chance(0),
    ),
    "density by filter": Case(
        [{"density": [{"filter": "mlp", "value": 0.1}, {"value": 0.25}]}] * 3, tune=filtered
    ),
    "density by gradient": Case(shared={"density": [0.05, 0.25]}, tune=graded),
    "bfloat16": Case(SCALED, top={"dtype": "bfloat16"}, dtype=torch.bfloat16, tune=scaled),
    "float64": Case(SCALED, top={"dtype": "float64"}, dtype=torch.float64, tune=scaled),
    "out_dtype": Case(top={"out_dtype": "float16"}, out_dtype=torch.float16),
    "ties": Case(method="ties_obm"),
    "ties, dense": Case(method="ties_obm", form="dense"),
    "ties, scaled": Case(
        SCALED,
        {"lambda": 0.7, "normalize": False},
        method="ties_obm",
        tune=scaled,
        reference={"lambda_": 0.7, "normalize": False},
    ),
    "ties, unscored base": Case(
        SCALED,
        {"unscored": "base"},
        method="ties_obm",
        tune=together(scaled, norms_barred),
    ),
    "least error": Case(shared=LEAST),
    "least error, dense": Case(shared=LEAST, form="dense"),
    "least error, no density and no order": Case(
        [{"density": 0.9}] * 3, {**LEAST, "order": "recipe"}
    ),
    "least error, weighed": Case(
        WEIGHED, {**LEAST, "lambda": 0.7}, tune=weighed, reference={"lambda_": 0.7}
    ),
    "least error, bfloat16": Case(
        WEIGHED, LEAST, tune=weighed, top={"dtype": "bfloat16"}, dtype=torch.bfloat16
    ),
    "nearest": Case(shared=NEAREST, auto=True),
    "nearest, asked for the default": Case(shared={**NEAREST, "stretch": "auto"}, auto=True),
    "nearest, weighed": Case(
        WEIGHED, {**NEAREST, "lambda": 0.7}, tune=weighed, reference={"lambda_": 0.7}, auto=True
    ),
    "nearest, by filter": Case(
        shared={**NEAREST, "stretch": [{"filter": "no such", "value": 1.0}, {"value": "auto"}]},
        auto=True,
    ),
    "nearest, by gradient": Case(
        shared={**NEAREST, "stretch": [2.5, 2.5]}, reference={"stretch": 2.5}
    ),
    "nearest, stretched": Case(
        shared={**NEAREST, "stretch": 3.0}, reference={"stretch": 3.0}, form="dense"
    ),
    "nearest, a norm left out": Case(
        shared={**NEAREST, "unscored": "base"}, tune=norms_barred, auto=True
    ),
    "least error by magnitude": Case(
        shared={**LEAST, "criterion": "magnitude"}, tune=by_magnitude, form="none"
    ),
    "least error by chance is by magnitude": Case(
        shared={**LEAST, "criterion": "random"}, tune=by_magnitude, form="none"
    ),
    "least error, one by magnitude": Case(
        [{}, {"criterion": "magnitude"}, {}], LEAST, tune=second_by_magnitude
    ),
    "least error, unscored base": Case(shared={**LEAST, "unscored": "base"}, tune=norms_barred),
    "diagonal": Case(method="regmean_diag"),
    "diagonal, dense": Case(method="regmean_diag", form="dense"),
    "diagonal, weighed": Case(
        WEIGHED,
        {"lambda": 0.7},
        method="regmean_diag",
        tune=weighed,
        reference={"lambda_": 0.7},
    ),
    "diagonal, stretched": Case(
        shared={"stretch": 1.5}, method="regmean_diag", reference={"stretch": 1.5}
    ),
    "diagonal, stretched by what was measured": Case(
        WEIGHED,
        {"lambda": 0.7, "stretch": "auto"},
        method="regmean_diag",
        tune=weighed,
        reference={"lambda_": 0.7},
        auto=True,
    ),
    "diagonal, bfloat16": Case(
        method="regmean_diag", top={"dtype": "bfloat16"}, dtype=torch.bfloat16
    ),
    "diagonal, one by magnitude": Case(
        [{}, {"criterion": "magnitude"}, {}], method="regmean_diag", tune=second_by_magnitude
    ),
    "diagonal, unscored base": Case(
        shared={"unscored": "base"}, method="regmean_diag", tune=norms_barred
    ),
    "sign": Case(method="obm_sign"),
    "sign, dense": Case(method="obm_sign", form="dense"),
    "sign, scaled": Case(
        SCALED,
        {"lambda": 0.7, "normalize": False},
        method="obm_sign",
        tune=scaled,
        reference={"lambda_": 0.7, "normalize": False},
    ),
    "sign, one by magnitude": Case(
        [{}, {"criterion": "magnitude"}, {}], method="obm_sign", tune=by_magnitude
    ),
    "sign, unscored base": Case(shared={"unscored": "base"}, method="obm_sign", tune=norms_barred),
    "consensus": Case(method="consensus_ta", form="none"),
    "consensus, balanced": Case(
        [
            {"mask_threshold": 0.2},
            {"weight": 0.5},
            {"weight": -1.5, "mask_threshold": 1.5},
        ],
        {"lambda": 0.7, "min_agreement": 1},
        method="consensus_ta",
        tune=balanced,
        reference={"lambda_": 0.7, "min_agreement": 1},
        form="none",
    ),
    "pcb": Case(method="pcb", form="none"),
    "pcb, scaled": Case(
        SCALED,
        {"lambda": 0.7},
        method="pcb",
        tune=scaled,
        reference={"lambda_": 0.7},
        form="none",
    ),
}


ONLY_RECIPES = (
    "the paper's norms",
    "density by filter",
    "density by gradient",
    "nearest, by filter",
    "nearest, by gradient",
)


def shared_settings(family: Family, case: Case) -> dict[str, Any]:
    folders = {"factored": family.factored, "dense": family.dense}
    where = {"saliency": str(folders[case.form])} if case.form in folders else {}
    return where | case.shared


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_graph_path_is_the_reference(name: str, family: Family, tmp_path: Path) -> None:
    case = CASES[name]
    shared = shared_settings(family, case)
    config = recipe(family, method=case.method, per_model=case.per_model, shared=shared, **case.top)
    assert_same(merge(config, tmp_path / "out"), expected_merge(family, case))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ONLY_RECIPES])
def test_the_in_memory_path_is_the_reference(name: str, family: Family) -> None:
    case = CASES[name]
    ids = [str(folder) for folder in family.experts]
    parameters = shared_settings(family, case)
    for key in {key for settings in case.per_model or [] for key in settings}:
        default = {"weight": 1.0, "criterion": "saliency", "mask_threshold": 0.4}.get(key)
        parameters[key] = {
            model: settings.get(key, default)
            for model, settings in zip(ids, case.per_model, strict=True)
        }
    models = {"base": family.base_tensors, **dict(zip(ids, family.expert_tensors, strict=True))}
    before = {model: {n: t.clone() for n, t in ts.items()} for model, ts in models.items()}
    merged = merge_state_dicts(
        models,
        case.method,
        base="base",
        parameters=parameters,
        dtype=case.dtype,
        out_dtype=case.out_dtype,
    )
    assert_same(merged, expected_merge(family, case))
    for model, tensors in models.items():
        assert_same(tensors, before[model])


def test_a_merge_of_one_tensor(family: Family) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    merged = merge_tensors(
        [family.expert_tensors[0][name], family.base_tensors[name], family.expert_tensors[1][name]],
        "obim",
        ids=["a", "base", "b"],
        base_index=1,
        name=name,
        parameters={"criterion": "magnitude"},
    )
    experts = [Expert(family.expert_tensors[k][name]) for k in range(2)]
    assert torch.equal(merged, reference.obim(family.base_tensors[name], experts, layer=2))


def test_modules_with_gradients_are_merged(family: Family) -> None:
    """mergekit's Python API takes modules as they are, without torch.no_grad()."""
    modules = [torch.nn.Linear(5, 3) for _ in range(3)]
    for method in METHODS:
        parameters: dict[str, Any] = {"weight": 0.5}
        if method.reads_saliency:
            parameters["criterion"] = "magnitude"
        merged = merge_state_dicts(modules, method.spec.name, base=0, parameters=parameters)
        assert set(merged) == {"weight", "bias"}
        assert all(torch.isfinite(tensor).all() for tensor in merged.values())


@pytest.mark.parametrize(
    "name",
    [
        "density and weight",
        "least error",
        "nearest, weighed",
        "diagonal, weighed",
        "diagonal, stretched by what was measured",
        "consensus, balanced",
    ],
)
def test_mergekit_pytorch_is_the_reference(name: str, family: Family, tmp_path: Path) -> None:
    case = CASES[name]
    files = [family.factored / saliency_file_name(str(folder)) for folder in family.experts]
    config = {
        "merge_method": case.method,
        "base_model": str(family.base / "model.safetensors"),
        "models": [
            {
                "model": str(folder / "model.safetensors"),
                "parameters": settings
                | ({"saliency": str(file)} if case.form == "factored" else {}),
            }
            for folder, settings, file in zip(
                family.experts, case.per_model or [{}] * 3, files, strict=True
            )
        ],
        "parameters": case.shared,
    }
    # A model of another merge in this process must not change what the last layer is.
    deeper = checkpoints.base_weights(0, checkpoints.llama_shapes(layers=5))
    checkpoints.write_checkpoint(tmp_path / "deeper", deeper, checkpoints.llama_config(layers=5))
    SimpleLoaderCache().get(str(tmp_path / "deeper" / "model.safetensors"))

    path = tmp_path / "raw.yml"
    path.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(mergekit_pytorch, [str(path), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    merged = checkpoints.read_checkpoint(tmp_path / "out")
    assert_same(merged, expected_merge(family, case))


@pytest.mark.slow
@pytest.mark.parametrize("method", [method.spec.name for method in METHODS])
def test_a_base_that_is_listed_among_the_models_is_no_expert(
    method: str, family: Family, tmp_path: Path
) -> None:
    """mergekit's convention. Densities, the order and every ranking by chance stay the same."""
    shared: dict[str, Any] = {}
    if next(m for m in METHODS if m.spec.name == method).reads_saliency:
        shared["saliency"] = str(family.factored)
    if method in ("obim", "ties_obm"):
        shared["criterion"] = [{"filter": "norm", "value": "random"}, {"value": "saliency"}]
    config = recipe(family, method=method, shared=shared)
    expected = merge(config, tmp_path / "without")
    for place in range(len(family.experts) + 1):
        listed = {**config, "models": list(config["models"])}
        listed["models"].insert(place, {"model": str(family.base), "parameters": {"weight": 0.2}})
        assert_same(merge(listed, tmp_path / f"with{place}"), expected)


def test_a_base_that_is_listed_is_no_expert_of_mergekit_pytorch(
    family: Family, tmp_path: Path
) -> None:
    config: dict[str, Any] = {
        "merge_method": "obim",
        "base_model": str(family.base / "model.safetensors"),
        "models": [{"model": str(m / "model.safetensors")} for m in (family.base, *family.experts)],
        "parameters": {"criterion": "magnitude"},
    }
    for name in ("with", "without"):
        path = tmp_path / f"{name}.yml"
        path.write_text(yaml.safe_dump(config))
        result = CliRunner().invoke(mergekit_pytorch, [str(path), str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        del config["models"][0]
    merged = [checkpoints.read_checkpoint(tmp_path / name) for name in ("with", "without")]
    assert_same(*merged)


def test_registering_again_changes_nothing() -> None:
    before = {method.spec.name: method for method in merge_methods.registered_methods()}
    register()
    after = {method.spec.name: method for method in merge_methods.registered_methods()}
    assert after == before
    assert merge_methods.get("obim") is before["obim"]
    ours = {"obim", "ties_obm", "obm_sign", "regmean_diag", "regmean", "consensus_ta", "pcb"}
    assert ours == {method.spec.name for method in METHODS} <= set(before)


# --- threads -----------------------------------------------------------------------------


@pytest.mark.slow
def test_threads_change_nothing(family: Family, tmp_path: Path) -> None:
    """With mergekit's own -j, in a process of its own: it also sets the interop threads."""
    path = tmp_path / "recipe.yml"
    path.write_text(
        yaml.safe_dump(recipe(family, per_model=SCALED, shared={"criterion": "random"}))
    )
    run = (
        "from mergekit_obim.methods import register; register(); "
        "from mergekit.scripts.run_yaml import main; main()"
    )
    command = [sys.executable, "-c", run, str(path), str(tmp_path / "out"), "-j", "2"]
    result = subprocess.run([*command, "--no-copy-tokenizer"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    case = Case(tune=together(scaled, all_by_chance))
    assert_same(checkpoints.read_checkpoint(tmp_path / "out"), expected_merge(family, case))


# --- TIES --------------------------------------------------------------------------------


def test_ties_by_magnitude_is_mergekits_ties() -> None:
    """Where both keep the same count; mergekit's breaks ties at the threshold otherwise."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (8, 6), "b": (10,), "c": (2, 4, 6)}
    models = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(5)
    ]
    settings = {"density": 0.5, "weight": [1.0, 0.5, 2.0, 0.25], "lambda": 0.8}
    theirs = merge_state_dicts(models, "ties", base=0, parameters=settings)
    ours = merge_state_dicts(
        models, "ties_obm", base=0, parameters=settings | {"criterion": "magnitude"}
    )
    for name in shapes:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


# --- where the saliency comes from ---------------------------------------------------------


def saliency_files(family: Family) -> list[Path]:
    return [family.factored / saliency_file_name(str(folder)) for folder in family.experts]


def test_saliency_per_model_as_file_and_folder(family: Family, tmp_path: Path) -> None:
    first, second, third = saliency_files(family)
    published = tmp_path / "published@v1" / PUBLISHED_NAME
    published.parent.mkdir()
    published.write_bytes(third.read_bytes())
    settings = [str(first), str(second.parent), str(published.parent)]
    per_model = [{"saliency": setting} for setting in settings]
    merged = merge(recipe(family, per_model=per_model, shared={}), tmp_path / "out")
    assert_same(merged, expected_merge(family, Case()))


def test_saliency_that_the_models_carry_themselves(tmp_path: Path) -> None:
    family = checkpoints.write_family(tmp_path, layers=1, experts=2)
    config = recipe(family, shared={})
    with pytest.raises(SaliencyNotFoundError, match=f"{family.experts[0]}.*obim-saliency"):
        merge(config, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for folder, file in zip(family.experts, saliency_files(family), strict=True):
        (folder / PUBLISHED_NAME).write_bytes(file.read_bytes())
    assert_same(merge(config, tmp_path / "out"), expected_merge(family, Case()))


def test_saliency_is_looked_for_anew_in_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate([saliency_file_name("org/math"), PUBLISHED_NAME]):
        folder = tmp_path / str(number)
        h = {"w": torch.full((2,), float(number))}
        checkpoints.write_saliency_file(folder / "saliency" / name, h)
        monkeypatch.chdir(folder)
        assert saliency_of("org/math", "./saliency")["w"].tolist() == [number, number]


def test_saliency_on_the_hub(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    first, second, _ = saliency_files(family)
    wrong = checkpoints.write_saliency_file(tmp_path / "wrong.safetensors", {})
    checkpoints.fake_hub(tmp_path / "hub", "org/one", {PUBLISHED_NAME: first})
    checkpoints.fake_hub(tmp_path / "hub", "org/two", {"some/file.safetensors": wrong})
    checkpoints.fake_hub(tmp_path / "hub", "org/two", {"some/file.safetensors": second}, ref="v2")
    checkpoints.fake_hub(
        tmp_path / "hub", "org/all", {file.name: file for file in saliency_files(family)}
    )
    settings = ["org/one", "org/two/some/file.safetensors@v2", "org/all@main"]
    config = recipe(family, per_model=[{"saliency": s} for s in settings], shared={})
    merged = merge(config, tmp_path / "out", transformers_cache=str(tmp_path / "hub"))
    assert_same(merged, expected_merge(family, Case()))

    config["models"][1]["parameters"]["saliency"] = "org/two/other.safetensors"
    with pytest.raises(SaliencyNotFoundError, match=r"org/two"):
        merge(config, tmp_path / "none", transformers_cache=str(tmp_path / "hub"))


def test_files_of_other_weights_are_refused_before_anything_is_written(
    family: Family, tmp_path: Path
) -> None:
    for k in range(3):
        prints = {name: fingerprint(tensor) for name, tensor in family.expert_tensors[k].items()}
        write_saliency(
            tmp_path / f"{k}.safetensors",
            {name: h.shape for name, h in family.h[k].items()},
            family.h[k].__getitem__,
            SaliencyMetadata(form="factored", model=f"expert {k}", fingerprint=prints),
        )
    settings = [{"saliency": str(tmp_path / f"{k}.safetensors")} for k in range(3)]
    config = recipe(family, per_model=settings, shared={}, dtype="bfloat16")
    merged = merge(config, tmp_path / "out")
    assert_same(merged, expected_merge(family, Case(dtype=torch.bfloat16)))

    models = [family.base_tensors, *family.expert_tensors]
    files = [setting["saliency"] for setting in settings]
    assert_same(
        merge_state_dicts(models, "obim", base=0, parameters={"saliency": files}),
        expected_merge(family, Case()),
    )

    settings[0], settings[1] = settings[1], settings[0]
    with pytest.raises(SaliencyFileError, match="measured on other weights"):
        merge(recipe(family, per_model=settings, shared={}), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(SaliencyFileError, match="measured on other weights"):
        merge_state_dicts(models, "obim", base=0, parameters={"saliency": files[::-1]})


def test_fallbacks_are_warned_of_by_name(
    family: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="mergekit_obim"):
        merge(recipe(family), tmp_path / "out")
    warnings = [r.getMessage() for r in caplog.records if r.name == "mergekit_obim"]
    assert len(warnings) == 3
    for folder, warning in zip(family.experts, warnings, strict=True):
        assert f"model {folder}: 7 tensors without saliency, ranked by magnitude" in warning
        for norm in (n for n in family.base_tensors if "norm" in n):
            assert norm in warning
        assert "proj" not in warning
    for method, shared, outcome in (
        ("obim", {"assignment": "least_error"}, "chosen with h = 1 for every expert"),
        ("obim", {"assignment": "least_error", "unscored": "base"}, "left out of the choice"),
        ("regmean_diag", {}, "merged with h = 1 for every expert"),
        ("regmean_diag", {"unscored": "base"}, "left out of the mean"),
        ("obm_sign", {}, "merged by magnitude for every expert"),
        ("obm_sign", {"unscored": "base"}, "left at the base's values"),
    ):
        caplog.clear()
        shared = {"saliency": str(family.factored), **shared}
        with caplog.at_level(logging.WARNING, logger="mergekit_obim"):
            merge(recipe(family, method=method, shared=shared), tmp_path / "out")
        told = [r.getMessage() for r in caplog.records if r.name == "mergekit_obim"]
        assert len(told) == 3
        assert all(f"7 tensors without saliency, {outcome}: " in warning for warning in told)
    caplog.clear()
    no_norms = [{"filter": "norm", "value": "magnitude"}, {"value": "saliency"}]
    shared = {"saliency": str(family.factored), "criterion": no_norms}
    with caplog.at_level(logging.WARNING, logger="mergekit_obim"):
        merge(recipe(family, shared=shared), tmp_path / "out")
    assert not caplog.records, "what a recipe asks for is no fallback"


@pytest.mark.parametrize("name", ["tensor_name", "vocabulary_rows", "layer", "cosines", "densty"])
@pytest.mark.parametrize("where", ["shared", "model"])
def test_parameters_that_are_not_for_recipes_are_refused(
    name: str, where: str, family: Family, tmp_path: Path
) -> None:
    config = recipe(family)
    target = config if where == "shared" else config["models"][1]
    target["parameters"] = {**target["parameters"], name: 1}
    with pytest.raises(RecipeError, match=f"no parameter '{name}'"):
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- slices ------------------------------------------------------------------------------


def test_slices_use_the_source_layers_saliency(family: Family, tmp_path: Path) -> None:
    """Layers repeated, reordered, and taken from other depths in each model."""
    # Per output slice, where each model's layers start: base, then the experts.
    starts, lengths = [(1, 1, 1, 1), (0, 1, 2, 0), (1, 1, 0, 2)], [2, 1, 1]
    folders = [family.base, *family.experts]
    config = recipe(family)
    del config["models"]
    config["slices"] = [
        {
            "sources": [
                {"model": str(folder), "layer_range": [first, first + length]}
                for folder, first in zip(folders, start, strict=True)
            ]
        }
        for start, length in zip(starts, lengths, strict=True)
    ]
    sources = [
        [first + offset for first in start]
        for start, length in zip(starts, lengths, strict=True)
        for offset in range(length)
    ]
    expected = {}
    for name in checkpoints.llama_shapes(layers=len(sources)):
        layer = reference.layer_index(name, len(sources))
        names = [name] * 4
        if ".layers." in name:
            names = [name.replace(f".{layer}.", f".{n}.") for n in sources[layer]]
        experts = [
            Expert(family.expert_tensors[k][names[k + 1]], h=family.h[k].get(names[k + 1]))
            for k in range(3)
        ]
        expected[name] = reference.obim(family.base_tensors[names[0]], experts, layer=layer)
    assert_same(merge(config, tmp_path / "out", clone_tensors=True), expected)


# --- vocabularies --------------------------------------------------------------------------


def word_tokenizer(folder: Path, words: list[str]) -> None:
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=words[0]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0]).save_pretrained(folder)


@dataclass
class Vocabularies:
    """A base and two experts with vocabularies of their own; see :func:`write_vocabularies`."""

    config: dict[str, Any]
    base: Tensors
    experts: list[Tensors]
    words: list[list[str]]
    h: list[Tensors]

    def aligned(self, model: int, name: str, words: list[str]) -> torch.Tensor:
        """A vocabulary tensor of model 0 (the base), 1 or 2 in another vocabulary's order."""
        stored = [self.base, *self.experts][model][name]
        rows = []
        for word in words:
            # mergekit gives a word that a model lacks the base's row, or its only owner's.
            owner = next(m for m in (model, 0, 1, 2) if word in self.words[m])
            source = stored if owner == model else [self.base, *self.experts][owner][name]
            rows.append(source[self.words[owner].index(word)])
        return torch.stack(rows)

    def aligned_h(self, k: int, name: str, words: list[str], rows: int) -> torch.Tensor:
        """Per-token saliency in that order, zero for the words that the expert lacks."""
        h = self.h[k][name]
        if h.shape[0] == 1:
            return h
        mine = self.words[k + 1]
        aligned = torch.zeros(rows, *h.shape[1:])
        for row, word in enumerate(words):
            if word in mine:
                aligned[row] = h[mine.index(word)]
        return aligned


VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")


def write_vocabularies(root: Path, words: list[list[str]], kind: str, tokens: bool) -> Vocabularies:
    sizes = [len(w) for w in words]
    models, folders = [], []
    for model, size in enumerate(sizes):
        shapes = checkpoints.llama_shapes(layers=1, vocabulary=size)
        inner = {n: s for n, s in shapes.items() if n not in VOCABULARY_TENSORS}
        tensors = checkpoints.base_weights(0, inner)
        if model:
            tensors = checkpoints.fine_tuned(tensors, seed=model)
        generator = torch.Generator().manual_seed(model)
        for name in VOCABULARY_TENSORS:
            tensors[name] = torch.randint(-9, 10, shapes[name], generator=generator) / 8
        config = checkpoints.llama_config(layers=1, vocabulary=size)
        folders.append(checkpoints.write_checkpoint(root / f"model{model}", tensors, config))
        models.append(tensors)
        if tokens:
            word_tokenizer(folders[-1], words[model])
    saliency, settings = [], []
    for k, tensors in enumerate(models[1:]):
        generator = torch.Generator().manual_seed(50 + k)
        h = {}
        for name in VOCABULARY_TENSORS:
            full = tensors[name].shape
            shape = {"hidden": (1, full[1]), "token": (full[0], 1), "dense": tuple(full)}[kind]
            h[name] = torch.randint(0, 9, shape, generator=generator) / 4
        form = "dense" if kind == "dense" else "factored"
        path = checkpoints.write_saliency_file(root / f"{k}.safetensors", h, form=form)
        settings.append({"saliency": str(path)})
        saliency.append(h)
    config = {
        "merge_method": "obim",
        "base_model": str(folders[0]),
        "models": [
            {"model": str(folder), "parameters": parameters}
            for folder, parameters in zip(folders[1:], settings, strict=True)
        ],
    }
    return Vocabularies(config, models[0], models[1:], words, saliency)


def check_vocabulary_tensors(
    merged: Tensors, written: Vocabularies, words: list[str], kind: str, padded: int = 0
) -> None:
    rows = max(len(words), padded)
    for layer, name in enumerate(VOCABULARY_TENSORS):  # the head comes after the only block
        tensors = []
        for model in range(3):
            tensor = written.aligned(model, name, words)
            average = tensor.mean(dim=0).expand(rows - len(words), -1)
            tensors.append(torch.cat([tensor, average]))
        experts = [Expert(tensor) for tensor in tensors[1:]]
        for k, expert in enumerate(experts):
            stored = written.aligned_h(k, name, words, rows)
            if kind == "dense":
                expert.dense = stored
            else:
                expert.h = stored
        expected = reference.obim(tensors[0], experts, layer=layer)
        assert merged[name].shape == (rows, checkpoints.HIDDEN)
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=0)
        assert not torch.equal(expected, tensors[0])
        assert any((expected[: len(words)] == t[: len(words)]).any() for t in tensors[1:])


WORDS = [f"w{n}" for n in range(20)]
# In another order; one lacks base words and has some of its own.
OTHER_WORDS = [WORDS, WORDS[::-1], ["own1", *WORDS[5:], *WORDS[:3], "own2"]]


@pytest.mark.parametrize("kind", ["hidden", "token", "dense"])
@pytest.mark.parametrize(
    "tokenizer",
    [{"source": "base"}, {"source": "base", "pad_to_multiple_of": 16}, {"source": "union"}],
    ids=["base", "padded", "union"],
)
def test_saliency_follows_the_tokenizer_options(
    tokenizer: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    written = write_vocabularies(tmp_path, OTHER_WORDS, kind, tokens=True)
    merged = merge(written.config | {"tokenizer": tokenizer}, tmp_path / "out")
    words = WORDS
    if tokenizer["source"] == "union":
        saved = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out").get_vocab()
        words = sorted(saved, key=saved.__getitem__)
        assert set(words) == {*WORDS, "own1", "own2"}
    check_vocabulary_tensors(merged, written, words, kind, 32 if len(tokenizer) > 1 else 0)


def test_tokenizer_source_is_the_same(tmp_path: Path) -> None:
    written = write_vocabularies(tmp_path, OTHER_WORDS, "token", tokens=True)
    merged = merge(written.config | {"tokenizer_source": "base"}, tmp_path / "out")
    check_vocabulary_tensors(merged, written, WORDS, "token")


@pytest.mark.parametrize("kind", ["hidden", "token", "dense"])
def test_saliency_follows_truncated_vocabularies(kind: str, tmp_path: Path) -> None:
    longer = [*WORDS, "x", "y", "z"]
    written = write_vocabularies(tmp_path, [longer[:21], longer, WORDS], kind, tokens=False)
    merged = merge(written.config, tmp_path / "out", unsafe_truncate_embeddings=True)
    check_vocabulary_tensors(merged, written, WORDS, kind)


def test_per_token_saliency_without_alignment_is_refused(tmp_path: Path) -> None:
    """mergekit refuses vocabularies of different sizes; nothing of ours may hide that."""
    written = write_vocabularies(tmp_path, [WORDS, [*WORDS, "x"], WORDS], "token", tokens=False)
    with pytest.raises(ValueError, match="has another vocabulary than the base"):
        merge(written.config, tmp_path / "out")


# --- tied heads ----------------------------------------------------------------------------


def test_a_head_is_never_ranked_by_the_embeddings_saliency(tmp_path: Path) -> None:
    """mergekit may load a missing head from the embeddings; a head that is there is itself."""
    family = checkpoints.write_family(tmp_path, layers=1, experts=2)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    settings = []
    for k in range(2):
        path = tmp_path / f"{k}.safetensors"
        h = {name: value for name, value in family.h[k].items() if name != head}
        settings.append({"saliency": str(checkpoints.write_saliency_file(path, h))})
        family.h[k] = h
    merged = merge(recipe(family, per_model=settings, shared={}), tmp_path / "out")
    assert_same(merged, expected_merge(family, Case()))
    assert embedding in family.h[0]


def tied_and_untied(
    root: Path, *, tied_vocabulary: int
) -> tuple[dict[str, Any], list[Tensors], list[Tensors]]:
    """A tied base and a tied expert beside an expert with a head of its own."""
    folders, models, saliency = [], [], []
    for model, tied in enumerate([True, True, False]):
        vocabulary = tied_vocabulary if tied else 20
        shapes = checkpoints.llama_shapes(layers=1, vocabulary=vocabulary, tied=tied)
        tensors = checkpoints.base_weights(model, shapes)
        config = checkpoints.llama_config(layers=1, vocabulary=vocabulary, tied=tied)
        folders.append(str(checkpoints.write_checkpoint(root / f"tied{model}", tensors, config)))
        models.append(tensors)
        h = checkpoints.factored_saliency(shapes, seed=model)
        if not tied:
            h["lm_head.weight"] = torch.arange(vocabulary).float()[:, None] % 5
        checkpoints.write_saliency_file(root / f"{model}.safetensors", h)
        saliency.append(h)
    config = {
        "merge_method": "obim",
        "base_model": folders[0],
        "models": [
            {"model": folders[k], "parameters": {"saliency": str(root / f"{k}.safetensors")}}
            for k in (1, 2)
        ],
    }
    return config, models, saliency


@pytest.mark.parametrize("tied_vocabulary", [20, 16])
def test_tied_and_untied_heads_merge(tied_vocabulary: int, tmp_path: Path) -> None:
    """A head loaded from the embeddings is ranked by their saliency, truncated or not."""
    config, models, saliency = tied_and_untied(tmp_path, tied_vocabulary=tied_vocabulary)
    merged = merge(config, tmp_path / "out", unsafe_truncate_embeddings=True)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    for layer, name, own in [(0, embedding, embedding), (1, head, head)]:
        experts = [
            Expert(models[1][embedding], h=saliency[1][embedding]),
            Expert(models[2][own][:tied_vocabulary], h=saliency[2][own][:tied_vocabulary]),
        ]
        expected = reference.obim(models[0][embedding], experts, layer=layer)
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=0)


# --- LoRA ----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["folder", "adapter"])
def test_lora_references(where: str, family: Family, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    adapter = tmp_path / "adapter"
    model = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(family.base),
        peft.LoraConfig(
            r=2,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    )
    model.save_pretrained(adapter)
    expert = f"{family.base}+{adapter}"
    h = family.h[2]
    name = saliency_file_name(expert) if where == "folder" else PUBLISHED_NAME
    folder = tmp_path / "saliency" if where == "folder" else adapter
    checkpoints.write_saliency_file(folder / name, h, model=expert)
    config = recipe(family, shared={"saliency": str(folder)} if where == "folder" else {})
    config["models"] = [
        {"model": expert, "parameters": {"density": 0.4}},
        {
            "model": str(family.experts[0]),
            "parameters": {"density": 0.4, "saliency": str(family.factored)},
        },
    ]
    merged = merge(config, tmp_path / "out", lora_merge_cache=str(tmp_path / "cache"))
    (cached,) = (tmp_path / "cache").iterdir()
    tuned = checkpoints.read_checkpoint(cached)
    q_proj = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(tuned[q_proj], family.base_tensors[q_proj])
    expected = {}
    for name, base in family.base_tensors.items():
        experts = [
            Expert(tuned[name], 0.4, h=h.get(name)),
            Expert(family.expert_tensors[0][name], 0.4, h=family.h[0].get(name)),
        ]
        layer = reference.layer_index(name, family.layers)
        expected[name] = reference.obim(base, experts, layer=layer)
    assert_same(merged, expected)
