"""A rank as a member of its groups, which its threads share: it meets the others, leaves them, and keeps the report."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable

import torch.distributed as dist

from pycoll.errors import Error
from pycoll.faults.fronts import make_front
from pycoll.faults.report import CREATION, Attempt, Board, Report
from pycoll.faults.script import Script


class Member:
    """One rank. `say` sends a byte to the server: "r": the groups are there, "s": it is about to stop itself."""

    def __init__(
        self, script: Script, rank: int, store: dist.Store, board: Board, say: Callable[[bytes], None]
    ) -> None:
        self.script, self.rank, self.board, self.say = script, rank, board, say
        self.report = Report()
        self.front = make_front(script, rank, store)
        self.ends = script.interpreter_ends  # with everything open
        self.armed = False  # a signal raises InjectedError now
        self._created = threading.Barrier(len(script.calls))
        self._timer: threading.Timer | None = None

    def begin(self) -> bool:
        """Comes first, in the main thread. Returns whether it succeeded; its error is noted."""
        return self._try_to_create(0, self.front.begin)

    def create(self, thread: int) -> bool:
        """Meets the others in the groups of a thread. Returns whether this rank is in all groups of all threads."""
        if not self._try_to_create(thread, lambda: self.front.create(thread)):
            self._created.abort()
        try:
            first = self._created.wait() == 0
        except threading.BrokenBarrierError:
            return False
        if first:
            self._set_timer()
            self.say(b"r")
        return True

    def drop(self, group: int) -> None:
        """Leaves a group for good."""
        if group in self.front.groups:
            self.front.drop(group)
            self.report.closed[group] = time.monotonic()

    def sabotage(self) -> None:
        """Aborts or closes the group of the script's fault."""
        group = self.script.fault.group
        if group not in self.front.groups:
            return
        self.board.strike(self.rank)
        with contextlib.suppress(Error):
            if self.script.fault.kind == "abort":
                self.front.abort(group)
            else:
                self.front.close(group)
                self.report.closed[group] = time.monotonic()

    def end_timer(self) -> None:
        """No sabotage comes any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()

    def leave(self) -> None:
        """Leaves all groups, in the main thread; what goes wrong is a problem of the report."""
        try:
            for group in list(self.front.groups):
                self.drop(group)
            self.front.end()
        except Exception:
            self.report.problems.append(f"rank {self.rank} could not leave: {traceback.format_exc()}")

    def _try_to_create(self, thread: int, create: Callable[[], None]) -> bool:
        """Whether `create` succeeded; its error is noted."""
        attempt = Attempt(thread, CREATION, CREATION)
        try:
            create()
        except (Error, dist.DistError) as error:
            self.report.outcomes.append(attempt.end(error))
            return False
        return True

    def _set_timer(self) -> None:
        fault = self.script.fault
        if self.rank in fault.ranks and fault.kind in ("abort", "close") and fault.call is None:
            self._timer = threading.Timer(fault.after, self.sabotage)
            self._timer.start()
