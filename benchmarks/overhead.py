"""What the recorder, the detection of mismatches and liveness cost a small all-reduce: pycoll with them, and without.

`python -m pycoll.benchmarks.overhead`, in a checkout. The sources have no switch for this: the core is copied, the copy
is edited, and both are compiled with overhead.cpp, whose ranks are threads. The programs take turns, so that what else
the machine does hits all alike; a run's value is its fastest sample, the result is the median over the runs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from pycoll import Communicator
from pycoll.testing import run_processes

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-pthread"]

Edits = Sequence[tuple[str, str, str]]  # file, text that is there once, what is put there
RECORDER: Edits = [
    ("csrc/cpu/recorder.h", "    const uint64_t n = ++last_;\n", "    return 0;\n    const uint64_t n = ++last_;\n"),
    (
        "csrc/cpu/recorder.h",
        "  void end(uint64_t n, bool failed) {\n",
        "  void end(uint64_t n, bool failed) {\n    return;\n",
    ),
]
MISMATCH: Edits = [("csrc/cpu/collectives.cpp", "  throw_if_different(records_, mine, a_.names);\n", "")]
LIVENESS: Edits = [
    (
        "csrc/cpu/wait.cpp",
        "void Watch::throw_failure_of(int rank) const {\n",
        "void Watch::throw_failure_of(int rank) const {\n  return;\n",
    ),
    ("csrc/cpu/wait.cpp", "  const Life life = a_.liveness[rank].look();\n", "  const Life life = Life::kAlive;\n"),
]
VARIANTS: Mapping[str, Edits] = {
    "as it is": [],
    "without the recorder": RECORDER,
    "without detecting mismatches": MISMATCH,
    "without liveness and failures": LIVENESS,
    "without all three": [*RECORDER, *MISMATCH, *LIVENESS],
}


@dataclass
class OverheadBench:
    """Times small all-reduces of pycoll's core as it is, and without what watches over it."""

    ranks: int = 2
    """Threads that take part."""
    size: int = 1024
    """Bytes of each rank's tensor, float32."""
    calls: int = 5000
    """Calls in a sample, of which a run takes 20."""
    rounds: int = 30
    """Runs of each program."""


def main(config: OverheadBench) -> int:
    """Builds, measures and prints; returns the exit status."""
    if not (ROOT / "csrc").is_dir():
        print("error: the sources are not here: run this in a checkout of pycoll", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="pycoll-overhead-") as folder:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            programs = {name: build(Path(folder) / str(i), VARIANTS[name], pool) for i, name in enumerate(VARIANTS)}
        samples: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for i in range(config.rounds):
            order = list(VARIANTS)[i % len(VARIANTS) :] + list(VARIANTS)[: i % len(VARIANTS)]
            for name in order:
                samples[name].append(_run(programs[name], config))
    seen = min(min(run_processes(_time_calls, config.ranks, config.size)) for _ in range(5))
    _show(samples, seen, config)
    return 0


def edited(source: str, file: str, edits: Edits) -> str:
    """`source`, the text of `file`, with those of the edits that are for it. ValueError where one does not apply."""
    for name, old, new in edits:
        if name != file:
            continue
        if source.count(old) != 1:
            raise ValueError(f"{file} has changed: {old!r} is there {source.count(old)} times")
        source = source.replace(old, new)
    return source


def build(folder: Path, edits: Edits, pool: ThreadPoolExecutor) -> Path:
    """The program, of sources with these edits."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in {name for name, _, _ in edits}:
        path = folder / name
        path.write_text(edited(path.read_text(), name, edits))
    sources = [*sorted((folder / "csrc" / "cpu").glob("*.cpp")), ROOT / "benchmarks" / "overhead.cpp"]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    include = [f"-I{folder / 'csrc'}", f"-I{ROOT / 'tests' / 'cpp'}"]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run([*compiler, *FLAGS, *include, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    program = folder / "overhead"
    subprocess.run([*compiler, "-pthread", *pool.map(compile_one, sources), "-o", str(program)], check=True)
    return program


def _run(program: Path, config: OverheadBench) -> float:
    """Seconds a call, of the fastest sample."""
    command = [str(program), *map(str, (config.ranks, config.size, config.calls, 20))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return min(map(float, done.stdout.split()))


def _time_calls(comm: Communicator, size: int) -> float:
    """Seconds a call through pycoll.Communicator, of the fastest sample of 2000."""
    x = torch.zeros(size // 4)
    best = float("inf")
    for _ in range(30):
        begin = time.perf_counter()
        for _ in repeat(None, 2000):
            comm.all_reduce(x)
        best = min(best, (time.perf_counter() - begin) / 2000)
    return best


def _show(samples: Mapping[str, Sequence[float]], seen: float, config: OverheadBench) -> None:
    table = Table(title=f"all-reduce of {config.size} bytes, {config.ranks} ranks")
    for column in ("the core", "ns a call", "quartiles", "it costs, ns", f"of {1e9 * seen:.0f} ns"):
        table.add_column(column)
    whole = statistics.median(samples["as it is"])
    for name, values in samples.items():
        median = statistics.median(values)
        first, _, third = statistics.quantiles(values, n=4) if len(values) > 1 else (median, median, median)
        cost = whole - median
        table.add_row(
            name,
            f"{1e9 * median:.1f}",
            f"{1e9 * first:.1f} to {1e9 * third:.1f}",
            f"{1e9 * cost:.1f}" if name != "as it is" else "",
            f"{100 * cost / seen:.1f} %" if name != "as it is" else "",
        )
    console = Console()
    console.print(table)
    console.print(f"{1e9 * seen:.0f} ns: the same through pycoll.Communicator, between {config.ranks} processes")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(OverheadBench)))
