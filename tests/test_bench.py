"""The benchmark in miniature: it merges what it says it merges; nobody's time is tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import checkpoints
import reference
from benchmarks import bench, offload
from mergekit_obim.models.layers import layer_indices, rotate
from mergekit_obim.saliency.file import SaliencyFile, saliency_file_name


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def output(cache: Path) -> str:
    result = CliRunner().invoke(bench.main, ["--smoke", "--cache", str(cache)])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_it_ends_with_one_line_of_json_that_says_what_the_table_says(output: str) -> None:
    figures = json.loads(output.splitlines()[-1])
    assert bench.tables(figures) == output.rsplit("\n", 2)[0]
    parts = ["whole_runs", "more_experts", "kernels", "growth", "pre_pass", "many_lengths"]
    assert list(figures) == parts
    dtypes = ("float32", "bfloat16")
    assert set(figures["pre_pass"]["figures"]) == {*dtypes, *(f"{d}, sketch 16" for d in dtypes)}
    runs = figures["whole_runs"]["figures"]["3 experts"]
    assert all(run["seconds"] > 0 and run["peak_gib"] > 0 for run in runs.values())


@pytest.mark.slow
@pytest.mark.usefixtures("output")
def test_the_merge_that_it_times_is_exact(cache: Path) -> None:
    """Of mergekit-yaml's own process, which the benchmark started last with obim."""
    folder = cache / "smoke"
    base, *experts = [
        checkpoints.read_checkpoint(folder / name)
        for name in ("base", "expert0", "expert1", "expert2", "expert3")
    ]
    files = [
        SaliencyFile(folder / "saliency" / saliency_file_name(str(folder / f"expert{k}")))
        for k in range(4)
    ]
    merged = checkpoints.read_checkpoint(folder / "out")
    assert merged.keys() == base.keys()
    layers = layer_indices(base)
    for name, weight in base.items():
        inputs = [
            reference.Expert(expert[name], density=0.25, h=file[name])
            for expert, file in zip(experts, files, strict=True)
        ]
        owners = reference.owners(weight, inputs, rotate(range(4), layers[name]))
        assert len(set(owners)) >= 3, name
        assert torch.equal(merged[name], reference.merge_owned(weight, inputs, owners)), name


def test_the_page_shows_the_figures_that_are_kept_beside_it() -> None:
    """Written by `make bench` and not by hand."""
    page = bench.PAGE.read_text(encoding="utf-8")
    shown = page.split(bench.BEGIN)[1].split(bench.END)[0].strip("\n")
    figures = json.loads((bench.PAGE.parent / "performance.json").read_text(encoding="utf-8"))
    assert shown == bench.tables(figures)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_a_model_four_times_the_allowed_memory_takes_no_more_than_that(tmp_path: Path) -> None:
    result = CliRunner().invoke(offload.main, ["--smoke", "--cache", str(tmp_path)])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output.splitlines()[-1])
    assert figures["same"]
    allowed, runs = figures["allowed_mib"], figures["runs"]
    assert figures["weights_mib"] == 4 * allowed
    assert runs["whole"]["weights_mib"] > 3.8 * allowed  # it measures what it should
    # 8 MiB are the sums, the modules, and what the allocator rounds up.
    assert runs["limited"]["weights_mib"] < allowed + 8
