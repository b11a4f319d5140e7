"""What is drawn at random (dropout) on ranks that have parts of one model.

Their global generators are in step: all are seeded alike, and draw as often. So dropout of what all ranks have drops
the same on each, by itself. What is divided, each rank draws for its own part: within `different_draws`, after which
the generators are in step again. Megatron-LM keeps a second generator for that (CudaRNGStatesTracker); here its seed
is drawn from the global one, so that there is no state beside it: whoever restores that one, as
torch.utils.checkpoint does before it computes activations again, gets the same draws again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pycoll.tensor_parallel.functions import ranks_of


@contextmanager
def different_draws(group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within the block the global generator of `device` draws differently on each rank of `group`.

    Afterwards it is on all of them as if the block had drawn nothing, but for the seeds, which come from the CPU's.
    """
    n, rank = ranks_of(group)
    seeds = torch.randint(2**63 - 1, (n,), device="cpu")
    generator = _generator(torch.device(device))
    state = generator.get_state()
    generator.manual_seed(int(seeds[rank]))
    try:
        yield
    finally:
        generator.set_state(state)


class DifferentDraws(nn.Module):
    """Calls a module that has no parameters (a dropout, attention) within different_draws, in training."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.module, self.group = module, group

    def forward(self, x: Tensor, *others: Any) -> Any:
        """What the module returns."""
        if not self.module.training:
            return self.module(x, *others)
        with different_draws(self.group, x.device):
            return self.module(x, *others)


def _generator(device: torch.device) -> torch.Generator:
    """The global one."""
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
