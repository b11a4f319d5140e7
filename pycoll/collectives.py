"""The collectives, and send and receive, as methods: on torch tensors, NumPy arrays and CuPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from pycoll import _C
from pycoll.arrays import Array, like, stream_of, tensor_of
from pycoll.errors import UsageError

Op = Literal["sum", "avg", "min", "max", "product", "band", "bor", "bxor"]
Algorithm = Literal["auto", "one_shot", "two_shot", "ring", "tree", "one_shot_ll", "two_shot_ll", "multimem"]

_ANY = -1  # a source


class Collectives:
    """What a rank can do with the others; the base of `pycoll.Communicator`, which says what holds for all of it.

    With `async_op` a method returns a `torch.distributed.Work` at once, and `wait()` returns when the result is there.
    """

    _impl: _C.Communicator
    rank: int
    world_size: int

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
            x: float32, float64, bfloat16, float16, complex, int8 to int64, uint8 or bool, the same shape and dtype on
                all ranks.
            op: "sum", "avg" (integers truncate), "min", "max", "product"; "band", "bor" and "bxor" of integers. Of
                bools the sum is their or, the product their and; complex numbers have sums and averages.
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

    def send(self, x: Array, peer: int, *, tag: int = 0) -> None:
        """Sends `x`, of any shape and dtype, to rank `peer`; returns when `x` may be changed again.

        A small tensor is sent at once, so far as there is room; a large one waits for the receive. Messages of one
        rank and tag are received in the order in which they were sent; tags in any order. They neither wait for
        collectives nor delay them.

        Raises:
            MismatchError: it was received as something else: another size or dtype. Terminal.
            PeerLostError, TimeoutError: `peer` has died or left, or does not receive. Terminal.
        """
        with stream_of(x):
            self._impl.send(tensor_of(x), peer, tag, False)

    def recv(self, x: Array, peer: int | None = None, *, tag: int = 0) -> int:
        """Receives what rank `peer`, or any, sent with this tag into `x`, of the same size and dtype.

        Returns:
            The rank that sent it.

        Raises: as `send`.
        """
        with stream_of(x):
            return int(self._impl.recv(tensor_of(x), _ANY if peer is None else peer, tag, False))

    def isend(self, x: Array, peer: int, *, tag: int = 0) -> dist.Work:
        """As `send`, but returns a `Work` at once; `x` may be changed after its `wait()`."""
        with stream_of(x):
            work: dist.Work = self._impl.send(tensor_of(x), peer, tag, True)
        return work

    def irecv(self, x: Array, peer: int | None = None, *, tag: int = 0) -> dist.Work:
        """As `recv`, but returns a `Work` at once; `x` is there after its `wait()`."""
        with stream_of(x):
            work: dist.Work = self._impl.recv(tensor_of(x), _ANY if peer is None else peer, tag, True)
        return work

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


def _tensor_or_none(x: Array | None) -> Tensor | None:
    return None if x is None else tensor_of(x)
