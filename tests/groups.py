"""Runs a function as every rank of a torch.distributed group over pycoll."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from leaks import held_segments

from pycoll.testing import Processes, Rank


def _in_group(rank: Rank, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    rank.init_process_group()
    assert dist.get_backend() == "pycoll"
    result = fn(rank, *args)
    dist.destroy_process_group()
    assert held_segments() == []
    return result


def run(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Calls `fn(rank, *args)` as every rank of a group, each in a process. Returns the results; nothing may be left."""
    with Processes(_in_group, world_size, fn, args) as ranks:
        return ranks.results(timeout)
