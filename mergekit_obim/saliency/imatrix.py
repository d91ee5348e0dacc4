"""Importance matrices of llama.cpp: what they hold, and what they call a model's weights.

``llama-imatrix`` sums the squares of the inputs of every matrix multiplication, which is h times
the number of rows. It writes them to a GGUF file, or to one of its older format without a magic
number (``.dat``, ``.imatrix``). Sources: ``tools/imatrix/imatrix.cpp`` of llama.cpp for both
formats, its ``conversion`` folder for what becomes of a model's weights.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mergekit_obim.errors import SaliencyFileError, SaliencyNotFoundError, quoted
from mergekit_obim.saliency.file import SaliencyFile, SaliencyMetadata, atomic_write

SUFFIXES = (".gguf", ".dat", ".imatrix")
_TYPE = "imatrix"
# llama.cpp's names of architectures that are not transformers' names in other spelling.
_ARCHITECTURES = {
    **dict.fromkeys(("mistral", "mixtral", "internlm3"), "llama"),
    **dict.fromkeys(("ministral", "ministral3"), "mistral3"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"), "deepseek2"),
    **dict.fromkeys(("granitemoehybrid", "bamba"), "granitehybrid"),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "distilbert"), "bert"),
    **{"cohere": "command-r", "falcon_mamba": "mamba", "glm": "chatglm", "glm4v": "glm4"},
    **{"glm4v_moe": "glm4moe", "solar_open": "glm4moe", "gpt_bigcode": "starcoder"},
    **{"granitemoeshared": "granitemoe", "olmo3": "olmo2", "phi": "phi2", "qwen2_5_vl": "qwen2vl"},
    **{"hunyuan_v1_dense": "hunyuan-dense", "hunyuan_v1_moe": "hunyuan-moe"},
    **{"nemotron_h": "nemotron_h_moe"},  # which has all that the other has
}
# Weights that llama.cpp takes apart, or that its package has by another name only.
_PARTS = {
    "experts.gate_up_proj": [f"experts.{name}" for name in ("gate_proj", "up_proj", "w1", "w3")],
    "experts.down_proj": ["experts.w2"],
    "block_sparse_moe.router": ["block_sparse_moe.router.layer"],
    "block_sparse_moe.input_linear": [f"block_sparse_moe.experts.{name}" for name in ("w1", "w3")],
    "shared_mlp.input_linear": [
        f"mlp.{name}_proj" for name in ("shared_mlp.gate", "shared_mlp.up", "gate", "up")
    ],
    "shared_mlp.output_linear": ["mlp.down_proj"],
    "linear_attn.in_proj_qkvz": [f"linear_attn.in_proj_{name}" for name in ("qkv", "z")],
}
# Weights that llama.cpp multiplies by in other ways than as matrices.
_CONVOLUTION = re.compile(r"conv(1d)?\.weight$")
# The weights whose columns llama.cpp's converter puts into another order. All others it leaves, or
# transposes: what else it permutes (the rows of q and k, say) are output features.
_REORDERED = {"qwen35": "ssm_out", "qwen35moe": "ssm_out", "plamo": "attn_output"}


@dataclass(frozen=True, eq=False)
class ImatrixEntry:
    """What an imatrix holds of one weight.

    Attributes:
        sums: Σ x² over the rows, float32 [matrices · in]: of a mixture one expert after another.
        counts: The number of rows, float32 [1], or [matrices] where each has its own.
        placeholders: Whether an expert without rows has ones for h, as in the older format.
    """

    sums: Tensor
    counts: Tensor
    placeholders: bool = False

    def rows_of(self, matrices: int) -> Tensor:
        """Return how many rows each matrix saw, float64 [matrices]; 0 where nothing is known."""
        counts = self.counts.double().expand(matrices)
        if self.placeholders and matrices > 1:
            counts = counts * (self.sums.view(matrices, -1) != counts[:, None]).any(1)
        return counts

    def h(self, matrices: int) -> Tensor | None:
        """Return h of each of the weight's matrices.

        Args:
            matrices: How many there are: the experts of a mixture, else 1.

        Returns:
            Float32 [matrices, in], the mean over all for those that no row was routed to; None if
            that is so for all of them.
        """
        sums, rows = self.sums.double().view(matrices, -1), self.rows_of(matrices)[:, None]
        if not rows.any():
            return None
        mean = (sums * (rows > 0)).sum(0) / rows.sum()
        return torch.where(rows > 0, sums / rows, mean).float()


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix, whole in memory: a number for each input feature of each weight.

    Attributes:
        path: The file.
        entries: By llama.cpp's name of the weight.
        datasets: The names of the texts that it was measured on.
        tokens: The rows of the weight that saw the most; None if the file does not say.
    """

    path: Path
    entries: Mapping[str, ImatrixEntry]
    datasets: Sequence[str] = ()
    tokens: int | None = None


class ImatrixSaliency(SaliencyFile):
    """An imatrix as the saliency of one model, read like a saliency file.

    Attributes:
        path: The imatrix.
        metadata: What is known of the measurement. There is no fingerprint.
        shapes: Shape of every scored weight's entry.
        unused: The entries that are of no weight of the model.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        metadata: SaliencyMetadata,
        unused: Sequence[str],
    ):
        self.path, self.metadata, self.unused = path, metadata, unused
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        """Return h of a weight, float32 on the CPU; it must not be changed in place."""
        return self._tensors[name]

    def warnings(self) -> list[str]:
        """Return what a user has to know before relying on it."""
        model = self.metadata.model
        found = [
            f"{self.path}: an imatrix does not say which weights it was measured on, so only its "
            f"shapes were compared: make sure that it is of model {model} itself, not of its base "
            "or of another fine-tune"
        ]
        if self.unused:
            few = ", ".join(self.unused[:3]) + (", …" if self.unused[3:] else "")
            found.append(
                f"{self.path}: {len(self.unused)} entries are of no weight of model {model}, and "
                f"were left out: {few}"
            )
        return found


def read_imatrix(path: Path) -> Imatrix:
    """Read an imatrix of either format, and check its every value.

    Args:
        path: The file. Its first bytes say which format it is in, not its name.

    Raises:
        SaliencyNotFoundError: There is no such file.
        SaliencyFileError: It is truncated or not an imatrix, or has values that no mean of squares
            has.
    """
    if not path.is_file():
        raise SaliencyNotFoundError(f"{path}: no such imatrix")
    gguf = _gguf(path)
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        found = _read_gguf(gguf, path) if is_gguf else _read_legacy(path)
    except SaliencyFileError:
        raise
    except Exception as error:  # GGUFReader checks little: numpy raises what a short file makes it
        what = (
            "GGUF file" if is_gguf else "imatrix: it is neither GGUF nor llama.cpp's older format"
        )
        raise SaliencyFileError(
            f"{path}: not a readable {what} ({quoted(error)}); it may be truncated: get it again"
        ) from error
    if not found.entries:
        raise SaliencyFileError(
            f"{path}: an imatrix without entries (NAME.in_sum2 and NAME.counts): make it again "
            "with llama-imatrix"
        )
    for name, entry in found.entries.items():
        if not entry.sums.numel() or entry.sums.numel() % max(1, entry.counts.numel()):
            raise SaliencyFileError(
                f"{path}: entry {name} has {entry.sums.numel()} values for {entry.counts.numel()} "
                "counts: it is damaged, get it again"
            )
        for values in (entry.sums, entry.counts):
            if not (values.isfinite().all() and (values >= 0).all()):
                raise SaliencyFileError(
                    f"{path}: entry {name} has values that are negative or not finite: make it "
                    "again with llama-imatrix"
                )
    return found


def _gguf(path: Path) -> ModuleType:
    """Return llama.cpp's package, which an extra of ours installs."""
    try:
        import gguf
    except ImportError as error:
        raise SaliencyFileError(
            f"{path}: an imatrix needs the package gguf: pip install 'mergekit-obim[imatrix]'"
        ) from error
    return gguf


def _read_gguf(gguf: ModuleType, path: Path) -> Imatrix:
    reader = gguf.GGUFReader(path)
    kind = reader.get_field("general.type")
    if kind is None or kind.contents() != _TYPE:
        raise SaliencyFileError(
            f"{path}: a GGUF file of type {kind.contents() if kind else 'model'!r}, not 'imatrix': "
            "name the imatrix that was made for it"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for tensor in reader.tensors:
        name, _, part = tensor.name.rpartition(".")
        # Others may come: Σ x is under discussion.
        if part in ("in_sum2", "counts"):
            if tensor.tensor_type != gguf.GGMLQuantizationType.F32:
                raise SaliencyFileError(
                    f"{path}: {tensor.name} is {tensor.tensor_type.name}, and an imatrix is F32: "
                    "make it again with llama-imatrix"
                )
            values = tensor.data.astype(np.float32).reshape(-1)  # a copy: the file is only mapped
            parts.setdefault(name, {})[part] = torch.from_numpy(values)
    for name, found in parts.items():
        if len(found) < 2:
            raise SaliencyFileError(
                f"{path}: entry {name} has {next(iter(found))} alone, and needs in_sum2 and "
                "counts: it is damaged, get it again"
            )
    datasets = reader.get_field("imatrix.datasets")
    return Imatrix(
        path,
        {name: ImatrixEntry(found["in_sum2"], found["counts"]) for name, found in parts.items()},
        datasets.contents() if datasets else (),
        max((int(found["counts"].max()) for found in parts.values()), default=None),
    )


def _read_legacy(path: Path) -> Imatrix:
    data = path.read_bytes()
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        if not 0 <= size <= len(data) - at:
            raise ValueError(f"{size} bytes announced at byte {at} of {len(data)}")
        at += size
        return data[at - size : at]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    entries = {}
    for _ in range(number()):
        name = take(number()).decode()
        calls = number()
        values = np.frombuffer(take(4 * number()), dtype="<f4").astype(np.float32)
        # values / calls is h: the number of rows is not kept.
        counts = torch.tensor([float(calls)])
        entries[name] = ImatrixEntry(torch.from_numpy(values), counts, placeholders=True)
    datasets = []
    if at < len(data):  # the oldest files end here
        number()  # of chunks
        datasets = [take(number()).decode()]
    return Imatrix(path, entries, datasets)


def write_imatrix(
    path: Path, entries: Mapping[str, ImatrixEntry], datasets: Sequence[str], chunk_size: int
) -> None:
    """Write an imatrix as GGUF, whole or not at all.

    Args:
        path: Where to write.
        entries: By llama.cpp's name of the weight.
        datasets: The names of the texts that it was measured on.
        chunk_size: How many tokens were run at a time.

    Raises:
        SaliencyFileError: The package gguf is missing.
        OSError: The file cannot be written.
    """
    gguf = _gguf(path)
    rows = max(int(entry.counts.max()) for entry in entries.values())
    with atomic_write(path) as file:
        writer = gguf.GGUFWriter(file.name, "")  # of no architecture, as llama.cpp's own
        writer.add_type(_TYPE)
        writer.add_array("imatrix.datasets", list(datasets))
        writer.add_uint32("imatrix.chunk_count", -(-rows // chunk_size))
        writer.add_uint32("imatrix.chunk_size", chunk_size)
        for name in sorted(entries):
            counts = entries[name].counts.view(-1, 1)
            sums = entries[name].sums.view(len(counts), -1)
            writer.add_tensor(f"{name}.in_sum2", sums.numpy())
            writer.add_tensor(f"{name}.counts", counts.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


class WeightNames:
    """llama.cpp's names of the weights of one architecture.

    Args:
        path: The imatrix, for messages.
        model_type: transformers' name of the architecture, that of the text model.
        blocks: How many layers the model has.
        prefix: What transformers puts before the names of the base model's weights.

    Raises:
        SaliencyFileError: The package gguf is missing, or does not know the architecture.
    """

    def __init__(self, path: Path, model_type: str, blocks: int, prefix: str):
        gguf = _gguf(path)
        plain = model_type.removesuffix("_text")
        wanted = _plain(_ARCHITECTURES.get(plain, plain))
        known = {_plain(name): (arch, name) for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        if wanted not in known:
            raise SaliencyFileError(
                f"{path}: what llama.cpp calls the weights of a {model_type!r} is not known to the "
                "package gguf: upgrade it, or measure the model with obim-saliency"
            )
        arch, name = known[wanted]
        self._map = gguf.get_tensor_name_map(arch, blocks)
        self._prefix = re.compile(rf"^(model|{re.escape(prefix)})\.")
        self._reordered = re.compile(rf"blk\.\d+\.{_REORDERED.get(name, '(?!)')}\.weight")

    def of(self, weight: str) -> list[str]:
        """Return the names of the entries that may hold a weight's h, the likeliest first.

        Args:
            weight: Its name in the model or in a checkpoint. Experts that are stored one by one
                share an entry.
        """
        stem = re.sub(r"(?<=experts\.)\d+\.", "", weight.removesuffix(".weight"))
        stem = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", stem)
        stem = re.sub(r"^\w+\.(layers\.\d+)\.mixer\.experts", r"model.\1.mlp.experts", stem)
        stems = [stem]
        for whole, parts in _PARTS.items():
            if stem.endswith(whole):
                stems += [stem.removesuffix(whole) + part for part in parts]
        bare = [(stem, self._prefix.sub("", stem)) for stem in stems]
        forms = [f for s, b in bare for f in (s, b, f"model.{b}", f"backbone.{b}")]
        found = [f"{name}.weight" for form in forms if (name := self._map.get_name(form))]
        found += [re.sub("ffn_(gate|up)_exps", "ffn_gate_up_exps", name) for name in found]
        # What else there may be is not collected by llama.cpp.
        return [
            name
            for name in dict.fromkeys(found)
            if (name.startswith("blk.") or name == "output.weight")
            and not _CONVOLUTION.search(name)
        ]

    def reorders_inputs(self, entry: str) -> bool:
        """Return whether llama.cpp has this weight's input features in another order."""
        return self._reordered.fullmatch(entry) is not None


def _plain(name: str) -> str:
    return re.sub("[-_]", "", name)
