"""Which rank does what: the ranks as a grid of pipeline stages x data-parallel ranks x tensor-parallel ranks.

Tensor-parallel ranks, who talk most, are neighbours; pipeline stages, who talk least, are farthest apart.
"""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from pycoll.buckets import ModelParts
from pycoll.communicator import Communicator
from pycoll.errors import UsageError
from pycoll.train.device import CPU


class Mesh:
    """The grid, and this rank's place, device and groups in it. A call that all ranks make; needs torch.distributed."""

    def __init__(self, tp: int, pp: int, device: torch.device = CPU) -> None:
        """Data-parallel ranks are what `tp` x `pp` leaves. Raises UsageError where that does not divide the ranks."""
        world = dist.get_world_size()
        if world % (tp * pp):
            raise UsageError(f"{world} ranks cannot be divided by --tp {tp} x --pp {pp}: start a multiple of {tp * pp}")
        self.dp, self.tp, self.pp = world // (tp * pp), tp, pp
        self.device = device
        """Where this rank computes."""
        self._grid = init_device_mesh(device.type, (pp, self.dp, tp), mesh_dim_names=("pp", "dp", "tp"))
        self.dp_rank, self.tp_rank, self.pp_rank = (self._grid.get_local_rank(name) for name in ("dp", "tp", "pp"))
        self.dp_group, self.tp_group, self.pp_group = (self._grid.get_group(name) for name in ("dp", "tp", "pp"))

    @property
    def divided(self) -> bool:
        """Whether a model lies on more than one rank."""
        return self.tp * self.pp > 1

    @cached_property
    def model_group(self) -> dist.ProcessGroup:
        """The ranks that hold the parts of this rank's copy of the model. A call that all ranks make the first time."""
        return self._grid["pp", "tp"]._flatten().get_group()

    def any(self, flag: bool) -> bool:
        """Whether the flag holds on any of the ranks that share a model; a call of all of them."""
        if not self.divided:
            return flag
        flags = torch.tensor(float(flag))  # on the CPU: nobody has to wait for a GPU
        dist.all_reduce(flags, group=self.model_group)
        return bool(flags > 0)

    def parts(self, copies: Callable[[Tensor], int]) -> ModelParts | None:
        """For the gradient buckets of this rank's part of the model; None where it is the whole."""
        return ModelParts(Communicator.from_group(self.model_group), copies) if self.divided else None
