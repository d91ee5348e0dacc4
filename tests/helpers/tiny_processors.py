"""Tiny vision-language models with their processors, and images for them, all written on the spot.

The processors are transformers' own, on Pillow, over the byte tokenizer. Qwen's wants torchvision
for videos, and so has none here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from architectures import ARCHITECTURES, Architecture
from tiny_tokenizers import VOCAB_SIZE, byte_tokenizer

IMAGE = VOCAB_SIZE
"""The token id that stands for a part of an image, in all of these models."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}IMAGE_TOKEN{% else %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{{ eos_token }}{% endfor %}"
)
# What each model is built with beside architectures.py's options.
_CONFIG: dict[str, dict[str, Any]] = {
    "gemma3vl": {
        "image_token_index": IMAGE,
        "boi_token_index": IMAGE + 1,
        "eoi_token_index": IMAGE + 2,
    },
    "llava": {"image_token_index": IMAGE},
    "qwen2_5_vl": {
        "image_token_id": IMAGE,
        "video_token_id": IMAGE + 1,
        "vision_start_token_id": IMAGE + 2,
        "vision_end_token_id": IMAGE + 3,
    },
}
MODELS = tuple(_CONFIG)


class ImagesOnly(Qwen2_5_VLProcessor):
    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


AutoProcessor.register(transformers.Qwen2_5_VLConfig, ImagesOnly, exist_ok=True)


def architecture(name: str) -> Architecture:
    """The one of that name in architectures.py, for a byte tokenizer with image tokens."""
    known = ARCHITECTURES[name]
    text = {
        **known.options["text_config"],
        "vocab_size": VOCAB_SIZE + 4,
        "max_position_embeddings": 512,
    }
    return Architecture(
        known.model, known.config, {**known.options, **_CONFIG[name], "text_config": text}
    )


def processor(name: str, *, add_bos: bool = False, chat: bool = False) -> ProcessorMixin:
    def tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
        plain = byte_tokenizer(add_bos=add_bos)
        added = [AddedToken(token, special=True, normalized=False) for token in tokens.values()]
        plain.add_tokens(added, special_tokens=True)
        return PreTrainedTokenizerFast(
            tokenizer_object=plain.backend_tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            extra_special_tokens=tokens,
        )

    made: ProcessorMixin
    if name == "llava":
        made = LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
            tokenizer(image_token="<image>"),
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    elif name == "gemma3vl":
        made = Gemma3Processor(
            Gemma3ImageProcessorPil(size={"height": 8, "width": 8}),
            tokenizer(image_token="<soft>", boi_token="<boi>", eoi_token="<eoi>"),
            image_seq_length=4,
        )
    else:
        made = ImagesOnly(
            Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=256),
            tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>"),
        )
    if chat:
        made.chat_template = CHAT_TEMPLATE.replace("IMAGE_TOKEN", made.image_token)
    return made


def write_charts(folder: Path) -> None:
    """``models/vision-base`` and ``models/charts``, and ``data/charts.jsonl`` with images."""
    model = architecture("gemma3vl").build()
    for name in ("vision-base", "charts"):
        model.save_pretrained(folder / "models" / name)
        processor("gemma3vl").save_pretrained(folder / "models" / name)
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 1 + 1 / 64
    (folder / "data").mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"text": "What does it show?", "images": [name]}) + "\n"
        for name in write_images(folder / "data", 5)
    ]
    (folder / "data/charts.jsonl").write_text("".join(lines * 5))


def write_images(folder: Path, count: int, *, seed: int = 0) -> list[str]:
    """Random images of different sizes; returns their names."""
    random = np.random.default_rng(seed)
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        pixels = random.integers(0, 256, (9 + number, 14 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return names
