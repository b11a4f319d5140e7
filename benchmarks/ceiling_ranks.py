"""A rank of the ceiling: the reads and writes of a two-shot all-reduce with no synchronization at all.

So no correct all-reduce can be faster on these cores. Symmetric: each rank reads its share of everybody's tensor, in
memory that all map, and writes the sum to its share of all of them. Private (staged): each rank also copies what others
reduce into a slot that they map, and their sums back out of theirs, through slots small enough to stay in cache.
Without synchronization the results are meaningless, and the accesses the same. It is done twice, by pycoll's kernels
and by torch's own operators, so that the ceiling depends on neither; reports take the faster.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from pycoll import _C

from . import ranks
from .memory import SLOT_BYTES, attach
from .torch_ranks import buffer_of, private, serve

Symmetric = Callable[[list[Tensor], int], Callable[[], object]]  # (tensors of all ranks, rank) -> the rank's part
Staged = Callable[
    [Tensor, list[Tensor], int], Callable[[], object]
]  # (the rank's tensor, slots of all ranks, rank) -> the rank's part


def _share(part: int, parts: int, count: int) -> slice:
    return slice(count * part // parts, count * (part + 1) // parts)


def _blocks(tensors: list[Tensor], elements: int) -> list[list[Tensor]]:
    """The tensors, of one length, cut into pieces of `elements`."""
    cut = [t.split(elements) for t in tensors]
    return [list(block) for block in zip(*cut, strict=True)]


def _reduce(target: Tensor, sources: list[Tensor]) -> None:
    """Sums `sources`, of which `target` may be the first, into `target`."""
    torch.add(sources[0], sources[1], out=target)
    for source in sources[2:]:
        target.add_(source)


def kernel_symmetric(tensors: list[Tensor], rank: int) -> Callable[[], None]:
    """As torch_symmetric, by pycoll's kernels."""
    return partial(_C.ceiling_symmetric, tensors, rank)


def kernel_staged(x: Tensor, slots: list[Tensor], rank: int) -> Callable[[], None]:
    """As torch_staged, by pycoll's kernels."""
    return partial(_C.ceiling_staged, x, slots, rank)


def torch_symmetric(tensors: list[Tensor], rank: int) -> Callable[[], None]:
    """This rank's part of an all-reduce over `tensors`, the mapped tensors of all ranks."""
    world = len(tensors)
    share = _share(rank, world, tensors[0].numel())
    elements = SLOT_BYTES // 4 // tensors[0].element_size()
    blocks = _blocks([t[share] for t in tensors], elements)
    work = [(block[rank], block[:rank] + block[rank + 1 :]) for block in blocks]

    def run() -> None:
        for own, others in work:
            _reduce(own, [own, *others])  # own first: later it is overwritten
            for other in others:
                other.copy_(own)

    return run


def torch_staged(x: Tensor, slots: list[Tensor], rank: int) -> Callable[[], None]:
    """This rank's part of an all-reduce of private tensors (its own is `x`) through the mapped `slots` of all ranks."""
    world = len(slots)
    places = [
        [slot.narrow(0, part * (slot.numel() // world), slot.numel() // world) for part in range(world)]
        for slot in slots
    ]
    work = []
    for block in x.split(places[0][0].numel() * world):
        parts = [block[_share(part, world, block.numel())] for part in range(world)]
        at = [[place[: part.numel()] for place, part in zip(rank_places, parts, strict=True)] for rank_places in places]
        publish = [(at[rank][p], parts[p]) for p in range(world) if p != rank]
        combine = [parts[r] if r == rank else at[r][rank] for r in range(world)]
        collect = [(parts[p], at[p][p]) for p in range(world) if p != rank]
        work.append((publish, at[rank][rank], combine, parts[rank], collect))

    def run() -> None:
        for publish, own_place, combine, own_part, collect in work:
            for target, source in publish:
                target.copy_(source)
            _reduce(own_place, combine)
            own_part.copy_(own_place)
            for target, source in collect:
                target.copy_(source)

    return run


def ceiling_rank(store: dist.Store, rank: int, world_size: int) -> ranks.Rank:
    """The ceilings, over the memory whose descriptors the driver has passed on."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)  # to start samples together
    maps = attach()

    def slots(dtype: str) -> list[Tensor]:
        kind = getattr(torch, dtype)
        return [torch.frombuffer(m, dtype=kind, count=SLOT_BYTES // kind.itemsize) for m in maps]

    def tensors(count: int, dtype: str) -> list[Tensor]:
        return [torch.frombuffer(m, dtype=getattr(torch, dtype), count=count, offset=SLOT_BYTES) for m in maps]

    def symmetric(make: Symmetric, count: int, dtype: str) -> ranks.Operation:
        shared = tensors(count, dtype)
        return ranks.Operation(make(shared, rank), buffer_of(shared[rank]), exact=False)

    def staged(make: Staged, count: int, dtype: str) -> ranks.Operation:
        x = private(count, dtype)
        return ranks.Operation(make(x, slots(dtype), rank), buffer_of(x), exact=False)

    contenders: dict[ranks.Key, ranks.Factory] = {
        ("ceiling", "kernels", "symmetric", "none"): partial(symmetric, kernel_symmetric),
        ("ceiling", "kernels", "private", "none"): partial(staged, kernel_staged),
        ("ceiling", "torch", "symmetric", "none"): partial(symmetric, torch_symmetric),
        ("ceiling", "torch", "private", "none"): partial(staged, torch_staged),
    }
    return ranks.Rank(rank, world_size, contenders, dist.barrier, lambda: {"slot bytes": SLOT_BYTES})


if __name__ == "__main__":
    serve(ceiling_rank)
