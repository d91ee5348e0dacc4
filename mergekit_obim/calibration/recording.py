"""What goes into an expert's saliency file, and whether the file that is there has it already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from mergekit.common import dtype_from_name

from mergekit_obim import __version__
from mergekit_obim.calibration.capture import FEWEST_ROWS, Curvature, CurvatureCapture
from mergekit_obim.calibration.data import TokenizedCalibration
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.calibration.products import Products
from mergekit_obim.errors import CalibrationError, RecipeError, SaliencyFileError, quoted
from mergekit_obim.kernels.gram import TEST_MATRIX
from mergekit_obim.kernels.scores import task_vector
from mergekit_obim.models.names import under_all_names
from mergekit_obim.models.opened import OpenModel
from mergekit_obim.recipe.calibration import Calibration
from mergekit_obim.recipe.experts import Expert
from mergekit_obim.recipe.references import identity
from mergekit_obim.saliency.file import Gram, SaliencyFile, SaliencyMetadata, write_saliency

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def expected_metadata(
    expert: Expert,
    model: OpenModel,
    data: TokenizedCalibration,
    options: RunOptions,
    base: OpenModel | None,
) -> SaliencyMetadata:
    """Return the metadata that the expert's file will have, but for what the run will find.

    Args:
        expert: The expert, with its calibration.
        model: The expert's checkpoint.
        data: What it is to be measured on.
        options: Of them, the form of the file and the dtype that the merge rounds to.
        base: The base's checkpoint, for a dense file.
    """
    calibration = calibration_record(expert.calibration, data, model.config)
    if base:  # δ²·h depends on the base too
        calibration["base"] = base.label
        calibration["base_weights"] = base.digest()
        calibration["merge_dtype"] = options.merge_dtype
    return SaliencyMetadata(
        form="dense" if options.dense else "factored",
        model=expert.model,
        revision=model.reference.model.revision or model.commit,
        architecture=(model.config.architectures or [""])[0],
        calibration=calibration,
        fingerprint=model.fingerprints(),
        mergekit_obim_version=__version__,
    )


def calibration_record(
    calibration: Calibration, data: TokenizedCalibration, config: PretrainedConfig
) -> dict[str, Any]:
    """Return what the measurement depends on beside the weights, JSON-able.

    The batch size is not among it: another one changes the result by rounding only.
    """
    dtype = calibration.dtype or getattr(config, "dtype", None) or "float32"
    return {
        "sources": data.sources,
        "content_hash": data.content_hash,
        "samples": sum(source["sampled"] for source in data.sources),
        "tokens": data.tokens,
        "max_length": calibration.max_length,
        "seed": calibration.seed,
        "packing": calibration.packing,
        "template": data.template,
        # Only where it has a part in the measurement, so that other files stay as they are.
        **({"date": data.date} if data.date else {}),
        **({"sketch": calibration.sketch} if calibration.sketch else {}),
        "dtype": str(dtype).removeprefix("torch."),
    }


def kept_file(path: Path, wanted: SaliencyMetadata, overwrite: bool) -> SaliencyFile | None:
    """Open the file that is there, if it is the one that would be written.

    Args:
        path: The file, which is there.
        wanted: The metadata that it would be written with, but for what the run will find.
        overwrite: Whether one that was made from something else may be replaced.

    Returns:
        The file; None if it is to be replaced.

    Raises:
        SaliencyFileError: It was made from something else, or is damaged, and may not be replaced.
    """
    try:
        there = SaliencyFile(path)
    except SaliencyFileError as error:
        if overwrite:
            return None
        raise SaliencyFileError(f"model {wanted.model}: {error.message}") from error
    has, wants = there.metadata, wanted
    differing = ["model"] if identity(has.model) != identity(wants.model) else []
    differing += [
        name
        for name in ("revision", "form", "fingerprint")
        if getattr(has, name) != getattr(wants, name)
    ]
    differing += [
        f"calibration {name}"
        for name in sorted({*has.calibration, *wants.calibration})
        if has.calibration.get(name) != wants.calibration.get(name)
        and not (name == "sketch" and _serves(has.calibration.get(name), wants))
    ]
    if not differing:
        return there
    if overwrite:
        return None
    raise SaliencyFileError(
        f"{path}: was made for model {has.model} from something else (another "
        f"{', '.join(differing).replace('fingerprint', 'set of weights')}); measure again with "
        "--overwrite, or write to another folder"
    )


def _serves(sketch: object, wanted: SaliencyMetadata) -> bool:
    """Return whether a file with a sketch holds what is wanted: it may be more than that."""
    asked = wanted.calibration.get("sketch", 0)
    return asked == 0 or (isinstance(sketch, int) and isinstance(asked, int) and sketch >= asked)


def measurement(wanted: SaliencyMetadata) -> dict[str, object]:
    """Return all that decides the sums of a run, JSON-able, under the words to name it by.

    Sums that were saved are of use to another run only if all of it is the same. How fast the run
    is and on what device are no part of it.

    Args:
        wanted: The metadata of the file that the run is to write, but for what it will find.
    """
    return {
        "model": [wanted.model, wanted.revision],
        "set of weights": {name: x.model_dump() for name, x in wanted.fingerprint.items()},
        "form": wanted.form,
        **{f"calibration {key}": value for key, value in wanted.calibration.items()},
        "version of mergekit-obim": wanted.mergekit_obim_version,
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
    }


def entries(
    model: PreTrainedModel,
    capture: CurvatureCapture,
    products: Products,
    names: Mapping[str, tuple[str, ...]],
    opened: OpenModel,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return what a run measured, as it goes into the file.

    Args:
        model: The model that was run.
        capture: What was measured of its parameters.
        products: What was measured of their inputs beside h.
        names: All names of each parameter, those of the checkpoint among them.
        opened: The model's checkpoint.

    Returns:
        h under every name that a merge may ask for it by, each broadcasting against its weight;
        and the metadata that only the run could tell: weights without h, counts of tokens, and
        which entry has the products of which weight's input.
    """
    h: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[str, list[int]]] = {}
    curvatures = capture.curvatures()
    for parameter, curvature in curvatures.items():
        h |= under_all_names(model, parameter, curvature.h, names[parameter], opened.shape)
        if curvature.experts:
            tokens, pooled = list(curvature.experts), list(curvature.pooled)
            experts[parameter] = {"tokens": tokens, "pooled": pooled}
    unscored = {names[parameter][0]: reason for parameter, reason in capture.unscored().items()}
    found = {"unscored": unscored, "experts": experts}
    if products.seen_by:
        found["gram"] = _gram(model, curvatures, products, names, opened)
    return h, found


def _gram(
    model: PreTrainedModel,
    curvatures: Mapping[str, Curvature],
    products: Products,
    names: Mapping[str, tuple[str, ...]],
    opened: OpenModel,
) -> Gram:
    """Return which entry has the products of which weight's input, by all names of the weight."""
    inputs: dict[str, str] = {}
    expert_of: dict[str, int] = {}
    for first, parameters in products.seen_by.items():
        entry = products.entry(first)
        for parameter in parameters:
            # Of each expert its number, in the place of its h: so the stored tensors tell theirs.
            h, count = curvatures[parameter].h, len(curvatures[parameter].experts)
            numbers = torch.arange(float(count)).view(-1, *[1] * (h.ndim - 1)) if count else h
            found = under_all_names(model, parameter, numbers, names[parameter], opened.shape)
            for name, part in found.items():
                if part.numel() not in (1, numbers.numel()):
                    continue  # some of the input features only
                inputs[name] = entry
                if count and part.ndim < numbers.ndim:
                    expert_of[name] = int(part)
    whole = products.columns == "full"
    return Gram(
        columns=products.columns,
        test_matrix="" if whole else TEST_MATRIX,
        inputs=inputs,
        experts=expert_of,
    )


def write_measured(
    path: Path,
    h: Mapping[str, torch.Tensor],
    products: Products,
    metadata: SaliencyMetadata,
    expert: OpenModel,
    base: OpenModel | None,
) -> None:
    """Write an expert's saliency file, whole or not at all.

    Args:
        path: Where to write.
        h: What :func:`entries` gives.
        products: What was measured beside it.
        metadata: All of the file's metadata.
        expert: The expert's checkpoint.
        base: The base's checkpoint, for a dense file; None for a factored one.

    Raises:
        CalibrationError: There is no entry to write, or the two models' tensors don't match.
        RecipeError: mergekit does not know the dtype that a dense file is made for.
        SaliencyFileError: The file cannot be written.
    """
    if not h:
        raise CalibrationError(
            f"model {metadata.model}: not one of its weights could be scored: "
            + "; ".join(sorted(set(metadata.unscored.values())))
        )
    if base:
        dense = _DenseScores(h, expert, base, _merge_dtype(metadata.calibration["merge_dtype"]))
        shapes: Mapping[str, torch.Size] = dense.shapes
        read: Callable[[str], torch.Tensor] = dense.read
    else:
        entry_of = {products.entry(first): first for first in products.seen_by}
        shapes = {name: x.shape for name, x in h.items()}
        shapes |= {entry: products.shapes[first] for entry, first in entry_of.items()}

        def read(name: str) -> torch.Tensor:
            return products.read(entry_of[name]) if name in entry_of else h[name]

    try:
        write_saliency(path, shapes, read, metadata)
    except OSError as error:
        raise cannot_be_written(path, metadata.model, error) from error


def cannot_be_written(path: Path, label: str, error: OSError) -> SaliencyFileError:
    """Return the error to raise where the disk refuses an expert's file."""
    return SaliencyFileError(
        f"{path}: the saliency of model {label} cannot be written: {quoted(error)}"
    )


def pooled_warnings(experts: Mapping[str, Mapping[str, list[int]]]) -> list[str]:
    """Return a line on a mixture's experts that saw too few tokens, if there are any.

    Args:
        experts: The metadata's `experts`: for each fused weight, how many tokens each expert saw,
            and which of them have the mean over all.
    """
    pooled: dict[str, set[int]] = {}
    total = {}
    for name, found in experts.items():
        layer = name.rpartition(".")[0]
        pooled.setdefault(layer, set()).update(found["pooled"])
        total[layer] = len(found["tokens"])
    few = {layer: sorted(numbers) for layer, numbers in pooled.items() if numbers}
    if not few:
        return []
    layer, numbers = next(iter(few.items()))
    return [
        f"{sum(map(len, few.values()))} of {sum(total.values())} experts saw fewer than "
        f"{FEWEST_ROWS} tokens and take the mean over their layer's, as in {layer}: "
        f"{', '.join(map(str, numbers))}; more samples would tell them apart"
    ]


class _DenseScores:
    """δ²·h per weight, computed when it is written: together they are as large as the model.

    Attributes:
        h: h per weight.
        expert, base: The two checkpoints.
        dtype: The dtype that the merge rounds both to before it takes their difference; None is
            the one that they are stored in.
        shapes: Shape of each weight.
    """

    def __init__(
        self,
        h: Mapping[str, torch.Tensor],
        expert: OpenModel,
        base: OpenModel,
        dtype: torch.dtype | None,
    ):
        self.h, self.expert, self.base, self.dtype = h, expert, base, dtype
        self.shapes = {}
        for name in h:
            for weights in (expert, base):
                if name not in weights.loader.index.tensor_paths:
                    raise CalibrationError(
                        f"model {weights.label}: tensor {name} is stored in another layout, which "
                        "--dense cannot write; leave --dense out"
                    )
            shapes = [w.load(name).shape for w in (expert, base)]
            if shapes[0] != shapes[1]:
                raise CalibrationError(
                    f"tensor {name} is {list(shapes[0])} in {expert.label} but {list(shapes[1])} "
                    f"in the base {base.label}: --dense needs the same shape"
                )
            self.shapes[name] = shapes[0]

    def read(self, name: str) -> torch.Tensor:
        """Return δ²·h of a weight, of its shape."""
        expert, base = self.expert.load(name), self.base.load(name)
        dtype = self.dtype or torch.promote_types(expert.dtype, base.dtype)
        return task_vector(expert.to(dtype), base.to(dtype)).square_().mul_(self.h[name])


def _merge_dtype(name: str | None) -> torch.dtype | None:
    try:
        return dtype_from_name(name)
    except (AttributeError, RuntimeError) as error:
        raise RecipeError(f"dtype: mergekit does not know {name!r}") from error
