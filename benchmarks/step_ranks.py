"""A rank of `pycoll bench step`: every contender in one process. Argument: a file to meet."""

from __future__ import annotations

import gc
import mmap
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pycoll
from pycoll import _C

from . import memory, ranks, step_models
from .step_models import Refused, Trainer
from .torch_ranks import facts, serve

PARTS = ("backward", "clip", "update", "zero_grad")
"""Of a step, in order, as Trainer has them."""
SHARDED = {dtype: f"ShardedAdam, {dtype} wire" for dtype in ("float32", "bfloat16", "int8")}
FUSED = "DataParallel, FusedAdam"
PYCOLL_DDP, GLOO_DDP = "DDP over pycoll, torch fused", "DDP over Gloo, torch fused"
COPIES = "; gradients copied"
"""What is added to DDP's name where gradient_as_bucket_view is at its default, False."""
ZERO, DEEPSPEED = "DDP over Gloo, ZeRO of torch fused", "DDP over Gloo, DeepSpeed CPUAdam"
ALONE, CEILING, PACKED_CEILING = "backward alone", "ceiling", "ceiling, with packing"
_HEAD = 512  # elements at each end of a tensor that are checked

Make = Callable[[list[Tensor]], Trainer]


class Workload:
    """The gradients of this rank: the memory that backward passes give out, and what it holds before each."""

    def __init__(self, parameters: int, tensors: int, dtype: torch.dtype, rank: int, gloo: dist.ProcessGroup) -> None:
        make = torch.Generator().manual_seed(1 + rank)
        some = step_models.sizes(parameters, tensors)
        self._fresh = [torch.randn(n, generator=make).to(dtype) for n in some]
        self.grads = [torch.empty(n, dtype=dtype) for n in some]
        self._heads: list[tuple[Tensor, Tensor]] = []  # of the ranks' average, and of the same from behind
        squares = 0.0
        for fresh in self._fresh:
            average = fresh.to(torch.float32, copy=True)
            dist.all_reduce(average, group=gloo)
            average /= dist.get_world_size(gloo)
            squares += float(average.double().square_().sum())
            self._heads.append((average[:_HEAD].clone(), average.flip(0)[:_HEAD].clone()))
        self._factor = min(1.0, step_models.MAX_NORM / (squares**0.5 + 1e-6))

    @torch.no_grad()
    def restore(self, behind: bool = False) -> None:
        """Writes all gradients, from behind or not."""
        torch._foreach_copy_(self.grads, [fresh.flip(0) for fresh in self._fresh] if behind else self._fresh)

    def distance(self, trainer: Trainer) -> float | None:
        """How far parameters are after three steps from exact ones, in learning rates, on average; None: has none.

        torch's AdamW computes both ends of each tensor in fp32, from the ranks' average.
        """
        if trainer.model is None or trainer.update is step_models.nothing:
            return None
        params = [nn.Parameter(param.detach()[:_HEAD].float().clone()) for param in trainer.model.weights]
        exact = torch.optim.AdamW(params, **step_models.settings(self.grads))
        for turn in range(3):
            self.restore(behind=turn == 1)
            for _ in steps_of(trainer):
                pass
            for param, heads in zip(params, self._heads, strict=True):
                param.grad = heads[turn % 2] * self._factor
            exact.step()
        gaps = [
            (param.detach()[:_HEAD].float() - wanted.detach()).abs()
            for param, wanted in zip(trainer.model.weights, params, strict=True)
        ]
        return float(torch.cat(gaps).mean()) / step_models.LR


def steps_of(trainer: Trainer, sync: Callable[[], object] = step_models.nothing) -> Iterator[float]:
    """One step; the seconds that each of PARTS takes, from when `sync` returns."""
    loss = trainer.forward()
    sync()
    start = time.perf_counter()
    for part in PARTS:
        trainer.backward(loss) if part == "backward" else getattr(trainer, part)()
        end = time.perf_counter()
        yield end - start
        start = end


@dataclass
class StepRank:
    """Serves the driver of a benchmark as ranks.Rank does, with steps whose gradients are made anew before each.

    Attributes:
        rank: of this process.
        workload: from (parameters, dtype).
        contenders: how to make each from gradients.
        sync: returns on all ranks at about the same time.
        state_bytes, parts, distance: found so far, by contender: of moments and masters; median seconds of each part;
            see Workload.distance.
    """

    rank: int
    workload: Callable[[int, str], Workload]
    contenders: Mapping[str, Make]
    sync: Callable[[], object]
    state_bytes: dict[str, int] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    distance: dict[str, float | None] = field(default_factory=dict)

    def serve(self) -> None:
        """Executes orders until the driver says so, or is gone."""
        self._prepared: dict[ranks.Key, tuple[Trainer, Workload, list[list[float]]]] = {}
        orders: dict[str, Callable[..., object]] = {
            "contenders": lambda: [(name, "default", "private", "step") for name in self.contenders],
            "facts": self._facts,
            "prepare": self._prepare,
            "check": self._check,
            "time": self._time,
            "release": self._release,
        }
        ranks.serve(self.rank, orders)

    def _facts(self) -> dict[str, Any]:
        found = {"state_bytes": self.state_bytes, "parts": self.parts, "distance": self.distance}
        return {**facts(), **found}

    def _prepare(self, key: ranks.Key, count: int, dtype: str) -> str | None:
        workload = self.workload(count, dtype)
        try:
            self._prepared[key] = self.contenders[key[0]](workload.grads), workload, []
        except Refused as reason:
            return str(reason)
        return None

    def _check(self, key: ranks.Key) -> None:
        trainer, workload, _ = self._prepared[key]
        self.distance[key[0]] = workload.distance(trainer)
        self.state_bytes[key[0]] = trainer.state_bytes()

    def _time(self, key: ranks.Key, calls: int) -> float:
        trainer, workload, parts = self._prepared[key]
        for _ in range(calls):
            workload.restore()
            gc.disable()
            parts.append(list(steps_of(trainer, self.sync)))
            gc.enable()
        return sum(map(sum, parts[-calls:]))

    def _release(self, key: ranks.Key) -> None:
        _, _, parts = self._prepared.pop(key, (None, None, []))
        if parts:
            medians = [statistics.median(seconds) for seconds in zip(*parts, strict=True)]
            self.parts[key[0]] = dict(zip(PARTS, medians, strict=True))


class Ceiling:
    """The reads and writes of a step of ShardedAdam in fp32 with clipping, without arithmetic or waiting for anybody.

    A rank reads its shard of all ranks' gradients for the norm. For the update it reads that again, and its shard of
    the parameters and of two moments, and writes the moments and the parameters of all ranks. Nothing is read twice
    from cache, so the parts may come one after the other: `ceiling_adam` for what is this rank's, sums of products
    (the fastest way to read that torch has) for the peers' gradients, memset for their parameters. `packs`: before
    it, the gradients are copied into memory that the peers reach, which the backward pass did not know of.
    """

    def __init__(self, maps: list[mmap.mmap], rank: int, count: int, packs: bool) -> None:
        share = slice(count * rank // len(maps), count * (rank + 1) // len(maps))
        nbytes = 4 * count
        whole = [
            [torch.frombuffer(m, dtype=torch.float32, count=count, offset=memory.SLOT_BYTES + place) for m in maps]
            for place in (0, nbytes)
        ]
        self._wire = whole[0][rank]
        self._grads, self._params = ([tensor[share] for tensor in tensors] for tensors in whole)
        own = self._grads[rank], self._params[rank]
        self._own = [own[1]], [own[0]], [torch.zeros_like(own[0])], [torch.zeros_like(own[0])]
        self._peers = [r for r in range(len(maps)) if r != rank]
        self._packs = packs

    def trainer(self, grads: list[Tensor]) -> Trainer:
        places = self._wire.split([len(grad) for grad in grads])
        pack = partial(_C.ceiling_packing, list(places), grads)
        return Trainer(
            None,
            step_models.nothing,
            backward=(lambda _: pack()) if self._packs else (lambda _: None),
            clip=lambda: [_read(grad) for grad in self._grads],
            update=self._update,
            state=lambda: [*self._own[2], *self._own[3]],
        )

    def _update(self) -> None:
        _C.ceiling_adam(*self._own)
        for peer in self._peers:
            _read(self._grads[peer])
            self._params[peer].zero_()


def _read(x: Tensor) -> Tensor:
    half = len(x) // 2
    return torch.dot(x[:half], x[half : 2 * half])


def _ceiling(rank: int, packs: bool, grads: list[Tensor]) -> Trainer:
    if grads[0].dtype != torch.float32:
        raise Refused("there is one of float32 alone")
    return Ceiling(memory.attach(), rank, sum(map(len, grads)), packs).trainer(grads)


def contenders(rank: int, gloo: dist.ProcessGroup) -> dict[str, Make]:
    """Who takes part; the default group is pycoll's."""
    ddp, fused = step_models.ddp, step_models.torch_fused
    return {
        **{name: partial(step_models.sharded, getattr(torch, wire)) for wire, name in SHARDED.items()},
        FUSED: step_models.fused,
        PYCOLL_DDP: partial(ddp, None, fused),
        PYCOLL_DDP + COPIES: partial(ddp, None, fused, views=False),
        f"{PYCOLL_DDP}; torch's bf16 hook": partial(ddp, None, fused, hook=step_models.bf16_hook(None)),
        f"{PYCOLL_DDP}; pycoll's bf16 hook": partial(ddp, None, fused, hook=step_models.pycoll_bf16_hook),
        GLOO_DDP: partial(ddp, gloo, fused),
        GLOO_DDP + COPIES: partial(ddp, gloo, fused, views=False),
        ZERO: partial(ddp, gloo, step_models.zero(gloo)),
        DEEPSPEED: partial(ddp, gloo, step_models.deepspeed),
        ALONE: step_models.backward_alone,
        CEILING: partial(_ceiling, rank, False),
        PACKED_CEILING: partial(_ceiling, rank, True),
    }


def step_rank(tensors: int, store: dist.Store, rank: int, world_size: int) -> StepRank:
    """All contenders, in steps of a model of so many tensors."""
    dist.init_process_group("pycoll", store=store, rank=rank, world_size=world_size)
    gloo = dist.new_group(backend="gloo")

    @lru_cache
    def workload(parameters: int, dtype: str) -> Workload:
        return Workload(parameters, tensors, getattr(torch, dtype), rank, gloo)

    return StepRank(rank, workload, contenders(rank, gloo), pycoll.Communicator.from_group().barrier)


if __name__ == "__main__":
    serve(partial(step_rank, int(sys.argv[1])))
