"""A merged trace for people: what became of each rank, its last calls beside the others', and who is to blame."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pycoll.trace import diagnose
from pycoll.trace.dump import Entry, Trace

NAMES = {"calls": "call", "launches": "launch"}


def show(trace: Trace, last: int, console: Console) -> None:
    """Prints the trace, with the last calls of each kind, `last` of them."""
    when = datetime.fromtimestamp(trace.unix_ns / 1e9).isoformat(" ", "milliseconds")
    console.print(Text(f"{trace.group}: {len(trace.ranks)} ranks on {trace.host}, {when}", style="bold"))
    console.print(_ranks(trace))
    for kind in diagnose.COLLECTIVES:
        table = _calls(trace, kind, last)
        if table.row_count:
            console.print(table)
    for line, style in verdict(trace):
        console.print(Text(line, style=style), soft_wrap=True)


def verdict(trace: Trace) -> list[tuple[str, str]]:
    """What there is to say, line by line, each with its style."""
    lines = []
    for error, ranks in _by_text(trace).items():
        lines.append((f"{error} ({_ranks_text(trace, ranks)})", "red"))
    for m in diagnose.mismatches(trace):
        calls = "; ".join(f"{_ranks_text(trace, ranks)}: {call}" for call, ranks in m.calls.items())
        lines.append((f"mismatch: in {NAMES[m.kind]} #{m.sequence} ranks differ. {calls}", "red"))
    for s in diagnose.stragglers(trace):
        lines.append((straggler_text(trace, s), "" if s.entered else "yellow"))
    dead = [r.rank for r in trace.ranks if r.state == "dead"]
    if dead:
        lines.append((f"dead: {_ranks_text(trace, dead)}", "red"))
    for e in diagnose.open_messages(trace):
        age = duration(trace.taken - e.begin)
        lines.append((f"open: {_ranks_text(trace, [e.rank])} is in {e.describe()} since {age}", "yellow"))
    late = max(diagnose.lateness(trace), key=lambda x: (x.last, x.median), default=None)
    if late is not None and late.calls >= 3:
        who = _ranks_text(trace, [late.rank])
        text = f"usually last: {who}, to {late.last} of the {late.calls} calls known of all ranks"
        lines.append((f"{text}; {duration(late.median)} after the first rank in the median", ""))
    return lines


def straggler_text(trace: Trace, s: diagnose.Straggler) -> str:
    """One line about who is behind."""
    who, what = _ranks_text(trace, s.ranks), f"{NAMES[s.kind]} #{s.sequence} {s.call}"
    if s.entered:
        return f"the last to enter {what}: {who}, {duration(s.waits)} after the first"
    others = _ranks_text(trace, s.waiting)
    text = f"straggler: {who} had not entered {what}, in which {others} had been for {duration(s.waits)}"
    first = _ranks_text(trace, s.ranks[:1])
    previous = trace.ranks[s.ranks[0]].by_sequence(s.kind).get(s.sequence - 1)
    if previous is not None and previous.end is not None and previous.end <= trace.taken:
        text += f"; {first}'s own last, #{previous.sequence}, had ended {_ago(trace, previous.end)} before"
    elif previous is not None:
        text += f"; {first} was still in #{previous.sequence} {previous.describe()}"
    after = trace.ranks[s.ranks[0]].by_sequence(s.kind).get(s.sequence)
    if after is not None:
        text += f"; it came {duration(after.begin - trace.taken)} after that"
    return text


def analysis(trace: Trace) -> dict[str, Any]:
    """The same for programs; times in ns."""
    return {
        "communicator": trace.communicator,
        "group": trace.group,
        "host": trace.host,
        "taken_ns": trace.taken,
        "unix_ns": trace.unix_ns,
        "ranks": [
            {
                "rank": r.rank,
                "global_rank": r.global_rank,
                "pid": r.pid,
                "state": r.state,
                "waits_for": r.waits_for,
                "error": r.error,
                "file": None if r.file is None else str(r.file),
                "last": {kind: diagnose.last_entered(r, kind, trace.taken) for kind in diagnose.COLLECTIVES},
            }
            for r in trace.ranks
        ],
        "mismatches": [dataclasses.asdict(m) for m in diagnose.mismatches(trace)],
        "stragglers": [dataclasses.asdict(s) for s in diagnose.stragglers(trace)],
        "open_messages": [dataclasses.asdict(e) for e in diagnose.open_messages(trace)],
        "lateness": [dataclasses.asdict(x) for x in diagnose.lateness(trace)],
    }


def duration(ns: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if abs(ns) >= size:
            return f"{ns / size:.3g} {unit}" if abs(ns) < 1e3 * size else f"{ns / size:.0f} {unit}"
    return f"{ns:.0f} ns"


def _ago(trace: Trace, time: int) -> str:
    return duration(trace.taken - time)


def _ranks_text(trace: Trace, ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(trace.ranks[rank].number for rank in ranks)


def _by_text(trace: Trace) -> dict[str, list[int]]:
    """Errors, and the ranks that have each."""
    found: dict[str, list[int]] = {}
    for rank, error in trace.errors().items():
        found.setdefault(f"{error['kind']}: {error['text']}", []).append(rank)
    return found


def _ranks(trace: Trace) -> Table:
    table = Table()
    for column in ("rank", "process", "state", "waits for", "its own file"):
        table.add_column(column)
    styles = {"failed": "red", "dead": "red", "left": "yellow"}
    for r in trace.ranks:
        waits_for = "" if r.waits_for is None else _ranks_text(trace, [r.waits_for])
        state = Text(r.state, style=styles.get(r.state, ""))
        table.add_row(r.number, str(r.pid), state, waits_for, "none" if r.file is None else r.file.name)
    return table


def _calls(trace: Trace, kind: str, last: int) -> Table:
    """A row for each of the last calls, a column for each rank."""
    table = Table()
    for column in ("#", NAMES[kind], *(f"rank {r.number}" for r in trace.ranks)):
        table.add_column(column)
    by_rank = [r.by_sequence(kind) for r in trace.ranks]
    sequences = sorted(set().union(*by_rank))[-last:] if last > 0 else []
    for sequence in sequences:
        entries = [entries.get(sequence) for entries in by_rank]
        there = [e for e in entries if e is not None]
        first = min(e.begin for e in there)
        same = len({e.signature() for e in there}) == 1
        cells = [_cell(trace, e, first, same, by_rank[r], sequence) for r, e in enumerate(entries)]
        table.add_row(str(sequence), there[0].describe() if same else Text("they differ", style="red"), *cells)
    return table


def _cell(trace: Trace, e: Entry | None, first: int, same: bool, known: dict[int, Entry], sequence: int) -> Text:
    """When a rank entered a call, after the first that did, and how long it took."""
    if e is None:
        older = any(s > sequence for s in known)  # it has been overwritten
        return Text("" if older else "not entered", style="yellow")
    late = f"+{duration(e.begin - first)}"
    if e.end is None:
        text, style = f"{late}, in it for {duration(max(trace.taken - e.begin, 0))}", "yellow"
    else:
        text, style = f"{late}, {'failed after' if e.state == 'failed' else 'took'} {duration(e.end - e.begin)}", ""
    if not same:
        text = f"{e.describe()} {text}"
    return Text(text, style="red" if e.state == "failed" or not same else style)
