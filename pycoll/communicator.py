"""pycoll.Communicator: collectives directly, without torch.distributed, at the lowest latency."""

from __future__ import annotations

import atexit
import itertools
import math
import operator
import threading
import weakref
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pycoll import _C, tuning
from pycoll.arrays import with_index
from pycoll.collectives import Collectives
from pycoll.errors import Error, UsageError
from pycoll.rendezvous import seconds, store_from_env
from pycoll.trace import parsed
from pycoll.tuning import Config, native_config

_alive: weakref.WeakSet[Communicator] = weakref.WeakSet()
_alive_lock = threading.Lock()
_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()  # communicators made of each
_names = itertools.count()  # communicators are created in the same order on all ranks


class Communicator(Collectives):
    """A group of ranks on one machine and the collectives among them.

    All ranks must create their communicators, and call their collectives, in the same order. Tensors are torch tensors,
    NumPy arrays or CuPy arrays of any shape and strides; arrays are used where they are. Memory from `empty()` is
    mapped by all peers, and collectives on it need no staging copies.

    On a GPU the ranks meet with their first CUDA tensor, each on the one GPU it uses from then on. A call is ordered on
    the current stream (for CuPy arrays CuPy's) as a kernel would be; where each rank has a GPU of its own that the
    others reach, the host goes on at once, and calls can be captured in CUDA graphs. Processes that share a GPU, or
    whose GPUs do not reach one another, meet on the host: right, but slower.

    Reductions of bfloat16 and float16 accumulate in float32 and round once. One-shot and two-shot add in rank order:
    the same bits on every rank, in every run, at every size. Ring and tree give the same bits on all ranks and in all
    runs, in an order that depends on how the tensor is cut.

    Raises:
        UsageError: a bad argument of this rank; the communicator stays usable.
        MismatchError, PeerLostError, TimeoutError: terminal; every later call raises the same, and tensors of the
            failed call are undefined.
        UnsupportedError: a device, layout or dtype that pycoll does not communicate.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        *,
        timeout: float | timedelta = 300.0,
        config: Config | None = None,
        cuda_config: Config = tuning.CUDA,
        name: str | None = None,
        global_ranks: Sequence[int] = (),
    ) -> None:
        """Meets the other ranks; returns when all are there.

        Args:
            store: any torch.distributed Store that all ranks reach; used only to meet.
            rank: of this caller, from 0.
            world_size: how many ranks there are.
            timeout: the longest a collective, or this call, waits for other ranks; in seconds.
            config: memory and switch points; the ranks' minimum is used.
            cuda_config: the same for tensors on GPUs.
            name: tells communicators on one store apart, and to `torch.ops.pycoll` it is this one; by default they are
                counted, in order of creation.
            global_ranks: of each rank, its number among all ranks of the program, where they are more than these: texts
                of errors, the log and traces say both, "rank 1 (global rank 3)". `Error.rank` is the first.
        """
        self.timeout = seconds(timeout)
        if world_size < 1 or not 0 <= rank < world_size:
            raise UsageError(f"pycoll: rank {rank} is not in a world of {world_size}")
        native = native_config(config or Config(), world_size)
        on_gpus = native_config(cuda_config, world_size)
        self.name = name or str(next(_names))
        names = _C.Names(f"communicator {self.name}", global_ranks)
        self._impl = _C.Communicator(store, rank, world_size, self.name, names, native, on_gpus, self.timeout)
        self.rank = rank
        self.world_size = world_size
        with _alive_lock:
            _alive.add(self)

    @classmethod
    def from_env(
        cls, *, timeout: float | timedelta = 300.0, config: Config | None = None, cuda_config: Config = tuning.CUDA
    ) -> Communicator:
        """The communicator of all ranks that torchrun, mpirun (Open MPI, MPICH) or srun started.

        Raises:
            UsageError: the environment names no rank.
        """
        store, rank, world_size = store_from_env(seconds(timeout))
        return cls(store, rank, world_size, timeout=timeout, config=config, cuda_config=cuda_config)

    @classmethod
    def from_group(
        cls,
        group: dist.ProcessGroup | None = None,
        *,
        timeout: float | timedelta = 300.0,
        config: Config | None = None,
        cuda_config: Config = tuning.CUDA,
    ) -> Communicator:
        """A communicator of the ranks of a torch.distributed group, whatever its backend; they meet in its store.

        Args:
            group: None: the default group.

        Raises:
            UsageError: torch.distributed is not initialized, or this rank is not in the group.
        """
        if not dist.is_initialized():
            raise UsageError("pycoll: there is no process group yet: call torch.distributed.init_process_group() first")
        group = group or dist.distributed_c10d._get_default_group()
        rank = dist.get_rank(group)
        if rank < 0:
            raise UsageError(f"pycoll: rank {dist.get_rank()} is not in the group")
        with _alive_lock:
            number = _groups[group] = _groups.get(group, -1) + 1
        store = dist.distributed_c10d._get_process_group_store(group)
        name = f"{dist.distributed_c10d._get_process_group_name(group)}/{number}"
        world_size = dist.get_world_size(group)
        return cls(
            store,
            rank,
            world_size,
            timeout=timeout,
            config=config,
            cuda_config=cuda_config,
            name=name,
            global_ranks=dist.get_process_group_ranks(group),
        )

    def empty(
        self,
        shape: int | Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """An uninitialised torch tensor in this rank's shared heap, which all peers map ("symmetric memory").

        Collectives on it, and on views of it, need no staging copies. No collective call: ranks may allocate
        differently. The memory is freed with the tensor, and stays valid after `close()`.

        Args:
            shape: of the tensor.
            dtype: of its elements.
            device: "cpu", or the rank's GPU: there the ranks must have met, by a collective or by calling this on all
                ranks. Peers map new memory when they come by, so a tensor's first collective may still be staged; where
                GPUs do not reach one another it is ordinary memory. `Tensor.record_stream` has no effect on the heap:
                before a tensor is dropped, the current stream must have waited for others that use it.

        Raises:
            Error: the heap is full (Config.heap_bytes), or the machine has no memory.
        """
        sizes = [operator.index(n) for n in shape] if isinstance(shape, Sequence) else [operator.index(shape)]
        if any(n < 0 for n in sizes):
            raise UsageError(f"pycoll: empty() needs sizes of zero or more, not {tuple(sizes)}")
        if math.prod(sizes) >= 1 << 46:
            raise Error(f"pycoll: the shared heap has no room for a tensor of shape {tuple(sizes)}")
        return self._impl.empty(sizes, dtype, with_index(torch.device(device)))

    def mem_pool(self, device: torch.device | str = "cuda") -> torch.cuda.MemPool:
        """A pool for `torch.cuda.use_mem_pool`: what torch allocates in it lies in the shared heap, as from `empty()`.

        The ranks must have met on their GPUs, or all call this. Free the pool's tensors before closing.
        """
        allocator = self._impl.mem_allocator(with_index(torch.device(device)))
        return torch.cuda.MemPool() if allocator is None else torch.cuda.MemPool(allocator)

    def footprint(self) -> int:
        """Bytes of memory this rank has given: staging and links until closed, and tensors from `empty()`."""
        return self._impl.footprint

    def device_footprint(self) -> int:
        """The same on its GPU; 0 before the ranks have met there."""
        return self._impl.device_footprint

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._impl.closed

    def close(self) -> None:
        """Gives everything back. Peers that still wait for this rank get PeerLostError. Idempotent."""
        self._impl.close()

    def abort(self, reason: str = "aborted by the user") -> None:
        """Makes running and later calls fail on all ranks, with `reason`."""
        self._impl.abort(reason)

    def trace(self) -> dict[str, Any]:
        """What each rank did last, as this one sees it in shared memory: calls, messages and launches, with times.

        No collective call, and any thread may make it, also while calls hang. `pycoll.trace.dump` lists the fields;
        written to a file as JSON it is what `pycoll trace` reads. A rank that fails leaves such a file by itself, in
        the folder that the environment variable PYCOLL_TRACE named when the communicator was made.

        Raises:
            Error: the communicator is closed.
        """
        return parsed(self._impl.trace())

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = (
            "closed"
            if self.closed
            else f"{self._impl.channels} channels, {self.footprint() / 2**20:.1f} MiB, {_C.simd}"
            + (f"; {device}" if (device := self._impl.device) else "")
        )
        return f"<pycoll.Communicator {self._impl.rank_name(self.rank)} of {self.world_size}: {state}>"


def named(name: str) -> Communicator:
    """The communicator of this process with this name, which is open if any is.

    Raises:
        UsageError: there is none, or several are open: ranks that are threads of one process need names of their own.
    """
    with _alive_lock:
        found = [communicator for communicator in _alive if communicator.name == name]
    usable = [communicator for communicator in found if not communicator.closed] or found[:1]
    if len(usable) != 1:
        raise UsageError(f"pycoll: {len(usable) or 'no'} communicators of this process are called {name!r}")
    return usable[0]


@atexit.register
def _close_all() -> None:
    for communicator in list(_alive):
        communicator.close()
