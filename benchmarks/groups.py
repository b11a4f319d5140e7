"""The driver's side of a benchmark: starts the ranks of one library as processes, gives them orders, and ends them.

Each library has ranks of its own, so that none runs another's threads, and one that fails takes no other with it.
Ranks that are not being timed sleep in a read of their socket.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from . import ranks

PATIENCE = 300.0  # seconds for one order, or for all ranks to start


class GroupFailed(RuntimeError):
    """The ranks of a library did not start, broke or fell silent; the message says what they said."""


@dataclass(frozen=True)
class Launch:
    """How to start the ranks of one library.

    Attributes:
        name: of the library, in messages.
        command: the command line of one rank, or with `launcher`, of the launcher that starts them all.
        launcher: whether `command` starts all ranks itself, as mpirun does.
        environment: variables beside the driver's own.
        inherited: file descriptors that ranks share with the driver.
    """

    name: str
    command: Sequence[str]
    launcher: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    inherited: Sequence[int] = ()


class RankGroup:
    """The running ranks of one library. `failed` is set by the first GroupFailed."""

    def __init__(self, launch: Launch, world_size: int, patience: float = PATIENCE) -> None:
        """Starts `world_size` ranks and waits until all have called, at most `patience` seconds, as for each order.

        Raises:
            GroupFailed: they did not.
        """
        self.name = launch.name
        self.failed = False
        self._patience = patience
        self._folder = tempfile.TemporaryDirectory(prefix="pycoll-bench-")
        self._log = (Path(self._folder.name) / "log").open("w+b")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                address = str(Path(self._folder.name) / "socket")
                listener.bind(address)
                listener.listen(world_size)
                self._start(launch, world_size, address)
                self._connections = self._accept(listener, world_size)
        except BaseException:
            self.close()
            raise

    def _start(self, launch: Launch, world_size: int, address: str) -> None:
        for rank in range(1 if launch.launcher else world_size):
            environment = {
                **os.environ,
                **launch.environment,
                ranks.ADDRESS_VARIABLE: address,
                ranks.WORLD_VARIABLE: str(world_size),
                ranks.RANK_VARIABLE: str(rank),
            }
            self._processes.append(
                subprocess.Popen(
                    launch.command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                    pass_fds=launch.inherited,
                    start_new_session=True,  # one process group each, for what a launcher starts too
                )
            )

    def _accept(self, listener: socket.socket, world_size: int) -> list[Connection]:
        """The connections of all ranks, in rank order."""
        found: dict[int, Connection] = {}
        deadline = time.monotonic() + self._patience
        listener.settimeout(0.2)
        while len(found) < world_size:
            try:
                accepted, _ = listener.accept()
            except TimeoutError:
                ended = [p.returncode for p in self._processes if p.poll() is not None]
                if ended or time.monotonic() > deadline:
                    raise self._failure(f"{len(found)} of {world_size} ranks started, exit codes {ended}") from None
                continue
            connection = Connection(accepted.detach())
            found[connection.recv()] = connection
        return [found[rank] for rank in range(world_size)]

    def ask(self, *order: object) -> list[Any]:
        """Gives one order to all ranks; returns their replies in rank order.

        Raises:
            GroupFailed: a rank reported an error, ended, or did not reply in time.
        """
        try:
            for connection in self._connections:
                connection.send(order)
        except OSError as e:
            raise self._failure(f"a rank is gone ({e})") from e
        replies: dict[int, Any] = {}
        deadline = time.monotonic() + self._patience
        while len(replies) < len(self._connections):
            open_ones = [c for rank, c in enumerate(self._connections) if rank not in replies]
            ready = wait(open_ones, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._failure(f"ranks did not reply to {order} within {self._patience:.0f} s")
            for rank in [rank for rank, connection in enumerate(self._connections) if connection in ready]:
                replies[rank] = self._reply(rank)
        return [replies[rank] for rank in range(len(self._connections))]

    def _reply(self, rank: int) -> Any:
        try:
            kind, value = self._connections[rank].recv()
        except (EOFError, OSError) as e:
            raise self._failure(f"rank {rank} ended") from e
        if kind == "error":
            raise self._failure(f"rank {rank}: {value}")
        return value

    def _failure(self, reason: str) -> GroupFailed:
        self.failed = True
        time.sleep(0.2)  # what the ranks still have to say
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip()
        return GroupFailed(f"{self.name}: {reason}" + (f"\n{said[-2000:]}" if said else ""))

    def close(self) -> None:
        """Ends all ranks: asks them, then kills what is left."""
        for connection in self._connections:
            with suppress(OSError):  # gone already
                connection.send(("exit",))
        for process in self._processes:
            try:
                process.wait(5.0 if self._connections else 0.0)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGTERM)  # launchers pass it on
                try:
                    process.wait(2.0)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        for connection in self._connections:
            connection.close()
        self._connections, self._processes = [], []
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def started(launches: Iterable[Launch], world_size: int, stack: ExitStack, failures: list[str]) -> list[RankGroup]:
    """The groups of ranks that start, one after another, until `stack` ends; the others' reasons go to `failures`."""
    groups = []
    for launch in launches:
        try:
            groups.append(stack.enter_context(RankGroup(launch, world_size)))
        except GroupFailed as e:
            failures.append(str(e))
    return groups
