"""The fork server: it has imported torch once, and plays one seed after the other with ranks that it forks.

`python -m pycoll.faults.server DESCRIPTOR PORT` takes seeds from a connection and answers each with a `Result`. It runs
no threads and never makes a communicator, so a rank begins as clean as a process that has just imported pycoll.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import os
import pickle
import select
import signal
import sys
import time
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import BinaryIO

import torch
import torch.distributed as dist

from pycoll.faults.rank import RankRun
from pycoll.faults.report import Board, Ending, Report
from pycoll.faults.script import Fault, Script, make_script
from pycoll.faults.verdict import Result, judge
from pycoll.parent import end_with

TICK = 0.005  # seconds between looks, while something is to be done at its time
LONGEST_PAUSE = 0.1  # and otherwise: what the machine does not run for longer is noticed
PATIENCE = 20.0  # seconds beyond its time-outs after which a seed hangs
DUMP = signal.SIGUSR2  # makes a rank print the stacks of its threads
KEPT: list[object] = []  # what a rank leaves open to the end of its interpreter


@dataclass
class Child:
    """A rank as its server sees it."""

    pid: int
    process: int  # a descriptor
    pipe: int
    log: BinaryIO
    said: bytearray = field(default_factory=bytearray)
    ready: float | None = None
    report: Report | None = None
    ended: float | None = None
    status: int | None = None

    def ending(self) -> Ending:
        """How it ended, when it has."""
        assert self.ended is not None and self.status is not None, "it lives"
        self.log.seek(0)
        return Ending(self.report, self.status, self.ended, self.log.read().decode(errors="replace"))


def main(descriptor: int, port: int) -> None:
    """Plays the seeds that come, until the other end hangs up. A rank may return to the end of its interpreter."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # torch's new names for old functions
    connection = Connection(descriptor)
    gc.collect()
    gc.freeze()  # what the ranks share with this process they need not copy
    while True:
        try:
            seed = connection.recv()
        except EOFError:
            return
        play = Play(make_script(seed), port)
        result = play.run()
        if result is None:
            return  # as a rank
        connection.send(result)


class Play:
    """One seed."""

    def __init__(self, script: Script, port: int) -> None:
        self.script = script
        self._port = port
        self._name = f"{os.getpid()}-{time.monotonic_ns()}"  # of the place where the ranks meet
        self._board = Board(script.world_size, len(script.calls))
        self._children: list[Child] = []
        self._began = time.monotonic()
        self._continue_at: dict[int, float] = {}  # stopped rank -> when it is to go on
        self._pending = set(script.fault.ranks) if script.fault.call is None else set()
        self._hangs = False
        self._looked = self._began
        self._stood_still = 0.0

    def run(self) -> Result | None:
        """Plays the script with processes; None in a rank that is to end as an interpreter does."""
        for rank in range(self.script.world_size):
            if self._fork(rank):
                return None
            self._look_at_clock()
        limit = self._began + 2 * self.script.timeout + self.script.fault.lasts + PATIENCE
        while any(child.status is None for child in self._children):
            self._await_something(limit)
            self._act()
            if time.monotonic() > limit and not self._hangs:
                self._hangs = True
                self._end_all()
        result = judge(
            self.script, [child.ending() for child in self._children], self._board, self._hangs, self._stood_still
        )
        result.seconds = time.monotonic() - self._began
        self._close()
        return result

    def _fork(self, rank: int) -> bool:
        """Whether this is the rank, and its interpreter is to end."""
        ours, theirs = os.pipe()
        log = os.fdopen(os.memfd_create(f"log of rank {rank}"), "w+b")
        parent = os.getpid()
        pid = os.fork()
        if pid != 0:
            os.close(theirs)
            os.set_blocking(ours, False)
            self._children.append(Child(pid, os.pidfd_open(pid), ours, log))
            return False
        for child in self._children:
            os.close(child.pipe)
            os.close(child.process)
            child.log.close()
        os.close(ours)
        if not end_with(parent, signal.SIGKILL):
            os._exit(1)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        return self._be(rank, theirs, log)

    def _be(self, rank: int, pipe: int, log: BinaryIO) -> bool:
        """What a rank does. Returns only if the interpreter is to end."""
        faulthandler.enable(log)
        faulthandler.register(DUMP, log, all_threads=True)
        store = dist.TCPStore("127.0.0.1", self._port, is_master=False, timeout=timedelta(seconds=PATIENCE))
        run = RankRun(
            self.script, rank, dist.PrefixStore(self._name, store), self._board, lambda b: void(os.write(pipe, b))
        )
        report = run.run()
        with os.fdopen(pipe, "wb") as stream:
            stream.write(b"d" + pickle.dumps(report))
        if run.ends:
            KEPT.append(run)
            return True
        atexit._run_exitfuncs()
        os._exit(0)

    def _await_something(self, limit: float) -> None:
        """Takes in what ranks say, and their ends; returns after a while too."""
        descriptors = {child.pipe: child for child in self._children if child.pipe >= 0}
        descriptors.update({child.process: child for child in self._children if child.ended is None})
        poll = select.poll()
        for fd in descriptors:
            poll.register(fd, select.POLLIN)
        busy = self._pending or self._continue_at
        pause = TICK if busy else max(TICK, min(limit - time.monotonic(), LONGEST_PAUSE))
        ready = poll.poll(1e3 * pause)
        self._look_at_clock(pause)
        for fd, _ in ready:
            child = descriptors[fd]
            if fd == child.pipe:
                self._hear(child)
            else:
                child.ended = time.monotonic()
        for child in self._children:
            if child.ended is not None and child.pipe < 0 and child.status is None:
                child.status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])

    def _look_at_clock(self, pause: float = 0.0) -> None:
        """Notes how much longer than `pause`, which it meant to wait, this process has not run."""
        now = time.monotonic()
        self._stood_still = max(self._stood_still, now - self._looked - pause)
        self._looked = now

    def _hear(self, child: Child) -> None:
        """Takes in what a rank says: single letters, then its report."""
        piece = os.read(child.pipe, 1 << 16)
        child.said += piece
        while child.said and child.said[0] in b"rs":
            if child.said[0] == ord("r"):
                child.ready = time.monotonic()
            else:
                self._continue_at[self._children.index(child)] = time.monotonic() + self.script.fault.lasts
            del child.said[0]
        if not piece:
            os.close(child.pipe)
            child.pipe = -1
            if child.said[:1] == b"d":
                with contextlib.suppress(EOFError, pickle.UnpicklingError):  # it was killed as it wrote
                    child.report = pickle.loads(child.said[1:])

    def _act(self) -> None:
        """What comes from outside at its time: the fault, and its end."""
        fault, now = self.script.fault, time.monotonic()
        for rank in sorted(self._pending):
            child = self._children[rank]
            begin = self._began if fault.creation else child.ready
            if child.ended is not None or fault.kind not in ("kill", "stop", "raise"):
                self._pending.discard(rank)
            elif begin is not None and now >= begin + fault.after:
                self._pending.discard(rank)
                self._strike(fault, rank, child)
        for rank, when in list(self._continue_at.items()):
            child = self._children[rank]
            if now >= when and self._is_stopped(child):
                if child.status is None:  # its process, or what is left of it, is there
                    os.kill(child.pid, signal.SIGCONT)
                del self._continue_at[rank]

    def _strike(self, fault: Fault, rank: int, child: Child) -> None:
        if fault.kind != "raise":  # then the rank knows when
            self._board.strike(rank)
        if fault.kind == "stop":
            self._continue_at[rank] = time.monotonic() + fault.lasts
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "raise": signal.SIGUSR1}[fault.kind]
        os.kill(child.pid, number)

    @staticmethod
    def _is_stopped(child: Child) -> bool:
        """Or has ended."""
        if child.ended is not None:
            return True
        try:
            return os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # since the last look
            return True

    def _end_all(self) -> None:
        """It hangs: where, is in the ranks' logs."""
        alive = [child.pid for child in self._children if child.ended is None]
        for number, pause in ((signal.SIGCONT, 0.0), (DUMP, 1.0), (signal.SIGKILL, 0.0)):
            for pid in alive:
                os.kill(pid, number)
            time.sleep(pause)

    def _close(self) -> None:
        for child in self._children:
            os.close(child.process)
            child.log.close()
        self._board.close()


def void(_: object) -> None:
    """For a lambda that is to return nothing."""


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
