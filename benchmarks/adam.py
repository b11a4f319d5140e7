"""A step of AdamW: pycoll.FusedAdam beside torch's optimizers and the memory's ceiling, in one run.

`pycoll bench adam --help`. README.md explains what is compared.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pycoll
from pycoll import _C, FusedAdam

from . import bars, machine, report, timing
from .all_reduce import progress_bar

MI = 2**20
TORCH, CEILING = "torch fused", "ceiling"
STEP, SEQUENCE, BF16 = "step", "unscale, clip, step", "the same, bf16"
STEP_BYTES = 28
"""Of an fp32 element: read parameter, gradient and two moments, and write all but the gradient."""

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
class Contender:
    """`prepare` makes the gradients anew, outside the time; `run` is what is timed."""

    who: str
    prepare: Callable[[], object]
    run: Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One contender in one case; seconds a step."""

    case: str
    tensors: int
    who: str
    timing: timing.Timing


class Model:
    """Parameters with gradients, and what the gradients are made from."""

    def __init__(self, config: AdamBench, tensors: int, dtype: torch.dtype) -> None:
        sizes = [config.parameters // tensors] * tensors
        make = torch.Generator(config.device).manual_seed(0)
        self.params = [nn.Parameter(torch.randn(n, generator=make, device=config.device).to(dtype)) for n in sizes]
        self.fresh = [torch.randn(n, generator=make, device=config.device).to(dtype) for n in sizes]
        for param in self.params:
            param.grad = torch.empty_like(param)
        self.make_gradients()
        self.scaler = torch.amp.GradScaler(config.device, init_scale=2.0, growth_interval=10**6)
        self.scaler.scale(torch.ones((), device=config.device))

    @property
    def grads(self) -> list[Tensor]:
        return [param.grad for param in self.params if param.grad is not None]

    def make_gradients(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.grads, self.fresh)


def steps(config: AdamBench, tensors: int) -> list[Contender]:
    """A step alone, fp32."""
    model = Model(config, tensors, torch.float32)
    made = {
        "pycoll": FusedAdam(model.params),
        TORCH: torch.optim.AdamW(model.params, fused=True),
        "torch foreach": torch.optim.AdamW(model.params, foreach=True),
    }
    found = [Contender(who, model.make_gradients, optimizer.step) for who, optimizer in made.items()]
    if config.device == "cpu":
        a, b, c = ([torch.zeros_like(param) for param in model.params] for _ in range(3))
        return [*found, Contender(CEILING, model.make_gradients, lambda: _C.ceiling_adam(a, model.grads, b, c))]
    size = STEP_BYTES // 2 * config.parameters
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return [*found, Contender(CEILING, model.make_gradients, lambda: target.copy_(source))]


def sequences(config: AdamBench, tensors: int) -> list[Contender]:
    """All that a trainer with a GradScaler does after the backward pass, fp32."""
    model = Model(config, tensors, torch.float32)
    ours, theirs = FusedAdam(model.params), torch.optim.AdamW(model.params, fused=True)

    def run_theirs() -> None:
        model.scaler.unscale_(theirs)
        nn.utils.clip_grad_norm_(model.params, 1.0)
        model.scaler.step(theirs)
        model.scaler.update()

    return [
        Contender("pycoll", model.make_gradients, lambda: _fused_sequence(model, ours)),
        Contender(TORCH, model.make_gradients, run_theirs),
    ]


def mixed_sequences(config: AdamBench, tensors: int) -> list[Contender]:
    """The same with bf16 parameters and fp32 masters, which torch's user keeps."""
    model = Model(config, tensors, torch.bfloat16)
    ours = FusedAdam(model.params)
    masters = [nn.Parameter(param.detach().float()) for param in model.params]
    for master in masters:
        master.grad = torch.zeros_like(master)
    theirs = torch.optim.AdamW(masters, fused=True)

    def run_theirs() -> None:
        with torch.no_grad():
            torch._foreach_copy_([master.grad for master in masters if master.grad is not None], model.grads)
            model.scaler.unscale_(theirs)
            nn.utils.clip_grad_norm_(masters, 1.0)
            model.scaler.step(theirs)
            torch._foreach_copy_([*model.params], [*masters])
        model.scaler.update()

    return [
        Contender("pycoll", model.make_gradients, lambda: _fused_sequence(model, ours)),
        Contender(TORCH, model.make_gradients, run_theirs),
    ]


def _fused_sequence(model: Model, optimizer: FusedAdam) -> None:
    optimizer.clip_grad_norm(1.0, scaler=model.scaler)
    model.scaler.step(optimizer)
    model.scaler.update()


BARS = ((STEP, TORCH, 1.0), (STEP, CEILING, 0.9), (SEQUENCE, TORCH, 1.5), (BF16, TORCH, 2.2))
"""Case, whom FusedAdam is compared with, and how many times as fast it must be."""

CASES: dict[str, Callable[[AdamBench, int], list[Contender]]] = {
    STEP: steps,
    SEQUENCE: sequences,
    BF16: mixed_sequences,
}


def seconds_of(contender: Contender, device: str) -> float:
    """One sample."""
    contender.prepare()
    if device == "cpu":
        begin = time.perf_counter()
        contender.run()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    contender.run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


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
    checked = []
    for tensors in (1, 200):
        for case, rival, factor in BARS:
            own, other = medians.get((case, tensors, "pycoll")), medians.get((case, tensors, rival))
            name, bar = f"{case}, {tensors} tensors", f"at least {factor:g} x {rival}"
            if own is None or other is None:
                checked.append(bars.Bar(name, bar, "not measured", None))
            else:
                checked.append(bars.Bar(name, bar, f"{other / own:.3g} x", other / own >= factor))
    return checked


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
                found = measure(make(config, tensors), config.device, _QUICK if config.quick else _DEFAULT)
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
