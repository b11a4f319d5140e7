"""Every collective of torch.distributed over pycoll, beside what it ought to give: sync, async, coalesced, uneven."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from groups import run
from torch import Tensor

import pycoll
from pycoll.testing import Rank

pytestmark = pytest.mark.timeout(120)

OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "product": dist.ReduceOp.PRODUCT,
}
MOVED = (torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64)
COUNTS = (0, 1, 501, 70_001)


def done(work: Any) -> None:
    if work is not None:
        work.wait()


def given(world_size: int, count: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """One tensor of any dtype a rank."""
    if dtype == torch.bool:
        return [x > 0 for x in reference.inputs(world_size, count, torch.float32, seed)]
    if dtype.is_complex:
        return [torch.view_as_complex(x) for x in reference.inputs(world_size, (count, 2), torch.float32, seed)]
    return reference.inputs(world_size, count, dtype, seed)


def moves() -> Iterator[tuple[torch.dtype, int, bool]]:
    return itertools.product(MOVED, COUNTS, (False, True))


def _reduce(rank: Rank) -> None:
    for (op, dtype), count, async_op in itertools.product(
        [*((op, torch.float32) for op in OPS), *(("sum", dtype) for dtype in reference.DTYPES)], COUNTS, (False, True)
    ):
        for root in {0, rank.world_size - 1}:
            inputs = reference.inputs(rank.world_size, count, dtype, seed=root)
            x = inputs[rank.rank].clone()
            done(dist.reduce(x, root, OPS[op], async_op=async_op))
            if rank.rank == root:
                reference.check(x, inputs, op, (op, dtype, count, root))
            else:
                assert torch.equal(x, inputs[rank.rank]), "only the root's is written"


def _gather(rank: Rank) -> None:
    for dtype, count, async_op in moves():
        root = count % rank.world_size
        inputs = given(rank.world_size, count, dtype)
        if rank.rank != root:
            done(dist.gather(inputs[rank.rank], None, root, async_op=async_op))
            continue
        separate = [torch.empty_like(inputs[0]) for _ in inputs]
        done(dist.gather(inputs[rank.rank], separate, root, async_op=async_op))
        assert all(torch.equal(a, b) for a, b in zip(separate, inputs, strict=True)), (dtype, count)


def _scatter(rank: Rank) -> None:
    for dtype, count, async_op in moves():
        root = count % rank.world_size
        inputs = given(rank.world_size, count, dtype)
        x = torch.empty_like(inputs[0])
        done(dist.scatter(x, inputs if rank.rank == root else None, root, async_op=async_op))
        assert torch.equal(x, inputs[rank.rank]), (dtype, count)


def _all_to_all(rank: Rank) -> None:
    world, me = rank.world_size, rank.rank
    for dtype, count, async_op in moves():
        whole = given(world, count * world, dtype)
        expected = torch.cat([whole[r][count * me : count * (me + 1)] for r in range(world)])
        out = torch.empty_like(expected)
        done(dist.all_to_all_single(out, whole[me], async_op=async_op))
        assert torch.equal(out, expected), (dtype, count)
        rows = [torch.empty(count, dtype=dtype) for _ in range(world)]
        done(dist.all_to_all(rows, [x.clone() for x in whole[me].chunk(world)] if count else rows, async_op=async_op))
        assert torch.equal(torch.cat(rows), expected), (dtype, count)


def _all_to_all_uneven(rank: Rank) -> None:
    world, me = rank.world_size, rank.rank
    for scale, dtype, async_op in itertools.product((0, 1, 40, 3000), (torch.float32, torch.complex64), (False, True)):

        def rows(source: int, target: int, scale: int = scale) -> int:
            return (source + 1) * (target * scale % 77 + scale) % (2 * scale + 1)

        def part(source: int, target: int, dtype: torch.dtype = dtype) -> Tensor:
            values = torch.arange(3 * rows(source, target)) + 10_000 * source + 1000 * target
            return values.view(-1, 3).to(dtype)

        send, recv = [part(me, r) for r in range(world)], [part(r, me) for r in range(world)]
        out = torch.empty_like(torch.cat(recv))
        splits = [len(x) for x in recv], [len(x) for x in send]
        done(dist.all_to_all_single(out, torch.cat(send), *splits, async_op=async_op))
        assert torch.equal(out, torch.cat(recv)), (scale, dtype)
        parts = [torch.empty_like(x) for x in recv]
        done(dist.all_to_all(parts, send, async_op=async_op))
        assert all(torch.equal(a, b) for a, b in zip(parts, recv, strict=True)), (scale, dtype)


def _uneven_gather_and_scatter(rank: Rank) -> None:
    world, me = rank.world_size, rank.rank
    for scale, async_op in itertools.product((1, 30_000), (False, True)):
        blocks = [torch.full((r + 1, scale), float(r)) for r in range(world)]
        out = [torch.empty_like(x) for x in blocks]
        done(dist.all_gather(out, blocks[me], async_op=async_op))
        assert all(torch.equal(a, b) for a, b in zip(out, blocks, strict=True))
        mine = torch.empty_like(blocks[me])
        done(dist.reduce_scatter(mine, [x + me for x in blocks], async_op=async_op))
        assert torch.equal(mine, blocks[me] * world + sum(range(world)))
        strided = torch.empty(scale, me + 1).t()
        dist.reduce_scatter(strided, blocks)
        assert torch.equal(strided, blocks[me] * world)


def _bits_and_bools(rank: Rank) -> None:
    world, me = rank.world_size, rank.rank
    inputs = {d: reference.inputs(world, 1003, d) for d in reference.INTEGERS}
    inputs[torch.bool] = given(world, 1003, torch.bool)
    ops: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "BAND": torch.bitwise_and, "BOR": torch.bitwise_or, "BXOR": torch.bitwise_xor,
    }  # fmt: skip
    for dtype, xs in inputs.items():
        for name, op in ops.items():
            expected = xs[0]
            for other in xs[1:]:
                expected = op(expected, other)
            x = xs[me].clone()
            dist.all_reduce(x, getattr(dist.ReduceOp, name))
            assert torch.equal(x, expected), (dtype, name)
    stack = torch.stack(inputs[torch.bool])
    for op, expected in (
        (dist.ReduceOp.SUM, stack.any(0)),
        (dist.ReduceOp.MAX, stack.any(0)),
        (dist.ReduceOp.PRODUCT, stack.all(0)),
        (dist.ReduceOp.MIN, stack.all(0)),
    ):
        x = stack[me].clone()
        dist.all_reduce(x, op)
        assert torch.equal(x, expected), op
    with pytest.raises(pycoll.UnsupportedError, match="band of Float"):
        dist.all_reduce(torch.ones(3), dist.ReduceOp.BAND)
    with pytest.raises(pycoll.UnsupportedError, match="avg of Bool"):
        dist.all_reduce(torch.ones(3, dtype=torch.bool), dist.ReduceOp.AVG)


def _complex(rank: Rank) -> None:
    """Sums and averages of complex numbers: two reals each, also through strides, and where blocks differ in size."""
    world, me = rank.world_size, rank.rank
    for (dtype, real), op, rows, async_op in itertools.product(
        ((torch.complex64, torch.float32), (torch.complex128, torch.float64)), ("sum", "avg"), (1, 4003), (False, True)
    ):
        pairs = reference.inputs(world, (world * rows, 2), real)
        whole = [torch.view_as_complex(x) for x in pairs]

        def check(found: Tensor, first: int, last: int, pairs: list[Tensor] = pairs, op: str = op) -> None:
            reference.check(torch.view_as_real(found), [x[first:last] for x in pairs], op, (op, first, last))

        x = whole[me].clone()
        done(dist.all_reduce(x, OPS[op], async_op=async_op))
        check(x, 0, world * rows)
        for x in (whole[me].clone(), torch.zeros(world * rows, 2, dtype=dtype)[:, 1].copy_(whole[me])):
            done(dist.reduce(x, world - 1, OPS[op], async_op=async_op))
            if me == world - 1:
                check(x, 0, world * rows)
        mine = torch.empty(rows, dtype=dtype)
        done(dist.reduce_scatter_tensor(mine, whole[me], OPS[op], async_op=async_op))
        check(mine, me * rows, (me + 1) * rows)
        done(dist.reduce_scatter(mine.zero_(), [x.clone() for x in whole[me].chunk(world)], OPS[op], async_op=async_op))
        check(mine, me * rows, (me + 1) * rows)
        firsts = [r * (r + 1) // 2 * rows // world for r in range(world + 1)]  # blocks of 1 to `world` parts
        blocks = [whole[me][first:last].clone() for first, last in itertools.pairwise(firsts)]
        done(dist.reduce_scatter(uneven := torch.empty_like(blocks[me]), blocks, OPS[op], async_op=async_op))
        check(uneven, firsts[me], firsts[me + 1])
    for op in (dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT):
        with pytest.raises(pycoll.UnsupportedError, match="of ComplexFloat tensors"):
            dist.reduce(torch.ones(3, dtype=torch.complex64), 0, op)


def _premultiplied(rank: Rank) -> None:
    world = rank.world_size
    inputs = reference.inputs(world, 1000, torch.float64)
    for factor in (0.25, torch.tensor([0.25], dtype=torch.float64)):
        op = dist._make_nccl_premul_sum(factor)
        x = inputs[rank.rank].clone()
        dist.all_reduce(x, op)
        reference.check(x, [y * 0.25 for y in inputs], "sum", factor)
        whole = torch.stack([inputs[rank.rank]] * world)
        before = whole.clone()
        out = torch.empty(1000, dtype=torch.float64)
        dist.reduce_scatter_tensor(out, whole, op)
        reference.check(out, [y * 0.25 for y in inputs], "sum", factor)
        assert torch.equal(whole, before), "the input is only read"
    with pytest.raises(pycoll.UnsupportedError, match="multiplies only floats"):
        dist.all_reduce(torch.ones(3, dtype=torch.int32), dist._make_nccl_premul_sum(2.0))


def _coalesced(rank: Rank) -> None:
    world, me = rank.world_size, rank.rank
    shapes = ((1,), (2, 2), (0,), (3, 3, 3), (50_000,))

    def tensors(r: int) -> list[Tensor]:
        return [torch.full(shape, float(10 * i + r)) for i, shape in enumerate(shapes)]

    for async_op in (False, True):
        xs = tensors(me)
        done(dist.all_reduce_coalesced(xs, async_op=async_op))
        for i, x in enumerate(xs):
            assert torch.equal(x, torch.full(shapes[i], float(10 * i * world + sum(range(world)))))
        lists = [[torch.empty(shape) for shape in shapes] for _ in range(world)]
        done(dist.all_gather_coalesced(lists, tensors(me), async_op=async_op))
        for r, gathered in enumerate(lists):
            assert all(torch.equal(a, b) for a, b in zip(gathered, tensors(r), strict=True))
    group = dist.group.WORLD
    assert group is not None
    wholes = [torch.empty(world, *shape) for shape in shapes]
    group.allgather_into_tensor_coalesced(wholes, tensors(me)).wait()
    for i, whole in enumerate(wholes):
        assert torch.equal(whole, torch.stack([tensors(r)[i] for r in range(world)]))
    outs = [torch.empty(shape) for shape in shapes]
    group.reduce_scatter_tensor_coalesced(outs, wholes).wait()
    for i, out in enumerate(outs):
        assert torch.equal(out, world * tensors(me)[i])


def _coalescing_manager(rank: Rank) -> None:
    from torch.distributed.distributed_c10d import _coalescing_manager

    xs = [torch.full((n,), 1.0) for n in (1, 5, 70_000)]
    with _coalescing_manager() as manager:
        for x in xs:
            dist.all_reduce(x, async_op=True)
    manager.wait() if manager.works else None
    assert all(bool((x == rank.world_size).all()) for x in xs)


def _sparse(rank: Rank) -> None:
    world, me = rank.world_size, rank.rank
    for dense_dims, async_op in itertools.product((0, 2), (False, True)):

        def tensor(r: int, dense_dims: int = dense_dims) -> Tensor:
            indices = torch.tensor([[(r + i) % 5 for i in range(r + 2)], [i % 3 for i in range(r + 2)]])
            shape = (5, 3, *range(2, 2 + dense_dims))
            values = torch.arange(float((r + 2) * torch.Size(shape[2:]).numel())).view(r + 2, *shape[2:]) + r
            return torch.sparse_coo_tensor(indices, values, shape)

        x = tensor(me)
        done(dist.all_reduce(x, async_op=async_op))
        expected = sum(tensor(r).to_dense() for r in range(world))
        assert x.is_sparse and torch.equal(x.to_dense(), expected)
    nothing = torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.int64), torch.empty(0), (4,))
    dist.all_reduce(nothing)
    assert nothing._nnz() == 0
    with pytest.raises(pycoll.UnsupportedError, match="sums"):
        dist.all_reduce(tensor(me), dist.ReduceOp.MAX)


def _lists_that_are_views(rank: Rank) -> None:
    """Tensors of a list that follow one another in memory are used where they lie."""
    world, me = rank.world_size, rank.rank
    whole = torch.zeros(world, 40)
    dist.all_gather(list(whole.unbind()), torch.full((40,), float(me)))
    assert torch.equal(whole, torch.arange(float(world)).repeat_interleave(40).view(world, 40))
    out = torch.empty(40)
    dist.reduce_scatter(out, list(whole.unbind()))
    assert torch.equal(out, torch.full((40,), float(me * world)))
    backwards = list(whole.unbind())[::-1]
    dist.all_gather(backwards, torch.full((40,), float(me)))
    assert torch.equal(whole[0], torch.full((40,), float(world - 1)))


def _objects(rank: Rank) -> None:
    world, me = rank.world_size, rank.rank
    gathered: list[Any] = [None] * world
    dist.gather_object({"rank": me, "text": "x" * 1000 * me}, gathered if me == 0 else None, 0)
    assert me != 0 or [entry["rank"] for entry in gathered] == list(range(world))
    out: list[Any] = [None]
    dist.scatter_object_list(out, [{"for": r, "text": "y" * r} for r in range(world)] if me == 0 else None, 0)
    assert out[0]["for"] == me


CASES: Sequence[Callable[[Rank], None]] = (
    _reduce,
    _gather,
    _scatter,
    _all_to_all,
    _all_to_all_uneven,
    _uneven_gather_and_scatter,
    _bits_and_bools,
    _complex,
    _premultiplied,
    _coalesced,
    _coalescing_manager,
    _sparse,
    _lists_that_are_views,
    _objects,
)


def _cases(rank: Rank) -> None:
    for case in CASES:
        try:
            case(rank)
        except Exception as e:
            raise AssertionError(f"{case.__name__} failed") from e


@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
def test_every_collective(world_size: int) -> None:
    run(_cases, world_size, timeout=110)


def _differing(rank: Rank) -> None:
    x = torch.ones(6)
    splits = [2, 4] if rank.rank == 0 else [3, 3]
    with pytest.raises(pycoll.MismatchError, match="rank 0 sends 2 elements to rank 0, which expects 3"):
        dist.all_to_all_single(torch.empty(6), x, [3, 3], splits)


def test_splits_that_differ_are_an_error_on_every_rank() -> None:
    run(_differing, 2)


def _bad_arguments(rank: Rank) -> None:
    x, both = torch.ones(2), [torch.ones(2), torch.ones(2)]
    calls: dict[str, Callable[[], Any]] = {
        "splits that add up": lambda: dist.all_to_all_single(torch.ones(4), torch.ones(4), [1, 2], [2, 2]),
        "not a multiple of 2 ranks": lambda: dist.all_to_all_single(torch.ones(3), torch.ones(3)),
        "overlap": lambda: dist.all_to_all_single(x, x),
        "list of 2 tensors, not of 1": lambda: dist.all_gather([x], x),
        "expanded": lambda: dist.all_reduce(torch.ones(1).expand(4)),
    }
    for name, call in calls.items():
        with pytest.raises((pycoll.UsageError, RuntimeError), match=name):
            call()
    group = dist.group.WORLD
    assert group is not None
    if rank.rank == 0:
        with pytest.raises(pycoll.UnsupportedError, match="different sizes"):
            dist.gather(x, [torch.ones(1), torch.ones(3)], 0)
    dist.all_gather(both, x)
    dist.all_reduce(x)
    assert x.tolist() == [2.0, 2.0], "the group goes on"


def test_bad_arguments_leave_the_group_usable() -> None:
    run(_bad_arguments, 2)
