"""What a recipe of any method can have that mergekit finds out only in the middle of the merge."""

from __future__ import annotations

import os
from collections.abc import Iterator

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration

from mergekit_obim.errors import RecipeError
from mergekit_obim.models.references import written_in_two_ways


def recipe_wide_faults(config: MergeConfiguration) -> Iterator[RecipeError]:
    """Yield what is wrong with a recipe beside its method's parameters."""
    yield from dtype_faults({"dtype": config.dtype, "out_dtype": config.out_dtype})
    if line := written_in_two_ways(map(str, config.referenced_models())):
        yield RecipeError(line)


def dtype_faults(dtypes: dict[str, str | None]) -> Iterator[RecipeError]:
    """Yield an error for each dtype that mergekit cannot merge to.

    Args:
        dtypes: What a recipe has under ``dtype`` and ``out_dtype``.
    """
    for key, name in dtypes.items():
        try:
            dtype = dtype_from_name(name)
        except RuntimeError:
            known = False
        else:
            known = dtype is None or dtype.is_floating_point  # it lets int64 pass
        if not known:
            yield RecipeError(
                f"{key}: mergekit cannot merge to {name!r}: write float32, bfloat16, float16 or "
                "float64"
            )


def card_doubts(config: MergeConfiguration) -> Iterator[str]:
    """Yield a line for each folder that mergekit takes for a model on the Hub in the model card."""
    for model in sorted(config.referenced_models(), key=str):
        for path in [part.path for part in (model.model, model.lora) if part]:
            if _asks_the_hub(path):
                yield (
                    f"mergekit's model card asks the Hub whether the folder {path} is a model "
                    "there: without a network the merge ends in a traceback when all is merged; "
                    f"write ./{path} in the recipe, or give mergekit-yaml --no-write-model-card"
                )


def _asks_the_hub(path: str) -> bool:
    """As ``mergekit.card.is_hf`` does."""
    if path[0] in "/~" or path.count("/") > 1 or not os.path.exists(path):
        return False
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True
