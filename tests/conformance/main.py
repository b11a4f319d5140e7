"""The command line: runs the suite, shows what came of it, and compares it with another backend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from conformance import presented, results
from conformance.results import FAILED, FLAKY, HUNG, NOT_RUN, OUTCOMES, PASSED, SKIPPED, Outcomes, Result, Run
from conformance.runner import ZygoteFailed, run_suite
from conformance.zygote import Order

LINE = re.compile(r" \[line \d+\]")
COLOURS = {PASSED: "green", FAILED: "red", HUNG: "red", SKIPPED: "dim", NOT_RUN: "yellow", FLAKY: "yellow"}


@dataclass(frozen=True)
class Conformance:
    """Run torch's distributed test suite, unmodified, over any c10d backend.

    The status is 1 if a test passes with the backend of --against and not with this one; without --against, if a test
    fails or hangs.
    """

    backend: str = "pycoll"
    """The backend to test."""
    world_size: tuple[int, ...] = (2, 4)
    """How many ranks each test has; the whole suite runs at each. Some tests of subgroups need 8."""
    against: str | None = None
    """What to compare with: `baseline`, Gloo's committed outcomes with this torch (if there are none, Gloo runs first);
    a backend, such as `gloo`, which runs first; or a file of --json."""
    select: str = ""
    """Run only the tests in whose names this regular expression is found."""
    jobs: int = 4
    """Tests at once. They sleep most of their time."""
    timeout: float = 30.0
    """Seconds that a test may take."""
    limit: float = 1800.0
    """Seconds for all tests of one backend at one world size: those that have not begun by then do not run."""
    repeat: int = 1
    """Run everything so often: a test that passes one time and not another is flaky."""
    json: Path | None = None
    """Write all results there."""
    logs: Path | None = None
    """Keep what the ranks of each test print that fails or hangs, in this folder."""
    module: str | None = None
    """Import this first, so that torch knows the backend. By default the module of the backend's name, unless it is one
    of torch's."""
    decide_as: str | None = None
    """The backend whose tests run, which torch chooses by name: `mpi` has all_to_all on the CPU. By default the backend
    itself if torch's suite knows it, else gloo."""
    gpus: bool = False
    """Let the tests see GPUs. The baselines are of tests that do not."""
    write_baseline: bool = False
    """Commit the outcomes as this backend's with this torch, in tests/conformance/baselines."""


class Unusable(Exception):
    """The options, or what is installed, will not do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (by default this process's) and returns its exit status."""
    options = tyro.cli(Conformance, prog="conformance", args=arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        check(options)
        return run(options, console)
    except (Unusable, ZygoteFailed) as error:
        Console(stderr=True).print(f"[red]error: {escape(str(error))}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130


def check(options: Conformance) -> None:
    """Raises `Unusable` if the options cannot be followed."""
    if importlib.util.find_spec("expecttest") is None:
        raise Unusable("torch's test suite needs a module that torch does not install: pip install expecttest")
    if min(options.world_size, default=0) < 2 or options.jobs < 1 or options.repeat < 1:
        raise Unusable("--world-size must be 2 or more, --jobs and --repeat 1 or more")
    if options.timeout < 1 or options.limit <= 0:
        raise Unusable("--timeout must be 1 s or more, and --limit more than 0 s")
    if options.write_baseline and options.select:
        raise Unusable("a baseline is of all tests: leave --select out")
    try:
        re.compile(options.select)
    except re.error as error:
        raise Unusable(f"--select {options.select!r} is no regular expression: {error}") from error


def run(options: Conformance, console: Console) -> int:
    """Runs what the options say; returns the exit status."""
    against, reference = _reference(options, console)
    if against and (unknown := set(options.world_size) - set(reference)):
        raise Unusable(f"{against} has nothing of {', '.join(map(str, sorted(unknown)))} ranks")
    runs = _run_backend(options, options.backend, console)
    _show(runs, console)
    status = _compare(runs, against, reference, console) if against else _failures(runs, console)
    if options.json:
        results.write_json(options.json, runs, against, reference)
    if options.write_baseline:
        console.print(f"written: {results.write_baseline(runs)}")
    return status


def _reference(options: Conformance, console: Console) -> tuple[str | None, Outcomes]:
    """What `--against` names, in words, and its outcomes."""
    against = options.against
    if against is None:
        return None, {}
    if against == "baseline":
        torch = importlib.metadata.version("torch")
        path = results.baseline_path("gloo", torch)
        if path.exists():
            return f"gloo's baseline with torch {torch}", results.read_json(path)
        console.print(f"There is no baseline for torch {torch}: gloo runs first.")
        against = "gloo"
    if against.endswith(".json"):
        try:
            return against, results.read_json(Path(against))
        except (OSError, ValueError) as error:
            raise Unusable(f"--against {against}: {error}") from error
    reference = _run_backend(replace(options, module=None, decide_as=None), against, console)
    _show(reference, console)
    return against, results.outcomes_of(reference)


def _run_backend(options: Conformance, backend: str, console: Console) -> list[Run]:
    """A run for each world size."""
    module = options.module
    if module is None:
        module = "" if backend in presented.KNOWN else backend
    runs = []
    for world_size in options.world_size:
        order = Order(
            backend=backend,
            imported_as=options.decide_as or presented.stands_for(backend),
            module=module,
            world_size=world_size,
            select=options.select,
            jobs=options.jobs,
            timeout=options.timeout,
            limit=options.limit,
            logs=str(options.logs.resolve()) if options.logs else "",
        )
        runs.append(_run_once(order, options, console))
        for _ in range(options.repeat - 1):
            runs[-1].merge(_run_once(order, options, console))
    return runs


def _run_once(order: Order, options: Conformance, console: Console) -> Run:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("[green]{task.fields[passed]} passed[/] [red]{task.fields[failed]} failed[/]"),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[last]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        title = f"{order.backend}, {order.world_size} ranks"
        task = progress.add_task(title, total=None, passed=0, failed=0, last="torch is imported")
        count = {PASSED: 0, FAILED: 0, HUNG: 0}

        def tick(result: Result) -> None:
            count[result.outcome] = count.get(result.outcome, 0) + 1
            failed = count[FAILED] + count[HUNG]
            progress.update(task, advance=1, passed=count[PASSED], failed=failed, last=result.name)

        done = run_suite(order, gpus=options.gpus, begin=lambda total: progress.update(task, total=total), tick=tick)
        progress.update(task, last="")
    if not console.is_terminal:  # which has seen the bar
        console.print(f"{title}: {len(done.results)} tests in {done.seconds:.0f} s")
    return done


def _show(runs: Sequence[Run], console: Console) -> None:
    """The counts, why tests were skipped, and what failed."""
    table = Table(title=f"{runs[0].backend}: torch {runs[0].torch}'s distributed_test.py", title_justify="left")
    table.add_column("ranks", justify="right")
    shown = [o for o in OUTCOMES if o in (PASSED, FAILED, HUNG, SKIPPED) or any(run.names(o) for run in runs)]
    for outcome in shown:
        table.add_column(outcome, justify="right", style=COLOURS[outcome])
    table.add_column("seconds", justify="right")
    for run in runs:
        counts = run.counts()
        table.add_row(str(run.world_size), *(str(counts[outcome]) for outcome in shown), f"{run.seconds:.0f}")
    console.print(table)


def _failures(runs: Sequence[Run], console: Console) -> int:
    """Lists what failed, hung or did not run; 1 if there is any."""
    return max(_list(run, run.names(FAILED, HUNG, NOT_RUN, FLAKY), "do not pass", console) for run in runs)


def _compare(runs: Sequence[Run], against: str, reference: Outcomes, console: Console) -> int:
    """Lists what passes in the reference only; 1 if there is any."""
    status = 0
    for run in runs:
        passing = results.passing(run, reference)
        both = set(passing) & set(run.names(PASSED))
        more = len(run.names(PASSED)) - len(both)
        missing = results.lacking(run, reference)
        console.print(
            f"{run.world_size} ranks: of {len(passing)} tests that pass with {against}, {len(both)} pass with "
            f"{run.backend}" + (f", and {more} more" if more else "")
        )
        status |= _list(run, missing, f"pass there and not with {run.backend}", console)
    return status


def _list(run: Run, names: Sequence[str], what: str, console: Console) -> int:
    """Lists tests by the reason that they have in common; 1 if there is any."""
    if not names:
        return 0
    console.print(f"[bold]{len(names)} at {run.world_size} ranks {what}:")
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name in names:
        result = run.results[name]
        reason = result.reason.split(" | ")[0]  # of the first rank that says something
        by_reason.setdefault((result.outcome, LINE.sub("", reason)), []).append(name)
    for (outcome, reason), alike in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        console.print(f"  [{COLOURS[outcome]}]{len(alike)} {outcome}[/]: {escape(reason[:300])}")
        console.print(f"    [dim]{', '.join(alike)}")
    return 1
