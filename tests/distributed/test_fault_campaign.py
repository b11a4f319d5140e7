"""`pycoll faults`: as many seeds as fit into PYCOLL_FAULTS_SECONDS (20) from PYCOLL_FAULTS_FIRST (0) on; and that it
finds what is broken."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from pycoll import cli
from pycoll.faults.campaign import Faults, Servers, campaign, report
from pycoll.faults.script import make_script
from pycoll.faults.verdict import BOUND

SECONDS = float(os.environ.get("PYCOLL_FAULTS_SECONDS", "20"))
FIRST = int(os.environ.get("PYCOLL_FAULTS_FIRST", "0"))
BROKEN = Path(__file__).with_name("broken_server.py")


@pytest.mark.timeout(SECONDS + 120)
def test_every_rank_ends_as_it_should() -> None:
    options = Faults(seeds=f"{FIRST}:{FIRST + 1_000_000}", seconds=SECONDS, jobs=2)
    summary = campaign(options, Console(width=200))
    assert [failure.seed for failure in summary.failures] == []
    assert summary.seeds > 0 and summary.calls > summary.seeds
    if summary.latencies and not summary.excused:
        assert max(summary.latencies) <= BOUND


def a_plain_seed() -> int:
    """Of communicators, with an all-reduce, in which nothing is to go wrong."""
    for seed in range(1000):
        script = make_script(seed)
        if script.front == "native" and script.fault.kind == "none" and len(script.calls) == 1 and not script.crash:
            reductions = [c for c in script.calls[0] if c.operation == "all_reduce" and c.count and c.wait is None]
            if any(len(script.groups[c.group].ranks) > 1 for c in reductions):
                return seed
    raise AssertionError("there is no such seed")


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("wrong_number", r"rank \d thread 0 call \d+: all_reduce.*elements are wrong"),
        ("wrong_error", r"an error without a fault.*PeerLostError"),
        ("leak", r"has left behind: \d+ descriptors"),
        ("crash", r"ended with status -6 instead of 0"),
        ("hang", r"(?s)ranks hang.*broken_server.py\", line \d+ in hang"),
    ],
)
def test_what_is_broken_is_found(how: str, problem: str) -> None:
    seed = a_plain_seed()
    with Servers(1, (str(BROKEN), how)) as servers:
        results = list(servers.play(iter([seed])))
    assert len(results) == 1
    text = "\n".join(report(results[0], verbose=False))
    assert f"seed {seed} FAILED; alone: pycoll faults --seeds {seed} --verbose" in text
    assert re.search(problem, text), text


def test_a_machine_that_stands_still_is_no_failure_of_pycoll() -> None:
    halt = 2.5  # seconds, longer than the time-outs of the groups
    seed = next(s for s in range(1000) if make_script(s).fault.overruns and make_script(s).timeout < halt - 0.5)
    with Servers(1) as servers:
        (server,) = servers._processes.values()  # and the ranks, which are of its session

        def stand_still() -> None:
            time.sleep(0.2)
            os.killpg(server.pid, signal.SIGSTOP)
            time.sleep(halt)
            os.killpg(server.pid, signal.SIGCONT)

        results = servers.play(iter([seed, seed]))
        next(results)  # it has imported all
        thread = threading.Thread(target=stand_still)
        thread.start()
        (result,) = results
        thread.join()
    assert result.problems == []
    assert result.starved > halt - 0.5


def test_one_seed_alone_shows_its_script(capsys: pytest.CaptureFixture[str]) -> None:
    seed = a_plain_seed()
    assert cli.main(["faults", "--seeds", str(seed), "--verbose"]) == 0
    shown = capsys.readouterr().out
    assert str(make_script(seed)) in shown
    assert re.search(r"rank 0: thread 0 call \d+ in group \d+, .* s: success", shown)
    assert "no failure" in shown
