"""Nyström's approximation of a Gram matrix, as a factor: G ≈ L = U Uᵀ.

Source: Halko, Martinsson, Tropp (arXiv 0909.4061), section 5.4; Tropp et al. (arXiv 1706.05736).
"""

from __future__ import annotations

import torch

from mergekit_obim.errors import UnscorableError
from mergekit_obim.kernels.gram import draw_test_matrix

# Below this share of the largest eigenvalue of Ωᵀ Y nothing is left of a float32 sketch but its
# rounding errors.
_NOISE = 1e-6


def nystrom_factor(sketch: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Return U, whose U Uᵀ is L = Y (Ωᵀ Y)⁺ Yᵀ.

    Ωᵀ Y = Ωᵀ G Ω is symmetric and positive semidefinite but for rounding. Eigenvalues within the
    rounding are left out: 1e-6 of the largest, or what Ωᵀ Y lacks of its symmetry if that is more,
    as it is where Y was stored in fewer bits.

    L is never more than G, so its diagonal is not more than h either. Rows of U that rounding has
    made longer than √h are shortened to that.

    Args:
        sketch: Y = G Ω of a G = E[x xᵀ], [d, r], with Ω of
            :func:`~mergekit_obim.kernels.gram.draw_test_matrix`.
        h: The diagonal of G, [d].

    Returns:
        [d, r'], float64 on the CPU, where this small algebra is done for every device; r' ≤ r.

    Raises:
        UnscorableError: The sketch or h is not finite.
    """
    y, h = sketch.to("cpu", torch.float64), h.to("cpu", torch.float64)
    if not (y.isfinite().all() and h.isfinite().all()):
        raise UnscorableError("the sketch of the inputs' Gram matrix is not finite")
    core = draw_test_matrix(*sketch.shape).double().T @ y
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    noise = max(_NOISE * float(values[-1]), float(torch.linalg.norm(core - core.T)) / 2)
    kept = values > noise
    factor = y @ (vectors[:, kept] / values[kept].sqrt())
    diagonal = factor.square().sum(1)
    # 0 / 0 is a feature that no token has, and x / 0 one that the sketch tells nothing of.
    shortened = (h / diagonal).clamp(max=1).nan_to_num(0).sqrt()
    result: torch.Tensor = factor * shortened[:, None]
    return result
