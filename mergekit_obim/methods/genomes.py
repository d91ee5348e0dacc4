"""The genomes of mergekit-evolve (arXiv 2403.13187) for our merge methods.

A genome says which models are merged and how; a *genotype*, the vector that CMA-ES proposes, makes
a recipe of it. For mergekit's own methods these classes do what mergekit's do.

Only ``evolve_hooks`` imports this module, once mergekit-evolve has imported its own genome.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.evo.config import EvolMergeConfiguration
from mergekit.evo.genome import InvalidGenotypeError, ModelGenome, ModelGenomeDefinition
from pydantic import model_validator

from mergekit_obim.errors import GenomeError, ObimError, SaliencyNotFoundError
from mergekit_obim.methods.obim import Obim
from mergekit_obim.methods.planning import PlannedInput, PlannedMethod, registry
from mergekit_obim.methods.regmean import SHRINK
from mergekit_obim.recipe import Document, Fault, recipe_faults
from mergekit_obim.recipe.faults import nearest, raise_errors, warnings_of
from mergekit_obim.saliency.locate import locate

LOG = logging.getLogger("mergekit_obim")

# What is evolved of a method's parameters, where the genome does not set it, and where the search
# starts; None is the parameter's own default.
_STARTS = {
    "weight": 1.0,
    "density": None,
    "lambda": 1.0,
    "shrink": SHRINK["measured"],
    "stretch": 1.0,
}
_SHARES = ("density", "shrink")  # from 0 to 1


class GenomeDefinition(ModelGenomeDefinition, frozen=True):
    """A genome, as it stands in mergekit-evolve's configuration.

    Attributes:
        parameters: The parameters that every candidate has, as under ``parameters`` in a recipe;
            they are not evolved. Only for our methods.
        original_models: The models as the user named them. mergekit-evolve merges copies of them,
            but their saliency files go by their own names. Filled in here.
    """

    parameters: Any = None
    original_models: list[ModelReference] | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, content: Any) -> Any:
        """Refuse unknown keys, and remember the models' names.

        Raises:
            GenomeError: mergekit would ignore a key.
        """
        if not isinstance(content, Mapping) or our_method(content.get("merge_method")) is None:
            return content
        for key in content:
            if key not in cls.model_fields:
                known = [name for name in cls.model_fields if name != "original_models"]
                near = nearest(str(key), known)
                hint = f"did you mean {near}?" if near else f"it has {', '.join(known)}"
                raise GenomeError(f"genome: a genome has no key {key!r}; {hint}")
        return {"original_models": content.get("models"), **content}

    @model_validator(mode="after")
    def validate(self) -> GenomeDefinition:  # type: ignore[override]  # in place of mergekit's
        """Check all that can be checked before mergekit-evolve copies the models.

        Raises:
            GenomeError: No candidate of this genome could be merged; the message is one line.
        """
        method = our_method(self.merge_method)
        if method is None:
            super().validate()  # type: ignore[operator]
            return self
        if self.parameters is not None and not isinstance(self.parameters, Mapping):
            raise GenomeError(
                f"genome: parameters: {self.parameters!r} is no mapping of parameters to values, "
                "such as `saliency: ./saliency`"
            )
        try:
            faults = list(recipe_faults(Document(self._recipe()), registry()))
            raise_errors(faults)
            for model in self.models:
                if model == self.base_model:
                    raise GenomeError(f"model {model} is the base: leave it out of models")
            self._check_values(method)
            if self.original_models != self.models:  # mergekit-evolve's copies: all this was said
                return self
            self.saliency_settings()
        except ObimError as error:
            raise GenomeError(f"genome: {error.message}") from error
        for fault in warnings_of(faults):
            LOG.warning("genome: %s", fault)
        return self

    @property
    def fixed(self) -> dict[str, Any]:
        """The parameters that all candidates have."""
        normalize = {} if self.normalize is None else {"normalize": self.normalize}
        return {**normalize, **(self.parameters or {})}

    @property
    def evolved(self) -> tuple[list[str], list[str]]:
        """The names of the parameters that are evolved: those of each expert, those of all."""
        method = our_method(self.merge_method)
        assert method is not None
        names = [p for p in method.spec.parameters if p.name in _STARTS.keys() - self.fixed.keys()]
        names = [p for p in names if p.name not in _idle(method, self.fixed)]
        own = [p.name for p in names if p.scope != "shared"]
        return own, [p.name for p in names if p.scope == "shared"]

    def start(self, name: str) -> float:
        """Return where the search starts with a parameter."""
        method = our_method(self.merge_method)
        assert method is not None
        start = _STARTS[name]
        if start is None:
            start = next(p.default for p in method.spec.parameters if p.name == name)
        return 1 / len(self.models) if start is None else float(start)

    def saliency_settings(self) -> list[Any]:
        """Return each model's ``saliency``, as the model's own name has it looked up.

        Raises:
            SaliencyNotFoundError: An expert that is ranked by saliency has no file.
        """
        setting = self.fixed.get("saliency")
        method = our_method(self.merge_method)
        others = {"criterion", "statistics"} & self.fixed.keys()
        if method is None or not method.reads_saliency:
            return [None] * len(self.models)
        settings = []
        for model in self.original_models or self.models:
            try:
                settings.append(_located(setting, str(model)))
            except SaliencyNotFoundError:
                if not others:  # which may ask for no saliency
                    raise
                settings.append(setting)
        return settings

    def _recipe(self) -> dict[str, Any]:
        """Return the recipe's part that all candidates share."""
        base = {} if self.base_model is None else {"base_model": str(self.base_model)}
        return {
            "merge_method": self.merge_method,
            **base,
            "models": [{"model": str(model)} for model in self.models],
            "parameters": self.fixed,
        }

    def _check_values(self, method: PlannedMethod) -> None:
        if not any(self.evolved):
            raise GenomeError("parameters sets everything, so nothing is left to evolve")
        if len(self.original_models or ()) != len(self.models):
            raise GenomeError("original_models must name as many models as models")
        # A parameter with filters or a gradient is checked with each tensor, when it is planned.
        specs = {p.name: p for p in method.spec.parameters}
        values = {name: p.default for name, p in specs.items()} | {
            name: specs[name].validate(value)
            for name, value in self.fixed.items()
            if name in specs and not isinstance(value, list | Mapping)
        }
        starts = {name: self.start(name) for name in chain(*self.evolved)}

        def faults(**more: float) -> list[Fault]:
            own = {**values, **starts, **more}
            inputs = [PlannedInput(model, (), None, own) for model in self.models]
            return list(method.check_tensor("of any name", inputs, own))

        raise_errors(faults())
        if self.allow_negative_weights and "weight" in starts and faults(weight=-1.0):
            raise GenomeError(
                f"allow_negative_weights: {self.merge_method} takes none, as its weights say how "
                "much each expert's error counts; leave it out"
            )


class EvolConfiguration(EvolMergeConfiguration, frozen=True):
    """mergekit-evolve's configuration, with our genome in it."""

    genome: GenomeDefinition


class Genome(ModelGenome):
    """Makes recipes of genotypes.

    A genotype of one of our methods is a tensor [layer groups, filters + 1, genes]: first each
    expert's own parameters, expert by expert, then those that all experts share.
    """

    definition: GenomeDefinition

    def __init__(self, definition: GenomeDefinition, trust_remote_code: bool = False):
        super().__init__(definition, trust_remote_code)
        self._is_ours = our_method(definition.merge_method) is not None
        # With the user's own models, the recipe's setting does.
        self._copied = self._is_ours and definition.original_models != definition.models
        self._saliency = definition.saliency_settings() if self._copied else []

    def initial_genotype(self, random: bool = False) -> torch.Tensor:
        """Return the genotype that the search starts from, or a random one."""
        if not self._is_ours:
            return super().initial_genotype(random)
        own, shared = self.definition.evolved
        names = own * len(self.definition.models) + shared
        start = torch.tensor([self.definition.start(n) for n in names], dtype=torch.float64)
        start = start.expand(*self._shape, -1).clone()
        return torch.rand_like(start) if random else start

    def genotype_merge_config(self, genotype: Any) -> MergeConfiguration:
        """Make the recipe of a genotype.

        Negative values are taken as positive ones, except for weights if the genome allows them;
        values over 1 of what lies between 0 and 1 as 1. Where experts share each tensor's
        positions, densities that sum to over 1 are lowered in proportion.

        Args:
            genotype: A vector of CMA-ES, or what `initial_genotype` returns.

        Raises:
            InvalidGenotypeError: It has another number of genes.
        """
        if not self._is_ours:
            return super().genotype_merge_config(genotype)
        definition, experts = self.definition, self.definition.models
        own, shared = self._genes(genotype)
        for values in (own, shared):
            for name in values:
                values[name] = self._allowed(name, values[name])
        recipe: dict[str, Any] = {
            "merge_method": definition.merge_method,
            "base_model": definition.base_model,
            "tokenizer_source": definition.tokenizer_source,
            "parameters": definition.fixed,
            "dtype": "bfloat16",
        }

        def models(groups: slice) -> list[dict[str, Any]]:
            listed = []
            for k, model in enumerate(experts):
                settings = {name: self._setting(own[name][groups, :, k]) for name in own}
                if self._copied and self._saliency[k] is not None:
                    settings["saliency"] = self._saliency[k]
                listed.append({"model": model, "parameters": settings})
            return listed

        def common(groups: slice) -> dict[str, Any]:
            return {name: self._setting(shared[name][groups]) for name in shared}

        if definition.smooth:
            recipe["models"] = models(slice(None))
            recipe["parameters"] |= common(slice(None))
        else:
            recipe["slices"] = []
            step = definition.layer_granularity
            step = step if step > 0 else self.num_layers
            for group in range(self._shape[0]):
                sources = [*models(slice(group, group + 1)), {"model": definition.base_model}]
                layers = {"layer_range": [group * step, (group + 1) * step]}
                recipe["slices"].append(
                    {
                        "sources": [{**source, **layers} for source in sources],
                        "parameters": common(slice(group, group + 1)),
                    }
                )
        return MergeConfiguration.model_validate(recipe)

    def genotype_to_param_arrays(self, genotype: Any) -> dict[str, torch.Tensor]:
        """Return a genotype's values [layer groups] by name, for mergekit-evolve's log."""
        if not self._is_ours:
            return super().genotype_to_param_arrays(genotype)
        own, shared = self._genes(genotype)
        arrays: dict[str, torch.Tensor] = {}
        for i, suffix in enumerate([*(f"_{f}" for f in self.definition.filters or ()), ""]):
            for k, model in enumerate(self.definition.models):
                label = model.model.path.rstrip("/").rpartition("/")[2]
                arrays |= {f"{label}_{n}{suffix}": values[:, i, k] for n, values in own.items()}
            arrays |= {f"{n}{suffix}": values[:, i] for n, values in shared.items()}
        return arrays

    @property
    def _shape(self) -> tuple[int, int]:
        """The number of layer groups, and of settings by filter."""
        step = self.definition.layer_granularity
        groups = self.num_layers // step if step > 0 else 1
        return groups, len(self.definition.filters or ()) + 1

    def _genes(self, genotype: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return each expert's own values [groups, filters + 1, K], the shared ones without K."""
        own, shared = self.definition.evolved
        experts = len(self.definition.models)
        expected = (*self._shape, experts * len(own) + len(shared))
        # A copy: the arrays that ray hands over cannot be written to, of which torch would warn.
        genes = torch.tensor(genotype) if not isinstance(genotype, torch.Tensor) else genotype
        genes = genes.double()
        if genes.numel() != torch.Size(expected).numel():
            raise InvalidGenotypeError(
                f"a genotype of this genome has {torch.Size(expected).numel()} genes, "
                f"and this one has {genes.numel()}"
            )
        genes = genes.reshape(expected)
        of_experts, common = genes.split([experts * len(own), len(shared)], dim=-1)
        of_experts = of_experts.reshape(*self._shape, experts, len(own))
        return (
            {name: of_experts[..., i] for i, name in enumerate(own)},
            {name: common[..., i] for i, name in enumerate(shared)},
        )

    def _allowed(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return values that the method takes for a parameter."""
        definition = self.definition
        if name != "weight" or not definition.allow_negative_weights:
            values = values.abs()
        if name in _SHARES:
            values = values.clamp(max=1)
        method = our_method(definition.merge_method)
        if name == "density" and method is not None and method.copies(definition.fixed):
            total = values.sum(dim=-1, keepdim=True)
            if (total > 1).any():
                _say_that_densities_are_lowered(definition.merge_method)
            values = values / total.clamp(min=1)
        return values

    def _setting(self, values: torch.Tensor) -> Any:
        """Return a parameter's setting, from its values [groups, filters + 1]."""
        columns = [column[0] if len(column) == 1 else column for column in values.T.tolist()]
        if not self.definition.filters:
            return columns[0]
        filters = [*self.definition.filters, None]
        return [{"filter": f, "value": v} for f, v in zip(filters, columns, strict=True)]


def our_method(name: Any) -> PlannedMethod | None:
    """Return our merge method of this name; None if there is none."""
    ours = {m.spec.name: m for m in merge_methods.registered_methods()}
    method = ours.get(str(name))
    return method if isinstance(method, PlannedMethod) else None


def _idle(method: PlannedMethod, fixed: Mapping[str, Any]) -> set[str]:
    """Return the parameters that would change nothing that another one does not."""
    if not isinstance(method, Obim):
        return {"stretch"}  # a factor beside λ
    if method.copies(fixed):
        # λ is a factor of every weight.
        return {"stretch"} if "weight" in fixed else {"stretch", "lambda"}
    return {"density"} if fixed["assignment"] == "nearest" else {"density", "stretch"}


def _located(setting: Any, model: str) -> Any:
    """Return a ``saliency`` setting with each value replaced by the path of the model's file."""
    if isinstance(setting, Sequence) and not isinstance(setting, str):
        return [_located(one, model) for one in setting]
    if isinstance(setting, Mapping):
        return {**setting, "value": _located(setting.get("value"), model)}
    return str(locate(setting, model))


@functools.cache
def _say_that_densities_are_lowered(method: str) -> None:
    """Log it once for a process, as every other candidate is one of these."""
    LOG.warning(
        "%s: the densities of a candidate sum to over 1, and experts share each tensor's "
        "positions: those of every such candidate are lowered in proportion",
        method,
    )
