"""A rank of pycoll or of Gloo, the contenders that run in torch processes. Arguments: which, and a file to meet."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

import pycoll
from pycoll import _C
from pycoll.collectives import Algorithm

from . import ranks, values

ALGORITHMS: tuple[Algorithm, ...] = ("auto", "ring", "tree", "one_shot", "two_shot")

Allocate = Callable[[int, str], Tensor]  # (elements, dtype) -> tensor


def buffer_of(x: Tensor) -> values.Buffer:
    """The memory of `x` as NumPy sees it."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def shared(allocate: Allocate) -> Allocate:
    """`allocate`, but contenders that are prepared at the same time get the same tensor: memory for one is enough."""
    alive: WeakValueDictionary[tuple[int, str], Tensor] = WeakValueDictionary()

    def get(count: int, dtype: str) -> Tensor:
        x = alive.get((count, dtype))
        if x is None:
            x = alive[count, dtype] = allocate(count, dtype)
        return x

    return get


@shared
def private(count: int, dtype: str) -> Tensor:
    """A tensor as users have them: from torch's allocator."""
    return torch.empty(count, dtype=getattr(torch, dtype))


def _factory(allocate: Allocate, call: Callable[[Tensor], object]) -> ranks.Factory:
    def make(count: int, dtype: str) -> ranks.Operation:
        x = allocate(count, dtype)
        return ranks.Operation(partial(call, x), buffer_of(x))

    return make


def _cpu_backend() -> Any:
    """The backend of the default group."""
    return dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))


def gloo_rank(store: dist.Store, rank: int, world_size: int) -> ranks.Rank:
    """Gloo at its defaults: `torch.distributed.all_reduce` on private tensors."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)

    def facts() -> dict[str, Any]:
        threads = _cpu_backend().options._threads
        return {"torch": torch.__version__, "Gloo's threads": threads, "torch's threads": torch.get_num_threads()}

    contenders = {("Gloo", "default", "private", "torch.distributed"): _factory(private, dist.all_reduce)}
    return ranks.Rank(rank, world_size, contenders, dist.barrier, facts)


def pycoll_rank(store: dist.Store, rank: int, world_size: int) -> ranks.Rank:
    """pycoll: each algorithm on private and symmetric tensors, natively; `auto` through torch.distributed."""
    comm = pycoll.Communicator(store, rank, world_size)
    footprint = comm.footprint()
    dist.init_process_group("pycoll", store=store, rank=rank, world_size=world_size)

    @shared
    def symmetric(count: int, dtype: str) -> Tensor:
        return comm.empty(count, getattr(torch, dtype))

    contenders: dict[ranks.Key, ranks.Factory] = {}
    for memory, allocate in (("private", private), ("symmetric", symmetric)):
        for algorithm in ALGORITHMS:
            call = comm.all_reduce if algorithm == "auto" else partial(comm.all_reduce, algorithm=algorithm)
            contenders["pycoll", algorithm, memory, "native"] = _factory(allocate, call)
    contenders["pycoll", "auto", "private", "torch.distributed"] = _factory(private, dist.all_reduce)
    return ranks.Rank(rank, world_size, contenders, comm.barrier, lambda: {**pycoll.info(), "footprint": footprint})


def facts() -> dict[str, Any]:
    """Of a rank that has no more to say."""
    return {"torch": torch.__version__, "simd": _C.simd, "threads": torch.get_num_threads()}


class Serves(Protocol):
    """A rank, of whatever kind."""

    def serve(self) -> None: ...


def serve(make: Callable[[dist.Store, int, int], Serves]) -> None:
    """Runs the rank that the environment describes; the store is the file named on the command line."""
    rank, world_size = int(os.environ[ranks.RANK_VARIABLE]), int(os.environ[ranks.WORLD_VARIABLE])
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    make(dist.FileStore(sys.argv[-1], world_size), rank, world_size).serve()


if __name__ == "__main__":
    serve({"pycoll": pycoll_rank, "gloo": gloo_rank}[sys.argv[1]])
