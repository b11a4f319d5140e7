"""The rank's side of a benchmark: takes orders from the driver over a socket, one at a time, and sleeps between them.

Orders and replies are tuples of plain values, because driver and rank may run different Pythons. The standard library
and NumPy alone. The orders that a driver gives:

contenders -> their keys
facts -> versions and settings, for the record
prepare (key, elements, dtype) -> None
check (key) -> the error of one call on known values; None where there is no result
prepare and check may also reply in words, why this contender takes no part at this size
time (key, calls) -> seconds for so many calls, after a few that warm up
release (key)
"""

from __future__ import annotations

import gc
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat
from multiprocessing.connection import Connection
from typing import Any

from . import values

ADDRESS_VARIABLE = "PYCOLL_BENCH_ADDRESS"
RANK_VARIABLE = "PYCOLL_BENCH_RANK"
WORLD_VARIABLE = "PYCOLL_BENCH_WORLD_SIZE"


@dataclass(frozen=True)
class Operation:
    """One contender at one size: what a call is, and the buffer on which it works in place."""

    call: Callable[[], object]
    buffer: values.Buffer
    exact: bool = True  # the call leaves the ranks' sum in the buffer (a ceiling, which does not synchronize, does not)


Key = tuple[
    str, str, str, str
]  # of a contender: who, algorithm, memory ("private", "symmetric"), call ("native", "torch.distributed", ...)
Factory = Callable[[int, str], Operation]  # (elements, dtype) -> Operation


@dataclass
class Rank:
    """A rank that serves its driver.

    Attributes:
        rank, world_size: of this process.
        contenders: how to make each.
        sync: returns on all ranks at about the same time.
        facts: versions and settings, for the record.
    """

    rank: int
    world_size: int
    contenders: Mapping[Key, Factory]
    sync: Callable[[], object]
    facts: Callable[[], dict[str, Any]]

    def serve(self) -> None:
        """Executes orders until the driver says so, or is gone."""
        orders: dict[str, Callable[..., object]] = {
            "contenders": lambda: list(self.contenders),
            "facts": self.facts,
            "prepare": self._prepare,
            "check": self._check,
            "time": self._time,
            "release": self._release,
        }
        self._prepared: dict[Key, tuple[Operation, str]] = {}
        serve(self.rank, orders)

    def _prepare(self, key: Key, count: int, dtype: str) -> None:
        self._prepared[key] = self.contenders[key](count, dtype), dtype

    def _check(self, key: Key) -> float | None:
        """See values.sum_error."""
        operation, dtype = self._prepared[key]
        values.load_pattern(operation.buffer, self.rank, dtype)
        self.sync()
        operation.call()
        return values.sum_error(operation.buffer, self.world_size, dtype) if operation.exact else None

    def _time(self, key: Key, calls: int) -> float:
        """Seconds for `calls` calls, after a few that warm the caches up again."""
        operation, dtype = self._prepared[key]
        call = operation.call
        values.fill_ones(operation.buffer, dtype)
        for _ in repeat(None, 1 + calls // 10):
            call()
        self.sync()
        gc.disable()
        start = time.perf_counter()
        for _ in repeat(None, calls):
            call()
        seconds = time.perf_counter() - start
        gc.enable()
        return seconds

    def _release(self, key: Key) -> None:
        del self._prepared[key]


def serve(rank: int, orders: Mapping[str, Callable[..., object]]) -> None:
    """Executes `orders`, by name, until the driver says so, or is gone."""
    with _connect() as connection:
        connection.send(rank)
        while True:
            try:
                name, *arguments = connection.recv()
            except EOFError:
                return
            if name == "exit":
                return
            try:
                connection.send(("ok", orders[name](*arguments)))
            except Exception:  # whatever it was, the driver reports it
                connection.send(("error", traceback.format_exc()))


def _connect() -> Connection:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(os.environ[ADDRESS_VARIABLE])
    return Connection(client.detach())
