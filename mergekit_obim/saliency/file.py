"""Reading and writing saliency files, format 1, the only link of the pre-pass and the merge.

One safetensors file per expert, each tensor named as the weight it scores. The
specification, for other tools that want to write such files, is docs/saliency_format.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from safetensors import SafetensorError, safe_open

from mergekit_obim.errors import RecipeError, SaliencyFileError, SaliencyNotFoundError, one_line
from mergekit_obim.kernels.gram import TEST_MATRIX, unpack_triangle
from mergekit_obim.saliency.fingerprint import Fingerprint

FORMAT = "mergekit-obim-saliency"
FORMAT_VERSION = "1"
# The name under which a model's own folder or repository carries its saliency.
PUBLISHED_NAME = "obim_saliency.safetensors"
_REQUIRED = ("format", "format_version", "form", "model")
_JSON_KEYS = {"calibration", "unscored", "experts", "fingerprint", "gram"}
# Keys of the header that are left out where they say nothing, so that the bytes of other files stay
# what they were.
_IF_ANY = ("experts", "gram")
_LONGEST_NAME = 120


class Gram(BaseModel):
    """What a file holds of the Gram matrices G = E[x xᵀ] of the layers' inputs, beside h.

    Attributes:
        columns: r, the columns of the sketches G Ω; ``full`` if the entries are G itself.
        test_matrix: How Ω was drawn (``kernels.gram``); empty for G itself.
        inputs: Weight -> the entry that holds the sketch, or the matrix, of its input.
        experts: Of a weight that is one expert's of a mixture, which of the entry's experts it is.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    columns: int | Literal["full"]
    test_matrix: str = ""
    inputs: dict[str, str]
    experts: dict[str, int] = {}

    @property
    def entries(self) -> set[str]:
        """The names of the entries that are sketches or matrices."""
        return set(self.inputs.values())


class SaliencyMetadata(BaseModel):
    """The metadata of a saliency file, of which only `form` and `model` must be given.

    Attributes:
        form: ``factored`` holds h, to be multiplied by δ² (equations 5 and 6); ``dense``
            holds δ²·h.
        model: The model reference that was measured.
        revision: Its revision, if it has one.
        architecture: The model's class name in its configuration.
        calibration: What it was measured on.
        unscored: The weights that have no entry, and why.
        experts: For each fused weight of a mixture of experts, `tokens`, how many each expert
            saw, and `pooled`, the experts that saw too few and have the mean h over all.
        fingerprint: A sample of the values of each stored tensor of the measured checkpoint.
        gram: Which entries are sketches of Gram matrices, or such matrices, and of which weights'
            inputs; None if the file has none.
        mergekit_obim_version: The version that wrote the file.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    form: Literal["factored", "dense"]
    model: str
    revision: str = ""
    architecture: str = ""
    calibration: dict[str, Any] = {}
    unscored: dict[str, str] = {}
    experts: dict[str, dict[str, list[int]]] = {}
    fingerprint: dict[str, Fingerprint] = {}
    gram: Gram | None = None
    mergekit_obim_version: str = ""

    @field_validator(*_JSON_KEYS, mode="before")
    @classmethod
    def _parse_json(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    def to_header(self) -> dict[str, str]:
        """Return the metadata as safetensors keeps them: all strings, structured values as JSON."""
        values = self.model_dump(mode="json")
        for key in _IF_ANY:
            if not values[key]:
                del values[key]
        for key in values.keys() & _JSON_KEYS:
            values[key] = json.dumps(values[key], sort_keys=True)
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **values}


def saliency_file_name(model: str) -> str:
    """Return the name of the file that the pre-pass writes for a model.

    A reference in plain characters keeps its parts readable; where something had to be
    dropped, a short hash of the whole reference keeps two models from sharing a file.

    >>> saliency_file_name("./models/math")
    'models--math.safetensors'
    >>> saliency_file_name("org/model@v1+org/lora")
    'org--model@v1+org--lora.safetensors'
    """
    plain = "+".join(
        part.removeprefix("./").rstrip("/").replace("/", "--") for part in model.split("+")
    )
    safe = re.sub(r"[^A-Za-z0-9._@+-]", "_", plain).lstrip(".-")[-_LONGEST_NAME:].lstrip(".-")
    # "--" and its like would read the same as a slash, or as one beside a hyphen.
    if not safe or safe != plain or re.search("--|-/|/-", model):
        safe = f"{safe or 'model'}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"
    return safe + ".safetensors"


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Write a file whole or not at all: under a temporary name beside it, which is then renamed.

    The file has the permissions that the umask leaves, also where it replaces another.

    Args:
        path: Where to write; its folder is made if needed.

    Yields:
        The temporary file, open for writing.

    Raises:
        OSError: The file cannot be written; one that was there before is there still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name.removeprefix('.')}.{secrets.token_hex(4)}.part")
    # Not tempfile: it makes private files, and what the umask is can only be found out by setting
    # it, which every thread of the process would notice.
    file = open(temporary, "xb")  # noqa: SIM115
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        RecipeError: The file cannot be written.
    """
    try:
        with atomic_write(path) as file:
            file.write(text.encode("utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written: {one_line(error)}") from error


def write_saliency(
    path: str | os.PathLike[str],
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], torch.Tensor],
    metadata: SaliencyMetadata,
) -> None:
    """Write a saliency file, whole or not at all, one tensor in memory at a time.

    safetensors' own writer wants every tensor at once, which a dense file the size of
    the model forbids, and orders the metadata differently in each process; the same
    measurement should give the same bytes.

    Args:
        path: Where to write; its folder is made if needed.
        shapes: Shape of every entry.
        read: Gives an entry, of any dtype and device. It is written as float32, whole Gram
            matrices as bfloat16.
        metadata: The file's metadata.

    Raises:
        SaliencyFileError: An entry has negative or non-finite values, or another shape.
        OSError: The file cannot be written.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": metadata.to_header()}
    products, offset = metadata.gram.entries if metadata.gram else set(), 0
    for name in sorted(shapes):
        dtype = _dtype_of(name, metadata)
        size = dtype.itemsize * math.prod(shapes[name])
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shapes[name]),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # safetensors aligns the data
    with atomic_write(path) as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in sorted(shapes):
            tensor = read(name).detach().to("cpu", _dtype_of(name, metadata)).contiguous()
            if tensor.shape != torch.Size(shapes[name]):
                raise SaliencyFileError(
                    f"{path}: entry {name} has shape {list(tensor.shape)}, "
                    f"but {list(shapes[name])} was announced"
                )
            _check_values(tensor, path, metadata.model, name, signed=name in products)
            tensor.view(-1).view(torch.uint8).numpy().tofile(file)  # numpy has no bfloat16


_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def _dtype_of(entry: str, metadata: SaliencyMetadata) -> torch.dtype:
    """Return the dtype of an entry: of 16 bits where it is a whole Gram matrix."""
    gram = metadata.gram
    whole = gram is not None and gram.columns == "full" and entry in gram.entries
    return torch.bfloat16 if whole else torch.float32


def _check_values(
    tensor: torch.Tensor, path: Path, model: str, name: str, *, signed: bool = False
) -> None:
    if not tensor.numel():
        return
    low, high = tensor.aminmax()
    # NaN compares false either way, so that one pass finds all that can be wrong.
    if not (low >= (-math.inf if signed else 0) and -math.inf < low and high < math.inf):
        found = "negative values" if low < 0 and not signed else "values that are not finite"
        raise SaliencyFileError(
            f"{path}: the saliency of {name} (model {model}) has {found}; "
            "measure it again with obim-saliency --overwrite"
        )


class SaliencyFile:
    """A saliency file that is open for reading; entries are read when they are asked for.

    Attributes:
        path: The file.
        metadata: Its metadata.
        shapes: Shape of every scored weight's entry.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Open a file and check its header.

        Args:
            path: The file.

        Raises:
            SaliencyNotFoundError: There is no such file.
            SaliencyFileError: The file is truncated, is not a safetensors file or not of this
                format and version, lacks a required key, has entries of another dtype than it must
                have, or sketches that do not go with its metadata.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise SaliencyNotFoundError(
                f"{self.path}: no such saliency file; write one with "
                f"`obim-saliency RECIPE {self.path.parent}`"
            )
        try:
            self._file = safe_open(str(self.path), framework="pt", device="cpu")
            header = self._file.metadata() or {}
            names = list(self._file.keys())
            slices = {name: self._file.get_slice(name) for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            raise SaliencyFileError(
                f"{self.path}: not a readable safetensors file ({error}); it may be truncated: "
                "write it again with obim-saliency --overwrite"
            ) from error
        self.metadata = self._parse(header)
        for name, view in slices.items():
            wanted = _dtype_of(name, self.metadata)
            if view.get_dtype() != _DTYPE_NAMES[wanted]:
                raise SaliencyFileError(
                    f"{self.path}: entry {name} (model {self.metadata.model}) is "
                    f"{view.get_dtype()}; format {FORMAT_VERSION} wants "
                    f"{str(wanted).removeprefix('torch.')}"
                )
        shapes = {name: tuple(view.get_shape()) for name, view in slices.items()}
        products = self.metadata.gram.entries if self.metadata.gram else set()
        self.shapes = {name: shape for name, shape in shapes.items() if name not in products}
        self._check_gram({name: shapes.get(name) for name in products})

    def _check_gram(self, shapes: Mapping[str, tuple[int, ...] | None]) -> None:
        """Check that each sketch, or matrix, fits the h of the weights that it is said to be of."""
        gram = self.metadata.gram
        if gram is None:
            return
        for name, entry in gram.inputs.items():
            shape, expert = shapes[entry] or (), gram.experts.get(name)
            per_expert = len(shape) == (2 if gram.columns == "full" else 3)
            experts = shape[0] if per_expert else 0
            # h has a number for each input feature, of every expert that the weight has.
            features = math.prod(self.shapes.get(name, (0,)))
            if per_expert and expert is None:
                features //= max(1, experts)
            columns = (
                (features * (features + 1) // 2,)
                if gram.columns == "full"
                else (features, min(gram.columns, features))
            )
            one_of_them = expert is None or 0 <= expert < experts
            if not features or shape[per_expert:] != columns or not one_of_them:
                raise SaliencyFileError(
                    f"{self.path}: entry {entry} (model {self.metadata.model}) is not the Gram "
                    f"matrix, or the sketch of it, that the h of {name} goes with; measure it "
                    "again with obim-saliency --overwrite"
                )

    def _parse(self, header: Mapping[str, str]) -> SaliencyMetadata:
        missing = [key for key in _REQUIRED if key not in header]
        if missing or header["format"] != FORMAT:
            raise SaliencyFileError(
                f"{self.path}: not a saliency file: "
                + (
                    f"the metadata lacks {', '.join(missing)}"
                    if missing
                    else f"its format is {header['format']!r}, not {FORMAT!r}"
                )
                + "; docs/saliency_format.md says what a file must have"
            )
        if header["format_version"] != FORMAT_VERSION:
            raise SaliencyFileError(
                f"{self.path}: saliency format version {header['format_version']!r}; this "
                f"mergekit-obim reads version {FORMAT_VERSION}: upgrade it, or measure "
                f"{header['model']} again"
            )
        try:
            return SaliencyMetadata.model_validate(header)
        except ValidationError as error:
            first = error.errors()[0]
            raise SaliencyFileError(
                f"{self.path}: metadata {'.'.join(map(str, first['loc']))} of model "
                f"{header['model']}: {first['msg']}"
            ) from error

    def check_values(self) -> None:
        """Read every entry once, but for whole Gram matrices, and check its values.

        Raises:
            SaliencyFileError: An entry has negative or non-finite values.
        """
        for name in self.shapes:
            _check_values(self[name], self.path, self.metadata.model, name)
        gram = self.metadata.gram
        if (
            gram and gram.columns != "full"
        ):  # those are gigabytes: they are checked as they are read
            for name in sorted(gram.entries):
                _check_values(self[name], self.path, self.metadata.model, name, signed=True)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return an entry on the CPU, float32 unless it is a whole Gram matrix.

        It may be mapped from the file, so it must not be changed in place.
        """
        file = self._file
        if self.metadata.form == "dense":
            # As large as the model: what was read would stay in memory while the file is open.
            file = safe_open(str(self.path), framework="pt", device="cpu")
        # Not get_slice(): that one follows torch's default device, which mergekit sets.
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def sketch(self, name: str) -> torch.Tensor | None:
        """Return Y = G Ω, G the Gram matrix of a weight's input (``kernels.gram``).

        Args:
            name: The weight's.

        Returns:
            [in, min(r, in)], or [experts, in, min(r, in)] of a weight that is several experts',
            float32 on the CPU, perhaps mapped from the file; None if there is no sketch of it.

        Raises:
            SaliencyFileError: The sketch was made with an Ω that this version does not know.
        """
        gram = self.metadata.gram
        if gram is None or gram.columns == "full" or name not in gram.inputs:
            return None
        if gram.test_matrix != TEST_MATRIX:
            raise SaliencyFileError(
                f"{self.path}: the sketches of model {self.metadata.model} were made with the test "
                f"matrix {gram.test_matrix!r}, and this mergekit-obim knows {TEST_MATRIX!r}: "
                "upgrade it, or measure the model again with obim-saliency --overwrite"
            )
        sketch, expert = self[gram.inputs[name]], gram.experts.get(name)
        return sketch if expert is None else sketch[expert]

    def gram(self, name: str) -> torch.Tensor | None:
        """Return the Gram matrix G of a weight's input, if the file has it whole.

        Args:
            name: The weight's.

        Returns:
            [in, in], or [experts, in, in] of a weight that is several experts', float32 on the
            CPU, with bfloat16's precision; None if there is none of it.

        Raises:
            SaliencyFileError: It has values that are not finite.
        """
        gram = self.metadata.gram
        if gram is None or gram.columns != "full" or name not in gram.inputs:
            return None
        packed, expert = self[gram.inputs[name]], gram.experts.get(name)
        packed = packed if expert is None else packed[expert]
        _check_values(packed, self.path, self.metadata.model, name, signed=True)
        return unpack_triangle(packed)
