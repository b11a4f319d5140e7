"""A rank on a GPU: pycoll, NCCL through torch or CuPy, torch's symmetric memory, or the copy that none can beat.

Arguments: which of RANKS, a file to meet in, the modes, pycoll's algorithms (both separated by commas), and how many
ranks share a GPU.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import pycoll

from . import ranks
from .gpu_calls import Call, Contender, GpuRank
from .torch_ranks import shared

SHARING_NCCL = (2, 30)  # the first that takes several ranks on one GPU, with NCCL_MULTI_RANK_GPU_ENABLE=1
TIMEOUT = 60.0  # seconds that a library waits for another rank, where it can be told
_NCCL_BFLOAT16 = 9  # in nccl.h; CuPy has no name for it


@dataclass(frozen=True)
class Seat:
    """What a rank knows of its run."""

    store: dist.Store
    rank: int
    world_size: int
    modes: tuple[str, ...]
    algorithms: tuple[str, ...]
    share: int  # ranks on a GPU, at most

    def serve(self, contenders: Mapping[tuple[str, str, str], Contender], facts: Callable[[], dict[str, Any]]) -> None:
        """Serves each of `contenders` (who, algorithm, memory) in all modes, eager before graph."""
        keys = {(*key, mode): made for mode in self.modes for key, made in contenders.items()}
        GpuRank(self.rank, self.world_size, keys, facts).serve()


@shared
def private(count: int, dtype: str) -> Tensor:
    """A tensor as users have them: from torch's allocator."""
    return torch.empty(count, dtype=getattr(torch, dtype), device="cuda")


def pycoll_rank(seat: Seat) -> None:
    """pycoll on private and symmetric tensors."""
    comm = pycoll.Communicator(seat.store, seat.rank, seat.world_size, timeout=TIMEOUT)
    comm.all_reduce(private(1, "float32"))  # ranks meet on their GPUs with the first tensor there

    @shared
    def symmetric(count: int, dtype: str) -> Tensor:
        return comm.empty(count, getattr(torch, dtype), device="cuda")

    def binder(algorithm: str) -> Callable[[Tensor], Call]:
        return lambda x: partial(comm.all_reduce, x, algorithm=algorithm)  # type: ignore[arg-type]

    def facts() -> dict[str, Any]:
        return {**pycoll.info(), "device_footprint": comm.device_footprint()}

    made = {
        ("pycoll", algorithm, memory): Contender(allocate, binder(algorithm))
        for algorithm in seat.algorithms
        for memory, allocate in (("private", private), ("symmetric", symmetric))
    }
    seat.serve(made, facts)
    comm.close()


def _check_sharing(seat: Seat, version: tuple[int, ...]) -> None:
    """SystemExit where ranks share a GPU and NCCL does not know how to."""
    if seat.share > 1 and version[:2] < SHARING_NCCL:
        raise SystemExit(
            f"NCCL {'.'.join(map(str, version))} takes one rank a GPU: "
            f"{'.'.join(map(str, SHARING_NCCL))} or newer takes more"
        )


def nccl_rank(seat: Seat) -> None:
    """NCCL at its defaults, as torch.distributed has it."""
    version = tuple(torch.cuda.nccl.version())[:3]
    _check_sharing(seat, version)
    device = torch.device("cuda", torch.cuda.current_device())
    _init_nccl(seat, device_id=device)
    dist.all_reduce(private(1, "float32"))  # connects
    facts = {"torch": torch.__version__, "NCCL": ".".join(map(str, version))}
    contender = Contender(private, lambda x: partial(dist.all_reduce, x))
    seat.serve({("NCCL", "default", "private"): contender}, lambda: facts)


def cupy_rank(seat: Seat) -> None:
    """NCCL at its defaults, as CuPy has it."""
    try:
        import cupy
        from cupy.cuda import nccl
    except ImportError as error:
        raise SystemExit(f"CuPy cannot be imported: {error}") from None
    if not getattr(nccl, "available", False):
        raise SystemExit("CuPy was built without NCCL, or does not find it")
    number = nccl.get_version()  # 23004 is 2.30.4
    version = (number // 10000, number // 100 % 100, number % 100)
    _check_sharing(seat, version)
    cupy.cuda.Device(torch.cuda.current_device()).use()
    if seat.rank == 0:
        seat.store.set("nccl", pickle.dumps(nccl.get_unique_id()).hex())
    identifier = pickle.loads(bytes.fromhex(seat.store.get("nccl").decode()))  # bytes or a tuple, by CuPy's version
    comm = nccl.NcclCommunicator(seat.world_size, identifier, seat.rank)
    types = {torch.float32: nccl.NCCL_FLOAT32, torch.bfloat16: _NCCL_BFLOAT16}

    def bind(x: Tensor) -> Call:
        place, count, kind = x.data_ptr(), x.numel(), types[x.dtype]

        def call() -> None:  # on the stream that is current then, which in a graph is the one that is captured
            comm.allReduce(place, place, count, kind, nccl.NCCL_SUM, torch.cuda.current_stream().cuda_stream)

        return call

    bind(private(1, "float32"))()
    facts = {"cupy": cupy.__version__, "NCCL": ".".join(map(str, version))}
    seat.serve({("CuPy's NCCL", "default", "private"): Contender(private, bind)}, lambda: facts)


def symmetric_memory_rank(seat: Seat) -> None:
    """torch's own one-shot and two-shot, on its own symmetric memory."""
    import torch.distributed._symmetric_memory as symmetric_memory

    _init_nccl(seat)  # which is given nothing to do: memory is exchanged through the store
    group = dist.group.WORLD
    assert group is not None, "it was made"
    name, device = group.group_name, torch.device("cuda", torch.cuda.current_device())

    @shared
    def symmetric(count: int, dtype: str) -> Tensor:
        x = symmetric_memory.empty(count, dtype=getattr(torch, dtype), device=device)
        symmetric_memory.rendezvous(x, name)
        return x

    symmetric(1024, "float32")  # says at once where these GPUs cannot
    operators = {
        "one_shot": torch.ops.symm_mem.one_shot_all_reduce,  # into a new tensor
        "two_shot": torch.ops.symm_mem.two_shot_all_reduce_,
    }
    made = {
        ("torch symm_mem", algorithm, "symmetric"): Contender(symmetric, _binder(operator, name))
        for algorithm, operator in operators.items()
    }
    seat.serve(made, lambda: {"torch": torch.__version__})


def _binder(operator: Callable[..., Tensor], group: str) -> Callable[[Tensor], Call]:
    return lambda x: partial(operator, x, "sum", group)


def _init_nccl(seat: Seat, **options: Any) -> None:
    patience = timedelta(seconds=TIMEOUT)
    dist.init_process_group(
        "nccl", store=seat.store, rank=seat.rank, world_size=seat.world_size, timeout=patience, **options
    )


def copy_rank(seat: Seat) -> None:
    """The device's own copy of as many bytes as its ranks' tensors have: an all-reduce reads and writes them all."""

    def allocate(count: int, dtype: str) -> Tensor:
        return torch.empty(2 * seat.share * count, dtype=getattr(torch, dtype), device="cuda")

    def bind(x: Tensor) -> Call:
        source, target = x.chunk(2)
        return partial(target.copy_, source)

    seat.serve({("ceiling", "copy", "private"): Contender(allocate, bind, reduces=False)}, dict)


RANKS: Mapping[str, Callable[[Seat], None]] = {
    "pycoll": pycoll_rank,
    "nccl": nccl_rank,
    "cupy": cupy_rank,
    "symm_mem": symmetric_memory_rank,
    "copy": copy_rank,
}


def main(arguments: Iterable[str]) -> None:
    """Serves as the rank that the environment describes, on the GPU whose turn it is."""
    which, place, modes, algorithms, share = arguments
    rank, world_size = int(os.environ[ranks.RANK_VARIABLE]), int(os.environ[ranks.WORLD_VARIABLE])
    torch.cuda.set_device(rank % torch.cuda.device_count())
    store = dist.FileStore(place, world_size)
    try:
        seat = Seat(store, rank, world_size, tuple(modes.split(",")), tuple(algorithms.split(",")), int(share))
        RANKS[which](seat)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
