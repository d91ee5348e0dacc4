"""A section on the merge in the merged model's card, README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit.card import generate_card, maybe_link_hf, method_md
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_obim import __version__
from mergekit_obim.errors import RecipeError, one_line
from mergekit_obim.methods.planning import PlannedMethod
from mergekit_obim.planned import plan
from mergekit_obim.report.gather import Account, calibration_of, experts_of, gather
from mergekit_obim.saliency.file import atomic_write

BEGIN, END = "<!-- mergekit-obim: begin -->", "<!-- mergekit-obim: end -->"


def write_section(
    folder: Path, config: MergeConfiguration, source: str, options: MergeOptions, *, shares: bool
) -> Path:
    """Put the section into the card, in place of the one that is there; all else stays.

    Args:
        folder: The merged model's.
        config: The recipe that it was made from.
        source: The recipe's text, for a card that has to be made.
        options: mergekit's.
        shares: Whether to count each expert's weights, which takes about as long as the merge.

    Returns:
        The card.

    Raises:
        ObimError: The recipe cannot be read any more, or the model is not what it makes.
    """
    section = f"{BEGIN}\n{_section(folder, config, options, shares)}\n{END}\n"
    path = folder / "README.md"
    try:
        card = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {one_line(error)}") from error
    if not card:
        card = generate_card(config, source.rstrip(), name=folder.resolve().name)
    before, begin, rest = card.partition(BEGIN)
    if begin and END not in rest:
        raise RecipeError(f"{path}: has {BEGIN} without {END}; remove that section by hand")
    after = rest.partition(END)[2].lstrip("\n") if begin else ""
    text = before.rstrip("\n") + "\n\n" + section + (f"\n{after}" if after else "")
    try:
        with atomic_write(path) as file:
            file.write(text.encode("utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written: {one_line(error)}") from error
    return path


def _section(folder: Path, config: MergeConfiguration, options: MergeOptions, shares: bool) -> str:
    from mergekit import merge_methods

    method = merge_methods.get(config.merge_method)
    if not isinstance(method, PlannedMethod):
        raise RecipeError(
            f"merge_method: {config.merge_method} is not one of mergekit-obim's: there is nothing "
            "to add to the card"
        )
    account = None
    if shares and config.merge_method == "obim":
        account = gather(config, options, merged=folder, curve=False)
        if account.differing:
            first, more = account.differing[0], len(account.differing) - 1
            raise RecipeError(
                f"{folder}: tensor {first}, and {more} more, are not what this recipe makes now: a "
                "model, a saliency file or the recipe has changed; merge again, or write the card "
                "with --no-shares"
            )
        experts, calibration = account.experts, account.calibration
    else:
        planned = plan(config, options)
        experts = [str(expert) for expert in experts_of(planned)]
        calibration = calibration_of(planned)
    lines = [
        "## How the experts were merged",
        "",
        f"By {method_md(config.merge_method)}, with mergekit-obim {__version__}"
        + _settings(config.parameters or {}),
        "",
    ]
    return "\n".join([*lines, *_table(experts, calibration, account), *_notes(account)])


def _settings(parameters: Mapping[str, Any]) -> str:
    told = [f"`{name}: {value}`" for name, value in parameters.items() if name != "saliency"]
    return (": " + ", ".join(told) if told else "") + "."


def _table(
    experts: Sequence[str], calibration: Mapping[str, Mapping[str, Any]], account: Account | None
) -> list[str]:
    head = ["expert", "weights that are its", "measured on", "saliency file"]
    rows = []
    owned = account.total().owned if account else None
    for k, expert in enumerate(experts):
        file = calibration.get(expert)
        share = f"{owned[k] / owned.sum():.2%}" if owned is not None else ""
        name = Path(file["file"]).name if file else "none"
        rows.append([maybe_link(expert), share, measured_on(file), f"`{name}`"])
    if owned is not None:
        rows.append(["the base", f"{owned[-1] / owned.sum():.2%}", "", ""])
    if owned is None:
        head, rows = [head[0], *head[2:]], [[row[0], *row[2:]] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]


def maybe_link(reference: str) -> str:
    """A model on the Hub as a link, as mergekit's own card has it."""
    # mergekit asks the Hub about local folders too.
    return reference if Path(reference).exists() else maybe_link_hf(reference)


def measured_on(file: Mapping[str, Any] | None) -> str:
    """What a saliency file says of its calibration, in a few words."""
    if file is None:
        return "nothing: ranked without saliency"
    record = file["calibration"]
    if not record.get("sources"):
        return "not said by the file"
    sources = ", ".join(f"`{source.get('data', '?')}`" for source in record["sources"])
    return f"{sources}: {record.get('samples', 0):,} rows, {record.get('tokens', 0):,} tokens"


def _notes(account: Account | None) -> list[str]:
    if account is None:
        return []
    lines = []
    unmeasured: dict[str, int] = {}
    for tensor in account.tensors:
        for kind in {kind for kind in tensor.ranked if kind != "saliency"}:
            unmeasured[str(kind or "nothing")] = unmeasured.get(str(kind or "nothing"), 0) + 1
    for kind, count in unmeasured.items():
        lines += ["", f"{count} tensors were ranked by {kind}, not by saliency."]
    return lines
