"""pycoll.DataParallel: a module whose gradients are averaged over the ranks, in buckets that they all reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pycoll.buckets import GradientBuckets, ModelParts
from pycoll.communicator import Communicator
from pycoll.errors import UsageError


class DataParallel(nn.Module):
    """Trains one model on all ranks: `model = pycoll.DataParallel(model)`, and the loop stays as it was.

    Parameters and buffers begin as rank 0's. When `backward()` returns, the gradients are averages over the ranks:
    `buckets`, a `pycoll.GradientBuckets`, says how. The wrapped model is `module`, whose state_dict and parameters are
    untouched; pycoll.FusedAdam, which takes fp32 gradients of 16-bit parameters, is the optimizer made for it, and
    `pycoll.ShardedAdam(model.parameters(), buckets=model.buckets)` divides its state by the ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        communicator: Communicator | dist.ProcessGroup | None = None,
        *,
        wire_dtype: torch.dtype = torch.float32,
        bucket_bytes: int | None = None,
        broadcast_buffers: bool = True,
        parts: ModelParts | None = None,
    ) -> None:
        """A call that all ranks make.

        Args:
            module: on the CPU or on one GPU; its parameters that require a gradient are float32, bfloat16 or float16.
            communicator: of the ranks that train together; or a process group, whose ranks make a communicator of their
                own; None: the default group's.
            wire_dtype: how gradients travel: float32, bfloat16, float16, or int8 with error feedback.
            bucket_bytes: see GradientBuckets.
            broadcast_buffers: before each forward pass in training that gradients follow, buffers (a BatchNorm's
                averages) become rank 0's.
            parts: where the module is a part of a model, whose other parts lie on other ranks (tensor parallel).

        Raises:
            UsageError: the models of the ranks differ in shapes or dtypes, or nothing requires a gradient.
            UnsupportedError: a parameter of another dtype, device or layout.
        """
        super().__init__()
        self.module = module
        self.communicator = (
            communicator if isinstance(communicator, Communicator) else Communicator.from_group(communicator)
        )
        self.buckets = GradientBuckets(
            module.parameters(), self.communicator, wire_dtype=wire_dtype, bucket_bytes=bucket_bytes, parts=parts
        )
        self._broadcasts = broadcast_buffers
        with torch.no_grad():
            for param in module.parameters():
                self.communicator.broadcast(param)
        self._broadcast_buffers()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        synchronizes = self.buckets.synchronizes
        if self._broadcasts and self.training and torch.is_grad_enabled() and synchronizes:
            self._broadcast_buffers()
        output = self.module(*args, **kwargs)
        if torch.is_grad_enabled():
            for leaf in _tensors(output):
                if leaf.grad_fn is not None:  # else it is no result: its hooks would stay
                    # The pass begins here, not in a checkpoint's pass within it, which ends early. As in torch's DDP,
                    # whether it synchronizes is what held in the forward pass.
                    leaf.register_hook(partial(self._begin_pass, synchronizes))
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Forward passes within it have backward passes that add up gradients on each rank; the next averages them.

        All ranks must do the same passes within it.
        """
        with self.buckets.no_sync():
            yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.nn.Module.zero_grad."""
        if set_to_none:
            self.buckets.forget()
        super().zero_grad(set_to_none)

    @property
    def require_backward_grad_sync(self) -> bool:
        """As torch's DDP has it, for trainers that set it instead of using no_sync()."""
        return self.buckets.synchronizes

    @require_backward_grad_sync.setter
    def require_backward_grad_sync(self, synchronizes: bool) -> None:
        self.buckets.synchronizes = synchronizes

    def __reduce__(self) -> str:
        raise UsageError("pycoll: a DataParallel cannot be copied or saved: copy its .module, or save its state_dict()")

    def _begin_pass(self, synchronizes: bool, _: Tensor) -> None:
        self.buckets.begin_pass(synchronizes)

    @torch.no_grad()
    def _broadcast_buffers(self) -> None:
        for buffer in self.module.buffers():
            self.communicator.broadcast(buffer)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Those that a forward pass has returned, in whatever."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, field.name) for field in fields(leaf)])
