"""`pycoll faults`: plays many seeds, one fork server a job, and says what went wrong in which."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pycoll.errors import Error, UsageError
from pycoll.faults.script import make_script
from pycoll.faults.verdict import BOUND, Result, explained

LONGEST = 180.0
"""Seconds after which a server that has not answered is given up: more than it takes to find that a seed hangs."""


@dataclass(frozen=True)
class Faults:
    """Look for wrong errors, hangs and wrong numbers while ranks are killed, stopped and delayed at random."""

    seeds: str = "0:2000"
    """Which seeds: one, or FIRST:END."""
    seconds: float | None = None
    """Begin no seed after so many seconds."""
    jobs: int = 1
    """How many seeds are played at once."""
    failures: int = 20
    """Begin no seed after so many failures."""
    json: Path | None = None
    """Write what was found to this file."""
    verbose: bool = False
    """Print the script of each seed, and how every call ended on every rank."""


@dataclass
class Summary:
    """Of all seeds played."""

    seeds: int = 0
    seconds: float = 0.0
    calls: int = 0
    errors: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    missed: int = 0
    latencies: list[float] = field(default_factory=list)
    excused: int = 0
    failures: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """Takes in the result of a seed."""
        self.seeds += 1
        self.calls += result.calls
        self.errors += result.errors
        self.faults[result.kind] += 1
        self.missed += result.kind != "none" and not result.happened
        self.latencies += result.latencies
        self.excused += result.excused
        if result.problems:
            self.failures.append(result)

    def latency(self, quantile: float) -> float:
        """So many of the survivors knew of a SIGKILL after at most so many seconds."""
        ordered = sorted(self.latencies)
        return ordered[min(int(quantile * len(ordered)), len(ordered) - 1)] if ordered else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        names = ("seeds", "seconds", "calls", "errors", "missed", "excused")
        facts: dict[str, Any] = {name: getattr(self, name) for name in names}
        facts["faults"] = dict(self.faults)
        facts["seeds_per_minute"] = 60 * self.seeds / self.seconds if self.seconds else 0.0
        facts["seconds_from_kill_to_error"] = {
            "count": len(self.latencies),
            "over_bound": sum(late > BOUND for late in self.latencies),
            **{name: self.latency(q) for name, q in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))},
        }
        facts["failures"] = [
            {"seed": f.seed, "problems": f.problems, "logs": f.logs, "script": str(make_script(f.seed))}
            for f in self.failures
        ]
        return facts


class Servers:
    """Fork servers, and the store in which their ranks meet. A context manager.

    `program`: what Python is to run as one; the connection and the store's port follow.
    """

    def __init__(self, count: int, program: Sequence[str] = ("-m", "pycoll.faults.server")) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}
        for _ in range(count):
            ours, theirs = socket.socketpair()
            command = [sys.executable, *program, str(theirs.fileno()), str(self._store.port)]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True, env=_environment())
            theirs.close()
            self._processes[Connection(ours.detach())] = process

    def play(self, seeds: Iterator[int]) -> Iterator[Result]:
        """The results of the seeds, as they come.

        Raises:
            Error: a server died, or does not answer.
        """
        playing: dict[Connection, int] = {}
        idle = list(self._processes)
        while True:
            while idle and (seed := next(seeds, None)) is not None:
                connection = idle.pop()
                connection.send(seed)
                playing[connection] = seed
            if not playing:
                return
            ready = wait(list(playing), LONGEST)
            if not ready:
                raise Error(f"pycoll: the servers of the seeds {sorted(playing.values())} do not answer")
            for connection in (c for c in playing.copy() if c in ready):
                seed = playing.pop(connection)
                try:
                    yield connection.recv()
                except EOFError:
                    raise Error(f"pycoll: the server of seed {seed} has died") from None
                idle.append(connection)

    def __enter__(self) -> Servers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection, process in self._processes.items():
            connection.close()
            if kind is not None:
                process.kill()  # and the kernel its ranks
        for process in self._processes.values():
            process.wait()


def main(options: Faults) -> int:
    """Plays the seeds; 1 if there were failures."""
    console = Console()
    summary = campaign(options, console)
    _print(summary, console)
    if options.json is not None:
        options.json.write_text(json.dumps(summary.to_json(), indent=2) + "\n", encoding="utf-8")
    return 1 if summary.failures else 0


def campaign(options: Faults, console: Console) -> Summary:
    """Plays the seeds and prints failures as they come."""
    first, end = seed_range(options.seeds)
    if options.jobs < 1:
        raise UsageError(f"--jobs must be positive, not {options.jobs}")
    summary = Summary()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Servers(options.jobs) as servers, Progress(*columns, console=console) as progress:
        task = progress.add_task("seeds", total=end - first)
        began = time.monotonic()

        def goes_on() -> bool:
            late = options.seconds is not None and time.monotonic() - began > options.seconds
            return not late and len(summary.failures) < options.failures

        for result in servers.play(takewhile(lambda _: goes_on(), iter(range(first, end)))):
            summary.add(result)
            summary.seconds = time.monotonic() - began
            progress.update(task, advance=1, description=f"seeds, {len(summary.failures)} failures")
            if options.verbose or result.problems:
                progress.console.print("\n".join(report(result, options.verbose)), markup=False, soft_wrap=True)
    return summary


def seed_range(text: str) -> tuple[int, int]:
    """The first seed and the one after the last. Raises UsageError."""
    parts = text.split(":")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise UsageError(f"--seeds must be a number or FIRST:END, not {text!r}")
    first = int(parts[0])
    return first, int(parts[1]) if len(parts) == 2 else first + 1


def report(result: Result, verbose: bool) -> Sequence[str]:
    """What to print of a seed: how to play it alone, what was wrong, and what its ranks printed."""
    lines = []
    if verbose:
        lines += [str(make_script(result.seed)), *explained(result)]
    if result.problems:
        lines.append(f"seed {result.seed} FAILED; alone: pycoll faults --seeds {result.seed} --verbose")
        lines += [f"  {problem}" for problem in result.problems[:20]]
        lines += [f"  and {len(result.problems) - 20} more"] * (len(result.problems) > 20)
        lines += [log for log in result.logs if verbose or "hang" in result.problems[0]]
    return lines


def _environment() -> dict[str, str]:
    """The launcher's variables are not for ranks that meet in a store of their own; and they share the cores."""
    ours = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    return {**ours, "OMP_NUM_THREADS": "1"}


def _print(summary: Summary, console: Console) -> None:
    rate = 60 * summary.seeds / summary.seconds if summary.seconds else 0.0
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(summary.faults.items()))
    console.print(
        f"{summary.seeds} seeds in {summary.seconds:.0f} s ({rate:.0f} a minute), {summary.calls} calls, "
        f"{summary.errors} errors as they should be; faults: {kinds}; {summary.missed} came too late",
        soft_wrap=True,
    )
    if summary.latencies:
        over = sum(late > BOUND for late in summary.latencies)
        console.print(
            f"from SIGKILL to the error: {len(summary.latencies)} survivors, median {1e3 * summary.latency(0.5):.0f} "
            f"ms, 99 % {1e3 * summary.latency(0.99):.0f} ms, longest {1e3 * summary.latency(1.0):.0f} ms; {over} over "
            f"{BOUND:g} s, {summary.excused} errors late for want of a core",
            soft_wrap=True,
        )
    failed = ", ".join(str(failure.seed) for failure in summary.failures)
    console.print(f"{len(summary.failures)} failures: seeds {failed}" if failed else "no failure", soft_wrap=True)
