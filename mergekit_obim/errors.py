"""The one error family of mergekit-obim.

Every error a user can cause is a :class:`click.ClickException`, so that any click
command, mergekit's own ones included, ends with a single ``Error: …`` line and exit
code 1, and is also the matching built-in, so that Python callers can catch it by
kind. A message names the model and the tensor, says what was found, and what to do.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

LOG = logging.getLogger("mergekit_obim")


class ObimError(click.ClickException):
    """Base class of all errors; commands end with exit code 1, with ``-v`` after the traceback."""

    def show(self, file: IO[Any] | None = None) -> None:
        if LOG.isEnabledFor(logging.INFO):
            LOG.info("".join(traceback.format_exception(self)).rstrip())
        super().show(file)


class RecipeError(ObimError, ValueError):
    """A recipe asks for something impossible, such as an unknown parameter or a density over 1."""


class GenomeError(ObimError, RuntimeError):
    """A genome of mergekit-evolve makes no recipe; not a ValueError, which pydantic would wrap."""


class SaliencyFileError(ObimError, ValueError):
    """A saliency file cannot be used: truncated, of another version, of other weights, …"""


class SaliencyNotFoundError(ObimError, FileNotFoundError):
    """There is no saliency file where the recipe says, or in the model's own folder."""

    # OSError prints its errno and file name unless told otherwise.
    def __str__(self) -> str:
        return self.message


class PublishError(ObimError, RuntimeError):
    """The Hub did not take a saliency file."""


class CheckpointError(ObimError, ValueError):
    """A model cannot be read, or its tensors are not what its configuration says."""


class AdapterError(ObimError, ValueError):
    """An adapter cannot be merged into the model that the recipe names for it."""


class CalibrationError(ObimError, ValueError):
    """The calibration data, or a calibration run, cannot produce a saliency."""


class DeviceMemoryError(ObimError, MemoryError):
    """A model or its activations do not fit into the device's memory."""


class OtherProcessError(ObimError, RuntimeError):
    """Another of the processes that share the work has failed, with the message given here."""


class UnscorableError(ObimError, ArithmeticError):
    """Weights or activations are not finite numbers."""

    def of(self, tensor: object, models: Iterable[object]) -> UnscorableError:
        """Return the same error with what a kernel does not know: the tensor, and the models."""
        one_of = ", ".join(map(str, models))
        return UnscorableError(
            f"tensor {tensor}: {self.message} in one of {one_of}; a checkpoint with NaN or "
            "infinite weights cannot be merged"
        )


def one_line(error: BaseException) -> str:
    """Return another library's message as one line, or the error's type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def quoted(error: BaseException) -> str:
    """Return another library's message as one line of at most 300 characters."""
    text = one_line(error)
    return text if len(text) <= 300 else text[:297] + "…"


@contextmanager
def told_as(
    kind: type[ObimError],
    what: str,
    raised: type[Exception] | tuple[type[Exception], ...] = Exception,
) -> Iterator[None]:
    """Raise what another library raises as an error of ours, in one line.

    Args:
        kind: The error to raise instead.
        what: The beginning of its message; the library's own follows.
        raised: What the library may raise. Errors of ours stay as they are.
    """
    try:
        yield
    except ObimError:
        raise
    except raised as error:
        raise kind(f"{what}: {quoted(error)}") from error
