"""One thread of a rank: makes its calls in turn, looks at every number they give, and meets the fault."""

from __future__ import annotations

import os
import signal
import time
import traceback
from typing import Any

from pycoll.errors import Error
from pycoll.faults.calls import AT_THE_END, NEVER, Call
from pycoll.faults.member import Member
from pycoll.faults.operations import OPERATIONS
from pycoll.faults.report import Attempt
from pycoll.faults.values import Buffers, Patterns, WrongValueError


class InjectedError(Exception):
    """What a user's code may raise, as the script says."""


class LeavingError(Exception):
    """This thread makes no more calls and leaves its groups."""


class EndingError(Exception):
    """This process ends in order, at once, with all that is open."""


class Performer:
    """One thread of one rank."""

    def __init__(self, member: Member, thread: int) -> None:
        self._member, self.thread = member, thread
        self._pending: list[tuple[int, Call, Any, Buffers]] = []  # before which call it is to be waited for; the call

    def run(self) -> None:
        """Makes the calls of the thread; what else goes wrong is a problem of the report."""
        member = self._member
        try:
            if member.create(self.thread):
                self._make_calls()
        except EndingError:
            member.ends = True
        except (LeavingError, InjectedError):
            self._pending.clear()
            for i, group in enumerate(member.script.groups):
                if group.thread == self.thread:
                    member.drop(i)
        except Exception:
            member.report.problems.append(f"rank {member.rank} thread {self.thread}: {traceback.format_exc()}")
        if not member.ends:
            self._pending.clear()

    def _make_calls(self) -> None:
        member = self._member
        calls = member.script.calls[self.thread]
        mine = {call.index for call in member.script.calls_of(member.rank, self.thread)}
        try:
            if self.thread == 0:
                member.armed = True
            for call in calls:
                self._wait_until(call.index)
                self._meet_fault(call.index)
                if call.index in mine:
                    member.board.begin(member.rank, self.thread, call.index)
                    self._make(call)
            self._wait_until(AT_THE_END)
        finally:
            if self.thread == 0:
                member.armed = False

    def _make(self, call: Call) -> None:
        member = self._member
        ranks = member.script.groups[call.group].ranks
        me, size = ranks.index(member.rank), len(ranks)
        patterns = Patterns(member.script.seed, self.thread, call, size)
        plan = OPERATIONS[call.operation].plan(call, me, size)
        attempt, buffers = self._attempt(call), None
        try:
            buffers = Buffers(call, plan, patterns, me, lambda n, dtype: member.front.allocate(call, n, dtype))
            attempt = self._attempt(call)
            work = member.front.start(call, buffers)
        except Error as error:
            self._fail(attempt, error, buffers)
            return
        except WrongValueError as error:
            self._complain(call, error)
            return
        wait = call.wait_of(me)
        if wait is None:
            self._succeed(attempt, call, buffers)
        elif wait != NEVER:
            self._pending.append((wait, call, work, buffers))

    def _wait_until(self, index: int) -> None:
        """Waits for what is to be waited for before call `index`, in the order of the calls or the other way round."""
        due = [entry for entry in self._pending if entry[0] <= index]
        self._pending = [entry for entry in self._pending if entry[0] > index]
        for _, call, work, buffers in reversed(due) if index % 2 else due:
            attempt = self._attempt(call, waited=True)
            try:
                work.wait()
            except Error as error:
                self._fail(attempt, error, buffers)
            else:
                self._succeed(attempt, call, buffers)

    def _attempt(self, call: Call, *, waited: bool = False) -> Attempt:
        return Attempt(self.thread, call.index, call.group, waited=waited)

    def _succeed(self, attempt: Attempt, call: Call, buffers: Buffers) -> None:
        self._member.report.outcomes.append(attempt.end())
        try:
            buffers.check()
        except WrongValueError as error:
            self._complain(call, error)
        buffers.spoil()

    def _complain(self, call: Call, error: WrongValueError) -> None:
        self._member.report.problems.append(f"rank {self._member.rank} thread {self.thread} call {call.index}: {error}")

    def _fail(self, attempt: Attempt, error: Error, buffers: Buffers | None) -> None:
        self._member.report.outcomes.append(attempt.end(error))
        if buffers is not None:
            buffers.spoil()
        if self._member.script.crash:
            raise LeavingError

    def _meet_fault(self, index: int) -> None:
        member, fault = self._member, self._member.script.fault
        if (self.thread, index) != (fault.thread, fault.call) or member.rank not in fault.ranks:
            return
        if fault.kind in ("abort", "close"):
            member.sabotage()
            return
        member.board.strike(member.rank)
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "vanish":
            os._exit(3)
        elif fault.kind == "stop":
            member.say(b"s")
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.kind == "delay":
            time.sleep(fault.lasts)
        elif fault.kind == "raise":
            raise InjectedError
        elif fault.kind == "exit":
            raise EndingError
