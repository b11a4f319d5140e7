"""Measures all contenders of all groups of ranks at one size, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import timing, values
from .groups import GroupFailed, RankGroup
from .ranks import Key
from .report import Report, Row


@dataclass
class _Entrant:
    """A contender that is ready at the current size."""

    group: RankGroup
    key: Key
    error: float | None
    calls: int = 1  # in a sample
    samples: list[float] = field(default_factory=list)


class Contest:
    """The groups of ranks that compete, and the report of what they do.

    A group that fails is reported, and left out from there on.
    """

    def __init__(self, groups: list[RankGroup], report: Report) -> None:
        self.report = report
        self._groups: dict[RankGroup, list[Key]] = {}
        for group in groups:
            replies = self._ask(group, "contenders")
            if replies:
                self._groups[group] = replies[0]

    def measure(
        self,
        size: int,
        effort: timing.Effort,
        tick: Callable[[float], object],
        wanted: Callable[[Key], bool] = lambda key: True,
    ) -> None:
        """Adds the rows of tensors of `size` bytes; after each round, gives `tick` the part of the work done so far.

        `wanted`: which contenders take part.
        """
        entrants = self._prepare(size, wanted)
        start = time.monotonic()
        rounds = 0
        while not effort.enough(rounds, time.monotonic() - start):
            for place in range(len(entrants)):
                entrant = entrants[(rounds + place) % len(entrants)]
                entrant.samples += self._time(entrant, entrant.calls)
            rounds += 1
            tick(effort.part(rounds, time.monotonic() - start))
        for entrant in entrants:
            self._ask(entrant.group, "release", entrant.key)
            if entrant.samples:
                summary = timing.summarize(entrant.samples, entrant.calls)
                self.report.rows.append(Row(size, *entrant.key, summary, entrant.error))

    def facts(self) -> None:
        """Adds versions and settings of all groups to the report."""
        for group in list(self._groups):
            replies = self._ask(group, "facts")
            if replies:
                self.report.facts[group.name] = replies[0]

    def _prepare(self, size: int, wanted: Callable[[Key], bool]) -> list[_Entrant]:
        """All contenders with tensors of `size` bytes, checked and warmed up."""
        entrants = []
        count = size // values.ITEMSIZE[self.report.dtype]
        for group, keys in list(self._groups.items()):
            for key in filter(wanted, keys):
                prepared = self._ask(group, "prepare", key, count, self.report.dtype)
                if self._refused(group, key, size, prepared):
                    continue
                errors = self._ask(group, "check", key)
                if self._refused(group, key, size, errors):
                    continue
                if not errors:
                    break
                entrant = _Entrant(group, key, self._checked(key, size, errors))
                for calls in (1, 20):  # from a rough number of calls to a better one
                    seconds = self._time(entrant, calls)
                    if not seconds:
                        break
                    entrant.calls = timing.calls_per_sample(seconds[0])
                    if entrant.calls < 20:
                        break
                entrants.append(entrant)
        return entrants

    def _refused(self, group: RankGroup, key: Key, size: int, replies: list[Any]) -> bool:
        """Whether a rank takes no part, which is noted; the contender is released."""
        reason = next((words for words in replies if isinstance(words, str)), None)
        if reason is None:
            return False
        self._ask(group, "release", key)
        self.report.left_out.append(f"{' '.join(key)} at {timing.format_bytes(size)}: {reason}")
        return True

    def _checked(self, key: Key, size: int, errors: list[float | None]) -> float | None:
        """The largest of all ranks' errors; notes a wrong result."""
        error = max((e for e in errors if e is not None), default=None)
        if error is not None and error > values.tolerance(self.report.world_size, self.report.dtype):
            failure = f"{' '.join(key)} at {timing.format_bytes(size)}: wrong result, error {error:.1e}"
            self.report.failures.append(failure)
        return error

    def _time(self, entrant: _Entrant, calls: int) -> list[float]:
        """One sample: the slowest rank's seconds a call; none if the group has failed."""
        seconds = self._ask(entrant.group, "time", entrant.key, calls)
        return [max(seconds) / calls] if seconds else []

    def _ask(self, group: RankGroup, *order: object) -> list[Any]:
        """The replies of all ranks; none if the group has failed, now or earlier."""
        if group.failed:
            return []
        try:
            return group.ask(*order)
        except GroupFailed as e:
            self.report.failures.append(str(e))
            self._groups.pop(group, None)
            group.close()
            return []
