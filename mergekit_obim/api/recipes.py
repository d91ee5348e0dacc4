"""Checking a recipe that is a file, a text or a mapping."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit.io.tasks import LoaderCache

from mergekit_obim import checking
from mergekit_obim.api.arguments import PathLike, run_options
from mergekit_obim.checking.verdict import Verdict
from mergekit_obim.errors import RecipeError
from mergekit_obim.recipe import Document
from mergekit_obim.recipe.document import documents_of, read_documents


def check(
    recipe: PathLike | Mapping[str, Any],
    *,
    out_dir: PathLike | None = None,
    device: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Verdict:
    """Find everything that is wrong with a recipe, as ``obim-saliency --check`` does.

    Args:
        recipe: The path of a recipe, its YAML text, or what YAML makes of it.
        out_dir: Where the pre-pass is going to write: then saliency files that it will make may
            be missing. Left out, the merge comes next.
        device: Where the pre-pass will run, for the estimate of its cost.
        options: More options of ``obim-saliency``, by their names in Python.

    Returns:
        What was found: ``errors`` and ``warnings`` are lists of lines, ``print(*verdict.lines(),
        sep="\\n")`` shows all of it, and ``to_json()`` is for machines.

    Raises:
        RecipeError: There is no such file, or it is not a recipe at all.

    Example:
        >>> import mergekit_obim
        >>> verdict = mergekit_obim.check('''
        ... merge_method: obim
        ... base_model: ./base
        ... models: [{model: ./base, parameters: {densty: 0.5}}]
        ... ''')
        >>> verdict.errors[0]
        'the recipe has no model besides the base: list the experts under models'
    """
    LoaderCache().loaders.clear()  # as in `merge`
    run = run_options(device, options, quiet=True)
    documents = _documents(recipe)
    return checking.check(documents, Path(out_dir) if out_dir is not None else None, run)


def _documents(recipe: PathLike | Mapping[str, Any]) -> list[Document]:
    if isinstance(recipe, Mapping):
        return [Document(recipe)]
    if isinstance(recipe, os.PathLike) or "\n" not in recipe:
        path = Path(recipe)
        if not path.is_file():
            raise RecipeError(
                f"{path}: there is no such recipe (a relative path starts at {os.getcwd()})"
            )
        return read_documents(path)
    return documents_of(recipe, "the recipe")
