"""A step of data-parallel training: averaging, clipping, AdamW, for pycoll, torch's DDP over pycoll and over Gloo.

`pycoll bench step --help`. README.md explains what is compared.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from . import bars, machine, report, timing, values
from .all_reduce import progress_bar, python, shared_memory, sharing
from .drawing import stacked_bars
from .driver import Contest
from .groups import started
from .step_ranks import ALONE, COPIES, FUSED, GLOO_DDP, PARTS, PYCOLL_DDP, SHARDED

MI = 2**20
COPIES_NEEDED = 60
"""Memory of all contenders of a rank, in multiples of the fp32 parameters'."""

_DEFAULT = timing.Effort(seconds=90.0, min_rounds=7, max_rounds=40)
_QUICK = timing.Effort(seconds=5.0, min_rounds=3, max_rounds=10)


@dataclass
class StepBench:
    """Times a step of data-parallel training: gradients averaged over the ranks, clipped, AdamW, zero_grad."""

    ranks: int = 2
    """Processes that take part."""
    parameters: int = 32 * MI
    """Elements in all."""
    tensors: int = 96
    """In how many tensors they lie, four a layer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and gradients; with bfloat16 there are fp32 masters."""
    output: Path = Path("bench-results")
    """Folder for the JSON file and the plot."""
    quick: bool = False
    """A quarter of the parameters and fewer samples: under a minute."""
    check: bool = False
    """Compare with what pycoll must reach, and fail if any bar is missed or could not be measured."""


class StepReport(report.Report):
    """Of steps, which have no bandwidth."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


def main(config: StepBench) -> int:
    """Runs the benchmark; prints the table, writes JSON and plot.

    Returns:
        The exit code: 1 where a contender failed or a bar was missed, 2 where the options were bad.
    """
    if config.quick:
        config.parameters //= 4
    try:
        found = _run(config)
    except ValueError as e:
        Console(stderr=True).print(f"pycoll bench: {e}", style="red", markup=False)
        return 2
    path = config.output / f"step-{config.ranks}-ranks-{config.dtype}.json"
    report.publish(found, table(found), path, draw, width=160)
    return bars.exit_code(found, config.check, bars_of, "what a step must reach")


def _run(config: StepBench) -> StepReport:
    """Measures everything.

    Raises:
        ValueError: the options fit neither one another nor this machine.
    """
    if config.ranks < 2:
        raise ValueError(f"data-parallel training takes 2 ranks or more, not {config.ranks}")
    if not 1 <= config.tensors <= config.parameters:
        raise ValueError("--tensors must be from 1 to --parameters")
    needed = COPIES_NEEDED * 4 * config.parameters * config.ranks
    if needed > machine.available_memory():
        raise ValueError(f"the contenders would take {needed >> 20} MiB, more than is free: lower --parameters")
    found = StepReport("step", config.ranks, config.dtype, machine.describe())
    found.facts["model"] = {"parameters": config.parameters, "tensors": config.tensors}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pycoll-bench-")))
        descriptors = shared_memory(config.ranks, 8 * config.parameters, stack)
        launch = sharing("step", python("step_ranks", str(config.tensors), str(folder / "step")), descriptors)
        contest = Contest(started([launch], config.ranks, stack, found.failures), found)
        progress = stack.enter_context(progress_bar())
        task = progress.add_task("step", total=1.0)
        size = config.parameters * values.ITEMSIZE[config.dtype]
        effort = _QUICK if config.quick else _DEFAULT
        contest.measure(size, effort, lambda part: progress.update(task, completed=part))
        contest.facts()
    found.failures += wrong(found)
    return found


def noted(found: report.Report, what: str, who: str) -> Any:
    """What the ranks noted of a contender: its "state_bytes", "parts" or "distance"; None where there is none."""
    return found.facts.get("step", {}).get(what, {}).get(who)


def wrong(found: report.Report) -> list[str]:
    """Contenders whose parameters are further from exact ones than rounding explains."""
    failures = []
    for row in found.rows:
        distance = noted(found, "distance", row.who)
        exact = found.dtype == "float32" and not any(word in row.who for word in ("bf16", "bfloat16", "int8"))
        if distance is not None and not distance <= (0.01 if exact else 0.05):
            failures.append(f"{row.who}: wrong parameters, {distance:.2g} learning rates from exact ones")
    return failures


def seconds(found: report.Report, who: str) -> float | None:
    """The median of a step; with DDP's name, of its faster setting."""
    rows = [row for name in (who, who + COPIES) for row in found.select(who=name)]
    return min((row.timing.median for row in rows), default=None)


def bars_of(found: report.Report) -> list[bars.Bar]:
    """What pycoll must reach."""
    own = seconds(found, SHARDED["float32"])
    checked = [
        bars.ratio(SHARDED["float32"], own, rival, seconds(found, rival), factor)
        for rival, factor in ((GLOO_DDP, 5.0), (PYCOLL_DDP, 1.5))
    ]
    case, bar = f"state of {SHARDED['float32']}", f"at most 1/{found.world_size} of FusedAdam's + 1 %"
    shard, whole = (noted(found, "state_bytes", who) for who in (SHARDED["float32"], FUSED))
    if not shard or not whole:
        return [*checked, bars.Bar(case, bar, "not measured", None)]
    share = shard / whole
    return [*checked, bars.Bar(case, bar, f"{share:.2%}", share <= 1.01 / found.world_size)]


def table(found: report.Report) -> Table:
    """A line a contender, fastest first."""
    model = found.facts["model"]
    title = f"a step of {model['parameters'] / MI:g} Mi parameters in {model['tensors']} tensors"
    shown = Table(title=f"{title}, {found.world_size} ranks, {found.dtype}; times in ms", box=box.SIMPLE)
    shown.add_column("who", no_wrap=True)
    for name in ("time", "net", *PARTS, "x Gloo", "net x Gloo", "state MiB", "distance"):
        shown.add_column(name, justify="right", no_wrap=True)
    alone, gloo = seconds(found, ALONE) or 0.0, seconds(found, GLOO_DDP)
    for row in found.select():
        time, distance = row.timing.median, noted(found, "distance", row.who)
        net = max(time - alone, 0.0)
        parts = noted(found, "parts", row.who) or {}
        shown.add_row(
            row.who,
            _ms(time),
            _ms(net),
            *(_ms(parts[part]) if part in parts else "" for part in PARTS),
            "" if gloo is None else report.format_ratio(gloo / time),
            "" if gloo is None or not net else report.format_ratio((gloo - alone) / net),
            f"{(noted(found, 'state_bytes', row.who) or 0) / MI:.1f}",
            "" if distance is None else f"{distance:.1e}",
        )
    shown.caption = "\n".join(found.left_out)
    return shown


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def draw(found: report.Report, path: Path) -> None:
    """A bar for each contender, divided into the parts of a step (PNG)."""
    bars = [
        (row.who, {part: 1e3 * (noted(found, "parts", row.who) or {}).get(part, 0.0) for part in PARTS})
        for row in found.select()
    ]
    title = f"{found.world_size} ranks, {found.dtype}, {report.machine_line(found)}"
    stacked_bars(bars, "time (ms) on rank 0, lower is better", title, path)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(StepBench)))
