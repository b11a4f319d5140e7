"""On GPUs: reduce, gather, scatter, all-to-all, operations on bits, and send and receive, by both front ends."""

from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from places import OWN, SHARED, needs
from test_device_backend import init
from test_device_communicator import SMALL, seat

import pycoll
from pycoll import Communicator
from pycoll.testing import Processes, Rank, run_threads

pytestmark = pytest.mark.cuda


def finish(result: Any) -> None:
    if isinstance(result, dist.Work):
        result.wait()


def exchanges(comm: Communicator) -> None:
    """Everything with a root, and all-to-all, in and out of the heap, sync and async."""
    world, me = comm.world_size, comm.rank
    for count in (0, 1, 1001, 30_000):
        for symmetric, async_op in ((False, False), (True, True), (me % 2 == 0, False)):
            root = count % world

            def placed(x: torch.Tensor, symmetric: bool = symmetric) -> torch.Tensor:
                return comm.empty(x.shape, x.dtype, "cuda").copy_(x) if symmetric else x.cuda()

            given = reference.inputs(world, count, torch.bfloat16)
            x, out = placed(given[me]), placed(torch.zeros(count, dtype=torch.bfloat16))
            finish(comm.reduce(x, "sum", root, out=out, async_op=async_op))
            assert torch.equal(x.cpu(), given[me])
            if me == root:
                reference.check(out.cpu(), given, "sum", (count, symmetric))
            else:
                assert not out.cpu().any()

            gathered = placed(torch.zeros(world * count, dtype=torch.bfloat16))
            finish(comm.gather(x, root, out=gathered, async_op=async_op))
            assert torch.equal(gathered.cpu(), torch.cat(given)) if me == root else not gathered.cpu().any()

            whole = placed(torch.cat(given)) if me == root else None
            finish(comm.scatter(whole, root, out=out, async_op=async_op))
            assert torch.equal(out.cpu(), given[me])

            def rows(source: int, target: int, count: int = count) -> int:
                return count * (source + 1) // (target + 1) % 3001

            parts = [[torch.full((rows(s, t), 2), 10 * s + t) for t in range(world)] for s in range(world)]
            expected = torch.cat([parts[s][me] for s in range(world)])
            received = placed(torch.zeros_like(expected))
            send, recv = [rows(me, r) for r in range(world)], [rows(r, me) for r in range(world)]
            finish(
                comm.all_to_all(
                    placed(torch.cat(parts[me])), out=received, send_splits=send, recv_splits=recv, async_op=async_op
                )
            )
            assert torch.equal(received.cpu(), expected), (count, symmetric)
    for dtype in (*reference.INTEGERS, torch.bool):
        for op, combine in (("band", torch.bitwise_and), ("bor", torch.bitwise_or), ("bxor", torch.bitwise_xor)):
            if dtype == torch.bool:
                given = [x > 0 for x in reference.inputs(world, 1003, torch.float32)]
            else:
                given = reference.inputs(world, 1003, dtype)
            expected = given[0]
            for other in given[1:]:
                expected = combine(expected, other)
            x = given[me].cuda()
            comm.all_reduce(x, op)  # type: ignore[arg-type]
            assert torch.equal(x.cpu(), expected), (dtype, op)


def letters(comm: Communicator) -> None:
    """Send and receive, of GPU and CPU memory in turn; mutual large ones."""
    world, me = comm.world_size, comm.rank
    right, left = (me + 1) % world, (me - 1) % world
    for count in (0, 3, 1001, 400_000):
        x, y = torch.full((count,), float(me), device="cuda"), torch.empty(count, device="cuda")
        if me % 2 == 0 and not (world % 2 and me == world - 1):
            comm.send(x, right, tag=1)
            assert comm.recv(y, left if not (world % 2 and me == 0) else None, tag=1) is not None
        else:
            work = comm.irecv(y, left, tag=1)
            comm.send(x, right, tag=1)
            work.wait()
        assert bool((y.cpu() == left).all())
        works = [
            comm.irecv(y, left),
            comm.isend(torch.full((count,), me + 1.0).cuda(), right),
            comm.isend(torch.full((count,), 9.0), right, tag=7),
        ]
        host = torch.empty(count, device="cuda" if me else "cpu")
        works.append(comm.irecv(host, left, tag=7))
        z = torch.ones(100, device="cuda")
        comm.all_reduce(z)
        for work in reversed(works):
            work.wait()
        assert bool((y.cpu() == left + 1).all()) and bool((host.cpu() == 9).all()) and z.tolist()[0] == world
    wide = torch.zeros(50, 4, device="cuda")
    works = [comm.irecv(wide[:, 1], left), comm.isend(torch.arange(100.0).cuda()[::2], right)]
    for work in works:
        work.wait()
    assert torch.equal(wide[:, 1].cpu(), torch.arange(0.0, 100.0, 2)) and not wide.cpu()[:, 0::2].any()


def _communicator(rank: Rank, where: str) -> None:
    with seat(rank, where) as comm:
        exchanges(comm)
        if comm.world_size > 1:
            letters(comm)


@pytest.mark.parametrize("where", (SHARED, OWN))
@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
def test_communicator(where: str, world_size: int) -> None:
    needs(where, world_size)
    with Processes(_communicator, world_size, where) as ranks:
        ranks.results(240)


@pytest.mark.parametrize("world_size", (2, 3))
def test_threads_that_share_a_gpu(world_size: int) -> None:
    def rank(comm: Communicator) -> None:
        exchanges(comm)
        letters(comm)

    run_threads(rank, world_size, cuda_config=SMALL)


def _splits_differ(rank: Rank, where: str) -> str:
    comm = seat(rank, where)
    x = torch.ones(6, device="cuda")

    def call() -> None:
        comm.all_to_all(x, recv_splits=[2, 2, 1] if comm.rank == 0 else [2, 2, 2])
        torch.cuda.synchronize()
        comm.barrier()
        comm.all_reduce(x)

    with pytest.raises(pycoll.MismatchError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("where", (SHARED, OWN))
def test_splits_that_differ_are_an_error_on_all_ranks(where: str) -> None:
    needs(where, 3)
    with Processes(_splits_differ, 3, where) as ranks:
        texts = ranks.results(120)
    assert set(texts) == {"pycoll: all_to_all: rank 2 sends 2 elements to rank 0, which expects 1"}


def _captured(rank: Rank) -> None:
    comm = seat(rank, OWN)
    x = torch.full((6,), float(rank.rank), device="cuda")
    out = torch.empty(6, device="cuda")
    comm.all_to_all(x, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        comm.all_to_all(x, out=out)
        comm.reduce(out, "sum", 1)
    for turn in range(3):
        x.fill_(turn + rank.rank)
        graph.replay()
        torch.cuda.synchronize()
        comm.barrier()
        if rank.rank == 1:
            assert out.tolist() == [2.0 * turn] * 3 + [2.0 * (turn + 1)] * 3
    with pytest.raises(pycoll.UnsupportedError, match="captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        comm.isend(x, 1 - rank.rank)
    comm.close()


def test_exchanges_in_a_graph() -> None:
    needs(OWN, 2)
    with Processes(_captured, 2) as ranks:
        ranks.results(120)


def _backend(rank: Rank, where: str, backend: str, fake: bool) -> None:
    device, world, me = init(rank, where, backend), rank.world_size, rank.rank
    blocks = [torch.full((r + 1, 50), float(10 * me + r), device=device) for r in range(world)]
    received = [torch.empty(me + 1, 50, device=device) for _ in range(world)]
    dist.all_to_all(received, blocks)
    assert all(bool((x.cpu() == 10 * r + me).all()) for r, x in enumerate(received))
    uneven = [torch.empty(r + 1, 50, device=device) for r in range(world)]
    dist.all_gather(uneven, torch.full((me + 1, 50), float(me), device=device))
    assert all(bool((x.cpu() == r).all()) for r, x in enumerate(uneven))
    mine = torch.empty(me + 1, 50, device=device)
    dist.reduce_scatter(mine, uneven)
    assert bool((mine.cpu() == me * world).all())
    several = [torch.full((n,), 1.0, device=device) for n in (1, 0, 5000)]
    work = dist.all_reduce_coalesced(several, async_op=True)
    work.wait()
    assert all(bool((x.cpu() == world).all()) for x in several)
    if not fake:  # which multiply nothing
        premultiplied = torch.full((100,), 2.0, device=device)
        dist.all_reduce(premultiplied, dist._make_nccl_premul_sum(0.5))
        assert bool((premultiplied.cpu() == world).all())
    y = torch.empty(70_000, device=device)
    ops = [
        dist.P2POp(dist.irecv, y, (me - 1) % world),
        dist.P2POp(dist.isend, torch.full((70_000,), float(me), device=device), (me + 1) % world),
    ]
    for work in dist.batch_isend_irecv(ops) if world > 1 else []:
        work.wait()
    assert world == 1 or bool((y.cpu() == (me - 1) % world).all())
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ("pycoll", "cpu:pycoll,cuda:pycoll"))
@pytest.mark.parametrize("where", (SHARED, OWN))
def test_backend(where: str, backend: str, fake_cuda: bool) -> None:
    needs(where, 3)
    with Processes(_backend, 3, where, backend, fake_cuda) as ranks:
        ranks.results(120)
