"""Importance matrices of llama.cpp, as the saliency of a model, and saliency as such a matrix."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mergekit_obim import __version__
from mergekit_obim.errors import SaliencyFileError
from mergekit_obim.models.completeness import traced
from mergekit_obim.models.names import EXPERT_NUMBER, under_all_names, weight_names
from mergekit_obim.models.opened import Access, OpenModel
from mergekit_obim.saliency.file import SaliencyFile, SaliencyMetadata
from mergekit_obim.saliency.imatrix import (
    ImatrixEntry,
    ImatrixSaliency,
    WeightNames,
    read_imatrix,
    write_imatrix,
)

# What llama-imatrix runs at a time by default.
_CHUNK = 512


def imatrix_saliency(path: Path, model: OpenModel, access: Access) -> ImatrixSaliency:
    """Read an imatrix as the saliency of a model, whose weights are not looked at.

    Args:
        path: The imatrix.
        model: The model that it was measured on.
        access: Whether code that comes with the model may run, which is built without memory.

    Raises:
        SaliencyNotFoundError: There is no such file.
        SaliencyFileError: It cannot be read, is of a model of other shapes, or its names cannot be
            told from the model's.
    """
    imatrix = read_imatrix(path)
    without_weights = traced(model, access)
    if without_weights is None:
        raise SaliencyFileError(
            f"{path}: transformers cannot build model {model.label} here, so which weights the "
            "entries are of is not known; measure it with obim-saliency"
        )
    built, sources = without_weights
    text = model.config.get_text_config()
    blocks = getattr(text, "num_hidden_layers", 0)
    names = WeightNames(path, text.model_type, blocks, built.base_model_prefix)
    fused = {
        target: [name for stored in conversion.sources.values() for name in stored]
        for conversion in sources.conversions
        for target in conversion.targets
    }
    h: dict[str, Tensor] = {}
    unscored: dict[str, str] = {}
    experts: dict[str, dict[str, list[int]]] = {}
    used: set[str] = set()
    for parameter, known in weight_names(built, sources).items():
        candidates = (name for own in (*known, *fused.get(parameter, ())) for name in names.of(own))
        found = [name for name in dict.fromkeys(candidates) if name in imatrix.entries]
        weight = _Weight.of(built, parameter)
        if not found or weight is None:
            unscored[known[0]] = f"{path.name} has no entry for it"
            continue
        used.update(found)
        entry = imatrix.entries[found[0]]
        matrices = weight.matrices_in(entry)
        if matrices is None:
            raise SaliencyFileError(
                f"{path}: entry {found[0]} has {entry.sums.numel()} values and "
                f"{entry.counts.numel()} counts, which is not of {known[0]} of model "
                f"{model.label}, {list(weight.shape)}: it was measured on another model"
            )
        value, reason = weight.h(entry, matrices)
        if value is not None and names.reorders_inputs(found[0]):
            value, reason = _in_transformers_order(value, text), "llama.cpp reorders its inputs"
        if value is None:
            unscored[known[0]] = reason
            continue
        h |= under_all_names(built, parameter, value, known, model.shape)
        if weight.is_fused and not entry.placeholders:
            rows = entry.rows_of(matrices).long()
            pooled = (rows == 0).nonzero().flatten().tolist()
            experts[parameter] = {"tokens": rows.tolist(), "pooled": pooled}
    if not h:
        raise SaliencyFileError(
            f"{path}: not one of its entries ({next(iter(imatrix.entries))}, …) is of a weight of "
            f"model {model.label}: it was measured on a model of another architecture"
        )
    metadata = SaliencyMetadata(
        form="factored",
        model=model.label,
        revision=model.reference.model.revision or model.commit,
        architecture=(model.config.architectures or [""])[0],
        calibration={
            "sources": [{"data": name} for name in imatrix.datasets],
            "imatrix": path.name,
            **({"tokens": imatrix.tokens} if imatrix.tokens else {}),
        },
        unscored=unscored,
        experts=experts,
        mergekit_obim_version=__version__,
    )
    unused = [name for name in imatrix.entries if name not in used]
    return ImatrixSaliency(path, h, metadata, unused)


@dataclass(frozen=True)
class _Weight:
    """A parameter that an imatrix may have an entry for.

    Attributes:
        shape: Its shape: [out, in], or [experts, out, in] of a fused one, or with the last two
            dims the other way round.
        axes: The dims that may be those of the input features, -1 or -2 or both.
        number: Of a weight that is one expert's, which of them.
    """

    shape: torch.Size
    axes: tuple[int, ...]
    number: int | None

    @staticmethod
    def of(model: PreTrainedModel, parameter: str) -> _Weight | None:
        """Return a parameter's, None if nothing is multiplied by it as a matrix."""
        owner = model.get_submodule(parameter.rpartition(".")[0])
        shape = model.get_parameter(parameter).shape
        # An embedding is looked up, whatever the head that is tied to it does.
        if len(shape) not in (2, 3) or isinstance(owner, nn.Embedding | nn.Conv1d | nn.Conv2d):
            return None
        transposed = getattr(owner, "is_transposed", None)  # transformers' mixtures
        if isinstance(owner, Conv1D) or transposed is True:
            axes: tuple[int, ...] = (-2,)
        elif isinstance(owner, nn.Linear) or transposed is False:
            axes = (-1,)
        else:
            axes = (-1, -2)
        expert = EXPERT_NUMBER.search(parameter)
        return _Weight(shape, axes, int(expert[0]) if expert else None)

    @property
    def is_fused(self) -> bool:
        """Whether it holds a matrix for each expert."""
        return len(self.shape) == 3

    def matrices_in(self, entry: ImatrixEntry) -> int | None:
        """Return how many matrices an entry is of, None if it cannot be of this weight."""
        for axis in self.axes:
            matrices, rest = divmod(entry.sums.numel(), self.shape[axis])
            least = self.shape[0] if self.is_fused else 1 + (self.number or 0)
            exactly = self.is_fused or self.number is None
            fits = matrices == least if exactly else matrices >= least
            if not rest and fits and entry.counts.numel() in (1, matrices):
                return matrices
        return None

    def h(self, entry: ImatrixEntry, matrices: int) -> tuple[Tensor | None, str]:
        """Return h, which broadcasts against the weight; None and why if it has none."""
        features = entry.sums.numel() // matrices
        axes = [axis for axis in self.axes if self.shape[axis] == features]
        if len(axes) > 1:
            return None, "it is square, and which of its dims its inputs are along is not known"
        rows = entry.h(matrices)
        if rows is None:
            return None, "nothing was routed to it when the imatrix was made"
        if not self.is_fused:
            rows = rows[self.number or 0]
        shape = [*self.shape[:-2], 1, 1]
        shape[axes[0]] = features
        return rows.reshape(shape), ""


def _in_transformers_order(h: Tensor, config: PretrainedConfig) -> Tensor | None:
    """Put the input features back into groups of value heads by their key head.

    Args:
        h: [1, in], as llama.cpp has it: the first head of every group, then the second, and so on.
        config: The model's configuration.

    Returns:
        [1, in], or None if the configuration does not say what the groups are.
    """
    keys = getattr(config, "linear_num_key_heads", None)
    values = getattr(config, "linear_num_value_heads", None)
    if not keys or not values or values % keys or h.numel() % values:
        return None
    return h.view(values // keys, keys, -1).transpose(0, 1).reshape(h.shape)


def write_saliency_as_imatrix(file: SaliencyFile, output: Path) -> list[str]:
    """Write what an imatrix can hold of a saliency file.

    The counts, by which llama-imatrix weighs the files that it combines, are rounded to powers of
    two. So h = in_sum2 / counts is that of the file to the last bit.

    Args:
        file: The file, in factored form.
        output: Where to write.

    Returns:
        The entries that it does not hold.

    Raises:
        SaliencyFileError: The file is dense, or does not name an architecture that llama.cpp has.
        OSError: The imatrix cannot be written.
    """
    if file.metadata.form != "factored":
        raise SaliencyFileError(
            f"{file.path}: is in dense form, which an imatrix cannot hold: measure model "
            f"{file.metadata.model} without --dense"
        )
    names = _names_for(file)
    h, left = _by_entry(file, names)
    if not h:
        raise SaliencyFileError(
            f"{file.path}: nothing in it is of a weight that an imatrix has an entry for"
        )
    calibration = file.metadata.calibration
    measured, length = calibration.get("tokens"), calibration.get("max_length")
    tokens = torch.tensor([float(measured) if isinstance(measured, int) else 1.0])
    routed = {
        entry: torch.tensor([float(count) for count in record["tokens"]])
        for name, record in file.metadata.experts.items()
        for entry in names.of(name)
    }
    entries = {}
    for entry, rows in h.items():
        counts = routed.get(entry, tokens) if len(rows) > 1 else tokens
        counts = counts.clamp(min=1).log2().round().exp2()
        entries[entry] = ImatrixEntry((rows * counts[:, None]).flatten(), counts)
    datasets = [str(s["data"]) for s in calibration.get("sources", []) if "data" in s]
    chunk = length if isinstance(length, int) and length > 0 else _CHUNK
    write_imatrix(output, entries, datasets, chunk)
    return left


def _names_for(file: SaliencyFile) -> WeightNames:
    """Return llama.cpp's names of the weights in a saliency file, by what it says of its model."""
    architecture = file.metadata.architecture
    kind = getattr(transformers, architecture or "?", None)
    config_class = getattr(kind, "config_class", None)
    if kind is None or config_class is None:
        raise SaliencyFileError(
            f"{file.path}: its architecture is {architecture!r}, which transformers does not have, "
            "so what llama.cpp calls the weights is not known; put the class that config.json "
            "names into the metadata"
        )
    layers = [int(number) for name in file.shapes for number in re.findall(r"\.(\d+)\.", name)[:1]]
    model_type = config_class().get_text_config().model_type
    return WeightNames(file.path, model_type, 1 + max(layers, default=0), kind.base_model_prefix)


def _by_entry(file: SaliencyFile, names: WeightNames) -> tuple[dict[str, Tensor], list[str]]:
    """Return h as an imatrix has it, [matrices, in] by entry; and the names of what is left."""
    h: dict[str, Tensor] = {}
    single: dict[str, dict[int, Tensor]] = {}
    left = []
    for name, shape in file.shapes.items():
        into = [
            entry
            for entry in names.of(name)
            if not names.reorders_inputs(entry)
            and ("gate_up" not in entry or name.endswith("gate_up_proj"))
        ]
        # h of an embedding that is a head as well, say, is along both of its dims.
        if not into or len(shape) not in (2, 3) or min(shape[-2:]) > 1:
            left.append(name)
            continue
        expert = EXPERT_NUMBER.search(name)
        for entry in into:
            if expert:
                single.setdefault(entry, {})[int(expert[0])] = file[name].flatten()
            else:
                h[entry] = file[name].reshape(shape[0] if len(shape) == 3 else 1, -1)
    for entry, rows in single.items():
        if entry not in h and sorted(rows) == list(range(len(rows))):
            h[entry] = torch.stack([rows[number] for number in range(len(rows))])
    return h, left
