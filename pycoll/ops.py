"""The collectives as operators for torch.compile and autograd: `torch.ops.pycoll.all_reduce(x, "sum", comm.name)`.

Importing this module, or naming `pycoll.ops`, registers them. Each operator takes tensors and the name of a
`pycoll.Communicator` of this process (`Communicator.name`), and returns a new tensor: none changes its arguments. They
do what the methods of the same names do, on CPU and CUDA tensors, and raise the same errors; operations, roots and
splits are given as there. All ranks must make the same calls in the same order, forward and backward.

torch.compile leaves none out, though its result be unused: they are registered as having effects. It keeps their order,
but for Inductor, which may reorder calls that do not depend on one another (up to torch 2.13 at least), on all ranks
alike where they compile the same graph. Where ranks use results differently, as those of `reduce` and `gather`, they
may not: what then comes is a MismatchError, never a wrong result.

Gradients are those of the sum of all ranks' losses, as those of torch.distributed.nn.functional: the derivative of a
collective is another one, which all ranks must come to. "min", "max", "product" and bitwise operations have none.

There is no operator for what has no result (barrier, send) or whose order against others matters more than its
arguments (recv).
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from pycoll.collectives import Op
from pycoll.communicator import named
from pycoll.errors import UnsupportedError

try:
    from torch._library.effects import EffectType
except ImportError:  # pragma: no cover - should it move, compilers may leave out what is unused; nothing else changes
    EffectType = None  # type: ignore[assignment, misc]


def _operator(fn: Callable[..., Tensor]) -> CustomOpDef:
    """`fn` as `torch.ops.pycoll.<its name>`."""
    operator = custom_op(f"pycoll::{fn.__name__}", mutates_args=())(fn)
    if EffectType is not None:
        operator.register_effect(EffectType.ORDERED)
    return operator


def _dense(x: Tensor, rows: int | None = None) -> Tensor:
    """Memory for a result: in the shape of `x`, or with so many rows."""
    return x.new_empty(x.shape if rows is None else (rows, *x.shape[1:]))


@_operator
def all_reduce(x: Tensor, op: str, name: str) -> Tensor:
    """The elementwise combination of all ranks' `x`."""
    return named(name).all_reduce(x, cast(Op, op), out=_dense(x))


@_operator
def reduce(x: Tensor, op: str, root: int, name: str) -> Tensor:
    """The same on rank `root`; zeros elsewhere."""
    comm = named(name)
    result = torch.zeros_like(x, memory_format=torch.contiguous_format)
    comm.reduce(x, cast(Op, op), root, out=result)
    return result


@_operator
def broadcast(x: Tensor, root: int, name: str) -> Tensor:
    """Rank `root`'s `x`."""
    return named(name).broadcast(x.clone(memory_format=torch.contiguous_format), root)


@_operator
def all_gather(x: Tensor, name: str) -> Tensor:
    """(n, ...) of each rank -> (world_size * n, ...), in rank order."""
    return named(name).all_gather(x)


@_operator
def gather(x: Tensor, root: int, name: str) -> Tensor:
    """(n, ...) of each rank -> (world_size * n, ...) on rank `root`; (0, ...) elsewhere."""
    gathered = named(name).gather(x, root)
    return _gathered(x, 0) if gathered is None else gathered


@_operator
def reduce_scatter(x: Tensor, op: str, name: str) -> Tensor:
    """(world_size * n, ...) -> (n, ...): this rank's block of the elementwise combination."""
    return named(name).reduce_scatter(x, cast(Op, op))


@_operator
def scatter(x: Tensor, rows: int, root: int, name: str) -> Tensor:
    """(world_size * rows, ...) on `root` -> (rows, ...) on each. Elsewhere `x`, (0, ...), says dtype and shape[1:]."""
    comm = named(name)
    return comm.scatter(x if comm.rank == root else None, root, out=_dense(x, rows))


@_operator
def all_to_all(x: Tensor, send_splits: list[int], recv_splits: list[int], name: str) -> Tensor:
    """(sum(send_splits), ...) -> (sum(recv_splits), ...): parts for this rank, in rank order. Empty: equal parts."""
    return named(name).all_to_all(x, send_splits=send_splits, recv_splits=recv_splits)


# Fake kernels: the shapes of results.


def _gathered(x: Tensor, ranks: int) -> Tensor:
    shape = tuple(x.shape) or (1,)
    return x.new_empty((ranks * shape[0], *shape[1:]))


@all_reduce.register_fake
@reduce.register_fake
@broadcast.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return _dense(x)


@all_gather.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return _gathered(x, named(name).world_size)


@gather.register_fake
def _(x: Tensor, root: int, name: str) -> Tensor:
    comm = named(name)
    return _gathered(x, comm.world_size if comm.rank == root else 0)


@reduce_scatter.register_fake
def _(x: Tensor, op: str, name: str) -> Tensor:
    world_size = named(name).world_size
    torch._check(x.dim() > 0 and x.shape[0] % world_size == 0, lambda: "pycoll: reduce_scatter needs equal blocks")
    return _dense(x, x.shape[0] // world_size)


@scatter.register_fake
def _(x: Tensor, rows: int, root: int, name: str) -> Tensor:
    return _dense(x, rows)


@all_to_all.register_fake
def _(x: Tensor, send_splits: list[int], recv_splits: list[int], name: str) -> Tensor:
    return _dense(x, sum(recv_splits) if recv_splits else None)


# Derivatives. Each gets the context, with the arguments after `x` in `arguments`, and the gradient of the result.


def _differentiable(operator: CustomOpDef, backward: Callable[[Any, Tensor], Tensor]) -> None:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shape, ctx.arguments = inputs[0].shape, inputs[1:]

    def run(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return backward(ctx, gradient), *(None for _ in ctx.arguments)

    operator.register_autograd(run, setup_context=setup)


def _averaged(gradient: Tensor, op: str, name: str) -> Tensor:
    """The gradient of a sum, scaled if it was an average."""
    if op not in ("sum", "avg"):
        raise UnsupportedError(f"pycoll: {op} among ranks has no derivative: only sum and avg do")
    return gradient if op == "sum" else gradient / named(name).world_size


def _all_reduce_backward(ctx: Any, gradient: Tensor) -> Tensor:
    op, name = ctx.arguments
    return all_reduce(_averaged(gradient, op, name), "sum", name)


def _reduce_backward(ctx: Any, gradient: Tensor) -> Tensor:
    op, root, name = ctx.arguments
    return broadcast(_averaged(gradient, op, name), root, name)


def _broadcast_backward(ctx: Any, gradient: Tensor) -> Tensor:
    root, name = ctx.arguments
    return reduce(gradient, "sum", root, name)


def _all_gather_backward(ctx: Any, gradient: Tensor) -> Tensor:
    (name,) = ctx.arguments
    return reduce_scatter(gradient, "sum", name).view(ctx.shape)


def _gather_backward(ctx: Any, gradient: Tensor) -> Tensor:
    root, name = ctx.arguments
    return scatter(gradient, ctx.shape[0] if ctx.shape else 1, root, name).view(ctx.shape)


def _reduce_scatter_backward(ctx: Any, gradient: Tensor) -> Tensor:
    op, name = ctx.arguments
    return all_gather(_averaged(gradient, op, name), name)


def _scatter_backward(ctx: Any, gradient: Tensor) -> Tensor:
    _, root, name = ctx.arguments
    gathered = gather(gradient, root, name)
    return gathered if named(name).rank == root else gradient.new_zeros(ctx.shape)


def _all_to_all_backward(ctx: Any, gradient: Tensor) -> Tensor:
    send_splits, recv_splits, name = ctx.arguments
    return all_to_all(gradient, recv_splits, send_splits, name)


_differentiable(all_reduce, _all_reduce_backward)
_differentiable(reduce, _reduce_backward)
_differentiable(broadcast, _broadcast_backward)
_differentiable(all_gather, _all_gather_backward)
_differentiable(gather, _gather_backward)
_differentiable(reduce_scatter, _reduce_scatter_backward)
_differentiable(scatter, _scatter_backward)
_differentiable(all_to_all, _all_to_all_backward)
