"""obim-saliency and mergekit's commands as users type them, and what they need on disk.

Importing torch, transformers and mergekit takes a process seconds, so most tests run the real
click commands within the test's process; :func:`spawn` starts real ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.io.tasks import LoaderCache
from mergekit.scripts import merge_raw_pytorch, multimerge, run_yaml
from safetensors import safe_open
from safetensors.torch import load_file

import checkpoints
from mergekit_obim.commands import kinship as cli_kinship
from mergekit_obim.commands import report as cli_report
from mergekit_obim.commands import saliency as cli
from mergekit_obim.commands import tune as cli_tune
from mergekit_obim.methods import saliency
from mergekit_obim.saliency.file import saliency_file_name
from tiny_tokenizers import VOCAB_SIZE, byte_tokenizer

LAYERS = 2
MATH_ROWS = [f"{a} + {b} = {a + b}." for a in range(3) for b in range(4)]
CODE_ROWS = [f"def f{n}(x):\n    return x * {n}" + " + x" * (n % 3) for n in range(10)]

Recipe = dict[str, Any]


def obim_saliency(*args: object) -> Result:
    return _invoke(cli.main, args)


def obim_card(*args: object) -> Result:
    return _invoke(cli_report.card, args)


def obim_kinship(*args: object) -> Result:
    return _invoke(cli_kinship.kinship, args)


def obim_report(*args: object) -> Result:
    return _invoke(cli_report.report, args)


def obim_tune(*args: object) -> Result:
    return _invoke(cli_tune.tune, args)


def obim_eval(*args: object) -> Result:
    return _invoke(cli_tune.evaluate, args)


def mergekit_yaml(*args: object) -> Result:
    return _invoke(run_yaml.main, args)


def mergekit_pytorch(*args: object) -> Result:
    return _invoke(merge_raw_pytorch.main, args)


def mergekit_multi(*args: object) -> Result:
    return _invoke(multimerge.main, args)


def forget_who_was_read() -> None:
    """What a process of its own would start without."""
    LoaderCache().loaders.clear()
    merge_raw_pytorch.SimpleLoaderCache().loaders.clear()
    saliency._locate.cache_clear()


def _invoke(command: Any, args: Sequence[object]) -> Result:
    forget_who_was_read()
    return CliRunner().invoke(command, [str(arg) for arg in args])


def spawn(command: str, *args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run an installed command in a process of its own; without the network."""
    return subprocess.run(
        [Path(sys.executable).parent / command, *map(str, args)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def killed(
    patch: Callable[[Callable[[], None]], None],
    *args: object,
    command: Callable[..., Result] = obim_saliency,
) -> None:
    """Run a command in a child that `patch` gets a way to kill -9, and wait for that."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # OpenMP's threads did not come along
        signal.alarm(120)
        with contextlib.suppress(BaseException):
            patch(lambda: os.kill(os.getpid(), signal.SIGKILL))
            command(*args)
        os._exit(0)  # the test fails: it should have been killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def succeed(result: Result) -> Result:
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def refusal(result: Result | subprocess.CompletedProcess[str]) -> str:
    """The error that the command ended with, having made sure that it ended as it should.

    One line; of several errors their number, and then a line each.
    """
    if isinstance(result, Result):
        code, text = result.exit_code, result.stderr
        if not isinstance(result.exception, SystemExit):
            raise result.exception or AssertionError(f"it was not refused:\n{result.output}")
    else:
        code, text = result.returncode, result.stderr
    assert code == 1, text
    assert "Traceback" not in text
    # A progress bar draws itself anew after each carriage return.
    lines = [line for line in re.split(r"[\r\n]", text) if line.strip()]
    errors = [number for number, line in enumerate(lines) if line.startswith("Error: ")]
    assert len(errors) == 1, text
    first, *rest = lines[errors[0] :]
    assert first == f"Error: the recipe has {len(rest)} errors:" if rest else ":" in first, text
    assert all(line.startswith("  ") for line in rest), text
    return "\n".join([first, *rest])


def says(message: str, *words: object) -> None:
    """All the words are there; a whole path is not told from a part of a longer one."""
    for word in words:
        assert str(word) in message, f"{word!s} is not in: {message}"


@dataclass
class World:
    """A tiny Llama, three experts fine-tuned from it, each with a tokenizer, and their data.

    Attributes:
        root: The folder that holds everything.
        base, math, code, chat: Checkpoint folders. `chat` has a chat template.
        math_data, code_data: JSON-lines files of ``{"text": …}`` rows.
        saliency: The pre-pass's files for math and code.
    """

    root: Path
    base: Path
    math: Path
    code: Path
    chat: Path
    math_data: Path
    code_data: Path
    saliency: Path

    @property
    def experts(self) -> tuple[Path, Path]:
        return self.math, self.code

    def saliency_of(self, expert: Path, folder: Path | None = None) -> Path:
        return (folder or self.saliency) / saliency_file_name(str(expert))

    def recipe(self, **changes: Any) -> Recipe:
        """The contract's recipe, with the top-level keys changed; None removes one."""
        recipe = {
            "merge_method": "obim",
            "base_model": str(self.base),
            "models": [
                {
                    "model": str(self.math),
                    "parameters": {"density": 0.45},
                    "calibration": {"data": str(self.math_data), "samples": len(MATH_ROWS)},
                },
                {
                    "model": str(self.code),
                    "parameters": {"density": 0.1},
                    "calibration": str(self.code_data),
                },
            ],
            "parameters": {"saliency": str(self.saliency)},
            "calibration": {"max_length": 48},
            "dtype": "float32",
            **changes,
        }
        return {key: value for key, value in recipe.items() if value is not None}

    def models(self, **parameters: Any) -> list[dict[str, Any]]:
        """The recipe's models with these parameters each, and the same calibration."""
        return [{**model, "parameters": dict(parameters)} for model in self.recipe()["models"]]


def build_world(root: Path) -> World:
    shapes = checkpoints.llama_shapes(layers=LAYERS, vocabulary=VOCAB_SIZE)
    config = checkpoints.llama_config(layers=LAYERS, vocabulary=VOCAB_SIZE)
    base = {name: weight * 0.5 for name, weight in checkpoints.base_weights(0, shapes).items()}
    folders = {"base": base}
    for seed, name in enumerate(("math", "code", "chat"), 1):
        folders[name] = checkpoints.fine_tuned(base, seed, step=1 / 64)
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    for name, tensors in folders.items():
        checkpoints.write_checkpoint(root / name, tensors, config)
        byte_tokenizer(root / name, chat_template=template if name == "chat" else None)
    data = {name: root / f"{name}.jsonl" for name in ("math", "code")}
    write_rows(data["math"], MATH_ROWS)
    write_rows(data["code"], CODE_ROWS)
    world = World(
        root,
        *(root / name for name in folders),
        data["math"],
        data["code"],
        saliency=root / "saliency",
    )
    succeed(obim_saliency(write_recipe(root, world.recipe()), world.saliency))
    return world


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    """Rows as JSON lines; a plain text becomes ``{"text": …}``."""
    dicts = [{"text": row} if isinstance(row, str) else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in dicts), encoding="utf-8")
    return path


def write_recipe(folder: Path, recipe: object, name: str = "recipe.yml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def entries(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    """The same names, and every value the same bit for bit."""
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing
