"""Which of a model's weights are those of linear layers, and how they lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

import torch
import transformers
from mergekit.common import ModelReference
from torch import nn
from transformers.pytorch_utils import Conv1D

_NOT_LINEAR = re.compile(r"embed(?!_out)|(?:^|\.)(?:wte|wpe|shared)\.|norm")


@lru_cache(maxsize=8)
def input_axes(model: ModelReference, trust_remote_code: bool = False) -> Mapping[str, int | None]:
    """Return the axis of the input features of each of a model's weights.

    Args:
        model: A model, of which only the configuration is read.
        trust_remote_code: Whether the model's own code may run.

    Returns:
        Parameter name -> −1 for the weight [out, in] of a linear layer, −2 for the [in, out] of
        GPT-2's kind, the same for [experts, out, in] and [experts, in, out], None for any other
        parameter. Nothing, if transformers does not know the architecture.
    """
    try:
        config = model.config(trust_remote_code=trust_remote_code)
        kind = getattr(transformers, (config.architectures or [""])[0])
        with torch.device("meta"):
            built = kind(config)
    except Exception:  # transformers and models' own code raise many kinds
        return {}
    axes: dict[str, int | None] = dict.fromkeys(dict(built.named_parameters()))
    for name, module in built.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            axes[f"{name}.weight"] = -1 if isinstance(module, nn.Linear) else -2
        # transformers' mark of the modules that hold all experts of a mixture.
        transposed = getattr(module, "is_transposed", None)
        for own, parameter in module.named_parameters(recurse=False):
            if transposed is not None and parameter.ndim == 3:
                axes[f"{name}.{own}"] = -2 if transposed else -1
    return axes


def input_axis_of(name: str, axes: Mapping[str, int | None]) -> int | None:
    """Return the axis of the input features of a weight, by a checkpoint's name for it.

    Args:
        name: The name, which may lack what a head's model puts before its body's, or have it in
            excess.
        axes: What :func:`input_axes` gives.

    Returns:
        −1, −2 or None, as there. 0 for a weight that is not there, as the single experts of a
        mixture that transformers fuses, and that by its name may be a linear layer's: it is, if it
        has two axes, and then lies as [out, in].
    """
    for known, axis in axes.items():
        if known == name or known.endswith(f".{name}") or name.endswith(f".{known}"):
            return axis
    return None if _NOT_LINEAR.search(name) else 0
