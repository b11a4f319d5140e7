"""Every collective as the campaign draws it and makes it: one entry of OPERATIONS each.

To add one, write its plan (which part of whose input ends up where) and its two callers. What tensors hold is none of
its business: pycoll/faults/values.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pycoll.faults.calls import DTYPES, NEVER, REDUCED, Call, Piece, Plan
from pycoll.faults.values import Buffers, WrongValueError

OPS = ("sum", "avg", "min", "max", "product", "band", "bor", "bxor")
ALGORITHMS = ("auto", "one_shot", "two_shot", "ring", "tree")
LATE = 6  # calls that an asynchronous one may stay behind its wait

Planner = Callable[[Call, int, int], Plan]
"""Call, rank in the group, size of the group -> that rank's tensors."""
Caller = Callable[[Any, Call, Buffers], Any]
"""Makes the call on a Communicator, or on a process group. Returns what there is to wait for, if it is asynchronous."""


@dataclass(frozen=True)
class Operation:
    """A collective, or a message, and which traits its calls may have; `listed` through torch.distributed alone.

    Attributes:
        weight: how often it is drawn.
        apart: the fronts whose calls may have an output apart from the input.
        blocks: its largest tensor holds a block for each rank.
        pair: it is for two ranks of the group.
    """

    plan: Planner
    native: Caller
    c10d: Caller
    weight: int = 2
    reduces: bool = False
    rooted: bool = False
    algorithms: bool = False
    in_place: bool = True
    apart: tuple[str, ...] = ("native", "c10d")
    listed: bool = False
    uneven: bool = False
    blocks: bool = True
    pair: bool = False


# ---- which part of whose input ends up where ----


def _whole(call: Call, me: int, size: int) -> Plan:
    return Plan([call.count], [Piece(REDUCED, 0, call.count)])


def _to_root(call: Call, me: int, size: int) -> Plan:
    return _whole(call, me, size) if me == call.root else Plan([call.count], None)


def _from_root(call: Call, me: int, size: int) -> Plan:
    return Plan([call.count], [Piece(call.root, 0, call.count)], fill=me == call.root)


def _gathered(call: Call, me: int, size: int) -> Plan:
    return Plan([call.count], [Piece(r, 0, call.count) for r in range(size)])


def _gathered_on_root(call: Call, me: int, size: int) -> Plan:
    return _gathered(call, me, size) if me == call.root else Plan([call.count], None)


def _reduced_block(call: Call, me: int, size: int) -> Plan:
    return Plan([call.count] * size, [Piece(REDUCED, me * call.count, call.count)])


def _block_of_root(call: Call, me: int, size: int) -> Plan:
    return Plan([call.count] * size if me == call.root else [], [Piece(call.root, me * call.count, call.count)])


def _exchanged(call: Call, me: int, size: int) -> Plan:
    sent = [_splits(call, r, size) for r in range(size)]
    return Plan(sent[me], [Piece(r, sum(sent[r][:me]), sent[r][me]) for r in range(size)])


def _splits(call: Call, source: int, size: int) -> list[int]:
    """How many elements `source` sends to each rank in an all-to-all."""
    if not call.uneven:
        return [call.count] * size
    return [(source * 7 + target * 3 + call.index) % 4 * call.count // 3 for target in range(size)]


def _sent(call: Call, me: int, size: int) -> Plan:
    return Plan([call.count], None) if me == call.root else Plan([], [Piece(call.root, 0, call.count)])


def _nothing(call: Call, me: int, size: int) -> Plan:
    return Plan([], None)


# ---- the callers that are more than an expression ----


def _dist_op(call: Call) -> Any:
    return getattr(dist.ReduceOp, call.op.upper())


def _global(group: Any, rank: int) -> int:
    return dist.get_global_rank(group, rank)


def _native_all_to_all(comm: Any, call: Call, b: Buffers) -> Any:
    sent, received = (b.input_lengths, b.output_lengths) if call.uneven else ((), ())
    return comm.all_to_all(b.x, out=b.out, send_splits=sent, recv_splits=received, async_op=b.is_async)


def _native_message(comm: Any, call: Call, b: Buffers) -> Any:
    if b.x is not None:
        return (comm.isend if b.is_async else comm.send)(b.x, call.peer, tag=call.tag)
    asked = None if call.any_source else call.root
    result = (comm.irecv if b.is_async else comm.recv)(b.out, asked, tag=call.tag)
    return result if b.is_async else _check_source(call, result, call.root)


def _c10d_message(group: Any, call: Call, b: Buffers) -> Any:
    if b.x is not None:
        return (dist.isend if b.is_async else dist.send)(b.x, _global(group, call.peer), group=group, tag=call.tag)
    source = _global(group, call.root)
    asked = None if call.any_source else source
    result = (dist.irecv if b.is_async else dist.recv)(b.out, asked, group=group, tag=call.tag)
    return result if b.is_async else _check_source(call, result, source)


def _check_source(call: Call, said: object, source: int) -> None:
    if said != source:
        raise WrongValueError(f"{call}: received from rank {said} instead of {source}")


def _c10d_all_gather(group: Any, call: Call, b: Buffers) -> Any:
    if call.listed:
        return dist.all_gather(b.outs, b.x, group=group, async_op=b.is_async)
    return dist.all_gather_into_tensor(b.out, b.x, group=group, async_op=b.is_async)


def _c10d_reduce_scatter(group: Any, call: Call, b: Buffers) -> Any:
    if call.listed:
        return dist.reduce_scatter(b.out, b.xs, _dist_op(call), group=group, async_op=b.is_async)
    return dist.reduce_scatter_tensor(b.out, b.x, _dist_op(call), group=group, async_op=b.is_async)


def _c10d_all_to_all(group: Any, call: Call, b: Buffers) -> Any:
    if call.listed:
        return dist.all_to_all(b.outs, b.xs, group=group, async_op=b.is_async)
    received, sent = (b.output_lengths, b.input_lengths) if call.uneven else (None, None)
    return dist.all_to_all_single(b.out, b.x, received, sent, group=group, async_op=b.is_async)


OPERATIONS: dict[str, Operation] = {
    "all_reduce": Operation(
        _whole,
        lambda comm, c, b: comm.all_reduce(b.x, c.op, out=b.out, algorithm=c.algorithm, async_op=b.is_async),
        lambda group, c, b: dist.all_reduce(b.x, _dist_op(c), group=group, async_op=b.is_async),
        weight=6,
        reduces=True,
        algorithms=True,
        apart=("native",),
        blocks=False,
    ),
    "reduce": Operation(
        _to_root,
        lambda comm, c, b: comm.reduce(b.x, c.op, c.root, out=b.out, async_op=b.is_async),
        lambda group, c, b: dist.reduce(b.x, _global(group, c.root), _dist_op(c), group=group, async_op=b.is_async),
        reduces=True,
        rooted=True,
        apart=("native",),
        blocks=False,
    ),
    "broadcast": Operation(
        _from_root,
        lambda comm, c, b: comm.broadcast(b.x, c.root, async_op=b.is_async),
        lambda group, c, b: dist.broadcast(b.x, _global(group, c.root), group=group, async_op=b.is_async),
        rooted=True,
        apart=(),
        blocks=False,
    ),
    "all_gather": Operation(
        _gathered,
        lambda comm, c, b: comm.all_gather(b.x, out=b.out, async_op=b.is_async),
        _c10d_all_gather,
        listed=True,
    ),
    "gather": Operation(
        _gathered_on_root,
        lambda comm, c, b: comm.gather(b.x, c.root, out=b.out, async_op=b.is_async),
        lambda group, c, b: dist.gather(b.x, b.outs or None, _global(group, c.root), group=group, async_op=b.is_async),
        rooted=True,
        listed=True,
    ),
    "reduce_scatter": Operation(
        _reduced_block,
        lambda comm, c, b: comm.reduce_scatter(b.x, c.op, out=b.out, async_op=b.is_async),
        _c10d_reduce_scatter,
        reduces=True,
        listed=True,
    ),
    "scatter": Operation(
        _block_of_root,
        lambda comm, c, b: comm.scatter(b.x, c.root, out=b.out, async_op=b.is_async),
        lambda group, c, b: dist.scatter(b.out, b.xs or None, _global(group, c.root), group=group, async_op=b.is_async),
        rooted=True,
        listed=True,
    ),
    "all_to_all": Operation(
        _exchanged,
        _native_all_to_all,
        _c10d_all_to_all,
        in_place=False,
        listed=True,
        uneven=True,
    ),
    "barrier": Operation(
        _nothing,
        lambda comm, c, b: comm.barrier(async_op=b.is_async),
        lambda group, c, b: dist.barrier(group, async_op=b.is_async),
        weight=1,
        in_place=False,
    ),
    "message": Operation(
        _sent,
        _native_message,
        _c10d_message,
        weight=5,
        rooted=True,
        in_place=False,
        blocks=False,
        pair=True,
    ),
}


def draw_call(rng: random.Random, front: str, group: int, size: int, message_bytes: int, index: int, of: int) -> Call:
    """A random call no. `index` of `of` in a thread: about `message_bytes` in its largest tensor."""
    candidates = {name: o for name, o in OPERATIONS.items() if size > 1 or not o.pair}
    name = rng.choices(list(candidates), [o.weight for o in candidates.values()])[0]
    operation = OPERATIONS[name]
    native = front == "native"
    dtype = rng.choice([d for d in DTYPES if d != "complex64" or not operation.reduces])
    in_place = (operation.in_place and rng.random() < 0.4) or front not in operation.apart
    # gather and scatter of torch.distributed take lists alone.
    listed = operation.listed and not native and (operation.rooted or rng.random() < 0.4)
    root, peer = rng.sample(range(size), 2) if operation.pair else (rng.randrange(size), -1)
    any_source = operation.pair and rng.random() < 0.2
    return Call(
        group=group,
        operation=name,
        index=index,
        count=message_bytes // DTYPES[dtype].itemsize // (size if operation.blocks else 1),
        dtype=dtype,
        op=_draw_op(rng, DTYPES[dtype]) if operation.reduces else "",
        algorithm=rng.choice(ALGORITHMS) if operation.algorithms and native else "",
        root=root if operation.rooted else -1,
        peer=peer,
        tag=100 + index if any_source else index % 3,  # nobody else's message is for whoever asks not from whom
        any_source=any_source,
        in_place=in_place and not listed,
        symmetric=native and rng.random() < 0.4,
        strided=not (in_place and operation.blocks) and not listed and rng.random() < 0.1,
        listed=listed,
        uneven=operation.uneven and rng.random() < 0.6,
        wait=_draw_wait(rng, index, of),
    )


def _draw_op(rng: random.Random, dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return rng.choice(("sum", "min", "max", "product"))
    return rng.choice(OPS[:5] if dtype.is_floating_point else OPS)


def _draw_wait(rng: random.Random, index: int, of: int) -> int | None:
    if rng.random() < 0.65:
        return None
    return NEVER if rng.random() < 0.1 else min(index + rng.randint(1, LATE), of)
