"""torch.distributed on CUDA tensors."""

import pytest
import reference
import torch
import torch.distributed as dist
from places import OWN, SHARED, needs
from test_device_communicator import Unreadable, UnreadableError, error_of, void

import pycoll
from pycoll.testing import Processes, Rank

pytestmark = pytest.mark.cuda


def init(rank: Rank, where: str, backend: str) -> torch.device:
    """The default group, with the rank's GPU made the current one."""
    device = torch.device("cuda", rank.rank if where == OWN else 0)
    torch.cuda.set_device(device)
    store = dist.FileStore(str(rank.folder / "store"), rank.world_size)
    dist.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.world_size)
    return device


def _collectives(rank: Rank, where: str, backend: str) -> None:
    device, world, r = init(rank, where, backend), rank.world_size, rank.rank
    given = reference.inputs(world, 10_001, torch.float32)
    total = reference.reduced(given, "sum").float()
    x = given[r].to(device)
    dist.all_reduce(x)
    torch.testing.assert_close(x.cpu(), total, rtol=1e-5, atol=1e-5)
    host = given[r].clone()
    dist.all_reduce(host)
    torch.testing.assert_close(host, total, rtol=1e-5, atol=1e-5)

    y = given[r].to(device)
    works = [dist.all_reduce(y, op=dist.ReduceOp.MAX, async_op=True) for _ in range(3)]
    for work in works:
        work.wait()
    assert torch.equal(y.cpu(), torch.stack(given).amax(0))
    torch.cuda.synchronize()
    assert all(work.is_completed() for work in works)

    z = given[r].to(device)
    future = dist.all_reduce(z, async_op=True).get_future()
    doubled = future.then(lambda f: f.value()[0].cpu() * 2).wait()
    torch.testing.assert_close(doubled, total * 2, rtol=1e-5, atol=1e-5)

    wide = torch.zeros(10_001, 3)
    wide[:, 1] = given[r]
    strided = wide.to(device)
    dist.all_reduce(strided[:, 1], async_op=True).wait()
    torch.testing.assert_close(strided.cpu()[:, 1], total, rtol=1e-5, atol=1e-5)
    assert not strided.cpu()[:, 0::2].any()

    gathered = [torch.empty(10_001, device=device) for _ in range(world)]
    dist.all_gather(gathered, given[r].to(device))
    assert all(torch.equal(g.cpu(), t) for g, t in zip(gathered, given, strict=True))
    whole = torch.empty(world * 10_001, device=device)
    dist.all_gather_into_tensor(whole, given[r].to(device))
    assert torch.equal(whole.cpu(), torch.cat(given))
    block = torch.empty(10_001, device=device)
    dist.reduce_scatter_tensor(block, torch.cat([t * (i + 1) for i, t in enumerate([given[r]] * world)]).to(device))
    torch.testing.assert_close(block.cpu(), total * (r + 1), rtol=1e-4, atol=1e-4)
    b = given[r].to(device)
    dist.broadcast(b, src=world - 1)
    assert torch.equal(b.cpu(), given[world - 1])
    dist.barrier()
    group = dist.new_group(list(range(world)))
    w = torch.ones(5, device=device)
    dist.all_reduce(w, group=group)
    assert w.cpu().tolist() == [float(world)] * 5
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ("pycoll", "cpu:pycoll,cuda:pycoll"))
@pytest.mark.parametrize("where", (SHARED, OWN))
def test_collectives(where: str, backend: str) -> None:
    needs(where, 2)
    with Processes(_collectives, 2, where, backend) as ranks:
        ranks.results(120)


def _allocates(rank: Rank) -> None:
    device = init(rank, OWN, "pycoll")
    group = dist.group.WORLD
    assert group is not None
    backend = group._get_backend(device)
    assert backend.supports_tensor_alloc(device)
    x = backend.allocate_tensor(1000, dtype=torch.float32, device=device)
    x.fill_(1.0)
    dist.all_reduce(x)
    assert x.cpu().tolist() == [2.0] * 1000
    del x
    dist.destroy_process_group()


def test_backend_allocates_what_peers_map() -> None:
    needs(OWN, 2)
    with Processes(_allocates, 2) as ranks:
        ranks.results(60)


def _data_parallel(rank: Rank, where: str, backend: str) -> list[float]:
    device = init(rank, where, backend)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).to(device)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index], bucket_cap_mb=0.01)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    losses = []
    for step in range(5):
        torch.manual_seed(100 * step + rank.rank)
        loss = wrapped(torch.randn(16, 32).to(device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach().cpu()))
    weights = torch.cat([p.detach().flatten().cpu() for p in wrapped.parameters()])
    dist.destroy_process_group()
    return [*losses, float(weights.double().sum())]


@pytest.mark.real_gpu
@pytest.mark.parametrize("where", (SHARED, OWN))
def test_distributed_data_parallel(where: str) -> None:
    needs(where, 2)
    with Processes(_data_parallel, 2, where, "pycoll") as ranks:
        ours = ranks.results(120)
    with Processes(_data_parallel, 2, where, "gloo") as ranks:
        theirs = ranks.results(120)
    assert ours[0][-1] == ours[1][-1], "the same weights on all ranks"
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)


def _unreadable(rank: Rank) -> str:
    device = init(rank, OWN, "pycoll")
    x = torch.ones(10, 2, device=device)
    dist.all_reduce(x)
    group = dist.group.WORLD
    assert group is not None
    backend = group._get_backend(device)
    if rank.rank == 1:
        with Unreadable(), pytest.raises(UnreadableError, match="it cannot be copied"):
            backend.allreduce([x[:, 1]])
    return error_of(lambda: void(dist.all_reduce(x[:, 1].contiguous(), async_op=True)))


def test_rank_that_cannot_read_its_tensor_tells_the_others() -> None:
    """Long before the time-out, which is half an hour."""
    needs(OWN, 2)
    with Processes(_unreadable, 2) as ranks:
        for text in ranks.results(60):
            assert text.startswith("Error: pycoll: rank 1 ")


def _mismatch(rank: Rank) -> str:
    device = init(rank, OWN, "pycoll")
    dist.all_reduce(torch.ones(1, device=device))
    x = torch.ones(5 + rank.rank, device=device)
    for _ in range(200):
        try:
            dist.all_reduce(x, async_op=True).wait()
            torch.cuda.synchronize()
        except pycoll.Error as e:
            return f"{type(e).__name__}: {e}"
    return "nothing"


def test_errors_reach_work() -> None:
    needs(OWN, 2)
    with Processes(_mismatch, 2) as ranks:
        for text in ranks.results(60):
            assert text.startswith("MismatchError") and "float32[5]" in text
