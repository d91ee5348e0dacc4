"""Importance matrices of llama.cpp, in and out: formats, names, layouts, and merges with them."""

from __future__ import annotations

import logging
import re
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from torch import Tensor

import commands
import tiny_models
from architectures import ARCHITECTURES
from commands import LAYERS, World, refusal, same_tensors, says, succeed
from mergekit_obim.calibration.capture import CurvatureCapture
from mergekit_obim.errors import ObimError, SaliencyFileError
from mergekit_obim.models.imatrix import _Weight, imatrix_saliency, write_saliency_as_imatrix
from mergekit_obim.models.names import sources_of, under_all_names, weight_names
from mergekit_obim.models.opened import open_model
from mergekit_obim.saliency.file import SaliencyMetadata, write_saliency
from mergekit_obim.saliency.imatrix import ImatrixEntry, ImatrixSaliency, read_imatrix

pytestmark = pytest.mark.usefixtures("one_thread")

# An entry: Σ x², [matrices, in], and how many rows each matrix saw.
Entries = Mapping[str, tuple[Tensor, Sequence[float]]]
LLAMA = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, entries: Entries, kind: str = "imatrix", skip: str = "no") -> Path:
    """A file as llama-imatrix writes it, with the sums of x that are to come."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["calibration_datav3.txt"])
    writer.add_uint32("imatrix.chunk_count", 25)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in entries.items():
        parts = {
            "in_sum2": sums.float().numpy(),
            "counts": np.array(counts, np.float32)[:, None],
            "in_sum": -sums.float().numpy(),
        }
        for part, values in parts.items():
            if part != skip:
                writer.add_tensor(f"{name}.{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_legacy(path: Path, entries: Entries, *, calls: int = 25, ending: bool = True) -> Path:
    """A file of the older format: h · calls, and ones for h where no row came by."""
    data = struct.pack("<i", len(entries))
    for name, (sums, counts) in entries.items():
        rows = torch.tensor(counts).double()[:, None].expand(len(sums), 1)
        h = torch.where(rows > 0, sums.double() / rows, 1.0)
        values = (h * calls).float().numpy()
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", calls, values.size) + values.tobytes()
    path.write_bytes(data + (struct.pack("<ii", calls, 5) + b"a.txt") * ending)
    return path


def llama_entries(world: World, seed: int, count: float = 12800.0) -> dict[str, Any]:
    """An entry for each linear layer of the tiny Llama, and its head."""
    weights = load_file(world.base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)

    def entry(weight: Tensor) -> tuple[Tensor, list[float]]:
        # Few different values, so that ties are common.
        return torch.randint(0, 9, (1, weight.shape[1]), generator=generator) * count / 7, [count]

    found = {
        f"blk.{layer}.{there}.weight": entry(weights[f"model.layers.{layer}.{own}.weight"])
        for layer in range(LAYERS)
        for own, there in LLAMA.items()
    }
    return {**found, "output.weight": entry(weights["lm_head.weight"])}


def llama_h(entries: Entries) -> dict[str, Tensor]:
    h = {name: (sums.double() / counts[0]).float() for name, (sums, counts) in entries.items()}
    names = {
        f"blk.{layer}.{there}.weight": f"model.layers.{layer}.{own}.weight"
        for layer in range(LAYERS)
        for own, there in LLAMA.items()
    }
    names["output.weight"] = "lm_head.weight"
    return {names[entry]: value for entry, value in h.items()}


def saliency_for(folder: Path, imatrix: Path) -> ImatrixSaliency:
    options = MergeOptions()
    return imatrix_saliency(
        imatrix, open_model(ModelReference.parse(str(folder)), options), options
    )


def test_a_saliency_file_from_an_imatrix(world: World, tmp_path: Path) -> None:
    entries = llama_entries(world, 0)
    path, new = write_gguf(tmp_path / "math.gguf", entries), tmp_path / "math.safetensors"
    told = succeed(commands.obim_saliency("--from-imatrix", path, world.math, "-o", new))
    same_tensors(commands.entries(new), llama_h(entries))
    header = commands.header(new)
    says(header["calibration"], "calibration_datav3.txt", '"tokens": 12800', '"math.gguf"')
    assert header["model"] == str(world.math)
    assert header["architecture"] == "LlamaForCausalLM"
    assert header["fingerprint"] == "{}"
    lacking = ["model.embed_tokens.weight", "model.norm.weight"]
    says(told.stdout, f"{new}: {7 * LAYERS + 1} tensors", *lacking, "unscored, 6 tensors")
    says(header["unscored"], *lacking, "math.gguf has no entry for it")
    says(told.stderr, path, "make sure that it is of model", world.math, "another fine-tune")
    assert "no weight of model" not in told.stderr


@pytest.mark.parametrize("write", [write_gguf, write_legacy])
@pytest.mark.parametrize("method", ["obim", "regmean_diag", "regmean"])
def test_a_recipe_that_names_imatrices(
    world: World,
    tmp_path: Path,
    write: Any,
    method: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    suffix = ".gguf" if write is write_gguf else ".dat"
    merged = []
    files = []
    for seed, expert in enumerate(world.experts):
        path = write(tmp_path / f"{expert.name}{suffix}", llama_entries(world, seed))
        new = tmp_path / f"{expert.name}.safetensors"
        succeed(commands.obim_saliency("--from-imatrix", path, expert, "-o", new))
        files.append((path, new))
    for which in range(2):
        models = world.models()
        for model, pair in zip(models, files, strict=True):
            model["parameters"] = {"saliency": str(pair[which])}
        recipe = world.recipe(merge_method=method, models=models, parameters=None)
        out = tmp_path / f"merged-{which}"
        with caplog.at_level(logging.WARNING, "mergekit_obim"):
            succeed(commands.mergekit_yaml(commands.write_recipe(tmp_path, recipe), out))
        merged.append(load_file(out / "model.safetensors"))
        if which == 0:
            told = [record.getMessage() for record in caplog.records]
            for expert, (path, _) in zip(world.experts, files, strict=True):
                assert sum(f"{path}: an imatrix does not say" in line for line in told) == 1
                (fallen,) = (t for t in told if f"{expert}: 6 tensors without saliency" in t)
                says(fallen, "model.embed_tokens.weight", "model.norm.weight")
    same_tensors(*merged)
    assert not torch.equal(
        merged[0]["lm_head.weight"], load_file(world.base / "model.safetensors")["lm_head.weight"]
    )


def test_mergekit_pytorch_finds_the_configuration_beside_the_weights(
    world: World, tmp_path: Path
) -> None:
    entries = llama_entries(world, 3)
    path = write_gguf(tmp_path / "both.gguf", entries)
    outputs = []
    for suffix, command in (
        ("/model.safetensors", commands.mergekit_pytorch),
        ("", commands.mergekit_yaml),
    ):
        recipe = {
            "merge_method": "obim",
            "base_model": f"{world.base}{suffix}",
            "models": [{"model": f"{expert}{suffix}"} for expert in world.experts],
            "parameters": {"saliency": str(path), "order": "recipe"},
            "dtype": "float32",
        }
        out = tmp_path / f"out{len(outputs)}"
        succeed(command(commands.write_recipe(tmp_path, recipe), out))
        outputs.append(load_file(out / "model.safetensors"))
    same_tensors(*outputs)


def test_there_and_back_merges_to_the_same_bits(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "imatrices"
    folder.mkdir()
    models = world.models()
    for model, expert in zip(models, world.experts, strict=True):
        out = folder / f"{expert.name}.gguf"
        told = succeed(
            commands.obim_saliency("--to-imatrix", world.saliency_of(expert), "-o", out)
        ).stdout
        says(told, f"{7 * LAYERS + 1} tensors of model {expert}", "model.embed_tokens.weight")
        model["parameters"] = {"density": 0.4, "saliency": str(out)}
    there = tmp_path / "there"
    recipe = world.recipe(models=models, parameters=None)
    succeed(commands.mergekit_yaml(commands.write_recipe(tmp_path, recipe), there))
    direct = tmp_path / "direct"
    recipe = world.recipe(models=world.models(density=0.4))
    succeed(commands.mergekit_yaml(commands.write_recipe(tmp_path, recipe), direct))
    held = {f"model.layers.{n}.{own}.weight" for n in range(LAYERS) for own in LLAMA}
    held.add("lm_head.weight")
    merged, wanted = (load_file(out / "model.safetensors") for out in (there, direct))
    same_tensors({name: merged[name] for name in held}, {name: wanted[name] for name in held})
    assert any(not torch.equal(merged[name], wanted[name]) for name in merged.keys() - held)


def test_what_we_write_is_what_llama_cpp_writes(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    succeed(commands.obim_saliency("--to-imatrix", world.saliency_of(world.math), "-o", out))
    reader = gguf.GGUFReader(out)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    h = commands.entries(world.saliency_of(world.math))
    tokens = read_tokens(world.saliency_of(world.math))
    assert fields["general.type"] == "imatrix"
    assert "general.architecture" not in fields
    assert fields["imatrix.datasets"] == [str(world.math_data)]
    assert fields["imatrix.chunk_size"] == 48  # the recipe's max_length
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == 2 * (7 * LAYERS + 1)
    sums, counts = found["blk.1.ffn_down.weight.in_sum2"], found["blk.1.ffn_down.weight.counts"]
    # ggml's dims are innermost first.
    wanted = h["model.layers.1.mlp.down_proj.weight"]
    assert sums.shape.tolist() == [wanted.shape[1], 1]
    assert counts.shape.tolist() == [1, 1]
    count = float(counts.data[0, 0])
    assert count == 2 ** round(np.log2(tokens))
    assert fields["imatrix.chunk_count"] == -(-count // 48)
    assert torch.equal(torch.from_numpy(np.array(sums.data)) / count, wanted)
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 for t in reader.tensors)
    again = tmp_path / "again.gguf"
    succeed(commands.obim_saliency("--to-imatrix", world.saliency_of(world.math), "-o", again))
    assert again.read_bytes() == out.read_bytes()


def read_tokens(path: Path) -> int:
    (tokens,) = re.findall(r'"tokens": (\d+)', commands.header(path)["calibration"])
    return int(tokens)


# --- layouts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    ARCHITECTURES["mixtral"].build().save_pretrained(folder)
    return folder


COUNTS = [9.0, 0.0, 4.0, 1.0, 7.0]


def routed(features: int, seed: int = 0) -> Tensor:
    sums = torch.rand(len(COUNTS), features, generator=torch.Generator().manual_seed(seed))
    return torch.where(torch.tensor(COUNTS)[:, None] > 0, sums * 8, 0.0)


def expected_experts(sums: Tensor, counts: Sequence[float]) -> Tensor:
    """Each expert's mean in float64, of those without rows the mean of all rows."""
    total = [sums.double().sum(0) / sum(counts)]
    rows = zip(sums.double(), counts, strict=True)
    return torch.stack([row / count if count else total[0] for row, count in rows]).float()


def test_experts_without_rows_have_their_layers_mean(mixtral: Path, tmp_path: Path) -> None:
    entries = {
        "blk.0.ffn_gate_exps.weight": (routed(16), COUNTS),
        "blk.0.ffn_down_exps.weight": (routed(24, 1), COUNTS),
        "blk.1.ffn_down_exps.weight": (routed(24, 2), [3.0]),  # one count for all of them
        "blk.0.ffn_gate_inp.weight": (torch.rand(1, 16), [21.0]),
    }
    file = saliency_for(mixtral, write_gguf(tmp_path / "m.gguf", entries))
    want = expected_experts(routed(16), COUNTS)
    fused = file["model.layers.0.mlp.experts.gate_up_proj"]
    assert torch.equal(fused, want[:, None, :])
    for number in range(len(COUNTS)):
        # As the checkpoint stores them, each in w1 and w3.
        for part in ("w1", "w3"):
            name = f"model.layers.0.block_sparse_moe.experts.{number}.{part}.weight"
            assert torch.equal(file[name].flatten(), want[number])
    down = file["model.layers.0.mlp.experts.down_proj"]
    assert torch.equal(down, expected_experts(routed(24, 1), COUNTS)[:, None, :])
    one = file["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(one, expected_experts(routed(24, 2), [3.0] * 5)[:, None, :])
    assert file["model.layers.0.mlp.gate.weight"].shape == (1, 16)
    record = file.metadata.experts["model.layers.0.mlp.experts.down_proj"]
    assert record == {"tokens": [9, 0, 4, 1, 7], "pooled": [1]}
    assert "model.layers.1.mlp.experts.gate_up_proj" in file.metadata.unscored


def test_experts_that_the_model_keeps_apart_have_their_own_row() -> None:
    entry = ImatrixEntry(routed(16).flatten(), torch.tensor(COUNTS))
    for number, want in enumerate(expected_experts(routed(16), COUNTS)):
        weight = _Weight(torch.Size([24, 16]), (-1,), number)
        matrices = weight.matrices_in(entry)
        assert matrices == len(COUNTS)
        h, _ = weight.h(entry, matrices)
        assert h is not None
        assert torch.equal(h, want[None])
    assert _Weight(torch.Size([24, 16]), (-1,), len(COUNTS)).matrices_in(entry) is None


def test_ones_of_the_older_format_are_no_measurement(mixtral: Path, tmp_path: Path) -> None:
    sums = routed(24)
    entries = {"blk.0.ffn_down_exps.weight": (sums, COUNTS)}
    file = saliency_for(mixtral, write_legacy(tmp_path / "m.imatrix", entries, ending=False))
    h = file["model.layers.0.mlp.experts.down_proj"][:, 0]
    seen = [n for n, count in enumerate(COUNTS) if count]
    want = (sums.double() / torch.tensor(COUNTS).double()[:, None])[seen]
    torch.testing.assert_close(h[seen].double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(h[1].double(), want.mean(0), rtol=1e-6, atol=0)
    assert file.metadata.experts == {}
    assert "tokens" not in file.metadata.calibration


def test_nothing_was_routed_to_any_expert(mixtral: Path, tmp_path: Path) -> None:
    entries = {
        "blk.0.ffn_down_exps.weight": (torch.zeros(5, 24), [0.0] * 5),
        "blk.0.attn_q.weight": (torch.ones(1, 16), [4.0]),
    }
    file = saliency_for(mixtral, write_gguf(tmp_path / "m.gguf", entries))
    name = "model.layers.0.mlp.experts.down_proj"
    assert name not in file
    says(file.metadata.unscored[name], "nothing was routed to it")


def test_value_heads_are_put_back_into_their_groups(tmp_path: Path) -> None:
    config = transformers.Qwen3_5TextConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_key_head_dim=4,
        linear_value_head_dim=6,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        layer_types=["linear_attention"],
    )
    model = transformers.Qwen3_5ForCausalLM(config)
    model.save_pretrained(tmp_path)
    h = torch.arange(36.0)
    # llama.cpp's order of the heads: the first of each group, the second of each, the third.
    heads = h.view(6, 6)
    there = heads[[0, 3, 1, 4, 2, 5]].reshape(1, -1)
    path = write_gguf(tmp_path / "q.gguf", {"blk.0.ssm_out.weight": (there, [1.0])})
    file = saliency_for(tmp_path, path)
    assert torch.equal(file["model.layers.0.linear_attn.out_proj.weight"], h[None])
    # The other way the order is not known, as the file does not say how many heads there are.
    left = write_saliency_as_imatrix_of(
        {
            "model.layers.0.linear_attn.out_proj.weight": h[None],
            "model.layers.0.mlp.up_proj.weight": h[None, :16],
        },
        "Qwen3_5ForCausalLM",
        tmp_path,
    )
    assert left == ["model.layers.0.linear_attn.out_proj.weight"]


def test_a_weight_that_llama_cpp_takes_apart(tmp_path: Path) -> None:
    ARCHITECTURES["qwen3_next"].build().save_pretrained(tmp_path)
    entries = {"blk.0.attn_gate.weight": (torch.arange(16.0)[None], [2.0])}
    file = saliency_for(tmp_path, write_gguf(tmp_path / "q.gguf", entries))
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    assert torch.equal(file[name], torch.arange(16.0)[None] / 2)


def write_saliency_as_imatrix_of(
    tensors: Mapping[str, Tensor], architecture: str, folder: Path
) -> list[str]:
    metadata = SaliencyMetadata(form="factored", model="it", architecture=architecture)
    file = ImatrixSaliency(folder / "it.safetensors", tensors, metadata, ())
    return write_saliency_as_imatrix(file, folder / "it.gguf")


def test_a_square_weight_whose_inputs_may_be_along_either_dim(tmp_path: Path) -> None:
    options = {**ARCHITECTURES["llama4_text"].options, "intermediate_size": 16}
    config = transformers.Llama4TextConfig(**options)
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path)
    experts = int(config.num_local_experts)
    entries = {
        "blk.1.ffn_down_exps.weight": (torch.rand(experts, 16), [3.0] * experts),
        "blk.1.ffn_gate_exps.weight": (torch.rand(experts, 16), [3.0] * experts),
    }
    file = saliency_for(tmp_path, write_gguf(tmp_path / "l.gguf", entries))
    found = {name: tuple(h.shape) for name, h in ((n, file[n]) for n in file.shapes)}
    # [experts, in, out], which the other of the two shows.
    assert found == {"model.layers.1.feed_forward.experts.gate_up_proj": (experts, 16, 1)}
    says(file.metadata.unscored["model.layers.1.feed_forward.experts.down_proj"], "it is square")


# What llama.cpp never multiplies by as a matrix, or not in the layers.
OUTSIDE = re.compile(
    r"embed|wte|wpe|norm|ln_|conv1?d?\.(weight|conv)|bias|score|classifier|pooler|dense\.weight$"
    r"|vocab_|A_log|\.D$|sinks|decoder"
)


@pytest.mark.parametrize(
    "name",
    [
        *("bert-masked-lm", "bloom", "falcon", "gemma3vl", "gpt2", "gpt_oss", "granite4moehybrid"),
        *("deepseek_v3", "mamba2", "mixtral", "nemotron_h", "phi3", "qwen3_next", "qwen3_vl"),
    ],
)
def test_names_and_layouts_of_architectures(name: str, tmp_path: Path) -> None:
    """h as measured comes back the same from an imatrix, for every matrix of the layers."""
    model = ARCHITECTURES[name].build()
    model.save_pretrained(tmp_path)
    with CurvatureCapture(model) as capture:
        for ids in tiny_models.sequences((40, 30, 7)):
            model(input_ids=ids[None])
    opened = open_model(ModelReference.parse(str(tmp_path)), MergeOptions())
    names = weight_names(model, sources_of(model, opened.names))
    h: dict[str, Tensor] = {}
    experts = {}
    for parameter, found in capture.curvatures().items():
        h |= under_all_names(model, parameter, found.h, names[parameter], opened.shape)
        if found.experts:
            experts[parameter] = {"tokens": list(found.experts), "pooled": list(found.pooled)}
    path, out = tmp_path / "it.safetensors", tmp_path / "it.gguf"
    metadata = SaliencyMetadata(
        form="factored",
        model="it",
        architecture=ARCHITECTURES[name].model,
        calibration={"tokens": 77},
        experts=experts,
    )
    left = write_saliency_as_imatrix(ImatrixSaliency(path, h, metadata, ()), out)
    back = imatrix_saliency(out, opened, MergeOptions())
    same_tensors({n: back[n] for n in back.shapes}, {n: h[n] for n in back.shapes})
    assert not back.unused
    lost = {n for n in h if n not in back and h[n].ndim > 1 and not OUTSIDE.search(n)}
    assert not lost
    assert not {n for n in left if n in back and 1 in h[n].shape[-2:]}


# --- files that are something else -------------------------------------------------------------


def test_files_that_are_no_imatrix(world: World, tmp_path: Path) -> None:
    good = write_gguf(tmp_path / "good.gguf", llama_entries(world, 0)).read_bytes()
    legacy = write_legacy(tmp_path / "good.dat", llama_entries(world, 0)).read_bytes()
    path, new = tmp_path / "bad.gguf", tmp_path / "new.safetensors"

    def refused(*words: object) -> None:
        message = refusal(commands.obim_saliency("--from-imatrix", path, world.math, "-o", new))
        says(message, path, *words)
        assert not new.exists()

    # Cut in the data, among the names and in the header; 12 bytes are the end of the last padding.
    for size in (len(good) - 300, len(good) // 3, 40, 6):
        path.write_bytes(good[:size])
        refused("not a readable GGUF file", "truncated")
    for size in (len(legacy) - 20, 1000, 10, 3):
        path.write_bytes(legacy[:size])
        refused("not a readable imatrix", "neither GGUF nor", "announced at byte")
    path.write_bytes(b"")
    refused("not a readable imatrix")
    path.write_text("name: a text of some length, which is no imatrix")
    refused("not a readable imatrix")
    write_gguf(path, llama_entries(world, 0), kind="model")
    refused("of type 'model'", "not 'imatrix'")
    write_gguf(path, llama_entries(world, 0), skip="counts")
    refused("entry blk.0.attn_q.weight has in_sum2 alone", "damaged")
    write_gguf(path, {})
    refused("without entries", "in_sum2")
    wrong = {"blk.0.attn_q.weight": (torch.ones(1, 31), [2.0, 1.0])}
    write_gguf(path, wrong)
    refused("blk.0.attn_q.weight has 31 values for 2 counts")
    for bad in (-1.0, float("nan"), float("inf")):
        wrong = {"blk.0.attn_q.weight": (torch.tensor([[1.0, bad]]), [2.0])}
        write_gguf(path, wrong)
        refused("blk.0.attn_q.weight", "negative or not finite")


def test_a_recipe_with_a_bad_imatrix_is_refused_before_anything_is_merged(
    world: World, tmp_path: Path
) -> None:
    path, out = tmp_path / "bad.gguf", tmp_path / "merged"
    path.write_bytes(b"GGUF and no more")
    recipe = world.recipe(parameters={"saliency": str(path)})
    message = refusal(commands.mergekit_yaml(commands.write_recipe(tmp_path, recipe), out))
    says(message, path, "not a readable GGUF file", world.math)
    assert not list(out.glob("*.safetensors"))


def test_an_imatrix_of_another_model(world: World, mixtral: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"

    def refused(entries: Entries, folder: Path = world.math) -> str:
        write_gguf(path, entries)
        with pytest.raises(SaliencyFileError) as caught:
            saliency_for(folder, path)
        return caught.value.message

    says(
        refused({"blk.0.attn_q.weight": (torch.ones(1, 64), [4.0])}),
        f"{path}: entry blk.0.attn_q.weight has 64 values and 1 counts",
        "model.layers.0.self_attn.q_proj.weight of model",
        world.math,
        "measured on another model",
    )
    says(
        refused({"blk.0.attn_qkv.weight": (torch.ones(1, 16), [4.0])}), "not one", "blk.0.attn_qkv"
    )
    experts = {"blk.0.ffn_down_exps.weight": (torch.ones(4, 24), [4.0] * 4)}
    says(refused(experts, mixtral), "96 values and 4 counts", "[5, 16, 24]")
    # More layers than the model has.
    entries = llama_entries(world, 0)
    more = {**entries, "blk.7.attn_q.weight": entries["blk.0.attn_q.weight"]}
    warnings = saliency_for(world.math, write_gguf(path, more)).warnings()
    says(
        warnings[1], path, "1 entries are of no weight of model", world.math, "blk.7.attn_q.weight"
    )


def test_what_is_missing_to_know_the_names(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "it.gguf", llama_entries(world, 0))
    model = ARCHITECTURES["opt"].build()
    model.save_pretrained(tmp_path / "opt")
    with pytest.raises(SaliencyFileError, match="a 'opt' is not known to the package gguf"):
        saliency_for(tmp_path / "opt", path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ObimError) as caught:
        read_imatrix(path)
    says(caught.value.message, path, "needs the package gguf", "mergekit-obim[imatrix]")


def test_a_saliency_that_no_imatrix_can_hold(world: World, tmp_path: Path) -> None:
    path, out = tmp_path / "it.safetensors", tmp_path / "it.gguf"
    weight = "model.layers.0.mlp.up_proj.weight"

    def refused(tensors: dict[str, Tensor], **metadata: Any) -> str:
        header = SaliencyMetadata.model_validate({"form": "factored", "model": "it", **metadata})
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        write_saliency(path, shapes, tensors.__getitem__, header)
        message = refusal(commands.obim_saliency("--to-imatrix", path, "-o", out))
        assert not out.exists()
        return message

    says(refused({weight: torch.ones(1, 4)}), path, "its architecture is ''", "metadata")
    says(refused({weight: torch.ones(4, 4)}, form="dense"), "is in dense form", "without --dense")
    llama = "LlamaForCausalLM"
    says(refused({weight: torch.ones(4, 4)}, architecture=llama), "nothing in it is of a weight")
    says(refused({weight: torch.ones(1, 4)}, architecture="OPTForCausalLM"), "'opt' is not known")
    save_file({weight: torch.ones(1, 4)}, path)
    says(refusal(commands.obim_saliency("--to-imatrix", path, "-o", out)), "not a saliency file")
    out.write_text("mine")
    taken = ("--to-imatrix", world.saliency_of(world.math), "-o", out)
    says(refusal(commands.obim_saliency(*taken)), out, "there already", "--overwrite")
    succeed(commands.obim_saliency(*taken, "--overwrite"))
    assert read_imatrix(out).entries


def test_usage(world: World, tmp_path: Path) -> None:
    file, new = world.saliency_of(world.math), tmp_path / "new"
    for wrong in (
        ("--from-imatrix", file, "-o", new),
        ("--from-imatrix", file, world.math),
        ("--to-imatrix", file),
        ("--to-imatrix", file, file, "-o", new),
        ("--to-imatrix", "--from-imatrix", file, world.math, "-o", new),
    ):
        assert commands.obim_saliency(*wrong).exit_code == 2


def test_the_check_and_the_report_take_them_too(world: World, tmp_path: Path) -> None:
    path = write_legacy(tmp_path / "it.dat", llama_entries(world, 0))
    recipe = commands.write_recipe(tmp_path, world.recipe(parameters={"saliency": str(path)}))
    succeed(commands.obim_saliency("--check", recipe))
    page = tmp_path / "report.html"
    succeed(commands.obim_report(recipe, "-o", page))
    says(page.read_text(), "a.txt", "it.dat has no entry for it")
    write_gguf(path, {"blk.0.attn_q.weight": (torch.ones(1, 64), [4.0])})
    told = commands.obim_saliency("--check", recipe)
    assert told.exit_code == 1
    says(told.output, "64 values and 1 counts", "measured on another model")
