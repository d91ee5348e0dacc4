"""Publishing saliency files on the Hub, where a recipe that names the model finds them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, constants, errors

from mergekit_obim import __version__
from mergekit_obim.errors import PublishError, quoted
from mergekit_obim.saliency.file import SaliencyFile
from mergekit_obim.saliency.hub import download

TAGS = ("mergekit", "mergekit-obim", "saliency")
_CARD = "README.md"


def check_login(repo: str) -> None:
    """Ask the Hub who is logged in, before the work whose result is to be published.

    Args:
        repo: Where it is to be published, for the message.

    Raises:
        PublishError: Nobody is, or the Hub cannot be asked.
    """
    try:
        HfApi().whoami()
    except Exception as error:  # the Hub's many kinds, and those of the network
        raise PublishError(f"--push {repo}: {_why(error, repo)}") from error


def publish(
    files: Mapping[str, Path], repo: str, *, create_pr: bool = False, private: bool | None = None
) -> str:
    """Commit saliency files to a repository of models, with a card that says what they are.

    A card that is there keeps its text and its metadata; tags and data sets are added to it.

    Args:
        files: The saliency files by their names in the repository.
        repo: ``org/name``. It is made if it is not there, unless `create_pr` is set.
        create_pr: Propose the commit to the owners, as a pull request.
        private: Whether a repository that has to be made is private; None is the owner's default.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        SaliencyFileError: One of the files cannot be read.
        PublishError: The Hub did not take them.
    """
    opened = {name: SaliencyFile(path) for name, path in files.items()}
    models = [file.metadata.model for file in opened.values()]
    api = HfApi()
    try:
        if not create_pr:
            api.create_repo(repo, private=private, exist_ok=True)
        found, unknown = download(repo, [_CARD])
        if unknown:
            raise PublishError(f"--push {repo}: its card cannot be read: {unknown}")
        card = _card(found, repo, list(opened.values()))
        commit = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, path) for name, path in files.items()),
                CommitOperationAdd(_CARD, str(card).encode()),
            ],
            commit_message=f"Saliency of {', '.join(models)}, by mergekit-obim {__version__}",
            create_pr=create_pr,
        )
    except PublishError:
        raise
    except Exception as error:  # the Hub's many kinds, and those of the network
        kept = ", ".join(str(path) for path in files.values())
        raise PublishError(
            f"--push {repo}: {_why(error, repo)}; nothing is lost: {kept} would be kept if you ran "
            "the command again"
        ) from error
    return str(commit.pr_url or commit.commit_url)


def added(there: str | list[str] | None, names: Iterable[str]) -> str | list[str] | None:
    """Return what a metadata field of a card holds, with the names added that it lacks."""
    found = [there] if isinstance(there, str) else there or []
    new = [name for name in dict.fromkeys(names) if name not in found]
    return [*found, *new] if new else there


def hub_data_sets(calibration: Mapping[str, object]) -> list[str]:
    """Return the names of the data sets on the Hub that a saliency file was measured on.

    Args:
        calibration: What the file says of its calibration.
    """
    sources = calibration.get("sources")
    return [
        source["data"]
        for source in (sources if isinstance(sources, list) else [])
        # Data that is read from a file has no split.
        if source.get("split") and _hub_name(source["data"])
    ]


def _hub_name(name: str) -> str:
    """Return a name without its revision if it can be one on the Hub; empty if it is a path."""
    plain = name.split("@")[0]
    is_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", plain) is not None
    return plain if is_name and not Path(plain).exists() else ""


def _card(there: Path | None, repo: str, files: Iterable[SaliencyFile]) -> ModelCard:
    """Return the repository's card, with what the files add to its metadata."""
    if there:
        card = ModelCard(there.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    else:
        card = ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n\n{_text(repo, list(files))}")
    data: Any = card.data  # of another class for each kind of card
    data.tags = added(data.tags, TAGS)
    for file in files:
        data.datasets = added(data.datasets, hub_data_sets(file.metadata.calibration))
        # With an adapter, the statistics are of the adapter's model.
        model = _hub_name(file.metadata.model.split("+")[-1])
        if "/" in model and model != repo:
            data.base_model = added(data.base_model, [model])
    return card


def _text(repo: str, files: list[SaliencyFile]) -> str:
    """Return the text of a new card."""
    lines = [
        "# Saliency for merging",
        "",
        f"Statistics of model weights, measured by mergekit-obim {__version__}: the mean square of "
        "every input of every layer, on calibration data of the model's own task. With them, "
        "mergekit merges the models without that data.",
        "",
    ]
    for file in files:
        calibration = file.metadata.calibration
        sources = ", ".join(str(s.get("data")) for s in calibration.get("sources", []))
        lines.append(
            f"- `{file.metadata.model}`: {len(file.shapes)} tensors"
            + (f", on {calibration['tokens']:,} tokens" if "tokens" in calibration else "")
            + (f" of {sources}" if sources else "")
        )
    lines += ["", "```yaml", "merge_method: obim", f"parameters: {{saliency: {repo}}}", "```", ""]
    return "\n".join(lines)


def _why(error: BaseException, repo: str) -> str:
    """Return in words why the Hub did not take something, and what to do about it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "log in by `hf auth login` with a token that may write"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"you are not logged in to the Hub: {login}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hub was not asked, as HF_HUB_OFFLINE is set: unset it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the Hub has no {repo}, or you may not see it: mend the name, {login}, or leave "
            "--create-pr out to make it"
        )
    if status == 401:
        return f"the Hub does not accept your token ({quoted(error)}): {login}"
    if status == 403:
        return (
            f"you may not write to {repo} ({quoted(error)}): give --create-pr to propose it to its "
            f"owners, or {login}"
        )
    if status is not None and status < 500:
        return f"the Hub refused it with status {status} ({quoted(error)})"
    if status is not None:
        return f"the Hub failed with status {status}: try again later"
    return f"the Hub at {constants.ENDPOINT} did not take it ({quoted(error)}): try again later"
