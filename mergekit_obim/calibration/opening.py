"""Reading an expert's calibration data with what the expert brings: its tokenizer, its processor.

Whatever it lacks is the base's. No model is loaded here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import transformers
from mergekit.common import ModelPath, ModelReference
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, ProcessorMixin
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_torchvision_available

from mergekit_obim.calibration.data import TokenizedCalibration, prepare
from mergekit_obim.calibration.data.images import RowProcessor, placeholders, require_pillow
from mergekit_obim.calibration.data.self_written import Writing, writing_of
from mergekit_obim.calibration.options import RunOptions
from mergekit_obim.errors import CalibrationError, quoted
from mergekit_obim.models.opened import OpenModel, refuse_code
from mergekit_obim.recipe.calibration import SELF, Calibration
from mergekit_obim.recipe.experts import Expert

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class CalibrationReader:
    """Reads what an expert is to be measured on.

    Attributes:
        expert: The expert, with its calibration.
        tokenizer: Its own, or the base's.
        config: The model's configuration.
        find_processor: Gives its processor, or the base's; None if it takes no images.
        writing: What it is to write itself, if its calibration asks for that.
    """

    expert: Expert
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    find_processor: Callable[[], RowProcessor | None]
    writing: Writing | None

    def read(
        self, own_rows: Sequence[list[int]] | None = None, *, further: int = 0
    ) -> TokenizedCalibration:
        """Read and tokenize the data.

        Args:
            own_rows: The token ids of the rows that the expert has written itself. None leaves
                these out, if it has yet to write them.
            further: If not 0, how many rows to read that come after those to be measured.

        Raises:
            CalibrationError: The data cannot be read or used, or has tokens that the model does
                not know.
        """
        calibration = self.expert.calibration
        if self.writing and own_rows is None:
            others = tuple(source for source in calibration.sources if not source.is_self)
            calibration = calibration.model_copy(update={"sources": others})
        data = TokenizedCalibration([], 0, "", [])
        if calibration.sources:
            data = self._prepared(calibration, own_rows or (), further)
        if self.writing and Path(SELF).exists():
            data.warnings.append(
                f"data: {SELF} means the rows that it writes itself; for what is here under that "
                f"name write ./{SELF}"
            )
        return data

    def _prepared(
        self, calibration: Calibration, own_rows: Sequence[list[int]], further: int
    ) -> TokenizedCalibration:
        label = self.expert.model
        data = prepare(
            calibration,
            self.tokenizer,
            label,
            length_limit(self.tokenizer, self.config),
            self.find_processor,
            own_rows,
            further=further,
        )
        check_vocabulary(label, data, self.config)
        return data


def open_calibration(
    expert: Expert,
    references: Sequence[ModelReference],
    model: OpenModel,
    options: RunOptions,
) -> CalibrationReader:
    """Find what an expert's data is read with, and what it is to write itself.

    Args:
        expert: The expert, with its calibration.
        references: Where to look for a tokenizer and a processor: the expert, then the base.
        model: The expert's checkpoint.
        options: Where downloads are kept, and whether code that comes with a model may run.
        further: If not 0, how many rows to read that come after those to be measured.

    Raises:
        CalibrationError: There is no tokenizer that can be loaded, or the expert is to write rows
            and cannot.
    """
    # The files of an adapter are its own: it may have brought tokens that its model lacks.
    places = [
        place for reference in references for place in (reference.lora, reference.model) if place
    ]
    tokenizer = _tokenizer(expert.model, places, options)
    config = model.config
    writing = None
    try:
        if any(source.is_self for source in expert.calibration.sources):
            kind = getattr(transformers, (config.architectures or [""])[0], None)
            limit, ends = length_limit(tokenizer, config), _ends(model)
            writing = writing_of(expert.calibration, tokenizer, kind, config, ends, limit)
    except CalibrationError as error:
        raise CalibrationError(f"model {expert.model}: {error.message}") from error
    processor = cache(lambda: _processor(places, options, config, tokenizer))
    return CalibrationReader(expert, tokenizer, config, processor, writing)


def _ends(model: OpenModel) -> Any:
    """Return the tokens at which the model's own settings end a text."""
    try:
        return GenerationConfig.from_pretrained(str(model.folder)).eos_token_id
    except OSError:  # not every model has the file
        return None


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
