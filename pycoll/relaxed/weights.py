"""The weights that an optimizer updates, as ranks exchange them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pycoll.buckets.agreement import check
from pycoll.communicator import Communicator
from pycoll.errors import UsageError
from pycoll.sharded import ShardedAdam


class Weights:
    """Parameters of an optimizer that require a gradient, at the precision in which it keeps them.

    Attributes:
        params: in the order of the optimizer's groups.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, ShardedAdam):
            raise UsageError("pycoll: a ShardedAdam averages at every step: give a FusedAdam, or torch's optimizers")
        self.optimizer = optimizer
        self.params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
        if not self.params:
            raise UsageError("pycoll: no parameter requires a gradient")
        for param in self.params:
            check(param)

    def exact(self) -> list[Tensor]:
        """The fp32 masters of 16-bit parameters, where the optimizer has made them; else the parameters."""
        states = [self.optimizer.state.get(param, {}) for param in self.params]
        return [state.get("master_param", param) for param, state in zip(self.params, states, strict=True)]

    @torch.no_grad()
    def put(self, values: Sequence[Tensor]) -> None:
        """fp32 values in the shapes of the parameters; masters get them as they are, 16-bit parameters rounded."""
        for param, exact, value in zip(self.params, self.exact(), values, strict=True):
            param.copy_(value)
            if exact is not param:
                exact.copy_(value)

    @torch.no_grad()
    def begin_equal(self, communicator: Communicator) -> None:
        """All ranks' parameters become rank 0's. A collective call."""
        for param in self.params:
            communicator.broadcast(param)


def communicator_of(ranks: Communicator | dist.ProcessGroup | None) -> Communicator:
    """`ranks` itself, or a new communicator of the ranks of a process group; None: of the default group."""
    return ranks if isinstance(ranks, Communicator) else Communicator.from_group(ranks)
