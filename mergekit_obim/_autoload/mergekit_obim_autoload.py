"""Tells mergekit about mergekit-obim, in any process that imports ``mergekit.merge_methods``.

mergekit discovers no plugins, so ``mergekit_obim_autoload.pth`` (and, from Python 3.15 on, the
``.start`` file of PEP 829) calls `install` at every interpreter start. It puts a finder on
``sys.meta_path`` that does nothing until mergekit's merge methods are imported, and then
registers ours. Every start of every program in the environment pays for this file: nothing is
imported here that the interpreter has not loaded already, ``__future__`` and ``typing`` included.
"""

import _thread
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_HOST = "mergekit.merge_methods"
# Watched too: whoever imports our adapter first gets mergekit imported from within it, when
# there is nothing of ours to register yet.
_OURS = "mergekit_obim.methods"


class _Finder:
    """Finds what the other finders find, and has the methods registered after the load."""

    def __init__(self) -> None:
        self._searching: "set[int]" = set()

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """The spec that the other finders give, for the two watched modules; else None."""
        if name != _HOST and name != _OURS:
            return None
        # A finder of this very kind, some other plugin's, asks us while we ask it.
        thread = _thread.get_ident()
        if thread in self._searching or not _enabled():
            return None
        self._searching.add(thread)
        try:
            for finder in list(sys.meta_path):
                if finder is not self and hasattr(finder, "find_spec"):
                    spec = finder.find_spec(name, path, target)
                    if spec is not None:
                        self._watch(spec)
                        return spec
            return None
        finally:
            self._searching.discard(thread)

    def _watch(self, spec: "ModuleSpec") -> None:
        """Has `register` called once the module of this spec has been executed."""
        loader = spec.loader
        if loader is None or not hasattr(loader, "exec_module"):
            return
        execute = loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            execute(module)
            if module.__name__ == spec.name:  # Some loaders serve a whole archive.
                self.register()

        # On this one loader, not in its place: others look at what kind of loader it is.
        loader.exec_module = exec_module  # type: ignore[method-assign]

    def register(self) -> None:
        """Registers the methods, or warns why not, and leaves ``sys.meta_path`` either way."""
        ours = sys.modules.get(_OURS)
        if ours is not None and not hasattr(ours, "register"):
            return  # It is being imported further up the stack, and comes by when it is done.
        try:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            import mergekit_obim

            mergekit_obim.register()
        except Exception as error:
            _warn(error)


def _enabled() -> bool:
    return os.environ.get("MERGEKIT_OBIM_AUTOLOAD") != "0"


def _warn(error: Exception) -> None:
    import warnings

    message = (
        f"mergekit-obim stays out: {type(error).__name__}: {error} "
        "(`import mergekit_obim; mergekit_obim.register()` shows where; "
        "MERGEKIT_OBIM_AUTOLOAD=0 silences this)"
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Exception:  # Under `-W error` a warning must not break mergekit's import either.
        print(message, file=sys.stderr)


def install() -> None:
    """Waits for mergekit, or registers at once if mergekit is there; safe to call again."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    finder = _Finder()
    if _HOST not in sys.modules:
        sys.meta_path.insert(0, finder)
    elif _enabled():
        finder.register()
