"""Running text and images through a model, or through the part of it that takes text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput


def feed(
    model: PreTrainedModel,
    ids: Tensor,
    images: BatchFeature | None = None,
    positions: Tensor | None = None,
) -> Any:
    """Run one forward pass.

    An encoder-decoder reads the text on both sides, shifted to the right in the decoder, as in
    its own training on text. Of a model that takes no text (speech), the decoder runs alone,
    without its cross-attention; everything else is never used.

    Args:
        model: A model of any of transformers' classes, in eval mode.
        ids: [sequences, tokens], int64, on the model's device; no padding.
        images: What the model's processor gives beside the ids for one row with images.
        positions: Of packed rows the place of each token in its own row, of the shape of ids; only
            for models of which :func:`~.packing.why_apart` has nothing to say.

    Returns:
        What the model returns: with ``logits``, [sequences, tokens, vocabulary] of a language
        model, on whatever device they are computed on, unless it has no head.
    """
    with full_precision():
        return _feed(model, ids, images, positions)


@contextmanager
def full_precision() -> Iterator[None]:
    """Makes torch compute in full float32 precision, and choose deterministic convolutions.

    Otherwise the environment would decide: some containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE,
    which rounds float32 to 10 bits of mantissa in matrix products, and convolutions on GPUs do so
    by default.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    enabled = torch.backends.cudnn.enabled
    try:
        with torch.backends.cudnn.flags(
            enabled=enabled, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _feed(
    model: PreTrainedModel, ids: Tensor, images: BatchFeature | None, positions: Tensor | None
) -> Any:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    named = (model.main_input_name, *inspect.signature(model.forward).parameters)
    takes_text = "input_ids" in named
    if not takes_text and decoder is not None and decoder is not model:
        hidden = decoder(input_ids=ids, use_cache=False)[0]
        if (head := model.get_output_embeddings()) is None:
            return BaseModelOutput(last_hidden_state=hidden)
        return CausalLMOutput(logits=head(hidden))
    more: dict[str, Any] = {} if positions is None else {"position_ids": positions}
    if images is not None:
        more |= images.to(ids.device, dtype=model.dtype)  # of floating-point tensors
    if getattr(model.config, "is_encoder_decoder", False):
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        more["decoder_input_ids"] = shift(labels=ids) if shift else ids
    return model(input_ids=ids, use_cache=False, **more)
