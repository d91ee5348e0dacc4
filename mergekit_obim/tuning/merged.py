"""Merging a candidate into a loaded model, tensor by tensor, without a checkpoint on disk.

mergekit plans the candidate as mergekit-yaml would, and its executor merges one tensor after
another; each is copied into the parameter of that name. So memory holds one model, and what one
tensor needs of every expert, and the weights are bit for bit those that mergekit-yaml writes.

That asks for a model whose parameters are what the merge makes. Where a checkpoint is stored in
another layout (a mixture's experts one by one), where parameters are tied or moved, and where
weights are offloaded to CPU or disk, a candidate is merged to a temporary folder and loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import torch
from mergekit.common import ModelPath, ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_obim.calibration.loading import loaded
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.dry_run import plan
from mergekit_obim.errors import CheckpointError, RecipeError
from mergekit_obim.models.completeness import missing_tensors
from mergekit_obim.models.names import first_names, sources_of
from mergekit_obim.models.opened import OpenModel, open_model

Merge: TypeAlias = Callable[[MergeConfiguration], AbstractContextManager[PreTrainedModel]]
"""Merges a recipe; the model is usable inside the context, until the next merge."""


@contextmanager
def merging(
    base: OpenModel,
    recipe: MergeConfiguration,
    dtype: str | None,
    scratch: Path,
    options: RunOptions,
) -> Iterator[Merge]:
    """Prepare for merging recipes that differ in method and parameters only.

    Args:
        base: The recipes' base, opened.
        recipe: One of them.
        dtype: What the merged model computes in; None for what it is merged to.
        scratch: A folder on a disk that can hold a merged model, if one has to be written.
        options: Where and how the merged model runs. Its tensors are merged there too, unless the
            model is spread by a device map.

    Yields:
        What merges a recipe.

    Raises:
        ObimError: The base cannot be loaded.
    """
    names = [info.name for info, _ in plan(recipe, merge_options(options), inspected=True)]
    runs_in = dtype or recipe.out_dtype or recipe.dtype
    with loaded("the base", base, runs_in, options, scratch / "offload") as shell:
        places = _places(shell, names)
        if places is not None:
            yield partial(_merged_in_memory, shell, places, options)
            return
    yield partial(_merged_on_disk, dtype, scratch, options)


def merge_options(options: RunOptions) -> MergeOptions:
    """Return mergekit's options for a merge like ``mergekit-yaml --device``'s, without a card."""
    return MergeOptions(
        device="cpu" if options.device_map else options.device,
        trust_remote_code=options.trust_remote_code,
        transformers_cache=options.transformers_cache,
        lora_merge_cache=options.lora_merge_cache,
        copy_tokenizer=False,
        write_model_card=False,
        quiet=True,
    )


def _places(model: PreTrainedModel, names: Collection[str]) -> dict[str, Tensor] | None:
    """Return where each merged tensor goes in a model; None if it is not that simple."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return None  # offloaded
    sources = sources_of(model, names)
    first = first_names(model)
    filled = [first[name] for name in sources.renamed if name in first]
    if sources.conversions or sources.unused or sorted(filled) != sorted(set(first.values())):
        return None
    stored = model.state_dict(keep_vars=True)
    if any(len(own) > 1 for own in sources.renamed.values()):
        return None
    return {own[0]: stored[name] for name, own in sources.renamed.items()}


@contextmanager
def _merged_in_memory(
    model: PreTrainedModel,
    places: Mapping[str, Tensor],
    options: RunOptions,
    recipe: MergeConfiguration,
) -> Iterator[PreTrainedModel]:
    planned = plan(recipe, merge_options(options), inspected=True)
    outputs = {task: info for info, task in planned}
    device = merge_options(options).device
    executor = Executor(list(outputs), math_device=torch.device(device or "cpu"))
    with torch.no_grad():
        for task, tensor in executor.run(quiet=True):
            info = outputs[task]
            place = places.get(info.name)
            if tensor is None or place is None or tensor.shape != place.shape:
                found = "nothing" if tensor is None else str(list(tensor.shape))
                raise RecipeError(
                    f"tensor {info.name}: the merge makes {found} of it, where the base has "
                    f"{'none' if place is None else list(place.shape)}: merge it by mergekit-yaml, "
                    "and compare merged models with obim-eval"
                )
            dtype = dtype_from_name(info.force_dtype or recipe.out_dtype)
            place.copy_(tensor if dtype is None else tensor.to(dtype))
    LoaderCache().flush_all()  # mergekit's own methods keep every file that they read mapped
    yield model


@contextmanager
def _merged_on_disk(
    dtype: str | None, scratch: Path, options: RunOptions, recipe: MergeConfiguration
) -> Iterator[PreTrainedModel]:
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch) as folder:
        run_merge(recipe, folder, merge_options(options))
        opened = open_model(ModelReference(model=ModelPath(path=folder)), options)
        offload = Path(folder, "offload")
        with loaded("the merged model", opened, dtype, options, offload) as model:
            if missing := missing_tensors(model, opened, sources_of(model, opened.names)):
                raise CheckpointError(f"the merged model: {missing}")
            yield model
