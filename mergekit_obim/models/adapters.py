"""Merging adapters into their models, with a cache that is checked by content.

A recipe's ``model+adapter`` is merged once, into a folder of ``--lora-merge-cache``, and read from
there by both commands. mergekit takes any folder of that name for the merged model: also the empty
one that a failed merge leaves, the incomplete one that a killed merge leaves, and the one that was
made before the adapter was trained again. Here the folder holds a record of what it was made from,
and is used only while adapter and model are unchanged. Otherwise mergekit's own function makes it
again in a temporary folder, which is moved into place when it is complete.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelPath, ModelReference
from safetensors import safe_open
from transformers.utils.hub import cached_file, extract_commit_hash

from mergekit_obim.errors import AdapterError, told_as
from mergekit_obim.models.files import file_headers
from mergekit_obim.models.layers import block_of
from mergekit_obim.models.locking import locked
from mergekit_obim.recipe.references import identity
from mergekit_obim.saliency.file import PUBLISHED_NAME
from mergekit_obim.saliency.fingerprint import sample
from mergekit_obim.saliency.hub import download

LOG = logging.getLogger("mergekit_obim")

RECORD = "obim_merged_from.json"
_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in the order that peft looks
ADAPTER_FILES = (_CONFIG, *_WEIGHTS)
_merge_by_mergekit = ModelReference.merged

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class MergedAdapter:
    """The cached result of merging an adapter into its model, and whether it can be used.

    Attributes:
        folder: The folder in which mergekit looks for the merged model.
        rebuild_reason: Why the adapter has to be merged, or merged again; None if the folder can
            be used as it is.
        changed: Whether the folder is complete and made by us, but from another adapter or model
            than there is now.
    """

    folder: Path
    rebuild_reason: str | None = None
    changed: bool = False


def trust_by_content() -> None:
    """Make mergekit use :func:`merged` for every adapter, in this process."""
    ModelReference.merged = merged  # type: ignore[assignment, method-assign]


def merged(
    reference: ModelReference,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    lora_merge_dtype: str | None = None,
) -> ModelReference:
    """Return a model with its adapter merged in, merging it first if the cache lacks it.

    Args:
        reference: A model. Without an adapter it is returned as it is.
        cache_dir: The folder of merged adapters.
        trust_remote_code: Whether code that comes with the model may run.
        lora_merge_dtype: The dtype to merge in; None means the model's own. A cached result is
            used whatever its dtype.

    Raises:
        AdapterError: The adapter cannot be merged into this model, or there is no folder for the
            result. A failed merge leaves nothing behind.
    """
    if not reference.lora:
        return reference
    if not cache_dir:
        raise AdapterError(
            f"model {reference}: an adapter has to be merged into its model first: give "
            "--lora-merge-cache DIR, and the same to mergekit-yaml"
        )
    there = look_up(reference, cache_dir)
    if there.rebuild_reason:
        check_adapter(reference)
        with _in_one_line(reference), locked(there.folder):
            # Another process may have made it while this one waited.
            there = look_up(reference, cache_dir)
            if there.rebuild_reason:
                _make(reference, there, trust_remote_code, lora_merge_dtype)
    return ModelReference(model=ModelPath(path=str(there.folder)))


def _in_one_line(reference: ModelReference) -> AbstractContextManager[None]:
    # transformers, peft, the Hub and the disk raise many kinds of errors.
    what = f"model {reference}: the adapter cannot be merged into its model"
    return told_as(AdapterError, what)


def look_up(reference: ModelReference, cache_dir: str) -> MergedAdapter:
    """Find out whether the cache has an adapter merged, completely and from the present files.

    The adapter is read whole and the model by a sample, which takes seconds for large models too.

    Raises:
        AdapterError: The adapter or its model cannot be read.
    """
    assert reference.lora is not None
    # mergekit's own name for it: what was merged by us, its other methods find too.
    name = f"{reference.model._unique_id()}_{reference.lora._unique_id()}"
    folder = Path(cache_dir) / name
    if not os.path.lexists(folder):
        return MergedAdapter(folder, "the adapter has not been merged into its model yet")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        made_from, whole = dict(record["made from"]), record["files"] == _sizes(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return MergedAdapter(folder, f"there is no record of what {folder} was made from")
    if not whole:
        return MergedAdapter(folder, f"the files in {folder} have changed since they were written")
    with _in_one_line(reference):
        now = _made_from(reference)
    for part, digest in now.items():
        if made_from.get(part) != digest:
            return MergedAdapter(folder, f"{part} has changed since they were merged", changed=True)
    return MergedAdapter(folder)


def _make(
    reference: ModelReference,
    there: MergedAdapter,
    trust_remote_code: bool,
    lora_merge_dtype: str | None,
) -> None:
    """Merge in a temporary folder and move the result into place; the caller holds the lock."""
    folder = there.folder
    # Whoever began these held the lock, and has ended since.
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.part"):
        shutil.rmtree(left, ignore_errors=True)
    if os.path.lexists(folder):
        LOG.warning("model %s: %s: merging it again", reference, there.rebuild_reason)
    made_from = _made_from(reference)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        with warnings.catch_warnings():
            # The merge would go on with none, or part, of what the adapter is to change.
            warnings.filterwarnings("error", "Found missing adapter keys")
            made = Path(
                _merge_by_mergekit(
                    reference, str(aside), trust_remote_code, lora_merge_dtype
                ).model.path
            )
        if _made_from(reference) != made_from:
            raise AdapterError(
                f"model {reference}: adapter or model were written to while they were merged: run "
                "this again when that has ended"
            )
        record = {"made from": made_from, "files": _sizes(made)}
        (made / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        if os.path.lexists(folder):
            folder.rename(aside / "replaced")
        made.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_adapter(reference: ModelReference) -> None:
    """Check by the headers of the files alone that an adapter can be merged into its model.

    Raises:
        AdapterError: It cannot be. There are errors that only the merge itself can find.
    """
    with _in_one_line(reference):
        config, weights = _adapter_files(reference)
        kind = json.loads(config.read_text(encoding="utf-8"))
        folder = Path(reference.model.path)  # a model on the Hub has no files here yet
        misfit = _misfit(_shapes([weights]), _shapes(_model_files(folder)))
    if "num_virtual_tokens" in kind:
        raise AdapterError(
            f"model {reference}: the adapter is of the kind {kind.get('peft_type')}, which changes "
            "the model's inputs and not its weights: it cannot be merged; leave it out"
        )
    if os.path.exists(os.path.join(reference.model.path, _CONFIG)):
        raise AdapterError(
            f"model {reference}: {reference.model} has an {_CONFIG} beside its weights, so "
            "transformers would load that adapter too: move its adapter files elsewhere"
        )
    if misfit:
        trained_on = kind.get("base_model_name_or_path") or "another model"
        raise AdapterError(
            f"model {reference}: {misfit}; its {_CONFIG} says that it was trained on {trained_on}: "
            "name the model as it was then before the +"
        )


def adapter_warnings(reference: ModelReference) -> Iterator[str]:
    """Yield a warning if an adapter's configuration says that it was trained on another model."""
    with _in_one_line(reference):
        config, _ = _adapter_files(reference)
        trained_on = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    given = reference.model.path
    if not isinstance(trained_on, str) or identity(trained_on) == identity(given):
        return
    folders = [Path(path) for path in (trained_on, given) if os.path.isdir(path)]
    # The name that a folder here had on the Hub is not known, so it is not doubted.
    if (
        _sample_of(folders[0]) != _sample_of(folders[1])
        if len(folders) == 2
        else not folders and trained_on.lower() != given.lower()
    ):
        yield (
            f"model {reference}: the adapter was trained on {trained_on}, says its {_CONFIG}: is "
            f"{given} the same model?"
        )


def _misfit(adapter: Shapes, model: Shapes) -> str | None:
    """Return which of an adapter's tensors does not fit the model; None if all do.

    Only names that the model's files have too are compared: transformers may rename the others.
    """
    blocks = {block_of(name) for name in model}
    stacks = {block[0] for block in blocks if block}
    for key, shape in adapter.items():
        name = key.removeprefix("base_model.model.")
        block = block_of(name)
        if block and block[0] in stacks and block not in blocks:
            return f"the adapter changes {block[0]}.{block[1]}, which the model does not have"
        for kept_apart in (".modules_to_save.", ".original_module.", ".base_layer."):
            name = name.replace(kept_apart, ".")
        own = model.get(name)
        if own and own != shape:
            resized = own[1:] == shape[1:] and ("embed" in name or "head" in name)
            how = f", as after resize_token_embeddings({shape[0]})" if resized else ""
            return f"the adapter's {name} is {list(shape)}{how}, but the model's is {list(own)}"
        module, is_first_factor, _ = name.partition(".lora_A.weight")
        own = model.get(f"{module}.weight")
        second = adapter.get(key.replace(".lora_A.", ".lora_B."), ())
        if is_first_factor and own and len(own) == len(shape) == len(second) == 2:
            changes = second[0], shape[1]
            if changes not in (own, own[::-1]):  # GPT-2 stores its matrices the other way round
                return (
                    f"the adapter changes {module}.weight as a matrix of {list(changes)}, but the "
                    f"model's is {list(own)}"
                )
    return None


def _adapter_files(reference: ModelReference) -> tuple[Path, Path]:
    """Find an adapter's configuration and weights, in its folder or its repository."""
    lora = reference.lora
    assert lora is not None
    if os.path.isdir(lora.path):
        found = {path.name: path for path in Path(lora.path).iterdir()}
    else:
        found, unknown = {}, None
        for names in ((_CONFIG,), _WEIGHTS):
            path, why = download(lora.path, names, lora.revision)
            found |= {path.name: path} if path else {}
            unknown = unknown or why
        if unknown:
            raise AdapterError(f"model {reference}: its adapter cannot be read: {unknown}")
    weights = next((found[name] for name in _WEIGHTS if name in found), None)
    if _CONFIG not in found or weights is None:
        wanted = _CONFIG if _CONFIG not in found else " or ".join(_WEIGHTS)
        raise AdapterError(
            f"model {reference}: {lora} has no {wanted}: it is not an adapter as peft saves it; "
            "name the folder that holds one, or leave +… out if it is a whole model"
        )
    return found[_CONFIG], weights


def _made_from(reference: ModelReference) -> dict[str, str]:
    """Return digests of an adapter and of its model, by their names in messages."""
    adapter = hashlib.sha256()
    for path in _adapter_files(reference):
        with path.open("rb") as file:
            while block := file.read(2**20):
                adapter.update(block)
    model: list[Any] = [reference.override_architecture]
    folder = Path(reference.model.path)
    if folder.is_dir():
        # A file changed in place may keep its size and time: the sample finds that. Changes between
        # the sampled values change the file's time.
        stats = [(path.name, path.stat()) for path in _model_files(folder)]
        model += [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        model += [(folder / "config.json").read_text(encoding="utf-8"), _sample_of(folder)]
    else:
        config = cached_file(reference.model.path, "config.json", revision=reference.model.revision)
        model.append(extract_commit_hash(config, None))
    return {
        "the adapter": adapter.hexdigest(),
        "the adapter's model": hashlib.sha256(json.dumps(model).encode()).hexdigest(),
    }


def _sample_of(folder: Path) -> str:
    """Return a digest of a few bytes of each tensor; not of ``.bin`` files, which load whole."""
    digest = hashlib.sha256()
    for path in _model_files(folder):
        if path.suffix != ".safetensors":
            continue
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                values = sample(tensor.reshape(-1).view(torch.uint8))
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _model_files(folder: Path) -> list[Path]:
    """List a model's weight files, without adapters and saliency files in the same folder."""
    files = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return sorted(path for path in files if path.name not in (*_WEIGHTS, PUBLISHED_NAME))


def _shapes(files: Iterable[Path]) -> Shapes:
    return {
        name: header.shape
        for path in files
        for name, header in sorted(file_headers(path, path.name).items())
    }


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file in a merged adapter's folder except the record."""
    return {
        path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != RECORD
    }
