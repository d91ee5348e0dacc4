"""README and docs are executed: what they show is what happens.

Every fenced block has an HTML comment before it, which readers do not see:

    <!-- test: run -->      the block is run; each of its commands must succeed. On the README it
                            is a real shell that does it, elsewhere only lines that need one
                            (`run anew`: the saliency files that are there are removed before)
    <!-- test: output -->   every line was printed by the last run; … stands for anything
    <!-- test: python -->   the block is executed
    <!-- test: quote PATH --> each of its paragraphs is in that file of the repository
    <!-- test: file NAME -->  the block is written to NAME
    <!-- test: plan -->     the block, laid over the page's first recipe, is planned by mergekit
                            (`plan without KEY`: without that key of the recipe)
    <!-- test: experts -->  the same, read as obim-saliency does
    <!-- test: options -->  only the options of its commands are looked at
    <!-- test: skip WHY --> nothing is done

A page's blocks share a folder, which holds the toy models of toy.py and their saliency.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from mergekit import merge_methods
from mergekit.scripts import run_yaml

from commands import (
    mergekit_multi,
    mergekit_yaml,
    obim_card,
    obim_eval,
    obim_kinship,
    obim_report,
    obim_saliency,
    obim_tune,
    succeed,
    write_recipe,
)
from mergekit_obim.calibration.data.text import INPUT_FIELDS
from mergekit_obim.commands import kinship as cli_kinship
from mergekit_obim.commands import report as cli_report
from mergekit_obim.commands import saliency as cli
from mergekit_obim.commands import tune as cli_tune
from mergekit_obim.methods import METHODS
from mergekit_obim.methods.parameters import PLANNED
from mergekit_obim.recipe import Document
from mergekit_obim.recipe.calibration import FILE_SUFFIXES, Calibration, DataSource
from mergekit_obim.recipe.experts import find_experts
from mergekit_obim.saliency.file import SaliencyMetadata
from planning import plan
from tiny_processors import write_charts
from toy import write_toy

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(
    r"(?:^<!-- test: (?P<kind>\w+) ?(?P<argument>[^\n]*?) -->\n)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_LANGUAGE = {
    "run": "bash", "output": "text", "python": "python", "plan": "yaml", "experts": "yaml",
    "options": "bash",
}  # fmt: skip


# What needs no shell: one command, perhaps with a file for its output or the exit status it has.
_SIMPLE = re.compile(
    r"(?P<words>[^\n<>|&;$\\]+?)(?: > (?P<file>[\w.]+))?(?: \|\| test \$\? = (?P<code>\d+))?"
)

# Within this process, as a new one takes seconds to import what they need.
COMMANDS: dict[str, Callable[..., Result]] = {
    "obim-saliency": obim_saliency,
    "obim-card": obim_card,
    "obim-eval": obim_eval,
    "obim-kinship": obim_kinship,
    "obim-report": obim_report,
    "obim-tune": obim_tune,
    "mergekit-multi": mergekit_multi,
    "mergekit-yaml": mergekit_yaml,
}


@dataclass(frozen=True)
class Block:
    kind: str | None
    argument: str
    language: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    content = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(content):
        line = content.count("\n", 0, match.start("language")) + 1
        yield Block(match["kind"], match["argument"] or "", match["language"], match["text"], line)


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy models and data, measured as the README's recipe says."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    write_charts(folder)
    recipe = next(yaml.safe_load(b.text) for b in blocks(PAGES[0]) if b.kind == "file")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        succeed(obim_saliency(write_recipe(folder, recipe), "./saliency"))
    return folder


class Reader:
    """Does what a page's blocks say, in order, in a folder of the page's own."""

    def __init__(self, folder: Path, *, in_shell: bool) -> None:
        self.folder, self.in_shell = folder, in_shell
        self.printed: list[str] = []
        self.recipe: dict[str, Any] = {}

    def do(self, block: Block) -> None:
        assert _LANGUAGE.get(block.kind or "", block.language) == block.language
        getattr(self, f"_{block.kind}")(block)

    def _quote(self, block: Block) -> None:
        source = (ROOT / block.argument).read_text(encoding="utf-8")
        for paragraph in block.text.strip().split("\n\n"):
            assert paragraph.strip("\n") in source, paragraph

    def _skip(self, block: Block) -> None:
        assert block.argument, "say why"

    def _run(self, block: Block) -> None:
        self._options(block)
        if block.argument == "anew":
            shutil.rmtree(self.folder / "saliency", ignore_errors=True)
        text = block.text
        # Lines that need each other: one in the background, or one over several lines.
        whole = self.in_shell or re.search(r"[&\\]$", text, re.MULTILINE)
        text = "".join(map(self._printed, [text] if whole else text.splitlines()))
        # A progress bar draws itself anew after each carriage return, and blanks what was longer.
        self.printed = [line.rstrip() for line in re.split(r"[\r\n]+", text)]

    def _printed(self, text: str) -> str:
        simple = _SIMPLE.fullmatch(text.strip())
        command, *words = shlex.split(simple["words"] if simple else "", comments=True) or [""]
        if not self.in_shell and simple and command in COMMANDS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(logging.root, "handlers", [])  # pytest's: the command sets its own
                result = COMMANDS[command](*words)
            if simple["code"]:
                assert isinstance(result.exception, SystemExit), result.exception
                assert result.exit_code == int(simple["code"]), result.output
            else:
                succeed(result)
            if simple["file"]:
                (self.folder / simple["file"]).write_text(result.stdout, encoding="utf-8")
            return f"{'' if simple['file'] else result.stdout}\n{result.stderr}\n"
        binaries = Path(sys.executable).parent
        environment = {
            **os.environ,
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=300,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def _output(self, block: Block) -> None:
        for line in block.text.splitlines():
            pattern = re.compile(re.escape(line).replace("…", ".+"))
            found = any(pattern.fullmatch(printed) for printed in self.printed)
            assert found, f"{line!r} was not printed; this was: {self.printed}"

    def _python(self, block: Block) -> None:
        exec(compile(block.text, f"line {block.line}", "exec"), {})

    def _file(self, block: Block) -> None:
        (self.folder / block.argument).write_text(block.text, encoding="utf-8")
        if not self.recipe:
            self.recipe = yaml.safe_load(block.text)

    def _laid_over(self, block: Block) -> dict[str, Any]:
        left_out = block.argument.removeprefix("without ").split()
        # mergekit takes either `models` or `slices`.
        recipe = {key: value for key, value in self.recipe.items() if key not in left_out}
        recipe |= yaml.safe_load(block.text)
        if recipe["merge_method"] == "ties_obm":
            recipe["models"] = [{"calibration": "data/math.jsonl", **m} for m in recipe["models"]]
        return recipe

    def _plan(self, block: Block) -> None:
        assert plan(self._laid_over(block)).tasks

    def _experts(self, block: Block) -> None:
        found = find_experts(Document(self._laid_over(block)))
        assert found.measured
        assert not found.faults

    def _options(self, block: Block) -> None:
        for line in block.text.splitlines():
            command, *words = line.partition("#")[0].split()
            known = OPTIONS.get(command)
            if known is not None:
                assert {word for word in words if word.startswith("-")} <= known, line


OPTIONS = {
    "obim-saliency": {option for p in cli.main.params for option in p.opts},
    "obim-eval": {option for p in cli_tune.evaluate.params for option in p.opts},
    "obim-tune": {option for p in cli_tune.tune.params for option in p.opts},
    "obim-card": {option for p in cli_report.card.params for option in p.opts},
    "obim-kinship": {option for p in cli_kinship.kinship.params for option in p.opts},
    "obim-report": {option for p in cli_report.report.params for option in p.opts},
    "mergekit-yaml": {option for p in run_yaml.main.params for option in p.opts},
}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_does_what_it_shows(
    page: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(toy, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if page.name == "README.md":
        shutil.rmtree(tmp_path / "saliency")  # which its own commands make
    reader = Reader(tmp_path, in_shell=page.name == "README.md")
    for block in blocks(page):
        assert block.kind, f"{page.name}:{block.line}: say how this block is tested: {__doc__}"
        try:
            reader.do(block)
        except Exception as error:
            raise AssertionError(f"{page.name}:{block.line}: {error}") from error


# --- links and names ----------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(linked), target


def test_every_function_that_the_method_page_names_exists() -> None:
    names = re.findall(r"`((?:kernels|calibration|models|methods)\.[\w.]+)`", METHOD)
    assert len(names) > 20
    for name in names:
        parts = name.split(".")
        for length in range(len(parts) - 1, 0, -1):
            try:
                found: Any = importlib.import_module(".".join(["mergekit_obim", *parts[:length]]))
            except ModuleNotFoundError:
                continue
            break
        for attribute in parts[length:]:
            found = getattr(found, attribute)


METHOD = (ROOT / "docs/method.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
PARAMETERS = RECIPES.partition("\n### ")[0]
CALIBRATION = RECIPES.partition("\n## Calibration\n")[2]
TUNING = (ROOT / "docs/tuning.md").read_text(encoding="utf-8")
FORMAT = (ROOT / "docs/saliency_format.md").read_text(encoding="utf-8")


def cells(first: str, section: str, second: str = "") -> list[str]:
    """The rest of the table row that begins with `first`, and then has `second`."""
    rows = re.findall(rf"^\| \[?`{re.escape(first)}`(?:\]\([^)]*\))? \|(.*)\|$", section, re.M)
    [row] = [row for row in rows if second in row.split("|")[0] or " every " in row.split("|")[0]]
    return [cell.strip() for cell in row.split("|")]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.spec.name)
def test_the_recipes_page_has_every_parameter_as_it_is(method: Any) -> None:
    assert merge_methods.get(method.spec.name) is method
    for parameter in method.spec.parameters:
        if parameter.name in PLANNED:
            assert f"`{parameter.name}`" not in RECIPES
            continue
        _, scope, kinds, default = cells(parameter.name, PARAMETERS, f"`{method.spec.name}`")
        assert scope == ("all" if parameter.scope.name == "SHARED" else "an expert")
        if parameter.choices:
            assert kinds == ", ".join(f"`{choice}`" for choice in parameter.choices)
        if parameter.default is not None:
            assert default.strip("`") == str(parameter.default).replace("True", "true")
        assert parameter.name in anchors(ROOT / "docs/recipes.md")
    assert f"`{method.spec.name}`" in RECIPES.partition("\n## ")[0]


def test_the_recipes_page_has_every_calibration_key_as_it_is() -> None:
    fields = {**DataSource.model_fields, **Calibration.model_fields}
    for name, field in fields.items():
        if name == "sources":  # `data` in recipes
            continue
        _, default, _ = cells(name, CALIBRATION)
        if field.default is not None and not field.is_required():
            assert default.strip("`") == str(field.default).replace("False", "false")
    for name in (*INPUT_FIELDS, *FILE_SUFFIXES):
        assert f"`{name}`" in RECIPES


def test_the_recipes_page_has_every_option() -> None:
    for option in OPTIONS["obim-saliency"] - {"config", "out_dir", "more", "--version", "--help"}:
        assert f"`{option}`" in RECIPES, option


def test_the_tuning_page_has_every_option_of_its_own() -> None:
    for command in ("obim-tune", "obim-eval"):
        for option in OPTIONS[command] - OPTIONS["obim-card"]:
            assert not option.startswith("-") or f"`{option}" in TUNING, option


def test_the_format_page_has_every_metadata_key() -> None:
    required = {"format", "format_version"}
    required |= {name for name, f in SaliencyMetadata.model_fields.items() if f.is_required()}
    for name in {*required, *SaliencyMetadata.model_fields}:
        need, _ = cells(name, FORMAT)
        assert need == ("required" if name in required else "optional")
