"""A merged model's card, README.md: a section on the merge, and the metadata at its head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from mergekit import merge_methods
from mergekit.card import generate_card, is_hf, maybe_link_hf, method_md
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_obim import __version__
from mergekit_obim.dry_run import plan
from mergekit_obim.errors import RecipeError, told_as
from mergekit_obim.methods.planning import PlannedMethod
from mergekit_obim.methods.regmean import SHRINK
from mergekit_obim.report.gather import (
    Account,
    calibration_of,
    gather,
    planned_experts,
    reported,
    stretches_of,
)
from mergekit_obim.report.summary import summarize
from mergekit_obim.saliency.file import write_text
from mergekit_obim.saliency.publish import added
from mergekit_obim.saliency.publish import hub_data_sets as measured_data

BEGIN, END = "<!-- mergekit-obim: begin -->", "<!-- mergekit-obim: end -->"


def write_section(
    folder: Path, config: MergeConfiguration, source: str, options: MergeOptions, *, shares: bool
) -> Path:
    """Write the section on the merge into a model's card, and add to the card's metadata.

    A section that is there already is replaced. Nothing else is changed or removed.

    Args:
        folder: The merged model's folder.
        config: The recipe that the model was made from.
        source: The recipe's text, for a card that has to be made first.
        options: mergekit's options, which say how models are read.
        shares: Whether to count each expert's weights, or to predict its error where no weight
            has a single owner; takes about as long as the merge.

    Returns:
        The card's path.

    Raises:
        ObimError: The recipe can no longer be merged, the model is not what the recipe makes, or
            the card cannot be read or written.
    """
    section, calibration = _section(folder, config, options, shares)
    path = folder / "README.md"
    with told_as(RecipeError, f"{path}: cannot be read"):
        if path.exists():
            card = ModelCard.load(path)
        else:
            card = ModelCard(generate_card(config, source.rstrip(), name=folder.resolve().name))
    before, begin, rest = card.text.partition(BEGIN)
    if begin and END not in rest:
        raise RecipeError(f"{path}: has {BEGIN} without {END}; remove that section by hand")
    after = rest.partition(END)[2].lstrip() if begin else ""
    card.text = f"{before.rstrip()}\n\n{BEGIN}\n{section}\n{END}\n" + (after and f"\n{after}")
    data = card.data
    data.tags = added(data.tags, ["mergekit", "merge", config.merge_method])
    data.base_model = added(data.base_model, hub_models(config))
    data.datasets = added(data.datasets, hub_data_sets(calibration))
    write_text(path, str(card))
    return path


def hub_models(config: MergeConfiguration) -> list[str]:
    """Return the names of the models in a recipe that are on the Hugging Face Hub, sorted."""
    # mergekit gives the models in an order that changes from one process to the next.
    parts = [part for model in config.referenced_models() for part in (model.model, model.lora)]
    return sorted({part.path for part in parts if part and _is_hub_name(part.path)})


def hub_data_sets(calibration: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the data sets on the Hub that saliency files were measured on."""
    return [name for file in calibration.values() for name in measured_data(file["calibration"])]


def _is_hub_name(name: str) -> bool:
    """Return whether this is a name on the Hub, as far as can be told without asking the Hub."""
    # mergekit would ask, about paths that exist here.
    return not name.startswith(".") and not Path(name).exists() and is_hf(name)


def _section(
    folder: Path, config: MergeConfiguration, options: MergeOptions, shares: bool
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return the section's text, and by expert what its saliency file says of itself."""
    method = merge_methods.get(config.merge_method)
    if not isinstance(method, PlannedMethod):
        raise RecipeError(
            f"merge_method: {config.merge_method} is not one of mergekit-obim's: there is nothing "
            "to add to the card"
        )
    account = None
    if shares and config.merge_method in reported():
        account = gather(config, options, merged=folder, curve=False)
        if account.differing:
            first, more = account.differing[0], len(account.differing) - 1
            raise RecipeError(
                f"{folder}: tensor {first}, and {more} more, are not what this recipe makes now: a "
                "model, a saliency file or the recipe has changed; merge again, or write the card "
                "with --no-shares"
            )
        experts, calibration, stretch = account.experts, account.calibration, account.stretch
    else:
        planned = plan(config, options)
        experts = [str(expert) for expert in planned_experts(planned)]
        calibration, stretch = calibration_of(planned), stretches_of(planned)
    lines = [
        "## How the experts were merged",
        "",
        f"Merged with {method_md(config.merge_method)}, by mergekit-obim {__version__}"
        + _settings(config),
        *(f"Measured for this merge: {one}." for one in stretch),
        "",
        *_table(experts, calibration, account),
        *(_notes(account) if account else []),
    ]
    return "\n".join(lines), calibration


def _settings(config: MergeConfiguration) -> str:
    parameters = dict(config.parameters or {})
    if config.merge_method == "regmean":
        # What it says of a merge depends on these, so a card has them where a recipe has not.
        parameters = {"statistics": "measured", "stretch": 1.0, **parameters}
        if isinstance(parameters["statistics"], str):  # and not a list of filters
            parameters.setdefault("shrink", SHRINK[parameters["statistics"]])
    told = [f"`{name}: {value}`" for name, value in parameters.items() if name != "saliency"]
    return (", with " + ", ".join(told) if told else "") + "."


def _table(
    experts: Sequence[str], calibration: Mapping[str, Mapping[str, Any]], account: Account | None
) -> list[str]:
    columns: dict[str, list[str]] = {"Model": [_linked(expert) for expert in experts]}
    if account and account.owners:
        owned = account.total().owned
        columns["Model"].append("the base")
        columns["Share of the weights"] = [f"{count / owned.sum():.2%}" for count in owned]
    elif account:
        found = summarize(account)
        columns["Predicted error"] = [
            "" if one["error"] is None else f"{one['error']:.1%} (by {word})"
            for one, word in zip(found["experts_total"], found["error_from"], strict=True)
        ]
    files = [calibration.get(expert) for expert in experts]
    columns["Saliency measured on"] = [measured_on(file, "`") for file in files]
    columns["Saliency file"] = [_file(file) for file in files]
    rows = zip_longest(*columns.values(), fillvalue="")
    return [f"| {' | '.join(row)} |" for row in [[*columns], ["---"] * len(columns), *rows]]


def _linked(expert: str) -> str:
    return str(maybe_link_hf(expert)) if _is_hub_name(expert) else expert


def _file(file: Mapping[str, Any] | None) -> str:
    """Return the name of a saliency file, and what it has beside h."""
    if file is None:
        return "none"
    known = {None: "", "full": ", Gram matrices"}
    more = known.get(file["gram"], f", sketches of {file['gram']} columns")
    return f"`{Path(file['file']).name}`{more}"


_COUNTS = {"samples": "rows", "tokens": "tokens"}


def measured_on(file: Mapping[str, Any] | None, quote: str = "") -> str:
    """Return what a saliency file was measured on, in a few words.

    Args:
        file: What the file says of itself; None for an expert that has no file.
        quote: What to put before and after the name of each data source.
    """
    if file is None:
        return "none: not ranked by saliency"
    record = file["calibration"]
    if not record.get("sources"):
        return "not recorded in the file"
    sources = ", ".join(f"{quote}{s.get('data', '?')}{quote}" for s in record["sources"])
    counts = [f"{record[key]:,} {what}" for key, what in _COUNTS.items() if key in record]
    return f"{sources}: {', '.join(counts)}" if counts else sources


def _notes(account: Account) -> list[str]:
    """Return a line for each other treatment of tensors, and how many they are."""
    counts = Counter(
        how for tensor in account.tensors for how in dict.fromkeys(tensor.treatments) if how
    )
    lines = []
    if not account.owners:
        lines = [
            "",
            "Errors are those of the layers' outputs on the expert's calibration data: 0% is the "
            "expert itself, 100% the base.",
        ]
    for how, count in counts.items():
        lines += ["", f"Without saliency, {count} tensors were {how}, for one or more experts."]
    return lines
