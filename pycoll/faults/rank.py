"""One rank of a seed: it meets the others, lets its threads play, leaves, and looks for what is left behind."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from pycoll.errors import Error
from pycoll.faults.fronts import make_front
from pycoll.faults.performer import InjectedError, Performer
from pycoll.faults.report import CREATION, Attempt, Board, Report, core_waits, held_segments, open_files
from pycoll.faults.script import Script


class RankRun:
    """All of one rank. `say` sends a byte to the server: "r": the groups are there, "s": it is about to stop itself."""

    def __init__(
        self, script: Script, rank: int, store: dist.Store, board: Board, say: Callable[[bytes], None]
    ) -> None:
        self.script, self.rank, self.board, self.say = script, rank, board, say
        self.report = Report()
        self.front = make_front(script, rank, store)
        self.ends = script.interpreter_ends  # with everything open
        self.armed = False  # a signal raises InjectedError now
        self._created = threading.Barrier(len(script.calls))
        self._files, self._threads = len(list(open_files())), _native_threads()
        self._timer: threading.Timer | None = None
        self._performers = [Performer(self, t) for t in range(len(script.calls))]
        signal.signal(signal.SIGUSR1, self._on_signal)

    def run(self) -> Report:
        """Plays the script. What is to be told is in the report, also if this rank ends before all is said."""
        threads = [threading.Thread(target=p.run, name=f"thread {p.thread}") for p in self._performers[1:]]
        if self.try_to_create(0, self.front.begin):
            for thread in threads:
                thread.start()
            self._performers[0].run()
            for thread in threads:
                thread.join()
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it comes too late
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        if not self.ends:
            self._performers.clear()
            self._leave_everything()
            self._look_for_leaks()
        self.report.starved = max(core_waits().values(), default=0.0)
        return self.report

    def try_to_create(self, thread: int, create: Callable[[], None]) -> bool:
        """Whether `create` succeeded; its error is noted."""
        attempt = Attempt(thread, CREATION, CREATION)
        try:
            create()
        except (Error, dist.DistError) as error:
            self.report.outcomes.append(attempt.end(error))
            return False
        return True

    def create(self, thread: int) -> bool:
        """Meets the others in the groups of a thread. Returns whether this rank is in all groups of all threads."""
        if not self.try_to_create(thread, lambda: self.front.create(thread)):
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

    def _set_timer(self) -> None:
        fault = self.script.fault
        if self.rank in fault.ranks and fault.kind in ("abort", "close") and fault.call is None:
            self._timer = threading.Timer(fault.after, self.sabotage)
            self._timer.start()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.armed:
            self.armed = False
            self.board.strike(self.rank)
            raise InjectedError

    def _leave_everything(self) -> None:
        try:
            for group in list(self.front.groups):
                self.drop(group)
            self.front.end()
        except Exception:
            self.report.problems.append(f"rank {self.rank} could not leave: {traceback.format_exc()}")

    def _look_for_leaks(self) -> None:
        gc.collect()
        left = held_segments()
        files = len(list(open_files())) - self._files
        left += [f"{files} descriptors"] * (files > 0)
        left += _threads_besides(self._threads)
        if left:
            self.report.problems.append(f"rank {self.rank} has left behind: {', '.join(left)}")


def _threads_besides(before: set[str]) -> list[str]:
    """Native threads that are still there after a second; one that was joined may take a moment to end."""
    deadline = time.monotonic() + 1.0
    while (left := _native_threads() - before) and time.monotonic() < deadline:
        time.sleep(0.001)
    return [f"thread {(Path('/proc/self/task') / task / 'comm').read_text().strip()}" for task in left]


def _native_threads() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}
