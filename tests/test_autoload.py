"""mergekit finds the merge methods by itself, once mergekit-obim is installed.

The first half runs the shim against a stand-in for mergekit, which starts in milliseconds. The
second half builds the package and installs it into fresh virtual environments, as a wheel and
editable, beside the real mergekit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "mergekit_obim" / "_autoload"
CLEAN_ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name != "MERGEKIT_OBIM_AUTOLOAD" and not name.startswith("PYTHON")
}


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command that must succeed, with the environment variables given as keywords.

    The folder matters: `python -c` and `python -m` import from it first.
    """
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**CLEAN_ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


# --- The shim, beside a stand-in for mergekit -----------------------------------------------


class StandIn:
    """A folder with a small `mergekit`, and our package with a small adapter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for package in ("mergekit", "mergekit_obim"):
            (folder / package).mkdir()
        (folder / "mergekit/__init__.py").touch()
        (folder / "mergekit/merge_methods.py").write_text("from mergekit.registry import METHODS")
        (folder / "mergekit/registry.py").write_text("METHODS = []")
        shutil.copy(ROOT / "mergekit_obim/__init__.py", folder / "mergekit_obim")
        self.adapter = folder / "mergekit_obim/methods.py"
        self.adapter.write_text(
            "from mergekit.merge_methods import METHODS\n"
            "def register():\n"
            "    if 'obim' not in METHODS:\n"
            "        METHODS.append('obim')\n"
        )

    def run(self, code: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs code in an interpreter without site-packages; the shim waits to be installed."""
        paths = os.pathsep.join([str(self.folder), str(SHIM)])
        start = "import os, sys; before = set(sys.modules); import mergekit_obim_autoload as shim\n"
        code = start + textwrap.dedent(code)
        command = (sys.executable, "-S", "-B", *flags, "-c", code)
        return run(*command, cwd=self.folder, PYTHONPATH=paths, **environment)


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


def test_registers_and_leaves_no_trace(stand_in: StandIn) -> None:
    stand_in.run("""
        finders = list(sys.meta_path)
        shim.install()
        import mergekit.merge_methods as host
        assert host.METHODS == ["obim"]
        assert sys.meta_path == finders
        assert type(host.__loader__).__name__ == "SourceFileLoader"
        assert host.__spec__.loader is host.__loader__
    """)


def test_waiting_imports_nothing(stand_in: StandIn) -> None:
    stand_in.run("""
        shim.install()
        assert set(sys.modules) - before == {"mergekit_obim_autoload"}
        import string, mergekit.registry
        assert "mergekit_obim" not in sys.modules
        assert mergekit.registry.METHODS == []
    """)


def test_switch_off(stand_in: StandIn) -> None:
    code = """
        shim.install()
        import mergekit.merge_methods as host
        assert host.METHODS == []
        import mergekit_obim
        mergekit_obim.register()
        assert host.METHODS == ["obim"]
    """
    stand_in.run(code, MERGEKIT_OBIM_AUTOLOAD="0")
    stand_in.run("os.environ['MERGEKIT_OBIM_AUTOLOAD'] = '0'\n" + textwrap.dedent(code))
    stand_in.run(
        """
        import mergekit.merge_methods as host
        shim.install()
        assert host.METHODS == []
        """,
        MERGEKIT_OBIM_AUTOLOAD="0",
    )


@pytest.mark.parametrize(
    "first",
    [
        "import mergekit_obim; mergekit_obim.register()",
        "import mergekit_obim.methods",
        "from mergekit_obim.methods import register; register()",
        "import importlib; importlib.import_module('mergekit.merge_methods')",
    ],
)
def test_whatever_is_imported_first(stand_in: StandIn, first: str) -> None:
    stand_in.run(f"""
        shim.install()
        {first}
        import mergekit.merge_methods as host
        assert host.METHODS == ["obim"]
        import mergekit_obim
        mergekit_obim.register()
        mergekit_obim.register()
        assert host.METHODS == ["obim"]
        assert not any(isinstance(finder, shim._Finder) for finder in sys.meta_path)
    """)


def test_installed_after_mergekit(stand_in: StandIn) -> None:
    stand_in.run("""
        import mergekit.merge_methods as host
        shim.install()
        assert host.METHODS == ["obim"]
        shim.install()
        assert host.METHODS == ["obim"]
    """)


def test_looking_is_not_importing(stand_in: StandIn) -> None:
    stand_in.run("""
        import importlib.util, inspect
        shim.install()
        spec = importlib.util.find_spec("mergekit.merge_methods")
        assert "METHODS" in spec.loader.get_source("mergekit.merge_methods")
        import mergekit.merge_methods as host
        assert host.METHODS == ["obim"]
        assert "METHODS" in inspect.getsource(host)
    """)


def test_reload(stand_in: StandIn) -> None:
    stand_in.run("""
        import importlib
        shim.install()
        import mergekit.merge_methods as host, mergekit_obim.methods as ours
        importlib.reload(host)
        importlib.reload(ours)
        assert host.METHODS == ["obim"]
    """)


def test_pth_and_start_together(stand_in: StandIn) -> None:
    line = (SHIM / "mergekit_obim_autoload.pth").read_text()
    entry_point = (SHIM / "mergekit_obim_autoload.start").read_text()
    assert line.startswith("import ")
    assert [line.count("\n"), entry_point.count("\n")] == [1, 1]
    # PEP 829 resolves the entry point with pkgutil.resolve_name and calls it without arguments.
    stand_in.run(f"""
        import pkgutil
        exec({line!r})
        pkgutil.resolve_name({entry_point.strip()!r})()
        assert sum(isinstance(finder, shim._Finder) for finder in sys.meta_path) == 1
        import mergekit.merge_methods as host
        assert host.METHODS == ["obim"]
    """)


@pytest.mark.parametrize("ours_is_first", [True, False])
@pytest.mark.parametrize("search", ["sys.meta_path", "importlib"])
def test_beside_another_plugin_of_this_kind(
    stand_in: StandIn, search: str, ours_is_first: bool
) -> None:
    find = {
        "sys.meta_path": (
            "next(filter(None, (f.find_spec(name, path, target)"
            " for f in sys.meta_path if f is not self)), None)"
        ),
        "importlib": "(sys.meta_path.remove(self), importlib.util.find_spec(name))[1]",
    }[search]
    stand_in.run(f"""
        import importlib.util
        class Other:
            def find_spec(self, name, path=None, target=None):
                if name != "mergekit.merge_methods":
                    return None
                spec = {find}
                if spec is not None:
                    execute = spec.loader.exec_module
                    def exec_module(module):
                        execute(module)
                        module.METHODS.append("other")
                    spec.loader.exec_module = exec_module
                return spec
        other = Other()
        if not {ours_is_first}:
            shim.install()
        sys.meta_path.insert(0, other)
        if {ours_is_first}:
            shim.install()
        import mergekit.merge_methods as host
        assert set(host.METHODS) == {{"obim", "other"}}, host.METHODS
        assert host.METHODS.count("obim") == 1
    """)


def test_editable_mergekit_with_a_finder(stand_in: StandIn, tmp_path: Path) -> None:
    elsewhere = tmp_path / "sources"
    elsewhere.mkdir()
    shutil.move(stand_in.folder / "mergekit", elsewhere / "checkout")
    stand_in.run(f"""
        import importlib.util
        class EditableFinder:  # What setuptools installs.
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                if name == "mergekit":
                    folder = {str(elsewhere / "checkout")!r}
                    return importlib.util.spec_from_file_location(
                        name, folder + "/__init__.py", submodule_search_locations=[folder])
        sys.meta_path.append(EditableFinder)
        shim.install()
        import mergekit.merge_methods as host
        assert host.METHODS == ["obim"]
    """)


@pytest.mark.parametrize(
    "broken",
    [
        "raise RuntimeError('broken on purpose')",
        "import no_such_module",
        "syntax error",
        "def register(): raise ValueError('broken on purpose')",
    ],
)
def test_broken_plugin_stays_out(stand_in: StandIn, broken: str) -> None:
    stand_in.adapter.write_text(broken)
    code = """
        shim.install()
        import importlib
        import mergekit.merge_methods as host
        importlib.reload(host)
        assert host.METHODS == []
        assert not any(isinstance(finder, shim._Finder) for finder in sys.meta_path)
    """
    for flags in ([], ["-W", "always"], ["-W", "error"]):
        stderr = stand_in.run(code, *flags).stderr
        assert stderr.count("mergekit-obim stays out") == 1, stderr
        assert "Traceback" not in stderr


def test_broken_mergekit_fails_as_without_us(stand_in: StandIn) -> None:
    stand_in.run("""
        shim.install()
        sys.modules["mergekit.registry"] = None
        try:
            import mergekit.merge_methods
        except ModuleNotFoundError as error:
            assert error.name == "mergekit.registry"
        else:
            raise AssertionError
        del sys.modules["mergekit.registry"]
        import mergekit.merge_methods as host
        assert host.METHODS == ["obim"]
    """)


def test_threads(stand_in: StandIn) -> None:
    slow = "import time; time.sleep(0.05)\n"
    for module in (stand_in.adapter, stand_in.folder / "mergekit/merge_methods.py"):
        module.write_text(slow + module.read_text())
    stand_in.run("""
        import importlib, threading
        shim.install()
        errors = []
        def work(index):
            try:
                if index % 2:
                    import mergekit_obim
                    mergekit_obim.register()
                import mergekit.merge_methods as host
                assert host.METHODS == ["obim"]
            except BaseException as error:
                errors.append(error)
        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
    """)


def test_package_is_light() -> None:
    code = """
        import sys
        before = set(sys.modules)
        import mergekit_obim
        heavy = {"click", "mergekit", "numpy", "pydantic", "safetensors", "torch", "transformers"}
        loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
        assert not loaded & heavy, loaded
    """
    run(sys.executable, "-c", textwrap.dedent(code), cwd=ROOT)


# --- The package, installed beside the real mergekit ----------------------------------------


@dataclass
class Environment:
    """A virtual environment of its own, which sees the test environment's packages but ours."""

    folder: Path

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def python(self) -> Path:
        return self.bin / "python"

    @property
    def site_packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", "venv", {"base": str(self.folder)}))

    def files(self) -> set[Path]:
        return {path for path in self.folder.rglob("*") if not path.is_dir()}

    def pip(self, *arguments: object) -> None:
        """Runs the test environment's pip on this environment."""
        options = ("--disable-pip-version-check", "--python", self.python)
        run(sys.executable, "-m", "pip", *options, *arguments, cwd=self.folder)

    def install(self, *what: object) -> None:
        """Installs without a network, and builds, for editable installs, without isolation."""
        self.pip("install", "--no-index", "--no-deps", "--no-build-isolation", *what)

    @classmethod
    def create(cls, folder: Path, packages: Path) -> Environment:
        """A fresh environment with mergekit and its scripts, and without mergekit-obim."""
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=packages)
        environment = cls(folder)
        # A folder named in a .pth file is put on sys.path; .pth files inside it are not read.
        (environment.site_packages / "_packages.pth").write_text(f"{packages}\n")
        for entry_point in distribution("mergekit").entry_points:
            if entry_point.name in ("mergekit-yaml", "mergekit-multi", "mergekit-pytorch"):
                script = environment.bin / entry_point.name
                script.write_text(
                    f"#!{environment.python}\nimport sys\n"
                    f"from {entry_point.module} import {entry_point.attr}\n"
                    f"if __name__ == '__main__':\n    sys.exit({entry_point.attr}())\n"
                )
                script.chmod(0o755)
        return environment


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to what the test environment has installed, but for mergekit-obim."""
    folder = tmp_path_factory.mktemp("packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.suffix != ".pth" and "mergekit_obim" not in path.name:
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `python -m build` makes: from the sdist, so that this is tested too."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session", params=["wheel", "editable"])
def source(request: pytest.FixtureRequest) -> tuple[object, ...]:
    """What to tell `pip install`."""
    if request.param == "wheel":
        return (request.getfixturevalue("wheel"),)
    return ("--editable", ROOT)


@pytest.fixture(scope="session")
def environment(
    source: tuple[object, ...], packages: Path, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    """A fresh environment in which mergekit-obim is installed."""
    environment = Environment.create(tmp_path_factory.mktemp("environment") / "venv", packages)
    environment.install(*source)
    return environment


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the smallest Llama there is, `base`, and an `expert` with other weights."""
    folder = tmp_path_factory.mktemp("models")
    width, vocabulary = 8, 16
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "dtype": "float32",
    }
    shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        "lm_head.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    for part in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"model.layers.0.{part}.weight"] = (width,)
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        shapes[f"model.layers.0.self_attn.{part}.weight"] = (width, width)
    for part in ("gate_proj", "up_proj", "down_proj"):
        shapes[f"model.layers.0.mlp.{part}.weight"] = (width, width)
    for seed, name in enumerate(("base", "expert")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        generator = np.random.default_rng(seed)
        tensors = {key: generator.normal(size=s).astype("float32") for key, s in shapes.items()}
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def recipe(base: Path, expert: Path) -> str:
    """The least obim recipe: one expert that may claim every position."""
    document = {
        "merge_method": "obim",
        "base_model": str(base),
        "models": [{"model": str(expert), "parameters": {"density": 1.0}}],
        "parameters": {"criterion": "magnitude"},
        "dtype": "float32",
    }
    return json.dumps(document)  # JSON is YAML.


@pytest.mark.slow
def test_commands(environment: Environment, models: Path, tmp_path: Path) -> None:
    of_models, of_files, of_steps = (tmp_path / f"{name}.yml" for name in ("yaml", "raw", "multi"))
    of_models.write_text(recipe(models / "base", models / "expert"))
    files = [models / name / "model.safetensors" for name in ("base", "expert")]
    of_files.write_text(recipe(*files))
    of_steps.write_text(of_models.read_text())
    out = {name: tmp_path / name for name in ("yaml", "module", "multi", "pytorch")}
    module = ("-m", "mergekit.scripts.run_yaml")
    multi = ("mergekit-multi", of_steps, "-I", tmp_path / "steps", "--out-path")
    commands = [
        (environment.bin / "mergekit-yaml", of_models, out["yaml"]),
        (environment.python, *module, of_models, out["module"]),
        (environment.bin / multi[0], *multi[1:], out["multi"]),
        (environment.bin / "mergekit-pytorch", of_files, out["pytorch"]),
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda command: run(*command, cwd=tmp_path), commands))
    expert = load_file(files[1])
    for name, folder in out.items():
        (written,) = folder.glob("*.safetensors")
        merged = load_file(written)
        assert merged.keys() == expert.keys(), name
        for key, tensor in expert.items():
            np.testing.assert_array_equal(merged[key], tensor, err_msg=f"{name}: {key}")


@pytest.mark.slow
def test_python_api_and_children(environment: Environment, tmp_path: Path) -> None:
    """In one program: `-I`, forked and spawned children that import mergekit themselves."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import multiprocessing, sys

        def look():
            assert sys.flags.isolated
            from mergekit import merge_methods
            ours = "obim ties_obm obm_sign regmean_diag regmean consensus_ta pcb"
            for name in ours.split():
                assert merge_methods.get(name).spec.name == name
            assert not any("mergekit_obim" in type(f).__module__ for f in sys.meta_path)

        if __name__ == "__main__":
            assert "mergekit" not in sys.modules
            children = []
            for method in ("fork", "spawn"):
                children.append(multiprocessing.get_context(method).Process(target=look))
                children[-1].start()
            look()
            import torch, mergekit_obim
            from mergekit.merge_methods import merge_state_dicts
            for _ in range(2):
                mergekit_obim.register()
            base, expert = {"w": torch.zeros(2, 3)}, {"w": torch.randn(2, 3)}
            merged = merge_state_dicts(
                {"base": base, "expert": expert}, "obim", base="base",
                parameters={"criterion": "magnitude", "density": 1.0},
            )
            assert torch.equal(merged["w"], expert["w"])
            for child in children:
                child.join()
                assert child.exitcode == 0, child
        """)
    )
    run(environment.python, "-I", program, cwd=tmp_path)


@pytest.mark.slow
def test_switched_off_or_broken(wheel: Path, packages: Path, tmp_path: Path) -> None:
    """mergekit works without us, silently if we are switched off, with one warning if broken."""
    environment = Environment.create(tmp_path / "venv", packages)
    environment.install(wheel)
    code = """
        import sys
        from mergekit import merge_methods
        names = {method.spec.name for method in merge_methods.registered_methods()}
        assert "ties" in names and "obim" not in names
        if "broken" not in sys.argv:
            import mergekit_obim
            mergekit_obim.register()
            mergekit_obim.register()
            assert merge_methods.get("obim").spec.name == "obim"
    """
    command = (environment.python, "-c", textwrap.dedent(code))
    run(*command, cwd=tmp_path, MERGEKIT_OBIM_AUTOLOAD="0")
    adapter = environment.site_packages / "mergekit_obim/methods/__init__.py"
    adapter.write_text("raise RuntimeError('broken on purpose')")
    done = run(*command, "broken", cwd=tmp_path)
    assert done.stderr.count("mergekit-obim stays out: RuntimeError: broken on purpose") == 1


@pytest.mark.slow
def test_uninstall_leaves_no_file(
    source: tuple[object, ...], packages: Path, tmp_path: Path
) -> None:
    environment = Environment.create(tmp_path / "venv", packages)
    before = environment.files()
    environment.install(*source)
    run(environment.python, "-c", "import mergekit_obim, mergekit_obim_autoload", cwd=tmp_path)
    names = {path.name for path in environment.files() - before}
    assert {f"mergekit_obim_autoload.{suffix}" for suffix in ("py", "pth", "start")} <= names
    assert "obim-saliency" in names
    environment.pip("uninstall", "--yes", "mergekit-obim")
    assert environment.files() == before
