"""pycoll.Communicator: collectives directly, without torch.distributed, at the lowest latency."""

from __future__ import annotations

import atexit
import itertools
import math
import operator
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pycoll import _C, tuning
from pycoll.arrays import Array, like, stream_of, tensor_of, with_index
from pycoll.errors import Error, UsageError
from pycoll.rendezvous import seconds, store_from_env
from pycoll.tuning import Config, native_config

Op = Literal["sum", "avg", "min", "max", "product", "band", "bor", "bxor"]
Algorithm = Literal["auto", "one_shot", "two_shot", "ring", "tree", "one_shot_ll", "two_shot_ll", "multimem"]

_alive: weakref.WeakSet[Communicator] = weakref.WeakSet()
_names = itertools.count()  # communicators are created in the same order on all ranks


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

    def all_reduce(
        self,
        x: Array,
        op: Op = "sum",
        *,
        out: Array | None = None,
        algorithm: Algorithm = "auto",
        async_op: bool = False,
    ) -> Any:
        """Combines `x` of all ranks elementwise; every rank gets the result.

        Args:
            x: float32, float64, bfloat16, float16, int8 to int64, uint8 or bool, the same shape and dtype on all ranks.
            op: "sum", "avg" (integers truncate), "min", "max", "product"; "band", "bor" and "bxor" of integers. Of
                bools the sum is their or, the product their and.
            out: where the result goes; None: into `x`.
            algorithm: "auto" picks by size; or "one_shot", "two_shot", "ring", "tree"; on GPUs also "one_shot_ll" and
                "two_shot_ll" (low latency), and "multimem" (sums of floats in NVSwitch, where there is one).
            async_op: return a `Work` at once.

        Returns:
            `out`, or `x`; with `async_op` a `Work`, whose `wait()` returns when the result is there.
        """
        if out is None and not async_op and type(x) is Tensor:
            self._impl.all_reduce(x, None, op, algorithm, False)
            return x
        result = x if out is None else out
        with stream_of(x):
            work = self._impl.all_reduce(tensor_of(x), _tensor_or_none(out), op, algorithm, async_op)
        return work if async_op else result

    def reduce(
        self, x: Array, op: Op = "sum", root: int = 0, *, out: Array | None = None, async_op: bool = False
    ) -> Any:
        """Combines `x` of all ranks elementwise; rank `root` alone gets the result, in `out` or `x`.

        Arguments as in `all_reduce`; `out` is looked at on the root alone. Returns the result on the root, else None;
        with `async_op` a `Work`.
        """
        result = x if out is None else out
        with stream_of(x):
            work = self._impl.reduce(tensor_of(x), _tensor_or_none(out), op, root, async_op)
        return work if async_op else result if self.rank == root else None

    def broadcast(self, x: Array, root: int = 0, *, async_op: bool = False) -> Any:
        """Overwrites `x` on every rank with rank `root`'s. Any dtype; the same shape on all ranks.

        Returns `x`; with `async_op` a `Work`.
        """
        with stream_of(x):
            work = self._impl.broadcast(tensor_of(x), root, async_op)
        return work if async_op else x

    def all_gather(self, x: Array, *, out: Array | None = None, async_op: bool = False) -> Any:
        """Concatenates `x` of all ranks along the first dimension, in rank order.

        Args:
            x: shape (n, ...), any dtype, the same on all ranks; a scalar counts as shape (1,).
            out: shape (world_size * n, ...); None: a new array of the kind of `x`. `x` may be this rank's block of it.
            async_op: return a `Work` at once; needs `out`.

        Returns:
            `out`, or a `Work`.
        """
        with stream_of(x):
            tensor = tensor_of(x)
            result, gathered = self._output(x, out, lambda: self._gathered(tensor), async_op)
            work = self._impl.all_gather(tensor, gathered, async_op)
        return work if async_op else result

    def gather(self, x: Array, root: int = 0, *, out: Array | None = None, async_op: bool = False) -> Any:
        """Concatenates `x` of all ranks along the first dimension, in rank order, on rank `root`.

        Arguments as in `all_gather`; `out` is looked at on the root alone. Returns `out` on the root, else None; with
        `async_op` a `Work`.
        """
        with stream_of(x):
            tensor = tensor_of(x)
            if self.rank == root:
                result, gathered = self._output(x, out, lambda: self._gathered(tensor), async_op)
            else:
                result = gathered = None
            work = self._impl.gather(tensor, gathered, root, async_op)
        return work if async_op else result

    def reduce_scatter(self, x: Array, op: Op = "sum", *, out: Array | None = None, async_op: bool = False) -> Any:
        """Combines `x` of all ranks elementwise; rank r gets block r of `world_size` equal blocks along dimension 0.

        Args:
            x: shape (world_size * n, ...), a dtype that all_reduce takes, the same on all ranks.
            op: as in all_reduce.
            out: shape (n, ...); None: a new array of the kind of `x`. It may be this rank's block of `x`.
            async_op: return a `Work` at once; needs `out`.

        Returns:
            `out`, or a `Work`.
        """
        with stream_of(x):
            tensor: Tensor = tensor_of(x)
            rows = self._rows("reduce_scatter", tensor)
            result, block = self._output(x, out, lambda: tensor.new_empty((rows, *tensor.shape[1:])), async_op)
            work = self._impl.reduce_scatter(tensor, block, op, async_op)
        return work if async_op else result

    def scatter(self, x: Array | None, root: int = 0, *, out: Array | None = None, async_op: bool = False) -> Any:
        """Rank r gets block r of `world_size` equal blocks of rank `root`'s `x`, along dimension 0.

        Args:
            x: on the root, shape (world_size * n, ...), any dtype; None elsewhere.
            root: whose `x` it is.
            out: shape (n, ...), the same on all ranks. The root may leave it out, and gets a new array.
            async_op: return a `Work` at once; needs `out`.

        Returns:
            `out`, or a `Work`.

        Raises:
            UsageError: a rank that is not the root gave no `out`, or an `x`.
        """
        given = x if self.rank == root else out
        if given is None:
            raise UsageError("pycoll: scatter needs `x` on the root and `out` on the other ranks")
        with stream_of(given):
            if x is None:
                result, block = out, tensor_of(out)
                work = self._impl.scatter(None, block, root, async_op)
            else:
                tensor: Tensor = tensor_of(x)
                rows = self._rows("scatter", tensor)
                result, block = self._output(x, out, lambda: tensor.new_empty((rows, *tensor.shape[1:])), async_op)
                work = self._impl.scatter(tensor, block, root, async_op)
        return work if async_op else result

    def all_to_all(
        self,
        x: Array,
        *,
        out: Array | None = None,
        send_splits: Sequence[int] = (),
        recv_splits: Sequence[int] = (),
        async_op: bool = False,
    ) -> Any:
        """Sends the r-th part of `x`, along dimension 0, to rank r, and concatenates what comes, in rank order.

        Args:
            x: shape (rows, ...), any dtype. Everything but the first dimension is the same on all ranks.
            out: shape (sum(recv_splits), ...); None: a new array of the kind of `x`. It must not overlap `x`.
            send_splits: rows of `x` for each rank; empty: equal parts.
            recv_splits: rows from each rank; empty: equal parts.
            async_op: return a `Work` at once; needs `out`.

        Returns:
            `out`, or a `Work`.

        Raises:
            MismatchError: a rank sends other than its receiver expects. On all ranks, and terminal.
        """
        with stream_of(x):
            tensor: Tensor = tensor_of(x)
            rows = sum(recv_splits) if recv_splits else tensor.shape[0] if tensor.dim() else 1
            result, received = self._output(x, out, lambda: tensor.new_empty((rows, *tensor.shape[1:])), async_op)
            work = self._impl.all_to_all(tensor, received, list(send_splits), list(recv_splits), async_op)
        return work if async_op else result

    def barrier(self, *, async_op: bool = False) -> Any:
        """Returns when all ranks have called it; with `async_op` a `Work` whose `wait()` does."""
        return self._impl.barrier(async_op)

    def _gathered(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape) or (1,)
        return x.new_empty((self.world_size * shape[0], *shape[1:]))

    def _rows(self, collective: str, x: Tensor) -> int:
        """The first dimension of one rank's block of `x`."""
        if x.dim() == 0 or x.shape[0] % self.world_size:
            raise UsageError(
                f"pycoll: {collective} needs a first dimension that {self.world_size} ranks divide, "
                f"not shape {tuple(x.shape)}"
            )
        return x.shape[0] // self.world_size

    @staticmethod
    def _output(x: Any, out: Any, make: Callable[[], Tensor], async_op: bool) -> tuple[Any, Tensor]:
        """`out`, or a new array of the kind of `x`; and its tensor."""
        if out is not None:
            return out, tensor_of(out)
        if async_op:
            raise UsageError("pycoll: with async_op=True give `out`, where the result is to go")
        made = make()
        return like(x, made), made

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


def _tensor_or_none(x: Array | None) -> Tensor | None:
    return None if x is None else tensor_of(x)


@atexit.register
def _close_all() -> None:
    for communicator in list(_alive):
        communicator.close()
