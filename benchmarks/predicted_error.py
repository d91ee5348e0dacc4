"""How far the report's predicted errors are from what layers really put out.

    python -m benchmarks.predicted_error [--scale tiny] [--seed 0] [--columns 16 --columns 64]

The truth is ‖(θ_M − θ_k) X_k‖² / T of each linear layer, by hooks in the expert's own model, in
float64, over the rows that its saliency was measured on. Beside it stand Σ h (θ_M − θ_k)², and what
`obim-report` predicts by sketches, for merges of the models of docs/evidence.md. Prints the mean
and the largest relative error over layers, and the errors as shares of the base's, by expert; ends
with one JSON line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is to be downloaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import torch
import transformers
import yaml
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.evidence.lab import BASE, SCALES, TRIO, Lab, command
from benchmarks.tiny_llama import BOS
from mergekit_obim.dry_run import read_config
from mergekit_obim.report.gather import gather
from mergekit_obim.saliency.file import SaliencyFile, saliency_file_name

METHODS: dict[str, dict[str, Any]] = {
    "obim": {"merge_method": "obim"},
    "nearest": {"merge_method": "obim", "parameters": {"assignment": "nearest", "stretch": 1.7}},
    "regmean_diag": {"merge_method": "regmean_diag"},
    "regmean": {"merge_method": "regmean"},
}


def true_errors(
    folder: Path, rows: Sequence[Sequence[int]], ends: Sequence[Mapping[str, Tensor]]
) -> dict[str, list[float]]:
    """Return the error of each linear layer's output with other weights, per token, by weight.

    Args:
        folder: The expert.
        rows: Token sequences of its calibration data.
        ends: Other models' weights, such as the merged one's.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    sums: dict[str, list[float]] = {}

    def hook(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor, name: str) -> None:
        total = sums.setdefault(name, [0.0] * len(ends))
        for k, end in enumerate(ends):
            total[k] += float((args[0] @ (end[name].double() - module.weight).T).square().sum())

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, i, o, name=f"{name}.weight": hook(m, i, o, name))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([list(row)]))
    tokens = sum(map(len, rows))
    return {name: [total / tokens for total in totals] for name, totals in sums.items()}


@click.command()
@click.option("--scale", type=click.Choice(list(SCALES)), default="tiny", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--columns", type=int, multiple=True, default=(16, 64), show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=".cache/evidence")
def main(scale: str, seed: int, columns: tuple[int, ...], cache: Path) -> None:
    """Measure, merge, predict, and look."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    lab = Lab(SCALES[scale], seed, cache / scale / f"seed{seed}")
    base, *experts = lab.models(BASE, *TRIO)
    folder, length = lab.folder / "predicted", lab.scale.expert.context
    folder.mkdir(exist_ok=True)
    rows = {task: lab.corpus[task]["train"][: lab.scale.samples] for task in TRIO}
    for task, texts in rows.items():
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{task}.jsonl").write_text("".join(lines))
    models = [
        {"model": str(expert), "calibration": str(folder / f"{task}.jsonl")}
        for expert, task in zip(experts, TRIO, strict=True)
    ]
    common = {"base_model": str(base), "models": models, "dtype": "float32",
              "calibration": {"max_length": length, "samples": lab.scale.samples}}  # fmt: skip
    path = folder / "recipe.yml"
    for count in columns:
        path.write_text(yaml.safe_dump({**common, **METHODS["obim"]}))
        command("obim-saliency", path, folder / str(count), "--sketch", count)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, method in METHODS.items():
        # regmean merges by the sketch itself, so each number of columns makes another model.
        for group in [[count] for count in columns] if name == "regmean" else [list(columns)]:
            label = f"{name} by {group[0]} columns" if name == "regmean" else name
            recipes = {
                count: {
                    **common,
                    **method,
                    "parameters": {
                        **method.get("parameters", {}),
                        "saliency": str(folder / str(count)),
                    },
                }
                for count in group
            }
            found[label] = _compare(lab, recipes, rows, folder)
            for way, row in found[label].items():
                shares = " ".join(f"{share:.3f}" for share in row["shares"])
                off = f"mean {row['mean']:.3f} max {row['max']:.3f}" if "mean" in row else ""
                click.echo(f"{label:22} {way:12} {off:22} shares {shares}")
    click.echo(json.dumps({"scale": scale, "seed": seed, "found": found}))


def _compare(
    lab: Lab,
    recipes: Mapping[int, dict[str, Any]],
    rows: Mapping[str, Sequence[str]],
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """Return relative errors and shares of each prediction, of recipes that make one model."""
    base, *experts = lab.models(BASE, *TRIO)
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(next(iter(recipes.values()))))
    command("mergekit-yaml", path, folder / "merged", "--no-copy-tokenizer")
    ends = [load_file(f / "model.safetensors") for f in (folder / "merged", base)]
    options = MergeOptions(quiet=True)
    accounts = {n: gather(read_config(r), options, curve=False) for n, r in recipes.items()}
    off: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    for k, (expert, task) in enumerate(zip(experts, TRIO, strict=True)):
        tokens = [[BOS, *text.encode()][: lab.scale.expert.context] for text in rows[task]]
        truth = true_errors(expert, tokens, ends)
        file = SaliencyFile(folder / str(min(recipes)) / saliency_file_name(str(expert)))
        own = load_file(expert / "model.safetensors")
        ways = {
            "truth": truth,
            "diagonal": {
                name: [float((file[name] * (end[name] - own[name]).square()).sum()) for end in ends]
                for name in truth
            },
        }
        for count, account in accounts.items():
            ways[f"{count} columns"] = {
                tensor.name: [tensor.tally.error[k], tensor.tally.at_base()[k]]
                for tensor in account.tensors
                if tensor.name in truth
            }
        for way, errors in ways.items():
            if way != "truth":
                rest = [abs(errors[name][0] / true - 1) for name, (true, _) in truth.items()]
                off.setdefault(way, []).extend(rest)
            here, there = (sum(values) for values in zip(*errors.values(), strict=True))
            shares.setdefault(way, []).append(float(here / there))
    return {
        way: {"shares": shares[way]}
        | ({"mean": sum(off[way]) / len(off[way]), "max": max(off[way])} if way in off else {})
        for way in shares
    }


if __name__ == "__main__":
    main()
