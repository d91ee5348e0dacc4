"""Tiny Llama checkpoints of random weights, and saliency files written without our own writer.

No model is built: names and shapes are enough for mergekit, and writing them takes milliseconds.
transformers can load what is written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 16, 24, 4, 2, 40

Tensors = dict[str, torch.Tensor]


def llama_config(
    *, layers: int = 3, vocabulary: int = VOCABULARY, tied: bool = False
) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def llama_shapes(
    *, layers: int = 3, vocabulary: int = VOCABULARY, tied: bool = False
) -> dict[str, tuple[int, ...]]:
    """Every weight of a Llama, in the order in which mergekit plans them."""
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for layer in range(layers):
        block = {
            "input_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "post_attention_layernorm": (HIDDEN,),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": size for name, size in block.items()}
    shapes["model.norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, HIDDEN)
    return shapes


def base_weights(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fine_tuned(base: Mapping[str, torch.Tensor], seed: int, step: float = 0.125) -> Tensors:
    """An expert: a third of its weights is the base's, the others moved by few different steps.

    The few steps and the coarse h of :func:`factored_saliency` make ties common.
    """
    generator = torch.Generator().manual_seed(seed)
    expert = {}
    for name, weight in base.items():
        steps = torch.randint(-4, 5, weight.shape, generator=generator)
        moved = torch.rand(weight.shape, generator=generator) > 1 / 3
        expert[name] = weight + step * steps * moved
    return expert


def factored_saliency(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Tensors:
    """h for every weight but the norms: per token for the embeddings, else per input feature."""
    generator = torch.Generator().manual_seed(seed)
    h = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            size = (shape[0], 1) if "embed" in name else (1, shape[1])
            h[name] = torch.randint(0, 9, size, generator=generator) / 4
    return h


def dense_saliency(
    h: Mapping[str, torch.Tensor],
    expert: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
) -> Tensors:
    return {name: (expert[name] - base[name]).square() * h[name] for name in h}


def write_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: LlamaConfig, **more: str
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt", **more})
    return folder


def write_saliency_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    model: str = "hand",
    form: str = "factored",
    **more: str,
) -> Path:
    """What any tool may write: the four required keys, by safetensors' own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "format": "mergekit-obim-saliency",
        "format_version": "1",
        "form": form,
        "model": model,
    }
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata=header | more)
    return path


def read_checkpoint(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def fake_hub(cache: Path, repo: str, files: dict[str, Path], *, ref: str = "main") -> None:
    """What huggingface_hub keeps of a repository in its cache."""
    commit = f"{len(repo + ref):040x}"
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    for name, source in files.items():
        target = folder / "snapshots" / commit / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())


@dataclass
class Family:
    """A base and its experts on disk, with a folder of saliency files per form.

    Attributes:
        layers: Number of transformer blocks.
        base: The base's folder.
        experts: The experts' folders, in the recipe's order.
        base_tensors: The base's weights.
        expert_tensors: Each expert's.
        h: Each expert's factored saliency.
        factored: A folder with a file for every expert.
        dense: The same as dense files.
    """

    layers: int
    base: Path
    experts: list[Path]
    base_tensors: Tensors
    expert_tensors: list[Tensors]
    h: list[Tensors]
    factored: Path
    dense: Path


def write_family(root: Path, *, experts: int = 3, layers: int = 3) -> Family:
    from mergekit_obim.saliency.file import saliency_file_name

    shapes, config = llama_shapes(layers=layers), llama_config(layers=layers)
    base_tensors = base_weights(0, shapes)
    base = write_checkpoint(root / "base", base_tensors, config)
    folders, tensors, saliency = [], [], []
    for k in range(experts):
        tensors.append(fine_tuned(base_tensors, seed=k + 1))
        saliency.append(factored_saliency(shapes, seed=100 + k))
        folders.append(write_checkpoint(root / f"expert{k}", tensors[k], config))
        name = saliency_file_name(str(folders[k]))
        write_saliency_file(root / "factored" / name, saliency[k], model=str(folders[k]))
        write_saliency_file(
            root / "dense" / name,
            dense_saliency(saliency[k], tensors[k], base_tensors),
            model=str(folders[k]),
            form="dense",
        )
    return Family(
        layers, base, folders, base_tensors, tensors, saliency, root / "factored", root / "dense"
    )


def recipe_of(
    family: Family,
    *,
    method: str,
    per_model: list[dict[str, Any]] | None = None,
    shared: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A recipe that merges a family; without shared parameters it reads the factored files."""
    per_model = per_model or [{} for _ in family.experts]
    return {
        "merge_method": method,
        "base_model": str(family.base),
        "models": [
            {"model": str(folder), "parameters": parameters}
            for folder, parameters in zip(family.experts, per_model, strict=True)
        ],
        "parameters": {"saliency": str(family.factored)} if shared is None else shared,
        **more,
    }


def of_files(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The same recipe for mergekit-pytorch, of the folders' weight files."""
    models = [{**m, "model": f"{m['model']}/model.safetensors"} for m in recipe["models"]]
    return {**recipe, "base_model": f"{recipe['base_model']}/model.safetensors", "models": models}
