"""Seeing inside: what failed ranks leave, what a running one says of all, the log, and torch's profiler."""

import json
import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import pycoll
from pycoll import cli
from pycoll.testing import Processes, Rank, run_processes
from pycoll.trace import diagnose, dump, show

pytestmark = pytest.mark.timeout(60)

HANG = 20.0  # seconds after which a test gives up; none is a measure of speed


def traced(rank: Rank) -> Path:
    """Makes this process leave traces; the folder for those of all ranks."""
    folder = rank.folder / "traces"
    os.environ["PYCOLL_TRACE"] = str(folder)
    return folder


def logged(rank: Rank, level: str | None) -> Path:
    """Sends standard error, native code's too, to a file, with PYCOLL_LOG set so."""
    path = rank.folder / f"log-{rank.rank}"
    with path.open("w") as file:
        os.dup2(file.fileno(), 2)
    os.environ.pop("PYCOLL_LOG", None)
    if level is not None:
        os.environ["PYCOLL_LOG"] = level
    return path


def only(folder: Path) -> dump.Trace:
    """The one communicator that the folder has traces of."""
    ((trace,), left_out) = dump.load([folder])
    assert left_out == []
    return trace


def sequences(trace: dict[str, Any], rank: int) -> set[int]:
    """Of the calls that a rank has entered."""
    return {call["sequence"] for call in trace["ranks"][rank]["calls"]}


def kind_of_failure(call: Callable[[], Any]) -> str:
    try:
        call()
    except pycoll.Error as e:
        return type(e).__name__
    return "none"


# ---- what failed ranks leave ----


def _one_does_not_come(rank: Rank, timeout: float) -> tuple[Path, str]:
    """Rank 1, which says so when the others wait for it."""
    folder = traced(rank)
    comm = rank.communicator(timeout=timeout)
    for _ in range(3):
        comm.all_reduce(torch.ones(100))
    if rank.rank == 1:
        while not {4} <= sequences(comm.trace(), 0) & sequences(comm.trace(), 2):
            time.sleep(0.001)
        rank.say("the others wait")
        rank.listen()
    return folder, kind_of_failure(lambda: comm.all_reduce(torch.ones(50_000)))


def test_a_killed_rank_is_in_the_traces_of_the_others() -> None:
    with Processes(_one_does_not_come, 3, 60.0) as ranks:
        assert ranks.hear(1) == "the others wait"
        ranks.kill(1)
        (folder, kind), (_, other) = ranks.result(0, HANG), ranks.result(2, HANG)
        assert (kind, other) == ("PeerLostError", "PeerLostError")
        trace = only(folder)
        assert [r.file is not None for r in trace.ranks] == [True, False, True]
        dead = trace.ranks[1]
        assert (dead.state, dead.pid) == ("dead", ranks.pid(1))
        last = dead.by_sequence("calls")[3]  # the first was that in which they met
        assert (last.describe(), last.state) == ("all_reduce(float32[100], sum, one_shot)", "ended")
        (straggler,) = diagnose.stragglers(trace)
        assert (straggler.ranks, straggler.sequence, straggler.entered) == ([1], 4, False)
        assert straggler.call == "all_reduce(float32[50000], sum, two_shot)"
        assert diagnose.mismatches(trace) == []


def test_a_rank_that_does_not_come_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    with Processes(_one_does_not_come, 3, 1.0) as ranks:
        (folder, kind), (_, other) = ranks.result(0, HANG), ranks.result(2, HANG)
        assert (kind, other) == ("TimeoutError", "TimeoutError")
        ranks.tell(1, "come")
        assert ranks.result(1, HANG)[1] != "none"
        trace = only(folder)
        assert all(r.file is not None and r.state == "failed" for r in trace.ranks)
        (straggler,) = diagnose.stragglers(trace)
        assert (straggler.ranks, straggler.waiting, straggler.sequence) == ([1], [0, 2], 4)
        assert 0.9e9 < straggler.waits < 20e9, "it waited a second, by the clock of the machine"
        assert {e["rank"] for e in trace.errors().values()} == {1}
        assert cli.main(["trace", str(folder)]) == 0
        assert "straggler: rank 1 had not entered call #4 all_reduce" in capsys.readouterr().out


def _different(rank: Rank) -> tuple[Path, str]:
    folder = traced(rank)
    comm = rank.communicator()
    comm.barrier()
    x = torch.ones(4, 2) if rank.rank == 2 else torch.ones(2, 4)
    return folder, kind_of_failure(lambda: comm.broadcast(x, root=1) if rank.rank == 0 else comm.all_reduce(x))


def test_a_mismatch_is_found() -> None:
    with Processes(_different, 3) as ranks:
        folder = ranks.results(HANG)[0][0]
        trace = only(folder)
        assert all(r.file is not None for r in trace.ranks)
        (found,) = diagnose.mismatches(trace)
        broadcast, all_reduce = "broadcast(float32[8], root 1)", "all_reduce(float32[8], sum, one_shot)"
        assert (found.sequence, found.calls) == (2, {broadcast: [0], all_reduce: [1, 2]})
        assert {e["kind"] for e in trace.errors().values()} == {"MismatchError"}
        lines = [line for line, _ in show.verdict(trace)]
        assert any(line.startswith("mismatch: in call #2 ranks differ. rank 0: broadcast") for line in lines)


def _group(rank: Rank) -> tuple[Path, list[dict[str, Any]], dict[str, Any], str]:
    folder = traced(rank)
    rank.init_process_group()
    dist.all_reduce(torch.ones(20, dtype=torch.float64), dist.ReduceOp.MAX)
    dist.all_reduce(torch.ones(10), async_op=True).wait()
    if rank.rank == 0:
        dist.send(torch.ones(5), 1, tag=7)
    else:
        dist.recv(torch.ones(5), tag=7)
    live = pycoll.group_trace()
    mine = live["ranks"][rank.rank]
    kind = kind_of_failure(lambda: dist.all_reduce(torch.ones(3 + rank.rank)))
    with pytest.raises(pycoll.UsageError, match="there is no such group"):
        pycoll.group_trace(dist.GroupMember.NON_GROUP_MEMBER)
    dist.destroy_process_group()
    return folder, mine["calls"], mine["messages"][0], kind


def test_a_group_is_traced_too() -> None:
    with Processes(_group, 2) as ranks:
        results = ranks.results(HANG)
        assert sorted(f.name.rpartition("-")[0] for f in results[0][0].iterdir()) == ["group-0-rank0", "group-0-rank1"]
        for r, (_, calls, message, kind) in enumerate(results):
            assert kind == "MismatchError"
            assert [c["call"] for c in calls] == ["barrier", "all_reduce", "all_reduce"]
            assert "queued" not in calls[1] and "queued" in calls[2], "a synchronous call, an asynchronous one"
            assert (calls[1]["op"], calls[1]["bytes"], calls[1]["dtype"]) == ("max", 160, "float64")
            assert all(c["state"] == "ended" and c["begin_ns"] <= c["end_ns"] for c in calls)
            assert (message["call"], message["peer"], message["tag"]) == (("send", "recv")[r], 1 - r, 7)
            assert (message["state"], message["bytes"]) == ("ended", 20)


def _traces_of_calls(comm: pycoll.Communicator) -> dict[str, Any]:
    x = torch.ones(6)
    comm.reduce_scatter(x, "avg")
    comm.all_gather(x)
    comm.gather(x, 1)
    comm.all_to_all(
        torch.ones(2 + 2 * comm.rank), send_splits=[1, 1 + 2 * comm.rank], recv_splits=[1, 1 + 2 * comm.rank]
    )
    for _ in range(300):
        comm.barrier()
    trace = comm.trace()
    comm.barrier()
    return trace


def test_a_running_communicator_says_what_its_ranks_do(tmp_path: Path) -> None:
    """In the form of the files, and no more than the last 256 calls."""
    traces = run_processes(_traces_of_calls, 2)
    for r, trace in enumerate(traces):
        assert trace["error"] is None and trace["rank"] == r and len(trace["ranks"][r]["calls"]) == 256
        (tmp_path / f"{r}.json").write_text(json.dumps(trace))
    merged = only(tmp_path)
    assert all(256 <= len(rank.entries["calls"]) <= 258 for rank in merged.ranks), "taken at slightly different times"
    assert {e.state for rank in merged.ranks for e in rank.entries["calls"].values()} <= {"ended", "begun"}
    assert diagnose.mismatches(merged) == []


def _bytes_of_calls(comm: pycoll.Communicator) -> list[tuple[str, int]]:
    x = torch.ones(6)
    comm.reduce_scatter(x, "avg")
    comm.all_gather(x)
    comm.broadcast(x.bool(), 1)
    comm.all_to_all(x[: 3 + comm.rank], send_splits=[1 + comm.rank, 2], recv_splits=[1 + comm.rank, 2])
    return [(c["call"], c["bytes"]) for c in comm.trace()["ranks"][comm.rank]["calls"][1:]]


def test_bytes_are_those_of_the_larger_side() -> None:
    for r, calls in enumerate(run_processes(_bytes_of_calls, 2)):
        all_to_all = ("all_to_all", 4 * (3 + r))
        assert calls == [("reduce_scatter", 24), ("all_gather", 48), ("broadcast", 6), all_to_all]


# ---- what a part of the program's ranks are called ----


def _in_a_part(rank: Rank) -> tuple[Path, list[tuple[str, str, int | None]], str]:
    """Of ranks 0 and 2 the second aborts; of ranks 1 and 3 the second does not come to a barrier, and is killed."""
    folder, log = traced(rank), logged(rank, None)
    rank.init_process_group()
    others_too = dist.new_group([1, 2, 3])
    part = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))["rows"].get_group()
    comm = pycoll.Communicator.from_group(part)
    calls: list[Callable[[], Any]] = [lambda: dist.barrier(part), comm.barrier]
    if rank.rank == 2:
        part._get_backend(torch.device("cpu")).abort()
        comm.abort("enough")
    elif rank.rank != 0:
        nested = others_too.split_group([0, 2], group_name="nested")
        calls += [lambda: nested.barrier().wait()]
        if rank.rank == 1:
            calls.insert(0, lambda: part.monitored_barrier(timedelta(seconds=0.2)))
        else:
            rank.say("here")
            rank.listen()
    errors = []
    for i, call in enumerate(calls):
        with pytest.raises(pycoll.Error) as error:
            call()
        errors.append((type(error.value).__name__, str(error.value), error.value.rank))
        if rank.rank == 1 and i == 0:
            rank.say("it did not come")
    return folder, errors, log.read_text()


def test_both_numbers_of_a_rank_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    with Processes(_in_a_part, 4) as ranks:
        assert (ranks.hear(3), ranks.hear(1)) == ("here", "it did not come")
        ranks.kill(3)
        for r in (0, 2):
            _, aborted, log = ranks.result(r, HANG)
            assert aborted[0] == ("Error", "pycoll: rank 1 (global rank 2) aborted the group", 1)
            assert aborted[1] == ("Error", "pycoll: rank 1 (global rank 2): enough", 1)
            assert log == ""
        folder, (late, *lost), log = ranks.result(1, HANG)
        assert late[1].startswith("[Rank 0 (global rank 1)]: Rank 1 (global rank 3) failed to pass monitoredBarrier")
        assert late[2] == 1
        text = "pycoll: rank 1 (global rank 3) is lost: its process has died"
        assert lost == [("PeerLostError", text, 1)] * 3
        assert log.count(f"pycoll [rank 0 (global rank 1) of 2, {ranks.pid(1)}] error: ") == 3
        assert log.count(f" has failed: PeerLostError: {text}") == 3
        traces = [t for t in dump.load([folder])[0] if t.ranks[0].error and t.ranks[0].error["kind"] == "PeerLostError"]
        assert [[r.number for r in t.ranks] for t in traces] == [["0 (global rank 1)", "1 (global rank 3)"]] * 3
        assert cli.main(["trace", str(folder)]) == 0
        assert "dead: rank 1 (global rank 3)\n" in capsys.readouterr().out


# ---- the log ----


def _fails(rank: Rank, level: str | None, folder: str | None) -> tuple[str, str]:
    path = logged(rank, level)
    os.environ.pop("PYCOLL_TRACE", None)
    if folder is not None:
        (rank.folder / "a file").write_text("no folder")
        os.environ["PYCOLL_TRACE"] = str(rank.folder / folder)
    comm = rank.communicator()
    kind = kind_of_failure(lambda: comm.all_reduce(torch.ones(3 + rank.rank)))
    comm.close()
    return kind, path.read_text()


FAILED = r"error: communicator ranks has failed: MismatchError: pycoll: ranks make different calls: .*"


@pytest.mark.parametrize(
    ("level", "said"),
    [
        (
            "info",
            [r"info: all ranks of communicator ranks are here: \d+ channels, \d+ KiB .*", FAILED, "info: .* is closed"],
        ),
        (None, [FAILED]),
        ("error", [FAILED]),
    ],
)
def test_the_log_says_what_its_level_lets_through(level: str | None, said: list[str]) -> None:
    with Processes(_fails, 2, level, None) as ranks:
        for r, (kind, log) in enumerate(ranks.results(HANG)):
            assert kind == "MismatchError"
            lines = log.splitlines()
            assert len(lines) == len(said), log
            for line, pattern in zip(lines, said, strict=True):
                assert re.fullmatch(rf"pycoll \[rank {r} of 2, {ranks.pid(r)}\] {pattern}", line), line
            assert "; PYCOLL_TRACE=FOLDER would keep what all ranks did last" in log


def test_a_bad_level_is_said_once() -> None:
    with Processes(_fails, 2, "loud", None) as ranks:
        for kind, log in ranks.results(HANG):
            assert kind == "MismatchError"
            first, second = log.splitlines()
            assert first.endswith("PYCOLL_LOG is loud, and not one of debug, info, warning, error: taken for warning")
            assert "has failed: MismatchError" in second


@pytest.mark.parametrize("folder", ("a file", "a file/within"))
def test_traces_that_cannot_be_written_are_no_second_error(folder: str) -> None:
    with Processes(_fails, 2, None, folder) as ranks:
        for kind, log in ranks.results(HANG):
            assert kind == "MismatchError"
            assert len(log.splitlines()) == 1 and "; what all ranks did last could not be kept: " in log


def _stops_on_purpose(rank: Rank) -> str:
    path = logged(rank, None)
    comm = rank.communicator()
    if rank.rank == 0:
        comm.abort("enough")
    kind_of_failure(comm.barrier)
    return path.read_text()


def test_what_somebody_wanted_is_no_news() -> None:
    with Processes(_stops_on_purpose, 2) as ranks:
        assert ranks.results(HANG) == ["", ""]


# ---- torch's profiler ----


def _profiled(rank: Rank) -> dict[str, list[tuple[str, list[list[int]]]]]:
    comm = rank.communicator()
    rank.init_process_group()
    x = torch.ones(2, 3)
    out = torch.empty(2 * x.shape[0], 3)
    peer = 1 - rank.rank

    def exchange() -> None:
        work = comm.isend(x, peer)
        comm.recv(x.clone(), peer)
        work.wait()

    cases: dict[str, Callable[[], Any]] = {
        "native": lambda: comm.all_reduce(x),
        "native, asynchronous": lambda: comm.all_reduce(x, async_op=True).wait(),
        "native, of an array": lambda: comm.all_reduce(np.ones((2, 3), np.float32)),
        "native, by a receiver": lambda: comm.broadcast(x, 0),
        "native barrier": comm.barrier,
        "native messages": exchange,
        "group": lambda: dist.all_reduce(x),
        "group, asynchronous": lambda: dist.all_reduce(x, async_op=True).wait(),
        "group, into a tensor": lambda: dist.all_gather_into_tensor(out, x),
    }
    seen = {}
    for name, call in cases.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            call()
            dist.barrier()
        events = [(e.name, e.input_shapes) for e in profile.events() if e.name.startswith("pycoll:")]
        events.remove(("pycoll:barrier", []))
        seen[name] = sorted(events)
    dist.destroy_process_group()
    return seen


def test_the_profiler_shows_each_call_once_with_its_shapes() -> None:
    with Processes(_profiled, 2) as ranks:
        for seen in ranks.results(40):
            all_reduce = [("pycoll:all_reduce", [[2, 3]])]
            assert seen.pop("native messages") == [("pycoll:recv", [[2, 3]]), ("pycoll:send", [[2, 3]])]
            assert seen.pop("native barrier") == [("pycoll:barrier", [])]
            assert seen.pop("native, by a receiver") == [("pycoll:broadcast", [[2, 3]])]
            assert seen.pop("group, into a tensor") == [("pycoll:all_gather", [[2, 3]])]
            assert all(events == all_reduce for events in seen.values()), seen
