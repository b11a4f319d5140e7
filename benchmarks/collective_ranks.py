"""A rank of pycoll, Gloo or the machine's ceiling, for every collective. Arguments: which, and a file to meet.

The size of a collective is that of the larger of a rank's input and output (of the root's, where there is one): as in
NCCL's tests. A contender's `algorithm` is the collective's name. The ceilings are copies: of all ranks at once, each of
its own memory ("memcpy"), and from one rank's memory to another's through a buffer that stays in the cache, both at
work on it at the same time without waiting for one another ("pipelined memcpy").
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

import pycoll
from pycoll import _C, Communicator

from . import ranks
from .memory import attach
from .torch_ranks import Allocate, buffer_of, private, serve, shared

COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "gather",
    "reduce_scatter",
    "scatter",
    "all_to_all",
    "send_recv",
    "barrier",
)
PIPE_BYTES = 512 * 2**10

Call = Callable[[], object]
Make = Callable[[Allocate, int, str], tuple[Call, Tensor]]  # -> the call, and a tensor that it writes or reads


def _whole(call: Callable[[Tensor], object]) -> Make:
    """A call on one tensor of the size."""

    def make(allocate: Allocate, count: int, dtype: str) -> tuple[Call, Tensor]:
        x = allocate(count, dtype)
        return partial(call, x), x

    return make


def _blocks(world_size: int, call: Callable[[Tensor, Tensor], object], other_is_block: bool = True) -> Make:
    """`call(whole, other)`: a tensor of the size, and one rank's block, or another tensor of the size."""

    def make(allocate: Allocate, count: int, dtype: str) -> tuple[Call, Tensor]:
        block = max(1, count // world_size)
        whole = allocate(block * world_size, dtype)
        # One more element, lest `allocate` give the same tensor twice.
        other = allocate(block, dtype) if other_is_block else allocate(block * world_size + 1, dtype)[:-1]
        other.fill_(1)  # memory that was never written is one page of zeros, which is in the cache
        return partial(call, whole, other), whole

    return make


def _ping_pong(
    rank: int, world_size: int, send: Callable[[Tensor, int], object], recv: Callable[[Tensor, int], object]
) -> Callable[[Tensor], None]:
    """One message a call between the ranks of each pair, to and fro by turns."""
    peer, turn = rank ^ 1, itertools.count(rank)

    def call(x: Tensor) -> None:
        if peer < world_size:
            (recv if next(turn) % 2 else send)(x, peer)

    return call


def through_torch(rank: int, world_size: int) -> dict[str, Make]:
    """torch.distributed's functions, as users call them, over the default group."""
    blocks = partial(_blocks, world_size)

    def list_on_root(whole: Tensor) -> list[Tensor] | None:
        return list(whole.chunk(world_size)) if rank == 0 else None

    return {
        "all_reduce": _whole(dist.all_reduce),
        "reduce": _whole(lambda x: dist.reduce(x, 0)),
        "broadcast": _whole(lambda x: dist.broadcast(x, 0)),
        "all_gather": blocks(dist.all_gather_into_tensor),
        "gather": blocks(lambda whole, block: dist.gather(block, list_on_root(whole), 0)),
        "reduce_scatter": blocks(lambda whole, block: dist.reduce_scatter_tensor(block, whole)),
        "scatter": blocks(lambda whole, block: dist.scatter(block, list_on_root(whole), 0)),
        "all_to_all": blocks(dist.all_to_all_single, other_is_block=False),
        "send_recv": _whole(_ping_pong(rank, world_size, dist.send, dist.recv)),
        "barrier": _whole(lambda x: dist.barrier()),
    }


def native(comm: Communicator) -> dict[str, Make]:
    """pycoll.Communicator's methods."""
    blocks = partial(_blocks, comm.world_size)
    root = comm.rank == 0
    return {
        "all_reduce": _whole(comm.all_reduce),
        "reduce": _whole(comm.reduce),
        "broadcast": _whole(comm.broadcast),
        "all_gather": blocks(lambda whole, block: comm.all_gather(block, out=whole)),
        "gather": blocks(lambda whole, block: comm.gather(block, out=whole if root else None)),
        "reduce_scatter": blocks(lambda whole, block: comm.reduce_scatter(whole, out=block)),
        "scatter": blocks(lambda whole, block: comm.scatter(whole if root else None, out=block)),
        "all_to_all": blocks(lambda whole, other: comm.all_to_all(other, out=whole), other_is_block=False),
        "send_recv": _whole(_ping_pong(comm.rank, comm.world_size, comm.send, comm.recv)),
        "barrier": _whole(lambda x: comm.barrier()),
    }


def _contenders(
    who: str, memory: str, call: str, makes: dict[str, Make], allocate: Allocate
) -> dict[ranks.Key, ranks.Factory]:
    def factory(make: Make) -> ranks.Factory:
        def prepare(count: int, dtype: str) -> ranks.Operation:
            run, x = make(allocate, count, dtype)
            return ranks.Operation(run, buffer_of(x), exact=False)

        return prepare

    return {(who, name, memory, call): factory(makes[name]) for name in COLLECTIVES}


def gloo_rank(store: dist.Store, rank: int, world_size: int) -> ranks.Rank:
    """Gloo at its defaults."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    made = _contenders("Gloo", "private", "torch.distributed", through_torch(rank, world_size), private)
    return ranks.Rank(rank, world_size, made, dist.barrier, lambda: {"torch": torch.__version__})


def pycoll_rank(store: dist.Store, rank: int, world_size: int) -> ranks.Rank:
    """pycoll, natively on private and symmetric tensors, and through torch.distributed."""
    comm = Communicator(store, rank, world_size)
    dist.init_process_group("pycoll", store=store, rank=rank, world_size=world_size)

    @shared
    def symmetric(count: int, dtype: str) -> Tensor:
        return comm.empty(count, getattr(torch, dtype))

    made = {
        **_contenders("pycoll", "private", "native", native(comm), private),
        **_contenders("pycoll", "symmetric", "native", native(comm), symmetric),
        **_contenders("pycoll", "private", "torch.distributed", through_torch(rank, world_size), private),
    }
    return ranks.Rank(rank, world_size, made, comm.barrier, lambda: {**pycoll.info(), "footprint": comm.footprint()})


def ceiling_rank(store: dist.Store, rank: int, world_size: int) -> ranks.Rank:
    """Copies; see above."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)  # to start samples together
    pipe = torch.frombuffer(attach()[rank & ~1], dtype=torch.uint8, count=PIPE_BYTES)

    def copies(count: int, dtype: str) -> ranks.Operation:
        x, y = private(count, dtype), private(count + 1, dtype)
        return ranks.Operation(partial(y[:-1].copy_, x), buffer_of(x), exact=False)

    def pipelined(count: int, dtype: str) -> ranks.Operation:
        x = private(count, dtype)
        call = partial(_C.ceiling_pipelined, x.view(torch.uint8), pipe, rank % 2 == 0)
        return ranks.Operation(call, buffer_of(x), exact=False)

    made: dict[ranks.Key, ranks.Factory] = {
        ("ceiling", "memcpy", "private", "none"): copies,
        ("ceiling", "pipelined memcpy", "private", "none"): pipelined,
    }
    return ranks.Rank(rank, world_size, made, dist.barrier, dict)


if __name__ == "__main__":
    serve({"pycoll": pycoll_rank, "gloo": gloo_rank, "ceiling": ceiling_rank}[sys.argv[1]])
