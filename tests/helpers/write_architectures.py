"""Writes docs/architectures.md: ``python tests/helpers/write_architectures.py`` (a few minutes).

For every architecture in the table, two models are built, one is measured on a few tokens, and
mergekit itself merges both; the result is compared tensor by tensor. ``test_architectures.py``
checks all columns of the page but the last.
"""

from __future__ import annotations

import logging
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

import tiny_models
from architectures import ARCHITECTURES, DEFINED, EXCLUDED, UPSTREAM, Architecture, coverage
from mergekit_obim.calibration.capture import CurvatureCapture
from mergekit_obim.calibration.feeding import feed
from mergekit_obim.models.names import sources_of, weight_names

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
HEAD = """# Architectures

Every architecture that mergekit 0.1.5 defines and transformers 5 builds without remote code, and
some of those that mergekit infers. `tests/helpers/write_architectures.py` writes this page from
tiny models with random weights. `tests/test_architectures.py` compares each h with a reference that
takes gradients instead of watching operations.

- *tensors*: the number of parameters; tied parameters count once.
- *scored*: how many of them get an h from text. The pre-pass and the merge name the others and the
  reason, and the merge ranks them as the recipe's [unscored](recipes.md#unscored) says. `N` stands
  for all layers. Vision towers get an h from [images](recipes.md#images).
- *merged*: whether mergekit's own `linear` merge of two such models has all their tensors, each the
  mean of both. Where it does not, the cause is in mergekit or transformers, as none of our methods
  is involved.

| architecture | class | mergekit | tensors | scored | unscored, and why | merged |
|---|---|---|---|---|---|---|
"""
TAIL = """
## Left out

| definition | why |
|---|---|
"""


def measure(architecture: Architecture) -> tuple[int, int, str]:
    model = architecture.build()
    with CurvatureCapture(model) as capture:
        for ids in tiny_models.sequences((7, 5, 40)):
            feed(model, ids[None])
    return coverage([name for name, _ in model.named_parameters()], capture.unscored())


def merged(architecture: Architecture, folder: Path) -> str:
    """What became of a linear merge by mergekit: "yes", or what went wrong."""
    states = []
    for seed in (0, 1):
        model = architecture.build(seed=seed)
        model.save_pretrained(folder / str(seed))
        loaded = type(model).from_pretrained(folder / str(seed))
        stored = load_file(folder / str(seed) / "model.safetensors")
        states.append({**stored, **loaded.state_dict()})
    recipe = MergeConfiguration.model_validate(
        {
            "merge_method": "linear",
            "models": [
                {"model": str(folder / str(seed)), "parameters": {"weight": 0.5}} for seed in (0, 1)
            ],
            "dtype": "float32",
        }
    )
    try:
        run_merge(
            recipe, str(folder / "out"), MergeOptions(copy_tokenizer=False, write_model_card=False)
        )
    except Exception as error:  # whatever mergekit raises
        line = " ".join(str(error).split()) or type(error).__name__
        line = re.sub(r"\{.*\}", "…", line.replace(str(folder), "…").replace("|", "/"))
        return f"no: {type(error).__name__}: {line[:140]}"
    found: dict[str, torch.Tensor] = {}
    for file in (folder / "out").glob("*.safetensors"):
        found |= load_file(file)
    names = weight_names(loaded, sources_of(loaded, stored))
    lost = [n for n, known in names.items() if not any(name in found for name in known)]
    # Fused experts are written either way.
    lost = [n for n in lost if not _apart(loaded, n, found)]
    wrong = [
        name
        for name, tensor in found.items()
        if tensor.is_floating_point()
        and not torch.allclose(tensor, (states[0][name] + states[1][name]) / 2, atol=1e-5)
    ]
    if wrong:
        return f"no: {len(wrong)} tensors are not the mean of both, as `{wrong[0]}`"
    if lost:
        return f"no: loses {len(lost)} tensors, as `{lost[0]}`"
    return "yes"


def _apart(model: Any, parameter: str, found: dict[str, torch.Tensor]) -> bool:
    from mergekit_obim.models.names import stored_parts

    weight = model.get_parameter(parameter)
    h = torch.ones([1] * weight.ndim)
    return weight.ndim == 3 and bool(
        stored_parts(model, parameter, h.expand(len(weight), 1, weight.shape[2]), _shapes(found))
    )


def _shapes(found: dict[str, torch.Tensor]) -> Any:
    return lambda name: found[name].shape if name in found else None


def row(name: str) -> str:
    architecture = ARCHITECTURES[name]
    tensors, scored, unscored = measure(architecture)
    with tempfile.TemporaryDirectory() as folder:
        outcome = merged(architecture, Path(folder))
    if outcome != "yes":
        outcome += f" ({UPSTREAM[name]})"
    known = "defined" if name in DEFINED else "inferred"
    cells = (name, f"`{architecture.model}`", known, tensors, scored, unscored, outcome)
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for name in ARCHITECTURES:
        rows.append(row(name))
        print(rows[-1], file=sys.stderr, flush=True)
    left_out = [f"| {name} | {why} |" for name, why in EXCLUDED.items()]
    PAGE.write_text(
        HEAD + "\n".join(rows) + "\n" + TAIL + "\n".join(left_out) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
