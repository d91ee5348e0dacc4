"""Merging experts that are on disk, as mergekit-yaml does, or in memory, with the same result."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias, cast, overload

import torch
import yaml
from mergekit import merge_methods
from mergekit.common import dtype_from_name
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.merge_methods.api import merge_state_dicts
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from torch import Tensor, nn

import mergekit_obim
from mergekit_obim.api.arguments import PathLike, check_options, refuse
from mergekit_obim.api.saliency import ExpertSaliency, write_saliency
from mergekit_obim.dry_run import read_config
from mergekit_obim.errors import RecipeError, told_as
from mergekit_obim.methods.planning import registry
from mergekit_obim.recipe import Document, Method, recipe_faults
from mergekit_obim.recipe.faults import raise_errors, warnings_of
from mergekit_obim.saliency.file import saliency_file_name

LOG = logging.getLogger("mergekit_obim")

# What a model may be given as: a folder or a name on the Hub, or its weights in memory.
Weights: TypeAlias = PathLike | Mapping[str, Tensor] | nn.Module
Scores: TypeAlias = PathLike | Mapping[str, Tensor]


@overload
def merge(
    base: Weights,
    experts: Mapping[str, Weights] | Sequence[Weights],
    saliencies: Scores | Mapping[str, Scores] | Sequence[Scores] | None = ...,
    method: str = ...,
    *,
    out: None = ...,
    **parameters: Any,
) -> dict[str, Tensor]: ...
@overload
def merge(
    base: Weights,
    experts: Mapping[str, Weights] | Sequence[Weights],
    saliencies: Scores | Mapping[str, Scores] | Sequence[Scores] | None = ...,
    method: str = ...,
    *,
    out: PathLike,
    **parameters: Any,
) -> Path: ...
def merge(
    base: Weights,
    experts: Mapping[str, Weights] | Sequence[Weights],
    saliencies: Scores | Mapping[str, Scores] | Sequence[Scores] | None = None,
    method: str = "obim",
    *,
    out: PathLike | None = None,
    dtype: str | torch.dtype | None = None,
    quiet: bool = False,
    options: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> dict[str, Tensor] | Path:
    """Merge experts of one base, bit for bit as ``mergekit-yaml`` would.

    Args:
        base: What the experts were fine-tuned from: a state dict or a module, or else a model's
            folder or name on the Hub.
        experts: The experts, each given as the base is: a mapping by names of your choice, or a
            list. Their order matters where ``order: recipe`` or the rotation asks for it.
        saliencies: Of each expert what :func:`measure` or :func:`read_saliency` returned, the
            path of a saliency file, or a plain mapping of scores: in a mapping by the experts'
            names or in a list in their order. A single path is a folder for all. Left out,
            folders use the saliency that they carry; methods without saliency need none.
        method: ``obim`` or another merge method of this package.
        out: Where to write the merged model, if the models are folders: with configuration,
            tokenizer, model card and the recipe. Saliencies from memory are put beside it, in
            ``out/saliency``, so that the recipe can be run again.
        dtype: What to merge in, such as ``"bfloat16"``; by default what the weights have.
        quiet: Show no progress.
        options: Options of ``mergekit-yaml`` by their names in Python, such as
            ``{"device": "cuda"}``, if the models are folders. State dicts are merged where they
            are.
        parameters: The method's parameters. One that each expert has for itself (``density``,
            ``weight``, …) takes a value for all, a list in the experts' order, or a mapping by
            their names. Write ``lambda_`` for ``lambda``.

    Returns:
        The merged state dict; with ``out``, that folder.

    Raises:
        RecipeError: A parameter is wrong, or the models cannot be merged with each other.
        SaliencyFileError: A saliency is not of this model's weights.
        SaliencyNotFoundError: An expert has no saliency.

    Example:
        >>> import mergekit_obim, torch
        >>> base = {"layer.weight": torch.zeros(1, 4)}
        >>> experts = {
        ...     "math": {"layer.weight": torch.tensor([[3.0, 1.0, 1.0, 0.0]])},
        ...     "code": {"layer.weight": torch.tensor([[2.0, 2.0, 0.0, 5.0]])},
        ... }
        >>> saliencies = {name: {"layer.weight": torch.ones(1, 4)} for name in experts}
        >>> mergekit_obim.merge(base, experts, saliencies, density={"math": 0.25, "code": 0.5})
        {'layer.weight': tensor([[3., 2., 0., 5.]])}
    """
    mergekit_obim.register()
    # mergekit keeps what it read of a folder for the life of the process; a notebook's cell may
    # have written another model there since.
    LoaderCache().loaders.clear()
    known = registry().get(method)
    if known is None or not known.ours:
        ours = sorted(name for name, one in registry().items() if one.ours)
        raise RecipeError(f"method: {method!r} is none of mergekit-obim's: {', '.join(ours)}")
    named = _named_experts(experts)
    stored = {isinstance(model, str | os.PathLike) for model in (base, *named.values())}
    if len(stored) > 1:
        raise RecipeError(
            "merge: some models are folders and some are in memory: load all of them or none"
        )
    shared, own = _parameters(known, list(named), parameters)
    scores = _by_expert("saliencies", saliencies, list(named))
    if scores and "saliency" not in known.parameters:
        raise RecipeError(f"saliencies: {method} reads none: leave them out")
    recipe: dict[str, Any] = {"merge_method": method, "parameters": shared}
    if dtype is not None:
        recipe["dtype"] = str(dtype).removeprefix("torch.")
    with TemporaryDirectory(prefix="mergekit-obim-") as made:
        if stored == {False}:
            refuse("models in memory", {"out": out, "options": options})
            models = {name: _state_dict(model) for name, model in named.items()}
            _give_saliency(scores, own, {name: name for name in named}, Path(made))
            return _merge_state_dicts(known, _state_dict(base), models, recipe, own)
        names = {name: os.fspath(cast(PathLike, model)) for name, model in named.items()}
        _give_saliency(scores, own, names, Path(out, "saliency") if out else Path(made, "saliency"))
        recipe["base_model"] = os.fspath(cast(PathLike, base))
        recipe["models"] = [
            {"model": model, "parameters": own[name]} for name, model in names.items()
        ]
        return _merge_folders(recipe, out, Path(made, "merged"), options, quiet=quiet)


def _named_experts(experts: Any) -> dict[str, Weights]:
    if isinstance(experts, str | os.PathLike | nn.Module) or (
        isinstance(experts, Mapping) and any(isinstance(one, Tensor) for one in experts.values())
    ):
        raise RecipeError("experts: give a list or a mapping of experts, even if it is one")
    if isinstance(experts, Mapping):
        return {str(name): model for name, model in experts.items()}
    return {
        os.fspath(model) if isinstance(model, str | os.PathLike) else f"expert-{number}": model
        for number, model in enumerate(experts, 1)
    }


def _parameters(
    method: Method, names: Sequence[str], parameters: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Sort a method's parameters into those that all models share and each expert's own."""
    shared: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in parameters.items():
        key = key.removesuffix("_")  # `lambda` is a word of Python's
        spec = method.parameters.get(key)
        several = isinstance(value, Mapping | list | tuple)
        if several and spec is not None and spec.scope != "shared":
            for name, one in _by_expert(key, value, names).items():
                own[name][key] = one
        else:
            shared[key] = value  # the recipe's reader says so if there is none of that name
    return shared, own


def _by_expert(what: str, values: Any, names: Sequence[str]) -> dict[str, Any]:
    """Give each expert its own of some values, which stand by name or in the experts' order."""
    if values is None:
        return {}
    if isinstance(values, str | os.PathLike):
        return dict.fromkeys(names, values)
    if isinstance(values, Mapping) and not isinstance(values, ExpertSaliency):
        for name in values:
            if name not in names:
                raise RecipeError(f"{what}: {name!r} is no expert's name: {', '.join(names)}")
        return dict(values)
    ordered = [values] if isinstance(values, ExpertSaliency) else list(values)
    if len(ordered) != len(names):
        raise RecipeError(f"{what}: there are {len(ordered)} for {len(names)} experts")
    return dict(zip(names, ordered, strict=True))


def _give_saliency(
    scores: Mapping[str, Any],
    own: Mapping[str, dict[str, Any]],
    models: Mapping[str, str],
    folder: Path,
) -> None:
    """Set each expert's `saliency` to a path; what is in memory is written to a folder for that."""
    for name, score in scores.items():
        if isinstance(score, Mapping):
            path = folder / saliency_file_name(models[name])
            metadata = {} if isinstance(score, ExpertSaliency) else {"model": models[name]}
            score = write_saliency(path, score, **metadata)
        if score is not None:
            own[name]["saliency"] = os.fspath(score)


def _state_dict(model: Any) -> Mapping[str, Tensor]:
    return model.state_dict() if isinstance(model, nn.Module) else model


def _merge_state_dicts(
    method: Method,
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    recipe: dict[str, Any],
    own: Mapping[str, dict[str, Any]],
) -> dict[str, Tensor]:
    base_id = "base" if "base" not in experts else "the base"
    models = [{"model": {"model": {"path": name}}, "parameters": own[name]} for name in experts]
    recipe |= {"base_model": {"model": {"path": base_id}}, "models": models}
    faults = list(recipe_faults(Document(recipe), registry()))
    raise_errors(faults)
    for fault in warnings_of(faults):
        LOG.warning(str(fault))
    parameters = {k: v for k, v in recipe["parameters"].items() if k in method.parameters}
    defaults = {p.name: p.default for p in merge_methods.get(method.name).spec.parameters}
    for key in {key for settings in own.values() for key in settings}:
        # mergekit wants a value for each expert, or one for all.
        default = parameters.get(key, defaults[key])
        parameters[key] = {name: own[name].get(key, default) for name in experts}
    if "saliency" in defaults and parameters.get("statistics") != "none":
        _check_all_have_saliency({**defaults, **parameters}, list(experts))
    # Of tied weights one is merged, and goes by all its names again: ranked one by one, they
    # would come apart.
    aliases = _aliases([base, *experts.values()])
    kept: dict[Hashable, Mapping[str, Tensor] | nn.Module] = {
        name: {key: t for key, t in weights.items() if key not in aliases}
        for name, weights in {base_id: base, **experts}.items()
    }
    dtype = dtype_from_name(recipe.get("dtype"))
    kinds = TypeError, ValueError, RuntimeError
    with told_as(RecipeError, "these state dicts cannot be merged", kinds):
        merged = merge_state_dicts(
            kept, method.name, base=base_id, parameters=parameters, dtype=dtype
        )
    return {name: merged[aliases.get(name, name)] for name in base}


def _check_all_have_saliency(parameters: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        criterion, file = (
            value[name] if isinstance(value, Mapping) else value
            for value in (parameters["criterion"], parameters["saliency"])
        )
        if criterion == "saliency" and file is None:
            raise RecipeError(
                f"model {name}: has no saliency: make one with mergekit_obim.measure and give it "
                'in saliencies, or merge with criterion="magnitude"'
            )


def _aliases(models: Sequence[Mapping[str, Tensor]]) -> dict[str, str]:
    """Map each further name of a tensor that goes by several to its first, if in every model."""
    found: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name in models[0]:
        if not all(name in weights and weights[name].numel() for weights in models):
            continue
        if any(weights[name].is_meta for weights in models):
            continue  # offloaded: all such have the address 0
        places = tuple(
            (t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (w[name] for w in models)
        )
        if (first := found.setdefault(places, name)) != name:
            aliases[name] = first
    return aliases


def _merge_folders(
    recipe: dict[str, Any],
    out: PathLike | None,
    scratch: Path,
    options: Mapping[str, Any] | None,
    *,
    quiet: bool,
) -> dict[str, Tensor] | Path:
    check_options(options, list(MergeOptions.model_fields))
    wanted: dict[str, Any] = {"quiet": quiet, **(options or {})}
    if out is None:
        wanted |= {"copy_tokenizer": False, "write_model_card": False, "safe_serialization": True}
    folder = Path(out) if out is not None else scratch
    config = read_config(recipe)
    source = yaml.safe_dump(recipe, sort_keys=False)
    run_merge(config, str(folder), MergeOptions(**wanted), config_source=source)
    if out is not None:
        return folder
    merged: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        # Copies, as the files are removed in a moment.
        merged |= {name: tensor.clone() for name, tensor in load_file(path).items()}
    return merged
