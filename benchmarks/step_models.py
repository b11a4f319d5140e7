"""Who takes part in `pycoll bench step`: models whose backward pass costs nothing, and what trains them.

A gradient is there before the backward pass begins: a layer's backward returns it as a new tensor of the same memory
(`detach()`), which autograd takes for `grad` as it is, as it does with one that a kernel has just computed and nobody
else holds. (The persistent tensor itself, which others refer to, it would clone: a pass over memory for everybody.) So
what hooks, optimizers and clipping do to a gradient they do to that memory; it is written anew before each step.
Layers make a chain, so that the last one's gradients come first, as in training.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import pycoll

MAX_NORM = 1.0
LR = 1e-3
_LAYER = (3, 1, 4, 4)  # the tensors of a layer, by size: those of a transformer's block


Parts = dict[str, Callable[[], Any]]
"""Of a Trainer, by name, from `clip` on: what it does with gradients."""


def settings(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Of AdamW for a model of such tensors: eps is as large as a clipped gradient's elements.

    Smaller, and the size of gradients, so whether they were clipped, would not show in the parameters.
    """
    return {"lr": LR, "eps": MAX_NORM / sum(tensor.numel() for tensor in tensors) ** 0.5, "weight_decay": 1e-2}


class Refused(Exception):
    """Who takes no part, and why, in words."""


def sizes(parameters: int, tensors: int) -> list[int]:
    """Elements of each tensor: layers of four, the last tensor with what remains."""
    shares = [_LAYER[k % len(_LAYER)] for k in range(tensors)]
    found = [max(1, parameters * share // sum(shares)) for share in shares]
    return [*found[:-1], parameters - sum(found[:-1])]


class _Layer(torch.autograd.Function):
    """Passes x on; its backward pass is there already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grads: list[Tensor], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, *(each.detach() for each in ctx.grads)


class Model(nn.Module):
    """Parameters, the same on all ranks, whose gradients are `grads`."""

    def __init__(self, grads: list[Tensor]) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(0)
        # So small that what 16 bits round off is little beside a step.
        start = [1e-2 * torch.randn(len(grad), generator=make) for grad in grads]
        self.weights = nn.ParameterList(nn.Parameter(x.to(grad.dtype)) for x, grad in zip(start, grads, strict=True))
        self._grads = grads

    def forward(self, x: Tensor) -> Tensor:
        params = list(self.weights)
        for first in range(0, len(params), len(_LAYER)):
            layer = slice(first, first + len(_LAYER))
            x = _Layer.apply(x, self._grads[layer], *params[layer])
        return x


def nothing() -> None:
    """Where a contender has no such part."""


@dataclass
class Trainer:
    """A model and its optimizer. A step is `backward`, `clip`, `update` and `zero_grad`, after `forward`."""

    model: Model | None
    forward: Callable[[], Any]
    backward: Callable[[Any], object]
    clip: Callable[[], object] = nothing
    update: Callable[[], object] = nothing
    zero_grad: Callable[[], object] = nothing
    state: Callable[[], Iterable[Tensor]] = tuple

    def state_bytes(self) -> int:
        """Of moments and masters, on this rank."""
        return sum(tensor.nbytes for tensor in self.state() if tensor.dim())  # but for counts of steps


def _trainer(model: Model, through: Callable[[Tensor], Tensor], **parts: Any) -> Trainer:
    return Trainer(model, lambda: through(torch.zeros(())), Tensor.backward, **parts)


def backward_alone(grads: list[Tensor]) -> Trainer:
    """What all others do, too."""
    model = Model(grads)
    return _trainer(model, model, zero_grad=model.zero_grad)


def sharded(wire: torch.dtype, grads: list[Tensor]) -> Trainer:
    """pycoll.DataParallel and pycoll.ShardedAdam."""
    model = Model(grads)
    parallel = pycoll.DataParallel(model, wire_dtype=wire)
    return _trainer(model, parallel, **sharded_parts(parallel))


def sharded_parts(parallel: pycoll.DataParallel) -> Parts:
    """What a Trainer does with its gradients: pycoll.ShardedAdam."""
    params = list(parallel.parameters())
    optimizer = pycoll.ShardedAdam(params, buckets=parallel.buckets, **settings(params))
    return {
        "clip": lambda: optimizer.clip_grad_norm(MAX_NORM),
        "update": optimizer.step,
        "zero_grad": optimizer.zero_grad,
        "state": lambda: [tensor for shard in optimizer._shards for tensor in shard.state.values()],
    }


def fused(grads: list[Tensor]) -> Trainer:
    """pycoll.DataParallel and pycoll.FusedAdam."""
    model = Model(grads)
    parallel = pycoll.DataParallel(model)
    optimizer = pycoll.FusedAdam(parallel.parameters(), **settings(grads))
    return _trainer(
        model,
        parallel,
        clip=lambda: optimizer.clip_grad_norm(MAX_NORM),
        update=optimizer.step,
        zero_grad=optimizer.zero_grad,
        state=lambda: _state_of(optimizer),
    )


Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Hook = Callable[[DistributedDataParallel], object]


def ddp(
    group: dist.ProcessGroup | None,
    optimizer: Optimizer,
    grads: list[Tensor],
    views: bool = True,
    hook: Hook = lambda model: None,
) -> Trainer:
    """torch's DistributedDataParallel, clip_grad_norm_ and an optimizer; of 16-bit parameters on masters by hand.

    Args:
        group: None: the default group.
        optimizer: of the parameters, or of their masters.
        views: DDP's gradient_as_bucket_view, which its documentation recommends.
        hook: registers DDP's communication hook.
    """
    model = Model(grads)
    parallel = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=views)
    hook(parallel)
    params: list[nn.Parameter] = list(model.weights)
    if grads[0].dtype == torch.float32:
        return _trainer(model, parallel, **torch_parts(params, optimizer))
    masters = [nn.Parameter(param.detach().float()) for param in params]
    for master in masters:
        master.grad = torch.zeros_like(master)
    made = optimizer(masters)

    @torch.no_grad()
    def clip_masters() -> None:
        torch._foreach_copy_(_grads_of(masters), _grads_of(params))
        nn.utils.clip_grad_norm_(masters, MAX_NORM)

    @torch.no_grad()
    def update_masters() -> None:
        made.step()
        torch._foreach_copy_([*params], [*masters])

    return _trainer(
        model,
        parallel,
        clip=clip_masters,
        update=update_masters,
        zero_grad=parallel.zero_grad,
        state=lambda: [*_state_of(made), *masters],
    )


def torch_parts(params: list[nn.Parameter], optimizer: Optimizer) -> Parts:
    """What a Trainer does with fp32 gradients: clip_grad_norm_ and an optimizer of torch's."""
    made = optimizer(params)
    return {
        "clip": lambda: nn.utils.clip_grad_norm_(params, MAX_NORM),
        "update": made.step,
        "zero_grad": made.zero_grad,
        "state": lambda: _state_of(made),
    }


def torch_fused(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, fused=True, **settings(params))


def zero(group: dist.ProcessGroup | None) -> Optimizer:
    """torch's ZeroRedundancyOptimizer of the fused AdamW."""
    return lambda params: ZeroRedundancyOptimizer(
        params, torch.optim.AdamW, process_group=group, parameters_as_bucket_view=True, fused=True, **settings(params)
    )


def deepspeed(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """DeepSpeed's CPUAdam, as AdamW.

    Raises:
        Refused: it is not installed, or cannot be built here.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise Refused("not installed")
    try:
        made = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam(params, **settings(params))
    except Exception as error:  # it compiles itself, with what it finds
        raise Refused(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    assert isinstance(made, torch.optim.Optimizer)
    return made


def bf16_hook(group: dist.ProcessGroup | None) -> Hook:
    """torch's, of halving what travels, by another name: DDP refuses its own without a GPU, where it works as well."""

    def register(model: DistributedDataParallel) -> None:
        model.register_comm_hook(group, lambda group, bucket: bf16_compress_hook(group, bucket))

    return register


def pycoll_bf16_hook(model: DistributedDataParallel) -> None:
    """pycoll's."""
    model.register_comm_hook(pycoll.WireState(torch.bfloat16), pycoll.ddp_hook)


def _state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of its state on this rank."""
    own = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    return [value for state in own.state.values() for value in state.values() if isinstance(value, Tensor)]


def _grads_of(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]
