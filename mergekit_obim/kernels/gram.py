"""The Gram matrix of a layer's inputs, and the sketch of it that a saliency file can hold.

Layer l of expert k sees inputs x_t; its Gram matrix is G = E[x xᵀ] = X Xᵀ / T, [d, d], and h is its
diagonal. A full G of every layer is larger than the model, so the pre-pass keeps
Y = G Ω = E[x (xᵀ Ω)], [d, r], beside h: r columns instead of d. From them follows Nyström's
approximation (Halko, Martinsson, Tropp, arXiv 0909.4061, section 5.4; Tropp et al., arXiv
1706.05736)

    G ≈ L = Y (Ωᵀ Y)⁺ Yᵀ,

which is never more than G: G − L is positive semidefinite, as G itself is.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

# What a file says its Ω is. Another way of drawing Ω is another name.
TEST_MATRIX = "signs-shake128"


def draw_test_matrix(features: int, columns: int) -> torch.Tensor:
    """Return Ω, the same on every machine.

    Column c has the signs that the SHAKE-128 digest of ``obim sketch column {c} of {features}``
    spells, bit by bit from the lowest of each byte: 1 for a set bit, −1 for any other. So the
    sketch with fewer columns is the beginning of the one with more. Where there are as many columns
    as features Ω is the identity, and the sketch is G itself.

    Args:
        features: d, how many input features the layer has.
        columns: r.

    Returns:
        [d, min(r, d)], float32, on the CPU.
    """
    if columns >= features:
        return torch.eye(features, device="cpu")
    bits = [
        np.unpackbits(
            np.frombuffer(
                hashlib.shake_128(f"obim sketch column {c} of {features}".encode()).digest(
                    (features + 7) // 8
                ),
                np.uint8,
            ),
            count=features,
            bitorder="little",
        )
        for c in range(columns)
    ]
    return torch.from_numpy(np.stack(bits, 1).astype(np.float32) * 2 - 1)


def pack_triangle(matrix: torch.Tensor) -> torch.Tensor:
    """Return the upper triangle of a symmetric matrix, row after row.

    Args:
        matrix: [..., d, d], any floating dtype.

    Returns:
        [..., d (d + 1) / 2], bfloat16: half of what it takes, twice.
    """
    d = matrix.shape[-1]
    packed = matrix.new_empty((*matrix.shape[:-2], d * (d + 1) // 2), dtype=torch.bfloat16)
    # Row by row: the indices of all elements would take eight times the memory of the matrix.
    at = 0
    for row in range(d):
        packed[..., at : at + d - row] = matrix[..., row, row:]
        at += d - row
    return packed


def unpack_triangle(packed: torch.Tensor) -> torch.Tensor:
    """Return the symmetric matrix [..., d, d], float32, of what :func:`pack_triangle` gave."""
    d = math.isqrt(2 * packed.shape[-1])
    matrix = packed.new_empty((*packed.shape[:-1], d, d), dtype=torch.float32)
    at = 0
    for row in range(d):
        part = packed[..., at : at + d - row]
        matrix[..., row, row:] = part
        matrix[..., row:, row] = part
        at += d - row
    return matrix
