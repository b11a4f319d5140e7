"""`pycoll faults`, without processes: what seeds stand for, what tensors ought to hold, and what a rank may report."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pycoll import cli
from pycoll.faults import campaign
from pycoll.faults.calls import NEVER, REDUCED, Call, Piece, Plan
from pycoll.faults.operations import OPERATIONS
from pycoll.faults.report import Board, Ending, Outcome, Report
from pycoll.faults.script import KINDS, Fault, Group, Script, make_script
from pycoll.faults.values import Buffers, Patterns, WrongValueError
from pycoll.faults.verdict import Result, judge

SEEDS = range(1500)
SCRIPTS = [make_script(seed) for seed in SEEDS]
CALLS = [(script, call) for script in SCRIPTS for calls in script.calls for call in calls]


# ---- scripts ----


def test_a_seed_always_stands_for_the_same() -> None:
    assert [make_script(seed) for seed in range(100)] == SCRIPTS[:100]
    assert len({str(script) for script in SCRIPTS[:100]}) == 100


def test_the_seeds_cover_everything() -> None:
    assert {script.fault.kind for script in SCRIPTS} == set(KINDS)
    assert {script.world_size for script in SCRIPTS} == set(range(2, 9))
    assert {len(script.calls) for script in SCRIPTS} == {1, 2, 3}
    for front in ("native", "c10d"):
        calls = [call for script, call in CALLS if script.front == front]
        assert {call.operation for call in calls} == set(OPERATIONS)
        for trait in ("in_place", "strided", "uneven", "any_source", "listed", "symmetric"):
            assert any(getattr(c, trait) for c in calls) == (
                (trait, front) not in (("listed", "native"), ("symmetric", "c10d"))
            )
    assert {call.wait is None for _, call in CALLS} == {True, False}
    assert any(call.wait == NEVER for _, call in CALLS)
    assert any(script.fault.creation for script in SCRIPTS)
    assert any(len(script.fault.ranks) > 1 for script in SCRIPTS)
    assert {script.fault.call is None for script in SCRIPTS if script.fault.kind == "kill"} == {True, False}


def test_scripts_can_be_played() -> None:
    for script in SCRIPTS:
        fault = script.fault
        assert all(rank < script.world_size for rank in fault.ranks)
        assert fault.kind == "none" or fault.ranks
        assert fault.call is None or fault.call < len(script.calls[fault.thread])
        if fault.kind in ("abort", "close"):
            assert set(fault.ranks) <= set(script.groups[fault.group].ranks)
            assert script.groups[fault.group].thread == fault.thread
    for script, call in CALLS:
        group = script.groups[call.group]
        assert script.calls[group.thread][call.index] == call
        assert call.root < len(group.ranks) and call.peer < len(group.ranks)
        assert call.peer != call.root or call.peer < 0


# ---- values ----


def _exchange(script: Script, call: Call) -> list[Buffers]:
    """What all ranks hold after the call: made from the plans, one element after the other."""
    size = len(script.groups[call.group].ranks)
    thread = script.groups[call.group].thread
    everyone = [r for r in range(size) if call.takes_part(r)]
    plans = {r: OPERATIONS[call.operation].plan(call, r, size) for r in everyone}
    patterns = Patterns(script.seed, thread, call, size)
    held = [Buffers(call, plans[r], patterns, r, lambda n, dtype: torch.empty(n, dtype=dtype)) for r in everyone]
    whole = {r: torch.cat(b.xs) if b.xs else torch.empty(0) for r, b in zip(everyone, held, strict=True)}
    for r, buffers in zip(everyone, held, strict=True):
        parts = []
        for piece in plans[r].output or ():
            source = reduced(list(whole.values()), call.op) if piece.source == REDUCED else whole[piece.source]
            parts.append(source[piece.start : piece.start + piece.length])
        if len(buffers.outs) > 1:
            for out, part in zip(buffers.outs, parts, strict=True):
                out.copy_(part)
        elif parts:
            buffers.out.copy_(torch.cat(parts))
    return held


def reduced(tensors: list[torch.Tensor], op: str) -> torch.Tensor:
    """Of small whole numbers, in int64, as pycoll and torch define it."""
    stack = torch.stack(tensors).to(torch.int64)
    if op in ("band", "bor", "bxor"):
        result = stack[0]
        for x in stack[1:]:
            result = {"band": result & x, "bor": result | x, "bxor": result ^ x}[op]
    else:
        how: dict[str, Callable[[], torch.Tensor]] = {
            "sum": lambda: stack.sum(0),
            "avg": lambda: stack.sum(0) // len(tensors),
            "min": lambda: stack.amin(0),
            "max": lambda: stack.amax(0),
            "product": lambda: stack.prod(0),
        }
        result = how[op]()
    return result.to(tensors[0].dtype)


def test_what_ought_to_come_is_what_a_plain_exchange_gives() -> None:
    for script, call in CALLS[::23]:
        for buffers in _exchange(script, call):
            buffers.check()


def test_one_wrong_element_is_found_and_named() -> None:
    broken = 0
    for script, call in CALLS[::23]:
        for buffers in _exchange(script, call):
            if buffers.out is None or not buffers.outs[-1].numel() or call.dtype == "bool":
                continue
            buffers.outs[-1][-1] += 1
            with pytest.raises(WrongValueError, match=f"{call.operation}.*1 of [0-9]+ elements are wrong"):
                buffers.check()
            broken += 1
    assert broken > 1000


def test_an_input_that_was_written_is_found() -> None:
    call = next(c for _, c in CALLS if c.operation == "gather" and c.count > 10 and c.dtype == "int32")
    patterns = Patterns(1, 0, replace(call, root=0), 2)
    buffers = Buffers(call, Plan([call.count], None), patterns, 1, lambda n, dtype: torch.empty(n, dtype=dtype))
    buffers.check()
    buffers.x[3] += 1
    with pytest.raises(WrongValueError, match="its input"):
        buffers.check()


def test_blocks_that_are_exchanged_are_found() -> None:
    call = next(c for _, c in CALLS if c.operation == "all_gather" and c.dtype == "uint8")
    patterns = Patterns(1, 0, call, 3)
    x = torch.empty(3 << 16, dtype=torch.uint8)
    for r in range(3):
        patterns.fill([x[r << 16 : (r + 1) << 16]], r)
    pieces = [Piece(r, 0, 1 << 16) for r in range(3)]
    patterns.check(x, pieces, "")
    for a, b in ((0, 1 << 16), (0, 4096), (0, 64)):  # of ranks, of rounds, of cache lines
        y = x.clone()
        y[a : a + 64], y[b : b + 64] = x[b : b + 64].clone(), x[a : a + 64].clone()
        with pytest.raises(WrongValueError):
            patterns.check(y, pieces, "")


# ---- the verdict ----

LOST = "pycoll: rank {} is lost: its process has died"
LEFT = "pycoll: rank {} has left: it closed its communicator while rank 0 still waits for it"
STRUCK = 100.0  # when


def script(fault: Fault, *, crash: bool = False, timeout: float = 30.0) -> Script:
    """Two barriers of three ranks, and two of ranks 0 and 2, in one thread."""
    barrier = next(c for _, c in CALLS if c.operation == "barrier")
    calls = tuple(replace(barrier, group=i // 2, index=i, wait=None) for i in range(4))
    groups = (Group((0, 1, 2), 0), Group((0, 2), 0))
    return Script(0, 3, "native", timeout, groups, (calls,), fault, crash, False, ())


def outcome(call: int, error: str = "", text: str = "", culprit: int | None = None, late: float = 0.01) -> Outcome:
    ended = STRUCK + late if error else STRUCK
    return Outcome(0, call, call // 2, error, text, culprit, False, STRUCK - 0.1, ended, 0.0)


def verdict(
    fault: Fault,
    outcomes: list[Outcome],
    *,
    begun: int = 1,
    crash: bool = False,
    timeout: float = 30.0,
    status: int = 0,
    log: str = "",
    report: bool = True,
) -> Result:
    """Of rank 0, which had these outcomes; rank 1 is the victim, and rank 2 fared well."""
    played = script(fault, crash=crash, timeout=timeout)
    board = Board(3, 1)
    board._struck[1] = STRUCK if fault.ranks else 0.0
    board.begin(1, 0, begun - 1)
    killed = fault.kind == "kill"
    everything = [outcome(0), outcome(1), outcome(2), outcome(3)]
    endings = [
        Ending(Report(outcomes) if report else None, status, STRUCK, log),
        Ending(
            None if killed else Report(everything[:2], closed={0: STRUCK, 1: STRUCK}), -9 if killed else 0, STRUCK, ""
        ),
        Ending(Report(everything), 0, STRUCK, ""),
    ]
    result = judge(played, endings, board, hangs=False)
    result.problems = [p for p in result.problems if not p.startswith(("rank 1", "rank 2"))]
    return result


KILL, STOP = Fault("kill", (1,)), Fault("stop", (1,), lasts=3.0)
GOOD = [outcome(2), outcome(3)]
RIGHT = [
    ("no fault", Fault(), [outcome(i) for i in range(4)], {}),
    ("killed", KILL, [outcome(0), outcome(1, "PeerLostError", LOST.format(1), 1), *GOOD], {}),
    ("killed when all was done", KILL, [outcome(i) for i in range(4)], {"begun": 2}),
    ("stopped for too long", STOP, [outcome(0), outcome(1, "TimeoutError", "", 1, 1.5), *GOOD], {"timeout": 1.5}),
    ("stopped for a while", Fault("stop", (1,), lasts=0.1), [outcome(i) for i in range(4)], {"begun": 2}),
    ("raised", Fault("raise", (1,), call=1), [outcome(0), outcome(1, "PeerLostError", LEFT.format(1), 1), *GOOD], {}),
    (
        "crashed",
        replace(STOP, kind="kill"),
        [outcome(0), outcome(1, "PeerLostError", LOST.format(1), 1)],
        {"crash": True},
    ),
    ("aborted", Fault("abort", (1,)), [outcome(0), outcome(1, "Error", "rank 1: as the script says", 1), *GOOD], {}),
]
WRONG = [
    ("an error without a fault", Fault(), [outcome(0, "PeerLostError", LOST.format(1), 1), *GOOD], {}),
    ("has not made", KILL, [outcome(0), outcome(1), *GOOD], {}),
    ("a time-out that nothing", KILL, [outcome(0), outcome(1, "TimeoutError", "", 1, 30), *GOOD], {}),
    ("3.00 s late", KILL, [outcome(0), outcome(1, "PeerLostError", LOST.format(1), 1, 3.0), *GOOD], {}),
    ("a rank that lives is called dead", KILL, [outcome(0), outcome(1, "PeerLostError", LOST.format(2), 2), *GOOD], {}),
    (
        "a rank that lives is called dead",
        STOP,
        [outcome(0), outcome(1, "PeerLostError", LOST.format(1), 1), *GOOD],
        {"timeout": 1.5},
    ),
    ("not the error of this fault", KILL, [outcome(0), outcome(1, "PeerLostError", LEFT.format(2), 2), *GOOD], {}),
    ("not the error of this fault", KILL, [outcome(0), outcome(1, "MismatchError", "", 1), *GOOD], {}),
    (
        "not the error of this fault",  # of a group that the dead rank is not in
        KILL,
        [outcome(0), outcome(2), outcome(3, "PeerLostError", LEFT.format(1), 1)],
        {},
    ),
    (
        "another error than the first",
        KILL,
        [outcome(0, "PeerLostError", LOST.format(1), 1), outcome(1, "Error", "closed"), *GOOD],
        {},
    ),
    ("success after PeerLostError", KILL, [outcome(0, "PeerLostError", LOST.format(1), 1), outcome(1), *GOOD], {}),
    ("ended without an error after 3 of 4", KILL, [outcome(0), *GOOD], {}),
    ("2.50 s late", STOP, [outcome(0), outcome(1, "TimeoutError", "", 1, 3.9), *GOOD], {"timeout": 1.5}),
    ("status -11", KILL, [], {"status": -11}),
    ("without a report", KILL, [], {"report": False}),
    ("terminate called", Fault(), [outcome(i) for i in range(4)], {"log": "terminate called without"}),
]


@pytest.mark.parametrize(("name", "fault", "outcomes", "more"), RIGHT)
def test_what_a_rank_may_report(name: str, fault: Fault, outcomes: list[Outcome], more: dict[str, object]) -> None:
    result = verdict(fault, outcomes, **more)  # type: ignore[arg-type]
    assert result.problems == [], name
    assert len(result.latencies) == sum("is lost" in o.text for o in outcomes)


@pytest.mark.parametrize(("problem", "fault", "outcomes", "more"), WRONG)
def test_what_a_rank_may_not_report(
    problem: str, fault: Fault, outcomes: list[Outcome], more: dict[str, object]
) -> None:
    result = verdict(fault, outcomes, **more)  # type: ignore[arg-type]
    assert any(problem in said for said in result.problems), result.problems


# ---- the command ----


@pytest.mark.parametrize("seeds", ("some", "1:2:3", "-4", ""))
def test_bad_seeds_are_named(seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["faults", f"--seeds={seeds}"]) == 2
    assert f"--seeds must be a number or FIRST:END, not {seeds!r}" in capsys.readouterr().err.replace("\n", "")


def test_ranges_of_seeds() -> None:
    assert campaign.seed_range("17") == (17, 18)
    assert campaign.seed_range("3:20") == (3, 20)


def test_what_is_written_and_printed_of_a_failure(tmp_path: Path) -> None:
    summary = campaign.Summary(seconds=60.0)
    summary.add(Result(3, "kill", 2, latencies=[0.1, 0.3], happened=True))
    failed = Result(4, "stop", 2, problems=["rank 0: ranks hang"], logs=["rank 0: Thread 1"])
    summary.add(failed)
    path = tmp_path / "out.json"
    path.write_text(json.dumps(summary.to_json()))
    facts = json.loads(path.read_text())
    assert facts["seeds"] == 2 and facts["seeds_per_minute"] == 2 and facts["missed"] == 1
    assert facts["seconds_from_kill_to_error"]["max"] == 0.3 and facts["seconds_from_kill_to_error"]["median"] == 0.3
    assert facts["failures"][0]["seed"] == 4 and "seed 4:" in facts["failures"][0]["script"]
    printed = "\n".join(campaign.report(failed, verbose=False))
    assert "pycoll faults --seeds 4 --verbose" in printed and "Thread 1" in printed
