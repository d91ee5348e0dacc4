"""The Python face of mergekit-obim, for notebooks and scripts.

``measuring``  an expert's saliency, of a model on disk or in memory
``saliency``   saliency in memory ↔ saliency files
``merging``    experts on disk, or state dicts
``recipes``    what is wrong with a recipe
``arguments``  what these do alike with their arguments

Each function here is also an attribute of the package, which imports this one when one of them is
first asked for. The work is done by the rooms below; here models and data that are in memory are
only translated into what those rooms read, and what they write is brought back into memory.
"""

from __future__ import annotations

from mergekit_obim.api.measuring import measure
from mergekit_obim.api.merging import merge
from mergekit_obim.api.recipes import check
from mergekit_obim.api.saliency import ExpertSaliency, read_saliency, write_saliency

__all__ = ["ExpertSaliency", "check", "measure", "merge", "read_saliency", "write_saliency"]
