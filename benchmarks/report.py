"""What a benchmark has found: rows, a table of them, and a JSON file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .timing import Timing, format_bytes

CEILING = "ceiling"


@dataclass(frozen=True)
class Row:
    """One contender at one size.

    Attributes:
        size: bytes of each rank's tensor.
        who, algorithm, memory, call: the contender; memory is "private" or "symmetric".
        timing: seconds a call.
        error: largest |result - exact| / sum of |x| over ranks; None where there is no result (the ceiling).
    """

    size: int
    who: str
    algorithm: str
    memory: str
    call: str
    timing: Timing
    error: float | None

    @property
    def algbw(self) -> float:
        """Bytes a second as the caller sees them."""
        return self.size / self.timing.median

    @property
    def library(self) -> str:
        """Who, and through what: only pycoll has calls of its own from Python."""
        return f"{self.who} via torch" if self.call == "torch.distributed" else self.who

    @property
    def label(self) -> str:
        """The contender in words."""
        words = [self.library]
        words += [self.algorithm] if self.algorithm != "default" else []
        words += [self.memory] if self.who in ("pycoll", CEILING) else []
        return " ".join(words)


@dataclass
class Report:
    """The results of one run.

    Attributes:
        benchmark: its name, as on the command line.
        world_size, dtype: of the run.
        machine: from machine.describe().
        facts: versions and settings, by library.
        rows: in order of size.
        failures: libraries that could not be measured or gave a wrong result, and why.
        left_out: contenders that take no part at a size, and why.
    """

    benchmark: str
    world_size: int
    dtype: str
    machine: dict[str, Any]
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def select(self, **wanted: Any) -> list[Row]:
        """The rows whose attributes are as given, fastest first."""
        rows = [row for row in self.rows if all(getattr(row, key) == value for key, value in wanted.items())]
        return sorted(rows, key=lambda row: row.timing.median)

    def busbw_factor(self, collective: str = "all_reduce") -> float:
        """busbw / algbw, as in nccl-tests: in an all-reduce each rank must move 2 (n - 1) / n of its tensor."""
        share = (self.world_size - 1) / self.world_size
        return {"all_reduce": 2 * share, "broadcast": 1, "reduce": 1, "send_recv": 1}.get(collective, share)

    def to_json(self) -> str:
        """All of it, times in seconds and bandwidths in bytes a second."""
        content = dataclasses.asdict(self)
        for row, values in zip(self.rows, content["rows"], strict=True):
            collective = row.algorithm if self.benchmark == "collectives" else "all_reduce"
            values["algbw"], values["busbw"] = row.algbw, row.algbw * self.busbw_factor(collective)
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """What to_json() has written."""
        content = json.loads(text)
        rows = [
            Row(**{f.name: row[f.name] for f in dataclasses.fields(Row)} | {"timing": Timing(**row["timing"])})
            for row in content.pop("rows")
        ]
        return cls(**content, rows=rows)


def format_seconds(seconds: float) -> str:
    """`seconds` in us, with three digits or more."""
    microseconds = seconds * 1e6
    return f"{microseconds:.2f}" if microseconds < 100 else f"{microseconds:.0f}"


def format_ratio(ratio: float) -> str:
    """`ratio` with three digits, or all those before the point."""
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}"


def table(report: Report) -> Table:
    """All rows, grouped by size, fastest first within each."""
    shown = Table(title=f"{report.benchmark}, {report.world_size} ranks, {report.dtype}", box=box.SIMPLE)
    for column in ("size", "who", "algorithm", "memory"):
        shown.add_column(column, no_wrap=True)
    for column in ("time us", "algbw GB/s", "busbw GB/s", "x Gloo", "error"):
        shown.add_column(column, justify="right", no_wrap=True)
    for size in sorted({row.size for row in report.rows}):
        gloo = report.select(size=size, who="Gloo")
        for place, row in enumerate(report.select(size=size)):
            shown.add_row(
                format_bytes(size) if place == 0 else "",
                row.library,
                row.algorithm,
                row.memory,
                format_seconds(row.timing.median),
                format_ratio(row.algbw / 1e9),
                format_ratio(row.algbw * report.busbw_factor() / 1e9),
                format_ratio(gloo[0].timing.median / row.timing.median) if gloo else "",
                "" if row.error is None else f"{row.error:.1e}",
            )
        shown.add_section()
    return shown


def machine_line(report: Report) -> str:
    """The machine in one line, for titles."""
    machine = report.machine
    return f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, {machine['date'][:10]}"


def notes(report: Report) -> Iterator[str]:
    """The machine, versions and settings of each library, and what a communicator of pycoll takes; a line each."""
    yield machine_line(report)
    for name, facts in report.facts.items():
        yield f"{name}: " + ", ".join(
            f"{key} {value}" for key, value in facts.items() if value and type(value) is not dict
        )
    if "pycoll" in report.facts:
        yield f"footprint of a communicator: {report.facts['pycoll']['footprint'] / 2**20:.1f} MiB a rank"


def write(path: Path, text: str) -> None:
    """Makes it the file's whole text at once, in a folder that is made if need be: whoever is ended meanwhile leaves
    the text before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def publish(report: Report, shown: Table, path: Path, draw: Callable[[Report, Path], object], width: int) -> None:
    """Prints the table, `width` columns wide or more, and the notes; writes JSON, and a picture beside it."""
    console = Console()
    console.width = max(console.width, width)  # of a pipe it would be 80
    console.print(shown)
    for line in notes(report):
        console.print(line, style="dim", markup=False, highlight=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.to_json())
    draw(report, path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png')}", markup=False)
    for failure in report.failures:
        console.print(f"FAILED {failure}", style="red", markup=False)
