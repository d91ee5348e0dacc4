"""Makes mergekit-evolve know our methods; of the same kind as ``mergekit_hooks``.

mergekit-evolve's genome knows five merge methods by name, and has no place for what a recipe says
under ``parameters``. So its three classes for genomes are replaced by subclasses of ours
(``genomes``), which do as mergekit's do with every other method.

It imports its genome before mergekit's merge methods, with which ours are registered: the classes
are replaced then, in every module of it that has imported them by name. Nothing is imported that
it has not imported by then, and so nothing at all in a process that does not evolve.

Upstream, an ``evolved: bool`` in mergekit's `ParameterSpec`, and ``parameters`` in its genome,
would replace both modules.
"""

from __future__ import annotations

import sys

_GENOME, _CONFIG = "mergekit.evo.genome", "mergekit.evo.config"


def listen_to_evolve() -> None:
    """Replace mergekit-evolve's genome if it is imported; calling this again changes nothing."""
    genome, config = sys.modules.get(_GENOME), sys.modules.get(_CONFIG)
    if genome is None or config is None:
        return
    from mergekit_obim.methods import genomes

    ours = (genomes.GenomeDefinition, genomes.Genome, genomes.EvolConfiguration)
    replacements = {kind.__mro__[1]: kind for kind in ours}
    # The command's own module goes by another name if it is run as `python -m`.
    for name in (_GENOME, _CONFIG, "mergekit.scripts.evolve", "__main__"):
        here = vars(sys.modules[name]) if name in sys.modules else {}
        for original, replacement in replacements.items():
            if here.get(original.__name__) is original:
                here[original.__name__] = replacement
