"""What the trainer learns in each of its ways: validation loss against steps, beside torch's own way in fp32.

`pycoll bench convergence --help`. README.md explains what is compared.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import multiprocessing

import pycoll
from pycoll import _C
from pycoll.models import GPTConfig
from pycoll.train import TrainConfig
from pycoll.train.language import Language
from pycoll.train.stop import StopRequest
from pycoll.train.trainer import Trainer

from . import machine, report
from .all_reduce import progress_bar
from .drawing import curves

REFERENCE = "torch DDP, fp32"
CASES: dict[str, dict[str, Any]] = {
    REFERENCE: {"optimizer": "torch"},
    "fused, fp32": {"optimizer": "fused"},
    "sharded, fp32": {"optimizer": "sharded"},
    "sharded, bf16": {"optimizer": "sharded", "dtype": "bfloat16"},
    "sharded, fp16, scaled loss": {"optimizer": "sharded", "dtype": "float16"},
    "sharded, fp32, bf16 wire": {"optimizer": "sharded", "wire_dtype": "bfloat16"},
    "sharded, fp32, int8 wire": {"optimizer": "sharded", "wire_dtype": "int8"},
}
"""The settings of the trainer that differ; the first is what the others are compared with."""
MODEL = GPTConfig(context=64, n_layer=2, n_head=2, d_model=64)
COLORS = ("black", "#ec7014", "#08306b", "#41ab5d", "#a50f15", "#4292c6", "#9e9ac8")


@dataclass
class ConvergenceBench:
    """Trains a small GPT on the Python standard library's source in each way the trainer has, from several seeds."""

    steps: int = 600
    """Of each run."""
    seeds: int = 3
    """Runs of each way; a seed draws the first weights and the windows."""
    ranks: int = 2
    """Processes."""
    batch_size: int = 8
    """Sequences of a rank in a step."""
    output: Path = Path("bench-results")
    """Folder for the JSON file and the plot."""
    quick: bool = False
    """A twentieth of the steps, from two seeds: under a minute, and no conclusions."""


@dataclass(frozen=True)
class Run:
    """One run: validation losses in nats a byte, after `steps` steps each; and how many steps a scaled loss skipped."""

    case: str
    seed: int
    steps: list[int]
    losses: list[float]
    skipped: int


@dataclass(frozen=True)
class Verdict:
    """One case beside the reference, by the final losses of all seeds.

    Attributes:
        mean: over the seeds, nats a byte.
        difference: of the means.
        deviations: the same in standard deviations of the reference from seed to seed.
        errors: the same in standard errors of a difference of two such means.
        paired: standard error of the difference where each seed is compared with itself.
    """

    case: str
    mean: float
    difference: float
    deviations: float
    errors: float
    paired: float

    @property
    def within_noise(self) -> bool:
        """Whether the seeds differ by as much."""
        return abs(self.errors) <= 2


@dataclass
class Found:
    """The runs, in the order of CASES and seeds."""

    runs: list[Run] = field(default_factory=list)

    def finals(self, case: str) -> list[float]:
        """Of each seed."""
        return [run.losses[-1] for run in self.runs if run.case == case]

    def curves(self, case: str) -> tuple[list[int], torch.Tensor]:
        """Steps, and losses of shape (seeds, steps)."""
        runs = [run for run in self.runs if run.case == case]
        return runs[0].steps, torch.tensor([run.losses for run in runs])

    def verdicts(self) -> list[Verdict]:
        """Of all cases, the reference among them."""
        reference = self.finals(REFERENCE)
        deviation, seeds = statistics.stdev(reference), len(reference)
        verdicts = []
        for case in CASES:
            finals = self.finals(case)
            differences = [ours - theirs for ours, theirs in zip(finals, reference, strict=True)]
            difference = statistics.mean(differences)
            in_errors = difference / (deviation * math.sqrt(2 / seeds))
            paired = statistics.stdev(differences) / math.sqrt(seeds)
            mean = statistics.mean(finals)
            verdicts.append(Verdict(case, mean, difference, difference / deviation, in_errors, paired))
        return verdicts


def settings(config: ConvergenceBench, case: str, seed: int) -> TrainConfig:
    """Of one run."""
    common = TrainConfig(
        device="cpu",
        dp=config.ranks,
        steps=config.steps,
        batch_size=config.batch_size,
        eval_every=max(10, config.steps // 16),
        eval_examples=16 if config.quick else 256,
        checkpoint_every=config.steps,
        sample_bytes=0,
        model=MODEL,
    )
    return replace(common, seed=seed, **CASES[case])


def train_all(rank: int, config: ConvergenceBench, folder: Path) -> None:
    """One rank of all runs, in a process of its own; each leaves a folder with its summary."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.ranks))
    dist.init_process_group("pycoll", init_method=f"file://{folder}/store", rank=rank, world_size=config.ranks)
    for case, seed, out in _planned(config, folder):
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            Trainer(Language(settings(config, case, seed)), out).run(StopRequest())
    dist.destroy_process_group()


def measure(config: ConvergenceBench) -> Found:
    """Trains all, and reads what the runs have written."""
    with tempfile.TemporaryDirectory(prefix="pycoll-bench-") as name, progress_bar() as progress:
        planned = _planned(config, Path(name))
        task = progress.add_task("training", total=len(planned))
        ranks = multiprocessing.start_processes(
            train_all, args=(config, Path(name)), nprocs=config.ranks, join=False, start_method="spawn"
        )
        while not ranks.join(timeout=1.0):  # raises what a rank has raised
            progress.update(task, completed=sum((out / "summary.json").exists() for _, _, out in planned))
        progress.update(task, completed=len(planned))
        return Found([_run(case, seed, out) for case, seed, out in planned])


def _planned(config: ConvergenceBench, folder: Path) -> list[tuple[str, int, Path]]:
    """Case, seed and folder of each run; seed by seed, so that what else happens on the machine hits all alike."""
    return [
        (case, seed, folder / f"{seed}-{index}") for seed in range(config.seeds) for index, case in enumerate(CASES)
    ]


def _run(case: str, seed: int, out: Path) -> Run:
    """What the trainer has written: the curve for TensorBoard, and its summary."""
    events = EventAccumulator(str(out))
    events.Reload()
    scalars = events.Scalars("loss/validation")
    skipped = json.loads((out / "summary.json").read_text()).get("skipped steps", 0)
    return Run(case, seed, [event.step for event in scalars], [event.value for event in scalars], skipped)


def table(verdicts: Iterable[Verdict], title: str) -> Table:
    """A line a case."""
    shown = Table(title=title, box=box.SIMPLE)
    shown.add_column("case", no_wrap=True)
    for name in ("validation loss", "difference", "seed by seed", "deviations", "verdict"):
        shown.add_column(name, justify="right", no_wrap=True)
    for each in verdicts:
        row = [each.case, f"{each.mean:.4f}"]
        if each.case != REFERENCE:
            row += [f"{each.difference:+.4f}", f"+- {each.paired:.4f}", f"{each.deviations:+.2f}"]
            row += ["within the noise" if each.within_noise else f"{each.errors:+.1f} standard errors"]
        shown.add_row(*row)
    return shown


def draw(found: Found, title: str, path: Path) -> None:
    """Loss against steps, and its distance from the reference's, means over the seeds (PNG)."""
    steps, _ = found.curves(REFERENCE)
    runs = {case: found.curves(case)[1] for case in CASES}
    curves(steps, runs, REFERENCE, COLORS, ("steps", "validation loss"), title, path, spread=True)


def main(config: ConvergenceBench) -> int:
    """Runs the benchmark; prints the table, writes JSON and plot.

    Returns:
        The exit code: 1 where a case is outside the noise, 2 where the options were bad.
    """
    console = Console()
    console.width = max(console.width, 110)
    if config.quick:
        config.steps, config.seeds = max(1, config.steps // 20), 2
    if config.steps < 1 or config.seeds < 2 or config.ranks < 1:
        message = "pycoll bench convergence: give a step, two seeds and a rank at least"
        Console(stderr=True).print(message, style="red")
        return 2
    about = machine.describe()
    found = measure(config)
    verdicts = found.verdicts()
    console.print(table(verdicts, f"after {config.steps} steps, mean of {config.seeds} seeds, nats a byte"))
    title = f"{about['cpu']}, {config.ranks} ranks, {config.seeds} seeds, {about['date'][:10]}"
    console.print(title, style="dim", markup=False, highlight=False)
    path = config.output / "convergence.json"
    report.write(path, to_json(config, about, found.runs, verdicts))
    draw(found, title, path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png')}", markup=False)
    return int(not all(each.within_noise for each in verdicts))


def to_json(
    config: ConvergenceBench, about: dict[str, object], runs: Sequence[Run], verdicts: Sequence[Verdict]
) -> str:
    """All of it, losses in nats a byte."""
    common = settings(config, REFERENCE, 0).to_dict()
    content = {
        "benchmark": "convergence",
        "machine": about,
        "facts": {"torch": torch.__version__, "pycoll": pycoll.__version__, "simd": _C.simd},
        "settings": {name: value for name, value in common.items() if name not in ("optimizer", "seed")},
        "cases": CASES,
        "verdicts": [{**asdict(each), "within_noise": each.within_noise} for each in verdicts],
        "runs": [asdict(run) for run in runs],
    }
    return json.dumps(content, indent=1)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(ConvergenceBench)))
