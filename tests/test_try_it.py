"""docs/try_it.ipynb and docs/Dockerfile: the ways to try the package without installing it here.

The notebook is executed as it is, on the toy models: only names of models and data are replaced,
and cells that need a network or an account skipped. No Docker is needed, and so the image is not
built: what its file says is compared with the repository.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hatchling.build
import nbformat
import pytest
import yaml
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from nbclient import NotebookClient

import commands
import tiny_tokenizers
from toy import write_toy

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs/try_it.ipynb"
SKIP = NotebookClient.skip_cells_with_tag.default_value

# What is on the Hub, and what stands for it.
TOYS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "./models/base",
    "prithivMLmods/SmolLM2_135M_Grpo_Gsm8k": "./models/math",
    "prithivMLmods/Reasoning-SmolLM2-135M": "./models/code",
    "{data: openai/gsm8k, config: main}": "{data: data/math.jsonl}",
}

# `!command` within the kernel: a process for each would take seconds to import what it needs. In
# Jupyter, a command that fails does not end its cell; here it does.
KERNEL = f"""
import logging, shlex, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests/helpers")!r}]
from commands import COMMANDS, succeed

def system(line):
    command, *words = shlex.split(line)
    print(succeed(COMMANDS[command](*words)).output)

get_ipython().system = system
"""


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def skipped(cell: Any) -> bool:
    return SKIP in cell.metadata.get("tags", [])


@pytest.mark.slow
def test_the_notebook_goes_from_two_models_to_a_card(
    notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_toy(tmp_path)
    tiny_tokenizers.byte_tokenizer(
        tmp_path / "models/base", chat_template=tiny_tokenizers.CHAT_TEMPLATE
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for folder in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(folder, str(tmp_path / folder.lower()))
    toy = nbformat.v4.new_notebook(metadata=notebook.metadata)
    toy.cells = [nbformat.v4.new_code_cell(KERNEL), *map(with_toys, notebook.cells)]
    replaced = "".join(cell.source for cell in toy.cells)
    assert all(toy_name in replaced for toy_name in TOYS.values())

    NotebookClient(toy, resources={"metadata": {"path": tmp_path}}, timeout=120).execute()

    run = {cell.id: cell for cell in toy.cells if cell.get("execution_count")}
    assert set(run) == {toy.cells[0].id} | {
        cell.id for cell in notebook.cells if cell.cell_type == "code" and not skipped(cell)
    }
    recipe = yaml.safe_load((tmp_path / "merged/mergekit_config.yml").read_text())
    assert [model["model"] for model in recipe["models"]] == ["./models/math", "./models/code"]
    assert "no errors" in printed(run["check"])
    assert printed(run["measure"]).count("scored 30 of 30 tensors") == 2
    assert printed(run["ask"]).strip()
    [frame] = [output for output in run["report"].outputs if output.output_type == "display_data"]
    assert re.match("<iframe srcdoc=.*Whose weights they are", frame.data["text/html"], re.DOTALL)
    [card] = [output for output in run["card"].outputs if output.output_type == "execute_result"]
    assert "## How the experts were merged" in card.data["text/markdown"]
    assert "| ./models/code | 4" in card.data["text/markdown"]


def with_toys(cell: Any) -> Any:
    cell = nbformat.from_dict(cell)
    for name, toy_name in TOYS.items():
        cell.source = cell.source.replace(name, toy_name)
    return cell


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_the_notebook_is_committed_without_outputs(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs, cell.id
            assert cell.execution_count is None, cell.id


def test_only_what_needs_a_network_or_an_account_is_skipped(notebook: Any) -> None:
    assert {cell.id for cell in notebook.cells if skipped(cell)} == {"install", "login", "upload"}


def test_the_notebook_installs_what_its_cells_need(notebook: Any) -> None:
    [install] = [cell.source for cell in notebook.cells if cell.id == "install"]
    assert re.search(r'^%pip install .*"mergekit-obim\[(report)\]"$', install)


def test_hf_takes_the_upload_that_is_shown(notebook: Any) -> None:
    [upload] = [cell.source for cell in notebook.cells if cell.id == "upload"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [shown] = re.findall("^hf upload .*$", readme, re.MULTILINE)
    for command in (upload.removeprefix("!"), shown.partition("#")[0]):
        program, *words = shlex.split(command)
        assert words[:1] == ["upload"]
        # --help is answered before anything is uploaded, but not after an unknown option.
        done = commands.spawn(program, *words, "--help", cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert {word for word in words if word.startswith("-")} <= set(done.stdout.split())


# --- the image ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Dockerfile:
    """The file's instructions, in order, and the commands that its comments show."""

    instructions: list[tuple[str, list[str]]]
    shown: list[list[str]]

    @classmethod
    def read(cls, path: Path) -> Dockerfile:
        comments, code = [], []
        for line in path.read_text(encoding="utf-8").splitlines():
            (comments if line.startswith("#") else code).append(line)
        joined = "\n".join(code).replace("\\\n", " ")
        instructions = []
        for line in filter(None, map(str.strip, joined.splitlines())):
            name, _, rest = line.partition(" ")
            instructions.append((name, json.loads(rest) if name == "CMD" else shlex.split(rest)))
        shown = [line.removeprefix("#   ") for line in comments if line.startswith("#   ")]
        return cls(instructions, [shlex.split(line) for line in shown])

    def all(self, name: str) -> list[list[str]]:
        return [words for instruction, words in self.instructions if instruction == name]


DOCKERFILE = Dockerfile.read(ROOT / "docs/Dockerfile")
PROJECT = ProjectMetadata(str(ROOT), PluginManager()).config["project"]


def test_the_image_has_a_python_that_the_package_says_it_runs_on() -> None:
    names = [name for name, _ in DOCKERFILE.instructions]
    assert set(names) == {"FROM", "COPY", "RUN", "ENV", "WORKDIR", "CMD"}
    assert names[0] == "FROM"
    [[image]] = DOCKERFILE.all("FROM")
    version = re.fullmatch(r"python:(3\.\d+)-slim", image)
    assert version
    assert f"Programming Language :: Python :: {version[1]}" in PROJECT["classifiers"]


def test_what_the_image_copies_makes_the_same_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for *sources, target in DOCKERFILE.all("COPY"):
        inside = tmp_path / target.lstrip("/")
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, inside, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                inside.mkdir(exist_ok=True)
                shutil.copy(ROOT / source, inside)
    packed = []
    for number, folder in enumerate((ROOT, tmp_path / "src")):
        monkeypatch.chdir(folder)
        out = tmp_path / f"wheel-{number}"
        out.mkdir()
        with zipfile.ZipFile(out / hatchling.build.build_wheel(str(out))) as wheel:
            packed.append(set(wheel.namelist()))
    assert packed[0] == packed[1]


def test_the_image_installs_what_the_makefile_installs() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    [index] = re.findall(r"^TORCH_INDEX \?= (.*)$", makefile, re.MULTILINE)
    torch, package = DOCKERFILE.all("RUN")
    for words in (torch, package):
        assert words[:3] == ["pip", "install", "--no-cache-dir"]
        assert words[words.index("-c") + 1] == "/src/constraints.txt"
    assert torch[-3:] == ["--extra-index-url", index, "torch"]
    assert re.search("^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    extras = re.fullmatch(r"/src\[(.*)\]", package[-1])
    assert extras
    # A harness of evaluations is what nobody needs who tries the package.
    assert set(extras[1].split(",")) == {*PROJECT["optional-dependencies"]} - {
        "dev",
        "eval",
        "test",
    }


def test_the_commands_that_the_image_is_run_with_exist() -> None:
    build, *runs = DOCKERFILE.shown
    assert build == ["docker", "build", "-f", "docs/Dockerfile", "-t", "mergekit-obim", "."]
    [[work]] = DOCKERFILE.all("WORKDIR")
    [cmd] = DOCKERFILE.all("CMD")
    inside = [cmd]
    for words in runs:
        command = words.index("mergekit-obim") + 1
        assert words[:command] == f"docker run --rm -v $PWD:{work} mergekit-obim".split()
        inside.append(words[command:])
    assert {command for command, *_ in inside} == {"obim-saliency", "mergekit-yaml"}
    assert {command for command, *_ in inside} <= set(commands.COMMANDS)
