"""What ranks tell of a seed, and what they leave on a board for the case that they cannot tell it any more."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

CREATION = -1
"""As the number of a call: the creation of the group."""


@dataclass(frozen=True)
class Outcome:
    """How a call ended on one rank.

    Attributes:
        thread, call, group: which call it was.
        error: the class of the error, "" for success; `text` and `culprit` (in the group) are the error's.
        waited: it was raised, or returned, by wait().
        began, ended: of the call, or of the wait; on the clock that all processes share.
        starved: the longest that any thread of the process waited for a core meanwhile, in seconds.
    """

    thread: int
    call: int
    group: int
    error: str
    text: str
    culprit: int | None
    waited: bool
    began: float
    ended: float
    starved: float


@dataclass
class Report:
    """One rank's.

    Attributes:
        outcomes: of the calls that ended, in each thread in the order in which they did.
        problems: what is wrong whatever the fault: a wrong number, something left behind, an error of no pycoll class.
        closed: group -> when this rank had left it.
        starved: the longest that a thread of it waited for a core, all in all, in seconds.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    closed: dict[int, float] = field(default_factory=dict)
    starved: float = 0.0


@dataclass
class Ending:
    """How the process of a rank ended, as the server saw it.

    Attributes:
        report: None: it could not tell any more.
        status: of the process; -n if signal n killed it.
        at: when.
        log: what it printed.
    """

    report: Report | None
    status: int
    at: float
    log: str


class Attempt:
    """A call, or a wait for one, from now on."""

    def __init__(self, thread: int, call: int, group: int, *, waited: bool = False) -> None:
        self._what = (thread, call, group)
        self._waited = waited
        self._core_waits = core_waits()
        self._began = time.monotonic()

    def end(self, error: BaseException | None = None) -> Outcome:
        """It ends now, with this error."""
        ended = time.monotonic()
        thread, call, group = self._what
        return Outcome(
            thread=thread,
            call=call,
            group=group,
            error=type(error).__name__ if error is not None else "",
            text=str(error)[:500] if error is not None else "",
            culprit=getattr(error, "rank", None),
            waited=self._waited,
            began=self._began,
            ended=ended,
            starved=starved_since(self._core_waits) if error is not None else 0.0,
        )


class Board:
    """Memory that all ranks and the server share; each rank writes its own."""

    def __init__(self, world_size: int, threads: int) -> None:
        self._threads = threads
        self._ranks = world_size
        self._memory = mmap.mmap(-1, 8 * world_size * (threads + 1))
        self._begun = memoryview(self._memory)[: 8 * world_size * threads].cast("q")
        self._struck = memoryview(self._memory)[8 * world_size * threads :].cast("d")

    def begin(self, rank: int, thread: int, call: int) -> None:
        """`rank` is about to make call no. `call` of a thread."""
        self._begun[rank * self._threads + thread] = call + 1

    def begun(self, rank: int, thread: int) -> int:
        """How many calls of its script the rank has begun or passed over in this thread."""
        return self._begun[rank * self._threads + thread]

    def strike(self, rank: int) -> None:
        """The fault befalls `rank` now."""
        self._struck[rank] = time.monotonic()

    def struck(self, rank: int) -> float | None:
        """When the fault befell `rank`; None: it did not."""
        return self._struck[rank] or None

    def close(self) -> None:
        """Gives the memory back."""
        self._begun.release()
        self._struck.release()
        self._memory.close()


def core_waits() -> dict[str, float]:
    """How long each thread of this process has waited for a core so far, in seconds; empty where Linux does not say."""
    waits = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            waits[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
        except (OSError, IndexError):  # it has ended; or a Linux without this
            continue
    return waits


def starved_since(before: dict[str, float]) -> float:
    """The longest that any thread has waited for a core since `before`."""
    return max((wait - before.get(task, 0.0) for task, wait in core_waits().items()), default=0.0)


def held_segments() -> list[str]:
    """Shared memory of pycoll that this process maps or has open."""
    held = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:pycoll" in line]
    return held + [target for target in open_files() if "memfd:pycoll" in target]


def open_files() -> Iterable[str]:
    """What the descriptors of this process lead to."""
    targets = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            targets.append(str(descriptor.readlink()))
        except FileNotFoundError:  # the one with which the folder is read
            continue
    return targets
