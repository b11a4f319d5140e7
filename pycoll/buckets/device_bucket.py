"""A bucket on a GPU: packed by one launch, and its calls composed of the communicator's collectives.

Nothing here waits for the GPU, unless the ranks have met step by step (csrc/README.md, D1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pycoll import _C
from pycoll.buckets.bucket import Bucket, Waitable
from pycoll.communicator import Communicator
from pycoll.fused_step import fused_step


class _Then:
    """A call, and what follows it on the current stream of whoever waits for it."""

    def __init__(self, work: Waitable, follow: Callable[[], None]) -> None:
        self._work, self._follow = work, follow

    def wait(self) -> None:
        self._work.wait()
        self._follow()


class DeviceBucket(Bucket):
    """Gradients of parameters on a GPU.

    Wires are added in rank order, in fp32; one of 16 bits takes the average, too, rounded once, and so differs from the
    CPU's. `tag` is not compared: ranks in different passes, whose calls are alike, are not told.
    """

    def __init__(self, params: Sequence[Tensor], communicator: Communicator, wire_dtype: torch.dtype) -> None:
        super().__init__(params, communicator, wire_dtype)
        self._average: Tensor | None = None  # of this rank's shard
        self._received: Tensor | None = None  # wires of all ranks, for int8

    def views(self, flat: Tensor) -> list[Tensor]:
        """As Bucket.views; but saving one saves all of `flat`."""
        return [
            flat.as_strided(param.shape, param.stride(), flat.storage_offset() + first).data  # with its own version
            if param.numel()
            else flat.new_empty(param.shape)
            for param, first in zip(self.params, self.firsts, strict=True)
        ]

    def reduce(self, squares: Tensor, tag: int, *, async_op: bool) -> Waitable:
        """As Bucket.reduce."""

        def follow() -> None:
            if received is not None:
                _C.average_int8(received, self.gradients)
            elif self.wire is not self.gradients:
                self.gradients.copy_(self.wire)
            squares.copy_(_C.sum_of_squares([self.gradients[self.own]]))

        received = self._room(self.communicator.world_size)
        if received is not None:
            work = self.communicator.all_gather(self.wire, out=received, async_op=True)
        else:  # two-shot adds in the order of reduce-scatter, whatever the size
            work = self.communicator.all_reduce(self.wire, "avg", algorithm="two_shot", async_op=True)
        return _begun(_Then(work, follow), async_op)

    def measure(self, squares: Tensor, tag: int, *, async_op: bool) -> Waitable:
        """As Bucket.measure; the average of this rank's shard stays for `update`."""
        return _begun(self._average_shard(squares), async_op)

    def update(
        self,
        tag: int,
        params: Tensor,
        state: Mapping[str, Tensor],
        segments: Tensor,
        steps: Tensor,
        used: Tensor,
        groups: Sequence[Mapping[str, Any]],
        *,
        clip: Tensor | None,
        found_inf: Tensor | None,
        averaged: bool,
    ) -> None:
        """As Bucket.update, but ranks do not compare their settings. A launch for each group of parameters."""
        if not averaged:
            self._average_shard(None).wait()
        average = self._average
        assert average is not None, "it has been measured"
        own, step_of = params[self.own], steps.unbind()
        rows = list(zip(segments.tolist(), used.tolist(), step_of, strict=True))
        for number, group in enumerate(groups):
            # Also those of which this rank has nothing: their steps count.
            mine = [
                (*self._in_shard(begin, count, first), step)
                for (begin, count, first, its), use, step in rows
                if use and its == number
            ]
            if not mine:
                continue
            wanted = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
            wanted += ["master_param"] * (group["master_weights"] and "master_param" in state)
            fused_step(
                group,
                [own[part] for part, _, _ in mine],
                [average[part] for part, _, _ in mine],
                [{name: state[name][part] for name in wanted} for part, _, _ in mine],
                [step for _, _, step in mine],
                [first for _, first, _ in mine],
                clip=clip,
                found_inf=found_inf,
            )
        self.communicator.all_gather(own, out=params)

    def _average_shard(self, squares: Tensor | None) -> Waitable:
        """Into `_average`, and the sum of its squares into `squares`."""

        def follow() -> None:
            if received is not None:
                _C.average_int8(received, average)
            if squares is not None:
                squares.copy_(_C.sum_of_squares([average]))

        received = self._room(1)
        if self._average is None:
            dtype = self.wire.dtype if received is None else torch.float32
            self._average = torch.empty(self.size // self.communicator.world_size, dtype=dtype, device=self.device)
        average = self._average
        if received is not None:
            work = self.communicator.all_to_all(self.wire, out=received, async_op=True)
        else:
            work = self.communicator.reduce_scatter(self.wire, "avg", out=average, async_op=True)
        return _Then(work, follow)

    def _in_shard(self, begin: int, count: int, first: int) -> tuple[slice, int]:
        """Elements of the bucket that are in this rank's shard, counted there; the index of their first among all."""
        start = min(max(begin, self.own.start), self.own.stop)
        stop = max(start, min(begin + count, self.own.stop))
        return slice(start - self.own.start, stop - self.own.start), first + max(start - begin, 0)

    def _room(self, wires: int) -> Tensor | None:
        """For so many wires of int8; None for others, which collectives can add."""
        if self.wire_name != "int8":
            return None
        size = wires * len(self.wire)
        if self._received is None or len(self._received) < size:
            self._received = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self._received[:size]


def _begun(call: Waitable, async_op: bool) -> Waitable:
    if not async_op:
        call.wait()
    return call
