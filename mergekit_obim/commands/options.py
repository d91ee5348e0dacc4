"""What the commands have in common: options, their groups in the help, and logging."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mergekit_obim import __version__
from mergekit_obim.errors import RecipeError, one_line

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_obim.calibration.options import RunOptions

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)
NEW_FOLDER = click.Path(file_okay=False, path_type=Path)
DTYPES = ("float32", "bfloat16", "float16", "float64")


def batch_size(value: str) -> int | str:
    """Read a positive number, or ``auto``."""
    if value == "auto":
        return value
    if value.isdecimal() and int(value) > 0:
        return int(value)
    raise click.BadParameter(f"{value!r} is neither a positive number nor 'auto'")


def device_memory(value: str) -> tuple[int | str, int | str]:
    """Read ``DEVICE=SIZE`` for accelerate: ``0=20GiB``, ``cpu=64GiB``; without a unit, bytes."""
    found = re.fullmatch(r"([^=]+)=(\d+(?:\.\d+)?[KMG]i?B|\d+)", value, re.IGNORECASE)
    if found is None:
        raise click.BadParameter(
            f"{value!r} is not of the form DEVICE=SIZE, as 0=20GiB or cpu=64GiB"
        )
    device, size = (int(part) if part.isdecimal() else part for part in found.groups())
    return device, size


_SHARED = (
    click.option("--quiet", is_flag=True, help="Print nothing but warnings and errors"),
    click.option(
        "-v", "verbosity", count=True, help="Verbose logging, tracebacks (repeat for more)"
    ),
    click.option("--transformers-cache", help="Override storage path for downloaded models"),
    click.option("--lora-merge-cache", help="Path to store merged LORA models"),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Trust remote code from huggingface repos (danger)",
    ),
    click.version_option(__version__),
)
_HARDWARE = (
    click.option(
        "--device", help="Device to run on  [default: an accelerator if there is one, else cpu]"
    ),
    click.option(
        "--device-map", help="Spread the model over devices, CPU and disk: accelerate's, as auto"
    ),
    click.option(
        "--max-memory",
        type=device_memory,
        metavar="DEVICE=SIZE",
        multiple=True,
        help="With --device-map; repeatable",
    ),
)
# Titles in the help. A command's own groups come first, and share a title where it is the same.
_GROUPS: dict[str, tuple[str, ...]] = {
    "Output": ("quiet", "verbosity"),
    "Storage": ("transformers_cache", "lora_merge_cache"),
    "Dangerous Options": ("trust_remote_code",),
}


def shared_options(command: F) -> F:
    """Add the options that every command has: how models are read, and how much is printed."""
    return _with(_SHARED, command)


def hardware_options(command: F) -> F:
    """Add the options of commands that run models: where."""
    return _with(_HARDWARE, command)


def check_hardware(options: Mapping[str, Any]) -> None:
    """Refuse hardware options that do nothing together."""
    if options["max_memory"] and not options["device_map"]:
        raise click.UsageError("--max-memory does nothing without --device-map; add it, as auto")


def _with(options: Sequence[Callable[[F], F]], command: F) -> F:
    for option in reversed(options):  # decorators apply from the last to the first
        command = option(command)
    return command


class GroupedHelp(click.Command):
    """A command whose ``--help`` lists the options in groups, as mergekit-yaml's does.

    Args:
        groups: Titles of the command's own groups, and the names of the parameters in each.
        arguments: See :class:`click.Command`.
    """

    def __init__(
        self, *, groups: Mapping[str, Sequence[str]] | None = None, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        own = groups or {}
        self.groups = {
            title: (*own.get(title, ()), *_GROUPS.get(title, ())) for title in {**own, **_GROUPS}
        }

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each group; options in no group come last, as ``Other``."""
        params = {p.name: p for p in self.get_params(ctx) if isinstance(p, click.Option)}
        grouped = {name for names in self.groups.values() for name in names}
        groups = {**self.groups, "Other": [name for name in params if name not in grouped]}
        for title, names in groups.items():
            records = [params[name].get_help_record(ctx) for name in names]
            if any(records):
                with formatter.section(title):
                    formatter.write_dl([record for record in records if record])


def start_logging(verbosity: int) -> None:
    """Log warnings, with one ``-v`` also what is done, with two everything."""
    levels = (logging.WARNING, logging.INFO, logging.DEBUG)
    logging.basicConfig(level=levels[min(verbosity, 2)])


def merge_options(options: dict[str, Any]) -> MergeOptions:
    """Start logging, and return the shared options' values as mergekit takes them.

    This imports mergekit, which takes seconds: refuse wrong usage before.
    """
    start_logging(options.pop("verbosity"))

    from mergekit.options import MergeOptions

    return MergeOptions(**options)


def run_options(recipe: Mapping[str, Any], options: dict[str, Any], number: int = 0) -> RunOptions:
    """Where and how to run, of the options that are left; ``number`` as in :func:`_device`."""
    from transformers.utils.logging import disable_progress_bar

    from mergekit_obim.calibration.options import RunOptions

    # transformers shows a bar of its own for every model it loads; accelerate warns that
    # offloaded weights are offloaded.
    disable_progress_bar()
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    options["device"] = _device(options["device"], number)
    options["max_memory"] = dict(options["max_memory"])
    return RunOptions(merge_dtype=recipe.get("dtype"), **options)


def _device(asked: str | None, number: int) -> str:
    """The device to run on; without an index, the one with this process's number on its machine."""
    import torch

    device = asked
    if device is None:
        found = torch.accelerator.current_accelerator()
        device = str(found) if found else "cpu"
    if number and ":" not in device and device != "cpu":
        device = f"{device}:{number % max(1, torch.accelerator.device_count())}"
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises several kinds
        raise RecipeError(
            f"--device {device}: torch cannot use it here ({one_line(error)}); leave "
            "--device out to take what there is"
        ) from error
    return device
