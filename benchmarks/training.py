"""Whole steps of training a GPT: forward, backward, averages, clipping, AdamW, over pycoll and over Gloo in one run.

`pycoll bench training --help`. Data parallel, beside torch's DistributedDataParallel over either backend; and tensor
parallel, the same split model over either. README.md explains the method.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from pycoll.models import count_parameters

from . import bars, machine, report, timing, training_gpu
from .all_reduce import progress_bar, python
from .drawing import stacked_bars
from .driver import Contest
from .groups import Launch, started
from .step import StepReport
from .training_gpu import GpuTrainingBench
from .training_ranks import DATA, LARGE, MODELS, PARTS, PYCOLL, RIVAL, TENSOR, Case, written

FEW = 16
"""Tokens of a step at which a split model must be FASTER times as fast: collectives are short, and many."""
FASTER = 1.3
"""Also where gradients weigh as much as compute."""
GAP = 1e-3
"""What rounding explains of a contender's distance from what it should compute."""

_DEFAULT = timing.Effort(seconds=12.0, min_rounds=7, max_rounds=60)
_QUICK = timing.Effort(seconds=1.5, min_rounds=3, max_rounds=10)


@dataclass
class TrainingBench:
    """Times steps of training a GPT, on ranks that each have a whole model, and on ranks that share one."""

    device: Literal["cpu", "cuda"] = "cpu"
    """cuda: GPT-2 on one GPU, beside nanoGPT's step, instead; of the settings below --output, --quick and --check."""
    ranks: int = 2
    """Processes that take part."""
    kinds: tuple[Literal["data", "tensor"], ...] = ("data", "tensor")
    """What is measured: data-parallel steps, steps of a model whose heads, features and vocabulary are split, or both.
    """
    models: tuple[str, ...] = tuple(MODELS)
    """Of data-parallel steps, in 8 sequences a rank of 256 tokens or what the model can; 30M: in one of 64. A name, or
    a shape as below."""
    shapes: tuple[str, ...] = ("256x4", "512x4", "1024x2")
    """Of the models that are split: d_model, of which 64 make a head, x layers."""
    tokens: tuple[int, ...] = (FEW, 512)
    """Of the one sequence in a step of theirs."""
    output: Path = Path("bench-results")
    """Folder for the JSON file and the plot."""
    quick: bool = False
    """Fewer samples."""
    check: bool = False
    """Compare with what pycoll must reach, and fail if any bar is missed or could not be measured."""


def main(config: TrainingBench) -> int:
    """Runs the benchmark; prints the table, writes JSON and plot.

    Returns:
        The exit code: 1 where a contender failed or a bar was missed, 2 where the options were bad.
    """
    if config.device == "cuda":
        return training_gpu.main(GpuTrainingBench(output=config.output, quick=config.quick, check=config.check))
    try:
        found = _run(config)
    except ValueError as e:
        Console(stderr=True).print(f"pycoll bench: {e}", style="red", markup=False)
        return 2
    path = config.output / f"training-{config.ranks}-ranks.json"
    report.publish(found, table(found), path, draw, width=120)
    return bars.exit_code(found, config.check, bars_of, "what a step of training must reach")


def cases_of(config: TrainingBench) -> list[Case]:
    """What is measured.

    Raises:
        ValueError: the options do not fit one another.
    """
    if config.ranks < 2:
        raise ValueError(f"2 ranks or more train together, not {config.ranks}")
    cases = []
    if DATA in config.kinds:
        for model in config.models:
            batch, tokens = (1, 64) if model == LARGE else (8, 256)
            cases.append(Case(DATA, model, batch, min(tokens, Case(DATA, model, batch, tokens).config().context)))
    if TENSOR in config.kinds:
        cases += [Case(TENSOR, shape, 1, tokens) for tokens in config.tokens for shape in config.shapes]
    if not cases or min(case.tokens for case in cases) < 1:
        raise ValueError("nothing is measured: give --kinds, and --models or --shapes and --tokens, one or more")
    for case in cases:
        if case.kind == TENSOR and case.config().n_head % config.ranks:
            raise ValueError(f"{config.ranks} ranks do not divide the heads of {case.model}: give it more features")
    return cases


def _run(config: TrainingBench) -> StepReport:
    """Measures everything.

    Raises:
        ValueError: the options fit neither one another nor this machine.
    """
    cases = cases_of(config)
    found = StepReport("training", config.ranks, "float32", machine.describe())
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pycoll-bench-"))
        launch = Launch("training", python("training_ranks", written(cases), f"{folder}/training"))
        contest = Contest(started([launch], config.ranks, stack, found.failures), found)
        progress = stack.enter_context(progress_bar())
        task = progress.add_task("", total=len(cases))

        def show(done: int, part: float) -> None:
            progress.update(task, completed=done + part)

        for done, case in enumerate(cases):
            effort = _QUICK if config.quick else _DEFAULT
            contest.measure(_size(case), effort, partial(show, done), case.has)
        contest.facts()
    found.failures += wrong(found)
    return found


def _size(case: Case) -> int:
    """Bytes of what an all-reduce adds: gradients, or activations."""
    config = case.config()
    return 4 * (count_parameters(config) if case.kind == DATA else case.tokens * config.d_model)


def kind_of(row: report.Row) -> str:
    """DATA or TENSOR."""
    return row.call.split(" ")[0]


def noted(found: report.Report, what: str, row: report.Row) -> Any:
    """What rank 0 noted of a contender in a case: its "parts" or "gap"."""
    key = " ".join((row.who, row.algorithm, row.memory, row.call))
    return found.facts["training"][what][key]


def wrong(found: report.Report) -> list[str]:
    """Contenders that compute something else than they should."""
    what = {DATA: f"weights, after a step {{:.2g}} of its length from those of {RIVAL[DATA]}"}
    what[TENSOR] = "gradients, {:.2g} of their norm from the whole model's"
    gaps = [(row, noted(found, "gap", row)) for row in found.rows]
    return [
        f"{row.who}, {row.algorithm}, {row.call}: wrong {what[kind_of(row)].format(gap)}"
        for row, gap in gaps
        if not gap <= GAP
    ]


def rival_of(found: report.Report, row: report.Row) -> report.Row | None:
    """Gloo in the same case, with DDP where models are whole."""
    return next(iter(found.select(who=RIVAL[kind_of(row)], algorithm=row.algorithm, call=row.call)), None)


def bars_of(found: report.Report) -> list[bars.Bar]:
    """What pycoll must reach, in the kinds that were measured: data parallel in all cases, split with few tokens."""
    kinds = {kind_of(row) for row in found.rows}
    checked = []
    for row in found.rows:
        kind = kind_of(row)
        few = row.call == Case(TENSOR, row.algorithm, 1, FEW).key(PYCOLL)[-1]
        if row.who == PYCOLL and (kind == DATA or few):
            other = rival_of(found, row)
            seconds = None if other is None else other.timing.median
            factor = FASTER if few or row.algorithm == LARGE else 1.0
            case = f"{row.algorithm}, {row.call} tokens"
            checked.append(bars.ratio(case, row.timing.median, RIVAL[kind], seconds, factor))
    for kind, case in ((DATA, LARGE), (TENSOR, f"1 x {FEW} tokens")):
        if kind in kinds and not any(kind in bar.case and case in bar.case for bar in checked):
            checked.append(bars.ratio(f"{kind}, {case}", None, RIVAL[kind], None, FASTER))
    return checked


def table(found: report.Report) -> Table:
    """A line a contender, by case."""
    shown = Table(title=f"a step of training a GPT, {found.world_size} ranks, float32; times in ms", box=box.SIMPLE)
    for name in ("model", "parallel, sequences x tokens", "who"):
        shown.add_column(name, no_wrap=True)
    for name in ("step", *PARTS, "x Gloo", "gap"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        parts, other = noted(found, "parts", row), rival_of(found, row)
        times = (row.timing.median, *(parts[part] for part in PARTS))
        shown.add_row(
            row.algorithm,
            row.call,
            row.who,
            *(f"{seconds * 1e3:.2f}" for seconds in times),
            "" if other is None else report.format_ratio(other.timing.median / row.timing.median),
            "" if row is other and kind_of(row) == DATA else f"{noted(found, 'gap', row):.1e}",
        )
    shown.caption = "averages are part of the backward pass, clipping (data) of the update"
    return shown


def draw(found: report.Report, path: Path) -> None:
    """A bar for each contender, divided into the parts of a step, as a share of the rival's step (PNG)."""
    bars = []
    for row in found.rows:
        if (other := rival_of(found, row)) is not None:
            parts = noted(found, "parts", row)
            shares = {part: parts[part] / other.timing.median for part in PARTS}
            bars.append((f"{row.algorithm}, {row.call}: {row.who}", shares))
    title = f"{found.world_size} ranks, {report.machine_line(found)}"
    stacked_bars(bars, "time of a step / (DDP over) Gloo's, lower is better", title, path)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(TrainingBench)))
