"""Whether experts are fine-tunes of the base they are merged with, by a sample of their weights.

A fine-tune changes a model's weights by little, and each fine-tune in a direction of its own. An
expert further from the base than a model of zeros would be was not trained from that base. Experts
whose task vectors point in nearly the same direction share a long training: they come from some
later model, which is what ``base_model`` should name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from mergekit.io import LazyTensorLoader

from mergekit_obim.kernels.blocks import one_thread
from mergekit_obim.kernels.kinship import Moments, moments
from mergekit_obim.models.checkpoint import StreamingReader
from mergekit_obim.saliency.fingerprint import sample

# The measurements behind these limits, on tiny models, are in docs/check.md.
# ‖δ‖ / ‖θ_B‖ over the matrices. Two unrelated models with weights of the same size have √2, and a
# model of zeros has 1. Fine-tunes have a few hundredths; long further training a few tenths.
UNRELATED = 1.0
FAR = 0.5
# The cosine of two task vectors, from which on their directions count as the same: experts of one
# base had 0.5 at most, experts with a long training between them and the base 0.95 and more.
SAME_DIRECTION = 0.8


@dataclass
class WeightComparison:
    """How experts differ from their base and from each other, by a sample of every tensor.

    Attributes:
        base: The base's reference.
        experts: The experts' references.
        moments: The task vectors' inner products over the matrices that all models have, scaled
            from the sample to the whole.
        identical: The experts whose sampled values are all equal to the base's.
        twins: The pairs of experts whose sampled values are all equal.
        broken: For each model, the first tensor in which NaN or infinite values were found.
    """

    base: str
    experts: list[str]
    moments: Moments
    identical: list[str] = field(default_factory=list)
    twins: list[tuple[str, str]] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)

    def errors(self) -> Iterator[str]:
        """Yield one message for each reason why merging these models would be pointless."""
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
                    f"model {model}: is not a fine-tune of {self.base}: its weights differ by "
                    f"{size:.2f} times the base's norm, where fine-tunes show a few hundredths; "
                    "set base_model to the model that it was trained from"
                )

    def warnings(self) -> Iterator[str]:
        """Yield one message for each way in which these models do not look like fine-tunes."""
        for model, size in self.sizes().items():
            if FAR <= size < UNRELATED:
                yield (
                    f"model {model}: its weights differ from {self.base} by {size:.2f} times the "
                    "base's norm, where fine-tunes show a few hundredths: is base_model "
                    "what it was trained from?"
                )
        cosines = self.moments.cosine()
        for i, one in enumerate(self.experts):
            for j, other in enumerate(self.experts[:i]):
                if cosines[i, j] >= SAME_DIRECTION and (other, one) not in self.twins:
                    yield (
                        f"models {other} and {one}: differ from {self.base} in the same direction "
                        f"(cosine {cosines[i, j]:.3f}): were both trained from a later model, "
                        "which base_model should name?"
                    )

    def cosines(self) -> dict[str, dict[str, float]]:
        """Return the cosine of each pair of task vectors, where both are other than zero."""
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
        """Return ‖δ‖ / ‖θ_B‖ of each expert, where it is defined."""
        sizes = self.moments.relative_sizes().tolist()
        return {
            model: size for model, size in zip(self.experts, sizes, strict=True) if size == size
        }


def compare_weights(
    base: str, base_weights: LazyTensorLoader, experts: Mapping[str, LazyTensorLoader]
) -> WeightComparison:
    """Compare experts with their base by 64 values of each tensor.

    Args:
        base: The base's reference.
        base_weights: The base's checkpoint.
        experts: The experts' checkpoints, by their references.
    """
    models = list(experts)
    found = WeightComparison(base, models, Moments.zero(len(models)))
    readers = {
        model: StreamingReader(weights, len(models) + 1)
        for model, weights in {base: base_weights, **experts}.items()
    }
    digests = {model: hashlib.sha256() for model in readers}
    compared = 0
    for name in base_weights.index.tensor_paths:
        weight = readers[base].load(name)
        if not weight.is_floating_point():
            continue
        samples: dict[str, torch.Tensor] = {}
        for model, reader in readers.items():
            if name not in reader.loader.index.tensor_paths:
                continue
            own = weight if model == base else reader.load(name)
            values = sample(own).double()
            digests[model].update(f"{name} {list(own.shape)}".encode() + values.numpy().tobytes())
            if own.shape == weight.shape and own.is_floating_point():
                samples[model] = values
                if not values.isfinite().all():
                    found.broken.setdefault(model, name)
        theirs = samples.pop(base)
        compared += bool(samples)
        finite = all(values.isfinite().all() for values in (theirs, *samples.values()))
        if len(samples) == len(models) and weight.ndim > 1 and theirs.numel() and finite:
            with one_thread():  # a second one would take longer to be woken than the work
                part = moments([samples[model] for model in models], theirs)
            found.moments += part.scaled(weight.numel() / theirs.numel())
    for reader in readers.values():
        reader.close()
    if compared:
        made_of = {model: digest.digest() for model, digest in digests.items()}
        found.identical = [model for model in models if made_of[model] == made_of[base]]
        pairs = ((one, other) for i, other in enumerate(models) for one in models[:i])
        found.twins = [pair for pair in pairs if made_of[pair[0]] == made_of[pair[1]]]
    return found
