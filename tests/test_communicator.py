"""pycoll.Communicator, ranks as threads: every collective, at every shape of memory, against fp64."""

import gc
import itertools
import os
import random
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torch.distributed as dist
from leaks import held_segments
from reference import ALGORITHMS, DTYPES, OPS
from torch import Tensor

import pycoll
from pycoll import Communicator, Config
from pycoll.testing import Processes, Rank, run_threads
from pycoll.tuning import MiB

pytestmark = [pytest.mark.usefixtures("leaves_nothing"), pytest.mark.timeout(60)]

WORLDS = (1, 2, 3, 4, 7)
SLOT, LINK = 512, 128  # bytes: small data runs many rounds
LARGE = 100 * 2 * SLOT  # bytes: a hundred times what a rank's slots hold
ANY_DTYPE = (*DTYPES, torch.bool, torch.complex64, torch.complex128)


def tiny(**changes: int) -> Config:
    """A communicator that needs many rounds for little data, on one channel."""
    defaults = {"channels": 1, "slot_bytes": SLOT, "link_bytes": LINK, "link_slots": 2, "one_shot_max_bytes": 600}
    return Config(**{**defaults, "heap_bytes": 64 * MiB, **changes})


@dataclass(frozen=True)
class Case:
    """One all-reduce. The masks have a bit a rank: is its tensor in the shared heap? `shift`: storage offset."""

    dtype: torch.dtype
    op: str
    algorithm: str
    count: int
    in_place: bool
    heap_in: int
    heap_out: int
    shift: int = 0

    def inputs(self, world_size: int) -> list[Tensor]:
        return reference.inputs(world_size, self.count, self.dtype)


def place(comm: Communicator, like: Tensor, heap: int, shift: int) -> Tensor:
    """An uninitialised tensor like `like`, private or in the heap."""
    size = like.numel() + shift
    whole = comm.empty(size, like.dtype) if heap >> comm.rank & 1 else torch.empty(size, dtype=like.dtype)
    return whole[shift:]


def run_case(comm: Communicator, case: Case, x: Tensor) -> Tensor:
    """The result of `case` on this rank, in private memory."""
    given = place(comm, x, case.heap_in, case.shift)
    given.copy_(x)
    if case.in_place:
        assert comm.all_reduce(given, case.op, algorithm=case.algorithm) is given
        return given.clone()
    out = place(comm, x, case.heap_out, case.shift)
    assert comm.all_reduce(given, case.op, out=out, algorithm=case.algorithm) is out
    assert reference.bits(given) == reference.bits(x), "the input has changed"
    return out.clone()


def check_cases(world_size: int, cases: list[Case], config: Config) -> None:
    """Runs all cases on one communicator, and compares with fp64 and among the ranks."""
    given = [case.inputs(world_size) for case in cases]
    results = run_threads(
        lambda comm: [run_case(comm, case, x[comm.rank]) for case, x in zip(cases, given, strict=True)],
        world_size,
        config=config,
    )
    for i, case in enumerate(cases):
        reference.check(results[0][i], given[i], case.op, case)
        assert len({reference.bits(result[i]) for result in results}) == 1, f"{case}: ranks differ"


def placements(world_size: int) -> dict[str, tuple[int, int]]:
    """Which ranks have their input and their output in the shared heap."""
    everybody = (1 << world_size) - 1
    return {
        "staged": (0, 0),
        "symmetric": (everybody, everybody),
        "inputs": (everybody, 0),
        "outputs": (0, everybody),
        "mixed": (0b1010101 & everybody, 0b0110011 & everybody),
    }


@pytest.mark.parametrize("world_size", WORLDS)
def test_all_reduce_every_dtype_op_and_algorithm(world_size: int) -> None:
    cases = [
        Case(dtype, op, algorithm, 333, in_place, 0, 0)
        for dtype, op, algorithm, in_place in itertools.product(DTYPES, OPS, ALGORITHMS, (True, False))
    ]
    check_cases(world_size, cases, tiny())


@pytest.mark.parametrize("world_size", WORLDS)
def test_all_reduce_every_size_and_placement(world_size: int) -> None:
    counts = (0, 1, 2, 63, 64, 65, 129, 1021)
    cases = [
        Case(torch.float32, "sum", algorithm, count, in_place, *masks)
        for count, algorithm, in_place, masks in itertools.product(
            counts, (*ALGORITHMS, "auto"), (True, False), placements(world_size).values()
        )
    ]
    check_cases(world_size, cases, tiny(link_slots=3))


@pytest.mark.parametrize("world_size", WORLDS)
def test_all_reduce_a_hundred_times_the_slots(world_size: int) -> None:
    """Each algorithm at each placement, the dtypes in turn, few slots for the links: a wrong order would lock up."""
    dtypes, places = itertools.cycle(DTYPES), itertools.cycle((True, False))
    cases = []
    for algorithm, masks in itertools.product(ALGORITHMS, placements(world_size).values()):
        dtype = next(dtypes)
        cases.append(Case(dtype, "sum", algorithm, LARGE // dtype.itemsize + 7, next(places), *masks))
    check_cases(world_size, cases[::2], tiny(link_slots=2))
    check_cases(world_size, cases[1::2], tiny(link_slots=3))


@pytest.mark.parametrize("world_size", WORLDS)
def test_all_reduce_sample_of_everything(world_size: int) -> None:
    """A seeded sample of the whole product, ranks' placements drawn one by one."""
    draw = random.Random(world_size)
    cases = [
        Case(
            draw.choice(DTYPES),
            draw.choice(OPS),
            draw.choice((*ALGORITHMS, "auto")),
            draw.choice((0, 1, 3, 31, 127, 500, 2049)),
            draw.random() < 0.5,
            draw.getrandbits(world_size),
            draw.getrandbits(world_size),
            draw.choice((0, 1, 3)),
        )
        for _ in range(300)
    ]
    check_cases(world_size, cases, tiny(slot_bytes=1024, link_slots=3))


@pytest.mark.parametrize("channels", (1, 2, 3, 4))
@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_all_reduce_with_several_channels(world_size: int, channels: int) -> None:
    cases = [
        Case(dtype, "sum", algorithm, count, in_place, *masks)
        for dtype, algorithm, count, in_place, masks in itertools.product(
            (torch.float32, torch.bfloat16),
            ALGORITHMS,
            (1, 600, 5001),
            (True, False),
            (placements(world_size)[k] for k in ("staged", "symmetric", "mixed")),
        )
    ]
    check_cases(world_size, cases, tiny(channels=channels, channel_min_bytes=512))


def test_all_reduce_at_sixteen_ranks() -> None:
    cases = [Case(torch.float32, "sum", algorithm, 5000, True, 0b10, 0) for algorithm in ALGORITHMS]
    check_cases(16, cases, tiny(slot_bytes=2048))


@pytest.mark.parametrize("algorithm", (*ALGORITHMS, "auto"))
def test_all_reduce_of_every_layout(algorithm: str) -> None:
    """Strides, offsets and dimensions of all kinds; ranks may lay out their tensors differently."""

    def layouts(x: Tensor) -> Iterator[Tensor]:  # (6, 8)
        yield x.clone()
        yield x.t().contiguous().t()
        yield torch.empty(12, 16, dtype=x.dtype)[::2, ::2].copy_(x)
        yield torch.empty(49, dtype=x.dtype)[1:].view(6, 8).copy_(x)
        yield torch.empty(8, 6, 1, dtype=x.dtype).permute(1, 0, 2)[:, :, 0].copy_(x)
        yield torch.empty(49 * x.itemsize, dtype=torch.uint8)[x.itemsize :].view(x.dtype).view(6, 8).copy_(x)

    def rank_main(comm: Communicator) -> None:
        for dtype in DTYPES:
            given = reference.inputs(3, (6, 8), dtype)
            for i in range(6):
                mine = list(layouts(given[comm.rank]))
                x = mine[(i + comm.rank) % 6]
                comm.all_reduce(x, algorithm=algorithm)
                reference.check(x, given, "sum", f"in place, layout {i}, {dtype}")
                x, out = mine[(i + comm.rank + 1) % 6], mine[(i + comm.rank + 2) % 6]
                comm.all_reduce(x, "max", out=out, algorithm=algorithm)
                reference.check(out, given, "max", f"out of place, layout {i}, {dtype}")

    run_threads(rank_main, 3, config=tiny())


def test_all_reduce_at_any_address() -> None:
    """Memory that is not even aligned to its elements."""
    given = [x.numpy() for x in reference.inputs(2, 301, torch.float32)]

    def rank_main(comm: Communicator) -> None:
        for algorithm in ALGORITHMS:
            for shift in (1, 2, 3, 5):
                raw = np.empty(301 * 4 + 8, np.uint8)
                x = raw[shift : shift + 301 * 4].view(np.float32)
                x[:] = given[comm.rank]
                comm.all_reduce(x, algorithm=algorithm)
                np.testing.assert_array_equal(x, given[0] + given[1])

    run_threads(rank_main, 2, config=tiny())


def test_scalars_and_empty_shapes() -> None:
    def rank_main(comm: Communicator) -> None:
        assert comm.all_reduce(torch.tensor(comm.rank + 1.0)).item() == 6.0
        assert comm.all_reduce(np.array(comm.rank + 1)).item() == 6
        assert comm.all_reduce(torch.empty(3, 0, 2)).shape == (3, 0, 2)
        assert comm.broadcast(torch.tensor(comm.rank), root=2).item() == 2
        assert comm.all_gather(torch.tensor(comm.rank)).tolist() == [0, 1, 2]
        assert comm.all_gather(torch.empty(0, 5)).shape == (0, 5)
        assert comm.reduce_scatter(torch.empty(0, 5)).shape == (0, 5)

    run_threads(rank_main, 3)


def test_numpy_arrays() -> None:
    given = [x.numpy() for x in reference.inputs(2, (6, 8), torch.float64)]
    total = given[0] + given[1]

    def rank_main(comm: Communicator) -> None:
        mine = given[comm.rank]
        x = mine.copy()
        assert comm.all_reduce(x) is x
        np.testing.assert_array_equal(x, total)
        strided = np.zeros((12, 16))
        strided[::2, ::2] = mine
        comm.all_reduce(strided[::2, ::2])
        np.testing.assert_array_equal(strided[::2, ::2], total)
        assert not strided[1::2].any() and not strided[:, 1::2].any(), "what lies between is left alone"
        fortran = np.asfortranarray(mine)
        out = np.empty_like(fortran)
        assert comm.all_reduce(fortran, out=out) is out
        np.testing.assert_array_equal(out, total)
        np.testing.assert_array_equal(fortran, mine)
        gathered = comm.all_gather(mine)
        assert isinstance(gathered, np.ndarray)
        np.testing.assert_array_equal(gathered, np.concatenate(given))
        np.testing.assert_array_equal(comm.reduce_scatter(mine), np.split(total, 2)[comm.rank])
        flags = np.array([comm.rank == 1, True])
        assert comm.broadcast(flags, root=1) is flags and flags.all()

    run_threads(rank_main, 2)


def zeros_and_ones(world_size: int, count: int) -> list[Tensor]:
    """One input a rank that every dtype can hold."""
    return [torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(r)) for r in range(world_size)]


@pytest.mark.parametrize("world_size", WORLDS)
def test_broadcast(world_size: int) -> None:
    """Any dtype, from every root; each rank's memory drawn."""

    def rank_main(comm: Communicator) -> None:
        draw = random.Random(5)
        for dtype, root, count in itertools.product(ANY_DTYPE, range(world_size), (0, 1, 77, 1500)):
            given = zeros_and_ones(world_size, count)
            x = place(comm, given[0].to(dtype), draw.getrandbits(world_size), draw.choice((0, 1)))
            x.copy_(given[comm.rank])
            assert comm.broadcast(x, root) is x
            assert torch.equal(x, given[root].to(dtype)), (dtype, root, count)

    run_threads(rank_main, world_size, config=tiny())


@pytest.mark.parametrize("world_size", WORLDS)
def test_all_gather(world_size: int) -> None:
    def rank_main(comm: Communicator) -> None:
        draw = random.Random(6)
        for dtype, count in itertools.product(ANY_DTYPE, (0, 1, 67, 1500)):
            given = zeros_and_ones(world_size, count)
            whole = torch.cat(given).to(dtype)
            x = place(comm, given[0].to(dtype), draw.getrandbits(world_size), draw.choice((0, 1)))
            x.copy_(given[comm.rank])
            assert torch.equal(comm.all_gather(x), whole), (dtype, count)
            out = place(comm, whole, draw.getrandbits(world_size), draw.choice((0, 1)))
            assert comm.all_gather(x, out=out) is out
            assert torch.equal(out, whole), (dtype, count, "out")
            out.fill_(1)
            mine = out[comm.rank * count : (comm.rank + 1) * count]
            mine.copy_(x)
            comm.all_gather(mine, out=out)
            assert torch.equal(out, whole), (dtype, count, "in place")
        rows = torch.full((2, 3), float(comm.rank))
        assert comm.all_gather(rows)[:, 0].tolist() == [r for r in range(world_size) for _ in range(2)]

    run_threads(rank_main, world_size, config=tiny())


@pytest.mark.parametrize("world_size", WORLDS)
def test_reduce_scatter(world_size: int) -> None:
    draws = random.Random(7)
    cases = [*itertools.product(DTYPES, OPS, (0, 1, 67)), *itertools.product(DTYPES, ("sum",), (1100,))]
    masks = [(draws.getrandbits(world_size), draws.getrandbits(world_size), draws.choice((0, 1))) for _ in cases]
    given = [reference.inputs(world_size, world_size * count, dtype) for dtype, _, count in cases]

    def rank_main(comm: Communicator) -> list[Tensor]:
        results = []
        for (_, op, count), (heap_in, heap_out, shift), tensors in zip(cases, masks, given, strict=True):
            x = place(comm, tensors[0], heap_in, shift)
            x.copy_(tensors[comm.rank])
            out = place(comm, x[:count], heap_out, shift)
            assert comm.reduce_scatter(x, op, out=out) is out
            assert reference.bits(comm.reduce_scatter(x, op)) == reference.bits(out)
            mine = x[comm.rank * count : (comm.rank + 1) * count]
            comm.reduce_scatter(x, op, out=mine)
            assert reference.bits(mine) == reference.bits(out), "in place"
            results.append(out.clone())
        return results

    results = run_threads(rank_main, world_size, config=tiny())
    for i, (case, tensors) in enumerate(zip(cases, given, strict=True)):
        reference.check(torch.cat([r[i] for r in results]), tensors, case[1], case)


def test_large_broadcast_all_gather_and_reduce_scatter() -> None:
    """A hundred times the slots, on several channels."""
    given = reference.inputs(3, LARGE // 4 * 3, torch.float32)

    def rank_main(comm: Communicator) -> Tensor:
        x = given[comm.rank].clone()
        assert torch.equal(comm.all_gather(x), torch.cat(given))
        block = comm.reduce_scatter(x)
        assert torch.equal(comm.broadcast(x, 1), given[1])
        return block

    for channels in (1, 3):
        blocks = run_threads(rank_main, 3, config=tiny(channels=channels, channel_min_bytes=2048))
        reference.check(torch.cat(blocks), given, "sum", channels)


def test_what_does_not_fit_into_the_caches() -> None:
    """Such outputs are written past them; also at odd addresses, and in part."""
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    kib = int(cache.read_text().strip().removesuffix("K")) if cache.exists() else 32 << 10
    count = int(0.55 * kib * 2**10) // 8 * 2 + 1
    given = [torch.arange(count, dtype=torch.float32) + r for r in range(2)]

    def rank_main(comm: Communicator) -> None:
        mine, other = given[comm.rank], given[1 - comm.rank]
        out = torch.full((2 * count + 3,), -1.0)
        for first in (0, 3):  # elements before it, which nobody touches
            gathered = comm.all_gather(mine, out=out[first : first + 2 * count])
            assert torch.equal(gathered, torch.cat(given))
            exchanged = out[first : first + count]
            splits = [1, count - 1] if comm.rank == 0 else [count - 1, 1]
            received = comm.all_to_all(mine, out=exchanged, send_splits=splits, recv_splits=splits)
            assert received is exchanged
            begins = [0, 0] if comm.rank == 0 else [1, count - 1]
            ends = [begins[0] + splits[0], begins[1] + splits[1]]
            assert torch.equal(exchanged, torch.cat([g[b:e] for g, b, e in zip(given, begins, ends, strict=True)]))
            x = exchanged.copy_(mine)
            assert torch.equal(comm.broadcast(x, 1), given[1])
            if comm.rank == 0:
                comm.send(mine, 1)
            else:
                comm.recv(exchanged, 0)
                assert torch.equal(exchanged, other)
            assert torch.equal(comm.all_reduce(mine, out=exchanged), given[0] + given[1])
            out.fill_(-1.0)
            comm.all_gather(mine, out=out[first : first + 2 * count])
            assert torch.all(out[:first] == -1.0) and torch.all(out[first + 2 * count :] == -1.0)

    run_threads(rank_main, 2)


def test_barrier_holds_everybody() -> None:
    arrived: list[int] = []

    def rank_main(comm: Communicator) -> None:
        for turn in range(1, 50):
            arrived.append(comm.rank)
            comm.barrier()
            assert len(arrived) >= 3 * turn
            comm.barrier()

    run_threads(rank_main, 3)


def test_results_of_a_world_of_one() -> None:
    def rank_main(comm: Communicator) -> None:
        for op in OPS:
            for dtype in DTYPES:
                x = reference.inputs(1, 33, dtype)[0]
                assert torch.equal(comm.all_reduce(x.clone(), op), x), (op, dtype)
        x = torch.arange(4)
        out = torch.empty_like(x)
        assert torch.equal(comm.all_gather(x, out=out), x)
        assert torch.equal(comm.reduce_scatter(x), x)
        comm.barrier()

    run_threads(rank_main, 1)


def test_memory_formats_and_autograd_versions() -> None:
    """Channels-last tensors work, and autograd learns of the write."""

    def rank_main(comm: Communicator) -> None:
        x = torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
        comm.all_reduce(x)
        assert bool((x == 2).all()) and x.is_contiguous(memory_format=torch.channels_last)
        leaf = torch.ones(3, requires_grad=True)
        y = leaf * 1
        z = (y * y).sum()
        with torch.no_grad():
            comm.all_reduce(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.backward()

    run_threads(rank_main, 2)


def test_several_communicators_on_one_store() -> None:
    """Created and used in one order on all ranks; the default names count."""
    store = dist.HashStore()
    results: list[list[float]] = [[], []]
    # Ranks as threads share the counter behind the default names, so they are named here.

    def rank_main(rank: int) -> None:
        comms = [Communicator(store, rank, 2, name=f"group {i}", config=tiny(), timeout=30) for i in range(3)]
        for i in (2, 0, 1, 0):
            results[rank].append(comms[i].all_reduce(torch.tensor([1.0 + i + rank])).item())
        for comm in comms:
            comm.close()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[7.0, 3.0, 5.0, 3.0]] * 2


def test_a_name_can_be_used_again() -> None:
    store = dist.HashStore()

    def both(value: float) -> list[float]:
        results = [0.0, 0.0]

        def rank_main(rank: int) -> None:
            with Communicator(store, rank, 2, name="again", config=tiny(), timeout=timedelta(seconds=30)) as comm:
                assert comm.timeout == 30.0
                results[rank] = comm.all_reduce(torch.tensor([value])).item()

        threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    assert both(1.0) == [2.0, 2.0]
    assert both(3.0) == [6.0, 6.0]


def test_two_threads_of_a_rank_may_call() -> None:
    """Calls of one communicator run one at a time, whichever thread makes them. All are alike: no order to keep."""

    def rank_main(comm: Communicator) -> list[Tensor]:
        ones, outs = torch.ones(300), [torch.zeros(50, 300) for _ in range(2)]

        def work(out: Tensor) -> None:
            for row in out:
                comm.all_reduce(ones, out=row)

        threads = [threading.Thread(target=work, args=(out,)) for out in outs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outs

    for outs in run_threads(rank_main, 2, config=tiny()):
        assert all(bool((out == 2).all()) for out in outs)


def test_close_repr_and_context() -> None:
    def rank_main(comm: Communicator) -> None:
        assert not comm.closed
        assert repr(comm).startswith(f"<pycoll.Communicator rank {comm.rank} of 2: 1 channels, ")
        comm.barrier()
        comm.close()
        comm.close()
        assert comm.closed
        assert repr(comm) == f"<pycoll.Communicator rank {comm.rank} of 2: closed>"
        for call in (
            comm.barrier,
            lambda: comm.all_reduce(torch.ones(1)),
            lambda: comm.broadcast(torch.ones(1)),
            lambda: comm.all_gather(torch.ones(1)),
            lambda: comm.reduce_scatter(torch.ones(2)),
            lambda: comm.empty(3),
        ):
            with pytest.raises(pycoll.Error, match="closed"):
                call()

    run_threads(rank_main, 2, config=tiny())


def test_close_gives_memory_back() -> None:
    """Though the object lives on."""

    def rank_main(comm: Communicator) -> Communicator:
        x = comm.empty(1000)
        comm.all_reduce(x.zero_())
        del x
        comm.close()
        return comm

    kept = run_threads(rank_main, 2, config=tiny())
    assert held_segments() == []
    assert all(comm.closed for comm in kept)


def test_memory_outlives_its_communicator() -> None:
    def rank_main(comm: Communicator) -> Tensor:
        x = comm.empty((10, 10), torch.float64)
        x.fill_(comm.rank + 1)
        comm.all_reduce(x)
        return x[5:]

    for x in run_threads(rank_main, 2, config=tiny()):
        gc.collect()
        assert bool((x == 3).all())
        x.fill_(4)
        assert x.sum().item() == 200
        del x


def test_heap_memory_is_given_back() -> None:
    def rank_main(comm: Communicator) -> None:
        before = comm.footprint()
        x = comm.empty(MiB)  # 4 MiB
        assert comm.footprint() - before == 4 * MiB
        y = comm.empty((3, 5), torch.int8)
        assert y.shape == (3, 5) and y.dtype == torch.int8 and y.is_contiguous()
        view = x[100:200]
        del x
        assert comm.footprint() - before > 4 * MiB, "a view keeps its memory"
        del view, y
        assert comm.footprint() == before
        for _ in range(5):  # 64 MiB in all have room, so each must be gone before the next
            comm.empty(40 * MiB, torch.int8)
        assert comm.empty(0).numel() == 0

    run_threads(rank_main, 2, config=tiny())


def test_heap_blocks_are_apart() -> None:
    """What is allocated never overlaps, in whatever order memory comes and goes."""

    def rank_main(comm: Communicator) -> None:
        draw = random.Random(comm.rank)
        live: list[tuple[Tensor, int]] = []
        for step in range(400):
            if live and draw.random() < 0.45:
                x, value = live.pop(draw.randrange(len(live)))
                assert bool((x == value).all())
            else:
                x = comm.empty(draw.choice((1, 30, 1000, 5000, 70000)), torch.uint8)
                live.append((x.fill_(step % 256), step % 256))
        assert all(bool((x == value).all()) for x, value in live)

    run_threads(rank_main, 2, config=tiny(heap_bytes=16 * MiB))


def test_a_full_heap_is_an_error_and_no_more() -> None:
    def rank_main(comm: Communicator) -> None:
        x = comm.empty(48 * MiB, torch.uint8)
        with pytest.raises(pycoll.Error, match=r"no room for .* raise Config\.heap_bytes"):
            comm.empty(48 * MiB, torch.uint8)
        assert comm.all_reduce(x[:8].fill_(1)).tolist() == [2] * 8
        del x
        assert comm.empty(48 * MiB, torch.uint8).numel() == 48 * MiB

    run_threads(rank_main, 2, config=tiny())


def test_default_footprint() -> None:
    for footprint in run_threads(Communicator.footprint, 4, config=Config()):
        assert footprint < 64 * MiB
    for footprint in run_threads(Communicator.footprint, 2, config=Config(channels=4)):
        assert footprint < 64 * MiB


def test_ranks_settle_on_the_smallest_config() -> None:
    store = dist.HashStore()
    seen: list[str] = ["", ""]

    def rank_main(rank: int) -> None:
        config = tiny(channels=3 - rank, slot_bytes=SLOT * (1 + rank), channel_min_bytes=64)
        with Communicator(store, rank, 2, name="settle", config=config, timeout=30) as comm:
            x = torch.arange(3000.0)
            for algorithm in ALGORITHMS:
                assert torch.equal(comm.all_reduce(x, out=torch.empty_like(x), algorithm=algorithm), 2 * x)
            seen[rank] = repr(comm).split(": ")[1]

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0] == seen[1] and seen[0].startswith("2 channels")


LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPICH": ("PMI_RANK", "PMI_SIZE"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS"),
}


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without launcher, and a folder for temporary files."""
    prefixes = ("OMPI_", "PMI_", "PMIX_", "SLURM_", "MASTER_", "TORCHELASTIC_", "RANK", "WORLD_SIZE")
    for key in [key for key in os.environ if key.startswith(prefixes)]:
        monkeypatch.delenv(key)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("pycoll.rendezvous._rendezvous_stores", {})  # else kept while the process lives
    return tmp_path


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_from_env_in_a_world_of_one(launcher: str, monkeypatch: pytest.MonkeyPatch, no_launcher: Path) -> None:
    rank, world_size = LAUNCHERS[launcher]
    monkeypatch.setenv(rank, "0")
    monkeypatch.setenv(world_size, "1")
    if launcher == "torchrun":
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", "0")
    with Communicator.from_env(config=tiny(), timeout=20) as comm:
        assert (comm.rank, comm.world_size) == (0, 1)
        assert comm.all_reduce(torch.ones(2)).tolist() == [1.0, 1.0]
    del comm
    gc.collect()
    assert list(no_launcher.iterdir()) == [], "the file in which ranks meet is gone"


def test_from_env_in_a_pid_namespace_without_its_session_leader(
    monkeypatch: pytest.MonkeyPatch, no_launcher: Path
) -> None:
    monkeypatch.setattr("os.getsid", lambda pid: 0)  # as `docker exec` and `unshare --pid` leave it
    test_from_env_in_a_world_of_one("MPICH", monkeypatch, no_launcher)


def _from_env_again_and_again(rank: Rank, port: int) -> float:
    os.environ.update(RANK=str(rank.rank), WORLD_SIZE="3", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    total = 0.0
    for _ in range(5):  # nobody but rank 0 serves the store, and the ranks never wait for each other in between
        with Communicator.from_env(config=tiny(), timeout=30) as comm:
            total += comm.all_reduce(torch.ones(1)).item()
    dist.init_process_group("pycoll")
    x = torch.ones(1)
    dist.all_reduce(x)
    return total + x.item()


def test_from_env_where_rank_0_serves_the_store() -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    with Processes(_from_env_again_and_again, 3, port) as ranks:
        assert ranks.results(50) == [18.0] * 3


@pytest.mark.parametrize("timeout", (0, -1, float("nan")))
def test_from_env_with_an_impossible_timeout(timeout: float, no_launcher: Path) -> None:
    with pytest.raises(pycoll.UsageError, match="timeout must be positive"):
        Communicator.from_env(timeout=timeout)


def test_from_env_without_a_launcher(no_launcher: Path) -> None:
    with pytest.raises(pycoll.UsageError, match="torchrun, mpirun or srun"):
        Communicator.from_env()


def test_from_env_without_an_address(monkeypatch: pytest.MonkeyPatch, no_launcher: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(pycoll.UsageError, match="MASTER_ADDR"):
        Communicator.from_env()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_from_env_that_makes_no_sense(launcher: str, monkeypatch: pytest.MonkeyPatch, no_launcher: Path) -> None:
    rank, world_size = LAUNCHERS[launcher]
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setenv(rank, "first")
    monkeypatch.setenv(world_size, "2")
    with pytest.raises(pycoll.UsageError, match=rank):
        Communicator.from_env(timeout=5)
