"""pycoll.Communicator: collectives directly, without torch.distributed, at the lowest latency."""

from __future__ import annotations

import atexit
import itertools
import math
import operator
import weakref
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pycoll import _C, tuning
from pycoll.arrays import Array, like, stream_of, tensor_of, with_index
from pycoll.errors import Error, UsageError
from pycoll.rendezvous import store_from_env
from pycoll.tuning import Config, GiB

Op = Literal["sum", "avg", "min", "max", "product"]
Algorithm = Literal["auto", "one_shot", "two_shot", "ring", "tree", "one_shot_ll", "two_shot_ll", "multimem"]

LONGEST = 1e9
"""Seconds that stand for ever: what clocks and torch's stores can still add up."""

_alive: weakref.WeakSet[Communicator] = weakref.WeakSet()
_names = itertools.count()  # communicators are created in the same order on all ranks


def native_config(config: Config, world_size: int) -> _C.Config:
    """`config` with everything decided, for the extension."""
    native = _C.Config()
    heap = config.heap_bytes
    if heap is None:
        heap = min(_C.physical_memory(), 64 * GiB, 1024 * GiB // world_size)
    one_shot = config.one_shot_max_bytes
    if one_shot is None:
        one_shot = tuning.one_shot_max_bytes(world_size)
    native.channels = _checked("channels", config.channels, 0, 64)
    native.slot_bytes = _checked("slot_bytes", config.slot_bytes, 64, GiB)
    native.link_bytes = _checked("link_bytes", config.link_bytes, 64, GiB)
    native.link_slots = _checked("link_slots", config.link_slots, 2, 64)
    native.heap_bytes = _checked("heap_bytes", heap, 0, 1 << 46)
    native.one_shot_max_bytes = _checked("one_shot_max_bytes", one_shot, 0, 1 << 46)
    native.channel_min_bytes = _checked("channel_min_bytes", config.channel_min_bytes, 1, 1 << 46)
    native.word_bytes = _checked("word_bytes", config.word_bytes, 0, GiB)
    native.one_shot_ll_max_bytes = _checked("one_shot_ll_max_bytes", config.one_shot_ll_max_bytes, 0, 1 << 46)
    native.two_shot_ll_max_bytes = _checked("two_shot_ll_max_bytes", config.two_shot_ll_max_bytes, 0, 1 << 46)
    return native


def _checked(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise UsageError(f"pycoll: Config.{name} must be between {low} and {high}, not {value}")
    return value


class Communicator:
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
    ) -> None:
        """Meets the other ranks; returns when all are there.

        Args:
            store: any torch.distributed Store that all ranks reach; used only to meet.
            rank: of this caller, from 0.
            world_size: how many ranks there are.
            timeout: the longest a collective, or this call, waits for other ranks; in seconds.
            config: memory and switch points; the ranks' minimum is used.
            cuda_config: the same for tensors on GPUs.
            name: tells communicators on one store apart; by default they are counted, in order of creation.
        """
        self.timeout = seconds(timeout)
        if world_size < 1 or not 0 <= rank < world_size:
            raise UsageError(f"pycoll: rank {rank} is not in a world of {world_size}")
        native = native_config(config or Config(), world_size)
        on_gpus = native_config(cuda_config, world_size)
        self._impl = _C.Communicator(store, rank, world_size, name or str(next(_names)), native, on_gpus, self.timeout)
        self.rank = rank
        self.world_size = world_size
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

    def all_reduce(self, x: Array, op: Op = "sum", *, out: Array | None = None, algorithm: Algorithm = "auto") -> Array:
        """Combines `x` of all ranks elementwise; every rank gets the result.

        Args:
            x: float32, float64, bfloat16, float16, int8 to int64 or uint8, the same shape and dtype on all ranks.
            op: "sum", "avg" (integers truncate), "min", "max" or "product".
            out: where the result goes; None: into `x`.
            algorithm: "auto" picks by size; or "one_shot", "two_shot", "ring", "tree"; on GPUs also "one_shot_ll" and
                "two_shot_ll" (low latency), and "multimem" (sums of floats in NVSwitch, where there is one).

        Returns:
            `out`, or `x`.
        """
        if out is None and type(x) is Tensor:
            self._impl.all_reduce(x, None, op, algorithm)
            return x
        result = x if out is None else out
        with stream_of(x):
            self._impl.all_reduce(tensor_of(x), None if out is None else tensor_of(out), op, algorithm)
        return result

    def broadcast(self, x: Array, root: int = 0) -> Array:
        """Overwrites `x` on every rank with rank `root`'s. Any dtype; the same shape on all ranks. Returns `x`."""
        with stream_of(x):
            self._impl.broadcast(tensor_of(x), root)
        return x

    def all_gather(self, x: Array, *, out: Array | None = None) -> Array:
        """Concatenates `x` of all ranks along the first dimension, in rank order.

        Args:
            x: shape (n, ...), any dtype, the same on all ranks; a scalar counts as shape (1,).
            out: shape (world_size * n, ...); None: a new array of the kind of `x`. `x` may be this rank's block of it.

        Returns:
            `out`.
        """
        tensor = tensor_of(x)
        shape: tuple[int, ...] = tuple(tensor.shape) or (1,)
        with stream_of(x):
            if out is None:
                gathered = tensor.new_empty((self.world_size * shape[0], *shape[1:]))
                self._impl.all_gather(tensor, gathered)
                return like(x, gathered)
            self._impl.all_gather(tensor, tensor_of(out))
            return out

    def reduce_scatter(self, x: Array, op: Op = "sum", *, out: Array | None = None) -> Array:
        """Combines `x` of all ranks elementwise; rank r gets block r of `world_size` equal blocks along dimension 0.

        Args:
            x: shape (world_size * n, ...), a dtype that all_reduce takes, the same on all ranks.
            op: as in all_reduce.
            out: shape (n, ...); None: a new array of the kind of `x`. It may be this rank's block of `x`.

        Returns:
            `out`.
        """
        tensor: Tensor = tensor_of(x)
        if tensor.dim() == 0 or tensor.shape[0] % self.world_size:
            raise UsageError(
                f"pycoll: reduce_scatter needs a first dimension that {self.world_size} ranks divide, "
                f"not shape {tuple(tensor.shape)}"
            )
        with stream_of(x):
            if out is None:
                block = tensor.new_empty((tensor.shape[0] // self.world_size, *tensor.shape[1:]))
                self._impl.reduce_scatter(tensor, block, op)
                return like(x, block)
            self._impl.reduce_scatter(tensor, tensor_of(out), op)
            return out

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        self._impl.barrier()

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
        self._impl.abort(f"pycoll: rank {self.rank}: {reason}")

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
        return f"<pycoll.Communicator rank {self.rank} of {self.world_size}: {state}>"


def seconds(timeout: float | timedelta) -> float:
    """A time-out in seconds, at most LONGEST. Raises UsageError unless it is positive."""
    value = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    if not value > 0:
        raise UsageError(f"pycoll: the timeout must be positive, in seconds, not {timeout}")
    return min(value, LONGEST)


@atexit.register
def _close_all() -> None:
    for communicator in list(_alive):
        communicator.close()
