"""One case over two backends, in the same processes: over Gloo, then over pycoll, and the results beside each other.

A case is a function of a `Rank` in whose process the default group is there. It returns what it computed: tensors,
numbers, texts, and lists and dictionaries of them. Two ranks leave no choice of the order in which to add, so there the
results are equal bit by bit; so are they of one. With more, `rtol` and `atol` say how near they are, for fp64, in which
the cases compute.
"""

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import reference
import torch
import torch.distributed as dist
from leaks import held_segments
from torch import Tensor

from pycoll.errors import Error
from pycoll.testing import Processes, Rank

Case = Callable[..., Any]
WORLD_SIZES = (1, 2, 4)
SECONDS = 90.0  # a case may take
# A group whose last owner is a callback in one of its threads ends the process: that thread cannot await itself. So it
# is owned here as well, until the next case.
_last_over_gloo: list[dist.ProcessGroup | None] = []


@dataclass(frozen=True)
class Tolerance:
    """How far a result over pycoll may be from that over Gloo, at more than two ranks or with `always`."""

    rtol: float = 1e-11
    atol: float = 1e-13
    always: bool = False


class Ranks:
    """The ranks of one world size, kept from case to case: importing torch's frameworks takes longer than the cases."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: Processes | None = None

    def compare(self, case: Case, *args: Any, tolerance: Tolerance = Tolerance()) -> None:
        """Runs `case(rank, *args)` over both backends. Fails with what the ranks say."""
        self._call(_compare, case, args, tolerance)

    def run(self, case: Case, *args: Any) -> list[Any]:
        """Runs `case(rank, *args)` over pycoll alone, which checks by itself. Returns the results."""
        return self._call(_over_pycoll, case, args)

    def _call(self, *order: Any) -> list[Any]:
        if self._processes is None:
            self._processes = Processes(_serve, self.world_size)
        for rank in range(self.world_size):
            self._processes.tell(rank, order)
        results: list[Any] = [None] * self.world_size
        failures: list[str] = []
        waiting, deadline = list(range(self.world_size)), time.monotonic() + SECONDS
        while waiting:
            rank = waiting.pop(0)
            try:
                ended, results[rank] = self._processes.hear(rank, 0.05)
            except Error as e:
                if "is silent" in str(e) and time.monotonic() < deadline:
                    waiting.append(rank)
                    continue
                ended, results[rank] = False, e
            if not ended:
                failures.append(f"rank {rank}: {results[rank]}")
                deadline = min(deadline, time.monotonic() + 2.0)  # of the others: they may have more to say, or hang
        if failures:  # their groups are in no known state
            self.close()
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        if self._processes is not None:
            self._processes.__exit__(None, None, None)
            self._processes = None


def _serve(rank: Rank) -> None:
    count = 0
    while True:
        do, *args = rank.listen(600.0)
        count += 1
        try:
            rank.say((True, do(rank, f"group {count}", *args)))
        except BaseException:
            rank.say((False, traceback.format_exc()))


def _over_pycoll(rank: Rank, name: str, case: Case, args: Sequence[Any]) -> Any:
    result = _in_group(rank, "pycoll", name, case, args)
    assert held_segments() == []
    return result


def _compare(rank: Rank, name: str, case: Case, args: Sequence[Any], tolerance: Tolerance) -> None:
    gloo = flat(_in_group(rank, "gloo", f"{name} gloo", case, args))
    pycoll = flat(_over_pycoll(rank, f"{name} pycoll", case, args))
    assert list(gloo) == list(pycoll) and gloo, f"{list(gloo)} over Gloo, {list(pycoll)} over pycoll"
    exact = rank.world_size <= 2 and not tolerance.always
    for what, expected in gloo.items():
        if isinstance(expected, Tensor):
            compare_tensors(pycoll[what], expected, what, None if exact else tolerance)
        else:
            assert pycoll[what] == expected, f"{what}: {expected} over Gloo, {pycoll[what]} over pycoll"


def compare_tensors(actual: Tensor, expected: Tensor, what: str, tolerance: Tolerance | None) -> None:
    """Bit by bit without a tolerance."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    if tolerance is None or not expected.dtype.is_floating_point:
        assert reference.bits(actual) == reference.bits(expected), f"{what}: {actual} is not bitwise {expected}"
        return
    torch.testing.assert_close(
        actual, expected, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def _in_group(rank: Rank, backend: str, name: str, case: Case, args: Sequence[Any]) -> Any:
    dist.init_process_group(
        backend,
        init_method=f"file://{rank.folder / name.replace(' ', '-')}",
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timedelta(seconds=60),
    )
    torch.manual_seed(0)
    result = case(rank, *args)
    if backend == "gloo":
        _last_over_gloo[:] = [dist.group.WORLD]
    dist.destroy_process_group()
    gc.collect()
    return result


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """What a case returned, by name: tensors (copies), numbers and texts."""
    return dict(_flat(value, name))


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield name, value.detach().clone()
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _flat(part, f"{name}[{i}]")
    else:
        yield name, value
