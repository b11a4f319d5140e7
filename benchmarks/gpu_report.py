"""What a run between GPUs has found: where, how fast each was and who is missing, as a table, a picture and JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from . import report, timing
from .gpu_calls import EAGER, GRAPH

Peer = Literal["pycoll", "nccl", "cupy", "symm_mem", "copy"]

NAMES: Mapping[Peer, str] = {
    "pycoll": "pycoll",
    "nccl": "NCCL",
    "cupy": "CuPy's NCCL",
    "symm_mem": "torch symm_mem",
    "copy": "the copy",
}
_TENSORS = 8  # of the size that is measured, which a rank and its rivals hold at once, at most


@dataclass(frozen=True)
class Setting:
    """Where a run takes place."""

    ranks: int
    gpus: int
    gpu: str  # its name
    free_bytes: int  # of memory, on one

    @property
    def share(self) -> int:
        """Ranks on a GPU, at most."""
        return -(-self.ranks // self.gpus)

    @property
    def shared(self) -> bool:
        """Whether ranks share a GPU. What they call cannot be captured then: they meet on the host."""
        return self.share > 1

    @property
    def modes(self) -> tuple[str, ...]:
        return (EAGER,) if self.shared else (EAGER, GRAPH)

    def fits(self, size: int) -> bool:
        """Whether the tensors of a run at `size` bytes fit in a GPU's memory."""
        return _TENSORS * self.share * size < self.free_bytes


@dataclass
class Found:
    """What a run has found: a report for each dtype, and what was left out, in words."""

    setting: Setting
    reports: list[report.Report]
    left_out: list[str] = field(default_factory=list)


def absences(reports: Sequence[report.Report]) -> Iterator[str]:
    """Who was left out, and why, in a line each; the same reason at several sizes once."""
    for failure in dict.fromkeys(failure for each in reports for failure in each.failures):
        yield brief(failure)
    sizes: dict[tuple[str, str], list[str]] = {}
    for line in [line for each in reports for line in each.left_out]:
        case, _, reason = line.partition(": ")
        who, _, size = case.rpartition(" at ")
        sizes.setdefault((who, reason), []).append(size)
    for (who, reason), at in sizes.items():
        yield f"{who} at {', '.join(dict.fromkeys(at))}: {reason[:200]}"


def brief(failure: str) -> str:
    """A failure of a library in one line: its name, and of all that was said what tells most."""
    name, _, said = failure.partition(": ")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"([\w.]+\.)?\w*(Error|Exception)\b", line)]
    # Those of Python name the cause; else the last words do, before which only the ranks' start is told of.
    return f"{name}: {(errors or lines or ['no reason given'])[-1][:200]}"


def rows(found: Found) -> Iterator[dict[str, Any]]:
    """All rows as JSON has them: times in seconds, bandwidths in bytes a second."""
    for each in found.reports:
        for row in each.rows:
            yield {
                "ranks": each.world_size,
                "size": row.size,
                "dtype": each.dtype,
                "who": row.who,
                "algorithm": row.algorithm,
                "memory": row.memory,
                "mode": row.call,
                "seconds": row.timing.median,
                "algbw": row.algbw,
                "busbw": row.algbw * each.busbw_factor(),
                "x_nccl": nccl_ratio(each, row),
                "error": row.error,
                "timing": asdict(row.timing),
            }


def nccl_ratio(each: report.Report, row: report.Row) -> float | None:
    """NCCL's time in the same mode divided by this time: above 1 is faster than NCCL. None: NCCL was not measured."""
    nccl = each.select(size=row.size, who=NAMES["nccl"], call=row.call)
    return nccl[0].timing.median / row.timing.median if nccl else None


def table(found: Found) -> Table:
    """A line a row, grouped by size, dtype and mode, fastest first within each; the caption says who is missing."""
    setting = found.setting
    where = f"{setting.ranks} ranks on {setting.gpus} x {setting.gpu}"
    shown = Table(
        title=f"all-reduce between GPUs, {where}", box=box.SIMPLE, caption=caption(found), caption_justify="left"
    )
    for name in ("size", "dtype", "mode", "who", "algorithm", "memory"):
        shown.add_column(name, no_wrap=True)
    for name in ("time us", "algbw GB/s", "busbw GB/s", "x NCCL"):
        shown.add_column(name, justify="right", no_wrap=True)
    for size in sorted({row.size for each in found.reports for row in each.rows}):
        for each in found.reports:
            for mode in (EAGER, GRAPH):
                for place, row in enumerate(each.select(size=size, call=mode)):
                    ratio = nccl_ratio(each, row)
                    shown.add_row(
                        *((timing.format_bytes(size), each.dtype, mode) if place == 0 else ("", "", "")),
                        row.who,
                        row.algorithm,
                        row.memory,
                        report.format_seconds(row.timing.median),
                        report.format_ratio(row.algbw / 1e9),
                        report.format_ratio(row.algbw * each.busbw_factor() / 1e9),
                        "" if ratio is None else report.format_ratio(ratio),
                    )
        shown.add_section()
    return shown


def caption(found: Found) -> Text:
    """What a reader of the table must know: how ranks share a GPU, and who or what is missing."""
    lines = []
    if found.setting.shared:
        lines.append("Ranks share a GPU: its driver gives them turns, which is what these times are of. No graphs.")
    lines += [f"Left out: {line}" for line in found.left_out]
    return Text("\n".join(lines))


def draw(found: Found, path: Path) -> None:
    """Writes the picture: a row of panels for each dtype; graphs where there are any, else eager calls.

    Raises:
        ImportError: there is no matplotlib.
    """
    from . import plot  # here, as `make gpu` installs nothing

    mode = found.setting.modes[-1]
    panels = [plot.panel(replace(each, rows=each.select(call=mode)), each.dtype) for each in found.reports if each.rows]
    setting = found.setting
    title = f"all-reduce between GPUs, {mode}: {setting.ranks} ranks on {setting.gpus} x {setting.gpu}"
    plot.draw_panels(title, panels, path)


def to_json(found: Found) -> str:
    """All of it."""
    first = found.reports[0]
    content = {
        "benchmark": "gpu",
        "machine": first.machine,
        "facts": {"torch": torch.__version__, "cuda": torch.version.cuda, **first.facts},
        "left_out": found.left_out,
        "failures": [failure for each in found.reports for failure in each.failures],
        "rows": list(rows(found)),
    }
    return json.dumps(content, indent=1)


def succeeded(found: Found) -> bool:
    """Whether pycoll was measured without a failure, and no result was wrong. Peers may be missing."""
    failures = [failure for each in found.reports for failure in each.failures]
    return all(each.rows for each in found.reports) and not any(
        failure.startswith(NAMES["pycoll"]) or "wrong result" in failure for failure in failures
    )
