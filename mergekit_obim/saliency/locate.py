"""Finding an expert's saliency file, and making sure that it can be trusted."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch

from mergekit_obim.errors import SaliencyFileError, SaliencyNotFoundError
from mergekit_obim.saliency.file import PUBLISHED_NAME, SaliencyFile, saliency_file_name
from mergekit_obim.saliency.fingerprint import matches
from mergekit_obim.saliency.hub import download
from mergekit_obim.saliency.imatrix import SUFFIXES as IMATRIX_SUFFIXES

_HUB = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[^@]+))?")
# huggingface_hub's own form, for its file system: the revision stands before the file.
_ADDRESS = re.compile(
    r"hf://(?:models/)?(?!datasets/|spaces/|buckets/)(?P<repo>[\w-][\w.-]*/[\w.-]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/@]+))?(?:/(?P<file>[^@]*[^@/]))?/?"
)
_LOCK = threading.Lock()


def locate(setting: str | None, model: str, *, cache_dir: str | None = None) -> Path:
    """Find the saliency file of one expert.

    Args:
        setting: The recipe's ``saliency``: a file, an imatrix, a folder of files,
            ``org/repo[/file][@revision]`` or ``hf://org/repo[@revision][/file]`` on the Hub, or
            None for the model's own file.
        model: The expert's reference, ``model[@revision][+lora[@revision]]``.
        cache_dir: The Hub cache to use, None for the default one.

    Raises:
        SaliencyNotFoundError: There is none; the message says how to make one.
    """
    if setting is None:
        # With an adapter, the statistics belong to the adapter's folder, not to its base's.
        setting, names = model.split("+")[-1], [PUBLISHED_NAME]
        place = "the recipe sets no `saliency`, and "
        where = f"{place}{setting} carries no {PUBLISHED_NAME}"
    else:
        names = [saliency_file_name(model), PUBLISHED_NAME]
        place = f"`saliency: {setting}`: "
        where = f"`saliency: {setting}` has no file for it"
    wanted = " or ".join(names)
    hub = _ADDRESS.fullmatch(setting)
    if setting.startswith("hf://") and not hub:
        raise SaliencyNotFoundError(
            f"no saliency for model {model}: {place}is no address of a repository of models: write "
            "hf://org/repo[@revision][/file], or make a file with `obim-saliency RECIPE OUT_DIR`"
        )
    local = Path(setting)
    if not local.exists():
        local = Path(setting.split("@")[0])  # a local model's path, with a revision
    if (
        local.is_file()
        and local.suffix in (".safetensors", *IMATRIX_SUFFIXES)
        and names[0] != PUBLISHED_NAME
    ):
        return local
    if local.is_file():
        local = local.parent  # mergekit-pytorch's models are files
    if local.is_dir() and not hub:
        for name in names:
            if (local / name).is_file():
                return local / name
        where += f" ({wanted} in {local})"
    elif hub := hub or _HUB.fullmatch(setting):
        names = [hub["file"]] if hub["file"] else names[::-1]
        found, unknown = download(hub["repo"], names, hub["revision"], cache_dir)
        if found:
            return found
        if unknown:
            raise SaliencyNotFoundError(
                f"no saliency for model {model}: {place}{unknown}; or make one with "
                "`obim-saliency RECIPE OUT_DIR` and set `saliency: OUT_DIR`"
            )
        where += f" (nor does the Hub: {hub['repo']} has no {' or '.join(names)})"
    raise SaliencyNotFoundError(
        f"no saliency for model {model}: {where}; make one with `obim-saliency RECIPE OUT_DIR` and "
        "set `saliency: OUT_DIR`, or use `criterion: magnitude`"
    )


def open_saliency(path: Path) -> SaliencyFile:
    """Open a saliency file and check its every value, once for as long as the file stays the same.

    Args:
        path: The file.

    Raises:
        SaliencyNotFoundError: There is no such file.
        SaliencyFileError: Its header or its values are not what format 1 asks for.
    """
    # mergekit calls merge methods from several threads; one of them reads the values.
    with _LOCK:
        return _open_checked(path, state_of(path))


def state_of(path: Path) -> tuple[int, ...] | None:
    """Return what is another as soon as a file has been replaced; None if there is no file."""
    stat = path.stat() if path.is_file() else None
    return stat and (stat.st_mtime_ns, stat.st_size, stat.st_ino)


@lru_cache(maxsize=64)
def _open_checked(path: Path, version: tuple[int, ...] | None) -> SaliencyFile:
    file = SaliencyFile(path)
    file.check_values()
    return file


def check_measured_on(
    file: SaliencyFile,
    model: str,
    stored: Mapping[str, object],
    load: Callable[[str], torch.Tensor],
) -> None:
    """Refuse a file that was measured on other weights than these.

    Args:
        file: The expert's saliency file. One without fingerprints passes.
        model: The expert's reference, for the message.
        stored: Names of the tensors in the expert's checkpoint.
        load: Gives one of them; only a few of its values are read.

    Raises:
        SaliencyFileError: A weight differs from the one that was measured.
    """
    recorded = file.metadata.fingerprint
    differing = (
        name
        for name, print_ in recorded.items()
        if name in stored and not matches(print_, load(name))
    )
    culprit = next(differing, None)
    if culprit is None and recorded and not any(name in stored for name in recorded):
        culprit = f"{next(iter(recorded))} (which the model does not even have)"
    if culprit is not None:
        raise SaliencyFileError(
            f"{file.path} was measured on other weights than model {model} has: {culprit} differs; "
            "measure this model with `obim-saliency RECIPE OUT_DIR --overwrite`"
        )
