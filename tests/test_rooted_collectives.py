"""pycoll.Communicator: reduce, gather, scatter, all-to-all, and every collective asynchronously, at all world sizes."""

import itertools
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.distributed as dist
from torch import Tensor

import pycoll
from pycoll import Communicator, Config
from pycoll.testing import run_threads
from pycoll.tuning import MiB

pytestmark = pytest.mark.timeout(60)

WORLDS = (1, 2, 3, 4, 7)
SMALL = Config(slot_bytes=2048, link_bytes=512, heap_bytes=64 * MiB)  # so that little data runs many rounds
COUNTS = (0, 1, 65, 3001)


def placed(comm: Communicator, x: Tensor, symmetric: bool) -> Tensor:
    """`x` in the shared heap or outside it."""
    return comm.empty(x.shape, x.dtype).copy_(x) if symmetric else x.clone()


def settings(comm: Communicator) -> Any:
    """count, where this rank's input and output lie (ranks differ), asynchronously or not."""
    for count, placing, async_op in itertools.product(COUNTS, range(4), (False, True)):
        turn = placing + comm.rank
        yield count, placing in (1, 3) or turn % 5 == 4, placing in (2, 3) or turn % 7 == 6, async_op


def finish(result: Any) -> None:
    if isinstance(result, dist.Work):
        result.wait()


def _reduce(comm: Communicator) -> None:
    for count, in_heap, out_in_heap, async_op in settings(comm):
        for op, dtype in (("sum", torch.bfloat16), ("avg", torch.float32), ("bxor", torch.int16)):
            root = count % comm.world_size
            inputs = reference.inputs(comm.world_size, count, dtype)
            x = placed(comm, inputs[comm.rank], in_heap)
            out = placed(comm, torch.zeros(count, dtype=dtype), out_in_heap)
            finish(comm.reduce(x, op, root, out=out, async_op=async_op))  # type: ignore[arg-type]
            assert torch.equal(x, inputs[comm.rank])
            if comm.rank != root:
                assert not out.any()
            elif op == "bxor":
                expected = inputs[0]
                for other in inputs[1:]:
                    expected = expected ^ other
                assert torch.equal(out, expected)
            else:
                reference.check(out, inputs, op, (count, in_heap, out_in_heap))
            if not async_op:
                in_place = comm.reduce(x, op, root)  # type: ignore[arg-type]
                assert (in_place is x) == (comm.rank == root)
                assert comm.rank != root or reference.bits(x) == reference.bits(out)


def _gather(comm: Communicator) -> None:
    for count, in_heap, out_in_heap, async_op in settings(comm):
        root = (count + 1) % comm.world_size
        inputs = reference.inputs(comm.world_size, (count, 2), torch.float64)
        x = placed(comm, inputs[comm.rank], in_heap)
        out = placed(comm, torch.zeros(count * comm.world_size, 2, dtype=torch.float64), out_in_heap)
        finish(comm.gather(x, root, out=out, async_op=async_op))
        assert torch.equal(out, torch.cat(inputs)) if comm.rank == root else not out.any()


def _scatter(comm: Communicator) -> None:
    for count, in_heap, out_in_heap, async_op in settings(comm):
        root = (count + 2) % comm.world_size
        (whole,) = reference.inputs(1, (count * comm.world_size, 3), torch.float16)
        x = placed(comm, whole, in_heap) if comm.rank == root else None
        out = placed(comm, torch.zeros(count, 3, dtype=torch.float16), out_in_heap)
        finish(comm.scatter(x, root, out=out, async_op=async_op))
        assert torch.equal(out, whole[count * comm.rank : count * (comm.rank + 1)])


def _all_to_all(comm: Communicator) -> None:
    world, me = comm.world_size, comm.rank
    for count, in_heap, out_in_heap, async_op in settings(comm):

        def rows(source: int, target: int, count: int = count) -> int:
            return count * (source + 1) // (target + 1) % 997

        parts = [[torch.full((rows(s, t), 2), float(10 * s + t)) for t in range(world)] for s in range(world)]
        x = placed(comm, torch.cat(parts[me]), in_heap)
        expected = torch.cat([parts[s][me] for s in range(world)])
        splits = {
            "send_splits": [rows(me, t) for t in range(world)],
            "recv_splits": [rows(s, me) for s in range(world)],
        }
        out = placed(comm, torch.zeros_like(expected), out_in_heap)
        finish(comm.all_to_all(x, out=out, async_op=async_op, **splits))
        assert torch.equal(out, expected)
        if not async_op:
            assert torch.equal(comm.all_to_all(x, **splits), expected)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("collective", (_reduce, _gather, _scatter, _all_to_all))
def test_every_size_and_placement(collective: Any, world_size: int) -> None:
    run_threads(collective, world_size, config=SMALL)


@pytest.mark.parametrize("world_size", (2, 3))
def test_several_channels(world_size: int) -> None:
    def rank_main(comm: Communicator) -> None:
        for collective in (_reduce, _gather, _scatter, _all_to_all):
            collective(comm)

    run_threads(rank_main, world_size, config=Config(channels=3, slot_bytes=4096, channel_min_bytes=2000))


def test_numpy_arrays_and_new_results() -> None:
    def rank_main(comm: Communicator) -> None:
        x = np.full(4, comm.rank + 1.0)
        reduced = comm.reduce(x, "max", 1, out=np.empty(4))
        assert (reduced is None) == (comm.rank != 1)
        assert comm.rank != 1 or reduced.tolist() == [2.0] * 4
        gathered = comm.gather(x, 0)
        assert gathered is None if comm.rank else gathered.tolist() == [1.0] * 4 + [2.0] * 4
        mine = comm.scatter(np.arange(6.0), 0) if comm.rank == 0 else comm.scatter(None, 0, out=np.empty(3))
        assert mine.tolist() == [3.0 * comm.rank + i for i in range(3)]
        exchanged = comm.all_to_all(x)
        assert type(exchanged) is np.ndarray and exchanged.tolist() == [1.0, 1.0, 2.0, 2.0]

    run_threads(rank_main, 2)


def test_asynchronous_calls_keep_their_order() -> None:
    def rank_main(comm: Communicator) -> None:
        x, gathered = torch.ones(1000), torch.empty(3000)
        works = [comm.all_reduce(x, async_op=True) for _ in range(5)]
        works.append(comm.broadcast(x, 1, async_op=True))
        works.append(comm.all_gather(x, out=gathered, async_op=True))
        scattered = torch.empty(1000)
        works.append(comm.reduce_scatter(gathered, out=scattered, async_op=True))
        works.append(comm.barrier(async_op=True))
        assert works[-1].wait()
        assert all(work.is_completed() for work in works)
        assert bool((gathered == 3**5).all()) and bool((scattered == 3**6).all())
        future = comm.all_reduce(x, async_op=True).get_future().then(lambda f: f.value()[0].sum().item())
        assert future.wait() == 1000.0 * 3**6

    run_threads(rank_main, 3)


def test_bad_arguments_leave_the_communicator_usable() -> None:
    def rank_main(comm: Communicator) -> None:
        x = torch.ones(4)
        for error, match, call in (
            (pycoll.UsageError, "root 2 is not in", lambda: comm.reduce(x, root=2)),
            (pycoll.UsageError, "root -1 is not in", lambda: comm.gather(x, -1)),
            (pycoll.UsageError, "`x` on the root", lambda: comm.scatter(None, comm.rank)),
            (pycoll.UsageError, "2 ranks divide", lambda: comm.scatter(torch.ones(3), comm.rank)),
            (pycoll.UsageError, "give `out`", lambda: comm.all_gather(x, async_op=True)),
            (pycoll.UsageError, "overlap", lambda: comm.all_to_all(x, out=x)),
            (pycoll.UsageError, "splits that add up", lambda: comm.all_to_all(x, send_splits=[1, 1])),
            (pycoll.UsageError, "negative", lambda: comm.all_to_all(x, send_splits=[5, -1])),
            (pycoll.UnsupportedError, "bor of Float", lambda: comm.all_reduce(x, "bor")),
            (pycoll.UsageError, "output must be", lambda: comm.reduce(x, root=comm.rank, out=torch.ones(3))),
        ):
            with pytest.raises(error, match=match):
                call()
        assert comm.all_reduce(x).tolist() == [2.0] * 4

    run_threads(rank_main, 2)


def test_different_counts_are_an_error_on_all_ranks() -> None:
    def rank_main(comm: Communicator) -> str:
        recv = [2, 2, 2] if comm.rank else [2, 2, 1]
        with pytest.raises(pycoll.MismatchError) as caught:
            comm.all_to_all(torch.ones(6), recv_splits=recv)
        return str(caught.value)

    texts = run_threads(rank_main, 3)
    assert set(texts) == {"pycoll: all_to_all: rank 2 sends 2 elements to rank 0, which expects 1"}
