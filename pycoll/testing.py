"""Ranks for tests: as threads of this process, or as processes."""

from __future__ import annotations

import multiprocessing as mp
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from pycoll.communicator import Communicator
from pycoll.errors import Error
from pycoll.tuning import Config, MiB

T = TypeVar("T")
SMALL = Config(heap_bytes=256 * MiB)


def run_threads(fn: Callable[[Communicator], T], world_size: int, *, config: Config = SMALL, timeout: float = 60.0) -> list[T]:
    """Calls `fn(comm)` as every rank, each in a thread of this process. Returns the results in rank order.

    Raises:
        The error of the lowest rank that failed.
    """
    store = dist.HashStore()
    results: list[Any] = [None] * world_size
    errors: list[BaseException | None] = [None] * world_size

    def rank_main(rank: int) -> None:
        try:
            with Communicator(store, rank, world_size, timeout=timeout, config=config, name="threads") as comm:
                results[rank] = fn(comm)
        except BaseException as e:  # noqa: BLE001 - carried to the caller
            errors[rank] = e

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if error is not None:
            raise error
    return results


def start_processes(fn: Callable[..., Any], world_size: int, *args: Any) -> list[tuple[mp.process.BaseProcess, Connection]]:
    """Starts `fn(store_path, rank, world_size, *args)` in `world_size` processes; what it returns, or its error, comes through the connection.

    `fn` must be importable. A preloaded fork server makes starting cheap.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["pycoll.testing", "numpy"])
    path = str(Path(tempfile.mkdtemp(prefix="pycoll-test-")) / "store")
    started = []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_process_main, args=(theirs, fn, path, rank, world_size, args), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    return started


def run_processes(fn: Callable[..., T], world_size: int, *args: Any, timeout: float = 90.0) -> list[T]:
    """Calls `fn(comm, *args)` as every rank, each in a process. Returns the results in rank order.

    Raises:
        Error: a rank failed; with its traceback.
        TimeoutError: the ranks did not end within `timeout` seconds; they are killed.
    """
    started = start_processes(_with_communicator, world_size, fn, *args)
    results: list[Any] = [None] * world_size
    try:
        waiting = {connection: rank for rank, (_, connection) in enumerate(started)}
        while waiting:
            ready = wait(list(waiting), timeout)
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not end within {timeout} s")
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[index]
                results[rank] = _receive(connection, rank)  # type: ignore[arg-type]
    finally:
        for process, connection in started:
            if process.exitcode is None:
                process.join(0.5)
                process.kill()
            process.join()
            connection.close()
    return results


def _receive(connection: Connection, rank: int) -> Any:
    try:
        value, error = connection.recv()
    except EOFError:
        raise Error(f"rank {rank} died without a word") from None
    if error is not None:
        raise Error(f"rank {rank} failed:\n{error}")
    return value


def _with_communicator(path: str, rank: int, world_size: int, fn: Callable[..., T], *args: Any) -> T:
    store = dist.FileStore(path, world_size)
    with Communicator(store, rank, world_size, timeout=60.0, config=SMALL, name="processes") as comm:
        return fn(comm, *args)


def _process_main(connection: Connection, fn: Callable[..., Any], path: str, rank: int, world_size: int, args: Any) -> None:
    try:
        connection.send((fn(path, rank, world_size, *args), None))
    except BaseException:  # noqa: BLE001 - carried to the caller
        connection.send((None, traceback.format_exc()))
