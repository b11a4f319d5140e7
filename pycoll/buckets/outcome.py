"""What the last pass has left: gradients, and, alike on all ranks, their squares and which there are (B3, B5, B6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pycoll import _C
from pycoll.buckets.bucket import Bucket
from pycoll.buckets.parts import ModelParts
from pycoll.communicator import Communicator
from pycoll.errors import UsageError

_Stamp = tuple[int, int] | None  # of a gradient: where it lies, and how often it has been changed
_Stamps = tuple[list[_Stamp], int]  # of all; and a sample of their values, since not every change is counted


class Outcome:
    """Of the last pass over some buckets.

    Attributes:
        sums: of squares, where each bucket's call leaves that of this rank's shard; shape (buckets,), fp64.
    """

    def __init__(self, buckets: Sequence[Bucket], communicator: Communicator, parts: ModelParts | None) -> None:
        self._buckets, self._communicator, self._parts = buckets, communicator, parts
        self._params = [param for bucket in buckets for param in bucket.params]
        # The sums, then for each parameter how many ranks have a gradient: one all-reduce adds both.
        self._shared = torch.zeros(len(buckets) + len(self._params), dtype=torch.float64, device=buckets[0].device)
        self.sums, self._counts = self._shared[: len(buckets)], self._shared[len(buckets) :]
        self._copies = parts.copies_of(buckets) if parts else None
        self._used: Tensor | None = None  # which of the counts are not 0, where that is known here
        self._measured: _Stamps | None = None  # the gradients as they were
        self._packed: _Stamps | None = self._stamps()  # none: not to step by

    @property
    def squares(self) -> Tensor | None:
        """`sums` over all ranks; None where the last pass has not measured, or gradients have been changed since."""
        return None if self._measured is None or self._measured != self._stamps() else self.sums

    @property
    def used(self) -> Tensor:
        """Whether some rank had a gradient, for each parameter, bucket by bucket; bool, on the CPU.

        On a GPU the host waits for it where this rank lacked one.
        """
        if self._used is None:
            self._used = self._counts.cpu() > 0
        return self._used

    def require_packed(self) -> None:
        """Nothing has happened to the gradients since they were packed.

        Raises:
            UsageError: as GradientBuckets.require_packed.
        """
        if self._packed is None:
            raise UsageError(
                "pycoll: gradients have not been averaged: the last backward pass was within no_sync(), or failed"
            )
        now = self._stamps()
        if self._buckets[0].wire_name == "float32":  # gradients are views of what travels
            same = [stamp and stamp[0] for stamp in now[0]] == [stamp and stamp[0] for stamp in self._packed[0]]
        else:
            same = now == self._packed
        if not same:
            raise UsageError(
                "pycoll: gradients have been changed or replaced since backward(), when they were packed to travel: "
                "scale the loss, or clip with the optimizer's clip_grad_norm, instead"
            )

    def begin(self) -> None:
        """A pass begins: of the one before nothing holds any more."""
        self._measured = self._packed = None

    def share(self, grads: Sequence[Tensor | None], *, everywhere: bool, measured: bool) -> None:
        """The pass ends: all ranks learn what each has found, and parameters get their gradients. A collective call.

        Args:
            grads: this rank's, of each parameter, bucket by bucket.
            everywhere: parameters get what lies in the buckets instead, wherever some rank has a gradient.
            measured: `sums` are of this pass.
        """
        here = torch.tensor([grad is not None for grad in grads])
        self._used = here if bool(here.all()) else None
        flags = here.double()
        self._counts.copy_(flags.pin_memory() if self._counts.is_cuda else flags, non_blocking=True)
        self._communicator.all_reduce(self._shared)
        if measured:
            self._add_parts_up()
        if everywhere:
            views = [view for bucket in self._buckets for view in bucket.gradient_views]
            grads = [view if used else None for view, used in zip(views, self.used.tolist(), strict=True)]
        for param, grad in zip(self._params, grads, strict=True):
            param.grad = grad
        self._packed = self._stamps()
        if measured:
            self._measured = self._packed

    def measure(self, tag: Callable[[int], int]) -> Tensor:
        """The `squares` of what has been packed; collective calls, with the `tag` of each bucket, where they are None.

        Raises:
            UsageError: as `require_packed`.
        """
        if self.squares is None:
            self.require_packed()
            for index, bucket in enumerate(self._buckets):
                bucket.measure(self.sums[index : index + 1], tag(index), async_op=False)
            self._communicator.all_reduce(self.sums)
            self._add_parts_up()
            self._measured = self._stamps()
        return self.sums

    def forget(self) -> None:
        """Drops all gradients."""
        for param in self._params:
            param.grad = None
        self._shared.zero_()
        self._used = torch.zeros(len(self._params), dtype=torch.bool)
        self._measured, self._packed = None, self._stamps()

    def _stamps(self) -> _Stamps:
        grads = [param.grad for param in self._params]
        stamps = [None if grad is None else (grad.data_ptr(), grad._version) for grad in grads]
        return stamps, _C.sample(grads)

    def _add_parts_up(self) -> None:
        if self._parts is not None and self._copies is not None:
            self._parts.add_up(self.sums, self._copies)
