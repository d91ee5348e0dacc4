"""The tasks of lm-evaluation-harness, for ``obim-eval --tasks``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from transformers import AutoTokenizer

from mergekit_obim.calibration.loading import loaded
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.errors import RecipeError, one_line, told_as
from mergekit_obim.models.opened import open_model
from mergekit_obim.tuning.scoring import BatchSize


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse tasks that cannot be run, before the work begins.

    Raises:
        RecipeError: The harness is not installed, or there is no file of that name.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"--tasks needs lm-evaluation-harness ({one_line(error)}): pip install "
            "'mergekit-obim[eval]'"
        ) from error
    for task in tasks:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            raise RecipeError(f"--tasks {task}: there is no such file")


def run_tasks(
    reference: str,
    tasks: Sequence[str],
    scratch: Path,
    options: RunOptions,
    *,
    dtype: str | None,
    batch_size: BatchSize | None,
) -> dict[str, dict[str, float]]:
    """Run a model on tasks of lm-evaluation-harness, by its ``simple_evaluate``.

    Args:
        reference: The model.
        tasks: Names that the harness knows, or paths of its YAML files.
        scratch: A folder for weights that are offloaded to the disk.
        options: Where and how the model runs.
        dtype: Of the forward passes; None is the weights'.
        batch_size: Sequences per forward pass; None is the harness's default.

    Returns:
        Task -> metric, such as ``acc,none`` -> its value.

    Raises:
        ObimError: A task or the model cannot be run.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    opened = open_model(ModelReference.parse(reference), options)
    with (
        loaded(reference, opened, dtype, options, scratch / "offload") as model,
        # Tasks, data sets and metrics raise many kinds.
        told_as(RecipeError, f"model {reference}: --tasks {','.join(tasks)}"),
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            opened.folder, trust_remote_code=options.trust_remote_code
        )
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or 1),
            tasks=list(tasks),
            log_samples=False,
            # To find the tasks by name that come with the harness takes it many seconds.
            task_manager=TaskManager(
                include_defaults=not all(Path(task).is_file() for task in tasks)
            ),
        )
    return {task: _numbers(metrics) for task, metrics in (found or {})["results"].items()}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Return a task's metrics without what else the harness tells of it, and without bars."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and "," in name and "_stderr" not in name
    }
