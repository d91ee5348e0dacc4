"""Optimal Brain Iterative Merging for mergekit: merge method ``obim`` and its relatives.

Importing this package is cheap and changes nothing: mergekit, torch and transformers are
imported by what needs them.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__", "register"]


def register() -> None:
    """Makes mergekit know our merge methods; calling it again changes nothing.

    An installed mergekit-obim does this by itself as soon as mergekit is imported, unless
    ``MERGEKIT_OBIM_AUTOLOAD=0`` is set.

    Raises:
        ImportError: If mergekit is not installed, or is a version without this plugin interface.
    """
    # First, so that the automatic registration, which this sets off, finds our adapter whole.
    import mergekit.merge_methods  # noqa: F401

    from mergekit_obim.methods import register as register_methods

    register_methods()
