"""Opening a model: its configuration and its checkpoint, as mergekit reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import huggingface_hub
import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.io import LazyTensorLoader
from mergekit.io.lazy_tensor_loader import ShardedTensorIndex
from transformers import PretrainedConfig

from mergekit_obim.errors import CheckpointError, quoted, told_as
from mergekit_obim.models.adapters import ADAPTER_FILES
from mergekit_obim.models.adapters import merged as merge_adapter
from mergekit_obim.models.checkpoint import StreamingReader, tensor_of
from mergekit_obim.models.faults import model_fault
from mergekit_obim.models.files import TensorHeader, read_headers, why_unreadable
from mergekit_obim.models.quantised import quantised
from mergekit_obim.recipe.faults import Fault
from mergekit_obim.saliency.fingerprint import Fingerprint, fingerprint

_SINGLE = ("model.safetensors", "pytorch_model.bin")


class Access(Protocol):
    """The options for reading models, which both mergekit's and our option classes have."""

    @property
    def trust_remote_code(self) -> bool: ...
    @property
    def transformers_cache(self) -> str | None: ...
    @property
    def lora_merge_cache(self) -> str | None: ...


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A model of a recipe, opened: its configuration and its checkpoint, without reading weights.

    Attributes:
        reference: The model as the recipe names it.
        merged: The model whose weights are used: the same, or the one with its adapter merged in.
        config: Its configuration.
        loader: mergekit's reader of its checkpoint.
    """

    reference: ModelReference
    merged: ModelReference
    config: PretrainedConfig
    loader: LazyTensorLoader

    @property
    def label(self) -> str:
        """The model's name in messages, as the recipe writes it."""
        return str(self.reference)

    @property
    def folder(self) -> Path:
        """The folder that mergekit reads the weights from."""
        return Path(self.loader.index.base_path)

    @property
    def names(self) -> list[str]:
        """The names of all stored tensors."""
        return list(self.loader.index.tensor_paths)

    @property
    def commit(self) -> str:
        """The commit of a model in the Hub's cache; empty for other folders."""
        return self.folder.name if self.folder.parent.name == "snapshots" else ""

    @property
    def headers(self) -> dict[str, TensorHeader]:
        """The dtype, shape and file of every stored tensor whose file can be read."""
        return self._read[0]

    @property
    def is_readable(self) -> bool:
        """Whether every file that the index names can be read."""
        return not self._read[1]

    @property
    def misread(self) -> list[str]:
        """The weight files in the folder that transformers would load and mergekit does not."""
        # transformers applies an adapter that lies beside full weights.
        found = list(ADAPTER_FILES) if (self.folder / ADAPTER_FILES[0]).exists() else []
        # Where there are both, mergekit takes the index's shards, transformers the single file.
        shards = {shard.filename for shard in self.loader.index.shards}
        found += [
            name
            for name in _SINGLE
            if name not in shards and (self.folder / f"{name}.index.json").exists()
        ]
        return [name for name in found if (self.folder / name).exists()]

    @property
    def unread(self) -> list[str]:
        """The weight files in the folder that are not of the set of weights that mergekit reads."""
        found = list(self.misread)
        if self.loader.index.is_safetensors and not self.commit:
            # Nobody reads these beside safetensors, but their owner may think so. In the Hub's
            # cache both forms are of one commit.
            older = (_SINGLE[1], f"{_SINGLE[1]}.index.json")
            found += [name for name in older if (self.folder / name).exists()]
        return list(dict.fromkeys(found))

    def load(self, name: str) -> torch.Tensor:
        """Read a stored tensor, lazily where its file allows that.

        Raises:
            KeyError: There is none of that name.
            CheckpointError: Its file cannot be read.
        """
        return tensor_of(self.loader, name)

    def shape(self, name: str) -> torch.Size | None:
        """The shape of a stored tensor, or None if there is none of that name."""
        header = self.headers.get(name)
        return torch.Size(header.shape) if header else None

    def faults(self) -> Iterator[Fault]:
        """Yield an error for each unusable file, and a warning if files will be left unread."""
        for fault in self._read[1]:
            yield model_fault("error", f"model {self.label}: {fault}")
        if unread := self.unread:
            them = "it" if len(unread) == 1 else "them"
            what, way = "two sets of weights", ""
            if unread[0] in ADAPTER_FILES:
                what = "an adapter beside full weights"
                way = ", or merge the adapter by writing MODEL+ADAPTER"
            yield model_fault(
                "warning",
                f"model {self.label}: its folder holds {what}: {', '.join(unread)} will not be "
                f"read, as mergekit does not merge {them}; move {them} out of the folder{way}",
            )

    @contextmanager
    def files_to_load(self) -> Iterator[ModelPath]:
        """Let transformers load exactly the files that mergekit reads.

        Yields:
            Where to load from: the model itself, or a temporary folder of links to its files
            where transformers would take others of them than mergekit does.

        Raises:
            CheckpointError: Links cannot be made here.
        """
        misread = self.misread
        if not misread:
            yield self.merged.model
            return
        with TemporaryDirectory(prefix="mergekit-obim-") as links:
            try:
                for path in self.folder.iterdir():
                    if path.name not in misread:
                        Path(links, path.name).symlink_to(path.resolve())
            except OSError as error:  # Windows asks for a right to make links
                raise CheckpointError(
                    f"model {self.label}: {', '.join(misread)} must not be read: move "
                    f"these files out of {self.folder} ({quoted(error)})"
                ) from error
            yield ModelPath(path=links)

    def fingerprints(self) -> dict[str, Fingerprint]:
        """Return the fingerprint of every stored floating-point tensor, by its name."""
        reader = StreamingReader(self.loader)
        tensors = ((name, reader.load(name)) for name in self.names)
        prints = {
            name: fingerprint(tensor) for name, tensor in tensors if tensor.is_floating_point()
        }
        reader.close()
        return prints

    def digest(self) -> str:
        """Return the sha256 of all fingerprints in hex, which identifies the checkpoint."""
        prints = self.fingerprints()
        lines = "".join(f"{name} {prints[name].model_dump_json()}\n" for name in sorted(prints))
        return hashlib.sha256(lines.encode()).hexdigest()

    @cached_property
    def _read(self) -> tuple[dict[str, TensorHeader], list[str]]:
        return read_headers(self.loader.index)


def open_model(reference: ModelReference, access: Access) -> OpenModel:
    """Open a model of a recipe, merging its adapter into it first if it has one.

    Raises:
        CheckpointError: It cannot be read; the message names the file where one is to blame.
        AdapterError: Its adapter cannot be merged into it.
    """
    config = open_config(reference, access)
    merged, loader = open_checkpoint(reference, access)
    return OpenModel(reference, merged, config, loader)


def open_checkpoint(
    reference: ModelReference, access: Access
) -> tuple[ModelReference, LazyTensorLoader]:
    """Open a model's checkpoint without its configuration.

    Returns:
        The model with its adapter merged in, if it has one, and the reader of its weights.

    Raises:
        CheckpointError: It cannot be read; the message names the file where one is to blame.
        AdapterError: Its adapter cannot be merged into it.
    """
    merged = merge_adapter(reference, access.lora_merge_cache, access.trust_remote_code)
    with told_as(CheckpointError, f"model {reference}: cannot be read"):
        folder = Path(merged.local_path(cache_dir=access.transformers_cache))
    try:
        return merged, LazyTensorLoader.from_disk(str(folder), lazy_unpickle=False)
    except Exception as error:  # safetensors, torch and json have kinds of their own
        why = "; ".join(why_unreadable(folder)) or quoted(error)
        raise CheckpointError(f"model {reference}: cannot be read: {why}") from error


def local_folder(place: ModelPath, cache_dir: str | None) -> Path | None:
    """Return where a model's or an adapter's files are on this machine, None if they are not.

    Args:
        place: A path, or a repository on the Hub.
        cache_dir: The Hub cache to look in; None is the default one.
    """
    if Path(place.path).exists():
        return Path(place.path)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                place.path, revision=place.revision, cache_dir=cache_dir, local_files_only=True
            )
        )
    except (OSError, ValueError):  # both of which the Hub's errors are
        return None


def inspect_file(path: str) -> Iterator[Fault]:
    """Inspect a bare weight file, or a folder of them, as `mergekit-pytorch` merges them.

    Args:
        path: The file or folder; it is also the name to call it by.

    Yields:
        An error if it cannot be read or holds quantised weights.
    """
    place, index = Path(path), ShardedTensorIndex
    single = place.is_file()
    try:
        headers, faults = read_headers(index.from_file(path) if single else index.from_disk(path))
    except Exception as error:  # safetensors, torch and json have kinds of their own
        found = why_unreadable(place.parent if single else place, place.name)
        headers, faults = {}, found or [f"cannot be read: {quoted(error)}"]
    for fault in faults:
        yield model_fault("error", f"model {path}: {fault}")
    yield from quantised(path, None, headers)


def open_config(reference: ModelReference, access: Access) -> PretrainedConfig:
    """Read a model's configuration.

    Raises:
        CheckpointError: There is no configuration, or it needs code that may not run.
    """
    try:
        return reference.config(trust_remote_code=access.trust_remote_code)
    except Exception as error:
        refuse_code(str(reference), "it", error)
        if Path(reference.model.path, ADAPTER_FILES[0]).is_file():
            raise CheckpointError(
                f"model {reference}: is an adapter without its model: write MODEL+{reference}"
            ) from error
        raise CheckpointError(
            f"model {reference}: neither a model folder nor a model on the Hub: {quoted(error)}"
        ) from error


def refuse_code(label: str, what: str, error: Exception) -> None:
    """Raise a better error if transformers failed because a model's own code may not run.

    Args:
        label: The model's name in messages.
        what: The part of the model that comes with code.
        error: What transformers raised; any other reason is left to the caller.

    Raises:
        CheckpointError: The code may not run; the message says how to allow it.
    """
    if "trust_remote_code" in str(error):
        raise CheckpointError(
            f"model {label}: {what} comes with code of its own: if you trust that, give "
            "--trust-remote-code, and the same to mergekit-yaml"
        ) from error
