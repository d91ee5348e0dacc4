"""Combining saliency files: a merged model's statistics, from those of the models it is made of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from mergekit_obim import __version__
from mergekit_obim.errors import SaliencyFileError
from mergekit_obim.saliency.file import Gram, SaliencyFile, SaliencyMetadata, write_saliency


def combine(paths: Sequence[Path], output: Path) -> SaliencyFile:
    """Write the means of h of several files, weighted by the tokens that each was measured on.

    That is the h of one run over all of the data, were each expert's inputs the same in the
    merged model. Experts of a mixture count by the tokens that were routed to them. A tensor that
    one of the files lacks is left out, and named as unscored. The new file has no fingerprint, as
    nobody measured the merged weights. Sketches of Gram matrices, or the matrices, are combined if
    all files have as many columns of them, and left out otherwise.

    Args:
        paths: Two or more files in factored form.
        output: Where to write.

    Returns:
        The new file.

    Raises:
        SaliencyFileError: A file cannot be read, is dense, does not say how many tokens it was
            measured on, or is of a model of other shapes.
    """
    files = [SaliencyFile(path) for path in paths]
    tokens = [_tokens(file) for file in files]
    first = files[0]
    for file in files[1:]:
        for name, shape in file.shapes.items():
            if first.shapes.get(name, shape) != shape:
                raise SaliencyFileError(
                    f"{file.path}: {name} of model {file.metadata.model} has shape {list(shape)}, "
                    f"but {list(first.shapes[name])} in {first.path}: combine files of models "
                    "with the same layers and the same vocabulary"
                )
    everywhere = [name for name in first.shapes if all(name in file for file in files)]
    unscored = {
        name: reason for file in reversed(files) for name, reason in file.metadata.unscored.items()
    }
    for file in files:
        for name in file.shapes:
            if name not in everywhere:
                unscored.setdefault(name, "not every combined file has an entry for it")
    architectures = {file.metadata.architecture for file in files}
    metadata = SaliencyMetadata(
        form="factored",
        model=" and ".join(file.metadata.model for file in files),
        architecture=architectures.pop() if len(architectures) == 1 else "",
        calibration={
            "sources": [s for f in files for s in f.metadata.calibration.get("sources", [])],
            "samples": sum(file.metadata.calibration.get("samples", 0) for file in files),
            "tokens": sum(tokens),
            "combined": [
                {"model": file.metadata.model, "tokens": count}
                for file, count in zip(files, tokens, strict=True)
            ],
        },
        unscored=unscored,
        experts=_experts(files, everywhere),
        mergekit_obim_version=__version__,
    )
    shapes = {name: first.shapes[name] for name in everywhere}
    weight_of = {name: name for name in everywhere}
    if (gram := _common_gram(files, everywhere)) is not None:
        metadata = metadata.model_copy(update={"gram": gram})
        for weight, entry in gram.inputs.items():
            # A fused weight says how many tokens each of its experts saw.
            if entry not in weight_of or weight in first.metadata.experts:
                weight_of[entry] = weight
        shapes |= {entry: tuple(first[entry].shape) for entry in gram.entries}

    def read(entry: str) -> torch.Tensor:
        return _mean(files, tokens, entry, weight_of[entry])

    write_saliency(output, shapes, read, metadata)
    return SaliencyFile(output)


def _common_gram(files: Sequence[SaliencyFile], weights: Collection[str]) -> Gram | None:
    """Return what all files have of Gram matrices, if all have as many columns of them."""
    grams = [file.metadata.gram for file in files if file.metadata.gram]
    first = grams[0] if len(grams) == len(files) else None
    if first is None or any(
        (gram.columns, gram.test_matrix) != (first.columns, first.test_matrix) for gram in grams
    ):
        return None
    # Entries are called after the weights that share them: other sharing has other names.
    inputs = {
        weight: entry
        for weight, entry in first.inputs.items()
        if weight in weights
        and all(gram.inputs.get(weight) == entry for gram in grams)
        and all(gram.experts.get(weight) == first.experts.get(weight) for gram in grams)
    }
    experts = {weight: number for weight, number in first.experts.items() if weight in inputs}
    return first.model_copy(update={"inputs": inputs, "experts": experts}) if inputs else None


def _tokens(file: SaliencyFile) -> int:
    """Return how many tokens a file was measured on.

    Raises:
        SaliencyFileError: It does not say, or is in dense form.
    """
    if file.metadata.form != "factored":
        raise SaliencyFileError(
            f"{file.path}: is in dense form, which belongs to one model and one base: measure "
            f"model {file.metadata.model} without --dense to combine it with others"
        )
    tokens = file.metadata.calibration.get("tokens")
    if not isinstance(tokens, int) or tokens < 1:
        raise SaliencyFileError(
            f"{file.path}: does not say how many tokens model {file.metadata.model} was measured "
            "on, which is what a file counts by: put `tokens` into its calibration metadata"
        )
    return tokens


def _experts(files: Sequence[SaliencyFile], names: Sequence[str]) -> dict[str, Any]:
    """Return the metadata's `experts` of the combined file.

    The tokens that an expert of a mixture saw are added up over the files. It counts as pooled
    only if every file has pooled it.
    """
    experts = {}
    for name in names:
        found = [file.metadata.experts[name] for file in files if name in file.metadata.experts]
        if len(found) == len(files):
            tokens = zip(*(one["tokens"] for one in found), strict=True)
            pooled = set.intersection(*(set(one["pooled"]) for one in found))
            experts[name] = {"tokens": list(map(sum, tokens)), "pooled": sorted(pooled)}
    return experts


def _mean(
    files: Sequence[SaliencyFile], tokens: Sequence[int], entry: str, weight: str
) -> torch.Tensor:
    """Return one entry's mean, float32, of the shape that it has in every file.

    Args:
        files: All of the files, each with that entry.
        tokens: How many tokens each file was measured on.
        entry: The entry's name.
        weight: The name of a weight that it belongs to, by which tokens of experts are counted.
    """
    total, seen_in_all = torch.zeros(()), torch.zeros(())
    for file, count in zip(files, tokens, strict=True):
        counts, values = torch.tensor(float(count), dtype=torch.float64), file[entry].double()
        experts = file.metadata.experts.get(weight)
        if experts and all(weight in other.metadata.experts for other in files):
            # [experts, 1, …]. Where no file's tokens reached an expert, there is nothing to weigh
            # its h by but the tokens of the whole files.
            routed = torch.tensor(experts["tokens"], dtype=torch.float64)
            seen = torch.tensor([o.metadata.experts[weight]["tokens"] for o in files]).sum(0)
            counts = torch.where(seen > 0, routed, counts)
            counts = counts.reshape(-1, *[1] * (values.ndim - 1))
        total = total + counts * values
        seen_in_all = seen_in_all + counts
    return (total / seen_in_all).float()
