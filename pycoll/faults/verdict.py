"""What each rank may say of a seed, and how soon, given the fault; whatever else it says is a failure of pycoll."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from pycoll.faults.report import CREATION, Board, Ending, Outcome, Report
from pycoll.faults.script import Group, Script

BOUND = 1.0
"""Seconds from a SIGKILL, or from a rank's leaving, to the errors of those who wait for it; and beyond a time-out."""

BAD_WORDS = re.compile(r"terminate called|Fatal Python|Segmentation fault|Traceback|AddressSanitizer")
KILLED = ("kill", "vanish")


@dataclass
class Result:
    """Of one seed.

    Attributes:
        problems: what was wrong, in words; empty: all was right.
        logs: what the ranks printed, with their stacks if they hung.
        happened: whether the fault came before its rank had ended.
        latencies: seconds from each SIGKILL to the error of each survivor that waited for the dead rank, in each group.
        excused: latencies over BOUND of ranks that waited for a core meanwhile, not for pycoll.
        starved: the longest that a rank waited for a core, or that nothing ran, in seconds.
        seconds: how long it took.
    """

    seed: int
    kind: str
    world_size: int
    problems: list[str] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    outcomes: list[list[Outcome]] = field(default_factory=list)
    happened: bool = False
    calls: int = 0
    errors: int = 0
    latencies: list[float] = field(default_factory=list)
    excused: int = 0
    starved: float = 0.0
    seconds: float = 0.0


def judge(script: Script, endings: Sequence[Ending], board: Board, hangs: bool, stood_still: float = 0.0) -> Result:
    """Looks at what the ranks of a seed reported, how their processes ended and what they printed.

    `stood_still`: the longest that their server did not run either, in seconds: a virtual machine may be halted, and no
    process then counts as waiting for a core.
    """
    result = Result(script.seed, script.fault.kind, script.world_size)
    struck = {rank: at for rank in script.fault.ranks if (at := board.struck(rank)) is not None}
    result.happened = bool(struck)
    result.starved = max([stood_still, *(ending.report.starved for ending in endings if ending.report)])
    if hangs:
        result.problems.append("ranks hang: their stacks are below")
    judgement = _Judgement(script, endings, board, result, struck)
    for rank, ending in enumerate(endings):
        judgement.look_at_end(rank, ending)
        if ending.report is not None:
            result.problems += ending.report.problems
            judgement.look_at_outcomes(rank, ending.report)
    result.outcomes = [ending.report.outcomes if ending.report else [] for ending in endings]
    if result.problems:
        result.logs = [f"rank {rank}: {ending.log}" for rank, ending in enumerate(endings) if ending.log]
    return result


@dataclass
class _Judgement:
    script: Script
    endings: Sequence[Ending]
    board: Board
    result: Result
    struck: dict[int, float]  # victim -> when

    def look_at_end(self, rank: int, ending: Ending) -> None:
        """How the process ended, and what it printed."""
        expected = {"kill": -9, "vanish": 3}.get(self.script.fault.kind, 0) if rank in self.struck else 0
        reported = ending.report is not None
        if ending.status != expected and not (ending.status == 0 and reported):
            self._blame(rank, f"ended with status {ending.status} instead of {expected}")
        elif ending.status == 0 and not reported:
            self._blame(rank, "ended without a report")
        if BAD_WORDS.search(ending.log):
            self._blame(rank, f"printed: {ending.log.strip()[:2000]}")

    def look_at_outcomes(self, rank: int, report: Report) -> None:
        """Every outcome of a rank that could report."""
        self.result.calls += len(report.outcomes)
        outcomes = sorted(report.outcomes, key=lambda o: o.group)
        for number, of_group in groupby(outcomes, key=lambda o: o.group):
            self._look_at_group(rank, number, list(of_group))
        gave_up = rank in self.struck and self.script.fault.kind in ("raise", "exit", "close")
        if not gave_up and not any(o.error for o in outcomes):
            self._look_for_missing(rank, report)

    def _look_for_missing(self, rank: int, report: Report) -> None:
        """Who met no error has made all its calls."""
        expected = self.script.outcomes_of(rank)
        if len(report.outcomes) != expected:
            self._blame(rank, f"ended without an error after {len(report.outcomes)} of {expected} calls")

    def _look_at_group(self, rank: int, number: int, outcomes: Sequence[Outcome]) -> None:
        group = self.script.groups[number] if number != CREATION else None
        first: Outcome | None = None
        for o in outcomes:
            if not o.error:
                if group is not None:
                    self._look_at_success(rank, group, o)
                if first is not None and not o.waited:
                    self._blame(rank, f"success after {first.error}: {_described(o)}")
                continue
            self.result.errors += 1
            if first is None:
                first = o
                problem = self._problem_with(rank, group, number, o) or self._problem_with_time(rank, group, o)
            elif group is not None and not o.waited and (o.error, o.culprit) != (first.error, first.culprit):
                problem = f"another error than the first one, {first.error} about rank {first.culprit}"
            else:
                problem = self._problem_with(rank, group, number, o)
            if problem:
                self._blame(rank, f"{problem}: {_described(o)}")

    def _look_at_success(self, rank: int, group: Group, o: Outcome) -> None:
        """No collective ends before all ranks have begun it."""
        call, me = self.script.calls[o.thread][o.call], group.ranks.index(rank)
        for victim in self.struck:
            if victim not in group.ranks or self.board.begun(victim, group.thread) > o.call:
                continue
            if call.needs(me, group.ranks.index(victim)):
                self._blame(rank, f"success of a call that rank {victim} has not made: {_described(o)}")

    def _problem_with(self, rank: int, group: Group | None, number: int, o: Outcome) -> str | None:
        """What is wrong with an error, if anything is."""
        fault = self.script.fault
        if not self.struck:
            return None if fault.overruns and self._starved() else "an error without a fault"
        culprit = group.ranks[o.culprit] if group is not None and o.culprit is not None else o.culprit
        if o.error == "TimeoutError":
            return self._problem_with_time_out(culprit, group, number, o.text)
        if group is None:
            return self._problem_with_creation(o)
        if rank in self.struck and fault.kind == "close" and number == fault.group and "is closed" in o.text:
            return None
        about_victim = culprit in self.struck
        if about_victim and _fits(fault.kind, fault.call is None, number == fault.group, o):
            return None
        if "is lost: its process has died" in o.text:
            return "a rank that lives is called dead"
        if fault.kind in ("raise", "close", "exit") and " has left" in o.text and self._asks_anybody(number):
            return None
        if not self._has_consequences(group):
            return "not the error of this fault"
        if o.error == "PeerLostError" and " has left" in o.text and self._has_left(culprit, group.thread):
            return None
        return "not the error of this fault, nor of its consequences"

    def _problem_with_time_out(self, culprit: int | None, group: Group | None, number: int, text: str) -> str | None:
        fault = self.script.fault
        chained = group is None or sum(g.thread == group.thread for g in self.script.groups) > 1  # one holds up another
        nobody = culprit is None and "from any rank" in text and self._asks_anybody(number)
        if not fault.overruns:
            awaited = self._awaited_anybody()
            if (nobody and number in awaited) or (awaited and chained and culprit not in self.struck):
                return None
            return "a time-out that nothing explains"
        if culprit in self.struck or chained or fault.creation or nobody or self._starved():
            return None
        return "a time-out that blames another rank"

    def _starved(self) -> bool:
        """Whether ranks waited for a core so long that a time-out may blame them for it."""
        return self.result.starved > self.script.timeout / 4

    def _problem_with_creation(self, o: Outcome) -> str | None:
        if not self.script.fault.creation:
            return "an error in the creation of a group, before the fault"
        return None if o.error == "PeerLostError" else "not the error of a fault in the creation of a group"

    def _has_consequences(self, group: Group) -> bool:
        """Whether ranks may leave a group early though the fault does not concern it."""
        fault = self.script.fault
        return self.script.crash or fault.overruns or fault.creation or fault.kind in ("raise", "exit")

    def _asks_anybody(self, number: int) -> bool:
        """Whether there are receives in a group that blame anybody, or nobody, when nothing comes."""
        return any(call.any_source and call.group == number for calls in self.script.calls for call in calls)

    def _awaited_anybody(self) -> set[int]:
        """The groups that a rank has left while another received from any source until its time-out: those that stayed
        might have sent yet (M9)."""
        if self.script.fault.kind not in ("raise", "close", "exit"):
            return set()
        outcomes = [o for ending in self.endings if ending.report is not None for o in ending.report.outcomes]
        waited = {o.group for o in outcomes if o.error == "TimeoutError" and "receive(from any rank" in o.text}
        return {number for number in waited - {CREATION} if {*self.struck} & {*self.script.groups[number].ranks}}

    def _has_left(self, rank: int | None, thread: int) -> bool:
        """Whether a rank met the fault, or an error in that thread."""
        if rank is None:
            return False
        report = self.endings[rank].report
        if rank in self.struck or report is None:
            return True
        return any(o.error and o.thread == thread for o in report.outcomes) or self.script.fault.creation

    def _problem_with_time(self, rank: int, group: Group | None, o: Outcome) -> str | None:
        """Whether the first error in a group came too late. (A rank that was stopped is late by that.)"""
        if rank in self.struck and self.script.fault.kind in ("stop", "delay"):
            return None
        if o.error == "TimeoutError":
            late = o.ended - o.began - self.script.timeout
        elif group is not None and o.culprit is not None:
            late = o.ended - max(self._time_of(group.ranks[o.culprit], o.group), o.began)
            if self.script.fault.kind in KILLED and group.ranks[o.culprit] in self.struck:
                self.result.latencies.append(late)
        else:
            return None
        if late <= BOUND:
            return None
        starved = max(o.starved, self.result.starved)
        if late - starved <= BOUND:
            self.result.excused += 1
            return None
        return f"{late:.2f} s late (and waited for a core for at most {starved:.2f} s)"

    def _time_of(self, culprit: int, number: int) -> float:
        """When the rank to blame had died or left."""
        if self.script.fault.kind in (*KILLED, "abort") and culprit in self.struck:
            return self.struck[culprit]
        ending = self.endings[culprit]
        return ending.report.closed.get(number, ending.at) if ending.report is not None else ending.at

    def _blame(self, rank: int, what: str) -> None:
        self.result.problems.append(f"rank {rank}: {what}")


def _fits(kind: str, outside: bool, its_group: bool, o: Outcome) -> bool:
    """Whether an error about the victim is the one that the fault calls for."""
    lost = o.error == "PeerLostError" and "is lost: its process has died" in o.text
    left = o.error == "PeerLostError" and " has left" in o.text
    if kind in KILLED:
        return lost
    if kind == "raise":
        return left or (outside and o.error == "Error" and "was interrupted" in o.text)
    if kind == "abort":
        return its_group and o.error == "Error" and bool(re.search("as the script says|aborted the group", o.text))
    if kind == "close":
        return left and its_group
    return left and kind == "exit"


def _described(o: Outcome) -> str:
    what = f"thread {o.thread} call {o.call}" if o.call != CREATION else "creation"
    ended = f"{o.error} about rank {o.culprit}: {o.text}" if o.error else "success"
    return f"{what} in group {o.group}{' (waited for)' if o.waited else ''}, {o.ended - o.began:.3f} s: {ended}"


def explained(result: Result) -> Iterator[str]:
    """The outcomes of a seed, for people."""
    for rank, outcomes in enumerate(result.outcomes):
        for o in outcomes:
            yield f"rank {rank}: {_described(o)}"
