"""torch.distributed over pycoll: setting up, every collective it has, futures, groups, DistributedDataParallel."""

import itertools
import os
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from groups import run
from leaks import held_segments, native_threads
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import pycoll
from pycoll.backend import create
from pycoll.testing import Processes, Rank

pytestmark = pytest.mark.timeout(90)

OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "product": dist.ReduceOp.PRODUCT,
}


def _all_reduce(rank: Rank) -> None:
    for dtype, op, count in itertools.product(reference.DTYPES, OPS, (0, 1, 1021, 70_001)):
        given = reference.inputs(rank.world_size, count, dtype)
        x = given[rank.rank].clone()
        assert dist.all_reduce(x, OPS[op]) is None
        reference.check(x, given, op, (dtype, op, count))
        y = given[rank.rank].clone()
        dist.all_reduce(y, OPS[op], async_op=True).wait()
        assert reference.bits(x) == reference.bits(y)


@pytest.mark.parametrize("world_size", (1, 2, 3))
def test_all_reduce(world_size: int) -> None:
    run(_all_reduce, world_size)


def _layouts(rank: Rank) -> None:
    given = reference.inputs(rank.world_size, (6, 8), torch.float32)
    for async_op in (False, True):
        x = given[rank.rank].t().contiguous().t()
        padded = torch.zeros(12, 16)
        padded[::2, ::2] = given[rank.rank]
        for y in (x, padded[::2, ::2]):
            work = dist.all_reduce(y, async_op=async_op)
            if work:
                work.wait()
            reference.check(y, given, "sum", async_op)
        assert not padded[1::2].any()
        z = torch.zeros(6, 16)[:, ::2].copy_(given[rank.rank])
        work = dist.broadcast(z, 1, async_op=async_op)
        if work:
            work.wait()
        assert torch.equal(z, given[1])
    z = torch.complex(torch.ones(3), torch.full((3,), float(rank.rank)))
    dist.all_reduce(z)
    assert z.tolist() == [complex(2, 1)] * 3
    weight = torch.ones(3, requires_grad=True)
    dist.all_reduce(weight)
    assert weight.tolist() == [2.0] * 3


def test_all_reduce_of_every_layout() -> None:
    run(_layouts, 2)


def _futures(rank: Rank) -> None:
    for count in (3, 100_000):
        x = torch.full((count,), rank.rank + 1.0)
        work = dist.all_reduce(x, async_op=True)
        seen: list[Tensor] = []
        future = work.get_future().then(lambda f: f.value()[0] * 2)
        chained = future.then(lambda f, seen=seen: seen.append(f.value()))
        assert work.wait()
        assert work.is_completed()
        assert bool((future.wait() == 6).all()) and bool((x == 3).all())
        chained.wait()
        assert bool((seen[0] == 6).all())
        assert work.get_future().wait()[0].data_ptr() == x.data_ptr()
        late = work.get_future().then(lambda f: f.value()[0].sum().item())
        assert late.wait() == 3.0 * count
    tensors = [torch.full((2,), float(i)) for i in range(500)]
    for work in reversed([dist.all_reduce(x, async_op=True) for x in tensors]):
        work.wait()
    assert [x[0].item() for x in tensors] == [2.0 * i for i in range(500)]


def test_futures() -> None:
    run(_futures, 2)


def _wait_with_timeout(rank: Rank) -> None:
    x = torch.ones(3)
    if rank.rank == 0:
        work = dist.all_reduce(x, async_op=True)
        with pytest.raises(pycoll.TimeoutError, match="given to wait"):
            work.wait(timedelta(milliseconds=50))
        assert not work.is_completed()
        (rank.folder / "go").touch()
        work.wait()
    else:
        while not (rank.folder / "go").exists():
            threading.Event().wait(0.01)
        dist.all_reduce(x)
    assert x.tolist() == [2.0] * 3


def test_waiting_too_short_ends_nothing() -> None:
    run(_wait_with_timeout, 2)


def _moves(rank: Rank) -> None:
    world = rank.world_size
    for dtype, count, async_op in itertools.product(
        (*reference.DTYPES, torch.bool, torch.complex64), (0, 1, 501, 40_000), (False, True)
    ):
        given = [torch.full((count,), r % 2).to(dtype) for r in range(world)]
        mine = given[rank.rank]

        def done(work: Any) -> None:
            if work is not None:
                work.wait()

        x = mine.clone()
        done(dist.broadcast(x, world - 1, async_op=async_op))
        assert torch.equal(x, given[-1])
        outputs = [torch.empty_like(mine) for _ in range(world)]
        done(dist.all_gather(outputs, mine, async_op=async_op))
        assert all(torch.equal(a, b) for a, b in zip(outputs, given, strict=True))
        whole = torch.empty(world * count, dtype=dtype)
        done(dist.all_gather_into_tensor(whole, mine, async_op=async_op))
        assert torch.equal(whole, torch.cat(given))
    done(dist.barrier(async_op=True))
    rows = [torch.empty(2, 6)[:, ::2] for _ in range(world)]
    dist.all_gather(rows, torch.full((2, 3), float(rank.rank)))
    assert [row.sum().item() for row in rows] == [6.0 * r for r in range(world)]


def test_broadcast_and_all_gather() -> None:
    run(_moves, 3)


def _reduce_scatter(rank: Rank) -> None:
    world = rank.world_size
    for dtype, op, count, async_op in itertools.product(
        reference.DTYPES, ("sum", "avg", "max"), (0, 1, 501, 20_000), (False, True)
    ):
        given = reference.inputs(world, (world, count), dtype)
        mine = given[rank.rank]
        from_list, from_tensor = torch.empty(count, dtype=dtype), torch.empty(count, dtype=dtype)
        works = [
            dist.reduce_scatter(from_list, list(mine), OPS[op], async_op=async_op),
            dist.reduce_scatter_tensor(from_tensor, mine, OPS[op], async_op=async_op),
        ]
        for work in works:
            if work is not None:
                work.wait()
        reference.check(from_list, [x[rank.rank] for x in given], op, (dtype, op, count))
        assert reference.bits(from_list) == reference.bits(from_tensor)


def test_reduce_scatter() -> None:
    run(_reduce_scatter, 3)


def _objects(rank: Rank) -> None:
    everything: list[Any] = [None] * rank.world_size
    dist.all_gather_object(everything, {"rank": rank.rank, "text": "x" * 1000 * rank.rank})
    assert [entry["rank"] for entry in everything] == list(range(rank.world_size))
    objects = ["from rank 1", 7] if rank.rank == 1 else [None, None]
    dist.broadcast_object_list(objects, src=1)
    assert objects == ["from rank 1", 7]


def test_object_collectives() -> None:
    run(_objects, 3)


def _groups(rank: Rank) -> None:
    """Work of four groups is in flight at once, and each rank starts it in an order of its own."""
    members = [[0, 1], [1, 2], [0, 2], [0, 1, 2]]
    groups = [dist.new_group(m) for m in members]
    mine = [i for i, m in enumerate(members) if rank.rank in m]
    for turn in range(20):
        tensors = {i: torch.full((1 + 10_000 * (turn % 2),), float(10 * i + rank.rank)) for i in mine}
        order = mine[turn % len(mine) :] + mine[: turn % len(mine)]
        if rank.rank == 2:
            order.reverse()
        works = [dist.all_reduce(tensors[i], group=groups[i], async_op=True) for i in order]
        for work in works:
            work.wait()
        for i in mine:
            assert tensors[i][0].item() == sum(10 * i + r for r in members[i]), (turn, members[i])
    x = torch.tensor([rank.rank])
    if rank.rank in (1, 2):
        dist.broadcast(x, src=2, group=groups[1])  # a global rank
        assert x.item() == 2
    for i in mine:
        dist.destroy_process_group(groups[i])


def test_groups_in_flight_together() -> None:
    run(_groups, 3)


def test_ranks_of_a_group_are_threads() -> None:
    """torch.distributed has one default group a process; the backend itself does not mind."""
    store, world, failures = dist.HashStore(), 3, []

    def rank_main(rank: int) -> None:
        options = SimpleNamespace(
            store=store,
            group_rank=rank,
            group_size=world,
            group_id="threads",
            timeout=timedelta(seconds=30),
            global_ranks_in_group=[],
        )
        try:
            backend = create(options, None)
            x = torch.full((1000,), rank + 1.0)
            backend.allreduce([x]).wait()
            assert x[0].item() == sum(range(world + 1))
            blocks = [torch.empty(5) for _ in range(world)]
            backend.allgather([blocks], [torch.full((5,), float(rank))]).wait()
            assert [block[0].item() for block in blocks] == [0.0, 1.0, 2.0]
            backend.barrier().wait()
            backend.shutdown()
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _many_groups(rank: Rank) -> None:
    dist.barrier()
    before = native_threads()
    groups = [dist.new_group() for _ in range(40)]
    for i, group in enumerate(groups):
        x = torch.tensor([i])
        dist.all_reduce(x, group=group)
        assert x.item() == 2 * i
    assert native_threads() == before, "a group that never worked in the background has no thread"


def test_groups_cost_no_threads() -> None:
    run(_many_groups, 2)


def _again(rank: Rank) -> None:
    for i in range(4):
        rank.init_process_group(f"group {i}")
        x = torch.ones(1000)
        work = dist.all_reduce(x, async_op=True)
        work.wait()
        assert x[0].item() == 2.0
        dist.destroy_process_group()
        assert not dist.is_initialized()
        del work
        assert held_segments() == []


def test_destroy_and_init_again() -> None:
    with Processes(_again, 2) as ranks:
        ranks.results()


def _twice(rank: Rank) -> None:
    with pytest.raises(ValueError, match="default process group twice"):
        rank.init_process_group("second")
    x = torch.ones(2)
    dist.all_reduce(x)
    assert x.tolist() == [2.0, 2.0]


def test_a_second_init_is_refused_and_harmless() -> None:
    run(_twice, 2)


def _issue_order(rank: Rank) -> None:
    for _ in range(50):
        x = torch.ones(2000)
        work = dist.all_reduce(x, async_op=True)
        dist.all_reduce(x)  # after the other, though it need not wait for a thread
        assert bool((x == 4).all()) and work.is_completed()
    x = torch.ones(20, 30).t()  # the second starts from what the first leaves, also where memory is not dense
    first = dist.all_reduce(x, async_op=True)
    second = dist.all_reduce(x, async_op=True)
    second.wait()
    first.wait()
    assert bool((x == 4).all())


def test_issue_order_is_execution_order() -> None:
    run(_issue_order, 2)


def _two_threads(rank: Rank) -> None:
    """Two threads issue in turns, one asynchronous calls and one synchronous: x is doubled, then 1 added, and so on."""
    x, one = torch.zeros(500), torch.ones(500)
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    works = []

    def asynchronous() -> None:
        for _ in range(30):
            turns[0].acquire()
            works.append(dist.all_reduce(x, async_op=True))
            turns[1].release()

    def synchronous() -> None:
        for _ in range(30):
            turns[1].acquire()
            dist.all_reduce(one, dist.ReduceOp.MAX)  # returns after all that was issued before it
            works[-1].wait()
            x.add_(1)
            turns[0].release()

    threads = [threading.Thread(target=f) for f in (asynchronous, synchronous)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = 0.0
    for _ in range(30):
        expected = 2 * expected + 1
    assert bool((x == torch.tensor(expected)).all())


def test_issue_order_from_two_threads() -> None:
    run(_two_threads, 2)


class Net(nn.Module):
    """Some of everything that DDP handles: a convolution, a buffer, a frozen and a sometimes unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Flatten())
        self.hidden = nn.Linear(8 * 16, 64)
        self.unused = nn.Linear(64, 64)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.out = nn.Linear(64, 5)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor, use_all: bool) -> Tensor:
        x = torch.tanh(self.hidden(self.features(x)))
        x = self.frozen(self.unused(x) if use_all else x)
        return self.out(x) * self.scale


def train(model: nn.Module, shard: slice, use_all: bool, accumulate: int = 1) -> list[Tensor]:
    """Six steps on the examples of `shard`; the gradients of the last, and the parameters after it."""
    data = torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for _ in range(6):
        x = torch.randn(12, 2, 4, 4, generator=data, dtype=torch.float64)[shard]
        y = torch.randn(12, 5, generator=data, dtype=torch.float64)[shard]
        optimizer.zero_grad()
        for i, (a, b) in enumerate(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True)):
            last = i + 1 == accumulate
            if isinstance(model, DistributedDataParallel) and not last:
                with model.no_sync():
                    (nn.functional.mse_loss(model(a, use_all), b) / accumulate).backward()
            else:
                (nn.functional.mse_loss(model(a, use_all), b) / accumulate).backward()
        optimizer.step()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return gradients + [p.detach().clone() for p in model.parameters()]


DDP_CASES: list[tuple[dict[str, Any], bool, int]] = [  # options, whether every layer is used, micro-batches a step
    ({}, True, 1),
    ({}, True, 2),
    ({"gradient_as_bucket_view": True}, True, 1),
    ({"find_unused_parameters": True}, False, 1),
    ({"find_unused_parameters": True, "gradient_as_bucket_view": True}, False, 2),
    ({"static_graph": True}, True, 1),
]


def _ddp(rank: Rank) -> list[list[bytes]]:
    results = []
    examples = 12 // rank.world_size
    shard = slice(examples * rank.rank, examples * (rank.rank + 1))
    for options, use_all, accumulate in DDP_CASES:
        torch.manual_seed(rank.rank)  # DDP takes rank 0's parameters
        model = DistributedDataParallel(Net().double(), bucket_cap_mb=0.02, **options)
        ours = train(model, shard, use_all, accumulate)
        torch.manual_seed(0)
        alone = train(Net().double(), slice(None), use_all)
        if not use_all:  # the gradient of an unused parameter is zero under DDP, and none without
            ours, alone = (values[-len(list(model.parameters())) :] for values in (ours, alone))
        for a, b in zip(ours, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, case=options: f"{case}: {m}")
        results.append([reference.bits(x) for x in ours])
    return results


@pytest.mark.parametrize("world_size", (2, 3))
def test_ddp_trains_as_one_process(world_size: int) -> None:
    """Gradients and parameters are those of one process with the whole batch, and the ranks' are equal bit by bit."""
    results = run(_ddp, world_size)
    for i, case in enumerate(DDP_CASES):
        assert all(result[i] == results[0][i] for result in results), f"{case}: ranks differ"


def _ddp_hook(rank: Rank) -> list[bytes]:
    torch.manual_seed(0)
    model = DistributedDataParallel(Net(), bucket_cap_mb=0.02)
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(rank.rank))
    model(x, True).square().mean().backward()
    return [reference.bits(p.grad) for p in model.parameters() if p.grad is not None]


def test_ddp_communication_hook() -> None:
    """A hook that chains on the future of an asynchronous all-reduce in float16."""
    first, second = run(_ddp_hook, 2)
    assert first == second


def _mixed_backend(rank: Rank) -> None:
    dist.init_process_group(
        "cpu:pycoll", init_method=f"file://{rank.folder / 'cpu'}", rank=rank.rank, world_size=rank.world_size
    )
    x = torch.ones(3)
    dist.all_reduce(x)
    assert x.tolist() == [2.0] * 3
    dist.destroy_process_group()


def test_named_for_the_device() -> None:
    with Processes(_mixed_backend, 2) as ranks:
        ranks.results()


def _env(rank: Rank, port: int) -> None:
    os.environ.update(
        RANK=str(rank.rank), WORLD_SIZE=str(rank.world_size), MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    dist.init_process_group("pycoll")
    x = torch.tensor([rank.rank])
    dist.all_reduce(x)
    assert x.item() == 3
    dist.destroy_process_group()


def test_init_from_the_environment() -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    with Processes(_env, 3, port) as ranks:
        ranks.results()


def _launched(rank: Rank, variables: dict[str, str]) -> int:
    for key in list(os.environ):
        if key.startswith(("OMPI_", "PMI_", "PMIX_", "SLURM_", "MASTER_")) or key in ("RANK", "WORLD_SIZE"):
            del os.environ[key]
    os.environ["TMPDIR"] = str(rank.folder)
    os.environ.update({k: v.format(rank=rank.rank, world=rank.world_size) for k, v in variables.items()})
    with pycoll.Communicator.from_env(timeout=30) as comm:
        assert (comm.rank, comm.world_size) == (rank.rank, rank.world_size)
        first = comm.all_reduce(torch.tensor([comm.rank])).item()
        with pycoll.Communicator.from_env(timeout=30) as second:
            second.barrier()
    return int(first)


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_RANK": "{rank}", "OMPI_COMM_WORLD_SIZE": "{world}", "PMIX_NAMESPACE": "prterun-7@1"},
        {"PMI_RANK": "{rank}", "PMI_SIZE": "{world}"},
        {"SLURM_PROCID": "{rank}", "SLURM_NTASKS": "{world}", "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0"},
    ],
    ids=["Open MPI", "MPICH", "Slurm"],
)
def test_communicator_from_a_launcher(variables: dict[str, str]) -> None:
    with Processes(_launched, 3, variables) as ranks:
        assert ranks.results() == [3, 3, 3]


TORCHRUN_SCRIPT = """
import torch, torch.distributed as dist, pycoll
with pycoll.Communicator.from_env() as comm:
    assert comm.all_reduce(torch.ones(4)).tolist() == [2.0] * 4
dist.init_process_group("pycoll")
x = torch.ones(4)
dist.all_reduce(x)
assert x.tolist() == [2.0] * 4
dist.destroy_process_group()
print("rank", comm.rank, "is done", flush=True)
"""


def test_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN_SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if "done" in line) == ["rank 0 is done", "rank 1 is done"]


def _calls_from_a_callback(rank: Rank, call: str) -> list[float]:
    """The callback runs while a later call is queued; what it calls itself comes behind that.

    Rank 2 makes the same calls without a callback, and the first one only when the others have added theirs.
    """
    x, blocks = torch.ones(2), [torch.empty(2) for _ in range(rank.world_size)]
    strided = torch.ones(4, 4)[:, :2]
    if rank.rank == 2:
        for other in (0, 1):
            dist.recv(torch.empty(1), other)
    second = dist.all_reduce(torch.ones(2), async_op=True)

    def asynchronous() -> None:
        dist.all_reduce(x, async_op=True).get_future().wait()

    calls = {
        "all_gather": lambda: dist.all_gather(blocks, x),
        "strided": lambda: dist.all_reduce(strided),
        "dense": lambda: dist.all_reduce(x),
        "asynchronous": asynchronous,
        "later": lambda: later[0].wait(),
        "later's future": lambda: later[0].get_future().wait(),
        "earlier": lambda: second.wait(),
    }
    later: list[Any] = []
    gate = threading.Event()

    def callback(_: Any) -> float:
        gate.wait(30)
        calls[call]()
        return float(x.sum() + strided.sum())

    first = dist.all_reduce(x, async_op=True).get_future()
    if rank.rank == 2:
        later.append(dist.all_reduce(torch.ones(2), async_op=True))
        calls[call]()
        dist.all_reduce(strided)
        return []
    future = first.then(callback)
    nested = future.then(lambda f: (dist.all_reduce(strided, async_op=True).get_future().wait(), f.value())[1])
    later.append(dist.all_reduce(torch.ones(2), async_op=True))
    dist.send(torch.ones(1), 2)
    gate.set()
    return [future.wait(), nested.wait()]


@pytest.mark.parametrize(
    "call", ("all_gather", "strided", "dense", "asynchronous", "later", "later's future", "earlier")
)
def test_a_callback_may_make_calls_and_wait_for_them(call: str) -> None:
    """The group goes on while it does: another thread serves it."""
    total = {"strided": 6.0 + 24, "dense": 18.0 + 8, "asynchronous": 18.0 + 8}.get(call, 6.0 + 8)
    assert run(_calls_from_a_callback, 3, call) == [[total, total]] * 2 + [[]]


def _under_inference_mode(rank: Rank) -> None:
    with torch.inference_mode():
        blocks = [torch.empty(3) for _ in range(rank.world_size)]
        dist.all_gather(blocks, torch.full((3,), float(rank.rank)))
        assert [b[0].item() for b in blocks] == [0.0, 1.0]
        x = torch.ones(4, 4)[:, :2]
        dist.all_reduce(x)
        assert bool((x == 2).all())
        y = torch.ones(4, 4)[:, :2]
        dist.all_reduce(y, async_op=True).wait()
        assert bool((y == 2).all())
    dist.barrier()


def test_inference_mode() -> None:
    run(_under_inference_mode, 2)


def _odd_arguments(rank: Rank) -> None:
    with pytest.raises(pycoll.UsageError, match="root 2 is not in a group of 2"):
        dist.distributed_c10d._get_default_group().broadcast(torch.ones(2), 2)
    out = torch.empty(4)
    dist.reduce_scatter(out, [torch.ones(1).expand(4)] * 2)  # which is only read
    assert out.tolist() == [2.0] * 4


def test_odd_arguments() -> None:
    run(_odd_arguments, 2)
