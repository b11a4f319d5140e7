"""`pycoll trace` on made-up files: who is behind, who called something else, who is dead; and bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from pycoll import cli
from pycoll.trace import chrome, diagnose, dump, show

MS = 1_000_000
TAKEN = 10_000 * MS  # when the first rank failed, 10 s after the machine's start


def call(n: int, begin_ms: float, took_ms: float | None = 1.0, **fields: Any) -> dict[str, Any]:
    """Call #n - 1 of a rank, a small all-reduce unless told otherwise."""
    begin = int(begin_ms * MS)
    all_reduce = {"call": "all_reduce", "bytes": 16, "dtype": "float32", "count": 4, "shape": 1, "op": "sum"}
    return {
        "n": n,
        "sequence": n - 1,
        "state": "begun" if took_ms is None else "ended",
        "begin_ns": begin,
        "end_ns": None if took_ms is None else begin + int(took_ms * MS),
        **all_reduce,
        "algorithm": "one_shot",
        "channels": 1,
        **fields,
    }


def rank(number: int, calls: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    here = {"rank": number, "pid": 100 + number, "state": "here", "waits_for": None, "error": None}
    return {**here, "calls": calls, "messages": [], "launches": [], **fields}


def write(folder: Path, writer: int, ranks: list[dict[str, Any]], **fields: Any) -> Path:
    """What `writer` leaves."""
    path = folder / f"group-0-rank{writer}-{100 + writer}.json"
    head = {"pycoll_trace": 1, "communicator": "c0ffee", "group": "group 0", "host": "here", "pid": 100 + writer}
    when = {"taken_ns": TAKEN, "unix_ns": 1_800_000_000_000_000_000}
    error = ranks[writer]["error"]
    content = {**head, **when, "rank": writer, "world_size": len(ranks), "error": error, "ranks": ranks, **fields}
    path.write_text(json.dumps(content))
    return path


def error(kind: str, blamed: int, text: str = "it went wrong") -> dict[str, Any]:
    return {"kind": kind, "text": text, "rank": blamed}


def straggling(folder: Path) -> Path:
    """Rank 1 of 3 does not come to call #2; rank 0 times out, having waited 2 s; rank 1 comes 3 s after that."""
    late = error("TimeoutError", 1)
    waiting = [call(1, 7000), call(2, 7010), call(3, 8000, None)]
    first = [
        rank(0, waiting, state="failed", waits_for=1, error=late),
        rank(1, [call(1, 7001), call(2, 7011)]),
        rank(2, [call(1, 7002), call(2, 7012), call(3, 8001, None)], waits_for=1),
    ]
    write(folder, 0, first)
    first[1] = rank(1, [call(1, 7001), call(2, 7011), call(3, 13_000, 0.5, state="failed")], state="failed", error=late)
    return write(folder, 1, first, taken_ns=TAKEN + 4000 * MS)


def test_the_straggler_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straggling(tmp_path)
    assert cli.main(["trace", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "straggler: rank 1 had not entered call #2 all_reduce(float32[4], sum, one_shot)" in shown
    assert "in which ranks 0, 2 had been for 2 s" in shown
    assert "#1, had ended 2.99 s before; it came 3 s after that" in shown
    assert "TimeoutError: it went wrong (ranks 0, 1)" in shown
    assert "rank1-101.json" in shown and "none" in shown, "whose file is there"


def test_the_analysis_is_there_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straggling(tmp_path)
    assert cli.main(["trace", "--json", str(tmp_path)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    (straggler,) = found["stragglers"]
    assert (straggler["ranks"], straggler["waiting"], straggler["waits"]) == ([1], [0, 2], 2000 * MS)
    assert found["mismatches"] == [] and found["open_messages"] == []
    assert [r["state"] for r in found["ranks"]] == ["failed", "failed", "here"]
    assert [r["last"]["calls"] for r in found["ranks"]] == [2, 1, 2]
    assert [late["last"] for late in found["lateness"]] == [0, 1, 2]


def test_several_calls_behind(tmp_path: Path) -> None:
    """Rank 1 is in a call which the others have long left; what counts is the first that it has not entered."""
    behind = [call(1, 1000), call(2, 1001, None)]
    ahead = [call(1, 1000), call(2, 1001), call(3, 1002), call(4, 1003, None)]
    path = write(tmp_path, 0, [rank(0, ahead), rank(1, behind), rank(2, ahead)])
    ((trace,), _) = dump.load([path])
    (straggler,) = diagnose.stragglers(trace)
    assert (straggler.ranks, straggler.sequence, straggler.waiting, straggler.entered) == ([1], 2, [0, 2], False)
    assert "rank 1 was still in #1 all_reduce" in show.straggler_text(trace, straggler)


def test_a_rank_that_has_done_nothing(tmp_path: Path) -> None:
    ((trace,), _) = dump.load([write(tmp_path, 0, [rank(0, [call(1, 9000, None)]), rank(1, [])])])
    (straggler,) = diagnose.stragglers(trace)
    assert (straggler.ranks, straggler.sequence, straggler.waits) == ([1], 0, 1000 * MS)


def test_who_came_last_where_nobody_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = [rank(r, [call(n, 1000 * n + (5 if r == 1 else 0)) for n in range(1, 7)]) for r in range(2)]
    write(tmp_path, 0, ranks)
    assert cli.main(["trace", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "the last to enter call #5 all_reduce(float32[4], sum, one_shot): rank 1, 5 ms after the first" in shown
    assert "usually last: rank 1, to 6 of the 6 calls known of all ranks; 5 ms after the first rank" in shown


def test_the_mismatch_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the first call that differs, in what any rank says."""
    wrong = error("MismatchError", -1)
    odd = call(2, 1001, None, call="broadcast", root=1, op=None)
    ranks = [rank(r, [call(1, 1000), call(2, 1001, None)], state="failed", error=wrong) for r in range(3)]
    ranks[2]["calls"][1] = {k: v for k, v in odd.items() if v is not None or k == "end_ns"}
    write(tmp_path, 0, ranks)
    assert cli.main(["trace", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    expected = "ranks 0, 1: all_reduce(float32[4], sum, one_shot); rank 2: broadcast(float32[4], root 1)"
    assert f"mismatch: in call #1 ranks differ. {expected}" in shown
    assert "they differ" in shown


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"count": 5}, True),
        ({"dtype": "float64"}, True),
        ({"op": "max"}, True),
        ({"algorithm": "ring"}, True),
        ({"shape": 2}, True),
        ({"channels": 2, "queued": True, "gpu": True}, False),
    ],
)
def test_what_must_be_the_same(change: dict[str, Any], differs: bool, tmp_path: Path) -> None:
    ranks = [rank(0, [call(1, 1000)]), rank(1, [call(1, 1000, **change)])]
    ((trace,), _) = dump.load([write(tmp_path, 0, ranks)])
    found = diagnose.mismatches(trace)
    assert bool(found) == differs
    if change == {"shape": 2}:
        described = "all_reduce(float32[4], sum, one_shot), shape or element type no. "
        assert found[0].calls == {f"{described}1": [0], f"{described}2": [1]}


def test_all_to_all_may_differ_in_its_sizes(tmp_path: Path) -> None:
    sizes = [{"call": "all_to_all", "count": n, "bytes": 4 * n, "op": None} for n in (3, 7)]
    ranks = [rank(r, [call(1, 1000, **sizes[r])]) for r in range(2)]
    ((trace,), _) = dump.load([write(tmp_path, 0, ranks)])
    assert diagnose.mismatches(trace) == []


def test_a_dead_rank_is_read_from_the_survivors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It left no file; it died in the last call, in which the others were too."""
    lost = error("PeerLostError", 1, "rank 1 is lost")
    ranks = [
        rank(0, [call(1, 9000), call(2, 9001, None)], state="failed", waits_for=1, error=lost),
        rank(1, [call(1, 9000), call(2, 9003, None)], state="dead"),
    ]
    write(tmp_path, 0, ranks)
    assert cli.main(["trace", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "dead: rank 1" in shown and "PeerLostError: rank 1 is lost (rank 0)" in shown
    assert "the last to enter call #1" in shown and "rank 1, 2 ms after the first" in shown


def test_messages_that_are_under_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = {"n": 1, "sequence": 0, "state": "begun", "begin_ns": 6000 * MS, "end_ns": None, "bytes": 8, "tag": 3}
    ranks = [rank(0, [], messages=[{**message, "call": "recv", "peer": -1}]), rank(1, [])]
    write(tmp_path, 0, ranks)
    assert cli.main(["trace", str(tmp_path)]) == 0
    assert "open: rank 0 is in recv(from any rank, tag 3, 8 bytes) since 4 s" in capsys.readouterr().out


def test_the_peer_of_a_message_has_both_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = {"n": 1, "sequence": 0, "state": "begun", "begin_ns": 6000 * MS, "end_ns": None, "bytes": 8, "tag": 3}
    ranks = [rank(0, [], messages=[{**message, "call": "send", "peer": 1}]), rank(1, [])]
    ranks[0]["global_rank"], ranks[1]["global_rank"] = 0, 3
    write(tmp_path, 0, ranks)
    assert cli.main(["trace", str(tmp_path)]) == 0
    assert "open: rank 0 is in send(to rank 1 (global rank 3), tag 3, 8 bytes)" in " ".join(
        capsys.readouterr().out.split()
    )


def test_launches_are_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launches = [call(n, 1000 + n, 0.1, state="launched", gpu=True) for n in (1, 2, 3)]
    ranks = [rank(0, [], launches=launches), rank(1, [], launches=launches[:2])]
    write(tmp_path, 0, ranks)
    assert cli.main(["trace", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "straggler: rank 1 had not entered launch #2 all_reduce" in shown


def test_communicators_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, name in enumerate(("first", "second")):
        folder = tmp_path / name
        folder.mkdir()
        ranks = [rank(r, [call(1, 1000)]) for r in range(2)]
        write(folder, 0, ranks, communicator=name, group=f"group {name}", taken_ns=TAKEN - i)
    assert cli.main(["trace", "--json", str(tmp_path / "first"), str(tmp_path / "second")]) == 0
    assert [t["group"] for t in json.loads(capsys.readouterr().out)] == ["group second", "group first"], "oldest first"


def test_chrome_trace(tmp_path: Path) -> None:
    straggling(tmp_path)
    out = tmp_path / "chrome.trace"
    assert cli.main(["trace", str(tmp_path), "--chrome", str(out)]) == 0
    found = json.loads(out.read_text())
    complete = [e for e in found["traceEvents"] if e["ph"] == "X"]
    assert len(complete) == 9 and {e["pid"] for e in complete} == {0, 1, 2}
    assert all(e["dur"] >= 0 and e["ts"] >= 0 and e["args"]["bytes"] == 16 for e in complete)
    waiting = next(e for e in complete if e["pid"] == 0 and e["args"]["sequence"] == 2)
    assert (waiting["ts"], waiting["dur"], waiting["args"]["state"]) == (1e6, 2e6, "begun")  # in us, since 7 s
    names = [e["args"]["name"] for e in found["traceEvents"] if e["name"] == "process_name"]
    assert names[1] == "group 0: rank 1 (process 101, failed)"


def test_messages_in_a_chrome_trace_may_overlap(tmp_path: Path) -> None:
    message = {"sequence": 0, "state": "ended", "call": "send", "peer": 1, "bytes": 8, "tag": 3}
    messages = [{**message, "n": n, "begin_ns": 1000 * n, "end_ns": 9000 * n} for n in (1, 2)]
    ((trace,), _) = dump.load([write(tmp_path, 0, [rank(0, [], messages=messages), rank(1, [])])])
    found = [e for e in chrome.events([trace])["traceEvents"] if e["ph"] in "be"]
    assert [(e["ph"], e["id"], e["ts"]) for e in found] == [
        ("b", "0.1", 0.0),
        ("e", "0.1", 8.0),
        ("b", "0.2", 1.0),
        ("e", "0.2", 17.0),
    ]


# ---- bad input ----


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "it is not JSON, or not all of it"),
        ("[1]", "it has no field pycoll_trace"),
        ('{"pycoll_trace": 2}', "has format 2, this pycoll reads format 1"),
        ('{"pycoll_trace": 1}', "is no trace of pycoll: KeyError 'world_size'"),
    ],
)
def test_what_is_no_trace(content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    assert cli.main(["trace", str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith(f"error: {path}") and said in shown.err


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 7), ("ranks", 3), ("taken_ns", "late"), ("ranks", [{"rank": 0}]), ("world_size", 0)],
)
def test_fields_that_make_no_sense(field: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, 0, [rank(0, [call(1, 1)]), rank(1, [call(1, 1)])])
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert cli.main(["trace", str(path)]) == 2
    assert f"{path} is no trace of pycoll: " in capsys.readouterr().err


def test_nothing_to_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace"]) == 2
    assert "pycoll trace needs files" in capsys.readouterr().err
    assert cli.main(["trace", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no trace: start the ranks with PYCOLL_TRACE=" in capsys.readouterr().err


def test_a_file_that_is_cut_off_hides_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rank was killed while it wrote."""
    path = straggling(tmp_path)
    path.write_text(path.read_text()[:100])
    assert cli.main(["trace", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "straggler: rank 1" in shown.out and f"left out: {path}" in shown.err


def test_a_chrome_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = straggling(tmp_path)
    assert cli.main(["trace", str(path), "--chrome", str(tmp_path / "no" / "folder")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err
