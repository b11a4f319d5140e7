"""pycoll.Communicator: collectives directly, without torch.distributed, at the lowest latency."""

from __future__ import annotations

import atexit
import itertools
import math
import operator
import os
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pycoll import _C, tuning
from pycoll.errors import Error, UnsupportedError, UsageError
from pycoll.tuning import Config, GiB

if TYPE_CHECKING:
    import cupy
    from numpy.typing import NDArray

Op = Literal["sum", "avg", "min", "max", "product"]
Algorithm = Literal["auto", "one_shot", "two_shot", "ring", "tree", "one_shot_ll", "two_shot_ll", "multimem"]
Array = TypeVar("Array", Tensor, "NDArray[np.generic]", "cupy.ndarray")

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
        store, rank, world_size = _store_from_env(seconds(timeout))
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
        with _stream_of(x):
            self._impl.all_reduce(_tensor(x), None if out is None else _tensor(out), op, algorithm)
        return result

    def broadcast(self, x: Array, root: int = 0) -> Array:
        """Overwrites `x` on every rank with rank `root`'s. Any dtype; the same shape on all ranks. Returns `x`."""
        with _stream_of(x):
            self._impl.broadcast(_tensor(x), root)
        return x

    def all_gather(self, x: Array, *, out: Array | None = None) -> Array:
        """Concatenates `x` of all ranks along the first dimension, in rank order.

        Args:
            x: shape (n, ...), any dtype, the same on all ranks; a scalar counts as shape (1,).
            out: shape (world_size * n, ...); None: a new array of the kind of `x`. `x` may be this rank's block of it.

        Returns:
            `out`.
        """
        tensor = _tensor(x)
        shape: tuple[int, ...] = tuple(tensor.shape) or (1,)
        with _stream_of(x):
            if out is None:
                gathered = tensor.new_empty((self.world_size * shape[0], *shape[1:]))
                self._impl.all_gather(tensor, gathered)
                return _like(x, gathered)
            self._impl.all_gather(tensor, _tensor(out))
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
        tensor: Tensor = _tensor(x)
        if tensor.dim() == 0 or tensor.shape[0] % self.world_size:
            raise UsageError(
                f"pycoll: reduce_scatter needs a first dimension that {self.world_size} ranks divide, "
                f"not shape {tuple(tensor.shape)}"
            )
        with _stream_of(x):
            if out is None:
                block = tensor.new_empty((tensor.shape[0] // self.world_size, *tensor.shape[1:]))
                self._impl.reduce_scatter(tensor, block, op)
                return _like(x, block)
            self._impl.reduce_scatter(tensor, _tensor(out), op)
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
                GPUs do not reach one another it is ordinary memory.

        Raises:
            Error: the heap is full (Config.heap_bytes), or the machine has no memory.
        """
        sizes = [operator.index(n) for n in shape] if isinstance(shape, Sequence) else [operator.index(shape)]
        if any(n < 0 for n in sizes):
            raise UsageError(f"pycoll: empty() needs sizes of zero or more, not {tuple(sizes)}")
        if math.prod(sizes) >= 1 << 46:
            raise Error(f"pycoll: the shared heap has no room for a tensor of shape {tuple(sizes)}")
        return self._impl.empty(sizes, dtype, _with_index(torch.device(device)))

    def mem_pool(self, device: torch.device | str = "cuda") -> torch.cuda.MemPool:
        """A pool for `torch.cuda.use_mem_pool`: what torch allocates in it lies in the shared heap, as from `empty()`.

        The ranks must have met on their GPUs, or all call this. Free the pool's tensors before closing.
        """
        allocator = self._impl.mem_allocator(_with_index(torch.device(device)))
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
            + (f"; {self._impl.device}" if self._impl.device else "")
        )
        return f"<pycoll.Communicator rank {self.rank} of {self.world_size}: {state}>"


def _with_index(device: torch.device) -> torch.device:
    """`device`, with the current one's index where it names none."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def _is_cupy(x: object) -> bool:
    return type(x).__module__.partition(".")[0] == "cupy"


def _stream_of(x: object) -> AbstractContextManager[object]:
    """Makes CuPy's current stream torch's, for CuPy arrays."""
    if not _is_cupy(x):
        return nullcontext()
    import cupy

    stream = cupy.cuda.get_current_stream()
    return torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr, device=x.device.id))  # type: ignore[attr-defined]


def _tensor(x: object) -> Tensor:
    """`x` as a torch tensor over the same memory."""
    if isinstance(x, Tensor):
        return x
    if _is_cupy(x):
        return torch.from_dlpack(x)
    if not isinstance(x, np.ndarray):
        raise UnsupportedError(f"pycoll communicates torch tensors, NumPy and CuPy arrays, not {type(x).__name__}")
    if not x.flags.writeable:
        raise UsageError("pycoll: the NumPy array is read-only; pass a writable copy")
    try:
        return torch.from_numpy(x)
    except (TypeError, ValueError) as e:
        advice = "pass a contiguous copy in native byte order, such as numpy.ascontiguousarray(x, dtype=numpy.float32)"
        raise UnsupportedError(f"pycoll cannot use a NumPy array of {x.dtype} ({e}): {advice}") from e


def _like(x: Array, result: Tensor) -> Array:
    if isinstance(x, Tensor):
        return result
    if _is_cupy(x):
        import cupy

        return cupy.from_dlpack(result)  # type: ignore[no-any-return]
    return result.numpy()


_LAUNCHERS = (  # variables that hold rank, world size and (parts of) a name of the job
    ("RANK", "WORLD_SIZE", ()),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")),
    ("PMI_RANK", "PMI_SIZE", ()),
    ("SLURM_PROCID", "SLURM_NTASKS", ("SLURM_JOB_ID", "SLURM_STEP_ID")),
)


def seconds(timeout: float | timedelta) -> float:
    """A time-out in seconds, at most LONGEST. Raises UsageError unless it is positive."""
    value = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    if not value > 0:
        raise UsageError(f"pycoll: the timeout must be positive, in seconds, not {timeout}")
    return min(value, LONGEST)


def _store_from_env(timeout: float) -> tuple[dist.Store, int, int]:
    for rank_key, world_key, job_keys in _LAUNCHERS:
        if rank_key not in os.environ or world_key not in os.environ:
            continue
        rank, world_size = _count_from_env(rank_key), _count_from_env(world_key)
        if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
            return _rendezvous_store(rank, world_size, timeout), rank, world_size
        if rank_key == "RANK":
            raise UsageError(
                "pycoll: RANK and WORLD_SIZE are set, but not MASTER_ADDR and MASTER_PORT: start with torchrun"
            )
        return _file_store(job_keys, world_size), rank, world_size
    raise UsageError(
        "pycoll: the environment names no rank: start with torchrun, mpirun or srun, "
        "or give a store, rank and world size"
    )


def _count_from_env(name: str) -> int:
    if not os.environ[name].isdecimal():
        raise UsageError(f"pycoll: the environment variable {name} must be a count, not {os.environ[name]!r}")
    return int(os.environ[name])


_rendezvous_stores: dict[tuple[str, str, int, int], dist.Store] = {}


def _rendezvous_store(rank: int, world_size: int, timeout: float) -> dist.Store:
    """The store at MASTER_ADDR. Kept while this process lives: rank 0's may be what serves it, also to late ranks."""
    key = (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], rank, world_size)
    if key not in _rendezvous_stores:
        patience = timedelta(seconds=timeout)
        _rendezvous_stores[key] = next(dist.rendezvous("env://", rank, world_size, timeout=patience))[0]
    return _rendezvous_stores[key]


def _file_store(job_keys: Sequence[str], world_size: int) -> dist.Store:
    """Where ranks meet whose launcher gives no address: a file named after the job, which the last one removes."""
    job = "-".join(os.environ[key] for key in job_keys if key in os.environ) or f"launcher-{_launcher_pid()}"
    name = f"pycoll-{os.getuid()}-{''.join(c if c.isalnum() else '-' for c in job)}-{next(_names)}"
    return dist.FileStore(str(Path(tempfile.gettempdir()) / name), world_size)


def _launcher_pid() -> int:
    """The process that started this rank's session (MPICH's proxy), whatever scripts lie between."""
    session = os.getsid(0)
    if session == 0:  # it was started outside this PID namespace, so not by a launcher within
        return os.getppid()
    stat = Path(f"/proc/{session}/stat").read_text(encoding="utf-8", errors="replace")
    return int(stat.rpartition(")")[2].split()[1])


@atexit.register
def _close_all() -> None:
    for communicator in list(_alive):
        communicator.close()
