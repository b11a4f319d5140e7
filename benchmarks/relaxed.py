"""What a model learns where ranks do not wait for one another at every step, and how much travels for it.

`pycoll bench relaxed --help`. Synchronous training beside local SGD, DiLoCo and a parameter server with bounded
staleness, at equal tokens; `relaxed_ranks` says how each trains.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from torch import multiprocessing

import pycoll
from pycoll import _C

from . import machine, report
from .all_reduce import progress_bar
from .drawing import curves
from .relaxed_ranks import REFERENCE, RelaxedBench, Run, planned, settings, train_all

COLORS = ("black", "#ec7014", "#08306b", "#4292c6", "#41ab5d", "#a50f15", "#9e9ac8")


def measure(config: RelaxedBench) -> list[Run]:
    """Trains all, in the order of cases and seeds."""
    with tempfile.TemporaryDirectory(prefix="pycoll-bench-") as name, progress_bar() as progress:
        runs = planned(config, Path(name))
        task = progress.add_task("training", total=len(runs))
        ranks = multiprocessing.start_processes(
            train_all, args=(config, Path(name)), nprocs=config.ranks, join=False, start_method="spawn"
        )
        while not ranks.join(timeout=1.0):  # raises what a rank has raised
            progress.update(task, completed=sum(path.exists() for _, _, path in runs))
        progress.update(task, completed=len(runs))
        return [Run(**json.loads(path.read_text())) for _, _, path in runs]


def table(runs: Sequence[Run], title: str) -> Table:
    """A line a case, means over the seeds."""
    shown = Table(title=title, box=box.SIMPLE)
    shown.add_column("case", no_wrap=True)
    for name in ("training loss", "validation loss", "difference", "KiB out a step", "KiB back", "steps ahead"):
        shown.add_column(name, justify="right", no_wrap=True)
    reference = statistics.mean(run.final for run in runs if run.case == REFERENCE)
    for case in dict.fromkeys(run.case for run in runs):
        own = [run for run in runs if run.case == case]
        final = statistics.mean(run.final for run in own)
        last = statistics.mean(run.losses[-1] for run in own)
        numbers = [f"{last:.4f}", f"{final:.4f}", f"{final - reference:+.4f}"]
        numbers += [f"{own[0].sent / 1024:.1f}", f"{own[0].received / 1024:.1f}"]
        shown.add_row(case, *numbers, f"{statistics.mean(run.ahead for run in own):.2f}")
    return shown


def draw(runs: Sequence[Run], title: str, path: Path) -> None:
    """Training loss against tokens, means over the seeds, and the same less the reference's (PNG)."""
    losses = {
        case: torch.tensor([run.losses for run in runs if run.case == case])
        for case in dict.fromkeys(run.case for run in runs)
    }
    tokens = [count / 1e6 for count in runs[0].tokens]
    labels = ("tokens of all ranks (millions)", "training loss")
    curves(tokens, losses, REFERENCE, COLORS, labels, title, path)


def main(config: RelaxedBench) -> int:
    """Runs the benchmark; prints the table, writes JSON and plot.

    Returns:
        The exit code: 2 where the options were bad.
    """
    console = Console()
    console.width = max(console.width, 120)
    if config.quick:
        config.steps, config.seeds = max(1, config.steps // 20), 1
    if min(config.steps, config.seeds, config.ranks, config.every, config.batch_size) < 1:
        Console(stderr=True).print("pycoll bench relaxed: give at least 1 of everything", style="red")
        return 2
    about = machine.describe()
    runs = measure(config)
    console.print(table(runs, f"after {runs[0].tokens[-1]:,} tokens, mean of {config.seeds} seeds, nats a byte"))
    title = f"{about['cpu']}, {config.ranks} ranks, {config.seeds} seeds, {about['date'][:10]}"
    console.print(title, style="dim", markup=False, highlight=False)
    path = config.output / f"relaxed-{config.ranks}-ranks.json"
    content = {
        "benchmark": "relaxed",
        "machine": about,
        "facts": {"torch": torch.__version__, "pycoll": pycoll.__version__, "simd": _C.simd},
        "settings": {**settings(config, 0).to_dict(), "every": config.every},
        "runs": [asdict(run) for run in runs],
    }
    report.write(path, json.dumps(content, indent=1))
    draw(runs, title, path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png')}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(RelaxedBench)))
