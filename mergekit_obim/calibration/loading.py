"""Loading a model to run it, whole on one device or spread over devices, CPU and disk."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from mergekit.common import get_auto_cls

from mergekit_obim.calibration.memory import out_of_memory
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.errors import CalibrationError, DeviceMemoryError, quoted
from mergekit_obim.models.opened import OpenModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def loaded(
    label: str,
    opened: OpenModel,
    dtype: str | None,
    options: RunOptions,
    offload_folder: Path,
) -> Iterator[PreTrainedModel]:
    """Load a model for the time of the context.

    Args:
        label: What to call the model in errors.
        opened: The model's checkpoint. Of its folder, only the files that mergekit reads are
            loaded: transformers would apply others too.
        dtype: The dtype of the weights, as torch names it; None is the checkpoint's.
        options: The device, or how the model is spread over several.
        offload_folder: A folder for offloaded weights that cannot be read from the checkpoint as
            they are (fused experts, ``.bin`` files). It is removed at the end.

    Yields:
        The model, in eval mode.

    Raises:
        CalibrationError: The model cannot be loaded.
        DeviceMemoryError: The model does not fit.
    """
    placement: dict[str, Any] = {}
    if options.device_map:
        placement = {
            "device_map": options.device_map,
            "max_memory": dict(options.max_memory) or None,
            "offload_folder": str(offload_folder),
        }
    kind = get_auto_cls((opened.config.architectures or [""])[0])
    try:
        with opened.files_to_load() as files:  # offloaded weights are read there all along
            try:
                model = kind.from_pretrained(
                    files.path,
                    revision=files.revision,
                    dtype=dtype or "auto",
                    trust_remote_code=options.trust_remote_code,
                    cache_dir=options.transformers_cache,
                    **placement,
                )
                if not options.device_map:
                    cast("torch.nn.Module", model).to(options.device)
            except Exception as error:
                if out_of_memory(error):
                    raise does_not_fit(label, options, "it does") from error
                how = f" with --device-map {options.device_map}" if options.device_map else ""
                raise CalibrationError(
                    f"model {label}: cannot be loaded{how}: {quoted(error)}"
                ) from error
            if any(parameter.is_meta for parameter in model.parameters()):
                _give_freed_memory_back()
            if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
                _without_grouped_mm(model)
            yield cast("PreTrainedModel", model.eval())
    finally:
        shutil.rmtree(offload_folder, ignore_errors=True)


def _give_freed_memory_back() -> None:
    """Keep glibc from holding on to what weights that come and go have taken.

    After large blocks have been freed, glibc takes blocks of their size from its heap, whose freed
    parts it cannot give back: a tenth of the model, in the end. A fixed threshold stops that.
    """
    mmap_threshold, default = -3, 128 * 1024
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(mmap_threshold, default)


def _without_grouped_mm(model: PreTrainedModel) -> None:
    """Run a mixture's experts one by one: torch has no grouped product in float64."""
    if getattr(model.config, "_experts_implementation", None) == "grouped_mm":
        model.set_experts_implementation("eager")


def does_not_fit(label: str, options: RunOptions, what: str) -> DeviceMemoryError:
    """Return the error to raise where memory ran out.

    Args:
        label: What to call the model.
        options: Where it was to run.
        what: What does not fit, with its verb: "it does", "its activations do".
    """
    place = options.device_map or options.device
    ways = "--batch-size 1, a smaller --max-length, --dtype bfloat16"
    ways += ", --device-map auto with --max-memory"
    ways += "" if place == "cpu" else ", --device cpu"
    return DeviceMemoryError(f"model {label}: {what} not fit {place}; try {ways}")
