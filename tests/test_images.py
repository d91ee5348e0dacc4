"""Calibration with images: through the model's processor, into every part of the model."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor

import commands
from commands import obim_saliency, refusal, says, succeed, write_recipe, write_rows
from mergekit_obim.calibration import passes, resume
from mergekit_obim.calibration.capture import CurvatureCapture
from mergekit_obim.calibration.data import TokenizedCalibration, TokenSequence, prepare
from mergekit_obim.calibration.data.images import (
    RowProcessor,
    placeholders,
    read_image,
    row_images,
    with_items,
)
from mergekit_obim.calibration.data.tokens import next_batch
from mergekit_obim.calibration.feeding import feed
from mergekit_obim.errors import CalibrationError
from mergekit_obim.recipe.calibration import Calibration
from mergekit_obim.saliency.file import saliency_file_name
from square_gradients import SquareGradients
from tiny_processors import CHAT_TEMPLATE as PARTS_TEMPLATE
from tiny_processors import IMAGE, MODELS, architecture, processor, write_images
from tiny_tokenizers import BOS, byte_ids, byte_tokenizer
from tiny_tokenizers import CHAT_TEMPLATE as TEXT_TEMPLATE

NEVER = "never used in the calibration run"


def write_data(folder: Path, *, seed: int = 0) -> Path:
    """Rows with one image, two, none, and a conversation with one."""
    one, two, three, four = write_images(folder, 4, seed=seed)
    rows = [
        {"text": "What is this?", "images": one},
        {"text": "These two differ.", "images": [two, str(folder / three)]},
        {"text": "no image here", "images": []},
        {"text": "nor there, no?"},
        {"messages": [{"role": "user", "content": "Hi"}], "images": [four]},
    ]
    return write_rows(folder / "data.jsonl", rows)


def write_world(folder: Path, name: str, **calibration: Any) -> Path:
    """A recipe with one expert; the base has the processor."""
    model = architecture(name).build()
    model.save_pretrained(folder / "model")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.005 * torch.randn_like(weight)
    model.save_pretrained(folder / "base")
    processor(name, chat=True).save_pretrained(folder / "base")
    data = write_data(folder)
    return write_recipe(
        folder,
        {
            "merge_method": "obim",
            "base_model": str(folder / "base"),
            "models": [
                {"model": str(folder / "model"), "calibration": {"data": str(data), **calibration}}
            ],
            "parameters": {"saliency": str(folder / "out")},
            "dtype": "float32",
        },
    )


def saliency_of(folder: Path, out: str = "out") -> Path:
    return folder / out / saliency_file_name(str(folder / "model"))


def by_hand(folder: Path, name: str) -> tuple[dict[str, Tensor], nn.Module]:
    """The mean square of every linear layer's input, in float64, and the model."""
    model = architecture(name).build(dtype=torch.float64)
    own = AutoProcessor.from_pretrained(folder / "base")
    token = own.image_token
    pictures = [Image.open(folder / f"{n}.png") for n in range(4)]
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def note(layer: str, x: Tensor) -> None:
        x = x.flatten(0, -2)
        sums[layer] = sums.get(layer, torch.zeros(x.shape[1])) + x.square().sum(0)
        rows[layer] = rows.get(layer, 0) + len(x)

    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, layer=layer: note(layer, args[0]))
    inputs = [
        own(text=[f"{token}\nWhat is this?"], images=[pictures[:1]], return_tensors="pt"),
        own(
            text=[f"{token}\n{token}\nThese two differ."],
            images=[pictures[1:3]],
            return_tensors="pt",
        ),
        own.tokenizer(["no image here"], return_tensors="pt"),
        own.tokenizer(["nor there, no?"], return_tensors="pt"),
        own(
            text=[f"<s><user>{token}Hi</s>"],
            images=[pictures[3:]],
            return_tensors="pt",
            add_special_tokens=False,
        ),
    ]
    with torch.no_grad():
        for row in inputs:
            row = {key: x.double() if x.is_floating_point() else x for key, x in row.items()}
            model(**row, use_cache=False)
    return {layer: total / rows[layer] for layer, total in sums.items()}, model


@pytest.mark.parametrize("name", MODELS)
def test_vision_tower_projector_and_decoder_are_measured(name: str, tmp_path: Path) -> None:
    recipe = write_world(tmp_path, name, dtype="float64")
    result = succeed(obim_saliency(recipe, tmp_path / "out"))
    wanted, model = by_hand(tmp_path, name)
    found = commands.entries(saliency_of(tmp_path))
    embedding = model.get_input_embeddings().weight
    seen = set()
    for layer, h in wanted.items():
        weight = model.get_submodule(layer).weight
        if weight is embedding:
            continue  # h of both
        torch.testing.assert_close(found[f"{layer}.weight"][0].double(), h, rtol=1e-5, atol=1e-9)
        seen |= {part for part in ("language_model", "vi", "project", "merger") if part in layer}
    assert seen >= {"language_model", "vi"}
    assert not [why for why in _unscored(tmp_path).values() if why == NEVER]
    assert "5 samples" in result.stdout


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_against_gradients(name: str, tmp_path: Path) -> None:
    """Convolutions, norms and biases too; by a reference that knows neither modules nor kernels."""
    model = architecture(name).build()
    sequences = prepared(write_data(tmp_path), name=name).sequences
    pictures = [row.image_inputs() if row.image_inputs else None for row in sequences]
    with CurvatureCapture(model, skip_logits=True) as capture:
        for row, images in zip(sequences, pictures, strict=True):
            feed(model, torch.tensor([row.ids]), images)
    with torch.enable_grad(), SquareGradients(model) as reference:
        for row, images in zip(sequences, pictures, strict=True):
            feed(model, torch.tensor([row.ids]), images)
    measured = capture.curvatures()
    assert sum("vi" in parameter for parameter in measured) > 10
    tied = capture.tied
    for parameter, curvature in measured.items():
        if parameter in tied:
            continue  # a sum of means: test_architectures.py
        wanted = reference.totals[parameter] / reference.counts[parameter]
        h = curvature.h.double().expand(wanted.shape)
        torch.testing.assert_close(
            h, wanted, rtol=1e-4, atol=1e-6, msg=lambda m, p=parameter: f"{p}: {m}"
        )


def _unscored(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(commands.header(saliency_of(folder))["unscored"])
    return found


def test_images_change_the_numbers(tmp_path: Path) -> None:
    recipe = write_world(tmp_path, "gemma3vl")
    succeed(obim_saliency(recipe, tmp_path / "out"))
    first = commands.entries(saliency_of(tmp_path))
    succeed(obim_saliency(recipe, tmp_path / "out"))  # kept
    write_images(tmp_path, 4, seed=1)  # the same rows, other pixels
    assert "another calibration content_hash" in refusal(obim_saliency(recipe, tmp_path / "out"))
    succeed(obim_saliency(recipe, tmp_path / "out", "--overwrite"))
    second = commands.entries(saliency_of(tmp_path))
    tower = [name for name in first if "vision_tower.encoder.layers.0.mlp.fc1.weight" in name]
    assert tower
    assert not any(torch.equal(first[name], second[name]) for name in tower)


@pytest.mark.parametrize("batch_size", ["1", "3", "auto"])
def test_the_batch_size_changes_nothing_but_rounding(batch_size: str, tmp_path: Path) -> None:
    recipe = write_world(tmp_path, "llava")
    succeed(obim_saliency(recipe, tmp_path / "out", "--batch-size", "2"))
    succeed(obim_saliency(recipe, tmp_path / "other", "--batch-size", batch_size))
    first, second = (commands.entries(saliency_of(tmp_path, out)) for out in ("out", "other"))
    assert first.keys() == second.keys()
    for name, h in first.items():
        torch.testing.assert_close(second[name], h, rtol=1e-5, atol=1e-9)


def test_a_killed_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_world(tmp_path, "gemma3vl")
    succeed(obim_saliency(recipe, tmp_path / "whole"))
    monkeypatch.setenv(resume.INTERVAL, "0")
    fed = 0

    def feed_twice(*args: Any) -> None:
        nonlocal fed
        fed += 1
        if fed == 3:
            raise KeyboardInterrupt
        feed(*args)

    with monkeypatch.context() as patch:
        patch.setattr(passes, "feed", feed_twice)
        obim_saliency(recipe, tmp_path / "out")
    assert not saliency_of(tmp_path).exists()
    result = succeed(obim_saliency(recipe, tmp_path / "out"))
    assert "goes on after" in result.stderr
    assert saliency_of(tmp_path).read_bytes() == saliency_of(tmp_path, "whole").read_bytes()


def test_a_merge_by_what_was_measured(tmp_path: Path) -> None:
    recipe = write_world(tmp_path, "qwen2_5_vl")
    succeed(obim_saliency(recipe, tmp_path / "out"))
    result = succeed(obim_saliency("--check", recipe))
    assert "visual" not in result.stdout
    succeed(commands.mergekit_yaml(recipe, tmp_path / "merged"))
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_check_reads_the_images(tmp_path: Path) -> None:
    recipe = write_world(tmp_path, "llava")
    assert "no errors" in succeed(obim_saliency("--check", recipe, tmp_path / "out")).stdout
    (tmp_path / "3.png").unlink()
    result = obim_saliency("--check", recipe, tmp_path / "out")
    assert result.exit_code == 1
    says(result.stdout, f"Error: {tmp_path / 'model'}", "line 5", tmp_path / "3.png", "no such")


# --- errors ---------------------------------------------------------------------------------


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    recipe = write_world(tmp_path, "llava")
    (tmp_path / "1.png").unlink()
    message = refusal(obim_saliency(recipe, tmp_path / "out"))
    says(message, tmp_path / "model", "data.jsonl, line 2", tmp_path / "1.png", "no such file")


def test_an_image_that_goes_after_it_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_world(tmp_path, "llava")
    feed = passes.feed

    def feed_and_remove(*args: Any, **kwargs: Any) -> Any:
        (tmp_path / "3.png").unlink(missing_ok=True)
        return feed(*args, **kwargs)

    monkeypatch.setattr(passes, "feed", feed_and_remove)
    message = refusal(obim_saliency(recipe, tmp_path / "out"))
    says(message, f"{tmp_path / 'model'}: ", "data.jsonl, line 5", "3.png", "no such file")


def test_an_image_that_is_none(tmp_path: Path) -> None:
    recipe = write_world(tmp_path, "llava")
    (tmp_path / "1.png").write_text("no image")
    message = refusal(obim_saliency(recipe, tmp_path / "out"))
    says(message, tmp_path / "model", "data.jsonl, line 2", tmp_path / "1.png", "no format")


def test_half_an_image(tmp_path: Path) -> None:
    recipe = write_world(tmp_path, "llava")
    path = tmp_path / "1.png"
    path.write_bytes(path.read_bytes()[:100])
    says(refusal(obim_saliency(recipe, tmp_path / "out")), "line 2", path, "can't be read")


def test_images_that_do_not_fit_max_length(tmp_path: Path) -> None:
    recipe = write_world(tmp_path, "gemma3vl", max_length=12)
    message = refusal(obim_saliency(recipe, tmp_path / "out"))
    says(message, tmp_path / "model", "line 2", "max_length 12", "has 39 tokens", "raise")
    succeed(obim_saliency(recipe, tmp_path / "out", "--max-length", 39))


def test_a_vision_language_model_without_a_processor(tmp_path: Path) -> None:
    recipe = write_world(tmp_path, "llava")
    (tmp_path / "base" / "processor_config.json").unlink()
    message = refusal(obim_saliency(recipe, tmp_path / "out"))
    says(message, tmp_path / "model", "has images", "preprocessor_config.json")


def test_a_processor_that_cannot_be_loaded(tmp_path: Path) -> None:
    recipe = write_world(tmp_path, "llava")
    (tmp_path / "base" / "processor_config.json").write_text("{")
    message = refusal(obim_saliency(recipe, tmp_path / "out"))
    says(message, tmp_path / "model", "has images", f"processor of {tmp_path / 'base'}", "JSON")


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_world(tmp_path, "llava")
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = refusal(obim_saliency(recipe, tmp_path / "out"))
    says(message, tmp_path / "model", "pip install 'mergekit-obim[images]'")


def test_a_text_model_is_measured_by_the_text(tmp_path: Path) -> None:
    from architectures import ARCHITECTURES

    for seed, name in enumerate(("base", "model")):
        model = ARCHITECTURES["llama"].build(seed=seed)
        model.resize_token_embeddings(259, mean_resizing=False)
        model.save_pretrained(tmp_path / name)
        byte_tokenizer(tmp_path / name)
    models = [{"model": str(tmp_path / "model"), "calibration": str(tmp_path / "data.jsonl")}]
    recipe = write_recipe(
        tmp_path,
        {"merge_method": "obim", "base_model": str(tmp_path / "base"), "models": models},
    )
    for column in ("images", "image"):
        write_rows(tmp_path / "data.jsonl", [{"text": "What is this?", column: "nowhere.png"}])
        result = succeed(obim_saliency(recipe, tmp_path / "out"))
        says(result.stderr, "Warning", tmp_path / "model", "has images, but the model takes none")
    with_column = commands.entries(saliency_of(tmp_path))
    write_rows(tmp_path / "data.jsonl", [{"text": "What is this?"}])
    succeed(obim_saliency(recipe, tmp_path / "out"))  # kept: the same data
    commands.same_tensors(commands.entries(saliency_of(tmp_path)), with_column)


# --- rows -----------------------------------------------------------------------------------


def prepared(data: Path, **options: Any) -> TokenizedCalibration:
    name = options.pop("name", "llava")
    made = processor(name, add_bos=options.pop("add_bos", False), chat=True)
    made.chat_template = options.pop("template", made.chat_template)
    made.tokenizer.chat_template = made.chat_template
    calibration = Calibration.model_validate({"data": str(data), **options})
    known = placeholders(architecture(name).configuration())
    return prepare(calibration, made.tokenizer, "m", None, lambda: RowProcessor(made, known))


def ids_of(folder: Path, row: dict[str, Any], **options: Any) -> list[int]:
    (sequence,) = prepared(write_rows(folder / "data.jsonl", [row]), **options).sequences
    assert sequence.image_inputs
    return sequence.ids


def test_where_images_stand_in_text(tmp_path: Path) -> None:
    one, two = write_images(tmp_path, 2)
    picture = [IMAGE] * 4
    for text, wanted in [
        ("ab", [BOS, *picture, *byte_ids("\nab")]),
        ("", [BOS, *picture, *byte_ids("\n")]),
        ("a<image>b", [BOS, *byte_ids("a"), *picture, *byte_ids("b")]),
    ]:
        assert ids_of(tmp_path, {"text": text, "images": one}, add_bos=True) == wanted
    message = _error(tmp_path, {"text": "<image>", "images": [one, two]})
    says(message, "line 1", "has 2 images, but 1 image tokens (<image>)")


def test_where_images_stand_in_messages(tmp_path: Path) -> None:
    one, two = write_images(tmp_path, 2)
    picture, image = [IMAGE] * 4, {"type": "image"}
    text = {"type": "text", "text": "ab"}
    begin, end = [BOS, *byte_ids("<user>")], [2]
    for content, wanted in [
        ("ab", [*picture, *picture, *byte_ids("ab")]),
        ([image, text, image], [*picture, *byte_ids("ab"), *picture]),
        (
            [{**image, "text": None}, image, {**text, "image": None}],
            [*picture * 2, *byte_ids("ab")],
        ),
    ]:
        row = {"messages": [{"role": "user", "content": content}], "images": [one, two]}
        assert ids_of(tmp_path, row, add_bos=True) == [*begin, *wanted, *end]
    row = {"messages": [{"role": "user", "content": [image]}], "images": [one, two]}
    says(_error(tmp_path, row), "has 2 images, but its messages have 1 items of type image")
    row = {"messages": [{"role": "user", "content": [{**image, "image": one}, text]}]}
    assert ids_of(tmp_path, row) == [*begin, *picture, *byte_ids("ab"), *end]


def test_llava_rows(tmp_path: Path) -> None:
    (one,) = write_images(tmp_path, 1)
    turn = [BOS, *byte_ids("<user>")]
    picture = [IMAGE] * 4
    for value, wanted in [
        ("<image>\nab", [*picture, *byte_ids("ab")]),
        ("ab\n<image>", [*byte_ids("ab"), *picture]),
        ("a <image> b", [*byte_ids("a "), *picture, *byte_ids(" b")]),
        ("ab", [*picture, *byte_ids("ab")]),
    ]:
        row = {"image": one, "conversations": [{"from": "human", "value": value}]}
        assert ids_of(tmp_path, row) == [*turn, *wanted, 2]
        assert ids_of(tmp_path, {**row, "conversations": json.dumps(row["conversations"])}) == (
            [*turn, *wanted, 2]
        )


def test_every_way_to_give_an_image_in_messages(tmp_path: Path) -> None:
    (one,) = write_images(tmp_path, 1)
    encoded = base64.b64encode((tmp_path / one).read_bytes()).decode()
    address = f"data:image/png;base64,{encoded}"
    text = {"type": "text", "text": "ab"}
    sequences = []
    for image in (
        {"type": "image", "image": one},
        {"type": "image", "path": one},
        {"type": "image", "url": one},
        {"type": "image", "image": None, "path": str(tmp_path / one)},
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "input_image", "image_url": address},
        {"image": one},
    ):
        row = {"messages": [{"role": "user", "content": [image, text]}]}
        data = write_rows(tmp_path / "data.jsonl", [row])
        (sequence,) = prepared(data).sequences
        assert sequence.ids == [BOS, *byte_ids("<user>"), *[IMAGE] * 4, *byte_ids("ab"), 2]
        sequences.append(sequence)
    assert len({sequence.image_hash for sequence in sequences}) == 1
    row = {"messages": [{"role": "user", "content": [{"type": "image"}, text]}]}
    says(_error(tmp_path, row), "has 0 images, but its messages have 1 items of type image")
    image = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    row = {"messages": [{"role": "user", "content": [image, text]}]}
    says(_error(tmp_path, row), "https://example.org/a.png is on the network", "download it")


@pytest.mark.parametrize("with_image", [True, False])
def test_a_template_for_text_gets_text(with_image: bool, tmp_path: Path) -> None:
    (one,) = write_images(tmp_path, 1)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"messages": [{"role": "user", "content": [{"type": "image"}] * with_image + parts}]}
    write_rows(tmp_path / "data.jsonl", [{**row, "images": [one]} if with_image else row])
    sequences = prepared(tmp_path / "data.jsonl", template=TEXT_TEMPLATE).sequences
    picture = [*[IMAGE] * 4, *byte_ids("\n")] * with_image
    assert sequences[0].ids == [BOS, *byte_ids("<user>"), *picture, *byte_ids("ab"), 2]


def test_text_is_not_lost_on_a_template_for_parts(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "ab"}]}
    for content in ("ab", ["ab"], [{"type": "text", "text": "ab"}]):
        row = {"messages": [{"role": "user", "content": content}]}
        (sequence,) = prepared(write_rows(tmp_path / "data.jsonl", [row])).sequences
        assert sequence.ids == [BOS, *byte_ids("<user>ab"), 2]


def test_the_processors_template_has_no_clock_either(tmp_path: Path) -> None:
    (one,) = write_images(tmp_path, 1)
    row = {"messages": [{"role": "user", "content": "ab"}], "images": one}
    data = write_rows(tmp_path / "data.jsonl", [row])
    clock = "{{ strftime_now('%Y-%m-%d') }}"
    result = prepared(data, template=clock + PARTS_TEMPLATE.replace("IMAGE_TOKEN", "<image>"))
    ids = [*byte_ids("2025-01-01"), BOS, *byte_ids("<user>"), *[IMAGE] * 4, *byte_ids("ab"), 2]
    assert result.sequences[0].ids == ids
    assert result.date == "2025-01-01"


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_with_images_is_cut_at_its_end(side: str, tmp_path: Path) -> None:
    (one,) = write_images(tmp_path, 1)
    made = processor("llava")
    made.tokenizer.truncation_side = side
    row = RowProcessor(made, {IMAGE}).tokenize(
        "<image>abcd", lambda: [Image.open(tmp_path / one)], 6, None
    )
    assert row.ids == [*[IMAGE] * 4, *byte_ids("ab")]


def _error(folder: Path, row: dict[str, Any], **options: Any) -> str:
    with pytest.raises(CalibrationError) as caught:
        ids_of(folder, row, **options)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_messages_after_the_system_prompt() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    system, user = with_items(messages, 1)
    assert system["content"] == [{"type": "text", "text": "s"}]
    assert user["content"] == [{"type": "image"}, {"type": "text", "text": "u"}]
    assert messages[1] == {"role": "user", "content": "u"}


def test_long_text_is_cut_and_images_are_not(tmp_path: Path) -> None:
    (one,) = write_images(tmp_path, 1)
    row = {"text": "a long text", "images": one}
    assert ids_of(tmp_path, row, max_length=7) == [IMAGE] * 4 + byte_ids("\na ")
    (sequence,) = prepared(tmp_path / "data.jsonl", max_length=7).sequences
    assert sequence.image_inputs
    assert sequence.image_inputs()["attention_mask"].shape == (1, 7)
    assert "input_ids" not in sequence.image_inputs()
    says(_error(tmp_path, row, max_length=3), "max_length 3", "has 16 tokens")
    row = {"text": "a long text<image>", "images": one}
    says(_error(tmp_path, row, max_length=12), "max_length 12", "has 15 tokens")


def test_packing_leaves_rows_with_images_alone(tmp_path: Path) -> None:
    sequences = prepared(write_data(tmp_path), packing=True, max_length=27).sequences
    assert [bool(sequence.image_inputs) for sequence in sequences] == [False, *[True] * 3]


def test_rows_with_images_are_batches_of_their_own() -> None:
    text = TokenSequence([1, 2])
    image = TokenSequence([1, 2], image_inputs=lambda: pytest.fail("not now"))
    ordered = [text, text, image, image, text, text]
    starts, made = 0, []
    while starts < len(ordered):
        made.append(len(next_batch(ordered, starts, 4)))
        starts += made[-1]
    assert made == [2, 1, 1, 2]


def test_every_form_of_an_image(tmp_path: Path) -> None:
    (name,) = write_images(tmp_path, 1)
    wanted = Image.open(tmp_path / name).tobytes()
    data = (tmp_path / name).read_bytes()
    for value in (
        name,
        str(tmp_path / name),
        data,
        {"bytes": data, "path": None},
        {"bytes": None, "path": name},
        Image.open(tmp_path / name),
    ):
        assert read_image(value, str(tmp_path)).tobytes() == wanted
    with pytest.raises(CalibrationError, match=r"should be files' paths.*found int"):
        read_image(3, "")


def test_grey_and_turned_images_become_upright_and_rgb() -> None:
    grey = Image.new("L", (4, 2))
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    grey.save(turned, "JPEG", exif=exif)
    image = read_image(turned.getvalue(), "")
    assert (image.mode, image.size) == ("RGB", (2, 4))


def test_another_column(tmp_path: Path) -> None:
    (one,) = write_images(tmp_path, 1)
    row = {"text": "a", "picture": one}
    assert IMAGE in ids_of(tmp_path, row, images="picture")
    says(_error(tmp_path, row, images="photo"), "has no column 'photo'", "picture")
    assert row_images({"images": None}, None, "") == []


def test_parquet_as_the_datasets_library_writes_it(tmp_path: Path) -> None:
    (one,) = write_images(tmp_path, 1)
    image = {"bytes": (tmp_path / one).read_bytes(), "path": None}
    rows = pyarrow.Table.from_pylist([{"text": "a", "images": [image]}, {"text": "b"}])
    pyarrow.parquet.write_table(rows, tmp_path / "data.parquet")
    sequences = prepared(tmp_path / "data.parquet").sequences
    assert [row.ids for row in sequences] == [byte_ids("b"), [IMAGE] * 4 + byte_ids("\na")]
    write_rows(tmp_path / "data.jsonl", [{"text": "a", "images": one}, {"text": "b"}])
    hashes = {prepared(tmp_path / f"data.{kind}").content_hash for kind in ("parquet", "jsonl")}
    assert len(hashes) == 1
