"""How experts lie to the base that they are said to come from, by a sample of their weights.

A fine-tune moves a model's weights by little, and each in a direction of its own. What has
moved further than to nothing is no fine-tune of this base; experts that have moved the same
way come from some other model, of which the base they are given is only the ancestor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from mergekit.io import LazyTensorLoader

from mergekit_obim.kernels.blocks import one_thread
from mergekit_obim.kernels.kinship import Moments, moments
from mergekit_obim.models.checkpoint import StreamingReader
from mergekit_obim.saliency.fingerprint import sample

# What was measured, on tiny models, is in docs/check.md.
# ‖δ‖ / ‖θ_B‖ over the matrices. Unrelated models of alike weights have √2, and 1 is as far as
# having no weights at all. Fine-tunes have a few hundredths; long further training a few tenths.
UNRELATED = 1.0
FAR = 0.5
# The cosine of two task vectors, above which they are nearly the same way: experts of one base
# had 0.5 at most, experts with a long training between them and the base 0.95 and more.
SAME_WAY = 0.8


@dataclass
class Relation:
    """What a sample of the weights tells.

    Attributes:
        base: The base's reference.
        experts: The experts' references.
        moments: Sums over the matrices that all have, as if of every weight.
        identical: The experts no sampled value of which differs from the base's.
        twins: Pairs of experts no sampled value of which differs.
        shapes: Per expert the tensors of another shape than the base's, with both shapes.
        missing: Per expert the base's tensors that it has not.
        broken: Per model a tensor with values that are not finite.
    """

    base: str
    experts: list[str]
    moments: Moments
    identical: list[str] = field(default_factory=list)
    twins: list[tuple[str, str]] = field(default_factory=list)
    shapes: dict[str, dict[str, tuple[list[int], list[int]]]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def faults(self) -> Iterator[str]:
        """What makes merging these models pointless, a line each."""
        for model, name in self.broken.items():
            yield (
                f"model {model}: tensor {name} has values that are not finite numbers, and cannot "
                "be merged; get a sound copy of the checkpoint"
            )
        for model in self.identical:
            yield (
                f"model {model}: is the base {self.base} itself, as far as sampled: it would only "
                "take positions from others; remove it, or name the fine-tuned model"
            )
        for one, other in self.twins:
            if not {one, other} & set(self.identical):
                yield f"models {one} and {other}: are the same model; remove one of them"
        for model, size in self.sizes().items():
            if size >= UNRELATED:
                yield (
                    f"model {model}: is no fine-tune of {self.base}: it lies {size:.2f} times the "
                    "base's own size from it, where fine-tunes show a few hundredths; set "
                    "base_model to the model that it was trained from"
                )

    def doubts(self) -> Iterator[str]:
        """What is unusual, a line each."""
        for model, size in self.sizes().items():
            if FAR <= size < UNRELATED:
                yield (
                    f"model {model}: lies {size:.2f} times the base's own size from {self.base}, "
                    "where fine-tunes show a few hundredths: is base_model what it was trained "
                    "from?"
                )
        cosines = self.moments.cosine()
        for i, one in enumerate(self.experts):
            for j, other in enumerate(self.experts[:i]):
                if cosines[i, j] >= SAME_WAY and (other, one) not in self.twins:
                    yield (
                        f"models {other} and {one}: differ from {self.base} in the same way "
                        f"(cosine {cosines[i, j]:.3f}): is there a model between them and it, that "
                        "base_model should name?"
                    )

    def cosines(self) -> dict[str, dict[str, float]]:
        """The cosine of each two task vectors; nothing for an expert that is the base."""
        rows = zip(self.experts, self.moments.cosine().tolist(), strict=True)
        return {
            one: {
                other: value
                for other, value in zip(self.experts, row, strict=True)
                if one != other and value == value
            }
            for one, row in rows
        }

    def sizes(self) -> dict[str, float]:
        """‖δ‖ / ‖θ_B‖ of each expert."""
        sizes = self.moments.relative_sizes().tolist()
        return {
            model: size for model, size in zip(self.experts, sizes, strict=True) if size == size
        }


def relate(
    base: str, base_weights: LazyTensorLoader, experts: Mapping[str, LazyTensorLoader]
) -> Relation:
    """Compare experts with their base, 64 values a tensor.

    Args:
        base: The base's reference.
        base_weights: Its checkpoint.
        experts: The experts' checkpoints, by their references.
    """
    models = list(experts)
    found = Relation(base, models, Moments.zero(len(models)))
    same = dict.fromkeys(models, True)
    twins = {(one, other): True for i, other in enumerate(models) for one in models[:i]}
    compared = 0
    readers = {
        model: StreamingReader(weights, len(models) + 1) for model, weights in experts.items()
    }
    base_reader = StreamingReader(base_weights, len(models) + 1)
    for name in base_weights.index.tensor_paths:
        weight = base_reader.load(name)
        if not weight.is_floating_point():
            continue
        samples: dict[str, torch.Tensor] = {}
        for model, weights in experts.items():
            if name not in weights.index.tensor_paths:
                found.missing.setdefault(model, []).append(name)
                continue
            own = readers[model].load(name)
            if own.shape != weight.shape:
                shapes = list(own.shape), list(weight.shape)
                found.shapes.setdefault(model, {})[name] = shapes
            elif own.is_floating_point():
                samples[model] = sample(own).double()
        compared += bool(samples)
        theirs = sample(weight).double()
        for model, values in samples.items():
            same[model] &= torch.equal(values, theirs)
        for one, other in twins:
            if one in samples and other in samples:
                twins[one, other] &= torch.equal(samples[one], samples[other])
        broken = [
            model
            for model, values in {base: theirs, **samples}.items()
            if not bool(values.isfinite().all())
        ]
        found.broken = {**dict.fromkeys(broken, name), **found.broken}
        if len(samples) == len(models) and weight.ndim > 1 and theirs.numel() and not broken:
            with one_thread():  # a second one would take longer to be woken than the work
                part = moments([samples[model] for model in models], theirs)
            found.moments += part.scaled(weight.numel() / theirs.numel())
    for reader in (base_reader, *readers.values()):
        reader.close()
    if compared:
        complete = set(models) - found.missing.keys() - found.shapes.keys()
        found.identical = [model for model in models if same[model] and model in complete]
        found.twins = [pair for pair, equal in twins.items() if equal and complete >= set(pair)]
    return found
