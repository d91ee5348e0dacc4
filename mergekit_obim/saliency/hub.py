"""Getting files from the Hub, where one that is not there is told from one that is not given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import (
    _CACHED_NO_EXIST,
    constants,
    errors,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from mergekit_obim.errors import quoted


def download(
    repo: str, names: Sequence[str], revision: str | None = None, cache_dir: str | None = None
) -> tuple[Path | None, str | None]:
    """Get the first of some files that a repository has.

    Args:
        repo: ``org/name``.
        names: The files' paths in it.
        revision: A branch, tag or commit; None is the main branch.
        cache_dir: The Hub cache to use; None is the default one.

    Returns:
        Where the file is on this machine, or None. And if one of them may be on the Hub all the
        same, why it is not here and what to do about that; None if the repository lacks them all.
    """
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
    """Return whether the Hub said before that it has no such file."""
    cached = try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=revision)
    return cached is _CACHED_NO_EXIST


def _why(error: BaseException, repo: str, revision: str | None) -> str:
    """Return in words why the Hub gave no file, and what to do about it."""
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
