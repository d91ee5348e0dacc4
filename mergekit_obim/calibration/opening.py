"""Reading an expert's calibration data with what the expert brings: its tokenizer, its processor.

Whatever it lacks is the base's. No model is loaded here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from mergekit.common import ModelPath, ModelReference
from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_torchvision_available

from mergekit_obim.calibration.data import TokenizedCalibration, prepare
from mergekit_obim.calibration.data.images import RowProcessor, placeholders, require_pillow
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.errors import CalibrationError, quoted
from mergekit_obim.models.opened import refuse_code
from mergekit_obim.recipe.experts import Expert

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def read_calibration(
    expert: Expert,
    references: Sequence[ModelReference],
    config: PretrainedConfig,
    options: RunOptions,
    *,
    further: int = 0,
) -> TokenizedCalibration:
    """Read and tokenize the data that an expert is to be measured on, or further data like it.

    Args:
        expert: The expert, with its calibration.
        references: Where to look for a tokenizer and a processor: the expert, then the base.
        config: The expert's configuration.
        options: Where downloads are kept, and whether code that comes with a model may run.
        further: If not 0, how many rows to read that come after those to be measured.

    Raises:
        CalibrationError: The data cannot be read or used, there is no tokenizer that can be
            loaded, or it makes tokens that the model does not know.
    """
    # The files of an adapter are its own: it may have brought tokens that its model lacks.
    places = [
        place for reference in references for place in (reference.lora, reference.model) if place
    ]
    tokenizer = _tokenizer(expert.model, places, options)
    data = prepare(
        expert.calibration,
        tokenizer,
        expert.model,
        length_limit(tokenizer, config),
        cache(lambda: _processor(places, options, config, tokenizer)),
        further=further,
    )
    check_vocabulary(expert.model, data, config)
    return data


def _tokenizer(label: str, places: list[ModelPath], options: RunOptions) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the first place that has one."""
    for place in places:
        # Without any of the files, transformers would make up a tokenizer for some kinds of model.
        if not _has(place, _TOKENIZER_FILES, options):
            continue
        try:
            return cast("PreTrainedTokenizerBase", _from(AutoTokenizer, place, options))
        except Exception as error:
            refuse_code(label, "its tokenizer", error)
            raise CalibrationError(
                f"model {label}: the tokenizer of {place} can't be loaded: {quoted(error)}; mend "
                "its files, or remove them where the base's tokenizer will do"
            ) from error
    raise CalibrationError(
        f"model {label}: no tokenizer found: none of {', '.join(map(str, places))} has any of "
        f"{', '.join(_TOKENIZER_FILES)}"
    )


def _processor(
    places: list[ModelPath],
    options: RunOptions,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> RowProcessor | None:
    """Load the processor of the first place that has one; None for a model without vision.

    Raises:
        CalibrationError: A vision-language model has none, or it cannot be loaded. The message
            lacks the model's name, as whoever reads the rows puts it before.
    """
    for place in places:
        if not _has(place, _PROCESSOR_FILES, options):
            continue
        require_pillow()
        try:
            processor = _from(AutoProcessor, place, options)
        except Exception as error:
            refuse_code(str(place), "its processor", error)
            or_install = "" if is_torchvision_available() else ", or install torchvision for it"
            raise CalibrationError(
                f"has images, but the processor of {place} can't be loaded: {quoted(error)}; mend "
                f"its files{or_install}"
            ) from error
        if isinstance(processor, ProcessorMixin) and hasattr(processor, "image_processor"):
            # The expert's own tokenizer, with which its other rows are read.
            processor.tokenizer = tokenizer
            processor.chat_template = processor.chat_template or tokenizer.chat_template
            return RowProcessor(processor, placeholders(config))
    if not hasattr(config, "vision_config"):
        return None
    raise CalibrationError(
        "has images, but neither the model nor its base has a processor: copy "
        "preprocessor_config.json, and processor_config.json if there is one, from the model that "
        "it was made from, or name another images column"
    )


def _from(kind: Any, place: ModelPath, options: RunOptions) -> Any:
    return kind.from_pretrained(
        place.path,
        revision=place.revision,
        trust_remote_code=options.trust_remote_code,
        cache_dir=options.transformers_cache,
    )


def _has(place: ModelPath, files: Collection[str], options: RunOptions) -> bool:
    """Return whether a model's folder or repository has any of these files."""
    return any(
        cached_file(
            place.path,
            name,
            revision=place.revision,
            cache_dir=options.transformers_cache,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        for name in files
    )


def length_limit(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int | None:
    """Return the most tokens that a sequence may have, or None if there is no such limit."""
    positions = getattr(config, "max_position_embeddings", None)
    limits = [limit for limit in (int(tokenizer.model_max_length), positions) if limit]
    # A tokenizer that does not know has 10³⁰.
    return limit if (limit := min(limits)) < 1 << 24 else None


def check_vocabulary(label: str, data: TokenizedCalibration, config: PretrainedConfig) -> None:
    """Refuse tokens that the model has no embedding for.

    On a CPU they would end the run with an IndexError, on a GPU they would break the device.
    """
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    # The token that stands for an image is replaced before it is embedded.
    highest = max(
        set().union(*(sequence.ids for sequence in data.sequences)) - placeholders(config),
        default=0,
    )
    if vocabulary and highest >= vocabulary:
        raise CalibrationError(
            f"model {label}: its tokenizer makes token {highest} of the calibration data, but the "
            f"model knows {vocabulary} tokens; give it the tokenizer that it was trained with"
        )
