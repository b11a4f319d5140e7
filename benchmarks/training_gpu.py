"""A step of training GPT-2 on one GPU: pycoll's way beside nanoGPT's, all compiled, in turns in one process.

`pycoll bench training --device cuda`. GPT-2 has its 124 million weights, in a vocabulary that is padded to 50304 tokens
as nanoGPT's is (Karpathy, 2022: github.com/karpathy/nanoGPT). `training_ways` says who takes part.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from pycoll._build import build_info
from pycoll.models import PRESETS, count_parameters, model_flops_utilization, peak_of, training_flops_per_token

from . import bars, machine, report, timing
from .training_ways import NANO, OURS, STEPS, WAYS, Contender, Setting

BAR = 1.1
"""Times as fast as nanoGPT's step pycoll's must be."""
GAP = 0.1
"""What rounding to 16 bits explains of a loss after STEPS steps: a share of what nanoGPT's has learned in them."""
CALLS = 3
"""Steps of a sample."""
LARGEST_BATCH = 16
_GB = 10**9
_FIXED, _PER_SEQUENCE = 10 * _GB, 1.5 * _GB  # memory of all contenders' weights and state, and of a sequence's step
_EFFORT = timing.Effort(seconds=5.0, min_rounds=7, max_rounds=40)
_QUICK = timing.Effort(seconds=1.0, min_rounds=3, max_rounds=10)


@dataclass
class GpuTrainingBench:
    """Times steps of training GPT-2 on a GPU."""

    output: Path = Path("bench-results")
    """Folder for the JSON file."""
    seconds: float = 600.0
    """After so long no further contender is compiled."""
    quick: bool = False
    """Fewer samples."""
    check: bool = False
    """Fail if the bar is missed or could not be measured."""


def find_setting() -> Setting:
    """Of this machine's current GPU: as many sequences of 1024 tokens as fit, of 16 at most.

    Raises:
        ValueError: there is no GPU, or pycoll was built for none.
    """
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA GPU")
    cuda = build_info()["cuda"]
    if not cuda["built"]:
        raise ValueError(f"pycoll was built without CUDA: {cuda['reason']}")
    batch = fitting_batch(torch.cuda.mem_get_info()[0])
    device = torch.device("cuda", torch.cuda.current_device())
    return Setting(device, torch.cuda.get_device_name(), replace(PRESETS["gpt2"], vocab_size=50304), batch)


def fitting_batch(free_bytes: int) -> int:
    """Sequences: a power of two. Raises ValueError where not even one fits."""
    batch = LARGEST_BATCH
    while batch and _FIXED + batch * _PER_SEQUENCE > free_bytes:
        batch //= 2
    if not batch:
        raise ValueError(f"{free_bytes / _GB:.1f} GB of the GPU's memory are free: a step takes 12 or more")
    return batch


@dataclass
class Found(report.Report):
    """What a run has found: a row for each contender, and beside it its last loss."""

    peak: float = 0.0
    """FLOP/s of the processor."""
    peak_named: str = ""
    """Whose figure that is."""
    flops_per_token: int = 0
    tokens: int = 0
    """Of a step."""
    losses: dict[str, float] = field(default_factory=dict)

    def seconds(self, who: str) -> float | None:
        """Of a step; None: not measured."""
        return next((row.timing.median for row in self.select(who=who)), None)

    def mfu(self, row: report.Row) -> float:
        """As PaLM counts it."""
        return model_flops_utilization(self.tokens / row.timing.median, self.flops_per_token, self.peak)

    def formula(self) -> str:
        """Of the MFU."""
        return f"MFU: tokens/s x {self.flops_per_token:,} FLOP a token (6 N + 12 L H Q T) / {self.peak_named}"

    def to_json(self) -> str:
        content = asdict(self)
        for row, values in zip(self.rows, content["rows"], strict=True):
            values |= {"tokens_per_s": self.tokens / row.timing.median, "mfu": self.mfu(row)}
            values |= {"loss": self.losses[row.who], "x_nanogpt": times(self, row.who)}
        return json.dumps({**content, "mfu": self.formula()}, indent=1)


def times(found: Found, who: str) -> float | None:
    """nanoGPT's time divided by this contender's: above 1 is faster."""
    own, rival = found.seconds(who), found.seconds(NANO)
    return None if own is None or rival is None else rival / own


def measure(config: GpuTrainingBench, setting: Setting, keep: Callable[[Found], object]) -> Found:
    """Runs everything. `keep` is given what has been found so far, after each contender: the next may take too long."""
    peak, named = peak_of(setting.device, torch.bfloat16)
    about = {**machine.describe(), "gpu": setting.processor}
    flops = training_flops_per_token(setting.model)
    found = Found("training", 1, "bfloat16", about, peak=peak, peak_named=named, flops_per_token=flops)
    found.tokens = setting.tokens
    found.facts["torch"] = {"version": torch.__version__, "cuda": torch.version.cuda}
    deadline, ready = time.monotonic() + config.seconds, dict[str, Contender]()
    with _alone():
        for who, way in WAYS.items():
            if time.monotonic() > deadline:
                found.left_out.append(f"{who}: {config.seconds:.0f} s were over before")
                continue
            try:
                ready[who] = Contender(setting, way)
            except Exception as error:  # whatever it was, the others go on
                found.failures.append(f"{who}: {type(error).__name__}: {error}"[:500])
                continue
            found.losses[who] = ready[who].losses[-1]
            samples = _contest(ready, setting.device, _QUICK if config.quick else _EFFORT)
            found.rows = [_row(setting, who, seconds) for who, seconds in samples.items()]
            found.failures += _wrong(ready, who)
            keep(found)
    return found


def _row(setting: Setting, who: str, seconds: list[float]) -> report.Row:
    call = f"data {setting.batch} x {setting.model.context}"
    return report.Row(
        4 * count_parameters(setting.model), who, "gpt2", "private", call, timing.summarize(seconds, CALLS), None
    )


def _wrong(ready: Mapping[str, Contender], who: str) -> list[str]:
    """Whether it learns something else than nanoGPT's does."""
    own, rival = ready[who].losses, (ready.get(NANO) or ready[who]).losses
    if rival[0] - rival[-1] > 0 and abs(own[-1] - rival[-1]) <= GAP * (rival[0] - rival[-1]):
        return []
    return [f"{who}: wrong loss {own[-1]:.4f} after {STEPS} steps, from {own[0]:.4f}; nanoGPT's has {rival[-1]:.4f}"]


@contextmanager
def _alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("pycoll", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _contest(ready: Mapping[str, Contender], device: torch.device, effort: timing.Effort) -> dict[str, list[float]]:
    """Seconds of a step, in turns: every round takes a sample of each, in rotating order."""
    samples: dict[str, list[float]] = {who: [] for who in ready}
    began, rounds, names = time.monotonic(), 0, list(ready)
    while not effort.enough(rounds, time.monotonic() - began):
        for place in range(len(names)):
            who = names[(rounds + place) % len(names)]
            samples[who].append(_sample(ready[who], device))
        rounds += 1
    return samples


def _sample(contender: Contender, device: torch.device) -> float:
    contender.step()  # what others have left in caches goes
    _wait(device)
    began = time.perf_counter()
    for _ in range(CALLS):
        contender.step()
    _wait(device)
    return (time.perf_counter() - began) / CALLS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bars_of(found: report.Report) -> list[bars.Bar]:
    """What pycoll's step must reach."""
    assert isinstance(found, Found)
    return [bars.ratio(OURS, found.seconds(OURS), "nanoGPT's step", found.seconds(NANO), BAR)]


def table(found: Found) -> Table:
    """A line a contender, fastest first."""
    shown = Table(title=f"a step of GPT-2, {found.tokens:,} tokens, on {found.machine['gpu']}", box=box.SIMPLE)
    shown.add_column("who", no_wrap=True)
    for name in ("time ms", "tokens/s", "MFU", "x nanoGPT's", f"loss after {STEPS} steps"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in found.select():
        ratio = times(found, row.who)
        shown.add_row(
            row.who,
            f"{row.timing.median * 1e3:.2f}",
            f"{found.tokens / row.timing.median:,.0f}",
            f"{found.mfu(row):.1%}",
            "" if ratio is None else report.format_ratio(ratio),
            f"{found.losses[row.who]:.4f}",
        )
    shown.caption = "\n".join([found.formula(), *(f"Left out: {line}" for line in found.left_out)])
    return shown


def main(config: GpuTrainingBench) -> int:
    """Runs the benchmark; prints the table and the bar, writes JSON.

    Returns:
        The exit code: 1 where a contender failed or, with --check, the bar was missed, 2 where there is no GPU.
    """
    path = config.output / "training-gpu.json"

    def keep(found: Found) -> None:
        report.write(path, found.to_json())

    try:
        found = measure(config, find_setting(), keep)
    except ValueError as error:
        Console(stderr=True).print(f"pycoll bench training: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    keep(found)
    console = Console()
    console.width = max(console.width, 120)  # of a pipe it would be 80
    console.print(table(found))
    console.print(bars.table(bars_of(found), "what a step on a GPU must reach"))
    console.print(f"wrote {path}", markup=False)
    for failure in found.failures:
        console.print(f"FAILED {failure}", style="red", markup=False)
    missed = config.check and not all(bar.passed for bar in bars_of(found))
    return int(bool(found.failures) or missed)
