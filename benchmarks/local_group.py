"""All-reduce among ranks that share a GPU (pycoll.LocalGroup), eager and in a graph, beside the device's copy ceiling.

`pycoll bench local-group --help`. Every tensor must be read once and written once, so the ceiling is a copy of as many
bytes as all ranks' tensors hold together, by torch, in the same run.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import pycoll
from pycoll.collectives import Algorithm

from . import machine, report, timing
from .gpu_calls import stopwatch

SAMPLES = 15


@dataclass
class LocalGroupBench:
    """Times all-reduce (sum, in place) among ranks that share a GPU, at many sizes, beside a copy."""

    ranks: tuple[int, ...] = (2, 8)
    """Ranks on the GPU."""
    smallest: str = "1KiB"
    """Smallest size of each rank's tensor."""
    largest: str = "1GiB"
    """Largest size; sizes at which the tensors do not fit in memory are left out."""
    factor: int = 4
    """Between one size and the next, from the largest down."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Of the tensors."""
    algorithms: tuple[Algorithm, ...] = ("auto", "one_shot", "two_shot", "ring", "tree")
    """To compare."""
    forced_factor: int = 4
    """Between one size and the next for algorithms other than auto."""
    seconds: float = 3600.0
    """After so long no further case is begun."""
    output: Path = Path("bench-results")
    """Folder for the JSON file."""


@dataclass(frozen=True)
class Row:
    """One way to run one case; seconds a call, the bytes that must move in it, and the copy of as many bytes."""

    ranks: int
    size: int
    dtype: str
    algorithm: str
    mode: str
    seconds: float
    moved_bytes: int
    copy_seconds: float

    @property
    def share(self) -> float:
        """Of the copy's bandwidth."""
        return self.copy_seconds / self.seconds


def measure(call: Callable[[], object], calls: int) -> float:
    """Median seconds a call on the GPU, over samples of `calls` one after another."""

    def sample() -> None:
        for _ in range(calls):
            call()

    stopwatch(sample)  # warms up
    return statistics.median(stopwatch(sample) / calls for _ in range(SAMPLES))


def captured(call: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of `calls` calls."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def copy_ceiling(size: int, calls: int) -> float:
    """Seconds that torch takes to copy `size` bytes on the GPU."""
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return measure(captured(lambda: target.copy_(source), calls).replay, 1) / calls


def cases_of(config: LocalGroupBench, free_bytes: int) -> list[tuple[int, int, str, tuple[Algorithm, ...]]]:
    """What to run: ranks, size, dtype and algorithms; tensors that do not fit in `free_bytes` are left out."""
    smallest, largest = timing.parse_bytes(config.smallest), timing.parse_bytes(config.largest)
    chosen = set(timing.sizes(smallest, largest, config.factor, 4))
    forced = set(timing.sizes(smallest, largest, config.forced_factor, 4))
    found: list[tuple[int, int, str, tuple[Algorithm, ...]]] = []
    for ranks in config.ranks:
        for dtype in config.dtypes:
            for size in sorted(chosen | forced):
                here = tuple(name for name in config.algorithms if size in (chosen if name == "auto" else forced))
                if here and 4 * ranks * size < free_bytes:
                    found.append((ranks, size, dtype, here))
    return found


def rows_of(ranks: int, size: int, dtype: str, algorithms: tuple[Algorithm, ...]) -> Iterator[Row]:
    """All ways to run one case."""
    kind = cast(torch.dtype, getattr(torch, dtype))
    group = pycoll.LocalGroup(ranks)
    tensors = [torch.zeros(size // kind.itemsize, dtype=kind, device="cuda") for _ in range(ranks)]
    calls = max(1, min(50, (1 << 28) // (ranks * size)))
    copy_seconds = copy_ceiling(ranks * size, calls)
    for algorithm in algorithms:

        def call(algorithm: Algorithm = algorithm) -> None:
            group.all_reduce(tensors, algorithm=algorithm)

        times = {"eager": measure(call, calls), "graph": measure(captured(call, calls).replay, 1) / calls}
        for mode, seconds in times.items():
            yield Row(ranks, size, dtype, algorithm, mode, seconds, 2 * ranks * size, copy_seconds)
    group.close()


def table(rows: list[Row]) -> Table:
    """A line a row."""
    shown = Table(title="all-reduce among ranks on one GPU", box=box.SIMPLE)
    for name in ("ranks", "size", "dtype", "algorithm", "mode", "time us", "moved GB/s", "of the copy"):
        shown.add_column(name, justify="right")
    for row in rows:
        gbs = row.moved_bytes / row.seconds / 1e9
        case = (str(row.ranks), timing.format_bytes(row.size), row.dtype, row.algorithm, row.mode)
        shown.add_row(*case, report.format_seconds(row.seconds), f"{gbs:.0f}", f"{row.share:.0%}")
    return shown


def main(config: LocalGroupBench) -> int:
    """Runs the benchmark; prints the table and writes JSON. Returns the exit code."""
    if not torch.cuda.is_available():
        Console(stderr=True).print("pycoll bench local-group: there is no CUDA GPU", style="red")
        return 2
    rows: list[Row] = []
    left_out: list[str] = []
    path = config.output / "local_group.json"
    deadline = time.monotonic() + config.seconds
    cases = cases_of(config, torch.cuda.mem_get_info()[0])
    for ranks, size, dtype, algorithms in track(cases, "measuring", console=Console(stderr=True)):
        if time.monotonic() > deadline:
            left_out.append(f"{ranks} ranks, {timing.format_bytes(size)}, {dtype}")
            continue
        rows += rows_of(ranks, size, dtype, algorithms)
        report.write(path, to_json(rows, left_out))  # what follows may hang
        torch.cuda.empty_cache()
    console = Console(width=110)
    console.print(table(rows))
    if left_out:
        console.print(f"Left out, as {config.seconds:.0f} s were over before: {'; '.join(left_out)}", highlight=False)
    report.write(path, to_json(rows, left_out))
    print(f"wrote {path}")
    return 0


def to_json(rows: list[Row], left_out: list[str]) -> str:
    """All of it."""
    found = {
        "benchmark": "local-group",
        "machine": {**machine.describe(), "gpu": torch.cuda.get_device_name()},
        "facts": {"torch": torch.__version__, "cuda": torch.version.cuda, "pycoll": pycoll.__version__},
        "left_out": left_out,
        "rows": [{**asdict(row), "share_of_copy": row.share} for row in rows],
    }
    return json.dumps(found, indent=1)


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(LocalGroupBench)))
