"""The one error family of mergekit-obim.

Every error a user can cause is a :class:`click.ClickException`, so that any click
command, mergekit's own ones included, ends with a single ``Error: …`` line and exit
code 1, and is also the matching built-in, so that Python callers can catch it by
kind. A message names the model and the tensor, says what was found, and what to do.
"""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass
from typing import IO, Any, Literal

import click

LOG = logging.getLogger("mergekit_obim")


class ObimError(click.ClickException):
    """Base class; exit code 1. With ``-v`` the traceback is logged before the line."""

    def show(self, file: IO[Any] | None = None) -> None:
        if LOG.isEnabledFor(logging.INFO):
            LOG.info("".join(traceback.format_exception(self)).rstrip())
        super().show(file)


class RecipeError(ObimError, ValueError):
    """The recipe asks for something that cannot be: an unknown parameter, a density over 1, …"""


class SaliencyFileError(ObimError, ValueError):
    """A saliency file that cannot be used: truncated, of another version, of other weights, …"""


class SaliencyNotFoundError(ObimError, FileNotFoundError):
    """No saliency file where the recipe, or the model's own folder, should have one."""

    # OSError prints its errno and file name unless told otherwise.
    def __str__(self) -> str:
        return self.message


class CalibrationError(ObimError, ValueError):
    """Calibration data or a calibration run that cannot give a saliency."""


class DeviceMemoryError(ObimError, MemoryError):
    """A model or its activations do not fit the device."""


class OtherProcessError(ObimError, RuntimeError):
    """Another of the processes that share the work has failed; the message is its own."""


class UnscorableError(ObimError, ArithmeticError):
    """Weights or activations that are not finite numbers."""


class QuantisedModelError(ObimError, ValueError):
    """A model whose stored numbers are not its weights."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or unusual about a recipe's models, found before any work begins.

    Attributes:
        severity: An ``"error"`` ends every command. A ``"fault"`` is one of ``--check``: merging
            these models would go against its purpose. A ``"warning"`` is what is unusual. The
            pre-pass and the merge warn of both and go on: the user may know better.
        message: One line that names the model, says what was found, and what to do.
    """

    severity: Literal["error", "fault", "warning"]
    message: str


def refuse_quantised(model: str, config: Any) -> None:
    """Raise if a model's configuration, or that of its text part, says that it is quantised."""
    parts = (config, config.get_text_config())
    if any(getattr(part, "quantization_config", None) for part in parts):
        raise QuantisedModelError(
            f"model {model}: is quantised, which mergekit cannot merge: use the full-precision "
            "checkpoint that it was made from"
        )


def one_line(error: BaseException) -> str:
    """Another library's message on one line, for ours to quote; its kind if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def quoted(error: BaseException) -> str:
    """The same, cut where it is long."""
    text = one_line(error)
    return text if len(text) <= 300 else text[:297] + "…"
