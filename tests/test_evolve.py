"""mergekit-evolve with our methods: its genomes, and its whole command beside stand-ins.

Of what the command needs beside mergekit, cma is real. ray, lm-eval and the models' evaluation
have the smallest possible stand-ins: what is remote runs in this process, and a merged model's
score is how near its weights are to those of a merge that is known to be in the search space.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import mergekit.evo.config
import numpy as np
import pytest
import yaml
from mergekit.evo import genome as evo
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

import checkpoints
import commands
import mergekit_obim
from checkpoints import Family, read_checkpoint
from commands import refusal, says
from mergekit_obim.errors import GenomeError
from mergekit_obim.methods import METHODS, genomes
from mergekit_obim.methods.regmean import SHRINK
from mergekit_obim.saliency.file import saliency_file_name
from planning import plan

mergekit_obim.register()  # mergekit-evolve itself imports its genome before the merge methods


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return checkpoints.write_family(tmp_path_factory.mktemp("family"), experts=2, layers=4)


@pytest.fixture(autouse=True)
def nothing_was_said() -> None:
    genomes._say_that_densities_are_lowered.cache_clear()


def content(family: Any, method: str = "obim", **keys: Any) -> dict[str, Any]:
    reads = method not in ("consensus_ta", "pcb")
    return {
        "merge_method": method,
        "base_model": str(family.base),
        "models": [str(expert) for expert in family.experts],
        "parameters": {"saliency": str(family.factored)} if reads else {},
        **keys,
    }


def genome_of(family: Any, method: str = "obim", **keys: Any) -> genomes.Genome:
    definition = evo.ModelGenomeDefinition.model_validate(content(family, method, **keys))
    genome = evo.ModelGenome(definition)
    assert isinstance(genome, genomes.Genome)
    return genome


def refused(family: Family, **keys: Any) -> str:
    configuration = {"genome": content(family, **keys), "tasks": ["a_task"]}
    with pytest.raises(GenomeError) as error:
        mergekit.evo.config.EvolMergeConfiguration.model_validate(configuration)
    assert "\n" not in error.value.message
    assert error.value.message.startswith("genome: ")
    return error.value.message


# --- What evolves ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters", "own", "shared"),
    [
        ("obim", {}, {"density": 0.5, "weight": 1}, {}),
        ("obim", {"weight": 1}, {"density": 0.5}, {"lambda": 1}),
        ("obim", {"density": 0.3, "order": "recipe"}, {"weight": 1}, {}),
        ("obim", {"assignment": "nearest"}, {"weight": 1}, {"lambda": 1, "stretch": 1}),
        ("obim", {"assignment": "least_error"}, {"weight": 1}, {"lambda": 1}),
        ("ties_obm", {}, {"density": 0.5, "weight": 1}, {"lambda": 1}),
        ("obm_sign", {"lambda": 1}, {"density": 0.5, "weight": 1}, {}),
        ("regmean_diag", {}, {"weight": 1}, {"lambda": 1}),
        ("regmean_diag", {"stretch": "auto"}, {"weight": 1}, {"lambda": 1}),
        ("regmean", {}, {"weight": 1}, {"lambda": 1, "shrink": SHRINK["measured"]}),
        ("regmean", {"shrink": 0.5, "statistics": "none"}, {"weight": 1}, {"lambda": 1}),
        ("consensus_ta", {}, {"weight": 1}, {"lambda": 1}),
        ("pcb", {}, {"density": 0.1, "weight": 1}, {"lambda": 1}),
    ],
)
def test_what_is_not_set_evolves(
    family: Family, method: str, parameters: Any, own: Any, shared: Any
) -> None:
    setting = content(family, method)["parameters"]
    genome = genome_of(family, method, parameters={**setting, **parameters})
    config = genome.genotype_merge_config(genome.initial_genotype().view(-1).numpy())
    [part] = config.slices
    assert [source.parameters for source in part.sources] == [own, own, None]
    assert (part.parameters or {}) == shared
    assert config.parameters == {**setting, **parameters}


@pytest.mark.parametrize("method", [method.spec.name for method in METHODS])
def test_every_method_has_a_genome_that_mergekit_plans(family: Family, method: str) -> None:
    genome = genome_of(family, method, filters=["mlp"], layer_granularity=2)
    x = genome.initial_genotype(random=True)
    recipe = genome.genotype_merge_config(x)
    planned = plan(recipe.model_dump(exclude_none=True))
    own, shared = genome.definition.evolved
    rows = x.double().view(2, 2, -1)  # groups of layers, with and without the filter
    for layer in range(4):
        for name, branch in (("mlp.up_proj", 0), ("self_attn.q_proj", 1)):
            tensor = f"model.layers.{layer}.{name}.weight"
            row = rows[layer // 2, branch]
            for i, parameter in enumerate(own):
                values = row[i : 2 * len(own) : len(own)]
                if parameter == "density" and method == "obim":
                    values = values / max(1.0, float(values.sum()))
                assert list(planned.of(tensor, parameter).values()) == pytest.approx(
                    values.tolist()
                )
            for i, parameter in enumerate(shared, 2 * len(own)):
                assert planned.tasks[tensor].parameters[parameter] == pytest.approx(float(row[i]))


def test_smooth_is_a_gradient(family: Family) -> None:
    genome = genome_of(family, "regmean_diag", smooth=True, layer_granularity=2)
    config = genome.genotype_merge_config(np.array([0.1, 0.2, 1.5, 0.3, 0.4, 2.5]))
    assert config.slices is None
    assert [model.parameters for model in config.models] == [
        {"weight": [0.1, 0.3]},
        {"weight": [0.2, 0.4]},
    ]
    assert config.parameters["lambda"] == [1.5, 2.5]
    planned = plan(config.model_dump(exclude_none=True))
    lambdas = [
        planned.tasks[f"model.layers.{layer}.self_attn.q_proj.weight"].parameters["lambda"]
        for layer in range(4)
    ]
    assert lambdas == pytest.approx([1.5, 1.5 + 1 / 3, 1.5 + 2 / 3, 2.5])


def test_densities_are_lowered_in_proportion(
    family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    genome = genome_of(family, parameters={"saliency": str(family.factored), "weight": 1})
    with caplog.at_level(logging.WARNING):
        for x, densities in (
            ([0.3, 0.6, 1.0], [0.3, 0.6]),
            ([0.9, -0.6, 1.0], [0.6, 0.4]),
            ([7.0, 1.0, 1.0], [0.5, 0.5]),
        ):
            config = genome.genotype_merge_config(np.array(x))
            found = [source.parameters["density"] for source in config.slices[0].sources[:2]]
            assert found == pytest.approx(densities, abs=1e-12)
            plan(config.model_dump(exclude_none=True))
    assert [r.message for r in caplog.records if "lowered in proportion" in r.message] == [
        "obim: the densities of a candidate sum to over 1, and experts share each tensor's "
        "positions: those of every such candidate are lowered in proportion"
    ]


def test_densities_that_need_not_be_lowered(family: Family) -> None:
    config = genome_of(family, "ties_obm").genotype_merge_config(np.array([0.9, 1, 0.8, 1, 1]))
    assert [s.parameters["density"] for s in config.slices[0].sources[:2]] == [0.9, 0.8]


@pytest.mark.parametrize(("allow", "weight"), [(True, -0.5), (False, 0.5)])
def test_negative_weights(family: Family, allow: bool, weight: float) -> None:
    genome = genome_of(family, allow_negative_weights=allow)
    config = genome.genotype_merge_config(np.array([0.1, -0.5, 0.1, 1]))
    assert config.slices[0].sources[0].parameters["weight"] == weight


def test_the_log_has_the_genes_by_name(family: Family) -> None:
    genome = genome_of(family, "regmean_diag", filters=["mlp"], layer_granularity=2)
    arrays = genome.genotype_to_param_arrays(np.arange(12.0))
    assert {name: values.tolist() for name, values in arrays.items()} == {
        "expert0_weight_mlp": [0, 6],
        "expert1_weight_mlp": [1, 7],
        "lambda_mlp": [2, 8],
        "expert0_weight": [3, 9],
        "expert1_weight": [4, 10],
        "lambda": [5, 11],
    }


def test_a_genotype_as_ray_hands_it_over(family: Family, recwarn: pytest.WarningsRecorder) -> None:
    x = np.array([0.1, 0.5, 0.1, 1])
    x.flags.writeable = False
    config = genome_of(family).genotype_merge_config(x)
    assert config.slices[0].sources[0].parameters == {"density": 0.1, "weight": 0.5}
    assert not [str(w.message) for w in recwarn if "writable" in str(w.message)]


def test_a_genotype_of_another_genome(family: Family) -> None:
    with pytest.raises(evo.InvalidGenotypeError, match="has 4 genes, and this one has 6"):
        genome_of(family).genotype_merge_config(np.ones(6))


# --- Copies of the models, other processes, other methods ------------------------------------


def test_copies_keep_the_saliency_of_the_originals(family: Family, tmp_path: Path) -> None:
    """What mergekit-evolve does by default: it writes the models anew, under other names."""
    copies = []
    for expert in family.experts:
        copies.append(tmp_path / expert.name[::-1])
        copies[-1].symlink_to(expert)
    whole = content(family, parameters={"saliency": str(family.factored)})
    original = evo.ModelGenomeDefinition.model_validate(whole)
    dump = original.model_dump(exclude=["models", "base_model"])
    copied = evo.ModelGenomeDefinition.model_validate(
        {**dump, "models": [str(c) for c in copies], "base_model": str(family.base)}
    )
    genome = pickle.loads(pickle.dumps(evo.ModelGenome(copied)))
    config = genome.genotype_merge_config(genome.initial_genotype())
    sources = config.slices[0].sources
    assert [str(source.model) for source in sources[:2]] == [str(copy) for copy in copies]
    assert [source.parameters["saliency"] for source in sources[:2]] == [
        str(family.factored / saliency_file_name(str(expert))) for expert in family.experts
    ]
    plan(config.model_dump(exclude_none=True))
    # The recipe for the user has the user's names.
    assert (
        "saliency"
        not in evo.ModelGenome(original)
        .genotype_merge_config(genome.initial_genotype())
        .slices[0]
        .sources[0]
        .parameters
    )


def test_methods_of_mergekit_are_left_alone(family: Family) -> None:
    plain, define = genomes.ModelGenome, genomes.ModelGenomeDefinition
    assert plain is not evo.ModelGenome
    assert define is not evo.ModelGenomeDefinition
    for keys in ({"merge_method": "ties"}, {"merge_method": "slerp", "a_note": "ignored"}):
        whole = {**content(family), "layer_granularity": 2, **keys}
        ours = evo.ModelGenome(evo.ModelGenomeDefinition.model_validate(whole))
        theirs = plain(define.model_validate(whole))
        x = ours.initial_genotype(random=True)
        assert x.shape == theirs.initial_genotype().shape
        assert ours.genotype_merge_config(x) == theirs.genotype_merge_config(x)
        arrays = theirs.genotype_to_param_arrays(x)
        found = ours.genotype_to_param_arrays(x)
        assert {n: v.tolist() for n, v in found.items()} == {
            n: v.tolist() for n, v in arrays.items()
        }
    for change in ({"merge_method": "nonsense"}, {"merge_method": "ties", "base_model": None}):
        with pytest.raises(ValueError, match=r"Invalid merge method|base_model is required"):
            evo.ModelGenomeDefinition.model_validate({**content(family), **change})


# --- Genomes that cannot work ----------------------------------------------------------------


def test_misspelt_keys_and_parameters(family: Family) -> None:
    says(refused(family, layer_granularty=2), "no key 'layer_granularty'", "layer_granularity")
    message = refused(family, parameters={"saliancy": "s"})
    says(message, "obim has no parameter 'saliancy'; did you mean saliency?")
    says(refused(family, parameters={"order": "sideways"}), "order", "'sideways'", "rotation")
    says(refused(family, parameters="./saliency"), "parameters: './saliency' is no mapping")


def test_values_that_no_candidate_can_have(family: Family, tmp_path: Path) -> None:
    saliency = {"saliency": str(family.factored)}
    says(refused(family, parameters={**saliency, "density": 0.6}), "sum to 1.2, over 1")
    says(refused(family, parameters={**saliency, "stretch": 2}), "assignment: nearest")
    says(
        refused(family, method="regmean_diag", allow_negative_weights=True),
        "allow_negative_weights: regmean_diag takes none",
    )
    says(
        refused(family, parameters={**saliency, "density": 0.1, "weight": 1, "lambda": 2}),
        "nothing is left to evolve",
    )
    says(refused(family, parameters={"saliency": str(tmp_path)}), str(family.experts[0]), tmp_path)
    says(refused(family, parameters={}), "no saliency for model", "obim-saliency RECIPE OUT_DIR")
    assert genome_of(family, parameters={"criterion": "magnitude"}).definition.evolved


def test_models_that_cannot_be_merged(family: Family) -> None:
    says(refused(family, base_model=None), "no base_model")
    first = str(family.experts[0])
    says(refused(family, models=[first, first]), first, "listed twice")
    says(refused(family, models=[first, str(family.base)]), str(family.base), "is the base")


# --- The command -----------------------------------------------------------------------------


class Remote:
    """In place of what ray makes of a function: it runs at once, in this process."""

    def __init__(self, target: Callable[..., Any]):
        self.remote = target

    def options(self, **options: Any) -> Remote:
        return self


@pytest.fixture
def evolve(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The command's module, which ends with the test, as does what has imported the stand-ins."""
    ray, lm_eval = mock.MagicMock(), mock.MagicMock()
    ray.remote = lambda *args, **options: Remote(args[0]) if args else Remote
    ray.get = lambda results: results
    for name in ("ray", "ray.util", "ray.util.queue", "ray.util.scheduling_strategies"):
        monkeypatch.setitem(sys.modules, name, ray)
    for name in ("", ".api", ".api.model", ".models", ".tasks"):
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", lm_eval)
    for name in ("huggingface", "vllm_causallms"):
        monkeypatch.setitem(sys.modules, f"lm_eval.models.{name}", lm_eval)
    before = set(sys.modules)
    command = importlib.import_module("mergekit.scripts.evolve")
    # It pauses for other processes to let go of the GPU, and gives cma no seed.
    monkeypatch.setattr(command, "time", SimpleNamespace(sleep=lambda seconds: None))
    fmin2 = command.cma.fmin2
    monkeypatch.setattr(
        command.cma,
        "fmin2",
        lambda *args, options, **more: fmin2(*args, options={**options, "seed": 1}, **more),
    )
    yield command
    for name in set(sys.modules) - before:
        if name.startswith(("mergekit.evo.", "mergekit.scripts.evolve")):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "goal"),
    [
        ("obim", {"density": [0.7, 0.2], "weight": [1.0, 1.3]}),
        ("regmean_diag", {"weight": [0.4, 1.5], "lambda": 1.6}),
    ],
)
def test_a_few_generations(
    world: commands.World,
    evolve: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    goal: dict[str, Any],
) -> None:
    """The search comes nearer to the goal, by copies of the models, and makes the user's model."""
    family = SimpleNamespace(base=world.base, experts=world.experts, factored=world.saliency)
    genome = genome_of(family, method)
    own, shared = genome.definition.evolved
    x = [goal[name][k] for k in range(2) for name in own] + [goal[name] for name in shared]
    models = {"goal": np.array(x), "start": genome.initial_genotype()}
    for name, genotype in models.items():
        config = genome.genotype_merge_config(genotype)
        run_merge(config, str(tmp_path / name), MergeOptions(quiet=True))
    wanted = read_checkpoint(tmp_path / "goal")

    def distance(folder: Path) -> float:
        merged = read_checkpoint(folder)
        assert merged.keys() == wanted.keys()
        differences = (merged[n].double() - weight.double() for n, weight in wanted.items())
        return sum(float(difference.square().sum()) for difference in differences)

    tried = []

    def simple_evaluate(*, model_args: dict[str, Any], **more: Any) -> Any:
        tried.append(distance(Path(model_args["pretrained"])))
        return {"results": {"nearness": {"acc,none": -tried[-1]}}}

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", simple_evaluate)
    whole = {"genome": content(family, method), "tasks": ["nearness"]}
    storage = tmp_path / "storage"
    mergekit_obim.register()  # as the command's own imports do in a process of its own
    options = "--strategy serial --no-merge-cuda --num-gpus 1 --force-population-size 6"
    result = commands._invoke(
        evolve.main,
        [
            *(commands.write_recipe(tmp_path, whole), "--storage-path", storage),
            *(*options.split(), "--max-fevals", 18),
        ],
    )
    commands.succeed(result)
    assert len(tried) >= 18
    assert min(tried[-6:]) < min(tried[:6])
    assert min(tried) < distance(tmp_path / "start")
    assert distance(storage / "final_model") == min(tried)
    # So far it had merged its copies, and every one by the saliency of what it was copied from.
    best = yaml.safe_load((storage / "best_config.yaml").read_text(encoding="utf-8"))
    *sources, base = best["slices"][0]["sources"]
    assert all(source["model"].startswith(f"{storage}/") for source in (*sources, base))
    assert [source["parameters"]["saliency"] for source in sources] == [
        str(world.saliency_of(expert)) for expert in world.experts
    ]


@pytest.mark.slow
def test_the_command_refuses_a_genome_in_one_line(
    family: Family, evolve: ModuleType, tmp_path: Path
) -> None:
    mergekit_obim.register()
    whole = {"genome": content(family, parameters={"saliancy": "s"}), "tasks": ["a_task"]}
    path, storage = commands.write_recipe(tmp_path, whole), tmp_path / "storage"
    message = refusal(commands._invoke(evolve.main, [path, "--storage-path", storage]))
    says(message, "genome: parameters: obim has no parameter 'saliancy'; did you mean saliency?")
    assert not storage.exists()


def test_nothing_is_imported_where_nothing_evolves(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("mergekit.evo.config", "mergekit.evo.genome", "mergekit_obim.methods.genomes")
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    mergekit_obim.register()
    assert not sys.modules.keys() & set(names)


@pytest.mark.slow
def test_mergekit_evolve_finds_the_methods_by_itself(family: Family) -> None:
    """In the command's order of imports, without what it needs beside mergekit."""
    program = f"""if True:
        import sys
        import mergekit_obim_autoload
        mergekit_obim_autoload.install()
        from mergekit.evo.config import EvolMergeConfiguration, ModelGenomeDefinition
        from mergekit.evo.genome import ModelGenome
        assert "mergekit_obim" not in sys.modules
        import mergekit.merge
        definition = ModelGenomeDefinition.model_validate({content(family)!r})
        genome = ModelGenome(definition)
        config = genome.genotype_merge_config(genome.initial_genotype())
        assert config.parameters == {content(family)["parameters"]!r}
        whole = {{"genome": {content(family)!r}, "tasks": ["a_task"]}}
        assert EvolMergeConfiguration.model_validate(whole).genome == definition
        assert not {{"cma", "lm_eval", "ray", "vllm", "wandb"}} & sys.modules.keys()
        """
    package = Path(mergekit_obim.__file__).parent
    path = os.pathsep.join([str(package.parent), str(package / "_autoload")])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("MERGEKIT_OBIM_AUTOLOAD", None)
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
