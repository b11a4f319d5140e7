"""Send and receive through torch.distributed and pycoll.Communicator: order, tags, any source, large ones, failures."""

import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from groups import run
from leaks import native_threads

import pycoll
from pycoll import Communicator
from pycoll.testing import Processes, Rank, run_threads

pytestmark = pytest.mark.timeout(90)
LARGE = 5_000_011  # elements: far more than fit anywhere on the way


def message(source: int, count: int, tag: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(count) % 97 + 100 * source + 7 * tag).to(dtype)


def _every_size_and_dtype(rank: Rank) -> None:
    world, me = rank.world_size, rank.rank
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.complex64, torch.bool):
        for count in (0, 1, 13, 1000, 1009, 40_000, 700_001):
            for source in range(world):
                for target in range(world):
                    if source == target:
                        continue
                    x = message(source, count, dtype=dtype)
                    if me == source:
                        dist.send(x, target)
                    elif me == target:
                        y = torch.empty_like(x)
                        assert dist.recv(y, source) == source
                        assert torch.equal(x, y), (dtype, count)


def _mutual_large(rank: Rank) -> None:
    peers = [r for r in range(rank.world_size) if r != rank.rank]
    outs = [torch.empty(LARGE) for _ in peers]
    works = [dist.isend(message(rank.rank, LARGE), r) for r in peers]
    works += [dist.irecv(out, r) for out, r in zip(outs, peers, strict=True)]
    for work in works:
        work.wait()
        assert work.is_completed()
    assert all(torch.equal(out, message(r, LARGE)) for out, r in zip(outs, peers, strict=True))


def _tags_in_reverse(rank: Rank) -> None:
    """More of them than lie on the way, small and large by turns."""
    counts = [5 if tag % 3 else 70_000 for tag in range(60)]
    if rank.rank == 0:
        works = [dist.isend(message(0, count, tag), 1, tag=tag) for tag, count in enumerate(counts)]
        for work in works:
            work.wait()
    elif rank.rank == 1:
        for tag, count in reversed(list(enumerate(counts))):
            x = torch.empty(count)
            dist.recv(x, 0, tag=tag)
            assert torch.equal(x, message(0, count, tag)), tag


def _any_source(rank: Rank) -> None:
    world, me = rank.world_size, rank.rank
    for count in (3, 50_000):
        if me:
            for turn in range(10):
                dist.send(torch.full((count,), float(100 * me + turn)), 0, tag=count)
            continue
        turns = [0] * world
        for i in range(10 * (world - 1)):
            x = torch.empty(count)
            if i % 2:
                source = dist.recv(x, tag=count)
            else:
                work = dist.irecv(x, tag=count)
                assert work is not None and work.wait()
                source = work._source_rank()
            assert bool((x == 100 * source + turns[source]).all()), "of one rank in the order of its sends"
            turns[source] += 1
        assert turns == [0] + [10] * (world - 1)


def _batch(rank: Rank) -> None:
    world, me = rank.world_size, rank.rank
    for count in (1, 1000, 300_000):
        ops, outs = [], {}
        for r in range(world):
            if r != me:
                outs[r] = torch.empty(count)
                ops += [dist.P2POp(dist.irecv, outs[r], r), dist.P2POp(dist.isend, message(me, count), r)]
        for work in dist.batch_isend_irecv(ops) if ops else []:
            work.wait()
        assert all(torch.equal(x, message(r, count)) for r, x in outs.items())


def _beside_collectives(rank: Rank) -> None:
    """A receive that is answered late neither waits for collectives nor holds them up; large ones move meanwhile."""
    me, other = rank.rank, rank.rank ^ 1
    for count in (7, LARGE):
        x = torch.empty(count)
        receive = dist.irecv(x, other)
        for _ in range(20):
            y = torch.ones(1000)
            dist.all_reduce(y)
            assert y[0] == rank.world_size
        pending = dist.all_reduce(y, async_op=True)
        send = dist.isend(message(me, count), other)
        assert receive is not None and send is not None and pending is not None
        receive.wait()
        send.wait()
        pending.wait()
        assert torch.equal(x, message(other, count))


def _without_waiting(rank: Rank) -> None:
    """What nobody waits for goes on by itself."""
    if rank.rank == 0:
        work = dist.isend(message(0, LARGE), 1)
        assert work is not None
        deadline = time.monotonic() + 60
        while not (rank.folder / "received").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        work.wait()
    elif rank.rank == 1:
        x = torch.empty(LARGE)
        work = dist.irecv(x, 0)
        future = work.get_future().then(lambda f: f.value()[0][1].item())  # type: ignore[union-attr]
        assert future.wait() == 1.0
        assert torch.equal(x, message(0, LARGE))
        (rank.folder / "received").touch()


def _strided(rank: Rank) -> None:
    x = message(0, 600).view(20, 30)
    if rank.rank == 0:
        dist.group.WORLD.send([x.t()], 1, 0).wait()  # type: ignore[union-attr]
    elif rank.rank == 1:
        y = torch.zeros(60, 40)
        dist.group.WORLD.recv([y[::2, ::2]], 0, 0).wait()  # type: ignore[union-attr]
        assert torch.equal(y[::2, ::2], x.t()) and not y[1::2].any()


def _objects_and_groups(rank: Rank) -> None:
    group = dist.new_group([rank.world_size - 1, 0]) if rank.world_size > 2 else dist.group.WORLD
    last = rank.world_size - 1
    if rank.rank == 0:
        dist.send_object_list([{"a": 1}, "b" * 10_000], last, group=group)
    elif rank.rank == last:
        objects = [None, None]
        assert dist.recv_object_list(objects, 0, group=group) == 0
        assert objects == [{"a": 1}, "b" * 10_000]


def _no_thread_for_what_is_waited_for(rank: Rank) -> None:
    dist.barrier()
    before = native_threads()
    group = dist.new_group()
    x = torch.zeros(10)
    for _ in range(10):
        if rank.rank == 0:
            dist.send(x, 1, group=group)
        elif rank.rank == 1:
            dist.recv(x, 0, group=group)
    assert native_threads() <= before + 1


CASES = (
    _every_size_and_dtype,
    _mutual_large,
    _tags_in_reverse,
    _any_source,
    _batch,
    _beside_collectives,
    _without_waiting,
    _strided,
    _objects_and_groups,
    _no_thread_for_what_is_waited_for,
)


def _cases(rank: Rank) -> None:
    for case in CASES:
        if case is _beside_collectives and rank.world_size % 2:
            continue
        try:
            case(rank)
        except Exception as e:
            raise AssertionError(f"{case.__name__} failed") from e
        dist.barrier()


@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_through_torch_distributed(world_size: int) -> None:
    run(_cases, world_size)


def test_the_communicator() -> None:
    def rank_main(comm: Communicator) -> None:
        me, last = comm.rank, comm.world_size - 1
        if me == 0:
            comm.send(np.arange(5.0), last, tag=3)
            comm.isend(torch.ones(100_000), last).wait()
        elif me == last:
            x, y = np.empty(5), torch.empty(100_000)
            work = comm.irecv(y, 0)
            assert comm.recv(x, tag=3) == 0 and x.tolist() == [0, 1, 2, 3, 4]
            assert work.wait() and bool((y == 1).all())
        weight = torch.ones(2, requires_grad=True)
        with pytest.raises(pycoll.UsageError, match="requires grad"):
            comm.recv(weight, last - me if last != 2 * me else 0)
        for call, text in (
            (lambda: comm.send(torch.ones(1), me), "itself|oneself"),
            (lambda: comm.send(torch.ones(1), 7), "7"),
            (lambda: comm.recv(torch.ones(1), -2), "-2"),
            (lambda: comm.send(torch.ones(1), (me + 1) % 3, tag=-1), "tag"),
        ):
            with pytest.raises(pycoll.UsageError, match=text):
                call()
        comm.barrier()

    run_threads(rank_main, 3)


def test_a_receive_of_another_size_or_type_is_an_error_at_both_ends() -> None:
    for sent, received in ((torch.ones(3), torch.ones(4)), (torch.ones(3), torch.ones(3, dtype=torch.int32))):

        def rank_main(comm: Communicator, sent: torch.Tensor = sent, received: torch.Tensor = received) -> None:
            if comm.rank == 0:
                comm.send(sent, 1)
            with pytest.raises(pycoll.MismatchError):
                comm.recv(received, 1 - comm.rank)

        run_threads(rank_main, 2)


def _late(rank: Rank) -> str:
    comm = rank.communicator(timeout=1.0)
    if rank.rank == 0:
        work = comm.irecv(torch.empty(3), 1)
        with pytest.raises(pycoll.TimeoutError, match="given to wait"):
            work.wait(timedelta(milliseconds=50))
        with pytest.raises(pycoll.TimeoutError, match="rank 1") as caught:
            work.wait()
        assert caught.value.rank == 1
        return str(caught.value)
    time.sleep(2)
    with pytest.raises(pycoll.TimeoutError):
        comm.barrier()
    return ""


def test_a_receive_that_is_not_answered_names_who_does_not_send() -> None:
    with Processes(_late, 2) as ranks:
        assert "waited 1000 ms" in ranks.results()[0]


def _lost(rank: Rank, count: int, what: str) -> float:
    comm = rank.communicator(timeout=30.0)
    comm.barrier()
    if rank.rank == 1:
        if what == "after its send":
            comm.send(torch.full((count,), 5.0), 0)
        rank.say("ready")
        time.sleep(60)
    x = torch.zeros(count)
    if what == "after its send":
        rank.listen()
        comm.recv(x, 1)
        assert bool((x == 5).all()), "what lies in my memory still counts"
    rank.say("waiting")
    call: Callable[[], Any] = {
        "sending": lambda: comm.send(torch.ones(1_000_000), 1),
        "any source": lambda: comm.recv(x),
    }.get(what, lambda: comm.recv(x, 1))
    with pytest.raises(pycoll.PeerLostError) as caught:
        call()
    assert caught.value.rank == 1
    return time.time()


@pytest.mark.parametrize("what", ("receiving", "sending", "any source", "after its send"))
def test_a_killed_rank_is_lost_at_once(what: str) -> None:
    with Processes(_lost, 2, 3, what) as ranks:
        ranks.hear(1)
        if what != "after its send":
            ranks.hear(0)
            time.sleep(0.3)
        killed = time.time()
        ranks.kill(1)
        if what == "after its send":
            ranks.exit_code(1)
            ranks.tell(0, "go")
            ranks.result(0)
        else:
            assert ranks.result(0) - killed < 10, "the bar is 1 s; this is a bound against hangs on a loaded machine"


def _stopped(rank: Rank) -> None:
    comm = rank.communicator(timeout=30.0)
    comm.barrier()
    x = message(1, LARGE)
    if rank.rank == 1:
        rank.say("sending")
        comm.send(x, 0)
    else:
        y = torch.empty(LARGE)
        rank.listen()  # without a receiver no sender of so much can end
        comm.recv(y, 1)
        assert torch.equal(x, y)


def test_a_stopped_sender_is_waited_for() -> None:
    with Processes(_stopped, 2) as ranks:
        ranks.hear(1)
        ranks.kill(1, signal.SIGSTOP)
        ranks.tell(0, "receive")
        time.sleep(1.0)
        ranks.kill(1, signal.SIGCONT)
        ranks.results()


def _monitored(rank: Rank) -> str:
    rank.init_process_group(timeout=20.0)
    group = dist.group.WORLD
    assert group is not None
    for wait_all in (False, True):
        group.monitored_barrier(timedelta(seconds=10), wait_all)
    if rank.rank == 1:
        time.sleep(1.0)
    with pytest.raises(RuntimeError) as caught:
        group.monitored_barrier(timedelta(milliseconds=300), True)
    failure = str(caught.value)
    x = torch.ones(1)
    dist.all_reduce(x)
    assert x.item() == rank.world_size, "the group goes on"
    group.monitored_barrier(timedelta(seconds=10))
    dist.destroy_process_group()
    return failure


def test_monitored_barrier_names_who_is_missing() -> None:
    with Processes(_monitored, 3) as ranks:
        first, late, last = ranks.results()
    assert "Ranks 1 failed to pass monitoredBarrier in 300 ms" in first
    assert "Rank 2 successfully reached monitoredBarrier, but received errors" in last
    assert "Rank 1 successfully reached monitoredBarrier, but received errors" in late
