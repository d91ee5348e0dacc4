"""Our merge methods, as mergekit knows them: one adapter a file, over the kernels.

``parameters``      what a recipe may say
``saliency``        an expert's stored saliency, fit to the merged tensor
``preflight``       inspecting the models before mergekit opens them
``planning``        checking a merge while it is planned
``vocabulary``      the rows that tokenizer options move
``mergekit_hooks``  all use of mergekit's private parts
``evolve_hooks``    the same for mergekit-evolve, whose ``genomes`` then know the methods
``base``            what all methods do to merge a tensor
"""

from __future__ import annotations

import logging

from mergekit import merge_methods
from mergekit.merge_methods.base import MergeMethod

from mergekit_obim.methods.consensus_ta import CONSENSUS_TA
from mergekit_obim.methods.evolve_hooks import listen_to_evolve
from mergekit_obim.methods.mergekit_hooks import listen
from mergekit_obim.methods.obim import OBIM
from mergekit_obim.methods.obm_sign import OBM_SIGN
from mergekit_obim.methods.pcb import PCB
from mergekit_obim.methods.regmean import REGMEAN
from mergekit_obim.methods.regmean_diag import REGMEAN_DIAG
from mergekit_obim.methods.ties_obm import TIES_OBM

LOG = logging.getLogger("mergekit_obim")

METHODS: tuple[MergeMethod, ...] = (
    OBIM,
    TIES_OBM,
    OBM_SIGN,
    REGMEAN_DIAG,
    REGMEAN,
    CONSENSUS_TA,
    PCB,
)


def register() -> None:
    """Make the methods known to mergekit; doing it again changes nothing."""
    known = {method.spec.name: method for method in merge_methods.registered_methods()}
    for method in METHODS:
        other = known.get(method.spec.name)
        if other is None:
            merge_methods.register(method)
        elif other is not method:
            LOG.warning(
                "mergekit already has a merge method %r; mergekit-obim's stays out",
                method.spec.name,
            )
    listen([method.spec.name for method in METHODS])
    listen_to_evolve()
