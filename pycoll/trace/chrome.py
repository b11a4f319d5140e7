"""A trace as Chrome's tracing and Perfetto read it: a process a rank, a complete event a collective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pycoll.trace.dump import KINDS, Entry, Trace

MOST_RANKS = 1000  # that process numbers tell apart


def events(traces: Sequence[Trace]) -> dict[str, Any]:
    """The "Trace Event Format" as an object. Times in us since the first event.

    Collectives and launches are complete events. Messages overlap: they are asynchronous ones, of a beginning and an
    end. What had not ended lasts until the trace was taken.
    """
    begins = [e.begin for t in traces for r in t.ranks for kind in KINDS for e in r.entries[kind].values()]
    start = min(begins, default=0)
    found: list[dict[str, Any]] = []
    for i, trace in enumerate(traces):
        for rank in trace.ranks:
            process = i * MOST_RANKS + rank.rank
            name = f"{trace.group}: rank {rank.number} (process {rank.pid}, {rank.state})"
            found += _names(process, name)
            for thread, kind in enumerate(KINDS):
                for n, entry in sorted(rank.entries[kind].items()):
                    where = {"pid": process, "tid": thread}
                    found += _of_entry(entry, where, f"{process}.{n}", kind, start, trace.taken)
    return {"traceEvents": found, "displayTimeUnit": "ns"}


def _names(process: int, name: str) -> list[dict[str, Any]]:
    """What processes and threads are called, and their order."""
    found = [
        {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}},
        {"ph": "M", "pid": process, "name": "process_sort_index", "args": {"sort_index": process}},
    ]
    for thread, kind in enumerate(KINDS):
        found.append({"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": {"name": kind}})
    return found


def _of_entry(
    entry: Entry, where: dict[str, Any], identity: str, kind: str, start: int, taken: int
) -> list[dict[str, Any]]:
    end = max(taken if entry.end is None else entry.end, entry.begin)
    args = {"sequence": entry.sequence, "state": entry.state, "bytes": entry.bytes, **entry.details}
    event = {"name": entry.call, "cat": kind, "ts": (entry.begin - start) / 1e3, "args": args, **where}
    if kind != "messages":
        return [{**event, "ph": "X", "dur": (end - entry.begin) / 1e3}]
    last = {"name": entry.call, "cat": kind, "ts": (end - start) / 1e3, **where}
    return [{**event, "ph": "b", "id": identity}, {**last, "ph": "e", "id": identity}]
