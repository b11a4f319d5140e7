"""What goes wrong among ranks: a typed error on every rank that says who is to blame, and nothing left behind."""

import atexit
import builtins
import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from asleep import until_asleep
from leaks import descriptors, held_segments, mappings, native_threads, native_threads_left

import pycoll
from pycoll import Communicator
from pycoll.testing import Processes, Rank

pytestmark = pytest.mark.timeout(60)

HANG = 20.0  # seconds after which a test gives up; none is a measure of speed
MIB = 1 << 20


def outcome(call: Callable[[], Any]) -> tuple[str, str, int | None]:
    """The error that `call` raises: class, text and the rank to blame."""
    try:
        call()
    except pycoll.Error as e:
        return type(e).__name__, str(e), e.rank
    return "no error", "", None


# ---- ranks that make different calls ----

Calls = dict[str, Callable[[Communicator], Any]]
CALLS: Calls = {
    "all_reduce(float32[4], sum, one_shot)": lambda c: c.all_reduce(torch.ones(4)),
    "all_reduce(float32[4], max, one_shot)": lambda c: c.all_reduce(torch.ones(4), "max"),
    "all_reduce(float32[5], sum, one_shot)": lambda c: c.all_reduce(torch.ones(5)),
    "all_reduce(float64[4], sum, one_shot)": lambda c: c.all_reduce(torch.ones(4).double()),
    "all_reduce(float64[2], sum, one_shot)": lambda c: c.all_reduce(torch.ones(2).double()),
    "all_reduce(float32[4], sum, ring)": lambda c: c.all_reduce(torch.ones(4), algorithm="ring"),
    "all_reduce(float32[4000000], sum, two_shot)": lambda c: c.all_reduce(torch.ones(4_000_000)),
    "broadcast(float32[4], root 0)": lambda c: c.broadcast(torch.ones(4)),
    "broadcast(float32[4], root 1)": lambda c: c.broadcast(torch.ones(4), 1),
    "all_gather(float32[4])": lambda c: c.all_gather(torch.ones(4)),
    "all_gather(float32[3])": lambda c: c.all_gather(torch.ones(3)),
    "reduce_scatter(float32[3], sum)": lambda c: c.reduce_scatter(torch.ones(3)),
    "reduce_scatter(float32[3], avg)": lambda c: c.reduce_scatter(torch.ones(3), "avg"),
    "barrier()": lambda c: c.barrier(),
}
DIFFERENT = [  # what ranks 0 and 1 call, what rank 2 calls
    ("all_reduce(float32[4], sum, one_shot)", "all_reduce(float32[4], max, one_shot)"),
    ("all_reduce(float32[4], sum, one_shot)", "all_reduce(float32[5], sum, one_shot)"),
    ("all_reduce(float32[4], sum, one_shot)", "all_reduce(float64[4], sum, one_shot)"),
    ("all_reduce(float32[4], sum, one_shot)", "all_reduce(float64[2], sum, one_shot)"),
    ("all_reduce(float32[4], sum, one_shot)", "all_reduce(float32[4], sum, ring)"),
    ("all_reduce(float32[4], sum, one_shot)", "all_reduce(float32[4000000], sum, two_shot)"),
    ("all_reduce(float32[4000000], sum, two_shot)", "barrier()"),
    ("broadcast(float32[4], root 0)", "broadcast(float32[4], root 1)"),
    ("broadcast(float32[4], root 0)", "all_gather(float32[4])"),
    ("all_gather(float32[4])", "all_gather(float32[3])"),
    ("reduce_scatter(float32[3], sum)", "reduce_scatter(float32[3], avg)"),
    ("barrier()", "all_reduce(float32[4], sum, one_shot)"),
]


def _mismatch(rank: Rank) -> list[tuple[tuple[str, str, int | None], tuple[str, str, int | None]]]:
    results = []
    for i, (most, last) in enumerate(DIFFERENT):
        with rank.communicator(name=f"case {i}", timeout=30) as comm:
            comm.barrier()  # call #1, after the one in which they met
            error = outcome(lambda c=comm, call=CALLS[last if rank.rank == 2 else most]: call(c))
            results.append((error, outcome(comm.barrier)))
    return results


def test_different_calls_are_an_error_on_every_rank() -> None:
    with Processes(_mismatch, 3) as ranks:
        results = ranks.results()
    for i, (most, last) in enumerate(DIFFERENT):
        for result in results:
            (kind, text, _), later = result[i]
            assert kind == "MismatchError", (most, last)
            assert f"rank 0,1 call #2 {most}" in text and f"rank 2 call #2 {last}" in text, text
            assert later[:2] == (kind, text), "the error is terminal"


def _mismatch_in_group(rank: Rank) -> list[tuple[str, str, int | None]]:
    def async_all_reduce() -> None:
        dist.all_reduce(torch.ones(3 + rank.rank), async_op=True).wait()

    def wait_for_future() -> None:
        dist.all_reduce(torch.ones(3 + rank.rank), async_op=True).get_future().wait()

    results = []
    for i, call in enumerate((lambda: dist.all_reduce(torch.ones(3 + rank.rank)), async_all_reduce)):
        rank.init_process_group(f"group {i}")
        results.append(outcome(call))
        results.append(outcome(dist.barrier))
        dist.destroy_process_group()
    rank.init_process_group("future")
    with pytest.raises(RuntimeError, match="ranks make different calls"):  # futures carry the text, not the class
        wait_for_future()
    dist.destroy_process_group()
    return results


def test_different_calls_through_torch_distributed() -> None:
    with Processes(_mismatch_in_group, 2) as ranks:
        for result in ranks.results():
            for kind, text, _ in result:
                assert kind == "MismatchError"
                assert re.search(r"rank 0 call #\d+ all_reduce\(float32\[3\]", text)
                assert re.search(r"rank 1 call #\d+ all_reduce\(float32\[4\]", text)


def _different_worlds(rank: Rank) -> tuple[str, str, int | None]:
    store = dist.FileStore(str(rank.folder / "store"), 2)
    return outcome(lambda: Communicator(store, rank.rank, 2 + rank.rank, timeout=2, name="worlds"))


def _other_shapes(rank: Rank) -> list[tuple[str, str]]:
    pairs: list[tuple[Any, Any]] = [
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(4, dtype=torch.uint8), torch.ones(4, dtype=torch.bool)),
        (torch.ones(2, dtype=torch.complex64), torch.ones(16, dtype=torch.bool)),
    ]
    seen = []
    for i, pair in enumerate(pairs):
        with rank.communicator(name=f"case {i}", timeout=30) as comm:
            x = pair[rank.rank]
            seen.append(outcome(lambda c=comm, x=x, i=i: c.all_reduce(x) if i == 0 else c.broadcast(x))[:2])
    rank.init_process_group()
    x = torch.ones(4, dtype=torch.bool if rank.rank else torch.uint8)
    seen.append(outcome(lambda: dist.broadcast(x, 0))[:2])
    return seen


def test_equal_counts_of_other_shapes_and_types() -> None:
    with Processes(_other_shapes, 2) as ranks:
        for seen in ranks.results(HANG):
            assert [kind for kind, _ in seen] == ["MismatchError"] * 4
            assert "all_reduce(float32[6], sum, one_shot), shape or element type no. 1" in seen[0][1]
            assert "rank 1" in seen[0][1] and "no. 2" in seen[0][1]


def test_different_world_sizes() -> None:
    """Rank 0 says 2, rank 1 says 3 and waits for a rank that nobody else knows of."""
    with Processes(_different_worlds, 2) as ranks:
        (kind, text, _), other = ranks.results()
    assert kind == "MismatchError" and "rank 1 says the world size is 3, rank 0 says 2" in text
    assert other[0] in ("MismatchError", "TimeoutError")


# ---- ranks that do not come, are slow, leave, or fail ----


def _absent_at_creation(rank: Rank) -> tuple[str, str, int | None]:
    if rank.rank == 2:
        rank.listen()
    return outcome(lambda: rank.communicator(timeout=1.0))


def test_a_rank_that_never_joins_is_named() -> None:
    with Processes(_absent_at_creation, 3) as ranks:
        for r in (0, 1):
            kind, text, culprit = ranks.result(r, HANG)
            assert kind == "TimeoutError" and "rank 2 of 3 did not join in time" in text and culprit == 2


def _absent_in_a_collective(rank: Rank) -> tuple[str, str, int | None]:
    comm = rank.communicator(timeout=1.0)
    comm.barrier()
    if rank.rank == 1:
        rank.listen()
    else:
        assert issubclass(pycoll.TimeoutError, builtins.TimeoutError)
    return outcome(lambda: comm.all_reduce(torch.ones(100_000)))


@pytest.mark.parametrize("world_size", (2, 4))
def test_a_rank_that_does_not_call_is_named(world_size: int) -> None:
    """Nothing but the time-out speaks of a rank that lives; and when it comes at last it learns of the same error."""
    with Processes(_absent_in_a_collective, world_size) as ranks:
        for r in range(world_size):
            if r != 1:
                kind, text, culprit = ranks.result(r, HANG)
                assert kind == "TimeoutError" and "for rank 1, which is alive" in text and culprit == 1
        ranks.tell(1, "come")
        kind, _, culprit = ranks.result(1, HANG)
        assert kind == "TimeoutError" and culprit == 1


def _stopped(rank: Rank, timeout: float) -> tuple[str, str, int | None]:
    comm = rank.communicator(timeout=timeout)
    rank.say("ready")
    if rank.rank == 1:
        rank.listen()
    x = torch.ones(MIB)

    def work() -> None:
        for _ in range(3):
            comm.all_reduce(x)

    return (*outcome(work)[:2], int(x[0].item()))


def test_a_stopped_rank_is_waited_for() -> None:
    with Processes(_stopped, 3, 50.0) as ranks:
        assert [ranks.hear(r) for r in range(3)] == ["ready"] * 3
        ranks.kill(1, signal.SIGSTOP)
        ranks.tell(1, "go")
        time.sleep(1.0)
        ranks.kill(1, signal.SIGCONT)
        assert ranks.results(HANG) == [("no error", "", 27)] * 3


def test_a_stopped_rank_is_late_but_never_lost() -> None:
    with Processes(_stopped, 3, 1.0) as ranks:
        assert [ranks.hear(r) for r in range(3)] == ["ready"] * 3
        ranks.kill(1, signal.SIGSTOP)
        for r in (0, 2):
            kind, text, _ = ranks.result(r, HANG)
            assert kind == "TimeoutError" and "rank 1" in text
        ranks.kill(1, signal.SIGCONT)
        ranks.tell(1, "go")
        assert ranks.result(1, HANG)[0] in ("TimeoutError", "PeerLostError")  # by now the others may have left


def _stopped_in_a_wait(rank: Rank) -> tuple[str, str, int | None]:
    comm = rank.communicator(timeout=1.5 if rank.rank == 2 else 50.0)
    rank.say("ready")
    rank.listen()
    comm.all_reduce(torch.ones(3))  # rank 1 has done its part when it is stopped, and waits for rank 0
    return outcome(comm.barrier)


def test_a_rank_stopped_in_a_wait_is_blamed_itself() -> None:
    """Though the last it said was that it waits for another."""
    with Processes(_stopped_in_a_wait, 3) as ranks:
        assert [ranks.hear(r) for r in range(3)] == ["ready"] * 3
        ranks.tell(1, "go")
        until_asleep(ranks.pid(1))
        ranks.kill(1, signal.SIGSTOP)
        ranks.tell(0, "go")
        ranks.tell(2, "go")
        for r in (0, 2):
            kind, text, culprit = ranks.result(r, HANG)
            assert kind == "TimeoutError" and "rank 2 waited" in text and culprit == 1


def _dies_as_they_meet(rank: Rank) -> tuple[str, str, int | None]:
    if rank.rank == 2:
        rank.listen()
    else:
        rank.say("meeting")
    return outcome(lambda: rank.communicator(timeout=20))


def test_a_rank_that_dies_as_they_meet_is_lost() -> None:
    """Its address is known by then, and nobody answers there."""
    with Processes(_dies_as_they_meet, 3) as ranks:
        assert [ranks.hear(r) for r in range(2)] == ["meeting"] * 2
        until_asleep(ranks.pid(1))
        ranks.kill(1)
        ranks.exit_code(1)
        ranks.tell(2, "come")
        for r in (0, 2):
            kind, text, culprit = ranks.result(r, HANG)
            assert kind == "PeerLostError" and "rank 1 is lost: gone while the ranks met" in text and culprit == 1


def _leaves_early(rank: Rank) -> tuple[str, str, int | None]:
    comm = rank.communicator()
    comm.barrier()
    if rank.rank == 1:
        comm.close()
        return "no error", "", None
    return outcome(lambda: comm.all_reduce(torch.ones(3)))


def test_a_rank_that_closes_has_left() -> None:
    with Processes(_leaves_early, 3) as ranks:
        results = ranks.results(HANG)
    for r in (0, 2):
        kind, text, culprit = results[r]
        assert kind == "PeerLostError" and "rank 1 has left" in text and culprit == 1


def _raises(rank: Rank, how: str) -> tuple[str, str, int | None]:
    comm = rank.communicator()
    if rank.rank == 1 and how == "with":
        with comm:
            raise ValueError("an exception of the user's")
    if rank.rank == 1:
        raise ValueError("an exception of the user's")
    return outcome(lambda: comm.all_reduce(torch.ones(3)))


@pytest.mark.parametrize("how", ("with", "without"))
def test_an_exception_on_one_rank_frees_the_others(how: str) -> None:
    with Processes(_raises, 3, how) as ranks:
        for r in (0, 2):
            kind, _, culprit = ranks.result(r, HANG)
            assert kind == "PeerLostError" and culprit == 1
        with pytest.raises(pycoll.Error, match="an exception of the user's"):
            ranks.result(1)


def _aborts(rank: Rank, who: str) -> tuple[str, str, int | None]:
    comm = rank.communicator()
    comm.barrier()
    if rank.rank == 1 and who == "peer":
        comm.abort("no room on the disk")
        return outcome(comm.barrier)
    if rank.rank == 1:
        threading.Timer(0.3, comm.abort, ["no room on the disk"]).start()
        return outcome(lambda: comm.all_reduce(torch.ones(3)))
    if rank.rank == 2 and who == "thread":
        rank.listen()
        with contextlib.suppress(pycoll.Error):
            comm.all_reduce(torch.ones(3))  # the others have done their part of it
    return outcome(lambda: comm.all_reduce(torch.ones(3)))


@pytest.mark.parametrize("who", ("peer", "thread"))
def test_abort_ends_the_calls_of_all_ranks(who: str) -> None:
    """Also the call in which the aborting rank itself waits."""
    with Processes(_aborts, 3, who) as ranks:
        for r in (0, 1):
            kind, text, _ = ranks.result(r, HANG)
            assert kind == "Error" and "rank 1: no room on the disk" in text
        if who == "thread":
            ranks.tell(2, "come")
        assert "no room on the disk" in ranks.result(2, HANG)[1]


# ---- ranks that die ----


def _all_reduce_for_ever(rank: Rank, memory: str) -> dict[str, Any]:
    comm = rank.communicator(config=pycoll.Config(heap_bytes=300 * MIB))
    threads = native_threads()
    x = comm.empty(64 * MIB) if memory == "symmetric" else torch.empty(64 * MIB)
    x.zero_()
    algorithm: Any = "ring" if memory == "ring" else "two_shot"
    comm.all_reduce(x, algorithm=algorithm)
    rank.say("going")
    try:
        while True:
            comm.all_reduce(x, algorithm=algorithm)
    except pycoll.Error as e:
        seen = {"at": time.monotonic(), "kind": type(e).__name__, "text": str(e), "culprit": e.rank}
    comm.close()
    del x
    del comm
    return {**seen, "segments": held_segments(), "threads": native_threads_left(threads)}


@pytest.mark.parametrize("memory", ("staged", "symmetric", "ring"))
def test_a_killed_rank_is_lost(memory: str) -> None:
    """SIGKILL inside 256 MiB all-reduces."""
    with Processes(_all_reduce_for_ever, 3, memory) as ranks:
        assert [ranks.hear(r) for r in range(3)] == ["going"] * 3
        time.sleep(0.2)
        killed = time.monotonic()
        ranks.kill(1)
        for r in (0, 2):
            seen = ranks.result(r, HANG)
            print(f"rank {r} knew {1e3 * (seen['at'] - killed):.0f} ms after the kill")
            assert seen["kind"] == "PeerLostError" and seen["culprit"] == 1 and "rank 1 is lost" in seen["text"]
            assert seen["at"] - killed < 10, "the bar is 1 s; this is a bound against hangs on a loaded machine"
            assert seen["segments"] == [] and seen["threads"] <= 0
            assert ranks.exit_code(r, HANG) == 0


def _calls_while_one_is_late(rank: Rank) -> tuple[str, str, int | None]:
    comm = rank.communicator()
    comm.barrier()
    rank.say("ready")
    if rank.rank != 0:
        rank.listen()
    return outcome(lambda: comm.all_reduce(torch.ones(3)))


def test_a_killed_rank_is_lost_though_another_is_late() -> None:
    """Who waits for several ranks watches all of them, not the first alone."""
    with Processes(_calls_while_one_is_late, 3) as ranks:
        assert [ranks.hear(r) for r in range(3)] == ["ready"] * 3
        until_asleep(ranks.pid(0))
        ranks.kill(2)
        assert ranks.result(0, HANG)[0::2] == ("PeerLostError", 2)
        ranks.tell(1, "come")
        assert ranks.result(1, HANG)[0::2] == ("PeerLostError", 2)


def _many_groups(rank: Rank) -> list[tuple[str, str, int | None]]:
    comms = [rank.communicator(name=f"group {i}") for i in range(4)]
    rank.say("ready")
    rank.listen()
    return [outcome(lambda c=c: c.all_reduce(torch.ones(3))) for c in comms for _ in range(2)]


def test_every_watcher_learns_of_a_death_every_time() -> None:
    """A death is told to one watcher by the kernel, once; the others, and later looks, must see it as well."""
    with Processes(_many_groups, 4) as ranks:
        assert [ranks.hear(r) for r in range(4)] == ["ready"] * 4
        ranks.kill(1)
        for r in (0, 2, 3):
            ranks.tell(r, "go")
        for r in (0, 2, 3):
            assert [seen[0::2] for seen in ranks.result(r, HANG)] == [("PeerLostError", 1)] * 8


def _root_gives_up(rank: Rank) -> str:
    comm = rank.communicator(timeout=0.2 if rank.rank == 0 else 50.0, config=pycoll.Config(heap_bytes=300 * MIB))
    x = comm.empty(64 * MIB).fill_(1.0 if rank.rank == 0 else 0.0)
    comm.barrier()
    rank.say("going")
    kind, _, _ = outcome(lambda: comm.broadcast(x))
    if kind == "no error":
        assert bool((x == 1).all()), "success was returned with somebody else's data"
    elif rank.rank == 0:
        x.fill_(2.0)  # a rank that failed may use its tensors again
        rank.say("used")
        rank.listen()  # its tensor stays mapped
    return kind


@pytest.mark.parametrize("stop_after", (0.001, 0.005, 0.01, 0.02, 0.03))
def test_success_is_not_returned_once_a_peer_has_given_up(stop_after: float) -> None:
    """A rank is stopped while it reads the root's tensor, and goes on when the root has timed out and reused it."""
    with Processes(_root_gives_up, 2) as ranks:
        assert [ranks.hear(r) for r in range(2)] == ["going"] * 2
        time.sleep(stop_after)
        ranks.kill(1, signal.SIGSTOP)
        time.sleep(0.5)
        ranks.kill(1, signal.SIGCONT)
        other = ranks.result(1, HANG)
        if other != "no error":
            assert ranks.hear(0) == "used"
            ranks.tell(0, "enough")
            assert ranks.result(0, HANG) == "TimeoutError" and other in ("TimeoutError", "PeerLostError")


def _has_a_child(rank: Rank) -> tuple[str, str, int | None]:
    comm = rank.communicator()
    comm.barrier()
    if rank.rank == 1:
        child = os.fork()
        if child == 0:  # as a DataLoader's worker: it inherits all descriptors and mappings, and lives on
            time.sleep(HANG)
            os._exit(0)
        rank.say(child)
        rank.listen()
    return outcome(lambda: comm.all_reduce(torch.ones(3)))


def test_a_killed_rank_is_lost_though_its_child_lives() -> None:
    with Processes(_has_a_child, 3) as ranks:
        child = ranks.hear(1)
        try:
            ranks.kill(1)
            for r in (0, 2):
                kind, text, culprit = ranks.result(r, HANG / 2)
                assert kind == "PeerLostError" and culprit == 1 and "died" in text
            os.kill(child, 0)  # it still lives
        finally:
            os.kill(child, signal.SIGKILL)


def _finishes_its_part(rank: Rank) -> list[tuple[str, str, int | None]]:
    comm = rank.communicator()
    x = torch.full((10,), 1.0 + rank.rank)
    if rank.rank == 0:
        rank.say("ready")
        rank.listen()
    else:
        rank.say("calling")
    first = outcome(lambda: comm.all_reduce(x, algorithm="one_shot"))
    assert x.tolist() == [3.0] * 10
    return [first, outcome(comm.barrier)]


def test_a_rank_that_died_after_its_part_is_not_missed() -> None:
    """It has published its input; only the next call needs it."""
    with Processes(_finishes_its_part, 2) as ranks:
        assert ranks.hear(1) == "calling" and ranks.hear(0) == "ready"
        until_asleep(ranks.pid(1))  # it waits in the call
        ranks.kill(1)
        assert ranks.exit_code(1, HANG) == -signal.SIGKILL
        ranks.tell(0, "go")
        first, second = ranks.result(0, HANG)
        assert first[0] == "no error"
        assert second[0] == "PeerLostError" and second[2] == 1


def _dies_in_group(rank: Rank) -> tuple[tuple[str, str, int | None], list[str]]:
    rank.init_process_group()
    dist.barrier()
    if rank.rank == 1:
        rank.listen()
    works = [dist.all_reduce(torch.ones(MIB), async_op=True) for _ in range(3)]
    rank.say("issued")
    result = outcome(works[0].wait)
    for work in works[1:]:
        assert outcome(work.wait) == result
    assert outcome(lambda: dist.all_reduce(torch.ones(3))) == result
    del works, work
    dist.destroy_process_group()
    return result, held_segments()


def test_a_killed_rank_is_lost_to_asynchronous_work() -> None:
    with Processes(_dies_in_group, 3) as ranks:
        assert [ranks.hear(r) for r in (0, 2)] == ["issued"] * 2
        ranks.kill(1)
        for r in (0, 2):
            (kind, text, culprit), segments = ranks.result(r, HANG)
            assert kind == "PeerLostError" and culprit == 1 and "rank 1 is lost" in text and segments == []
            assert ranks.exit_code(r, HANG) == 0


# ---- fork ----


def in_child(check: Callable[[], None]) -> None:
    """Forks; the child runs `check` and what the interpreter runs at its end. Raises here if it fails or hangs."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            check()
            gc.collect()
            atexit._run_exitfuncs()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    deadline = time.monotonic() + HANG
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "the child failed"
            return
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


def _forks(rank: Rank) -> float:
    comm = rank.communicator()
    rank.init_process_group()
    shared, x = comm.empty(1000).fill_(1), torch.ones(1000)
    holder = [comm]

    def check() -> None:
        child_comm = holder.pop()
        for call in (child_comm.barrier, lambda: child_comm.all_reduce(x), lambda: child_comm.empty(3)):
            with pytest.raises(pycoll.Error, match=r"fork.* create a new one"):
                call()
        for group_call in (dist.barrier, lambda: dist.all_reduce(x), lambda: dist.all_reduce(x, async_op=True).wait()):
            with pytest.raises(pycoll.Error, match=r"fork.* create a new one"):
                group_call()
        assert repr(child_comm)
        child_comm.abort()
        child_comm.close()
        with Communicator(dist.HashStore(), 0, 1, name="child") as own:
            assert own.all_reduce(torch.ones(2)).tolist() == [1.0, 1.0]

    for _ in range(3):
        in_child(check)
        comm.all_reduce(x)
        comm.all_reduce(shared)
        dist.all_reduce(x)
    total = x[0].item() + shared[0].item()
    del comm, shared
    holder.clear()
    dist.destroy_process_group()
    return total


def test_fork() -> None:
    """The child's communicators are dead and do no harm; the parent goes on; the child can make its own."""
    with Processes(_forks, 2) as ranks:
        assert ranks.results(HANG) == [72.0] * 2
        assert [ranks.exit_code(r, HANG) for r in range(2)] == [0, 0]


def _forks_while_working(rank: Rank) -> None:
    rank.init_process_group()
    x = torch.zeros(MIB)
    works = [dist.all_reduce(x, async_op=True) for _ in range(60)]
    for _ in range(5):
        in_child(lambda: None)
    for work in works:
        work.wait()
    dist.destroy_process_group()


def test_fork_while_work_is_in_flight() -> None:
    with Processes(_forks_while_working, 2) as ranks:
        ranks.results(HANG)


# ---- Ctrl-C ----


def _interrupted(rank: Rank, where: str) -> str:
    """Rank 0 waits for rank 1, which comes only when it is told. What the second call after that gives."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background inherits it ignored
    comm = None
    if where in ("all_reduce", "large all_reduce"):
        comm = rank.communicator()
    elif where != "creation":
        rank.init_process_group()
        dist.barrier()
    work = None
    x = torch.ones(3 if where == "all_reduce" else 8 * MIB)
    if rank.rank == 0:
        rank.say("waiting")
    else:
        rank.listen()
    interrupted = False
    try:
        if where == "creation":
            if rank.rank == 0:
                rank.communicator(timeout=40)
        elif comm is not None:
            comm.all_reduce(x)
        elif where == "work.wait":
            work = dist.all_reduce(torch.ones(3), async_op=True)
            work.wait()
        elif where == "dist.all_reduce":
            dist.all_reduce(torch.ones(3))
        else:  # a synchronous call behind an asynchronous one
            work = dist.all_reduce(torch.ones(3), async_op=True)
            dist.all_reduce(x)
    except KeyboardInterrupt:
        interrupted = True
    except pycoll.Error as e:
        return str(e)
    del x  # nobody may write to it any more: the exception, which kept its caller's variables, is gone as well
    if interrupted:
        rank.say("interrupted")
        rank.listen()
    if where == "work.wait":
        assert work is not None
        work.wait()  # it is not lost
    if where == "creation":
        return ""
    return outcome(comm.barrier if comm is not None else dist.barrier)[1]


@pytest.mark.parametrize(
    "where", ("creation", "all_reduce", "large all_reduce", "work.wait", "dist.all_reduce", "queued")
)
def test_interrupt_during_a_wait(where: str) -> None:
    """The wait ends. A synchronous call has failed, for all ranks; an asynchronous one can be waited for again."""
    with Processes(_interrupted, 2, where) as ranks:
        ranks.hear(0)
        until_asleep(ranks.pid(0))
        ranks.kill(0, signal.SIGINT)
        assert ranks.hear(0, HANG) == "interrupted"
        ranks.tell(1, "come")
        ranks.tell(0, "go on")
        said = [ranks.result(r, HANG) for r in range(2)]
        if where in ("creation", "work.wait"):
            assert said == ["", ""]
        else:
            assert "rank 0 was interrupted" in said[0]
            assert "rank 0 was interrupted" in said[1] or "rank 0 has left" in said[1]
        assert [ranks.exit_code(r, HANG) for r in range(2)] == [0, 0]


def _interrupted_at_the_end(rank: Rank, how: str) -> tuple[bool, list[float]]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rank.init_process_group(timeout=50)
    base = torch.ones(2, 4)
    if rank.rank == 1:
        rank.listen()
        with contextlib.suppress(pycoll.Error):
            dist.all_reduce(torch.ones(2, 2))
        return False, []
    rank.say("waiting")
    try:
        if how == "strided":
            dist.all_reduce(base[:, :2])
        else:
            work = dist.all_reduce(base[:, :2], async_op=True)
            dist.destroy_process_group()
            del work
    except KeyboardInterrupt:
        rank.say("interrupted")
        rank.listen()
        return True, base.flatten().tolist()
    return False, []


@pytest.mark.parametrize("how", ("strided", "destroy"))
def test_interrupt_ends_every_wait(how: str) -> None:
    """Also that of a call that copies, and of a group's end; nothing is written to a tensor afterwards."""
    with Processes(_interrupted_at_the_end, 2, how) as ranks:
        ranks.hear(0)
        until_asleep(ranks.pid(0))
        ranks.kill(0, signal.SIGINT)
        assert ranks.hear(0, HANG) == "interrupted"
        ranks.tell(1, "come")
        ranks.result(1, HANG)
        ranks.tell(0, "go on")
        assert ranks.result(0, HANG) == (True, [1.0] * 8)


def _handler_calls_back(rank: Rank, what: str) -> tuple[str, str]:
    comm = rank.communicator()
    comm.barrier()
    if rank.rank == 1:
        rank.listen()
        with contextlib.suppress(pycoll.Error):
            comm.all_reduce(torch.ones(3))  # rank 0 had done its part of it
        return outcome(comm.barrier)[:2]
    signal.signal(signal.SIGUSR1, lambda _number, _frame: {"call": comm.barrier, "close": comm.close}[what]())
    rank.say("waiting")
    try:
        comm.all_reduce(torch.ones(3))
    except pycoll.Error as e:
        return type(e).__name__, str(e)
    finally:
        comm.close()
    return "no error", ""


@pytest.mark.parametrize("what", ("call", "close"))
def test_signal_handler_that_uses_the_waiting_communicator(what: str) -> None:
    """It ends the wait with an error; it neither waits for itself nor pulls the memory from under the call."""
    with Processes(_handler_calls_back, 2, what) as ranks:
        ranks.hear(0)
        until_asleep(ranks.pid(0))
        ranks.kill(0, signal.SIGUSR1)
        kind, text = ranks.result(0, HANG)
        if what == "call":
            assert kind == "UsageError" and "from within another" in text
        else:
            assert kind == "Error" and "closed the communicator within a collective" in text
        ranks.tell(1, "come")
        assert ranks.result(1, HANG)[0] in ("Error", "PeerLostError")


# ---- the end of the interpreter ----

EXITS = {
    "work in flight": "work = dist.all_reduce(torch.ones(2_000_000), async_op=True)",
    "many works in flight": "works = [dist.all_reduce(torch.ones(100_000), async_op=True) for _ in range(50)]",
    "a callback in flight": """
future = dist.all_reduce(torch.ones(2_000_000), async_op=True).get_future().then(lambda f: print("called", flush=True))
""",
    "destroyed with work in flight": """
work = dist.all_reduce(torch.ones(2_000_000), async_op=True)
dist.destroy_process_group()
""",
    "groups dropped by a callback": """
groups = [dist.new_group(), dist.new_group()]
work = dist.all_reduce(torch.ones(2_000_000), async_op=True, group=groups[0])
future = work.get_future().then(lambda f: groups.clear())
import torch.distributed.distributed_c10d as c10d
for table in (c10d._world.pg_map, c10d._world.pg_names, c10d._world.pg_group_ranks, c10d._world.pg_backend_config):
    for group in groups:
        table.pop(group, None)
del group
""",
    "a communicator": """
comm = pycoll.Communicator(dist.FileStore(folder + "/second", 2), rank, 2)
x = comm.empty(1000)
comm.all_reduce(x.zero_())
""",
    "an error": "raise SystemExit('the end')",
}
EXIT_SCRIPT = """
import json, os, sys, torch, torch.distributed as dist, pycoll
rank, cases = int(sys.argv[1]), json.loads(sys.argv[2])
children = {}
for folder, body in cases.items():
    child = os.fork()  # before the first communicator: importing torch once is enough
    if child == 0:
        log = os.open(f"{folder}/{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        dist.init_process_group("pycoll", init_method=f"file://{folder}/group", rank=rank, world_size=2)
        exec(body)
        print("the last line", flush=True)
        children = {}
        break  # to the end of the script, with all that is open
    children[child] = folder
while children:
    child, status = os.wait()
    print(children.pop(child), os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.mark.timeout(110)
def test_interpreter_exit_with_everything_open(tmp_path: Path) -> None:
    bodies = {}
    for case, body in EXITS.items():
        folder = tmp_path / case
        folder.mkdir()
        bodies[str(folder)] = body
    commands = [[sys.executable, "-c", EXIT_SCRIPT, str(rank), json.dumps(bodies)] for rank in range(2)]
    ranks = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True, start_new_session=True) for c in commands]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in ranks]
    finally:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for rank, output in enumerate(outputs):
        codes = dict(line.rsplit(" ", 1) for line in output.splitlines())
        for case in EXITS:
            said = (tmp_path / case / str(rank)).read_text()
            assert codes[str(tmp_path / case)] == ("1" if case == "an error" else "0"), (case, rank, said)
            assert ("the last line" in said) == (case != "an error"), (case, rank, said)
            assert not re.search("terminate|Fatal|Traceback", said), (case, rank, said)
            if case == "a callback in flight":
                assert "called" in said


# ---- nothing is left ----


def _cycles(rank: Rank, kind: str, count: int) -> dict[str, tuple[int, int]]:
    def once(i: int) -> None:
        if kind == "communicator":
            with rank.communicator(name=f"cycle {i}") as comm:
                comm.all_reduce(comm.empty(100).zero_())
                comm.all_reduce(torch.ones(100))
                comm.send(torch.ones(9), 1) if rank.rank == 0 else comm.recv(torch.ones(9), 0)
                message = comm.irecv(torch.ones(9), 1 - rank.rank)
                comm.isend(torch.ones(9), 1 - rank.rank).wait()
                message.wait()
        else:
            rank.init_process_group(f"group {i}")
            dist.all_reduce(torch.ones(100), async_op=True).wait()
            dist.destroy_process_group()

    def measure() -> dict[str, int]:
        gc.collect()
        return {"descriptors": descriptors(), "threads": native_threads(), "mappings": mappings()}

    for i in range(10):
        once(i)
    before = measure()
    for i in range(10, count):
        once(i)
    native_threads_left(before["threads"])  # those that were joined last are still listed for a moment
    after = measure()
    assert held_segments() == []
    return {key: (before[key], after[key]) for key in before}


CYCLES = int(os.environ.get("PYCOLL_TEST_CYCLES", "0"))  # for a long run by hand: 10000


@pytest.mark.timeout(max(90, CYCLES // 10))
@pytest.mark.parametrize(("kind", "count"), (("communicator", CYCLES or 200), ("group", CYCLES or 40)))
def test_cycles_of_create_and_destroy_do_not_grow(kind: str, count: int) -> None:
    with Processes(_cycles, 2, kind, count) as ranks:
        for growth in ranks.results(max(50, count // 10)):
            for what, (before, after) in growth.items():
                assert after <= before, (what, before, after)


def _needs_no_dev_shm(rank: Rank) -> list[str]:
    with rank.communicator() as comm:
        x = comm.empty(MIB)
        comm.all_reduce(x.zero_())
        comm.all_reduce(torch.zeros(MIB))
        maps = Path("/proc/self/maps").read_text().splitlines()
        opened = [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and fd.exists()]
        return [line for line in maps + opened if "/dev/shm" in line]


def test_nothing_lies_in_dev_shm() -> None:
    """However small it is (64 MB in a container), pycoll does not need it."""
    with Processes(_needs_no_dev_shm, 2) as ranks:
        assert ranks.results(HANG) == [[], []]
