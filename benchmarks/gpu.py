"""All-reduce between the GPUs of a machine, eager and in a CUDA graph: pycoll beside NCCL, torch's own and a copy.

`pycoll bench gpu --help`. One process a GPU; on a single GPU several processes share it. README.md explains the method.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from pycoll._build import build_info
from pycoll.collectives import Algorithm

from . import machine, report, timing
from .driver import Contest
from .gpu_report import NAMES, Found, Peer, Setting, absences, draw, succeeded, table, to_json
from .groups import GroupFailed, Launch, RankGroup

PATIENCE = 90.0  # seconds for one order, or for all ranks to start; half of the run's seconds, but not less than
LEAST_PATIENCE = 30.0
_EFFORT = timing.Effort(seconds=1.5, min_rounds=3, max_rounds=15)
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
        words = [peer, str(folder / peer), ",".join(setting.modes), ",".join(config.algorithms), str(setting.share)]
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
    found.left_out += absences(found.reports)
    return found


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


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(GpuBench)))
