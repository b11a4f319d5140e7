"""pycoll.ddp_hook: torch's DistributedDataParallel with pycoll's wire formats."""

from collections.abc import Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from pycoll import _C
from pycoll.buckets import WIRES, Bucket
from pycoll.communicator import Communicator
from pycoll.errors import UnsupportedError, UsageError


class WireState:
    """What `ddp_hook` keeps from step to step: memory in which gradients travel, and what rounding took from them.

    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(pycoll.WireState(torch.bfloat16), pycoll.ddp_hook)
    """

    def __init__(
        self, wire_dtype: torch.dtype = torch.bfloat16, communicator: Communicator | dist.ProcessGroup | None = None
    ) -> None:
        """A call that all ranks make.

        Args:
            wire_dtype: float32, bfloat16, float16, or int8 with error feedback.
            communicator: of DDP's ranks; or DDP's process group; None: the default group.

        Raises:
            UsageError: another wire_dtype; or there is no process group.
        """
        if wire_dtype not in WIRES:
            raise UsageError(f"pycoll: gradients travel as {', '.join(map(str, WIRES))}, not as {wire_dtype}")
        self.wire_dtype = wire_dtype
        self.communicator = (
            communicator if isinstance(communicator, Communicator) else Communicator.from_group(communicator)
        )
        self._buckets: dict[int, tuple[list[int], Bucket]] = {}
        self._loaded: dict[str, Tensor] = {}

    def bucket_of(self, bucket: dist.GradBucket) -> Bucket:
        """Ours for one of DDP's, which divides parameters anew after its first step."""
        params = [id(param) for param in bucket.parameters()]
        known = self._buckets.get(bucket.index())
        if known is None or known[0] != params:
            known = params, Bucket([bucket.buffer()], self.communicator, self.wire_dtype)
            self._buckets[bucket.index()] = known
            residual, name = known[1].residual, f"ddp.{bucket.index()}"
            if residual is not None and name in self._loaded and self._loaded[name].shape == residual.shape:
                residual.copy_(self._loaded.pop(name))
        return known[1]

    def state_dict(self) -> dict[str, Tensor]:
        """As GradientBuckets.state_dict, but "ddp.I" of each bucket of DDP's; before the first step what was loaded."""
        kept = {f"ddp.{index}": bucket.residual for index, (_, bucket) in sorted(self._buckets.items())}
        return {name: residual for name, residual in (kept or self._loaded).items() if residual is not None}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """As GradientBuckets.load_state_dict, for the buckets to come.

        DDP divides parameters anew after its first backward pass: register the hook after it, and the buckets to come
        are those that were saved.
        """
        self._buckets.clear()
        self._loaded = dict(state_dict)


def ddp_hook(state: WireState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook of DistributedDataParallel: averages its bucket over the ranks, added in fp32.

    Args:
        state: of this model alone.
        bucket: float32, bfloat16 or float16, on the CPU.

    Returns:
        A future of the bucket's average, rounded to its dtype.

    Raises:
        UnsupportedError: gradients of another dtype or device.
    """
    buffer = bucket.buffer()
    if buffer.device.type != "cpu":
        raise UnsupportedError(f"pycoll: a gradient is on {buffer.device}: ddp_hook takes those on the CPU")
    ours = state.bucket_of(bucket)
    _C.pack([buffer], [buffer], [0], ours.wire_name, ours.wire, ours.residual, streams=ours.streams)
    work = cast(dist.Work, ours.reduce(torch.empty(1, dtype=torch.float64), bucket.index(), async_op=True))

    def take(reduced: torch.futures.Future[list[Tensor]]) -> Tensor:
        reduced.value()
        return buffer.copy_(ours.gradients[: buffer.numel()])

    averaged: torch.futures.Future[Tensor] = work.get_future().then(take)
    return averaged
