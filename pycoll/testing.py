"""Ranks for tests: as threads of this process, or as processes."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pycoll.communicator import Communicator
from pycoll.errors import Error, TimeoutError
from pycoll.tuning import CUDA, Config, MiB

T = TypeVar("T")
SMALL = Config(heap_bytes=256 * MiB)


def run_threads(
    fn: Callable[[Communicator], T],
    world_size: int,
    *,
    config: Config = SMALL,
    cuda_config: Config = CUDA,
    timeout: float = 60.0,
) -> list[T]:
    """Calls `fn(comm)` as every rank, each in a thread of this process. Returns the results in rank order.

    Raises:
        The first error of any rank: when a rank fails, its communicator closes, and what others raise is a consequence.
    """
    store = dist.HashStore()
    results: list[Any] = [None] * world_size
    failures: list[BaseException] = []

    def rank_main(rank: int) -> None:
        try:
            with Communicator(
                store, rank, world_size, timeout=timeout, config=config, cuda_config=cuda_config, name="threads"
            ) as comm:
                try:
                    results[rank] = fn(comm)
                except BaseException as e:  # before close() lets the other ranks know
                    failures.append(e)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=rank_main, args=(rank,), name=f"rank {rank}") for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


@dataclass(frozen=True)
class Rank:
    """What a rank that is a process is called with.

    Attributes:
        rank: from 0.
        world_size: how many ranks there are.
        folder: a folder for all ranks, empty at first; it goes with the processes.
    """

    rank: int
    world_size: int
    folder: Path
    connection: Connection

    def say(self, value: Any) -> None:
        """Sends `value` to `Processes.hear`."""
        self.connection.send(("said", value))

    def listen(self, timeout: float = 60.0) -> Any:
        """The next value that `Processes.tell` sent to this rank, which it awaits for `timeout` seconds."""
        if not self.connection.poll(timeout):
            raise TimeoutError(f"rank {self.rank} was told nothing in {timeout} s")
        return self.connection.recv()

    def init_process_group(self, name: str = "group", *, timeout: float = 60.0) -> None:
        """torch.distributed's default group of all ranks, over pycoll; they meet in the file `name`."""
        dist.init_process_group(
            "pycoll",
            init_method=f"file://{self.folder / name}",
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=timeout),
        )

    def communicator(
        self, *, timeout: float = 60.0, config: Config = SMALL, cuda_config: Config = CUDA, name: str = "ranks"
    ) -> Communicator:
        """A communicator of all ranks, which meet in `folder`; see `pycoll.Communicator`."""
        store = dist.FileStore(str(self.folder / "store"), self.world_size)
        return Communicator(
            store, self.rank, self.world_size, timeout=timeout, config=config, cuda_config=cuda_config, name=name
        )


class Processes:
    """`fn(rank: Rank, *args)` as every rank, each in a process. A context manager: at its end the processes are killed.

    `fn` must be importable. A preloaded fork server makes starting cheap.
    """

    def __init__(self, fn: Callable[..., Any], world_size: int, *args: Any) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["pycoll.testing", "numpy", "torch._dynamo"])
        self._folder = tempfile.TemporaryDirectory(prefix="pycoll-ranks-", ignore_cleanup_errors=True)
        self._processes: list[mp.process.BaseProcess] = []
        self._connections: list[Connection] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            seat = Rank(rank, world_size, Path(self._folder.name), theirs)
            process = context.Process(target=_process_main, args=(seat, fn, args), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def pid(self, rank: int) -> int:
        """The process of `rank`."""
        pid = self._processes[rank].pid
        assert pid is not None, "it was started"
        return pid

    def kill(self, rank: int, signal_number: int = signal.SIGKILL) -> None:
        """Sends a signal to `rank`."""
        os.kill(self.pid(rank), signal_number)

    def tell(self, rank: int, value: Any) -> None:
        """Sends `value` to `Rank.listen` of `rank`."""
        self._connections[rank].send(value)

    def hear(self, rank: int, timeout: float = 60.0) -> Any:
        """The next value that `rank` said.

        Raises:
            Error: it said nothing for `timeout` seconds, ended, died or failed.
        """
        kind, value = self._receive(rank, timeout)
        if kind != "said":
            raise Error(f"rank {rank} has {kind}: {value}")
        return value

    def result(self, rank: int, timeout: float = 60.0) -> Any:
        """What `fn` returned as `rank`.

        Raises:
            Error: it failed (with its traceback), died, or did not return within `timeout` seconds.
        """
        kind, value = "said", None
        while kind == "said":
            kind, value = self._receive(rank, timeout)
        if kind != "returned":
            raise Error(f"rank {rank} has {kind}: {value}")
        return value

    def results(self, timeout: float = 60.0) -> list[Any]:
        """`result` of every rank. If some fail, all that they say within 2 s is in the error, cause and consequence."""
        values: list[Any] = [None] * len(self._processes)
        failures: list[str] = []
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        while waiting:
            ready = wait(list(waiting), 2.0 if failures else timeout)
            if not ready:
                failures.append(f"ranks {sorted(waiting.values())} did not return")
                break
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                kind, value = self._receive(rank, timeout)
                if kind == "said":
                    continue
                del waiting[connection]  # type: ignore[arg-type]
                if kind == "returned":
                    values[rank] = value
                else:
                    failures.append(f"rank {rank} has {kind}: {value}")
        if failures:
            raise Error("\n".join(failures))
        return values

    def exit_code(self, rank: int, timeout: float = 60.0) -> int | None:
        """Awaits the end of `rank`'s process: -n if signal n killed it, None if it lives on after `timeout` seconds."""
        self._processes[rank].join(timeout)
        return self._processes[rank].exitcode

    def _receive(self, rank: int, timeout: float) -> tuple[str, Any]:
        connection = self._connections[rank]
        if not connection.poll(timeout):
            raise Error(f"rank {rank} is silent for {timeout} s")
        try:
            kind, value = connection.recv()
        except (EOFError, ConnectionResetError):
            return "died", "it said nothing"
        return kind, value

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()
        self._folder.cleanup()


def run_processes(fn: Callable[..., T], world_size: int, *args: Any, timeout: float = 60.0) -> list[T]:
    """Calls `fn(comm, *args)` as every rank, each in a process. Returns the results in rank order.

    Raises:
        Error: ranks failed (with their tracebacks), or are silent for `timeout` seconds.
    """
    with Processes(_with_communicator, world_size, fn, args, timeout) as ranks:
        return ranks.results(timeout)


def _with_communicator(rank: Rank, fn: Callable[..., T], args: tuple[Any, ...], timeout: float) -> T:
    with rank.communicator(timeout=timeout) as comm:
        return fn(comm, *args)


def _process_main(rank: Rank, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # the ranks share the cores
    try:
        rank.connection.send(("returned", fn(rank, *args)))
    except BaseException:
        rank.connection.send(("failed", traceback.format_exc()))
