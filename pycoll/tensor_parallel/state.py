"""How parameters are split over the ranks, and their state_dict made whole again.

A parameter that is split carries a `Split`; all others are the same on all ranks. The functions here need no more than
the parameter, which knows its group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pycoll.errors import UsageError
from pycoll.tensor_parallel.functions import ranks_of, stacked

_ATTRIBUTE = "pycoll_split"


@dataclass(frozen=True)
class Split:
    """How a tensor is split: each of `parts` equal parts of one dimension into a block for each rank.

    Attributes:
        dim: the dimension, from 0.
        size: what the whole tensor has of it, without padding.
        group: of the ranks; None: the default group.
        parts: 3 of a fused query, key and value, where each rank has heads of all three.
        pads: the last ranks have zeros at the end where the size does not divide.

    Raises UsageError where it must divide, and does not.
    """

    dim: int
    size: int
    group: dist.ProcessGroup | None
    parts: int = 1
    pads: bool = False

    def __post_init__(self) -> None:
        n, _ = ranks_of(self.group)
        if self.size % (self.parts * n) and not self.pads:
            parts = f" in {self.parts} parts" if self.parts > 1 else ""
            raise UsageError(
                f"pycoll: {self.size} features{parts} do not divide by {n} ranks: make it a multiple of "
                f"{self.parts * n}, or take fewer ranks"
            )

    def take(self, whole: Tensor) -> Tensor:
        """This rank's block, in new memory."""
        n, rank = ranks_of(self.group)
        if missing := -self.size % (self.parts * n):
            whole = F.pad(whole, [0, 0] * (whole.dim() - 1 - self.dim) + [0, missing])
        blocks = whole.unflatten(self.dim, (self.parts, n, -1)).select(self.dim + 1, rank)
        return blocks.flatten(self.dim, self.dim + 1).clone(memory_format=torch.contiguous_format)

    def merge(self, local: Tensor) -> Tensor:
        """The whole tensor of all ranks' blocks. A collective call."""
        dim = self.dim
        blocks = stacked(local, self.group).unflatten(dim + 1, (self.parts, -1))  # (n, ..., parts, block, ...)
        return blocks.movedim(0, dim + 1).flatten(dim, dim + 2).narrow(dim, 0, self.size).contiguous()


def split_parameter(whole: Tensor, split: Split) -> nn.Parameter:
    """This rank's block of a whole parameter, as one that says how it is split."""
    param = nn.Parameter(split.take(whole.detach()), whole.requires_grad)
    setattr(param, _ATTRIBUTE, split)
    return param


def split_of(param: object) -> Split | None:
    """How it is split; None: it is the same on all ranks."""
    return getattr(param, _ATTRIBUTE, None)


def is_split(param: Tensor) -> bool:
    """Whether each rank has a block of the parameter alone: all of them count in a norm, of the others one."""
    return split_of(param) is not None


def split_tensor(param: Tensor, whole: Tensor) -> Tensor:
    """This rank's block of a tensor (a moment, a master) in the shape of the whole parameter that `param` is a block
    of; the tensor itself where `param` is the same on all ranks.

    Raises:
        UsageError: the tensor has another shape than the whole parameter.
    """
    split = split_of(param)
    expected = [*param.shape]
    if split is not None:
        expected[split.dim] = split.size
    if [*whole.shape] != expected:
        raise UsageError(f"pycoll: the tensor is {tuple(whole.shape)}, the whole parameter {tuple(expected)}")
    return whole if split is None else split.take(whole)


def merge_tensor(param: Tensor, local: Tensor) -> Tensor:
    """The reverse: the whole tensor, of the blocks that all ranks have. A collective call.

    Raises:
        UsageError: the tensor has another shape than `param`.
    """
    if local.shape != param.shape:
        raise UsageError(f"pycoll: the tensor is {tuple(local.shape)}, the parameter {tuple(param.shape)}")
    split = split_of(param)
    return local if split is None else split.merge(local)


def full_state_dict(module: nn.Module) -> dict[str, Any]:
    """The state_dict of the module as it was before it was split, on every rank. A collective call."""
    return {
        name: merge_tensor(value, value.detach()) if isinstance(value, Tensor) else value
        for name, value in module.state_dict(keep_vars=True).items()
    }


def load_full_state_dict(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Takes this rank's blocks of a `full_state_dict`, or of the state_dict of a module that is not split.

    Raises:
        UsageError: a tensor has another shape.
        RuntimeError: the names differ.
    """
    own = module.state_dict(keep_vars=True)
    module.load_state_dict(
        {
            name: split_tensor(own[name], value) if isinstance(own.get(name), Tensor) else value
            for name, value in state.items()
        }
    )
