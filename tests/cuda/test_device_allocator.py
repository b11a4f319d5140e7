"""Tensors of torch's allocator where its segments grow (expandable_segments), which legacy IPC handles cannot share."""

import pytest
import reference
import torch
import torch.distributed as dist
from places import OWN, SHARED, needs
from test_device_backend import init
from test_device_communicator import collectives, seat

from pycoll.testing import Processes, Rank

pytestmark = pytest.mark.cuda


def grow_segments() -> None:
    """As PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which a process that has loaded torch no longer reads."""
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def segments() -> list[bool]:
    """Of torch's allocator: whether each grows."""
    return [segment["is_expandable"] for segment in torch.cuda.memory_snapshot()]


def _communicator(rank: Rank, where: str) -> None:
    grow_segments()
    with seat(rank, where) as comm:
        for algorithm in ("two_shot", "ring"):
            collectives(comm, (algorithm,))
            large = torch.ones(20_000_000, device="cuda")  # the segment grows beyond what the calls before knew
            end = large[-10_000:]
            comm.all_reduce(end)
            assert bool((end.cpu() == rank.world_size).all())
            assert segments() and all(segments())
            del large, end
            torch.cuda.empty_cache()  # and shrinks

        given = reference.inputs(rank.world_size, 30_011, torch.float32)
        symmetric = comm.empty(30_011, device="cuda")
        with torch.cuda.use_mem_pool(comm.mem_pool()):
            pooled = torch.empty(30_011, device="cuda")
        for x in (symmetric, pooled, torch.empty(30_011, device="cuda")):
            x.copy_(given[rank.rank])
            comm.all_reduce(x)
            reference.check(x.cpu(), given, "sum", "under expandable segments")
        assert segments().count(False) == (where == OWN), "of these the pool's, which peers map, is no such segment"
        del symmetric, pooled, x


@pytest.mark.parametrize("where", (SHARED, OWN))
def test_communicator_on_segments_that_grow(where: str) -> None:
    needs(where, 2)
    with Processes(_communicator, 2, where) as ranks:
        ranks.results(120)


def _graph(rank: Rank) -> None:
    grow_segments()
    with seat(rank, OWN) as comm:
        graph = torch.cuda.CUDAGraph()
        x = torch.zeros(20_000, device="cuda")
        with torch.cuda.graph(graph):
            strided = x.view(100, 200)[:, 1:]  # copied to memory of the graph's own pool
            comm.all_reduce(strided, "avg")
        for turn in range(3):
            x.fill_(rank.rank + turn)
            torch.cuda.empty_cache()
            graph.replay()
            torch.cuda.synchronize()
            assert bool((x.cpu().view(100, 200)[:, 1:] == turn + (rank.world_size - 1) / 2).all())
        assert all(segments())
        del graph


def test_graph_on_segments_that_grow() -> None:
    needs(OWN, 2)
    with Processes(_graph, 2) as ranks:
        ranks.results(60)


def _backend(rank: Rank, where: str) -> None:
    grow_segments()
    device, world = init(rank, where, "pycoll"), rank.world_size
    given = reference.inputs(world, 10_001, torch.float32)
    total = reference.reduced(given, "sum").float()
    for size in (1, 40):  # million elements
        room = torch.empty(size * 1_000_000, device=device)
        x = given[rank.rank].to(device)
        works = [dist.all_reduce(x, op=dist.ReduceOp.MAX, async_op=True) for _ in range(2)]
        wide = torch.zeros(10_001, 3, device=device)
        wide[:, 1].copy_(given[rank.rank])
        works.append(dist.all_reduce(wide[:, 1], async_op=True))
        gathered = torch.empty(world * 10_001, device=device)
        works.append(dist.all_gather_into_tensor(gathered, given[rank.rank].to(device), async_op=True))
        for work in works:
            work.wait()
        assert torch.equal(x.cpu(), torch.stack(given).amax(0))
        torch.testing.assert_close(wide.cpu()[:, 1], total, rtol=1e-5, atol=1e-5)
        assert torch.equal(gathered.cpu(), torch.cat(given))
        del room, wide
        torch.cuda.empty_cache()
    assert segments() and all(segments())
    dist.destroy_process_group()


@pytest.mark.parametrize("where", (SHARED, OWN))
def test_backend_on_segments_that_grow(where: str) -> None:
    needs(where, 2)
    with Processes(_backend, 2, where) as ranks:
        ranks.results(120)
