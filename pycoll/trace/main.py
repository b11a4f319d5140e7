"""`pycoll trace`: reads what failed ranks left, merges it, and says what it means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.text import Text

from pycoll.errors import UsageError
from pycoll.trace import chrome, dump, show


@dataclass(frozen=True)
class TraceOptions:
    """Show what the ranks of a communicator did last: who held up the others, and who called something else.

    Ranks leave traces when they fail, in the folder that PYCOLL_TRACE names when they start; or write `comm.trace()` to
    a file as JSON.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Files, and folders of them. Those of one communicator are merged."""
    last: int = 8
    """How many of the last calls to show."""
    chrome: Path | None = None
    """Write the timeline to this file too, for chrome://tracing and https://ui.perfetto.dev."""
    json: bool = False
    """Print JSON instead of tables."""


def main(arguments: Sequence[str]) -> int:
    """Runs `pycoll trace` with these arguments and returns the exit status. Raises UsageError for bad input."""
    options = tyro.cli(TraceOptions, prog="pycoll trace", args=arguments)
    if not options.paths:
        raise UsageError("pycoll trace needs files, or a folder of them: what ranks left in the folder PYCOLL_TRACE")
    traces, left_out = dump.load(options.paths)
    for line in left_out:
        Console(stderr=True).print(Text(f"left out: {line}", style="yellow"), soft_wrap=True)
    if options.chrome is not None:
        try:
            options.chrome.write_text(json.dumps(chrome.events(traces)), encoding="utf-8")
        except OSError as problem:
            raise UsageError(f"{options.chrome} cannot be written: {problem.strerror}") from problem
    if options.json:
        print(json.dumps([show.analysis(trace) for trace in traces], indent=2))
        return 0
    console = Console()
    if not console.is_terminal:  # 80 columns would break the table
        console.width = max(console.width, 60 + 30 * max(len(trace.ranks) for trace in traces))
    for trace in traces:
        show.show(trace, options.last, console)
    return 0
