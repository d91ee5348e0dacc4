"""Where and how the pre-pass runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RunOptions:
    """Where and how to run; nothing here changes what is measured, but for rounding.

    Attributes:
        device: Where the whole model goes.
        device_map: accelerate's placement instead (``auto``, …), with ``max_memory``.
        dense: Write δ²·h per weight instead of h.
        merge_dtype: The recipe's dtype, to which the merge rounds every weight: δ is that of
            the rounded weights.
        overwrite: Replace a file that was made from something else.
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
