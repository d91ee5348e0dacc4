"""Results as ``model-index`` in a model card's metadata, where the Hub looks for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mergekit_obim.errors import RecipeError, told_as
from mergekit_obim.saliency.file import write_text
from mergekit_obim.tuning.evaluation import Evaluation

_METRICS = {
    "loss": "Cross-entropy, nats per token",
    "divergence": "KL divergence from the teacher, nats per token",
    "recovery": "Share of the expert's gain over the base",
}
_SOURCE = "obim-eval"


def write_results(folder: Path, found: Evaluation, name: str) -> Path:
    """Write a model's results into the metadata of its card; those of a run before are replaced.

    Args:
        folder: The model's folder. A card that is missing is made.
        found: The evaluation.
        name: The model's name in it.

    Returns:
        The card's path.

    Raises:
        RecipeError: The card cannot be read or written.
    """
    path = folder / "README.md"
    new = f"---\nlibrary_name: transformers\n---\n\n# {folder.resolve().name}\n"
    with told_as(RecipeError, f"{path}: cannot be read"):
        card = ModelCard.load(path) if path.exists() else ModelCard(new)
    data = card.data
    assert isinstance(data, ModelCardData)
    kept = [one for one in data.eval_results or [] if one.source_name != _SOURCE]
    data.model_name = data.model_name or folder.resolve().name
    data.eval_results = [*kept, *_results(found, name)]
    write_text(path, str(card))
    return path


def _results(found: Evaluation, name: str) -> Iterator[EvalResult]:
    for label, result in found.models[name].items():
        for metric, words in _METRICS.items():
            value = getattr(result, metric)
            if value is not None:
                yield _result(
                    found.rows[label].sources[0], f"rows of {label}", metric, words, value
                )
    for task, metrics in found.tasks.get(name, {}).items():
        for metric, value in metrics.items():
            yield _result(task, task, metric, metric, value)


def _result(data: str, told: str, metric: str, words: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=data,
        dataset_name=told,
        metric_type=metric,
        metric_name=words,
        metric_value=value,
        source_name=_SOURCE,
        source_url="https://pypi.org/project/mergekit-obim/",
    )
