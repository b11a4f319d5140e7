"""What a merged trace says: who holds the others up, and who called something else."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pycoll.trace.dump import Entry, RankTrace, Trace

COLLECTIVES = ("calls", "launches")
"""The kinds that all ranks make alike, in the same order."""


@dataclass(frozen=True)
class Straggler:
    """Who is behind. `waits` in ns: how long the first of `waiting` had waited for it when the trace was taken.

    Where all ranks have entered the last call, the one that came last, and `waits` is how much later it came.
    """

    kind: str
    ranks: Sequence[int]
    sequence: int  # of the call that they have not entered, or entered last
    call: str
    waiting: Sequence[int]
    waits: int
    entered: bool  # by the ranks, late


@dataclass(frozen=True)
class Mismatch:
    """The first calls that differ: what, by whom."""

    kind: str
    sequence: int
    calls: dict[str, list[int]]


@dataclass(frozen=True)
class Lateness:
    """How late a rank came to the calls that all ranks have made, after the first; in ns."""

    rank: int
    calls: int
    last: int  # of these it came last to so many
    median: float


def stragglers(trace: Trace) -> list[Straggler]:
    """Who is behind, one for each kind that there is something to say of."""
    found = (_behind(trace, kind) or _last_to_enter(trace, kind) for kind in COLLECTIVES)
    return [s for s in found if s is not None]


def mismatches(trace: Trace) -> list[Mismatch]:
    """The first calls that differ, one for each kind that has some."""
    found = []
    for kind in COLLECTIVES:
        by_rank = [r.by_sequence(kind) for r in trace.ranks]
        for sequence in sorted(set().union(*by_rank)):
            entries = [entries[sequence] for entries in by_rank if sequence in entries]
            if len({e.signature() for e in entries}) > 1:
                found.append(Mismatch(kind, sequence, _callers(entries)))
                break
    return found


def lateness(trace: Trace) -> list[Lateness]:
    """Of each rank, over the calls of which all ranks' beginnings are known."""
    by_rank = [r.by_sequence("calls") for r in trace.ranks]
    common = set(by_rank[0]).intersection(*by_rank[1:])
    begins = [[entries[sequence].begin for entries in by_rank] for sequence in sorted(common)]
    if not begins or len(by_rank) < 2:
        return []
    return [
        Lateness(
            r.rank,
            len(begins),
            sum(b[r.rank] == max(b) for b in begins),
            statistics.median(b[r.rank] - min(b) for b in begins),
        )
        for r in trace.ranks
    ]


def open_messages(trace: Trace) -> list[Entry]:
    """Sends and receives that have not ended."""
    return [e for r in trace.ranks for e in r.entries["messages"].values() if e.end is None]


def last_entered(rank: RankTrace, kind: str, until: int) -> int:
    """The sequence of the last call that the rank had entered at a time, -1 if none."""
    return max((e.sequence for e in rank.entries[kind].values() if e.begin <= until), default=-1)


def _behind(trace: Trace, kind: str) -> Straggler | None:
    """Ranks that had not entered a call that others were in when the first rank failed."""
    last = [last_entered(r, kind, trace.taken) for r in trace.ranks]
    lowest = min(last)
    if lowest == max(last):
        return None
    sequence = lowest + 1
    entries = [r.by_sequence(kind).get(sequence) for r in trace.ranks]
    here = [e for e in entries if e is not None and e.begin <= trace.taken]
    if not here:  # so long ago that nobody knows
        return None
    first = min(e.begin for e in here)
    behind = [rank for rank, at in enumerate(last) if at == lowest]
    return Straggler(
        kind, behind, sequence, here[0].describe(), [e.rank for e in here], trace.taken - first, entered=False
    )


def _last_to_enter(trace: Trace, kind: str) -> Straggler | None:
    """Who came last to the last call, which all have entered."""
    sequence = last_entered(trace.ranks[0], kind, trace.taken)
    entries = [r.by_sequence(kind)[sequence] for r in trace.ranks if sequence in r.by_sequence(kind)]
    if len(entries) < 2:
        return None
    latest = max(entries, key=lambda e: e.begin)
    waiting = [e.rank for e in entries if e is not latest]
    late = latest.begin - min(e.begin for e in entries)
    return Straggler(kind, [latest.rank], sequence, latest.describe(), waiting, late, entered=True)


def _callers(entries: Sequence[Entry]) -> dict[str, list[int]]:
    """Description -> ranks. Calls that differ in nothing else are told apart by their shapes."""
    shapes: dict[object, int] = {}
    only_shapes = len({e.describe() for e in entries}) == 1
    callers: dict[str, list[int]] = {}
    for e in entries:
        text = e.describe()
        if only_shapes:
            number = shapes.setdefault(e.details.get("shape"), len(shapes) + 1)
            text += f", shape or element type no. {number}"
        callers.setdefault(text, []).append(e.rank)
    return callers
