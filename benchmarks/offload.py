"""Peak memory of the pre-pass of a model four times larger than what it may use.

    python -m benchmarks.offload [--smoke] [--cache .cache/offload]

Runs `obim-saliency` in processes of their own on a random bf16 Llama: as it is; with
`--device-map auto --max-memory cpu=` a quarter of the weights' bytes; and, for what Python, torch
and the activations take by themselves, on a single one of its layers. A peak is the process's
largest resident memory, pages of mapped checkpoint files included (Linux: VmHWM); given are peaks
above that of the single layer, less its weights. Ends with one JSON line.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.tiny_llama import byte_tokenizer

ROWS, LENGTH = 4, 32
_CODE = """
import atexit, sys
atexit.register(lambda: print(open("/proc/self/status").read(), file=sys.stderr))
from mergekit_obim.commands.saliency import main
main()
"""


def llama(hidden: int, inner: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1000,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


SIZES = {"full": (1024, 2816, 80), "smoke": (512, 1408, 40)}  # width, inner width, layers


def write_model(folder: Path, config: LlamaConfig) -> int:
    """A checkpoint of random weights, in several files; its bytes."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    sizes = {name: 2 * shape.numel() for name, shape in shapes.items()}
    if not (folder / "config.json").exists():
        names, files = list(shapes), {}
        for number in range(4):
            part = names[number * len(names) // 4 : (number + 1) * len(names) // 4]
            file = f"model-{number + 1:05}-of-00004.safetensors"
            folder.mkdir(parents=True, exist_ok=True)
            generator = torch.Generator().manual_seed(number)
            tensors = {n: torch.randn(shapes[n], generator=generator) * 0.02 for n in part}
            save_file(
                {n: t.bfloat16() for n, t in tensors.items()}, folder / file, {"format": "pt"}
            )
            files |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        byte_tokenizer().save_pretrained(folder)
        config.save_pretrained(folder)
    return sum(sizes.values())


def measure(cache: Path, model: Path, *options: str) -> dict[str, float]:
    """One run of the pre-pass: wall seconds and peak resident memory in MiB."""
    data, recipe, out, base = (cache / name for name in ("rows.jsonl", "recipe.yml", "out", "base"))
    row = json.dumps({"text": "A row that is long enough to be cut." * 2})
    data.write_text(f"{row}\n" * ROWS)
    calibration = {"data": str(data), "max_length": LENGTH, "batch_size": ROWS}
    models = [{"model": str(model), "calibration": calibration}]
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    for file in model.iterdir():  # the same weights; a link to the folder would be the same model
        os.link(file, base / file.name)
    top = {"merge_method": "obim", "base_model": str(base)}
    recipe.write_text(yaml.safe_dump({**top, "models": models}))
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _CODE, recipe, out, "--quiet", "--device", "cpu", *options],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    peak = re.findall(r"VmHWM:\s*(\d+) kB", done.stderr)[-1]
    return {"seconds": time.perf_counter() - start, "peak_mib": int(peak) / 1024}


@click.command()
@click.option("--smoke", is_flag=True, help="A model of 1/4 GiB instead of 2 GiB")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=".cache/offload", show_default=True
)
def main(smoke: bool, cache: Path) -> None:
    """Peak memory of the pre-pass, with and without a limit."""
    size = "smoke" if smoke else "full"
    *widths, layers = SIZES[size]
    weights = write_model(cache / size, llama(*widths, layers)) / 2**20
    single = write_model(cache / f"{size}-single", llama(*widths, 1)) / 2**20
    allowed = weights / 4
    limit = ("--device-map", "auto", "--max-memory", f"cpu={int(allowed * 2**20)}")
    runs: dict[str, Any] = {
        "single": measure(cache, cache / f"{size}-single"),
        "whole": measure(cache, cache / size),
    }
    whole = {path.name: path.read_bytes() for path in (cache / "out").iterdir()}
    runs["limited"] = measure(cache, cache / size, *limit)
    same = whole == {path.name: path.read_bytes() for path in (cache / "out").iterdir()}
    beside = runs["single"]["peak_mib"] - single
    print(f"weights {weights:.0f} MiB, of which {allowed:.0f} MiB may be in memory\n")
    print("run       seconds  peak MiB  less what else there is  over what is allowed")
    for name, run in runs.items():
        run["weights_mib"] = run["peak_mib"] - beside
        line = f"{name:<8} {run['seconds']:>8.1f} {run['peak_mib']:>9.0f}"
        ratio = run["weights_mib"] / allowed
        print(f"{line} {run['weights_mib']:>24.0f} {ratio:>21.2f}")
    print(f"\nthe same file with and without the limit: {'yes' if same else 'NO'}")
    print(json.dumps({"weights_mib": weights, "allowed_mib": allowed, "same": same, "runs": runs}))


if __name__ == "__main__":
    main()
