"""All-reduce against size: pycoll beside Gloo, the MPIs that are there, and the machine's ceiling, in one run.

`pycoll bench all-reduce --help`, or `python -m pycoll.benchmarks.all_reduce --help`. README.md explains the method.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from . import bars, machine, memory, plot, report, timing, values
from .driver import Contest
from .groups import Launch, started
from .mpi import find, homes, launches

Family = Literal["pycoll", "gloo", "mpi", "ceiling"]

_DEFAULT = timing.Effort(seconds=10.0, min_rounds=5, max_rounds=60)
_QUICK = timing.Effort(seconds=1.0, min_rounds=3, max_rounds=15)


@dataclass
class AllReduceBench:
    """Times all-reduce (sum, in place) at many sizes: pycoll, Gloo, Open MPI, MPICH and the machine's ceiling."""

    ranks: int = 2
    """Processes that take part. More than cores is supported."""
    smallest: Annotated[str, tyro.conf.arg(name="min")] = "8B"
    """Smallest size of each rank's tensor, such as 8, 1KiB or 4MiB."""
    largest: Annotated[str, tyro.conf.arg(name="max")] = "256MiB"
    """Largest size."""
    factor: int = 4
    """Between one size and the next, from the largest down."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Of the tensors. MPI knows the first two only."""
    contenders: tuple[Family, ...] = ("pycoll", "gloo", "mpi", "ceiling")
    """Who is measured."""
    mpi: tuple[Path, ...] = field(default_factory=homes)
    """Python environments that hold an MPI and its mpi4py; by default those that PYCOLL_BENCH_MPI lists, like PATH."""
    output: Path = Path("bench-results")
    """Folder for the JSON file and the plot."""
    quick: bool = False
    """Fewer samples: under a minute."""
    check: bool = False
    """Compare with what pycoll must reach, and fail if any bar is missed or could not be measured."""


def main(config: AllReduceBench) -> int:
    """Runs the benchmark; prints the table, writes JSON and plot.

    Returns:
        The exit code: 1 where a library failed or a bar was missed, 2 where the options were bad.
    """
    try:
        found = _run(config)
    except ValueError as e:
        Console(stderr=True).print(f"pycoll bench: {e}", style="red", markup=False)
        return 2
    path = config.output / f"all_reduce-{config.ranks}-ranks-{config.dtype}.json"
    report.publish(found, report.table(found), path, plot.draw, width=110)
    return bars.exit_code(found, config.check, bars.evaluate, bars.ALL_REDUCE)


def _run(config: AllReduceBench) -> report.Report:
    """Measures everything.

    Raises:
        ValueError: the options fit neither one another nor this machine.
    """
    if config.ranks < 2:
        raise ValueError(f"an all-reduce takes 2 ranks or more, not {config.ranks}")
    if not config.contenders:
        raise ValueError("nobody is measured: give --contenders at least one name")
    itemsize = values.ITEMSIZE[config.dtype]
    largest = timing.parse_bytes(config.largest)
    sizes = timing.sizes(timing.parse_bytes(config.smallest), largest, config.factor, itemsize)
    found = report.Report("all-reduce", config.ranks, config.dtype, machine.describe())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pycoll-bench-")))
        launched = _libraries(config, folder)
        needed = (len(launched) + 4) * config.ranks * largest  # pycoll has three kinds of tensors, the ceiling two
        if needed > machine.available_memory():
            raise ValueError(f"tensors would take {needed >> 20} MiB, more than is free: lower --max")
        if "ceiling" in config.contenders:
            launched.append(_ceiling(config, largest, folder, stack))
        contest = Contest(started(launched, config.ranks, stack, found.failures), found)
        progress = stack.enter_context(progress_bar())
        task = progress.add_task("", total=len(sizes))

        def show(done: int, part: float) -> None:
            progress.update(task, completed=done + part)

        for done, size in enumerate(sizes):
            progress.update(task, description=timing.format_bytes(size))
            contest.measure(size, _QUICK if config.quick else _DEFAULT, partial(show, done))
        contest.facts()
    return found


def _libraries(config: AllReduceBench, folder: Path) -> list[Launch]:
    """The libraries to start; the ranks of each meet in a file in `folder`."""
    found = []
    for library in ("pycoll", "gloo"):
        if library in config.contenders:
            found.append(Launch(library, python("torch_ranks", library, str(folder / library))))
    if "mpi" in config.contenders:
        for home in config.mpi:
            found += launches(find(home), config.ranks, config.dtype)
    return found


def _ceiling(config: AllReduceBench, largest: int, folder: Path, stack: ExitStack) -> Launch:
    """The ceiling, on shared memory that lives as long as `stack`."""
    descriptors = shared_memory(config.ranks, largest, stack)
    return sharing("ceiling", python("ceiling_ranks", str(folder / "ceiling")), descriptors)


def shared_memory(world_size: int, largest: int, stack: ExitStack) -> list[int]:
    """Descriptors from memory.create, open until `stack` ends."""
    descriptors = memory.create(world_size, largest)
    for descriptor in descriptors:
        stack.callback(os.close, descriptor)
    return descriptors


def sharing(name: str, command: list[str], descriptors: list[int]) -> Launch:
    """The launch of ranks that attach to that memory."""
    environment = {memory.DESCRIPTORS_VARIABLE: ",".join(map(str, descriptors))}
    return Launch(name, command, environment=environment, inherited=descriptors)


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"{__package__}.{module}", *arguments]


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description:>8}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(AllReduceBench)))
