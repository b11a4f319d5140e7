"""One rank of a seed: it meets the others, lets its threads play, leaves, and looks for what is left behind."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from pycoll.faults.member import Member
from pycoll.faults.performer import InjectedError, Performer
from pycoll.faults.report import Board, Report, core_waits, held_segments, open_files
from pycoll.faults.script import Script


class RankRun:
    """All of one rank; its arguments are a Member's."""

    def __init__(
        self, script: Script, rank: int, store: dist.Store, board: Board, say: Callable[[bytes], None]
    ) -> None:
        self._member = Member(script, rank, store, board, say)
        self._files, self._threads = len(list(open_files())), _native_threads()
        self._performers = [Performer(self._member, t) for t in range(len(script.calls))]
        signal.signal(signal.SIGUSR1, self._on_signal)

    @property
    def ends(self) -> bool:
        """Whether the interpreter is to end, with everything open."""
        return self._member.ends

    def run(self) -> Report:
        """Plays the script. What is to be told is in the report, also if this rank ends before all is said."""
        member, report = self._member, self._member.report
        threads = [threading.Thread(target=p.run, name=f"thread {p.thread}") for p in self._performers[1:]]
        if member.begin():
            for thread in threads:
                thread.start()
            self._performers[0].run()
            for thread in threads:
                thread.join()
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it comes too late
        member.end_timer()
        if not member.ends:
            self._performers.clear()
            member.leave()
            if left := self._leaks():
                report.problems.append(f"rank {member.rank} has left behind: {', '.join(left)}")
        report.starved = max(core_waits().values(), default=0.0)
        return report

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        member = self._member
        if member.armed:
            member.armed = False
            member.board.strike(member.rank)
            raise InjectedError

    def _leaks(self) -> list[str]:
        """What is there that was not before."""
        gc.collect()
        left = held_segments()
        files = len(list(open_files())) - self._files
        left += [f"{files} descriptors"] * (files > 0)
        return left + _threads_besides(self._threads)


def _threads_besides(before: set[str]) -> list[str]:
    """Native threads that are still there after a second; one that was joined may take a moment to end."""
    deadline = time.monotonic() + 1.0
    while (left := _native_threads() - before) and time.monotonic() < deadline:
        time.sleep(0.001)
    return [f"thread {(Path('/proc/self/task') / task / 'comm').read_text().strip()}" for task in left]


def _native_threads() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}
