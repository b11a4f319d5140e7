"""The two ways to pycoll, as the campaign uses them: communicators, and process groups of torch.distributed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pycoll.communicator import Communicator
from pycoll.faults.calls import Call
from pycoll.faults.operations import OPERATIONS
from pycoll.faults.script import Script
from pycoll.faults.values import Buffers
from pycoll.tuning import Config


class Front(Protocol):
    """Groups of one rank, by their number in the script."""

    groups: dict[int, Any]

    def begin(self) -> None:
        """Comes first, in the main thread."""

    def create(self, thread: int) -> None:
        """Meets the other ranks in the groups of a thread."""

    def allocate(self, call: Call, count: int, dtype: torch.dtype) -> Tensor:
        """Memory for a tensor of the call."""

    def start(self, call: Call, buffers: Buffers) -> Any:
        """Makes the call; returns what there is to wait for, or None."""

    def abort(self, group: int) -> None:
        """Ends the calls of all ranks."""

    def close(self, group: int) -> None:
        """The rank leaves, and may still try to make calls."""

    def drop(self, group: int) -> None:
        """The rank leaves for good."""

    def end(self) -> None:
        """Comes last, in the main thread: the rank leaves what it is still in."""


class Native:
    """pycoll.Communicator."""

    def __init__(self, script: Script, rank: int, store: dist.Store) -> None:
        self.groups: dict[int, Communicator] = {}
        self._script, self._rank, self._store = script, rank, store
        self._config = Config(**dict(script.config))

    def begin(self) -> None:
        pass

    def create(self, thread: int) -> None:
        for i, group in enumerate(self._script.groups):
            if group.thread == thread and self._rank in group.ranks:
                self.groups[i] = Communicator(
                    self._store,
                    group.ranks.index(self._rank),
                    len(group.ranks),
                    timeout=self._script.timeout,
                    config=self._config,
                    name=f"group {i}",
                )

    def allocate(self, call: Call, count: int, dtype: torch.dtype) -> Tensor:
        return self.groups[call.group].empty(count, dtype) if call.symmetric else torch.empty(count, dtype=dtype)

    def start(self, call: Call, buffers: Buffers) -> Any:
        result = OPERATIONS[call.operation].native(self.groups[call.group], call, buffers)
        return result if buffers.is_async else None

    def abort(self, group: int) -> None:
        self.groups[group].abort("as the script says")

    def close(self, group: int) -> None:
        self.groups[group].close()

    def drop(self, group: int) -> None:
        self.groups.pop(group).close()

    def end(self) -> None:
        for group in list(self.groups):
            self.drop(group)


class Distributed:
    """torch.distributed. Group 0 is the default one, of all ranks."""

    def __init__(self, script: Script, rank: int, store: dist.Store) -> None:
        self.groups: dict[int, dist.ProcessGroup] = {}
        self._script, self._rank, self._store = script, rank, store

    def begin(self) -> None:
        """All groups: creating them is for the main thread, and all ranks take part in each."""
        timeout = timedelta(seconds=self._script.timeout)
        dist.init_process_group(
            "pycoll", store=self._store, rank=self._rank, world_size=self._script.world_size, timeout=timeout
        )
        for i, group in enumerate(self._script.groups):
            made = dist.new_group(list(group.ranks), timeout=timeout) if i else dist.group.WORLD
            if self._rank in group.ranks:
                assert made is not None
                self.groups[i] = made

    def create(self, thread: int) -> None:
        pass

    def allocate(self, call: Call, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype)

    def start(self, call: Call, buffers: Buffers) -> Any:
        result = OPERATIONS[call.operation].c10d(self.groups[call.group], call, buffers)
        return result if buffers.is_async else None

    def abort(self, group: int) -> None:
        self.groups[group].abort()

    def close(self, group: int) -> None:
        self.groups[group].shutdown()

    def drop(self, group: int) -> None:
        gone = self.groups.pop(group)
        if group == 0:
            gone.shutdown()  # the others stay
        else:
            dist.destroy_process_group(gone)

    def end(self) -> None:
        self.groups.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def make_front(script: Script, rank: int, store: dist.Store) -> Front:
    """As the script says; the ranks meet through `store`."""
    return Native(script, rank, store) if script.front == "native" else Distributed(script, rank, store)
