"""`merge_method: regmean` through mergekit, against the equations solved in float64."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.api import merge_state_dicts
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GptOssConfig, MixtralConfig

import checkpoints
import commands
import mergekit_obim
import reference
from checkpoints import Family, Tensors
from mergekit_obim.errors import RecipeError, UnscorableError
from mergekit_obim.kernels.gram import TEST_MATRIX, draw_test_matrix, pack_triangle
from mergekit_obim.kernels.regmean_gram import merge_regmean_layers, task_vector_layers
from mergekit_obim.methods import register
from mergekit_obim.models.linear_layers import input_axes, input_axis_of
from mergekit_obim.saliency.file import Gram, SaliencyMetadata, saliency_file_name, write_saliency
from reference import Expert

pytestmark = pytest.mark.usefixtures("one_thread")

register()

COLUMNS = 6
Inputs = dict[str, Tensor]


@dataclass
class Measured:
    """A family, what its experts' linear layers see, and a folder of saliency files of each kind.

    Attributes:
        family: The checkpoints.
        grams: For each expert, weight -> G, float64; [experts, d, d] of a mixture's.
        folders: `sketch`, `full` and `diagonal`: the files.
    """

    family: Family
    grams: list[Inputs]
    folders: dict[str, Path]

    def file(self, k: int, kind: str) -> Path:
        return self.folders[kind] / saliency_file_name(str(self.family.experts[k]))


def gram_of(features: int, generator: torch.Generator) -> Tensor:
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, features, generator=generator, dtype=torch.float64) @ mixing
    # As a file of whole matrices holds it, so that the file can be held to it.
    return (inputs.T @ inputs / 200).bfloat16().double()


def write_file(
    path: Path,
    h: Mapping[str, Tensor],
    grams: Mapping[str, Tensor],
    columns: int | str | None,
    model: str = "hand",
) -> Path:
    """A saliency file with a sketch of every Gram matrix, the matrices, or neither."""
    entries = dict(h)
    products = {} if columns is None else {f"gram of {name}": g for name, g in grams.items()}
    for name, gram in products.items():
        if columns == "full":
            entries[name] = pack_triangle(gram)
        else:
            assert isinstance(columns, int)
            entries[name] = gram @ draw_test_matrix(gram.shape[-1], columns).double()
    metadata = SaliencyMetadata(form="factored", model=model)
    if products:
        made = "" if columns == "full" else TEST_MATRIX
        inputs = {name: f"gram of {name}" for name in grams}
        metadata = metadata.model_copy(
            update={"gram": Gram(columns=columns, test_matrix=made, inputs=inputs)}
        )
    shapes = {name: tuple(entry.shape) for name, entry in entries.items()}
    write_saliency(path, shapes, entries.__getitem__, metadata)
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return write_measured(tmp_path_factory.mktemp("regmean"))


def write_measured(root: Path) -> Measured:
    family = checkpoints.write_family(root)
    folders = {kind: root / kind for kind in ("sketch", "full", "diagonal")}
    grams = []
    for k, h in enumerate(family.h):
        generator = torch.Generator().manual_seed(k)
        own = {
            name: gram_of(weight.shape[1], generator)
            for name, weight in family.base_tensors.items()
            if "proj" in name or "lm_head" in name
        }
        grams.append(own)
        h |= {name: gram.diagonal()[None].float() for name, gram in own.items()}
        for kind, columns in (("sketch", COLUMNS), ("full", "full"), ("diagonal", None)):
            name = saliency_file_name(str(family.experts[k]))
            write_file(folders[kind] / name, h, own, columns, str(family.experts[k]))
    return Measured(family, grams, folders)


@dataclass
class Settings:
    """What a recipe says, and how much each expert's file knows."""

    shrink: float = 0.95
    weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    scale: float = 1.0
    kinds: tuple[str, ...] = ("sketch",) * 3


def expected_merge(measured: Measured, settings: Settings, dtype: torch.dtype) -> Tensors:
    """Linear layers by RegMean on Ĝ, anything else as `regmean_diag`."""
    family, expected = measured.family, {}
    for name, base in family.base_tensors.items():
        base = base.to(dtype)
        experts = [t[name].to(dtype) for t in family.expert_tensors]
        if name in measured.grams[0]:
            estimates = [
                reference.gram_estimate(
                    own[name],
                    settings.shrink,
                    {"sketch": COLUMNS, "full": None, "diagonal": 0}[kind],
                )
                for own, kind in zip(measured.grams, settings.kinds, strict=True)
            ]
            expected[name] = reference.regmean(
                base, experts, estimates, settings.weights, settings.scale
            )
            continue
        told = [
            Expert(e, h=family.h[k].get(name), weight=settings.weights[k])
            for k, e in enumerate(experts)
        ]
        expected[name] = reference.regmean_diag(base, told, lambda_=settings.scale).double()
    return expected


def assert_close(merged: Tensors, expected: Tensors, tolerance: float = 2e-5) -> None:
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        # bfloat16 numbers of this size are up to 2^-7 apart.
        rounding = {2: 2**-6, 4: 0, 8: 0}[merged[name].dtype.itemsize]
        torch.testing.assert_close(
            merged[name].double(),
            tensor.double(),
            rtol=0,
            atol=tolerance + rounding,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def recipe(
    family: Family,
    shared: dict[str, Any],
    per_model: list[dict[str, Any]] | None = None,
    method: str = "regmean",
    **more: Any,
) -> dict[str, Any]:
    return checkpoints.recipe_of(family, method=method, per_model=per_model, shared=shared, **more)


def merge_files(config: dict[str, Any], folder: Path, out: Path) -> None:
    path = commands.write_recipe(folder, checkpoints.of_files(config), "raw.yml")
    commands.succeed(commands.mergekit_pytorch(path, out))


def merge(config: dict[str, Any], out: Path) -> Tensors:
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(config), str(out), options)
    return checkpoints.read_checkpoint(out)


CASES: dict[str, tuple[Settings, dict[str, Any]]] = {
    "defaults": (Settings(), {}),
    "whole matrices": (Settings(kinds=("full",) * 3), {}),
    "tuned": (
        Settings(0.6, (1.0, 0.5, 2.0), 0.7 * 1.3),
        {"shrink": 0.6, "lambda": 0.7, "stretch": 1.3},
    ),
    "no damping": (Settings(1.0), {"shrink": 1.0}),
    "each its own": (Settings(0.9, kinds=("full", "diagonal", "sketch")), {"shrink": 0.9}),
    "one sketch": (Settings(0.9, kinds=("diagonal", "sketch", "diagonal")), {"shrink": 0.9}),
}


def own_settings(measured: Measured, settings: Settings) -> list[dict[str, Any]]:
    return [
        {"saliency": str(measured.file(k, kind)), "weight": settings.weights[k]}
        for k, kind in enumerate(settings.kinds)
    ]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CASES),
        ("tuned", torch.bfloat16),
        ("tuned", torch.float64),
        ("whole matrices", torch.bfloat16),
    ],
)
def test_the_graph_path(name: str, dtype: torch.dtype, measured: Measured, tmp_path: Path) -> None:
    settings, shared = CASES[name]
    spelled = str(dtype).removeprefix("torch.")
    own = own_settings(measured, settings)
    merged = merge(recipe(measured.family, shared, own, dtype=spelled), tmp_path / "out")
    assert all(tensor.dtype == dtype for tensor in merged.values())
    assert_close(merged, expected_merge(measured, settings, dtype))


@pytest.mark.parametrize("name", CASES)
def test_the_in_memory_path_and_mergekit_pytorch(
    name: str, measured: Measured, tmp_path: Path
) -> None:
    settings, shared = CASES[name]
    family = measured.family
    expected = expected_merge(measured, settings, torch.float32)
    ids = [str(folder) for folder in family.experts]
    own = own_settings(measured, settings)
    each = {key: {i: o[key] for i, o in zip(ids, own, strict=True)} for key in own[0]}
    models = {"base": family.base_tensors, **dict(zip(ids, family.expert_tensors, strict=True))}
    merged = merge_state_dicts(models, "regmean", base="base", parameters={**shared, **each})
    assert_close(merged, expected)

    config = recipe(family, shared, own)
    for entry, key in ((config, "base_model"), *((m, "model") for m in config["models"])):
        entry[key] = str(Path(entry[key]) / "model.safetensors")
    path = tmp_path / "raw.yml"
    path.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(mergekit_pytorch, [str(path), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert_close(checkpoints.read_checkpoint(tmp_path / "out"), expected)


def test_without_shrink_or_sketches_it_is_regmean_diag(measured: Measured, tmp_path: Path) -> None:
    diag = merge(
        recipe(
            measured.family, {"saliency": str(measured.folders["sketch"])}, None, "regmean_diag"
        ),
        tmp_path / "diag",
    )
    for name, shared in (
        ("sketch", {"shrink": 0}),
        ("full", {"shrink": 0}),
        ("diagonal", {}),
        ("diagonal", {"shrink": 0.5}),
    ):
        shared = {"saliency": str(measured.folders[name]), **shared}
        out = tmp_path / f"{name} {len(shared)}"
        commands.same_tensors(merge(recipe(measured.family, shared), out), diag)


def test_stretch_auto_is_one_factor_for_the_whole_model(measured: Measured, tmp_path: Path) -> None:
    family = measured.family
    deltas = [
        torch.cat([(t[n] - family.base_tensors[n]).flatten().double() for n in t])
        for t in family.expert_tensors
    ]
    cosine = torch.nn.functional.cosine_similarity
    pairs = [cosine(a, b, dim=0) for a, b in itertools.combinations(deltas, 2)]
    factor = math.sqrt(3 / (1 + 2 * float(sum(pairs) / 3)))
    shared = {"saliency": str(measured.folders["sketch"]), "stretch": "auto"}
    merged = merge(recipe(family, shared), tmp_path / "out")
    assert_close(merged, expected_merge(measured, Settings(scale=factor), torch.float32), 0.01)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [r.getMessage() for r in caplog.records if r.name == "mergekit_obim"]
    caplog.clear()
    return [line for line in lines if "sketch" in line]


def test_what_lacks_a_sketch_is_told(
    measured: Measured, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = measured.family
    shared = {"saliency": str(measured.folders["diagonal"])}
    with caplog.at_level(logging.WARNING, logger="mergekit_obim"):
        merge(recipe(family, shared), tmp_path / "none")
        (line,) = told(caplog)
        assert "no saliency file has a Gram sketch" in line
        assert "`obim-saliency RECIPE OUT_DIR --sketch 16 --overwrite`" in line

        merge(recipe(family, {"saliency": str(measured.folders["sketch"])}), tmp_path / "all")
        assert not told(caplog)
        merge(recipe(family, {**shared, "shrink": 0}), tmp_path / "zero")
        assert not told(caplog)

        own = own_settings(measured, Settings(kinds=("sketch", "diagonal", "full")))
        config = recipe(family, {}, own)
        merge(config, tmp_path / "some")
        (line,) = told(caplog)
        assert f"model {family.experts[1]}: 22 tensors without a Gram sketch" in line
        assert "lm_head.weight" in line
        assert "embed" not in line

        merge_files(config, tmp_path, tmp_path / "raw")
        assert len(told(caplog)) == 1


def test_check_tells_too(measured: Measured, tmp_path: Path) -> None:
    shared = {"saliency": str(measured.folders["diagonal"])}
    path = commands.write_recipe(tmp_path, recipe(measured.family, shared))
    result = commands.obim_saliency("--check", path, "--json")
    assert any(
        "no saliency file has a Gram sketch" in w for w in json.loads(result.output)["warnings"]
    )


@pytest.mark.parametrize(
    ("shared", "words"),
    [
        ({"shrink": 1.5}, "shrink: 1.5 lies outside 0…1"),
        ({"shrink": -0.1}, "shrink: -0.1 lies outside 0…1"),
        ({"stretch": -1}, "stretch: -1.0 is negative"),
        ({"statistics": "some"}, "statistics: unknown value 'some'; choose one of measured, none"),
        ({"weight": -1.0}, "has weight -1.0"),
        ({"input_axis": 1}, "no parameter 'input_axis'"),
    ],
)
def test_wrong_parameters(
    shared: dict[str, Any], words: str, measured: Measured, tmp_path: Path
) -> None:
    shared = {"saliency": str(measured.folders["sketch"]), **shared}
    with pytest.raises(RecipeError, match=words):
        merge(recipe(measured.family, shared), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_is_named(measured: Measured) -> None:
    family = measured.family
    spoilt = [dict(tensors) for tensors in family.expert_tensors]
    name = "model.layers.1.mlp.down_proj.weight"
    spoilt[1][name] = spoilt[1][name].clone()
    spoilt[1][name][3, 5] = float("nan")
    models = {"base": family.base_tensors} | {
        str(folder): t for folder, t in zip(family.experts, spoilt, strict=True)
    }
    files = {str(f): str(measured.file(k, "sketch")) for k, f in enumerate(family.experts)}
    with pytest.raises(UnscorableError, match=f"tensor {name}: .*{family.experts[1]}"):
        merge_state_dicts(models, "regmean", base="base", parameters={"saliency": files})


# --- Conv1D and mixtures -------------------------------------------------------------------


@pytest.mark.parametrize("columns", [5, 12, "full"])
@pytest.mark.parametrize("shape", [(7, 12), (4, 7, 12)])
@pytest.mark.parametrize("axis", [-1, -2])
def test_transposed_weights_and_mixtures(
    axis: int, shape: tuple[int, ...], columns: int | str, tmp_path: Path
) -> None:
    """[out, in], Conv1D's [in, out], and fused experts that lie in either way."""
    generator = torch.Generator().manual_seed(3)
    count = shape[0] if len(shape) == 3 else 1
    base = torch.randn(count, 7, 12, generator=generator)
    experts = [base + 0.1 * torch.randn(base.shape, generator=generator) for _ in range(2)]

    def lie(stack: Tensor) -> Tensor:
        return (stack if axis == -1 else stack.mT).reshape(
            shape if axis == -1 else (*shape[:-2], 12, 7)
        )

    files, grams = [], []
    for k in range(2):
        gram = torch.stack([gram_of(12, generator) for _ in range(count)])
        grams.append(gram)
        h = gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-2 if axis == -1 else -1)
        stored = (h, gram) if len(shape) == 3 else (h[0], gram[0])
        path = tmp_path / f"{k}.safetensors"
        files.append(str(write_file(path, {"w": stored[0]}, {"w": stored[1]}, columns)))
    merged = merge_state_dicts(
        [{"w": lie(t)} for t in (base, *experts)],
        "regmean",
        base=0,
        parameters={"saliency": files, "shrink": 0.9},
    )["w"]
    known = columns if columns == 5 else None
    expected = torch.stack(
        [
            reference.regmean(
                base[i],
                [e[i] for e in experts],
                [reference.gram_estimate(g[i], 0.9, known) for g in grams],
                [1.0, 1.0],
            )
            for i in range(count)
        ]
    )
    assert_close({"w": merged}, {"w": lie(expected)})


# --- statistics: none ----------------------------------------------------------------------


def by_task_vectors(base: Tensor, experts: list[Tensor], shrink: float = 0.5) -> Tensor:
    """With δᵀδ in the place of G, for weights [out, in]."""
    estimates = []
    for expert in experts:
        delta = expert.double() - base.double()
        gram = delta.T @ delta
        estimates.append(reference.gram_estimate(gram / gram.diagonal().mean(), shrink, None))
    return reference.regmean(base, experts, estimates, [1.0] * len(experts))


def mean_of(base: Tensor, experts: list[Tensor]) -> Tensor:
    return reference.regmean_diag(base, [Expert(e) for e in experts])


@pytest.mark.parametrize("path", ["yaml", "pytorch", "memory"])
def test_statistics_none_asks_for_no_files(
    path: str, measured: Measured, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = measured.family
    shared = {"statistics": "none"}
    if path == "yaml":
        with caplog.at_level(logging.WARNING, logger="mergekit_obim"):
            merged = merge(recipe(family, shared), tmp_path / "out")
        assert not caplog.records
    elif path == "pytorch":
        merge_files(recipe(family, shared), tmp_path, tmp_path / "out")
        merged = checkpoints.read_checkpoint(tmp_path / "out")
    else:
        models = {f"e{k}": tensors for k, tensors in enumerate(family.expert_tensors)}
        merged = mergekit_obim.merge(family.base_tensors, models, method="regmean", **shared)
    expected = {}
    for name, base in family.base_tensors.items():
        experts = [tensors[name] for tensors in family.expert_tensors]
        linear = "proj" in name or "lm_head" in name
        expected[name] = (by_task_vectors if linear else mean_of)(base, experts)
    assert_close(merged, expected)


def test_statistics_none_knows_how_fused_experts_lie() -> None:
    """By transformers' own mark; and not what is no linear layer, or has another name."""
    sizes: dict[str, Any] = {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_local_experts": 4,
    }
    for config, axis in ((MixtralConfig(**sizes), -1), (GptOssConfig(**sizes), -2)):
        kind = {-1: "MixtralForCausalLM", -2: "GptOssForCausalLM"}[axis]
        config.architectures = [kind]
        reference_of = mock.Mock(config=mock.Mock(return_value=config))
        axes = input_axes(reference_of)
        for name in ("gate_up_proj", "down_proj"):
            assert input_axis_of(f"model.layers.0.mlp.experts.{name}", axes) == axis
        assert input_axis_of("model.layers.0.self_attn.q_proj.weight", axes) == -1
        assert input_axis_of("layers.0.self_attn.q_proj.weight", axes) == -1
        assert input_axis_of("model.embed_tokens.weight", axes) is None
        assert input_axis_of("model.layers.0.input_layernorm.weight", axes) is None
        assert input_axis_of("model.layers.0.mlp.experts.3.w1.weight", axes) == 0
    unknown = mock.Mock(config=mock.Mock(side_effect=OSError))
    assert input_axes(unknown) == {}
    assert input_axis_of("transformer.wte.weight", {}) is None


@pytest.mark.parametrize("shape", [(3, 6, 5), (4, 5)])
def test_statistics_none_in_memory_takes_two_axes_for_a_layer(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    base, *experts = [torch.randn(shape, generator=generator) for _ in range(3)]
    models = {f"e{k}": {"w": t} for k, t in enumerate(experts)}
    merged = mergekit_obim.merge({"w": base}, models, method="regmean", statistics="none")["w"]
    assert_close(
        {"w": merged}, {"w": (by_task_vectors if len(shape) == 2 else mean_of)(base, experts)}
    )


def test_statistics_none_merges_fused_experts_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    base, *experts = [torch.randn(3, 6, 5, generator=generator) for _ in range(3)]
    turned = [e.mT for e in experts]
    layers = task_vector_layers(base.mT, turned, -2)
    merged = merge_regmean_layers(base.mT, turned, -2, layers, [1.0, 1.0], 0.5, 1.0)
    expected = [by_task_vectors(base[i], [e[i] for e in experts]) for i in range(3)]
    assert_close({"w": merged.mT}, {"w": torch.stack(expected)})


def test_statistics_none_knows_conv1d_by_the_bases_class(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=6)
    config.architectures = ["GPT2LMHeadModel"]
    folders: list[Path] = []
    for seed in range(3):
        torch.manual_seed(seed)
        folders.append(tmp_path / str(seed))
        GPT2LMHeadModel(config).save_pretrained(folders[-1])
    base, *experts = [checkpoints.read_checkpoint(folder) for folder in folders]
    settings: dict[str, Any] = {
        "merge_method": "regmean",
        "base_model": str(folders[0]),
        "models": [{"model": str(folder)} for folder in folders[1:]],
        "parameters": {"statistics": "none", "shrink": 0.3},
    }
    merged = merge(settings, tmp_path / "out")
    expected = {}
    for name, weight in base.items():
        own = [expert[name] for expert in experts]
        if "c_" in name and weight.ndim == 2:
            turned = by_task_vectors(weight.T, [t.T for t in own], 0.3)
            expected[name] = turned.T
        else:
            expected[name] = mean_of(weight, own)
    kept = {name: expected[name] for name in merged if name in expected}
    assert any("c_attn.weight" in name for name in kept)
    assert_close({name: merged[name] for name in kept}, kept)
