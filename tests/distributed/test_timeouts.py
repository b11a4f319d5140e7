"""How long a call waits: time-outs of a group, of one call, changed later; and which of them ends the group."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import pycoll
from pycoll.testing import Processes, Rank

pytestmark = pytest.mark.timeout(60)


def _late(call: Callable[[], Any]) -> float:
    """Seconds until it raises TimeoutError."""
    begin = time.monotonic()
    with pytest.raises(pycoll.TimeoutError, match="rank 1"):
        call()
    return time.monotonic() - begin


def _of(rank: Rank, how: str) -> None:
    """Rank 1 does not come."""
    rank.init_process_group(timeout=1.0 if how == "the group" else 50.0)
    group = dist.group.WORLD
    assert group is not None
    second, x = timedelta(seconds=1), torch.ones(3)
    if how == "set later":
        group.set_timeout(second)
    elif how == "set later, of the backend":
        group._get_backend(torch.device("cpu")).set_timeout(second)
    if rank.rank == 1:
        rank.listen()
        dist.destroy_process_group()
        return
    options = dist.AllreduceOptions()
    options.timeout = second
    calls: dict[str, Callable[[], Any]] = {
        "one call": lambda: group.allreduce([x], options).wait(),
        "a barrier": lambda: group.barrier(timeout=second).wait(),
        "an asynchronous one": lambda: dist.all_reduce(x, async_op=True).wait(),
    }
    if how == "an asynchronous one":
        group.set_timeout(second)
    seconds = _late(calls.get(how, lambda: dist.all_reduce(x)))
    assert 0.9 < seconds < 20
    rank.say("it was late")
    with pytest.raises(pycoll.TimeoutError):
        dist.all_reduce(x)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "how",
    ("the group", "set later", "set later, of the backend", "one call", "a barrier", "an asynchronous one"),
)
def test_timeout_of(how: str) -> None:
    with Processes(_of, 2, how) as ranks:
        ranks.hear(0)
        ranks.tell(1, "go")
        ranks.results()


def _one_longer_call(rank: Rank) -> None:
    rank.init_process_group(timeout=0.5)
    group = dist.group.WORLD
    assert group is not None
    if rank.rank == 1:
        time.sleep(1.5)
    x = torch.ones(3)
    options = dist.AllreduceOptions()
    options.timeout = timedelta(seconds=30)
    group.allreduce([x], options).wait()
    assert x.tolist() == [2.0] * 3
    dist.destroy_process_group()


def test_one_call_may_wait_longer() -> None:
    with Processes(_one_longer_call, 2) as ranks:
        ranks.results()
