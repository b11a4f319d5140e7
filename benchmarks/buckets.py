"""What gradient buckets cost: packing, averaging and measuring, beside torch's ways and copies of the same bytes.

`pycoll bench buckets --help`. README.md explains what is compared.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from . import bars, machine, report, timing
from .all_reduce import progress_bar, python
from .bucket_ranks import CASES, COMPRESS, FOREACH, GLOO, PACKS, PYCOLL, moved_bytes
from .driver import Contest
from .groups import Launch, started
from .ranks import Key
from .timing import format_bytes

_COPIES_NEEDED = 12  # of a bucket's fp32 elements, by all contenders of a case on a rank


@dataclass
class BucketsBench:
    """Times packing gradients into a bucket, and averaging and measuring it, in every wire format."""

    ranks: int = 2
    """Processes that take part."""
    sizes: tuple[str, ...] = ("25MiB", "128MiB")
    """Of buckets, in fp32."""
    seconds: float = 3.0
    """For each case at each size."""
    output: Path = Path("bench-results")
    """Folder for the JSON file and the plot."""
    quick: bool = False
    """The first size alone and fewer samples: under a minute."""
    check: bool = False
    """Compare with what pycoll must reach, and fail if any bar is missed or could not be measured."""


class BucketsReport(report.Report):
    """Rates count the bytes that a case must read and write."""

    def rate(self, row: report.Row) -> float:
        """Bytes a second on each rank."""
        return moved_bytes(row.algorithm, row.who, row.size // 4) / row.timing.median

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        for row, values in zip(self.rows, content["rows"], strict=True):
            values["moved"] = moved_bytes(row.algorithm, row.who, row.size // 4)
            values["rate"] = self.rate(row)
        return json.dumps(content, indent=1)


def main(config: BucketsBench) -> int:
    """Runs the benchmark; prints the table, writes JSON and plot.

    Returns:
        The exit code: 1 where a contender failed or a bar was missed, 2 where the options were bad.
    """
    try:
        found = _run(config)
    except ValueError as e:
        Console(stderr=True).print(f"pycoll bench: {e}", style="red", markup=False)
        return 2
    report.publish(found, table(found), config.output / f"buckets-{config.ranks}-ranks.json", draw, width=110)
    return bars.exit_code(found, config.check, bars_of, "what buckets must reach")


def _run(config: BucketsBench) -> BucketsReport:
    """Measures everything.

    Raises:
        ValueError: the options fit neither one another nor this machine.
    """
    if config.ranks < 2:
        raise ValueError(f"gradients are averaged over 2 ranks or more, not {config.ranks}")
    sizes = [timing.parse_bytes(size) for size in config.sizes][: 1 if config.quick else None]
    grain = 4 * 1024 * config.ranks
    if not sizes or any(size == 0 or size % grain for size in sizes):
        raise ValueError(f"--sizes must be multiples of {format_bytes(grain)}, as buckets are")
    if _COPIES_NEEDED * config.ranks * max(sizes) > machine.available_memory():
        raise ValueError("buckets would take more memory than is free: give smaller --sizes")
    found = BucketsReport("buckets", config.ranks, "float32", machine.describe())
    effort = timing.Effort(seconds=config.seconds / (10 if config.quick else 1), min_rounds=5, max_rounds=60)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pycoll-bench-")))
        launch = Launch("buckets", python("bucket_ranks", str(folder / "buckets")))
        contest = Contest(started([launch], config.ranks, stack, found.failures), found)
        progress = stack.enter_context(progress_bar())
        turns = [(size, case) for size in sizes for case in CASES]
        for size, case in progress.track(turns, description="buckets"):
            contest.measure(size, effort, lambda part: None, partial(_is_of, case))
        contest.facts()
    return found


def _is_of(case: str, key: Key) -> bool:
    return key[1] == case


def fastest(found: report.Report, size: int, case: str, *who: str) -> report.Row | None:
    """The fastest of those, in one case."""
    rows = [row for row in found.select(size=size, algorithm=case) if row.who in who]
    return rows[0] if rows else None


def bars_of(found: report.Report) -> list[bars.Bar]:
    """What pycoll must reach at each size.

    Packing: 90 % of the speed of torch's faster way. Averaging into fp32: 4 times that of Gloo's all-reduce; 2 times
    in 8 bits, where an all-reduce overflows, and writes a quarter of the bytes.
    """
    checked = []
    for size in sorted({row.size for row in found.rows}):
        for case in CASES:
            in_8_bits = case.endswith("int8")
            if case in PACKS and in_8_bits:
                continue
            rivals, factor = ((FOREACH, COMPRESS), 0.9) if case in PACKS else ((GLOO,), 2.0 if in_8_bits else 4.0)
            own, other = fastest(found, size, case, PYCOLL), fastest(found, size, case, *rivals)
            seconds = [row.timing.median if row else None for row in (own, other)]
            name = other.who if other else " or ".join(rivals)
            checked.append(bars.ratio(f"{case}, {format_bytes(size)}", seconds[0], name, seconds[1], factor))
    return checked


def table(found: BucketsReport) -> Table:
    """A line a contender, fastest first within a case."""
    shown = Table(title=f"buckets, {found.world_size} ranks", box=box.SIMPLE)
    for name in ("size", "case", "who"):
        shown.add_column(name, no_wrap=True)
    for name in ("time us", "GB/s", "x a copy"):
        shown.add_column(name, justify="right", no_wrap=True)
    for size in sorted({row.size for row in found.rows}):
        for case in CASES:
            rows = found.select(size=size, algorithm=case)
            copy = next((found.rate(row) for row in rows if row.who == report.CEILING), None)
            for place, row in enumerate(rows):
                shown.add_row(
                    format_bytes(size) if place == 0 else "",
                    case if place == 0 else "",
                    "memcpy" if row.who == report.CEILING else row.who,
                    report.format_seconds(row.timing.median),
                    report.format_ratio(found.rate(row) / 1e9),
                    "" if copy is None else report.format_ratio(found.rate(row) / copy),
                )
            shown.add_section()
    return shown


def draw(found: report.Report, path: Path) -> None:
    """Bars of what each reaches of a copy's rate, a panel for each size (PNG)."""
    assert isinstance(found, BucketsReport)
    sizes = sorted({row.size for row in found.rows})
    who = list(dict.fromkeys(row.who for row in found.rows if row.who != report.CEILING))
    figure = Figure(figsize=(7 * max(1, len(sizes)), 10), layout="constrained")
    for axes, size in zip(figure.subplots(1, max(1, len(sizes)), squeeze=False)[0], sizes, strict=False):
        for place, name in enumerate(who):
            at = {row.algorithm: found.rate(row) / 1e9 for row in found.select(size=size, who=name)}
            spots = [CASES.index(case) + (place - len(who) / 2 + 0.5) * 0.8 / len(who) for case in at]
            axes.barh(spots, list(at.values()), 0.8 / len(who), label=name)
        copies = {row.algorithm: found.rate(row) / 1e9 for row in found.select(size=size, who=report.CEILING)}
        axes.plot(list(copies.values()), [CASES.index(case) for case in copies], "k|", markersize=18, label="memcpy")
        axes.set_yticks(range(len(CASES)), CASES)
        axes.invert_yaxis()
        axes.set(xlabel="GB/s of what must be moved, on each rank", title=format_bytes(size))
        axes.legend(fontsize="small")
    figure.suptitle(f"{found.world_size} ranks on {report.machine_line(found)}", fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(BucketsBench)))
