"""Optimal Brain Iterative Merging for mergekit: merge method ``obim`` and its relatives.

``measure``         run an expert over calibration data: its saliency
``merge``           merge state dicts, or models on disk
``check``           find everything that is wrong with a recipe
``read_saliency``   a saliency file → tensors
``write_saliency``  tensors → a saliency file
``register``        make mergekit know the merge methods, which installing does by itself

Importing this package is cheap and changes nothing: mergekit, torch and transformers are
imported by what needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergekit_obim.api import (
        ExpertSaliency,
        check,
        measure,
        merge,
        read_saliency,
        write_saliency,
    )

__version__ = "0.1.0"

__all__ = [
    "ExpertSaliency",
    "__version__",
    "check",
    "measure",
    "merge",
    "read_saliency",
    "register",
    "write_saliency",
]


def register() -> None:
    """Makes mergekit know our merge methods; calling it again changes nothing.

    An installed mergekit-obim does this by itself as soon as mergekit is imported, unless
    ``MERGEKIT_OBIM_AUTOLOAD=0`` is set.

    Raises:
        ImportError: If mergekit is not installed, or is a version without this plugin interface.

    Example:
        >>> import mergekit_obim
        >>> mergekit_obim.register()
        >>> from mergekit import merge_methods
        >>> merge_methods.get("obim").spec.name
        'obim'
    """
    # First, so that the automatic registration, which this sets off, finds our adapter whole.
    import mergekit.merge_methods  # noqa: F401

    from mergekit_obim.methods import register as register_methods

    register_methods()


# Out of mypy's sight, to which every name would be an attribute otherwise.
if not TYPE_CHECKING:

    def __getattr__(name):
        """Imports the functions of ``api``, and what they need, once one is asked for."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from mergekit_obim import api

        return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
