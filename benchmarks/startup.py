"""What mergekit-obim costs a Python program that never imports mergekit.

Times `python -c pass` in two virtual environments that differ only in the three files which a
wheel puts at the root of site-packages (mergekit_obim/_autoload/). Starts alternate between the
two, in random order within each pair, so that whatever else the machine does falls on both alike.
Prints the medians of the elapsed and of the processor time, the medians of the paired differences
with 95 % bootstrap intervals, and one JSON line. Exits with 1 if the difference in processor time,
which other programs on a busy machine stretch less, is not below --limit.

    python benchmarks/startup.py [--pairs 400] [--limit 1.0]
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

SHIM = Path(__file__).resolve().parent.parent / "mergekit_obim" / "_autoload"
WARM_UP = 20


def environment(folder: Path, with_shim: bool) -> Path:
    """Makes a virtual environment with setuptools' start-up files and returns its interpreter.

    torch wants setuptools, so they are wherever mergekit is; the first `.pth` file costs
    every start a codec that later ones find loaded.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    here = Path(sysconfig.get_path("purelib"))
    shutil.copy(here / "distutils-precedence.pth", site_packages)
    shutil.copytree(here / "_distutils_hack", site_packages / "_distutils_hack")
    if with_shim:
        for path in SHIM.glob("mergekit_obim_autoload.*"):
            shutil.copy(path, site_packages)
    compileall.compile_dir(site_packages, quiet=1)  # As pip does when it installs.
    return folder / "bin" / "python"


def start_and_end(python: Path) -> tuple[float, float]:
    """One start, from spawning the process to its end: elapsed and processor milliseconds."""
    start = time.perf_counter_ns()
    child = os.posix_spawn(python, [str(python), "-c", "pass"], os.environ)
    _, _, usage = os.wait4(child, 0)
    elapsed = (time.perf_counter_ns() - start) / 1e6
    return elapsed, (usage.ru_utime + usage.ru_stime) * 1e3


def interval(values: list[float], rng: random.Random) -> tuple[float, float]:
    """A 95 % bootstrap interval of the median."""
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(1000))
    return medians[25], medians[974]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=400, help="timed starts of each environment")
    parser.add_argument("--limit", type=float, default=1.0, help="milliseconds it may cost")
    arguments = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        without = environment(Path(folder, "without"), with_shim=False)
        with_it = environment(Path(folder, "with"), with_shim=True)
        for python in (without, with_it) * WARM_UP:
            start_and_end(python)
        times: dict[Path, list[tuple[float, float]]] = {without: [], with_it: []}
        for _ in range(arguments.pairs):
            for python in rng.sample((without, with_it), k=2):
                times[python].append(start_and_end(python))
    result: dict[str, object] = {
        "benchmark": "startup",
        "python": platform.python_version(),
        "pairs": arguments.pairs,
        "limit_ms": arguments.limit,
    }
    print(f"medians of {arguments.pairs} starts, in ms")
    print(f"{'':10}{'without':>9}{'with':>9}{'difference':>12}")
    cost = 0.0
    for index, clock in enumerate(("elapsed", "processor")):
        bare, ours = ([both[index] for both in times[python]] for python in (without, with_it))
        differences = [b - a for a, b in zip(bare, ours, strict=True)]
        low, high = interval(differences, rng)
        medians = [statistics.median(values) for values in (bare, ours, differences)]
        cost = medians[2]
        print(
            f"{clock:10}{medians[0]:9.3f}{medians[1]:9.3f}{cost:12.3f}  ({low:.3f} to {high:.3f})"
        )
        keys = [f"{clock}_{what}_ms" for what in ("without", "with", "difference")]
        result |= {key: round(value, 3) for key, value in zip(keys, medians, strict=True)}
        result[f"{clock}_difference_95_ms"] = [round(low, 3), round(high, 3)]
    print(json.dumps(result))
    sys.exit(cost >= arguments.limit)


if __name__ == "__main__":
    main()
