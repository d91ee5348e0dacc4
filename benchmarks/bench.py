"""What `make bench` runs: the cost of an OBIM merge compared with mergekit's own methods.

    python -m benchmarks.bench [--smoke] [--cache .cache/bench] [--runs 3]

Tables: *whole runs*: `mergekit-yaml` as a user starts it, on random bf16 Llama
checkpoints, the methods taking turns, wall time and peak memory of each process.
*Kernels*: benchmarks/kernels.py. *Growth*: the masks and the merge of one tensor for
several K and sizes. *Pre-pass*: the capture's forward over the bare forward of the same
batch. *Many lengths*: the pre-pass of a tiny Llama on rows of many lengths, one at a time and
packed. All figures are medians after a warm-up and are meant as ratios within one run.
Ends with one JSON line, and with --write puts the tables into docs/performance.md.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import kernels, tiny_llama
from mergekit_obim.calibration.capture import CurvatureCapture
from mergekit_obim.calibration.data import TokenSequence
from mergekit_obim.calibration.passes import run_through
from mergekit_obim.calibration.ranks import Ranks
from mergekit_obim.calibration.resume import Checkpoint
from mergekit_obim.kernels.gram import TEST_MATRIX, draw_test_matrix
from mergekit_obim.saliency.file import (
    Gram,
    SaliencyMetadata,
    saliency_file_name,
    write_saliency,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def llama(size: str) -> LlamaConfig:
    """Configurations by size: `full` has 0.48B parameters, `smoke` next to none."""
    hidden, inner, layers, vocabulary = {
        "full": (1280, 3456, 20, 32000),
        "smoke": (32, 64, 2, 100),
    }[size]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16 if size == "smoke" else 20,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )


def write_models(folder: Path, config: LlamaConfig, experts: int) -> list[str]:
    """A random base and fine-tunes of it, bf16, each with a factored saliency file and sketches."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    names = ["base", *(f"expert{k}" for k in range(experts))]
    for number, name in enumerate(names):
        path = folder / name
        write_measured(folder / "saliency" / saliency_file_name(str(path)), path, shapes, number)
        if (path / "model.safetensors").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for index, (weight, shape) in enumerate(shapes.items()):
            base = torch.randn(shape, generator=torch.Generator().manual_seed(index)) * 0.02
            if number:
                change = torch.Generator().manual_seed(1000 * number + index)
                base += torch.randn(shape, generator=change) * 0.001
            tensors[weight] = base.bfloat16()
        config.save_pretrained(path)
        save_file(tensors, path / "model.safetensors.part", metadata={"format": "pt"})
        (path / "model.safetensors.part").rename(path / "model.safetensors")
    return [str(folder / name) for name in names]


def write_measured(path: Path, model: Path, shapes: dict[str, torch.Size], seed: int) -> None:
    """A saliency file of random inputs: h of every weight, and sketches of 16 columns."""
    generator, entries = torch.Generator().manual_seed(seed), {}
    inputs = {name: f"sketch of {name}" for name, s in shapes.items() if len(s) == 2}
    for name, shape in shapes.items():
        x = torch.randn(64, shape[-1], generator=generator)
        h = x.square().mean(0)
        entries[name] = h[None] if name in inputs else h
        if name in inputs:
            omega = draw_test_matrix(shape[-1], 16)
            entries[inputs[name]] = x.T @ (x @ omega) / len(x)
    gram = Gram(columns=16, test_matrix=TEST_MATRIX, inputs=inputs)
    metadata = SaliencyMetadata(form="factored", model=str(model), gram=gram)
    shapes_of = {name: entry.shape for name, entry in entries.items()}
    write_saliency(path, shapes_of, entries.__getitem__, metadata)


def recipe(method: str, models: list[str], folder: Path) -> dict[str, Any]:
    """A merge of the same models by one of the methods that are compared."""
    share = round(1 / (len(models) - 1), 6)
    means = ("linear", "regmean")
    own: dict[str, Any] = {"weight": share} if method in means else {"density": share}
    if method in ("ties", "dare_ties"):
        own["weight"] = share
    result: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": model, "parameters": own} for model in models[1:]],
        "dtype": "bfloat16",
    }
    if method != "linear":
        result["base_model"] = models[0]
    if method in ("obim", "regmean"):
        result["parameters"] = {"saliency": str(folder / "saliency")}
    return result


def run_merge(method: str, models: list[str], folder: Path) -> tuple[float, float]:
    """One `mergekit-yaml` process: wall seconds and peak resident memory in GiB."""
    path, out = folder / f"{method}.yml", folder / "out"
    path.write_text(yaml.safe_dump(recipe(method, models, folder)))
    shutil.rmtree(out, ignore_errors=True)
    command = [str(Path(sys.executable).parent / "mergekit-yaml"), str(path), str(out)]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--no-copy-tokenizer", "--quiet"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors}")
    return wall, usage.ru_maxrss / 2**20


def whole_runs(folder: Path, size: str, runs: int, experts: int, methods: list[str]) -> dict:
    """The methods in turn, so that a drift of the machine's speed falls on all of them."""
    models = write_models(folder, llama(size), experts)
    if size != "smoke":
        run_merge("linear", models, folder)  # warm-up: the files into the page cache
    seen: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
    for _ in range(runs):
        for method in methods:
            seen[method].append(run_merge(method, models, folder))
    return {
        method: {
            "seconds": statistics.median(wall for wall, _ in figures),
            "peak_gib": statistics.median(peak for _, peak in figures),
        }
        for method, figures in seen.items()
    }


def growth(smoke: bool, repeats: int) -> list[dict]:
    """Seconds per element and expert: masks and merge, for several K and sizes."""
    device = torch.device("cpu")
    sides = (64, 128) if smoke else (1024, 2048, 4096)
    shapes = [(side, 3) for side in sides] + [(sides[-1], k) for k in (2, 4, 8)]
    rows = []
    for side, experts in shapes:
        figures = kernels.measure(side, side, experts, device, repeats)
        seconds = (figures["masks_saliency"] + figures["merge"]) * figures["copy_seconds"]
        per_visit = seconds / figures["elements"] / experts
        rows.append({"elements": figures["elements"], "experts": experts, "ns": per_visit * 1e9})
    return rows


def pre_pass(smoke: bool, repeats: int) -> dict[str, float]:
    """Time of a measured forward over that of the bare one, without logits in both."""
    config = llama("smoke" if smoke else "full")
    config.num_hidden_layers = 2 if smoke else 6
    ratios = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(dtype).eval()
        batch = torch.randint(0, config.vocab_size, (4, 16 if smoke else 512))
        name = str(dtype).removeprefix("torch.")
        captures = {
            name: CurvatureCapture(model, skip_logits=True),
            f"{name}, sketch 16": CurvatureCapture(model, skip_logits=True, columns=16),
        }
        paired: dict[str, list[float]] = {kind: [] for kind in captures}
        # A CPU without bfloat16 arithmetic takes half a minute for each.
        for _ in range(min(repeats, 3) + 1 if dtype == torch.bfloat16 else repeats + 1):
            with torch.no_grad():
                start = time.perf_counter()
                model.model(input_ids=batch, use_cache=False)
                bare = time.perf_counter() - start
            for kind, capture in captures.items():
                start = time.perf_counter()
                with capture:
                    model(input_ids=batch, use_cache=False)
                paired[kind].append((time.perf_counter() - start) / bare)
        ratios |= {kind: statistics.median(times[1:]) for kind, times in paired.items()}
        del model, captures, capture
        gc.collect()
    return ratios


def many_lengths(smoke: bool, repeats: int) -> dict[str, Any]:
    """Tokens per second of processor time: rows of the lengths of chats, alone and packed."""
    model = tiny_llama.Size().build(seed=0).eval()
    spread = torch.randn(10 if smoke else 100, generator=torch.Generator().manual_seed(1)) * 0.6
    lengths = (110 * spread.exp()).long().clamp(20, 512).tolist()
    rows = [TokenSequence(torch.randint(tiny_llama.BOS, (n,)).tolist()) for n in lengths]
    seen: dict[str, list[float]] = {"one at a time": [], "packed": []}
    for _ in range(repeats + 1):
        for kind in seen:
            size: Any = "auto" if kind == "packed" else 1
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                run_through(
                    model, rows, label=kind, batch_size=size, quiet=True, ranks=Ranks(),
                    checkpoint=Checkpoint(Path(folder) / "sums", {}),
                )  # fmt: skip
                seen[kind].append(sum(lengths) / (time.process_time() - start))
    return {
        "rows": len(lengths),
        "lengths": len(set(lengths)),
        "tokens": sum(lengths),
        "hidden_size": model.config.hidden_size,
        **{kind: statistics.median(rates[1:]) for kind, rates in seen.items()},
    }


def machine() -> dict[str, str]:
    """Where and with what figures are taken."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    versions = {
        name: importlib.metadata.version(name) for name in ("mergekit", "torch", "transformers")
    }
    found = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", found.read_text()) if found.exists() else []
    return {
        "processor": f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **versions,
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def measure_part(part: str, cache: Path, smoke: bool, runs: int) -> Any:
    """The figures of one of the parts."""
    size = "smoke" if smoke else "full"
    folder = (cache / size).resolve()
    if part == "whole_runs":
        methods = ["linear", "dare_ties", "ties", "obim", "regmean"]
        methods = ["linear", "ties", "regmean"] if smoke else methods
        return {"3 experts": whole_runs(folder, size, 1 if smoke else runs, 3, methods)}
    if part == "more_experts":
        count, methods = (4, ["obim"]) if smoke else (8, ["ties", "obim"])
        return {f"{count} experts": whole_runs(folder, size, 1, count, methods)}
    if part == "kernels":
        side = 256 if smoke else 4096
        return kernels.measure(side, side, 3, torch.device("cpu"), 1 if smoke else 5)
    if part == "growth":
        return growth(smoke, 1 if smoke else 3)
    if part == "many_lengths":
        return many_lengths(smoke, 1 if smoke else 5)
    return pre_pass(smoke, 1 if smoke else 5)


def tables(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    sections = [
        "\n".join([*TABLES[part](kept["figures"]), "", "*" + _where(kept["machine"]) + "*"])
        for part, kept in figures.items()
    ]
    return "\n\n".join(sections)


def _where(machine: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def _whole_runs_table(figures: dict[str, Any]) -> list[str]:
    lines = []
    for label, runs in figures.items():
        linear, ties = runs.get("linear"), runs.get("ties")
        lines += [
            f"### Whole `mergekit-yaml` runs, {label}",
            "",
            "| method | seconds | over linear | over ties | peak GiB | peak over ties |",
            "|---|---|---|---|---|---|",
        ]
        for method, run in runs.items():
            ratios = [
                f"{run[key] / other[key]:.2f}" if other else "–"
                for key, other in (("seconds", linear), ("seconds", ties), ("peak_gib", ties))
            ]
            lines.append(
                f"| {method} | {run['seconds']:.1f} | {ratios[0]} | {ratios[1]} "
                f"| {run['peak_gib']:.2f} | {ratios[2]} |"
            )
        lines.append("")
    return lines[:-1]


def _kernels_table(kernel: dict[str, Any]) -> list[str]:
    what = {
        "select_one": "the k-th largest score and the positions that reach it, k = a third",
        "claim_one": "the same, computing the scores too: one expert's share, by saliency",
        "masks_saliency": "masks, by saliency",
        "masks_magnitude": "masks, by magnitude",
        "masks_random": "masks, at random",
        "merge": "the merged tensor from the masks",
    }
    copy = 1000 * kernel["copy_seconds"]
    return [
        f"### Kernels: {kernel['elements']:,} elements, {kernel['experts']} bf16 experts",
        "",
        f"| kernel | time, in copies of the tensor as float32 ({copy:.0f} ms) |",
        "|---|---|",
        *(f"| {text} | {kernel[name]:.1f} |" for name, text in what.items()),
        *_regmean_lines(kernel),
    ]


def _regmean_lines(kernel: dict[str, Any]) -> list[str]:
    if "regmean_over_linear" not in kernel:  # figures of before there was the method
        return []
    ratio = kernel["regmean_over_linear"]
    return ["", f"`regmean` by sketches of 16 columns takes {ratio:.2f} times as long as `linear`."]


def _growth_table(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "### Growth: masks and merge of one tensor",
        "",
        "| elements | experts | ns per element and expert |",
        "|---|---|---|",
        *(f"| {r['elements']:,} | {r['experts']} | {r['ns']:.1f} |" for r in rows),
    ]


def _pre_pass_table(ratios: dict[str, float]) -> list[str]:
    return [
        "### Pre-pass: the measured forward over the bare one",
        "",
        "| measured in | ratio |",
        "|---|---|",
        *(f"| {dtype} | {ratio:.2f} |" for dtype, ratio in ratios.items()),
    ]


def _many_lengths_table(figures: dict[str, Any]) -> list[str]:
    alone, packed = figures["one at a time"], figures["packed"]
    return [
        f"### Pre-pass: {figures['rows']} rows of {figures['lengths']} lengths, "
        f"{figures['tokens']:,} tokens, hidden size {figures['hidden_size']}",
        "",
        "| rows run | tokens per second of processor time |",
        "|---|---|",
        f"| one at a time | {alone:,.0f} |",
        f"| packed, the trial included | {packed:,.0f} |",
    ]


TABLES: dict[str, Callable[[Any], list[str]]] = {
    "whole_runs": _whole_runs_table,
    "more_experts": _whole_runs_table,
    "kernels": _kernels_table,
    "growth": _growth_table,
    "pre_pass": _pre_pass_table,
    "many_lengths": _many_lengths_table,
}


@click.command()
@click.option(
    "--smoke", is_flag=True, help="Tiny sizes: does everything once, times nothing of use"
)
@click.option("--cache", type=click.Path(path_type=Path), default=".cache/bench", show_default=True)
@click.option("--runs", default=3, show_default=True, help="Of each whole merge")
@click.option("--part", "parts", type=click.Choice(list(TABLES)), multiple=True, help="Only these")
@click.option("--write", is_flag=True, help="Put tables and figures into docs/")
def main(smoke: bool, cache: Path, runs: int, parts: tuple[str, ...], write: bool) -> None:
    """Benchmark the merge and the pre-pass."""
    kept = PAGE.with_suffix(".json")
    figures = json.loads(kept.read_text(encoding="utf-8")) if write and kept.exists() else {}
    for part in parts or TABLES:
        figures[part] = {"machine": machine(), "figures": measure_part(part, cache, smoke, runs)}
    figures = {part: figures[part] for part in TABLES if part in figures}
    text = tables(figures)
    print(text)
    if write:
        kept.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        page = f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"
        PAGE.write_text(page, encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
