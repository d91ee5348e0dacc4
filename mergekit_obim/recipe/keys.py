"""The keys that a recipe may have, as one table, and the one walk over a recipe.

mergekit silently ignores keys that it does not know. Those that it knows are listed here instead of
taken from its pydantic models, because importing those takes seconds, and a misspelt key should be
reported at once; a test compares the table with them. A new key of ours is added to the ``ours`` of
its section, and is known everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mergekit_obim.recipe.document import Document
from mergekit_obim.recipe.faults import Fault, Path, Place, nearest

Shape = Literal["one", "list", "named"]


@dataclass(frozen=True)
class Section:
    """The keys that one kind of mapping in a recipe may have.

    Attributes:
        keys: The keys that mergekit reads.
        ours: The keys that only mergekit-obim reads.
        below: The keys that hold further sections: one, a list, or several by name.
    """

    keys: tuple[str, ...]
    ours: tuple[str, ...] = ()
    below: tuple[tuple[str, Shape, str], ...] = ()

    @property
    def known(self) -> tuple[str, ...]:
        """Every key that mergekit or mergekit-obim reads."""
        return self.keys + self.ours


_INPUTS: tuple[tuple[str, Shape, str], ...] = (
    ("models", "list", "model"),
    ("slices", "list", "slice"),
)
# Every mapping of a recipe, by its kind.
SECTIONS = {
    "recipe": Section(
        (
            *("modules", "slices", "models", "merge_method", "base_model", "dtype"),
            *("tokenizer_source", "tokenizer", "chat_template", "out_dtype", "parameters"),
        ),
        ours=("calibration", "guard", "name"),  # `name` is mergekit-multi's, of each document
        below=(*_INPUTS, ("modules", "named", "module"), ("tokenizer", "one", "tokenizer")),
    ),
    "module": Section(("slices", "models", "parameters"), below=_INPUTS),
    "slice": Section(
        ("sources", "base_model", "residual_weight", "parameters"),
        below=(("sources", "list", "source"),),
    ),
    "model": Section(("model", "parameters"), ours=("calibration",)),
    "source": Section(("model", "layer_range", "parameters"), ours=("calibration",)),
    "tokenizer": Section(
        ("source", "tokens", "pad_to_multiple_of"), below=(("tokens", "named", "token"),)
    ),
    "token": Section(("source", "force")),
    # A value under `parameters` for some tensors.
    "condition": Section(("value", "filter")),
}
INPUTS = ("model", "source")
# The names of `parameters` in messages; those of one model go by its name.
PARAMETERS = {
    "recipe": "parameters",
    "module": "module parameters",
    "slice": "slice parameters",
}
# The least similarity of an unknown key to a known one that counts as misspelt. Less similar keys
# may be notes that users keep in their recipes.
_MISSPELT = 0.75


@dataclass(frozen=True)
class Part:
    """One of a recipe's mappings that have a fixed set of keys.

    Attributes:
        kind: The key of ``SECTIONS`` that describes it.
        path: The path that leads to it.
        content: Its keys and values.
        base: The base model that applies to it, as a reference in mergekit's string form.
        model: The reference of a model or of a slice's source, in the same form.
        is_stage: Whether another recipe of the file makes this model.
    """

    kind: str
    path: Path
    content: Mapping[str, Any]
    base: str | None = None
    model: str | None = None
    is_stage: bool = False

    @property
    def is_base(self) -> bool:
        """Whether this is the base, which recipes may list among the models."""
        return self.model is not None and self.model == self.base

    @property
    def label(self) -> str:
        """The name of this part in messages."""
        if self.model is not None:
            return f"model {self.model}"
        return str(Place(self.path)) or "the recipe"

    @property
    def parameters_label(self) -> str:
        """The name of this part's parameters in messages."""
        return PARAMETERS.get(self.kind, self.label)


def walk(document: Document) -> Iterator[Part | Fault]:
    """Walk through a recipe, part by part.

    Yields:
        Each part before those below it, and a fault in place of a part that cannot be read.
    """
    base = yield from _reference(document, ("base_model",), document.content.get("base_model"))
    yield from _walk(document, Part("recipe", (), document.content, base))


def _walk(document: Document, part: Part) -> Iterator[Part | Fault]:
    yield part
    parameters = part.content.get("parameters")
    if "parameters" in SECTIONS[part.kind].keys and not isinstance(parameters, Mapping | None):
        yield _wrong_shape(document, (*part.path, "parameters"), "a mapping", parameters)
    for key, shape, kind in SECTIONS[part.kind].below:
        value = part.content.get(key)
        if value is None:
            continue
        path = (*part.path, key)
        if isinstance(value, list) and shape == "list":
            entries: list[tuple[str | int, Any]] = list(enumerate(value))
        elif isinstance(value, Mapping) and shape == "named":
            entries = [(str(name), one) for name, one in value.items()]
        elif isinstance(value, Mapping) and shape == "one":
            yield from _walk(document, Part(kind, path, value, part.base))
            continue
        else:
            wanted = {"list": "a list of mappings", "named": "a mapping of mappings"}
            yield _wrong_shape(document, path, wanted.get(shape, "a mapping"), value)
            continue
        for name, one in entries:
            below = (*path, name)
            if isinstance(one, Mapping):
                yield from _walk_entry(document, kind, below, one, part.base)
            else:
                yield _wrong_shape(document, below, "a mapping", one)


def _walk_entry(
    document: Document, kind: str, path: Path, content: Mapping[str, Any], base: str | None
) -> Iterator[Part | Fault]:
    model = None
    if kind == "slice" and content.get("base_model") is not None:
        own = yield from _reference(document, (*path, "base_model"), content["base_model"])
        base = own or base
    if kind in INPUTS:
        if content.get("model") is None:
            yield Fault("reference", f"{Place(path)!s}: has no 'model'", document.place(*path))
            return
        model = yield from _reference(document, (*path, "model"), content["model"])
        if model is None:
            return
    is_stage = model is not None and _path_of(model) in document.stages
    yield from _walk(document, Part(kind, path, content, base, model, is_stage))


def unknown_keys(
    document: Document,
    part: Part,
    parameters: Collection[str] = (),
    foreign: Collection[str] = (),
) -> Iterator[Fault]:
    """Find the keys of one part that neither mergekit nor mergekit-obim reads.

    Args:
        document: The recipe.
        part: The part.
        parameters: The parameters of the recipe's merge method.
        foreign: The parameters that only other methods have.

    Yields:
        An error for a key that looks misspelt, and for a parameter outside ``parameters``; a
        warning for any other key. The warning for a parameter of another method has only its name
        as the message, for the caller to combine them.
    """
    known = SECTIONS[part.kind].known
    holds_parameters = "parameters" in known
    for key in map(str, part.content):
        if key in known:
            continue
        place = document.place(*part.path, key)
        line = f"{part.label}: mergekit ignores the key {key!r}"
        meant = key if key in parameters else nearest(key, parameters, _MISSPELT)
        if near := nearest(key, known, _MISSPELT):
            yield Fault("key", f"{line}; did you mean {near}?", place, nearest=near)
        elif holds_parameters and meant:
            hint = "" if meant == key else f"; did you mean {meant}?"
            message = f"{line}: parameters stand under `parameters`{hint}"
            yield Fault("misplaced", message, place, nearest=meant)
        elif holds_parameters and key in foreign:
            yield Fault("foreign", f"{key} (beside `parameters`)", place, level="warning")
        else:
            message = f"{line}; there it knows {', '.join(known)}"
            yield Fault("key", message, place, level="warning")


def base_of(document: Document) -> object:
    """Return the base as it is written; None if there is none, or another recipe makes it."""
    base = document.content.get("base_model")
    made = base is not None and _path_of(reference_string(base)) in document.stages
    return None if made else base


def _path_of(reference: str) -> str:
    return re.split("[+@]", reference)[0]


def reference_string(reference: object) -> str:
    """Return a model reference as ``str(mergekit.common.ModelReference)`` writes it.

    A string is returned as it is. This repeats mergekit's code, because importing mergekit to
    report a misspelt recipe would take seconds.

    Raises:
        ValueError: mergekit would refuse the reference.
    """
    if isinstance(reference, str) and reference:
        parts = reference.split("+")
        if len(parts) > 2 or any(part.count("@") > 1 for part in parts):
            raise ValueError(f"{reference!r} is not of the form MODEL[@REVISION][+LORA[@REVISION]]")
        return reference
    if isinstance(reference, Mapping) and reference.get("model"):
        paths = [reference["model"]] + ([reference["lora"]] if reference.get("lora") else [])
        return "+".join(_path_string(path) for path in paths)
    raise ValueError(f"{reference!r} is not a model: write a path or a Hugging Face name")


def _path_string(path: object) -> str:
    if isinstance(path, str):
        return path
    if isinstance(path, Mapping) and isinstance(path.get("path"), str):
        revision = path.get("revision")
        return f"{path['path']}@{revision}" if revision else str(path["path"])
    raise ValueError(f"{path!r} is not a model: write a path, or {{path: …, revision: …}}")


def _reference(document: Document, path: Path, value: object) -> Generator[Fault, None, str | None]:
    """Yield the fault, if there is one; return the reference in its string form, or None."""
    if value is None:
        return None
    try:
        return reference_string(value)
    except ValueError as error:
        yield Fault("reference", f"{Place(path)!s}: {error}", document.place(*path))
        return None


def _wrong_shape(document: Document, path: Path, wanted: str, found: object) -> Fault:
    message = f"{Place(path)!s}: should be {wanted}, found {kind_of(found)}"
    return Fault("shape", message, document.place(*path))


def kind_of(value: object) -> str:
    """Return the type of a value in a word or two, for a message."""
    if isinstance(value, list):
        return "a list" + (f" with {kind_of(value[0])}" if value else "")
    return {str: "a text", dict: "a mapping", type(None): "nothing"}.get(type(value), repr(value))
