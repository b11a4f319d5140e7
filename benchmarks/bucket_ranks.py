"""A rank of `pycoll bench buckets`: pycoll, torch and copies in one process. Argument: a file to meet.

A contender's `algorithm` is its case: "pack GRADIENT as WIRE", or "reduce WIRE". The size is that of the bucket's
elements in fp32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pycoll import Communicator
from pycoll.buckets import WIRES, Bucket
from pycoll.buckets.bucket import FLOATS, INT8_UNIT_BYTES, UNIT

from . import ranks
from .report import CEILING
from .torch_ranks import facts, serve

TENSORS = 8  # of gradients, in a bucket
PYCOLL, MEASURE, FOREACH, COMPRESS = "pycoll", "pycoll, measure", "torch foreach copy", "torch compress hook"
ALL_REDUCE, SYMMETRIC, GLOO = "pycoll all_reduce", "pycoll all_reduce, symmetric", "Gloo all_reduce"

Make = Callable[[int], Callable[[], object]]  # (elements) -> the call


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


PACKS = {f"pack {_name(grad)} as {_name(wire)}": (grad, wire) for grad in FLOATS for wire in WIRES}
REDUCES = {f"reduce {_name(wire)}": wire for wire in WIRES}
CASES = (*PACKS, *REDUCES)


def wire_bytes(wire: torch.dtype, count: int) -> int:
    """Of so many elements as they travel."""
    return count * INT8_UNIT_BYTES // UNIT if wire == torch.int8 else count * wire.itemsize


def moved_bytes(case: str, who: str, count: int) -> int:
    """What must be read and written on a rank; with the residual in 8 bits, and without an all_reduce's norm."""
    if case in PACKS:
        grad, wire = PACKS[case]
        return count * grad.itemsize + wire_bytes(wire, count) + (8 * count if wire == torch.int8 else 0)
    return wire_bytes(REDUCES[case], count) + (0 if who == MEASURE else 4 * count)


def _gradients(grad: torch.dtype, count: int) -> list[Tensor]:
    values = torch.randn(2**16).to(grad)
    return [values.repeat(len(part) // len(values) + 1)[: len(part)] for part in torch.empty(count).chunk(TENSORS)]


def _bucket(comm: Communicator, grad: torch.dtype, wire: torch.dtype, count: int) -> tuple[Bucket, list[Tensor]]:
    """With its gradients, packed already."""
    grads = _gradients(grad, count)
    bucket = Bucket([nn.Parameter(torch.empty_like(each)) for each in grads], comm, wire)
    _pack(bucket, grads)
    return bucket, grads


def _pack(bucket: Bucket, grads: list[Tensor]) -> None:
    for param, grad in zip(bucket.params, grads, strict=True):
        param.grad = grad
    bucket.pack()


def _foreach(grad: torch.dtype, wire: torch.dtype, count: int) -> Callable[[], object]:
    """Casts while it copies."""
    grads = _gradients(grad, count)
    views = list(torch.zeros(count, dtype=wire).split([len(each) for each in grads]))
    return partial(torch._foreach_copy_, views, grads)


def _compress(world_size: int, grad: torch.dtype, wire: torch.dtype, count: int) -> Callable[[], object]:
    """DDP with one of torch's compress hooks: into its bucket, then cast and divided."""
    grads = _gradients(grad, count)
    flat = torch.zeros(count, dtype=grad)
    views = list(flat.split([len(each) for each in grads]))

    def call() -> None:
        torch._foreach_copy_(views, grads)
        flat.to(wire).div_(world_size)

    return call


def _copy(case: str, count: int) -> Callable[[], object]:
    """A copy that reads and writes as many bytes as the case must, together."""
    half = moved_bytes(case, PYCOLL, count) // 2
    return partial(torch.zeros(half, dtype=torch.uint8).copy_, torch.ones(half, dtype=torch.uint8))


def _all_reduce(
    call: Callable[[Tensor], object],
    allocate: Callable[[int, torch.dtype], Tensor],
    wire: torch.dtype,
    count: int,
) -> Callable[[], object]:
    """An all_reduce of what travels, and, but for 8 bits, torch's norm of it."""
    x = allocate(wire_bytes(wire, count) // wire.itemsize, wire).fill_(1)

    def measured() -> None:
        call(x)
        torch.linalg.vector_norm(x)

    return partial(call, x) if wire == torch.int8 else measured


def contenders(comm: Communicator, gloo: dist.ProcessGroup) -> dict[tuple[str, str], Make]:
    """By (who, case)."""
    made: dict[tuple[str, str], Make] = {}
    tags = itertools.count()

    def packs(grad: torch.dtype, wire: torch.dtype, count: int) -> Callable[[], object]:
        return partial(_pack, *_bucket(comm, grad, wire, count))

    def reduces(measures: bool, wire: torch.dtype, count: int) -> Callable[[], object]:
        bucket, _ = _bucket(comm, torch.float32, wire, count)
        squares, run = torch.zeros(1, dtype=torch.float64), bucket.measure if measures else bucket.reduce
        return lambda: run(squares, next(tags), async_op=False)

    def private(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype)

    for case, (grad, wire) in PACKS.items():
        made[PYCOLL, case] = partial(packs, grad, wire)
        if wire != torch.int8:
            made[FOREACH, case] = partial(_foreach, grad, wire)
        if wire in (torch.bfloat16, torch.float16):
            made[COMPRESS, case] = partial(_compress, comm.world_size, grad, wire)
    for case, wire in REDUCES.items():
        made[PYCOLL, case] = partial(reduces, False, wire)
        made[MEASURE, case] = partial(reduces, True, wire)
        made[ALL_REDUCE, case] = partial(_all_reduce, comm.all_reduce, private, wire)
        made[SYMMETRIC, case] = partial(_all_reduce, comm.all_reduce, comm.empty, wire)
        made[GLOO, case] = partial(_all_reduce, partial(dist.all_reduce, group=gloo), private, wire)
    for case in CASES:
        made[CEILING, case] = partial(_copy, case)
    return made


def bucket_rank(store: dist.Store, rank: int, world_size: int) -> ranks.Rank:
    """All of them."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    comm, gloo = Communicator.from_group(), dist.group.WORLD
    assert gloo is not None, "it was made"
    scratch = np.empty(1, np.float32)  # gradients are there already

    def factory(make: Make, count: int, dtype: str) -> ranks.Operation:
        return ranks.Operation(make(count), scratch, exact=False)

    made: dict[ranks.Key, ranks.Factory] = {
        (who, case, "private", "bucket"): partial(factory, make) for (who, case), make in contenders(comm, gloo).items()
    }
    return ranks.Rank(rank, world_size, made, comm.barrier, facts)


if __name__ == "__main__":
    serve(bucket_rank)
