"""Finding an expert's saliency file, and making sure it can be trusted, once per process."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch

from mergekit_obim.errors import SaliencyFileError, SaliencyNotFoundError, quoted
from mergekit_obim.saliency.file import PUBLISHED_NAME, SaliencyFile, saliency_file_name
from mergekit_obim.saliency.fingerprint import matches

_HUB = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[^@]+))?")
_LOCK = threading.Lock()


def locate(setting: str | None, model: str, *, cache_dir: str | None = None) -> Path:
    """Find the saliency file of one expert.

    Args:
        setting: The recipe's ``saliency``: a file, a folder of files,
            ``org/repo[/file][@revision]`` on the Hub, or None for the model's own file.
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
    local = Path(setting)
    if not local.exists():
        local = Path(setting.split("@")[0])  # a local model's path, with a revision
    if local.is_file() and local.suffix == ".safetensors" and names[0] != PUBLISHED_NAME:
        return local
    if local.is_file():
        local = local.parent  # mergekit-pytorch's models are files
    if local.is_dir():
        for name in names:
            if (local / name).is_file():
                return local / name
        where += f" ({wanted} in {local})"
    elif hub := _HUB.fullmatch(setting):
        names = [hub["file"]] if hub["file"] else names[::-1]
        found, unknown = _download(hub["repo"], names, hub["revision"], cache_dir)
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


def _download(
    repo: str, names: list[str], revision: str | None, cache_dir: str | None
) -> tuple[Path | None, str | None]:
    """The first of these files that a repository on the Hub has.

    Returns:
        Where it is now; and if it is nowhere, why it may be on the Hub all the same, with what to
        do about that. None of both if the repository is known not to have it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    unknown = None
    for name in names:
        try:
            found = hf_hub_download(
                repo,
                name,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=unknown is not None,  # it waits half a minute for an answer
            )
            return Path(found), None
        except LocalEntryNotFoundError as error:  # the Hub did not answer, but may have before
            if not _known_to_lack(repo, name, revision, cache_dir):
                unknown = unknown or _why(error.__cause__ or error, repo, revision)
        except (EntryNotFoundError, HFValidationError):
            continue
        except Exception as error:  # the Hub's many kinds, and those of the network and the disk
            return None, _why(error, repo, revision)
    return None, unknown


def _known_to_lack(repo: str, name: str, revision: str | None, cache_dir: str | None) -> bool:
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=revision)
    return cached is _CACHED_NO_EXIST


def _why(error: BaseException, repo: str, revision: str | None) -> str:
    """Why the Hub gave no file, and what to do about it."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo} on the Hub is gated, and you have no access: ask for it at "
            f"{constants.ENDPOINT}/{repo}, then log in by `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the Hub has no {repo}, or it is private: mend the name, or log in by `hf auth login` "
            "as someone who may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} on the Hub has no revision {revision}: mend what stands after the @"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo} on the Hub was not asked, as HF_HUB_OFFLINE is set, and no copy is cached"
    if status in (401, 403):
        return (
            f"the Hub refuses to give {repo} ({quoted(error)}): log in by `hf auth login` as "
            "someone who may read it"
        )
    if status is not None:
        return f"the Hub failed with status {status} when asked for {repo}: try again later"
    return (
        f"{repo} cannot be had from the Hub at {constants.ENDPOINT} ({quoted(error)}): try again "
        "when that is mended"
    )


def open_saliency(path: Path) -> SaliencyFile:
    """Open a file whose every value was read and found finite and non-negative; cached.

    Raises:
        SaliencyNotFoundError: There is no such file.
        SaliencyFileError: Its header or its values are not what format 1 asks for.
    """
    # mergekit calls merge methods from several threads; one of them reads the values.
    with _LOCK:
        stat = path.stat() if path.is_file() else None
        return _open_checked(path, stat and (stat.st_mtime_ns, stat.st_size, stat.st_ino))


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
