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
from mergekit_obim.saliency.fingerprint import Fingerprint

FORMAT = "mergekit-obim-saliency"
FORMAT_VERSION = "1"
# The name under which a model's own folder or repository carries its saliency.
PUBLISHED_NAME = "obim_saliency.safetensors"
_REQUIRED = ("format", "format_version", "form", "model")
_JSON_KEYS = {"calibration", "unscored", "experts", "fingerprint"}
_LONGEST_NAME = 120


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
    mergekit_obim_version: str = ""

    @field_validator(*_JSON_KEYS, mode="before")
    @classmethod
    def _parse_json(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    def to_header(self) -> dict[str, str]:
        """Return the metadata as safetensors keeps them: all strings, structured values as JSON."""
        values = self.model_dump(mode="json")
        if not self.experts:  # so that the bytes of other models' files stay what they were
            del values["experts"]
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
        read: Gives an entry, of any dtype and device; it is written as float32.
        metadata: The file's metadata.

    Raises:
        SaliencyFileError: An entry has negative or non-finite values, or another shape.
        OSError: The file cannot be written.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": metadata.to_header()}
    offset = 0
    for name in sorted(shapes):
        size = 4 * math.prod(shapes[name])
        header[name] = {
            "dtype": "F32",
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
            tensor = read(name).detach().to("cpu", torch.float32).contiguous()
            if tensor.shape != torch.Size(shapes[name]):
                raise SaliencyFileError(
                    f"{path}: entry {name} has shape {list(tensor.shape)}, "
                    f"but {list(shapes[name])} was announced"
                )
            _check_values(tensor, path, metadata.model, name)
            tensor.numpy().tofile(file)


def _check_values(tensor: torch.Tensor, path: Path, model: str, name: str) -> None:
    if not tensor.numel():
        return
    low, high = tensor.aminmax()
    # NaN compares false either way, so that one pass finds all that can be wrong.
    if not (low >= 0 and high < math.inf):
        found = "negative values" if low < 0 else "values that are not finite"
        raise SaliencyFileError(
            f"{path}: the saliency of {name} (model {model}) has {found}; "
            "measure it again with obim-saliency --overwrite"
        )


class SaliencyFile:
    """A saliency file that is open for reading; entries are read when they are asked for.

    Attributes:
        path: The file.
        metadata: Its metadata.
        shapes: Shape of every entry.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Open a file and check its header.

        Args:
            path: The file.

        Raises:
            SaliencyNotFoundError: There is no such file.
            SaliencyFileError: The file is truncated, is not a safetensors file or not of this
                format and version, lacks a required key, or has entries that are not float32.
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
            if view.get_dtype() != "F32":
                raise SaliencyFileError(
                    f"{self.path}: entry {name} (model {self.metadata.model}) is "
                    f"{view.get_dtype()}; format {FORMAT_VERSION} wants float32"
                )
        self.shapes = {name: tuple(view.get_shape()) for name, view in slices.items()}

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
        """Read every entry once and check its values.

        Raises:
            SaliencyFileError: An entry has negative or non-finite values.
        """
        for name in self.shapes:
            _check_values(self[name], self.path, self.metadata.model, name)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return an entry, float32 on the CPU.

        It may be mapped from the file, so it must not be changed in place.
        """
        file = self._file
        if self.metadata.form == "dense":
            # As large as the model: what was read would stay in memory while the file is open.
            file = safe_open(str(self.path), framework="pt", device="cpu")
        # Not get_slice(): that one follows torch's default device, which mergekit sets.
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor
