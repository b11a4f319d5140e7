"""Communicators whose tensors are on GPUs: ranks on GPUs of their own, processes and threads that share one."""

import itertools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from places import ALONE, OWN, SHARED, beside_a_capture, needs
from torch.utils._python_dispatch import TorchDispatchMode

import pycoll
from pycoll import Communicator
from pycoll.testing import Processes, Rank, run_threads
from pycoll.tuning import CUDA, Config, KiB, MiB

pytestmark = pytest.mark.cuda
# Little data runs many rounds, over several channels.
SMALL = Config(
    channels=3,
    slot_bytes=4 * KiB,
    link_bytes=1 * KiB,
    link_slots=3,
    heap_bytes=1024 * MiB,
    channel_min_bytes=2 * KiB,
    word_bytes=1 * KiB,
)
HOST = ("one_shot", "two_shot", "ring", "tree")
WORDS = ("one_shot_ll", "two_shot_ll")


def seat(rank: Rank, where: str) -> Communicator:
    """The rank's communicator, with its GPU made the current one."""
    if where == ALONE:  # as some launchers do; nothing has asked CUDA yet in this process
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = given[rank.rank]
    torch.cuda.set_device(rank.rank if where == OWN else 0)
    return rank.communicator(cuda_config=SMALL, timeout=30)


def collectives(comm: Communicator, algorithms: tuple[str, ...]) -> None:
    """Everything, against the reference."""
    world, rank = comm.world_size, comm.rank
    for algorithm, (dtype, op) in itertools.product(algorithms, itertools.product(reference.DTYPES, reference.OPS)):
        given = reference.inputs(world, 1001, dtype)
        x = given[rank].cuda()
        comm.all_reduce(x, op, algorithm=algorithm)  # type: ignore[arg-type]
        reference.check(x.cpu(), given, op, (dtype, op, algorithm))
    for algorithm, count in itertools.product(algorithms, (0, 1, 3, 255, 4096, 100_003)):
        given = reference.inputs(world, count, torch.int32)
        x, out = given[rank].cuda(), torch.empty(count, dtype=torch.int32, device="cuda")
        assert comm.all_reduce(x, out=out, algorithm=algorithm) is out  # type: ignore[arg-type]
        assert torch.equal(out.cpu(), reference.reduced(given, "sum").to(torch.int32))
        assert torch.equal(x.cpu(), given[rank]), "the input is left alone"
    given = reference.inputs(world, 1001 * world, torch.bfloat16)
    x = given[rank].cuda()
    blocks = [t[rank * 1001 : (rank + 1) * 1001] for t in given]
    reference.check(comm.reduce_scatter(x).cpu(), blocks, "sum", "reduce_scatter")
    assert torch.equal(comm.all_gather(x[:100]).cpu(), torch.cat([t[:100] for t in given]))
    comm.broadcast(x, world - 1)
    assert torch.equal(x.cpu(), given[world - 1])
    comm.barrier()
    whole = reference.inputs(world, (64, 65), torch.float32)
    y = whole[rank].cuda()
    comm.all_reduce(y[:, 1:].t())
    torch.testing.assert_close(y[:, 1:].cpu(), reference.reduced(whole, "sum").float()[:, 1:], rtol=1e-5, atol=1e-5)
    assert torch.equal(y[:, 0].cpu(), whole[rank][:, 0]), "what lies beside is left alone"


def _collectives(rank: Rank, where: str) -> str:
    with seat(rank, where) as comm:
        collectives(comm, HOST if where == SHARED else (*HOST, *WORDS))
        return repr(comm)


@pytest.mark.parametrize("where", (SHARED, OWN, ALONE))
@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
def test_collectives(where: str, world_size: int) -> None:
    needs(where, world_size)
    with Processes(_collectives, world_size, where) as ranks:
        for text in ranks.results(240):
            assert ("step by step" in text) == (where == SHARED and world_size > 1)


@pytest.mark.parametrize("world_size", (2, 3))
def test_threads_that_share_a_gpu(world_size: int) -> None:
    def rank(comm: Communicator) -> str:
        collectives(comm, (*HOST, *WORDS))
        return repr(comm)

    assert all("threads that share" in text for text in run_threads(rank, world_size, cuda_config=SMALL))


def _symmetric(rank: Rank, where: str) -> list[int]:
    with seat(rank, where) as comm:
        held = []
        for turn in range(4):
            given = reference.inputs(rank.world_size, 30_011, torch.float32)
            x = comm.empty(30_011, device="cuda")
            for algorithm in ("two_shot", "one_shot", "two_shot"):
                x.copy_(given[rank.rank])
                comm.all_reduce(x, algorithm=algorithm)  # type: ignore[arg-type]
                reference.check(x.cpu(), given, "sum", (turn, algorithm))
            # Ranks may hold different memory.
            extra = comm.empty((rank.rank + 1) * 10_000_000, device="cuda") if turn == 1 else None
            held.append(comm.device_footprint())
            del extra
        pool = comm.mem_pool()
        with torch.cuda.use_mem_pool(pool):
            pooled = torch.empty(1000, device="cuda")
        pooled.copy_(given[rank.rank][:1000])
        comm.all_reduce(pooled)
        reference.check(pooled.cpu(), [t[:1000] for t in given], "sum", "from a pool")
        with pytest.raises(pycoll.Error, match="no room for") if where == OWN else pytest.raises(RuntimeError):
            comm.empty(1 << 40, dtype=torch.uint8, device="cuda")
        del pooled, pool
        return held


@pytest.mark.parametrize("where", (SHARED, OWN))
def test_memory_that_peers_map(where: str) -> None:
    needs(where, 2)
    with Processes(_symmetric, 2, where) as ranks:
        for held in ranks.results(120):
            if where == OWN:
                assert held[3] == held[1] > held[0], "it grows as needed, and is used again"


def _tensor_outlives(rank: Rank) -> float:
    comm = seat(rank, OWN)
    x = comm.empty(1000, device="cuda")
    comm.all_reduce(x)
    comm.close()
    assert comm.device_footprint() == 0
    x.fill_(3.0)
    with pytest.raises(pycoll.Error, match="closed"):
        comm.all_reduce(x)
    return float(x.cpu()[999])


def test_tensor_outlives_its_communicator() -> None:
    needs(OWN, 2)
    with Processes(_tensor_outlives, 2) as ranks:
        assert ranks.results(60) == [3.0, 3.0]


def _graph(rank: Rank, algorithm: str) -> None:
    with seat(rank, OWN) as comm:
        x = torch.zeros(20_000, device="cuda")
        # No warm-up: the ranks meet within the capture.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            comm.all_reduce(x, "avg", algorithm=algorithm)  # type: ignore[arg-type]
        for turn in range(5):
            x.fill_(rank.rank + turn)
            graph.replay()
            torch.cuda.synchronize()
            assert bool((x.cpu() == turn + (rank.world_size - 1) / 2).all())
            comm.all_reduce(x, "avg")  # between replays too
        del graph


@pytest.mark.parametrize("algorithm", (*HOST, *WORDS))
def test_graph_is_replayed(algorithm: str) -> None:
    needs(OWN, 2)
    with Processes(_graph, 2, algorithm) as ranks:
        ranks.results(120)


def _beside_a_capture(rank: Rank) -> None:
    with seat(rank, OWN) as comm:
        comm.all_reduce(torch.ones(10, device="cuda"))
        grown: list[torch.Tensor] = []

        def grow() -> None:
            torch.cuda.set_device(rank.rank)
            grown.append(comm.empty(10_000, device="cuda"))
            comm.all_reduce(torch.ones(1))  # on the host: the peer has sent its memory too
            grown[0].fill_(1.0)
            comm.all_reduce(grown[0])

        beside_a_capture(grow)
        assert bool((grown[0].cpu() == rank.world_size).all())


def test_memory_is_mapped_while_another_thread_captures() -> None:
    needs(OWN, 2)
    with Processes(_beside_a_capture, 2) as ranks:
        ranks.results(60)


def _no_graph(rank: Rank) -> None:
    with seat(rank, SHARED) as comm:
        x = torch.zeros(20, device="cuda")
        comm.all_reduce(x)
        with pytest.raises(pycoll.UnsupportedError, match="share a GPU"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            comm.all_reduce(x)


def test_no_graph_where_ranks_meet_on_the_host() -> None:
    with Processes(_no_graph, 2) as ranks:
        ranks.results(60)


def _streams(rank: Rank, where: str) -> None:
    with seat(rank, where) as comm:
        x = torch.ones(1_000_000, device="cuda")
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(3)]
        for i in range(12):
            with torch.cuda.stream(streams[i % 3]):
                comm.all_reduce(x, "max" if i else "sum")
        torch.cuda.synchronize()
        assert bool((x.cpu() == rank.world_size).all())


@pytest.mark.parametrize("where", (SHARED, OWN))
def test_streams_are_ordered(where: str) -> None:
    needs(where, 2)
    with Processes(_streams, 2, where) as ranks:
        ranks.results(60)


def _several(rank: Rank, where: str) -> None:
    torch.cuda.set_device(rank.rank if where == OWN else 0)
    store = dist.FileStore(str(rank.folder / "store"), rank.world_size)
    comms = [
        Communicator(store, rank.rank, rank.world_size, cuda_config=SMALL, name=f"group {i}", timeout=30)
        for i in range(3)
    ]
    x = [torch.ones(1000 * (i + 1), device="cuda") for i in range(3)]
    for turn in range(4):
        for i in range(3):
            comms[i].all_reduce(x[i], "sum" if turn == 0 else "max")
    for t in x:
        assert bool((t.cpu() == rank.world_size).all())
    for comm in comms:
        comm.close()


@pytest.mark.parametrize("where", (SHARED, OWN))
def test_several_communicators(where: str) -> None:
    needs(where, 2)
    with Processes(_several, 2, where) as ranks:
        ranks.results(60)


def _mismatch(rank: Rank, where: str, algorithm: str) -> tuple[str, str]:
    comm = seat(rank, where)
    comm.all_reduce(torch.ones(1, device="cuda"))
    x = torch.ones(10 + rank.rank, device="cuda")

    def call() -> None:
        comm.all_reduce(x, algorithm=algorithm)  # type: ignore[arg-type]

    text = error_of(call)
    again = error_of(call)
    assert float((torch.ones(3, device="cpu").cuda()).cpu().sum()) == 3.0, "the device stays usable"
    return text, again


def error_of(call: Callable[[], None]) -> str:
    """What the call comes to, at once or, where it only launched, a little later."""
    for _ in range(200):
        try:
            call()
            torch.cuda.synchronize()
        except pycoll.Error as e:
            return f"{type(e).__name__}: {e}"
        time.sleep(0.02)
    return "nothing"


@pytest.mark.parametrize(
    ("where", "algorithm"),
    (*itertools.product((SHARED, OWN), ("two_shot", "ring")), (OWN, "one_shot_ll")),
)
def test_mismatch_is_told(where: str, algorithm: str) -> None:
    needs(where, 2)
    with Processes(_mismatch, 2, where, algorithm) as ranks:
        for first, again in ranks.results(60):
            assert first.startswith("MismatchError") and "float32[10]" in first and "float32[11]" in first
            assert again == first, "an error is terminal"


def _lost(rank: Rank, where: str) -> str:
    comm = seat(rank, where)
    x = torch.ones(10, device="cuda")
    comm.all_reduce(x)
    rank.say("met")
    if rank.rank == 1:
        time.sleep(60)
    return error_of(lambda: void(comm.all_reduce(x)))


def void(_: object) -> None:
    """Drops a result."""


@pytest.mark.parametrize("where", (SHARED, OWN))
def test_lost_peer_is_named(where: str) -> None:
    needs(where, 3)
    with Processes(_lost, 3, where) as ranks:
        for r in range(3):
            assert ranks.hear(r) == "met"
        os.kill(ranks.pid(1), signal.SIGKILL)
        for r in (0, 2):
            assert "rank 1 is lost" in ranks.result(r, 60)


def _left(rank: Rank, where: str) -> str:
    comm = seat(rank, where)
    x = torch.ones(10, device="cuda")
    comm.all_reduce(x)
    if rank.rank == 1:
        comm.close()
        return ""
    return error_of(lambda: void(comm.all_reduce(x)))


@pytest.mark.parametrize("where", (SHARED, OWN))
def test_peer_that_left_is_named(where: str) -> None:
    needs(where, 2)
    with Processes(_left, 2, where) as ranks:
        text = ranks.result(0, 60)
        assert text.startswith("PeerLostError") and "rank 1 has left" in text


class UnreadableError(RuntimeError):
    """What Unreadable raises."""


class Unreadable(TorchDispatchMode):
    """Makes copying fail in this thread, as where a strided tensor is made dense, and memory or a kernel is missing."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            raise UnreadableError("it cannot be copied")
        return func(*args, **kwargs or {})


def _unreadable(rank: Rank, where: str) -> tuple[str, float]:
    comm = seat(rank, where)
    x = torch.ones(10, 2, device="cuda")
    comm.all_reduce(x)
    rank.say("met")
    rank.listen()
    began = time.monotonic()
    if rank.rank == 1:
        with Unreadable(), pytest.raises(UnreadableError, match="it cannot be copied"):
            comm.all_reduce(x[:, 1])
    return error_of(lambda: void(comm.all_reduce(x[:, 1].contiguous()))), time.monotonic() - began


@pytest.mark.parametrize("where", (SHARED, OWN))
def test_rank_that_cannot_read_its_tensor_tells_the_others(where: str) -> None:
    needs(where, 3)
    with Processes(_unreadable, 3, where) as ranks:
        for r in range(3):
            assert ranks.hear(r) == "met"
        for r in range(3):
            ranks.tell(r, "go")
        for text, seconds in ranks.results(60):
            assert text.startswith("Error: pycoll: rank 1 ")
            assert seconds < 15, "the others do not wait for the time-out of 30 s"


def _freed_early(rank: Rank) -> None:
    with seat(rank, OWN) as comm:
        one, other = comm.empty(1000, device="cuda"), comm.empty(1000, device="cuda")
        begins = {one.data_ptr(), other.data_ptr()}
        del one, other
        torch.cuda.synchronize()
        again = [comm.empty(1000, device="cuda") for _ in range(2)]
        assert {t.data_ptr() for t in again} == begins, "what nobody uses any more is used again"
        graph = torch.cuda.CUDAGraph()
        comm.all_reduce(again[0])
        with torch.cuda.graph(graph):
            comm.all_reduce(again[0])
            held = again.pop(0).data_ptr()  # freed within the capture
            with pytest.raises(pycoll.UnsupportedError, match="capture"):
                comm.empty(1, device="cuda")
        assert all(comm.empty(1000, device="cuda").data_ptr() != held for _ in range(3)), "replays use it"
        graph.replay()
        torch.cuda.synchronize()
        del graph


def test_memory_is_used_again_only_when_nobody_uses_it() -> None:
    needs(OWN, 2)
    with Processes(_freed_early, 2) as ranks:
        ranks.results(60)


def _late(rank: Rank, where: str) -> str:
    torch.cuda.set_device(rank.rank if where == OWN else 0)
    x = torch.ones(10, device="cuda")
    x.cpu()  # beginning to use a GPU may take longer than the time-out
    rank.say("ready")
    rank.listen()
    comm = rank.communicator(cuda_config=SMALL, timeout=4)
    comm.all_reduce(x)
    if rank.rank == 1:
        rank.listen()
        return ""
    return error_of(lambda: void(comm.all_reduce(x)))


@pytest.mark.parametrize("where", (SHARED, OWN))
def test_late_peer_is_named(where: str) -> None:
    needs(where, 2)
    with Processes(_late, 2, where) as ranks:
        for r in range(2):
            assert ranks.hear(r) == "ready"
        for r in range(2):
            ranks.tell(r, "go")
        text = ranks.result(0, 60)
        ranks.tell(1, "go")
        assert text.startswith("TimeoutError") and "rank 1" in text


def _bad_arguments(rank: Rank) -> None:
    with seat(rank, SHARED) as comm:
        x = torch.ones(10, device="cuda")
        comm.all_reduce(x)
        with pytest.raises(pycoll.UsageError, match="lie on"):
            comm.all_reduce(x, out=torch.ones(10))
        with pytest.raises(pycoll.UsageError, match="overlaps"):
            comm.all_reduce(x[:9], out=x[1:])
        with pytest.raises(pycoll.UnsupportedError, match="no max of ComplexFloat"):
            comm.all_reduce(torch.ones(10, dtype=torch.complex64).cuda(), "max")
        z = torch.full((10,), 1 + 2j * rank.rank, dtype=torch.complex64).cuda()
        comm.all_reduce(z)
        assert z.cpu().tolist() == [2 + 2j] * 10
        y = torch.ones(10)
        comm.all_reduce(y)
        assert bool((y == rank.world_size).all()), "CPU tensors as well"


def test_bad_arguments() -> None:
    with Processes(_bad_arguments, 2) as ranks:
        ranks.results(60)


def test_footprint_at_rest() -> None:
    with Processes(_footprint, 1) as ranks:
        assert 0 < ranks.result(0, 60) < 32 * MiB


def _footprint(rank: Rank) -> int:
    with rank.communicator(cuda_config=CUDA) as comm:
        comm.all_reduce(torch.ones(1, device="cuda"))
        return comm.device_footprint()


def test_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

    def rank(comm: Communicator) -> None:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            x = cupy.full(100_000, comm.rank + 1, dtype=cupy.float32)
            assert comm.all_reduce(x) is x
            gathered = comm.all_gather(x[:3])
            assert isinstance(gathered, cupy.ndarray)
            stream.synchronize()
            assert bool((x == 3).all()) and gathered.get().tolist() == [3.0] * 6

    run_threads(rank, 2, cuda_config=SMALL)
