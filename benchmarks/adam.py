"""A step of AdamW: pycoll.FusedAdam beside torch's optimizers and the memory's ceiling, in one run.

`pycoll bench adam --help`. README.md explains what is compared.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

import pycoll
from pycoll import _C

from . import bars, machine, report, timing
from .adam_cases import BF16, CASES, SEQUENCE, STEP, STEP_BYTES, TORCH, Contender
from .all_reduce import progress_bar
from .gpu_calls import stopwatch
from .report import CEILING

MI = 2**20
_DEFAULT = timing.Effort(seconds=15.0, min_rounds=7, max_rounds=40)
_QUICK = timing.Effort(seconds=2.0, min_rounds=3, max_rounds=10)


@dataclass
class AdamBench:
    """Times AdamW: FusedAdam, torch's fused and foreach, and reads and writes without arithmetic."""

    parameters: int = 32 * MI
    """Elements in all."""
    tensors: tuple[int, ...] = (1, 200)
    """In how many tensors they lie."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    output: Path = Path("bench-results")
    """Folder for the JSON file and the plot."""
    quick: bool = False
    """A quarter of the parameters and fewer samples: under a minute."""
    check: bool = False
    """Compare with what FusedAdam must reach on a CPU, and fail if any bar is missed or could not be measured."""


@dataclass(frozen=True)
class Row:
    """One contender in one case; seconds a step."""

    case: str
    tensors: int
    who: str
    timing: timing.Timing


BARS = ((STEP, TORCH, 1.0), (STEP, CEILING, 0.9), (SEQUENCE, TORCH, 1.5), (BF16, TORCH, 2.2))
"""Case, whom FusedAdam is compared with, and how many times as fast it must be."""


def seconds_of(contender: Contender, device: str) -> float:
    """One sample."""
    contender.prepare()
    if device == "cpu":
        begin = time.perf_counter()
        contender.run()
        return time.perf_counter() - begin
    torch.cuda.synchronize()
    return stopwatch(contender.run)


def measure(contenders: Sequence[Contender], device: str, effort: timing.Effort) -> Iterator[tuple[str, timing.Timing]]:
    """All in turn, in rotating order, after a round that warms up."""
    samples: dict[str, list[float]] = {contender.who: [] for contender in contenders}
    for contender in contenders:
        seconds_of(contender, device)
    began, rounds = time.monotonic(), 0
    while not effort.enough(rounds, time.monotonic() - began):
        for place in range(len(contenders)):
            contender = contenders[(place + rounds) % len(contenders)]
            samples[contender.who].append(seconds_of(contender, device))
        rounds += 1
    for who, values in samples.items():
        yield who, timing.summarize(values, 1)


def bars_of(rows: Sequence[Row]) -> list[bars.Bar]:
    """What FusedAdam must reach on a CPU, against the rows."""
    medians = {(row.case, row.tensors, row.who): row.timing.median for row in rows}
    return [
        bars.ratio(
            f"{case}, {tensors} tensors",
            medians.get((case, tensors, "pycoll")),
            rival,
            medians.get((case, tensors, rival)),
            factor,
        )
        for tensors in (1, 200)
        for case, rival, factor in BARS
    ]


def table(rows: Sequence[Row], config: AdamBench) -> Table:
    """A line a row, fastest first within a case."""
    shown = Table(title=f"AdamW, {config.parameters / MI:g} Mi parameters, {config.device}", box=box.SIMPLE)
    for name in ("case", "tensors", "who"):
        shown.add_column(name, no_wrap=True)
    for name in ("time us", "ns a thousand", "GB/s", f"x {TORCH}"):
        shown.add_column(name, justify="right", no_wrap=True)
    for case, tensors in dict.fromkeys((row.case, row.tensors) for row in rows):
        here = sorted(
            (row for row in rows if (row.case, row.tensors) == (case, tensors)), key=lambda row: row.timing.median
        )
        fused = next(row.timing.median for row in here if row.who == TORCH)
        for place, row in enumerate(here):
            seconds = row.timing.median
            shown.add_row(
                case if place == 0 else "",
                str(tensors) if place == 0 else "",
                row.who,
                report.format_seconds(seconds),
                report.format_ratio(seconds / config.parameters * 1e12),
                report.format_ratio(STEP_BYTES * config.parameters / seconds / 1e9) if case == STEP else "",
                report.format_ratio(fused / seconds),
            )
        shown.add_section()
    return shown


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bars of every case, one below the other (PNG)."""
    figure = Figure(figsize=(11, 1 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colors = {"pycoll": "#08306b", TORCH: "#a50f15", "torch foreach": "#ec7014", CEILING: "black"}
    labels = [f"{row.case}; {row.tensors} tensors: {row.who}" for row in rows]
    times = [row.timing.median * 1e3 for row in rows]
    axes.barh(range(len(rows)), times, color=[colors[row.who] for row in rows])
    axes.set_yticks(range(len(rows)), labels, fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="time (ms), lower is better", title=title)
    axes.grid(True, axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def main(config: AdamBench) -> int:
    """Runs the benchmark; prints the table, writes JSON and plot.

    Returns:
        The exit code: 1 where a bar was missed, 2 where the options were bad.
    """
    console = Console()
    console.width = max(console.width, 110)
    if config.device == "cuda" and not torch.cuda.is_available():
        Console(stderr=True).print("pycoll bench adam: there is no CUDA GPU", style="red")
        return 2
    if not config.tensors or not all(1 <= tensors <= config.parameters for tensors in config.tensors):
        Console(stderr=True).print("pycoll bench adam: --tensors must be from 1 to --parameters", style="red")
        return 2
    if config.quick:
        config.parameters //= 4
    about = machine.describe()
    rows = []
    with progress_bar() as progress:
        for case, make in progress.track(CASES.items(), description="adam"):
            for tensors in config.tensors:
                contenders = make(config.parameters, tensors, config.device)
                found = measure(contenders, config.device, _QUICK if config.quick else _DEFAULT)
                rows += [Row(case, tensors, who, timed) for who, timed in found]
    console.print(table(rows, config))
    title = f"{about['cpu']}, {about['cores']} cores, {torch.get_num_threads()} threads, {about['date'][:10]}"
    if config.device == "cuda":
        title = f"{torch.cuda.get_device_name()}, {about['date'][:10]}"
    console.print(title, style="dim", markup=False, highlight=False)
    path = config.output / f"adam-{config.device}.json"
    report.write(path, to_json(config, about, rows))
    draw(rows, title, path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png')}", markup=False)
    if not config.check:
        return 0
    checked = bars_of(rows)
    console.print(bars.table(checked, "what FusedAdam must reach"))
    return int(not all(bar.passed for bar in checked))


def to_json(config: AdamBench, about: dict[str, object], rows: Sequence[Row]) -> str:
    """All of it, times in seconds."""
    found = {
        "benchmark": "adam",
        "parameters": config.parameters,
        "device": config.device,
        "machine": {**about, "threads": torch.get_num_threads()},
        "facts": {"torch": torch.__version__, "pycoll": pycoll.__version__, "simd": _C.simd},
        "rows": [asdict(row) for row in rows],
    }
    return json.dumps(found, indent=1)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(AdamBench)))
