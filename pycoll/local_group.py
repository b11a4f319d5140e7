"""pycoll.LocalGroup: several ranks on one GPU, in one process, called from one thread."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import Tensor

from pycoll import _C
from pycoll._build import build_info
from pycoll.collectives import Algorithm, Op
from pycoll.errors import Error, UnsupportedError, UsageError
from pycoll.rendezvous import seconds
from pycoll.tuning import CUDA, Config, native_config


class LocalGroup:
    """Ranks 0 to world_size - 1 on one GPU: each collective is one cooperative launch that holds all ranks' blocks.

    Calls are ordered on the caller's stream, one after another also where streams differ, and can be captured in a CUDA
    graph (whose replays the caller orders with other calls of the group). Any CUDA tensors will do: in one process all
    ranks can read them where they lie.

    Raises:
        UsageError, MismatchError: a bad argument; the group stays usable.
        UnsupportedError: pycoll was built without CUDA, or a tensor is not on the group's GPU.
        TimeoutError, Error: an earlier call failed on the GPU; terminal.
    """

    def __init__(
        self,
        world_size: int,
        device: torch.device | str | int = "cuda",
        *,
        timeout: float | timedelta = 30.0,
        config: Config = CUDA,
    ) -> None:
        """Takes device memory for cells, slots and links (see `footprint`).

        Args:
            world_size: 1 to 16 ranks.
            device: their GPU.
            timeout: the longest a block waits for another, in seconds.
            config: memory and switch points; `heap_bytes` has no meaning here.
        """
        where = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if where.type != "cuda":
            raise UnsupportedError(f"pycoll: a local group lives on a CUDA GPU, not on {where}")
        if not build_info()["cuda"]["built"]:
            raise UnsupportedError(f"pycoll: built without CUDA: {build_info()['cuda']['reason']}")
        if not torch.cuda.is_available():
            raise UnsupportedError("pycoll: there is no CUDA GPU here, or no driver for it")
        index = torch.cuda.current_device() if where.index is None else where.index
        native = native_config(config, max(1, world_size))
        self._impl: _C.LocalGroup | None = _C.LocalGroup(world_size, index, native, seconds(timeout))
        self.world_size = world_size
        self.device = torch.device("cuda", index)

    def all_reduce(self, tensors: Sequence[Tensor], op: Op = "sum", *, algorithm: Algorithm = "auto") -> list[Tensor]:
        """Combines the tensors elementwise, each of which becomes the result: tensors[r] is rank r's.

        Args:
            tensors: one a rank, of one shape and dtype (float32, float64, bfloat16, float16, complex, int8 to int64,
                uint8), in separate memory.
            op, algorithm: as in `Communicator.all_reduce`.

        Returns:
            The tensors.
        """
        self._open().all_reduce(list(tensors), op, algorithm)
        return list(tensors)

    def broadcast(self, tensors: Sequence[Tensor], root: int = 0) -> list[Tensor]:
        """Overwrites all tensors with tensors[root]. Any dtype. Returns the tensors."""
        self._open().broadcast(list(tensors), root)
        return list(tensors)

    def all_gather(self, tensors: Sequence[Tensor], *, out: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Concatenates the tensors along the first dimension, once a rank.

        Args:
            tensors: one a rank, shape (n, ...), any dtype; a scalar counts as shape (1,).
            out: one a rank, shape (world_size * n, ...); None: new tensors. tensors[r] may be block r of out[r].

        Returns:
            `out`.
        """
        impl = self._open()
        if out is None:
            shapes = [tuple(t.shape) or (1,) for t in tensors]
            out = [
                t.new_empty((self.world_size * shape[0], *shape[1:])) for t, shape in zip(tensors, shapes, strict=True)
            ]
        impl.all_gather(list(tensors), list(out))
        return list(out)

    def reduce_scatter(
        self, tensors: Sequence[Tensor], op: Op = "sum", *, out: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Combines the tensors elementwise; rank r gets block r of `world_size` equal blocks along dimension 0.

        Args:
            tensors: one a rank, shape (world_size * n, ...), a dtype that all_reduce takes.
            op: as in all_reduce.
            out: one a rank, shape (n, ...); None: new tensors. out[r] may be block r of tensors[r].

        Returns:
            `out`.
        """
        impl = self._open()
        if any(t.dim() == 0 or t.shape[0] % self.world_size for t in tensors):
            raise UsageError(f"pycoll: reduce_scatter needs a first dimension that {self.world_size} ranks divide")
        if out is None:
            out = [t.new_empty((t.shape[0] // self.world_size, *t.shape[1:])) for t in tensors]
        impl.reduce_scatter(list(tensors), list(out), op)
        return list(out)

    def _open(self) -> _C.LocalGroup:
        if self._impl is None:
            raise Error("pycoll: the local group is closed")
        return self._impl

    def footprint(self) -> int:
        """Bytes of device memory of all ranks together."""
        return 0 if self._impl is None else self._impl.footprint

    def abort(self) -> None:
        """Ends a running call, and makes later ones fail."""
        if self._impl is not None:
            self._impl.abort()

    def close(self) -> None:
        """Waits for the last call and gives the memory back. Idempotent."""
        self._impl = None

    def __repr__(self) -> str:
        state = (
            "closed" if self._impl is None else f"{self._impl.channels} channels, {self.footprint() / 2**20:.1f} MiB"
        )
        return f"<pycoll.LocalGroup of {self.world_size} ranks on {self.device}: {state}>"
