"""The output errors that reports predict, beside what layers really put out, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import checkpoints
import commands
import reference
from benchmarks.predicted_error import true_errors
from checkpoints import Tensors
from commands import CODE_ROWS, MATH_ROWS, World, refusal, says, succeed
from mergekit_obim.kernels import blocks
from mergekit_obim.kernels.gram import draw_test_matrix
from mergekit_obim.kernels.nystrom import nystrom_factor
from mergekit_obim.kernels.output_error import output_errors
from mergekit_obim.kernels.regmean_gram import Gram
from mergekit_obim.saliency.file import SaliencyFile
from test_mixtures import recipe_for, write_models
from test_regmean_recipes import (
    COLUMNS,
    Measured,
    Settings,
    gram_of,
    own_settings,
    recipe,
    write_file,
    write_measured,
)
from tiny_tokenizers import byte_ids

pytestmark = pytest.mark.usefixtures("one_thread")

R = 8
KINDS = {"gram": None, "sketch": 5, "diagonal": 0}  # -> columns of reference.gram_estimate


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return write_measured(tmp_path_factory.mktemp("measured"))


# --- the kernel ------------------------------------------------------------------------------


def known(gram: Tensor, kind: str) -> Gram:
    h = gram.diagonal()
    if kind == "gram":
        return Gram(h, full=lambda: gram)
    if kind == "diagonal":
        return Gram(h)
    return Gram(h, nystrom_factor(gram @ draw_test_matrix(len(gram), 5).double(), h))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("layers", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_the_quadratic_form(
    kind: str, layers: int | None, axis: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (layers or 1, 70, 12)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    grams = [gram_of(12, generator) for _ in range(layers or 1)]

    def lie(stack: Tensor) -> Tensor:
        weight = stack if layers else stack[0]
        return weight if axis == -1 else weight.mT.contiguous()

    own, *ends = [lie(tensor) for tensor in tensors]
    before = [end.clone() for end in (own, *ends)]
    estimates = [reference.gram_estimate(g, 1.0, KINDS[kind]) for g in grams]
    wanted = []
    for end in tensors[1:]:
        d = end.double() - tensors[0].double()
        wanted.append(sum(float((d[i] @ g * d[i]).sum()) for i, g in enumerate(estimates)))
    for block in (blocks.CPU_BLOCK, 32 * 12):
        monkeypatch.setattr(blocks, "CPU_BLOCK", block)
        found = output_errors(own, ends, axis, lambda i: known(grams[i], kind))
        assert found == pytest.approx(wanted, rel=1e-12 if dtype == torch.float64 else 1e-5)
    assert output_errors(own, [own], axis, lambda i: known(grams[i], kind)) == [0.0]
    commands.same_tensors(
        dict(enumerate(before)),
        dict(enumerate((own, *ends))),  # type: ignore[arg-type]
    )
    strided = [torch.stack([t, t], -1)[..., 0] for t in (own, *ends)]
    again = output_errors(strided[0], strided[1:], axis, lambda i: known(grams[i], kind))
    assert again == pytest.approx(found, rel=1e-6)


def test_nothing_is_lost_where_correlations_cancel() -> None:
    """Inputs that are nearly one, and weights that differ by opposites."""
    gram = torch.ones(12, 12, dtype=torch.float64) + 1e-6 * torch.eye(12)
    factor = nystrom_factor(gram @ draw_test_matrix(12, 1).double(), gram.diagonal())
    d = torch.zeros(1, 12)
    d[0, :2] = torch.tensor([1.0, -1.0])
    gram_known = Gram(gram.diagonal(), factor)
    (found,) = output_errors(torch.zeros_like(d), [d], -1, lambda i: gram_known)
    form = reference.gram_estimate(gram, 1.0, 1)
    assert found == pytest.approx(float((d.double() @ form) @ d[0].double()), rel=1e-3)
    assert found < 1e-5  # and not 2, as for independent inputs


# --- the report ------------------------------------------------------------------------------


def report(config: dict[str, Any], folder: Path, *options: object) -> dict[str, Any]:
    path = commands.write_recipe(folder, config)
    result = succeed(commands.obim_report(path, "--json", "--quiet", *options))
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def merged_model(config: dict[str, Any], folder: Path) -> Tensors:
    path = commands.write_recipe(folder, config, "merge.yml")
    succeed(commands.mergekit_yaml(path, folder / "merged"))
    return checkpoints.read_checkpoint(folder / "merged")


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "obim": ("obim", {"density": 0.3, "lambda": 1.5}),
    "nearest": ("obim", {"assignment": "nearest", "stretch": 1.3}),
    "ties_obm": ("ties_obm", {"density": 0.4}),
    "obm_sign": ("obm_sign", {"density": 0.4}),
    "regmean_diag": ("regmean_diag", {}),
    "regmean": ("regmean", {"shrink": 0.8}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_expert_s_error_is_predicted_by_what_its_own_file_has(
    name: str,
    measured: Measured,
    tmp_path: Path,
) -> None:
    method, shared = SETTINGS[name]
    kinds = ("sketch", "full", "diagonal")
    per_model = [
        {"saliency": one["saliency"]} for one in own_settings(measured, Settings(kinds=kinds))
    ]
    config = recipe(measured.family, shared, per_model, method, dtype="float32")
    merged = merged_model(config, tmp_path)
    found = report(config, tmp_path, "--merged", tmp_path / "merged")
    assert found["differing"] == []
    words = {"sketch": "sketch", "full": "gram", "diagonal": "diagonal"}
    assert found["error_from"] == [words[kind] for kind in kinds]
    columns = {"sketch": COLUMNS, "full": None, "diagonal": 0}
    family, sums = measured.family, torch.zeros(2, 3, dtype=torch.float64)
    measured_by_all = set.intersection(*(set(h) for h in family.h))
    for tensor in found["tensors"]:
        weight = tensor["name"]
        ends = (merged[weight].double(), family.base_tensors[weight].double())
        for k, kind in enumerate(kinds):
            own = family.expert_tensors[k][weight].double()
            if weight in measured.grams[k]:
                form = reference.gram_estimate(measured.grams[k][weight], 1.0, columns[kind])
                assert tensor["error_from"][k] == words[kind]
                errors = [float(((end - own) @ form * (end - own)).sum()) for end in ends]
            else:
                h = family.h[k].get(weight, torch.ones(())).double()
                word = "diagonal" if weight in measured_by_all else "unscored"
                assert tensor["error_from"][k] == word
                errors = [float((h * (end - own).square()).sum()) for end in ends]
            close = {"rel": 1e-4, "abs": 1e-6 * errors[1]}
            assert tensor["error"][k] == pytest.approx(errors[0], **close), weight
            assert tensor["error_at_base"][k] == pytest.approx(errors[1], **close), weight
            if weight in measured_by_all:
                sums[:, k] += torch.tensor(errors, dtype=torch.float64)
    shares = [expert["error"] for expert in found["experts_total"]]
    assert shares == pytest.approx((sums[0] / sums[1]).tolist(), rel=1e-4)
    if method == "obim":
        kept = found["experts_total"][0]
        assert kept["kept"] + kept["overwritten"] + kept["dropped"] == pytest.approx(1)
    else:
        assert found["owned"] is None
        assert {found["experts_total"][0][key] for key in ("kept", "dropped")} == {None}
    for k, own_tensors in enumerate(family.expert_tensors):
        pairs = [
            ((merged[n] - b).double().flatten(), (own_tensors[n] - b).double().flatten())
            for n, b in family.base_tensors.items()
        ]
        made, own = (torch.cat(part) for part in zip(*pairs, strict=True))
        cosine = float(made @ own / (made.norm() * own.norm()))
        length = float(made.norm() / own.norm())
        assert found["merged"][k] == pytest.approx({"cosine": cosine, "length": length}, rel=1e-4)


def test_each_of_a_mixture_s_experts_has_its_own_tokens(tmp_path: Path) -> None:
    folders = write_models("mixtral", tmp_path)
    config = recipe_for(folders, tmp_path, "")
    path = commands.write_recipe(tmp_path, config)
    succeed(commands.obim_saliency(path, tmp_path / "saliency", "--sketch", R))
    merged = merged_model(config, tmp_path)
    found = report(config, tmp_path)
    assert found["error_from"] == ["sketch", "sketch"]
    own = transformers.AutoModelForCausalLM.from_pretrained(folders[1]).state_dict()
    file = SaliencyFile(tmp_path / "saliency" / commands.saliency_file_name(str(folders[1])))
    experts = [tensor for tensor in found["tensors"] if ".experts." in tensor["name"]]
    assert len(experts) == 4  # two weights in each of two layers
    for tensor in experts:
        name = tensor["name"]
        sketches, h = file.sketch(name), file[name].double()
        assert sketches is not None
        error = 0.0
        for d, sketch, diagonal in zip(
            merged[name].double() - own[name].double(), sketches, h[:, 0], strict=True
        ):
            factor = nystrom_factor(sketch, diagonal)
            rest = diagonal - factor.square().sum(1)
            error += float((d @ factor).square().sum() + (d.square() @ rest).sum())
        assert tensor["error_from"] == ["sketch", "sketch"]
        assert tensor["error"][0] == pytest.approx(error, rel=1e-4), name


def test_conv1d_has_its_inputs_down(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=6)
    config.architectures = ["GPT2LMHeadModel"]
    for seed in range(2):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / str(seed))
    base, own = (checkpoints.read_checkpoint(tmp_path / str(seed)) for seed in range(2))
    generator = torch.Generator().manual_seed(4)
    layers = [name for name, weight in base.items() if ".c_" in name and weight.ndim == 2]
    grams = {name: gram_of(len(base[name]), generator) for name in layers}
    path = tmp_path / "saliency.safetensors"
    write_file(path, {name: g.diagonal()[:, None] for name, g in grams.items()}, grams, 5)
    model = {"model": str(tmp_path / "1"), "parameters": {"density": 0.3, "saliency": str(path)}}
    settings = {"merge_method": "obim", "base_model": str(tmp_path / "0"), "models": [model]}
    merged = merged_model({**settings, "dtype": "float32"}, tmp_path)
    found = {tensor["name"]: tensor for tensor in report(settings, tmp_path)["tensors"]}
    for name, gram in grams.items():
        d = (merged[name].double() - own[name].double()).T
        form = reference.gram_estimate(gram, 1.0, 5)
        assert found[name]["error_from"] == ["sketch"]
        assert found[name]["error"] == pytest.approx([float((d @ form * d).sum())], rel=1e-5)
    assert len(layers) == 4


# --- the truth -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sketched(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sketched")
    path = commands.write_recipe(folder, world.recipe())
    succeed(commands.obim_saliency(path, folder / "saliency", "--sketch", R))
    return folder / "saliency"


@pytest.mark.parametrize("method", ["obim", "regmean_diag", "regmean"])
def test_a_sketch_predicts_what_layers_really_lose(
    method: str, world: World, sketched: Path, tmp_path: Path
) -> None:
    """Relative errors of the layers' predictions, as measured: mean, and largest in brackets.

    | | obim | regmean_diag | regmean |
    |---|---|---|---|
    | diagonal | 0.109 (0.39) | 0.128 (0.55) | 1.961 (6.49) |
    | sketch of 8 columns | 0.014 (0.05) | 0.016 (0.05) | 0.083 (0.24) |
    """
    models = world.recipe()["models"]
    if method != "obim":
        models = world.models()
    config = world.recipe(
        merge_method=method, models=models, parameters={"saliency": str(sketched)}
    )
    merged = merged_model(config, tmp_path)
    tensors = {tensor["name"]: tensor for tensor in report(config, tmp_path)["tensors"]}
    off: dict[str, list[float]] = {"diagonal": [], "sketch": []}
    for k, (expert, rows) in enumerate(zip(world.experts, (MATH_ROWS, CODE_ROWS), strict=True)):
        own = checkpoints.read_checkpoint(expert)
        h = load_file(world.saliency_of(expert))
        truth = true_errors(expert, [byte_ids(row)[:48] for row in rows], [merged])
        assert len(truth) == 7 * commands.LAYERS + 1
        for name, (true,) in truth.items():
            assert tensors[name]["error_from"][k] == "sketch"
            d = merged[name].double() - own[name].double()
            diagonal = float((h[name].double() * d.square()).sum())
            off["diagonal"].append(abs(diagonal / true - 1))
            off["sketch"].append(abs(tensors[name]["error"][k] / true - 1))
    mean = {kind: sum(values) / len(values) for kind, values in off.items()}
    assert mean["sketch"] < mean["diagonal"] / 5


# --- methods without owners ------------------------------------------------------------------


def test_methods_without_saliency_files_have_no_report(world: World, tmp_path: Path) -> None:
    models = [{"model": str(expert)} for expert in world.experts]
    for method in ("pcb", "consensus_ta"):
        config = world.recipe(merge_method=method, models=models, parameters=None)
        message = refusal(commands.obim_report(commands.write_recipe(tmp_path, config)))
        says(message, method, "reads no saliency files", "regmean_diag", "obim")


def test_the_page_of_a_method_without_owners(
    measured: Measured,
    tmp_path: Path,
) -> None:
    per_model = own_settings(measured, Settings(kinds=("sketch", "full", "diagonal")))
    path = commands.write_recipe(tmp_path, recipe(measured.family, {}, per_model))
    succeed(commands.obim_report(path, "-o", tmp_path / "r.html", "--quiet"))
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    says(page, "no weight has a single owner", "Predicted error by layer", "cosine", "length")
    says(page, "<td>sketch</td>", "<td>gram</td>", "<td>diagonal</td>", "h = 1 for every expert")
    for absent in ("Whose weights they are", "Other orders", "overwritten", "the base</th>"):
        assert absent not in page
    assert page.count("<svg") == page.count("<figcaption") == 3 + 1


def test_without_statistics_errors_are_of_weights(
    measured: Measured,
    tmp_path: Path,
) -> None:
    found = report(recipe(measured.family, {"statistics": "none"}), tmp_path)
    assert not found["measured"]
    assert found["error_from"] == ["unscored"] * 3
    assert {one["treatment"] for one in found["fallbacks"]} == {"merged without saliency files"}
    assert all(0 < expert["error"] < 1 for expert in found["experts_total"])


def test_the_card_knows_regmean(world: World, sketched: Path, tmp_path: Path) -> None:
    for number, (shared, words) in enumerate(
        (
            ({}, ("`statistics: measured`", "`stretch: 1.0`", "`shrink: 0.95`")),
            (
                {"shrink": 0.5, "stretch": 1.2},
                ("`statistics: measured`", "`stretch: 1.2`", "`shrink: 0.5`"),
            ),
            ({"statistics": "none"}, ("`statistics: none`", "`stretch: 1.0`", "`shrink: 0.5`")),
        )
    ):
        config = world.recipe(
            merge_method="regmean",
            models=world.models(),
            parameters={"saliency": str(sketched), **shared},
        )
        folder = tmp_path / str(number)
        path = commands.write_recipe(tmp_path, config)
        succeed(commands.mergekit_yaml(path, folder))
        succeed(commands.obim_card(folder))
        card = (folder / "README.md").read_text(encoding="utf-8")
        says(card, "[RegMean]", *words)
        found = report(config, tmp_path)
        for k, expert in enumerate(world.experts):
            (row,) = [line for line in card.splitlines() if line.startswith(f"| {expert} ")]
            error, word = found["experts_total"][k]["error"], found["error_from"][k]
            says(row, f"| {error:.1%} (by {word}) |")
            if "statistics" not in shared:
                says(row, f"sketches of {R} columns", f"{(12, 10)[k]} rows")
    succeed(commands.obim_card(folder, "--no-shares"))
    assert "Predicted error" not in (folder / "README.md").read_text(encoding="utf-8")
