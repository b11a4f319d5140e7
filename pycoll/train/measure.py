"""What a rank's steps have really taken, beside what was planned: calls, their bytes and their time, and memory."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.filesize import decimal

from pycoll.buckets import GradientBuckets
from pycoll.communicator import Communicator
from pycoll.trace import group_trace
from pycoll.train.device import CPU
from pycoll.train.mesh import Mesh
from pycoll.train.plan import RankPlan
from pycoll.train.task import Rows

Totals = Counter[tuple[str, str]]
"""(call, "calls" or "bytes" or "ns") -> how many, as totals in traces count them (pycoll.trace.dump)."""


class Meter:
    """Of this process. Made before the model is, it knows what memory was taken before."""

    def __init__(self, device: torch.device = CPU) -> None:
        """`device`: where the rank computes."""
        self.steps = 0
        """How many were measured: all of this process but the first, which also measures the norm by its own calls."""
        self.seconds = 0.0
        """In these."""
        self.totals: Totals = Counter()
        """Of these, without what lay between them; complete after `pause`."""
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._base, self._peak = resident("VmRSS"), 0
        self._gpu_peak: tuple[int, int, int] | None = None
        self._communicators: list[Communicator] = []
        self._traces: list[Callable[[], dict[str, Any]]] = []
        self._before: Totals | None = None
        self._is_warm = False

    def watch(self, buckets: GradientBuckets | None, mesh: Mesh) -> None:
        """Whose calls count: those of the buckets' communicators, and of the mesh's groups where they are pycoll's."""
        if buckets is not None:
            self._communicators = [buckets.communicator, *([buckets.parts.communicator] if buckets.parts else [])]
            self._traces += [communicator.trace for communicator in self._communicators]
        if dist.get_backend() == "pycoll":
            groups = (dist.group.WORLD, mesh.dp_group, mesh.tp_group, mesh.pp_group)
            self._traces += [partial(group_trace, group) for group in groups]

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step happens within it."""
        if self._is_warm and self._before is None:
            self._before = self._read()
        began = time.monotonic()
        yield
        if self._is_warm:
            self.steps += 1
            self.seconds += time.monotonic() - began
        self._is_warm = True

    def pause(self) -> None:
        """What this rank calls from now on, until the next step, does not count; nor does the memory that it needs."""
        if self._before is not None:
            self._peak = self._peak or resident("VmHWM")
            self._gpu_peak = self._gpu_peak or self._on_gpu()
            self.totals.update(self._read() - self._before)
            self._before = None

    def rows(self, plan: RankPlan | None) -> Rows:
        """For the summary; `plan` is this rank's, None where there is none."""
        self.pause()
        rows: Rows = {}
        if self.totals:
            share = sum(n for (_, name), n in self.totals.items() if name == "ns") / 1e9 / self.seconds
            shown = f"{share:.1%} of rank 0's steps, waiting included; some of it is hidden behind computing"
            rows["time in communication"] = (shown, share)
            planned = plan.totals() if plan and self._device == CPU else {}  # on GPUs buckets make other calls
            for i, (name, show) in enumerate((("calls", "{:,.5g}".format), ("bytes", _in_bytes))):
                found = {call: n / self.steps for (call, what), n in sorted(self.totals.items()) if what == name}
                rows[f"{name} a step"] = _row(found, show)
                if planned:
                    expected = {call: planned[call][i] for call in sorted(planned)}
                    shown, values = _row(expected, show)
                    rows[f"planned {name} a step"] = ("the same" if expected == found else shown, values)
        peak = self._peak or resident("VmHWM")
        rows["memory"] = (f"{_in_bytes(peak)} at rank 0's peak, {_in_bytes(self._base)} of it before the model", peak)
        if (there := self._gpu_peak or self._on_gpu()) is not None:
            used, held, heaps = map(_in_bytes, there)
            shown = f"{used} of torch's allocator at rank 0's peak, which held {held}; {heaps} of pycoll's heaps"
            rows["GPU memory"] = (shown, there[0] + there[2])
        if plan and self._device == CPU:
            needed = plan.total_memory
            rows["planned memory"] = (f"{_in_bytes(needed)}, and what was there before the model", needed)
        return rows

    def _on_gpu(self) -> tuple[int, int, int] | None:
        """Bytes from torch's allocator at their peak, what it held for that, and what the buckets' communicators have
        given; None where there is none."""
        if self._device.type != "cuda":
            return None
        heaps = sum(communicator.device_footprint() for communicator in self._communicators)
        peak, held = torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)
        return peak, held, heaps

    def _read(self) -> Totals:
        totals: Totals = Counter()
        seen: set[str] = set()
        for take in self._traces:
            trace = take()
            if trace["communicator"] in seen:  # a group of all ranks may be the default one
                continue
            seen.add(trace["communicator"])
            for call, numbers in trace["ranks"][trace["rank"]]["totals"].items():
                totals.update({(call, name): value for name, value in numbers.items()})
        return totals


def resident(which: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of this process in memory, now or at their peak; what is shared with other ranks counts where it has been
    touched. (getrusage's peak may be that of the process that started this one.)"""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(which))


def _row(numbers: Mapping[str, float], show: Callable[[float], str]) -> tuple[str, dict[str, float]]:
    return ", ".join(f"{call} {show(n)}" for call, n in numbers.items()), dict(numbers)


def _in_bytes(size: float) -> str:
    return decimal(round(size))
