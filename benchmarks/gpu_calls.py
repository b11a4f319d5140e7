"""Calls on a GPU, one by one or captured in a CUDA graph, and a rank that times them for its driver."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

import pycoll

from . import ranks, tensors
from .torch_ranks import Allocate

EAGER, GRAPH = "eager", "graph"
_GRAPH_CALLS, _GRAPH_BYTES = 20, 1 << 26  # of one graph, at most

Call = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """How to make a tensor x, and a call that reduces it: into the tensor that it returns, or else into x."""

    allocate: Allocate
    bind: Callable[[Tensor], Call]
    reduces: bool = True  # the copy does not


@dataclass(frozen=True)
class Work:
    """A contender that is ready at one size."""

    x: Tensor
    run: Call
    calls: int  # that one run makes
    once: Callable[[], Tensor]  # makes one call; where its result is


def eager(x: Tensor, call: Call) -> Work:
    """Calls one by one, as Python makes them."""
    return Work(x, call, 1, lambda: _result(call(), x))


def graph(x: Tensor, call: Call) -> Work:
    """Calls that were captured in a CUDA graph, so that a run of them costs Python one launch."""
    calls = max(1, min(_GRAPH_CALLS, _GRAPH_BYTES // max(1, x.nbytes)))
    one, result = _capture(x, call, 1)
    many, _ = _capture(x, call, calls)

    def once() -> Tensor:
        one.replay()
        return result

    return Work(x, many.replay, calls, once)


def _capture(x: Tensor, call: Call, calls: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    found = torch.cuda.CUDAGraph()
    returned: object = None
    # Only of this thread: NCCL's own may touch the GPU meanwhile.
    with torch.cuda.graph(found, capture_error_mode="thread_local"):
        for _ in repeat(None, calls):
            returned = call()
    return found, _result(returned, x)


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _result(returned: object, x: Tensor) -> Tensor:
    return returned if isinstance(returned, Tensor) else x


MODES: Mapping[str, Callable[[Tensor, Call], Work]] = {EAGER: eager, GRAPH: graph}


def stopwatch(work: Call) -> float:
    """Seconds from the start to the end of `work` on the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@dataclass
class GpuRank:
    """A rank that serves its driver: see ranks.py for the orders.

    Attributes:
        rank, world_size: of this process.
        contenders: by key, whose last word is one of MODES.
        facts: versions and settings, for the record.
        watch: what times a piece of work.
    """

    rank: int
    world_size: int
    contenders: Mapping[ranks.Key, Contender]
    facts: Callable[[], dict[str, Any]]
    watch: Callable[[Call], float] = stopwatch
    _prepared: dict[ranks.Key, Work] = field(default_factory=dict)

    def serve(self) -> None:
        """Executes orders until the driver says so, or is gone."""
        orders: dict[str, Callable[..., object]] = {
            "contenders": lambda: list(self.contenders),
            "facts": self.facts,
            "prepare": self._prepare,
            "check": self._check,
            "time": self._time,
            "release": self._release,
        }
        ranks.serve(self.rank, orders)

    def _prepare(self, key: ranks.Key, count: int, dtype: str) -> str | None:
        """What fails here fails before any rank waits for another, so it costs this contender alone its place."""
        contender = self.contenders[key]
        try:
            x = contender.allocate(count, dtype)
            self._prepared[key] = MODES[key[-1]](x, contender.bind(x))
        except Exception as error:
            return _in_a_line(error)
        return None

    def _check(self, key: ranks.Key) -> float | str | None:
        work = self._prepared[key]
        tensors.load_pattern(work.x, self.rank)
        try:
            result = work.once()
        except (pycoll.UnsupportedError, pycoll.UsageError) as error:  # on all ranks, which can go on
            return _in_a_line(error)
        return tensors.sum_error(result, self.world_size) if self.contenders[key].reduces else None

    def _time(self, key: ranks.Key, calls: int) -> float:
        """The calls that warm up also make the ranks' GPUs begin together: none ends them before all have come."""
        work = self._prepared[key]
        work.x.fill_(1)
        runs = math.ceil(calls / work.calls)
        for _ in repeat(None, 1 + runs // 10):
            work.run()

        def all_runs() -> None:
            for _ in repeat(None, runs):
                work.run()

        return self.watch(all_runs) * calls / (runs * work.calls)

    def _release(self, key: ranks.Key) -> None:
        self._prepared.pop(key, None)
        if not self._prepared and torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next size cannot use the blocks of this one
