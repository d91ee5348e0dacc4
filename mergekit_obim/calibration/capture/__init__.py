"""Measure h, the curvature of each weight's own operation, while a model runs forward.

The paper scores a linear layer by its output error, whose Hessian is 2 X Xᵀ (arXiv 2502.12217,
equation 6): all that is needed of a calibration run is E[x_j²] of each layer's input. This package
takes the same objective to every operation that is linear in its weight.

Weights are not found by their module's class, since models use them in too many ways (Conv1D,
``x @ W.T``, ``1 + w``, bare parameters). Instead a dispatch mode watches every aten operation
and recognises a weight by where it lies in memory: its storage, offset and strides, so also when
transposed, reshaped by dims of size one, cast, or shifted by a constant. One handler per family of
operations then yields what the operation says about h.

Read it in this order:

``weights``       recognising a weight in a tensor
``calls``         one operation, as handlers see it, and what they give back
``dense``, ``experts``, ``convolutions``  the handlers
``squares``       Σ x², where equation 6 is computed, and Σ x (xᵀΩ)
``ledger``        sums per weight, and h
``watch``         the dispatch mode that brings them together

Each handler cites its row of this table:

    ============  ======================  ======================================================
    row           operation               h, shaped to broadcast against the weight
    ============  ======================  ======================================================
    Linear        x Wᵀ, W [out, in]       E[x_j²], [1, in]
    Conv1D        x W, W [in, out]        E[x_j²], [in, 1]
    embedding     one-hot(token) W        relative frequency · scale², [vocab, 1]
    norm gain     γ ⊙ x̂                   E[x̂_j²], [d]
    bias          + b                     1, [1]
    experts       x_e W_eᵀ for expert e   per expert, over its rows: [experts, 1, in]
    convolution   patches                 mean square that each kernel position meets: [1, in, …]
    tied          several of these        the sum of the terms, each with its own count
    ============  ======================  ======================================================

Of a linear layer's input the whole Gram matrix G = E[x xᵀ] can be measured too, or a sketch G Ω of
it (``kernels.gram``): h is its diagonal.

A wrong number is worse than none: a weight that meets an operation without a handler, or a
handler that cannot account for it, is named in :meth:`CurvatureCapture.unscored` and gets no h,
whatever else it did. A further kind of weight is a further handler.

What stays out of sight: kernels that do not go through PyTorch's dispatcher (their weights are
"never used"), and weights that were combined or cast before the capture began.
"""

from mergekit_obim.calibration.capture.ledger import FEWEST_ROWS, Curvature, Ledger
from mergekit_obim.calibration.capture.squares import Columns
from mergekit_obim.calibration.capture.watch import CurvatureCapture, input_device

__all__ = ["FEWEST_ROWS", "Columns", "Curvature", "CurvatureCapture", "Ledger", "input_device"]
