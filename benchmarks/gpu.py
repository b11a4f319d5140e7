"""All-reduce between the GPUs of a machine, eager and in a CUDA graph: pycoll beside NCCL, torch's own and a copy.

`pycoll bench gpu --help`. One process a GPU; on a single GPU several processes share it. README.md explains the method.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pycoll._build import build_info
from pycoll.collectives import Algorithm

from . import machine, report, timing
from .driver import Contest
from .gpu_ranks import EAGER, GRAPH
from .groups import GroupFailed, Launch, RankGroup

Peer = Literal["pycoll", "nccl", "cupy", "symm_mem", "copy"]

NAMES: Mapping[Peer, str] = {
    "pycoll": "pycoll",
    "nccl": "NCCL",
    "cupy": "CuPy's NCCL",
    "symm_mem": "torch symm_mem",
    "copy": "the copy",
}
PATIENCE = 90.0  # seconds for one order, or for all ranks to start; half of the run's seconds, but not less than
LEAST_PATIENCE = 30.0
_EFFORT = timing.Effort(seconds=1.5, min_rounds=3, max_rounds=15)
_TENSORS = 8  # of the size that is measured, which a rank and its rivals hold at once, at most
# Without these, NCCL and torch's symmetric memory refuse ranks that share a GPU.
_SHARING = {
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}


@dataclass
class GpuBench:
    """Times all-reduce (sum) between GPUs at many sizes: pycoll, NCCL, torch's symmetric memory, and a copy."""

    ranks: int = 0
    """Processes, one a GPU; more than GPUs share them. 0: one for each GPU, or two on a single one."""
    smallest: str = "1KiB"
    """Smallest size of each rank's tensor."""
    largest: str = "1GiB"
    """Largest size; sizes at which the tensors do not fit in memory are left out."""
    factor: int = 4
    """Between one size and the next, from the largest down."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Of the tensors."""
    contenders: tuple[Peer, ...] = tuple(NAMES)
    """Who is measured."""
    algorithms: tuple[Algorithm, ...] = ("auto",)
    """Of pycoll."""
    seconds: float = 600.0
    """After so long no further size is begun."""
    output: Path = Path("bench-results")
    """Folder for the JSON file and the plot."""


@dataclass(frozen=True)
class Setting:
    """Where a run takes place."""

    ranks: int
    gpus: int
    gpu: str  # its name
    free_bytes: int  # of memory, on one

    @property
    def shared(self) -> bool:
        """Whether ranks share a GPU. What they call cannot be captured then: they meet on the host."""
        return self.ranks > self.gpus

    @property
    def modes(self) -> tuple[str, ...]:
        return (EAGER,) if self.shared else (EAGER, GRAPH)

    def fits(self, size: int) -> bool:
        """Whether the tensors of a run at `size` bytes fit in a GPU's memory."""
        return _TENSORS * -(-self.ranks // self.gpus) * size < self.free_bytes


@dataclass
class Found:
    """What a run has found: a report for each dtype, and what was left out, in words."""

    setting: Setting
    reports: list[report.Report]
    left_out: list[str] = field(default_factory=list)


def find_setting(config: GpuBench) -> Setting:
    """Of this machine.

    Raises:
        ValueError: it has none that will do, or the options do not fit.
    """
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA GPU")
    cuda = build_info()["cuda"]
    if not cuda["built"]:
        raise ValueError(f"pycoll was built without CUDA: {cuda['reason']}")
    gpus = torch.cuda.device_count()
    if not config.contenders:
        raise ValueError("nobody is measured: give --contenders at least one name")
    ranks = config.ranks or max(2, gpus)
    if ranks < 2:
        raise ValueError(f"an all-reduce takes 2 ranks or more, not {ranks}")
    return Setting(ranks, gpus, torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0])


def launches(config: GpuBench, setting: Setting, folder: Path) -> list[tuple[Launch, int]]:
    """The libraries to start, each with its number of ranks, which meet in a file in `folder`."""
    environment = {key: value for key, value in _SHARING.items() if setting.shared and key not in os.environ}
    found = []
    for peer in config.contenders:
        words = [peer, str(folder / peer), ",".join(setting.modes), ",".join(config.algorithms)]
        command = [sys.executable, "-m", f"{__package__}.gpu_ranks", *words]
        found.append((Launch(NAMES[peer], command, environment=environment), 1 if peer == "copy" else setting.ranks))
    return found


def start(
    launched: Sequence[tuple[Launch, int]], stack: ExitStack, failures: list[str], patience: float = PATIENCE
) -> list[RankGroup]:
    """The groups of ranks that start, all at the same time; the others' reasons go to `failures`."""

    def begin(launch: Launch, ranks: int) -> RankGroup | str:
        try:
            return RankGroup(launch, ranks, patience)
        except GroupFailed as error:
            return str(error)

    groups = []
    with ThreadPoolExecutor(max(1, len(launched))) as pool:
        for made in pool.map(lambda pair: begin(*pair), launched):
            if isinstance(made, RankGroup):
                groups.append(stack.enter_context(made))
            else:
                failures.append(made)
    return groups


def measure(config: GpuBench, setting: Setting, keep: Callable[[Found], object] = lambda found: None) -> Found:
    """Runs everything. `keep` is given what has been found so far, after each size: what follows may hang.

    Raises:
        ValueError: the options make no sizes.
    """
    smallest, largest = timing.parse_bytes(config.smallest), timing.parse_bytes(config.largest)
    sizes = timing.sizes(smallest, largest, config.factor, 4)
    about = {**machine.describe(), "gpu": setting.gpu, "gpus": setting.gpus}
    found = Found(setting, [report.Report("gpu", setting.ranks, dtype, about) for dtype in config.dtypes])
    deadline = time.monotonic() + config.seconds
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pycoll-bench-")))
        patience = min(PATIENCE, max(LEAST_PATIENCE, config.seconds / 2))
        groups = start(launches(config, setting, folder), stack, found.reports[0].failures, patience)
        keep(found)
        contests = [Contest(groups, each) for each in found.reports]
        columns = (TextColumn("{task.description:>8}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        progress = stack.enter_context(Progress(*columns, console=Console(stderr=True)))
        task = progress.add_task("", total=len(sizes) * len(contests))

        def show(done: int, part: float) -> None:
            progress.update(task, completed=done + part)

        for place, size in enumerate(sizes):
            name = timing.format_bytes(size)
            if not setting.fits(size):
                found.left_out.append(f"{name}: the tensors do not fit in the memory that is free")
            elif time.monotonic() > deadline:
                found.left_out.append(f"{name}: {config.seconds:.0f} s were over before")
            else:
                progress.update(task, description=name)
                for turn, contest in enumerate(contests):
                    contest.measure(size, _EFFORT, partial(show, place * len(contests) + turn))
                keep(found)
        contests[0].facts()
    found.left_out += _absences(found.reports)
    return found


def _absences(reports: Sequence[report.Report]) -> Iterator[str]:
    """Who was left out, and why, in a line each; the same reason at several sizes once."""
    for failure in dict.fromkeys(failure for each in reports for failure in each.failures):
        yield brief(failure)
    sizes: dict[tuple[str, str], list[str]] = {}
    for line in [line for each in reports for line in each.left_out]:
        case, _, reason = line.partition(": ")
        who, _, size = case.rpartition(" at ")
        sizes.setdefault((who, reason), []).append(size)
    for (who, reason), at in sizes.items():
        yield f"{who} at {', '.join(dict.fromkeys(at))}: {reason[:200]}"


def brief(failure: str) -> str:
    """A failure of a library in one line: its name, and of all that was said what tells most."""
    name, _, said = failure.partition(": ")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"([\w.]+\.)?\w*(Error|Exception)\b", line)]
    # Those of Python name the cause; else the last words do, before which only the ranks' start is told of.
    return f"{name}: {(errors or lines or ['no reason given'])[-1][:200]}"


def rows(found: Found) -> Iterator[dict[str, Any]]:
    """All rows as JSON has them: times in seconds, bandwidths in bytes a second."""
    for each in found.reports:
        for row in each.rows:
            yield {
                "ranks": each.world_size,
                "size": row.size,
                "dtype": each.dtype,
                "who": row.who,
                "algorithm": row.algorithm,
                "memory": row.memory,
                "mode": row.call,
                "seconds": row.timing.median,
                "algbw": row.algbw,
                "busbw": row.algbw * each.busbw_factor(),
                "x_nccl": nccl_ratio(each, row),
                "error": row.error,
                "timing": asdict(row.timing),
            }


def nccl_ratio(each: report.Report, row: report.Row) -> float | None:
    """NCCL's time in the same mode divided by this time: above 1 is faster than NCCL. None: NCCL was not measured."""
    nccl = each.select(size=row.size, who=NAMES["nccl"], call=row.call)
    return nccl[0].timing.median / row.timing.median if nccl else None


def table(found: Found) -> Table:
    """A line a row, grouped by size, dtype and mode, fastest first within each; the caption says who is missing."""
    setting = found.setting
    where = f"{setting.ranks} ranks on {setting.gpus} x {setting.gpu}"
    shown = Table(
        title=f"all-reduce between GPUs, {where}", box=box.SIMPLE, caption=caption(found), caption_justify="left"
    )
    for name in ("size", "dtype", "mode", "who", "algorithm", "memory"):
        shown.add_column(name, no_wrap=True)
    for name in ("time us", "algbw GB/s", "busbw GB/s", "x NCCL"):
        shown.add_column(name, justify="right", no_wrap=True)
    for size in sorted({row.size for each in found.reports for row in each.rows}):
        for each in found.reports:
            for mode in (EAGER, GRAPH):
                for place, row in enumerate(each.select(size=size, call=mode)):
                    ratio = nccl_ratio(each, row)
                    shown.add_row(
                        *((timing.format_bytes(size), each.dtype, mode) if place == 0 else ("", "", "")),
                        row.who,
                        row.algorithm,
                        row.memory,
                        report.format_seconds(row.timing.median),
                        report.format_ratio(row.algbw / 1e9),
                        report.format_ratio(row.algbw * each.busbw_factor() / 1e9),
                        "" if ratio is None else report.format_ratio(ratio),
                    )
        shown.add_section()
    return shown


def caption(found: Found) -> Text:
    """What a reader of the table must know: how ranks share a GPU, and who or what is missing."""
    lines = []
    if found.setting.shared:
        lines.append("Ranks share a GPU: its driver gives them turns, which is what these times are of. No graphs.")
    lines += [f"Left out: {line}" for line in found.left_out]
    return Text("\n".join(lines))


def draw(found: Found, path: Path) -> None:
    """Writes the picture: a row of panels for each dtype; graphs where there are any, else eager calls.

    Raises:
        ImportError: there is no matplotlib.
    """
    from . import plot  # here, as `make gpu` installs nothing

    mode = found.setting.modes[-1]
    panels = [plot.panel(replace(each, rows=each.select(call=mode)), each.dtype) for each in found.reports if each.rows]
    setting = found.setting
    title = f"all-reduce between GPUs, {mode}: {setting.ranks} ranks on {setting.gpus} x {setting.gpu}"
    plot.draw_panels(title, panels, path)


def to_json(found: Found) -> str:
    """All of it."""
    first = found.reports[0]
    content = {
        "benchmark": "gpu",
        "machine": first.machine,
        "facts": {"torch": torch.__version__, "cuda": torch.version.cuda, **first.facts},
        "left_out": found.left_out,
        "failures": [failure for each in found.reports for failure in each.failures],
        "rows": list(rows(found)),
    }
    return json.dumps(content, indent=1)


def main(config: GpuBench) -> int:
    """Runs the benchmark; prints the table, writes JSON and plot.

    Returns:
        The exit code: 1 where pycoll failed or any result was wrong, 2 where there is no GPU or the options were bad.
    """
    path = config.output / "gpu.json"

    def keep(found: Found) -> None:
        report.write(path, to_json(found))

    try:
        found = measure(config, find_setting(config), keep)
    except ValueError as error:
        Console(stderr=True).print(f"pycoll bench gpu: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    console = Console()
    console.width = max(console.width, 110)  # of a pipe it would be 80, too narrow for the table
    console.print(table(found))
    keep(found)
    written = [path]
    if any(each.rows for each in found.reports):
        try:
            draw(found, path.with_suffix(".png"))
            written.append(path.with_suffix(".png"))
        except ImportError as error:
            console.print(f"no plot: {error}", markup=False)
    console.print(f"wrote {' and '.join(map(str, written))}", markup=False)
    return int(not succeeded(found))


def succeeded(found: Found) -> bool:
    """Whether pycoll was measured without a failure, and no result was wrong. Peers may be missing."""
    failures = [failure for each in found.reports for failure in each.failures]
    return all(each.rows for each in found.reports) and not any(
        failure.startswith(NAMES["pycoll"]) or "wrong result" in failure for failure in failures
    )


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(GpuBench)))
