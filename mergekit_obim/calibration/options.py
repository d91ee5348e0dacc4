"""Where and how the pre-pass runs, as against what it measures, which the recipe says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RunOptions:
    """The pre-pass's options, none of which changes what is measured, but for rounding.

    Attributes:
        device: Where the whole model goes, as torch names devices.
        device_map: accelerate's placement instead (``auto``, …).
        max_memory: With ``device_map``, how much of each device to use.
        dense: Write δ²·h per weight instead of h.
        merge_dtype: The recipe's dtype, to which the merge rounds every weight: δ is that of
            the rounded weights.
        overwrite: Replace a file that was made from something else.
        trust_remote_code: Run code that comes with a model or tokenizer.
        transformers_cache: Where downloaded models are kept.
        lora_merge_cache: Where models with adapters merged into them are kept.
        quiet: Show no progress.
    """

    device: str = "cpu"
    device_map: str | None = None
    max_memory: Mapping[int | str, int | str] = field(default_factory=dict)
    dense: bool = False
    merge_dtype: str | None = None
    overwrite: bool = False
    trust_remote_code: bool = False
    transformers_cache: str | None = None
    lora_merge_cache: str | None = None
    quiet: bool = False
