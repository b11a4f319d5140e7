"""Every collective at a few sizes: pycoll beside Gloo and beside copies of the same memory, in one run.

`pycoll bench collectives --help`. README.md explains the method.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from . import machine, report, timing
from .all_reduce import progress_bar, python, shared_memory, sharing
from .collective_ranks import COLLECTIVES, PIPE_BYTES
from .driver import Contest
from .groups import RankGroup, started
from .ranks import Key
from .timing import format_bytes

KIB, MIB = 2**10, 2**20
MOVES_ALL = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")  # held to Gloo where large
MOVES_ONE = ("broadcast", "send_recv")  # held to a pipelined memcpy where large


@dataclass
class CollectivesBench:
    """Times every collective at a few sizes: pycoll, Gloo, and copies of the same memory."""

    ranks: int = 2
    """Processes that take part."""
    sizes: tuple[str, ...] = ("1KiB", "64KiB", "4MiB", "64MiB")
    """Of the larger of a rank's input and output."""
    only: tuple[str, ...] = COLLECTIVES
    """Which collectives."""
    seconds: float = 3.0
    """For each collective at each size."""
    output: Path = Path("bench-results")
    """Folder for the JSON file and the plot."""
    check: bool = False
    """Compare with what pycoll must reach, and fail if any bar is missed or could not be measured."""


def main(config: CollectivesBench) -> int:
    """Runs the benchmark; prints the table, writes JSON and plot.

    Returns:
        The exit code: 1 where a library failed or a bar was missed, 2 where the options were bad.
    """
    try:
        found = _run(config)
    except ValueError as e:
        Console(stderr=True).print(f"pycoll bench: {e}", style="red", markup=False)
        return 2
    report.publish(found, table(found), config.output / f"collectives-{config.ranks}-ranks.json", draw, width=150)
    missed = [case for case in cases(found) if case.passed is not True]
    return int(bool(found.failures) or (config.check and bool(missed)))


def _run(config: CollectivesBench) -> report.Report:
    """Measures everything.

    Raises:
        ValueError: the options fit neither one another nor this machine.
    """
    if config.ranks < 2 or config.ranks % 2:
        raise ValueError(f"ranks send messages in pairs: give an even number of 2 or more, not {config.ranks}")
    unknown = set(config.only) - set(COLLECTIVES)
    if unknown:
        raise ValueError(f"no collective is called {', '.join(sorted(unknown))}: there are {', '.join(COLLECTIVES)}")
    sizes = [timing.parse_bytes(size) for size in config.sizes]
    if 16 * config.ranks * max(sizes) > machine.available_memory():
        raise ValueError("tensors would take more memory than is free: give smaller --sizes")
    found = report.Report("collectives", config.ranks, "float32", machine.describe())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pycoll-bench-")))
        contest = Contest(_groups(config.ranks, folder, stack, found), found)
        progress = stack.enter_context(progress_bar())
        effort = timing.Effort(seconds=config.seconds, min_rounds=5, max_rounds=60)
        turns = [(size, name) for size in sizes for name in config.only if name != "barrier" or size == sizes[0]]
        task = progress.add_task("", total=len(turns))
        for done, (size, name) in enumerate(turns):
            progress.update(task, description=f"{name} {format_bytes(size)}", completed=done)
            wanted = partial(_takes_part, name)
            contest.measure(size, effort, lambda part: None, wanted)
            for row in found.rows:  # the copies were measured beside this collective
                if row.who == report.CEILING and row.call == "none":
                    found.rows[found.rows.index(row)] = _beside(row, name)
        progress.update(task, completed=len(turns))
        contest.facts()
    return found


def _takes_part(name: str, key: Key) -> bool:
    return key[0] == report.CEILING or key[1] == name


def _beside(row: report.Row, name: str) -> report.Row:
    return report.Row(row.size, row.who, row.algorithm, row.memory, name, row.timing, row.error)


def _groups(world_size: int, folder: Path, stack: ExitStack, found: report.Report) -> list[RankGroup]:
    """The ranks of all contenders, started; they meet in files in `folder`."""
    descriptors = shared_memory(world_size, PIPE_BYTES, stack)
    launches = [
        sharing(who, python("collective_ranks", who, str(folder / who)), descriptors)
        for who in ("pycoll", "gloo", "ceiling")
    ]
    return started(launches, world_size, stack, found.failures)


@dataclass(frozen=True)
class Case:
    """One collective at one size; seconds a call, None where not measured."""

    collective: str
    size: int
    native: float | None
    symmetric: float | None
    torch: float | None
    gloo: float | None
    memcpy: float | None
    pipelined: float | None

    @property
    def times_gloo(self) -> float | None:
        """How many times faster than Gloo, by pycoll's own call on private tensors."""
        return self.gloo / self.native if self.gloo and self.native else None

    @property
    def share_of_pipelined(self) -> float | None:
        return self.pipelined / self.native if self.pipelined and self.native else None

    @property
    def bar(self) -> tuple[str, bool | None]:
        """What must be reached, and whether it is."""
        if self.size <= 64 * KIB:
            return "15 x Gloo", None if self.times_gloo is None else self.times_gloo >= 15
        if self.collective in MOVES_ALL:
            return "10 x Gloo", None if self.times_gloo is None else self.times_gloo >= 10
        if self.collective in MOVES_ONE:
            share = self.share_of_pipelined
            return "80 % of a pipelined memcpy", None if share is None else share >= 0.8
        return "not slower than Gloo", None if self.times_gloo is None else self.times_gloo >= 1

    @property
    def passed(self) -> bool | None:
        return self.bar[1]


def cases(found: report.Report) -> list[Case]:
    """What was measured, a case a collective and size."""

    def median(**wanted: Any) -> float | None:
        rows = found.select(**wanted)
        return rows[0].timing.median if rows else None

    made = []
    for size in sorted({row.size for row in found.rows}):
        for name in COLLECTIVES:
            own = {"size": size, "algorithm": name}
            if not found.select(**own):
                continue
            copies = {"size": size, "who": report.CEILING, "call": name}
            made.append(
                Case(
                    name,
                    size,
                    median(**own, who="pycoll", memory="private", call="native"),
                    median(**own, who="pycoll", memory="symmetric", call="native"),
                    median(**own, who="pycoll", call="torch.distributed"),
                    median(**own, who="Gloo"),
                    median(**copies, algorithm="memcpy"),
                    median(**copies, algorithm="pipelined memcpy"),
                )
            )
    return made


def table(found: report.Report) -> Table:
    """Medians in us, ratios, and the bars."""
    shown = Table(title=f"collectives, {found.world_size} ranks, {found.dtype}; medians in us")
    for column in ("collective", "size"):
        shown.add_column(column)
    for column in ("pycoll", "symmetric", "via torch", "Gloo", "memcpy", "pipelined", "x Gloo", "via torch x Gloo"):
        shown.add_column(column, justify="right")
    shown.add_column("bar")
    for case in cases(found):
        wanted, passed = case.bar
        verdict = {True: "[green]pass[/]", False: "[red]FAIL[/]", None: "[yellow]not measured[/]"}[passed]
        through = case.gloo / case.torch if case.gloo and case.torch else None
        times = (case.native, case.symmetric, case.torch, case.gloo, case.memcpy, case.pipelined)
        shown.add_row(
            case.collective,
            "" if case.collective == "barrier" else format_bytes(case.size),
            *("" if t is None else report.format_seconds(t) for t in times),
            *("" if r is None else report.format_ratio(r) for r in (case.times_gloo, through)),
            f"{wanted}: {verdict}",
        )
    return shown


def draw(found: report.Report, path: Path) -> None:
    """Writes a picture: how many times faster than Gloo each collective is, at each size."""
    measured = [case for case in cases(found) if case.times_gloo]
    sizes = sorted({case.size for case in measured})
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    for place, size in enumerate(sizes):
        at = {case.collective: case.times_gloo or 0.0 for case in measured if case.size == size}
        spots = [COLLECTIVES.index(name) + (place - len(sizes) / 2 + 0.5) * 0.8 / len(sizes) for name in at]
        axes.bar(spots, list(at.values()), 0.8 / len(sizes), label=format_bytes(size))
    axes.set_yscale("log")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(COLLECTIVES)), COLLECTIVES, rotation=20)
    axes.set_ylabel("times faster than Gloo")
    axes.set_title(f"{found.world_size} ranks on {report.machine_line(found)}", fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(CollectivesBench)))
