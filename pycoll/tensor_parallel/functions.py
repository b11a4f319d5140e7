"""Collectives within autograd: three pairs of linear maps, each the derivative (the adjoint) of the other.

    copy          identity                            reduce          the ranks' sum
    split         this rank's block of a dimension    gather          the ranks' blocks, one after another
    all_gather    the same as gather                  reduce_scatter  this rank's block of the ranks' sum

Two of them gather, since what comes back differs. After `gather` all ranks go on alike, and have the same gradient:
each takes its block of it. After `all_gather` each does something else with the whole, and has a part of its gradient:
a block's gradient is a sum. In Megatron-LM copy is f, reduce its conjugate; all_gather and reduce_scatter are g.

None changes its argument; results are new, contiguous tensors (those of the copies are views). Derivatives of any order
exist. `group` is a torch.distributed process group, None the default one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pycoll.errors import UsageError

# torch 2.13 has given them new names and warns of the old ones.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_Map = Callable[[Tensor], Tensor]


def ranks_of(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """How many ranks the group has, and which of them this is. Raises UsageError where it is none of them."""
    rank = dist.get_rank(group)
    if rank < 0:
        raise UsageError("pycoll: this rank is not in the group: only those that are may call it")
    return dist.get_world_size(group), rank


def copy(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """`x`, the same on all ranks, where each goes on with a part of the work: their gradients are added up."""
    return _Linear.apply(x, _identity, partial(_sum, group))


def reduce(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of all ranks' `x`, on all of them."""
    return _Linear.apply(x, partial(_sum, group), _identity)


def split(x: Tensor, group: dist.ProcessGroup | None = None, dim: int = -1) -> Tensor:
    """This rank's block of dimension `dim`, where `x` is the same on all ranks.

    Raises:
        UsageError: the dimension does not divide by the ranks.
    """
    return _Linear.apply(x, partial(_cut, group, dim), partial(_join, group, dim))


def gather(x: Tensor, group: dist.ProcessGroup | None = None, dim: int = -1) -> Tensor:
    """All ranks' blocks of dimension `dim`, where all go on alike."""
    return _Linear.apply(x, partial(_join, group, dim), partial(_cut, group, dim))


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None, dim: int = -2) -> Tensor:
    """All ranks' blocks of dimension `dim`, where each goes on with a part of the work; by default a sequence's tokens,
    (B, T / n, D) -> (B, T, D)."""
    return _Linear.apply(x, partial(_join, group, dim), partial(_sum_and_cut, group, dim))


def reduce_scatter(x: Tensor, group: dist.ProcessGroup | None = None, dim: int = -2) -> Tensor:
    """This rank's block of the sum of all ranks' `x`; by default of a sequence's tokens, (B, T, D) -> (B, T / n, D).

    Raises:
        UsageError: the dimension does not divide by the ranks.
    """
    return _Linear.apply(x, partial(_sum_and_cut, group, dim), partial(_join, group, dim))


def copy_together(xs: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """`copy` of several small tensors of one dtype, which do go to new memory, so that one call adds their gradients
    up."""
    if not xs:
        return []
    parts = copy(torch.cat([x.flatten() for x in xs]), group).split([x.numel() for x in xs])
    return [part.view(x.shape) for part, x in zip(parts, xs, strict=True)]


def enter(x: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """What all ranks read, each for its part of the work: `copy`, or all_gather of the tokens."""
    return all_gather(x, group) if sequence_parallel else copy(x, group)


def leave(x: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """What their parts add up to: `reduce`, or reduce_scatter of the tokens."""
    return reduce_scatter(x, group) if sequence_parallel else reduce(x, group)


def stacked(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(...) -> (n, ...): all ranks' `x`, without a derivative."""
    n, _ = ranks_of(group)
    gathered = x.new_empty((n, x.numel()))
    _all_gather_single(gathered.view(-1), x.contiguous().view(-1), group=group)
    return gathered.view(n, *x.shape)


class _Linear(torch.autograd.Function):
    """A linear map whose adjoint is the other one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: _Map, back: _Map) -> Tensor:
        ctx.maps = back, there
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Linear.apply(grad, *ctx.maps), None, None


def _identity(x: Tensor) -> Tensor:
    return x


def _sum(group: dist.ProcessGroup | None, x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _blocks(group: dist.ProcessGroup | None, dim: int, x: Tensor) -> Tensor:
    """(..., n * m, ...) -> (n, ..., m, ...): the ranks' blocks of dimension `dim`."""
    n, _ = ranks_of(group)
    if x.shape[dim] % n:
        raise UsageError(
            f"pycoll: dimension {dim} of {tuple(x.shape)} does not divide by {n} ranks: give a multiple of {n} "
            "(tokens of a sequence, with sequence_parallel)"
        )
    return x.unflatten(dim, (n, -1)).movedim(dim % x.dim(), 0)


def _cut(group: dist.ProcessGroup | None, dim: int, x: Tensor) -> Tensor:
    return _blocks(group, dim, x)[dist.get_rank(group)].clone(memory_format=torch.contiguous_format)


def _join(group: dist.ProcessGroup | None, dim: int, x: Tensor) -> Tensor:
    dim %= x.dim()
    # One call; it is a copy besides where more than one row lies before `dim`.
    return stacked(x, group).movedim(0, dim).flatten(dim, dim + 1).contiguous()


def _sum_and_cut(group: dist.ProcessGroup | None, dim: int, x: Tensor) -> Tensor:
    blocks = _blocks(group, dim, x).contiguous()
    own = torch.empty_like(blocks[0])
    _reduce_scatter_single(own.view(-1), blocks.view(-1), group=group)
    return own
