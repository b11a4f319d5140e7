"""What pycoll's all-reduce must reach, and whether a run shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from .report import CEILING, Report, Row
from .timing import format_bytes

KIB, MIB = 2**10, 2**20
FOOTPRINT = 64 * MIB
ALL_REDUCE = "what all-reduce must reach"
NATIVE = {"who": "pycoll", "algorithm": "auto", "memory": "private", "call": "native"}


@dataclass(frozen=True)
class Bar:
    """One bar. `reached` and `passed` are None where the run did not measure what it needs."""

    case: str
    bar: str
    reached: str | None
    passed: bool | None


class _NotMeasured(Exception):
    """The run lacks a contender or a size."""


def evaluate(report: Report) -> list[Bar]:
    """The bars for the number of ranks of `report`, against its rows; beside 2 and 4 ranks, the footprint's alone."""
    bars = {2: _two_ranks, 4: _four_ranks}.get(report.world_size, lambda _: iter(()))
    return [*bars(report), _footprint(report)]


def _two_ranks(report: Report) -> Iterator[Bar]:
    through_torch = {**NATIVE, "call": "torch.distributed"}
    yield _time(report, KIB, 3e-6)
    yield _rate(report, "native", KIB, NATIVE, "Gloo", _peers("Gloo"), 70)
    yield _rate(report, "torch.distributed", KIB, through_torch, "Gloo", _peers("Gloo"), 35)
    for size in (4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB):
        yield _rate(report, "private", size, NATIVE, "Gloo", _peers("Gloo"), 12)
        yield _rate(report, "private", size, NATIVE, "the better MPI", _peers("Open MPI", "MPICH"), 1.5)
    for size in (64 * MIB, 256 * MIB):
        symmetric = {**NATIVE, "memory": "symmetric"}
        yield _rate(
            report,
            "symmetric",
            size,
            symmetric,
            "the ceiling",
            lambda row: row.who == CEILING and row.memory == "symmetric",
            0.85,
        )


def _four_ranks(report: Report) -> Iterator[Bar]:
    yield _time(report, KIB, 30e-6)
    yield _rate(report, "private", 64 * MIB, NATIVE, "Gloo", _peers("Gloo"), 5)


def _peers(*names: str) -> Callable[[Row], bool]:
    return lambda row: row.who.startswith(names)


def _fastest(rows: list[Row], what: str) -> Row:
    if not rows:
        raise _NotMeasured(what)
    return min(rows, key=lambda row: row.timing.median)


def _time(report: Report, size: int, limit: float) -> Bar:
    case, bar = f"{format_bytes(size)}, native", f"under {limit * 1e6:g} us"
    try:
        seconds = _fastest(report.select(size=size, **NATIVE), "pycoll").timing.median
    except _NotMeasured as missing:
        return Bar(case, bar, f"not measured: {missing}", None)
    return Bar(case, bar, f"{seconds * 1e6:.2f} us", seconds < limit)


def _rate(
    report: Report,
    kind: str,
    size: int,
    wanted: dict[str, str],
    rival_name: str,
    rival: Callable[[Row], bool],
    factor: float,
) -> Bar:
    case, bar = f"{format_bytes(size)}, {kind}", f"at least {factor:g} x {rival_name}"
    try:
        own = _fastest(report.select(size=size, **wanted), "pycoll")
        other = _fastest([row for row in report.rows if row.size == size and rival(row)], rival_name)
    except _NotMeasured as missing:
        return Bar(case, bar, f"not measured: {missing}", None)
    ratio = other.timing.median / own.timing.median
    return Bar(case, bar, f"{ratio:.3g} x {other.label}", ratio >= factor)


def _footprint(report: Report) -> Bar:
    case, bar = "footprint of a communicator", f"under {format_bytes(FOOTPRINT)} a rank"
    if "pycoll" not in report.facts:
        return Bar(case, bar, "not measured: pycoll", None)
    used = report.facts["pycoll"]["footprint"]
    return Bar(case, bar, f"{used / MIB:.1f} MiB", used < FOOTPRINT)


def ratio(case: str, own: float | None, rival: str, other: float | None, factor: float) -> Bar:
    """Whether `own` seconds are so many times fewer than those of `rival`; None: not measured."""
    bar = f"at least {factor:g} x {rival}"
    if own is None or other is None:
        return Bar(case, bar, "not measured", None)
    return Bar(case, bar, f"{other / own:.3g} x", other / own >= factor)


def table(bars: list[Bar], title: str = ALL_REDUCE) -> Table:
    """The bars, what was reached, and the verdicts."""
    shown = Table(title=title)
    for column in ("case", "bar", "reached", "verdict"):
        shown.add_column(column)
    for bar in bars:
        verdict = {True: "[green]pass[/]", False: "[red]FAIL[/]", None: "[yellow]not measured[/]"}[bar.passed]
        shown.add_row(bar.case, bar.bar, bar.reached, verdict)
    return shown


def exit_code(found: Report, check: bool, judge: Callable[[Report], list[Bar]], title: str) -> int:
    """Of a benchmark: 1 where something failed or, where bars are checked, and printed then, one was missed."""
    failed = bool(found.failures)
    if check:
        checked = judge(found)
        console = Console()
        console.width = max(console.width, 110)
        console.print(table(checked, title))
        failed = failed or not all(bar.passed for bar in checked)
    return int(failed)
