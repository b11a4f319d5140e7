"""Files that ranks left when they failed, read and merged: one `Trace` for each communicator.

A file holds JSON (csrc/cpu/trace.cpp writes it):

pycoll_trace: the format, 1
communicator, group: a number that tells communicators apart, and a name
rank, world_size, host, pid: of who wrote it
taken_ns, unix_ns: when, by the machine's monotonic clock, as all times below, and by the calendar's
error: {kind, text, rank to blame or -1}, or null
ranks: of each rank, as the writer saw it
    rank, pid, waits_for (a rank or null), error; global_rank (its number among all of the program) where it is known
    state: "here", "failed", "left" (it has closed) or "dead"
    totals: call -> {calls, bytes, ns}, of all since the beginning; bytes of this rank's tensors, time with waiting
    calls, messages, launches (of collectives, on its GPU), oldest first, of each
        n (from 1), sequence, call, bytes, begin_ns, end_ns (or null)
        state: "begun", "ended", "failed", "launched", or "captured" (in a CUDA graph)
        dtype, count, shape (a fingerprint), op, root, algorithm, channels, queued, gpu; peer, tag; where there are any
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycoll.errors import UsageError

FORMAT = 1
KINDS = ("calls", "messages", "launches")


@dataclass(frozen=True)
class Entry:
    """A call, message or launch of one rank; times in ns by the machine's monotonic clock."""

    rank: int
    sequence: int
    call: str
    state: str
    bytes: int
    begin: int
    end: int | None
    details: Mapping[str, Any]

    def describe(self) -> str:
        """As errors do: "all_reduce(float32[4], sum, one_shot)"."""
        d = self.details
        if "peer" in d:
            peer = "any rank" if d["peer"] < 0 else f"rank {d['peer_number']}"
            return f"{self.call}({'to' if self.call == 'send' else 'from'} {peer}, tag {d['tag']}, {self.bytes} bytes)"
        parts = []
        if "dtype" in d:
            parts.append(d["dtype"] if self.call == "all_to_all" else f"{d['dtype']}[{d['count']}]")
        parts += [d["op"]] if "op" in d else []
        parts += [d["algorithm"]] if self.call == "all_reduce" else []
        parts += [f"root {d['root']}"] if "root" in d else []
        return f"{self.call}({', '.join(parts)})"

    def signature(self) -> tuple[Any, ...]:
        """What must be the same on all ranks."""
        names = ("dtype", "shape", "op", "root", "algorithm")
        count = None if self.call == "all_to_all" else self.details.get("count")
        return (self.call, count, *(self.details.get(name) for name in names))


@dataclass
class RankTrace:
    """One rank, from all that is known of it. Entries by kind ("calls", "messages", "launches"), then by number."""

    rank: int
    global_rank: int | None = None
    pid: int = 0
    state: str = "here"
    waits_for: int | None = None
    error: Mapping[str, Any] | None = None
    file: Path | None = None  # its own
    entries: dict[str, dict[int, Entry]] = field(default_factory=lambda: {kind: {} for kind in KINDS})

    @property
    def number(self) -> str:
        """As errors have it: "1", or "1 (global rank 3)" where the two differ."""
        return (
            str(self.rank) if self.global_rank in (None, self.rank) else f"{self.rank} (global rank {self.global_rank})"
        )

    def by_sequence(self, kind: str) -> dict[int, Entry]:
        """The entries of a kind, by sequence, in order."""
        return {e.sequence: e for _, e in sorted(self.entries[kind].items())}


@dataclass
class Trace:
    """A communicator, from all files about it."""

    communicator: str
    group: str
    host: str
    taken: int  # ns; of the first file, when what went wrong had just gone wrong
    unix_ns: int  # the same by the calendar
    ranks: list[RankTrace]

    def errors(self) -> dict[int, Mapping[str, Any]]:
        """Of the ranks that have failed."""
        return {r.rank: r.error for r in self.ranks if r.error is not None}


def load(paths: Iterable[Path]) -> tuple[list[Trace], list[str]]:
    """The traces in these files and folders, oldest first, and a line for each file of a folder that is left out.

    Raises:
        UsageError: a path is not there, a file is no trace, or a folder holds none.
    """
    dumps: list[tuple[Path, Any]] = []
    left_out: list[str] = []
    for path in paths:
        if not path.is_dir():
            dumps.append((path, _read(path)))
            continue
        before = len(dumps)
        for file in sorted(path.glob("*.json")):
            try:
                dumps.append((file, _read(file)))
            except UsageError as problem:  # the rank may have been killed while it wrote
                left_out.append(str(problem))
        if len(dumps) == before:
            raise UsageError(
                f"{path} holds no trace: start the ranks with PYCOLL_TRACE={path}, and they leave one when they fail"
            )
    by_communicator: dict[tuple[str, int], list[tuple[Path, Any]]] = {}
    for path, dump in sorted(dumps, key=lambda item: int(item[1]["taken_ns"])):
        by_communicator.setdefault((dump["communicator"], dump["world_size"]), []).append((path, dump))
    return [_merged(group) for group in by_communicator.values()], left_out


def _read(path: Path) -> Any:
    try:
        dump = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as problem:
        raise UsageError(f"{path} cannot be read: {problem.strerror}") from problem
    except ValueError as problem:
        raise UsageError(f"{path} is no trace of pycoll: it is not JSON, or not all of it ({problem})") from problem
    if not isinstance(dump, dict) or "pycoll_trace" not in dump:
        raise UsageError(f"{path} is no trace of pycoll: it has no field pycoll_trace")
    if dump["pycoll_trace"] != FORMAT:
        raise UsageError(f"{path} has format {dump['pycoll_trace']}, this pycoll reads format {FORMAT}")
    try:
        _merged([(path, dump)])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as problem:
        raise UsageError(f"{path} is no trace of pycoll: {type(problem).__name__} {problem}") from problem
    return dump


def _merged(dumps: Sequence[tuple[Path, Any]]) -> Trace:
    """Of one communicator, oldest first: later ones know more."""
    first = dumps[0][1]
    ranks = [RankTrace(rank) for rank in range(int(first["world_size"]))]
    trace = Trace(
        str(first["communicator"]),
        str(first["group"]),
        str(first["host"]),
        int(first["taken_ns"]),
        int(first["unix_ns"]),
        ranks,
    )
    for seen in first["ranks"]:
        ranks[seen["rank"]].global_rank = seen.get("global_rank")
    numbers = [rank.number for rank in ranks]
    for path, dump in dumps:
        ranks[dump["rank"]].file = path
        for seen in dump["ranks"]:
            _add(ranks[seen["rank"]], seen, numbers)
    return trace


def _add(rank: RankTrace, seen: Mapping[str, Any], numbers: Sequence[str]) -> None:
    rank.pid = int(seen["pid"])
    if rank.state not in ("failed", "dead"):  # who has failed closes later, or dies
        rank.state, rank.waits_for = str(seen["state"]), seen["waits_for"]
    rank.error = rank.error or seen["error"]
    for kind in KINDS:
        known = rank.entries[kind]
        for raw in seen[kind]:
            entry = _entry(rank.rank, raw, numbers)
            if raw["n"] not in known or known[raw["n"]].end is None:
                known[int(raw["n"])] = entry


def _entry(rank: int, raw: Mapping[str, Any], numbers: Sequence[str]) -> Entry:
    common = ("n", "sequence", "state", "begin_ns", "end_ns", "call", "bytes")
    details = {name: value for name, value in raw.items() if name not in common}
    if details.get("peer", -1) >= 0:
        details["peer_number"] = numbers[details["peer"]]
    return Entry(
        rank,
        int(raw["sequence"]),
        str(raw["call"]),
        str(raw["state"]),
        int(raw["bytes"]),
        int(raw["begin_ns"]),
        None if raw["end_ns"] is None else int(raw["end_ns"]),
        details,
    )
