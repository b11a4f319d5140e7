"""One picture of a benchmark: time and bus bandwidth against size, for every contender."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import CEILING, Report, Row, machine_line
from .timing import format_bytes

_ALGORITHM_COLORS = {
    "auto": "#08306b",
    "ring": "#41ab5d",
    "tree": "#78c679",
    "one_shot": "#9e9ac8",
    "two_shot": "#4292c6",
    "one_shot_ll": "#6a51a3",
    "two_shot_ll": "#2171b5",
    "multimem": "#005a32",
}
_PEER_COLORS = ("#a50f15", "#ec7014", "#dd3497", "#8c510a", "#fe9929", "#7a0177", "#525252", "#c51b7d")


@dataclass(frozen=True)
class Line:
    """One contender: seconds a call at each size, in order of size."""

    label: str
    sizes: Sequence[int]
    seconds: Sequence[float]
    style: dict[str, object]


@dataclass(frozen=True)
class Panel:
    """What is shown side by side: the lines of one run, and busbw / algbw in it."""

    title: str
    lines: Sequence[Line]
    busbw_factor: float


def series(report: Report) -> dict[str, list[Row]]:
    """The lines of the plot, by label: each contender in order of size; of the ceilings, the better at each size."""
    lines: dict[str, list[Row]] = {}
    for row in sorted(report.rows, key=lambda row: row.size):
        if row.who == CEILING:
            best = report.select(size=row.size, who=CEILING, memory=row.memory)[0]
            if row is best:
                lines.setdefault(f"{CEILING} {row.memory}", []).append(row)
        else:
            lines.setdefault(row.label, []).append(row)
    return lines


def _style(row: Row, peer: int) -> dict[str, object]:
    """Colour tells who, dashes tell memory, width tells what users get by default."""
    line = "--" if row.memory == "symmetric" else "-"
    if row.who == CEILING:
        return {"color": "black", "linestyle": line, "linewidth": 1.2, "alpha": 0.8}
    if row.who != "pycoll":
        return {
            "color": _PEER_COLORS[peer % len(_PEER_COLORS)],
            "linestyle": "-",
            "linewidth": 1.8,
            "marker": "s",
            "markersize": 3.5,
        }
    if row.call == "torch.distributed":
        return {"color": "#00b0d8", "linestyle": line, "linewidth": 1.6, "marker": "o", "markersize": 3}
    width = 2.4 if row.algorithm == "auto" else 0.9
    return {"color": _ALGORITHM_COLORS[row.algorithm], "linestyle": line, "linewidth": width}


def panel(report: Report, title: str = "") -> Panel:
    """The lines of `report`, each with a style of its own."""
    peers: dict[str, int] = {}
    lines = []
    for label, rows in series(report).items():
        peer = peers.setdefault(label, len(peers)) if rows[0].who not in ("pycoll", CEILING) else 0
        seconds = [row.timing.median for row in rows]
        lines.append(Line(label, [row.size for row in rows], seconds, _style(rows[0], peer)))
    return Panel(title, lines, report.busbw_factor())


def draw(report: Report, path: Path) -> None:
    """Writes the picture to `path` (PNG)."""
    title = f"{report.benchmark}, {report.world_size} ranks, {report.dtype}: {machine_line(report)}"
    draw_panels(title, [panel(report)], path)


def draw_panels(title: str, panels: Sequence[Panel], path: Path) -> None:
    """Writes a picture of all `panels`, one below the other, to `path` (PNG)."""
    figure = Figure(figsize=(15, 7 * len(panels)), layout="constrained")
    known: dict[str, Artist] = {}  # what the legend shows, once for all panels
    for shown, (time_axes, bandwidth_axes) in zip(
        panels, figure.subplots(len(panels), 2, squeeze=False).tolist(), strict=True
    ):
        for line in shown.lines:
            (drawn,) = time_axes.plot(line.sizes, [seconds * 1e6 for seconds in line.seconds], **line.style)
            known.setdefault(line.label, drawn)
            busbw = [
                size / seconds * shown.busbw_factor / 1e9
                for size, seconds in zip(line.sizes, line.seconds, strict=True)
            ]
            bandwidth_axes.plot(line.sizes, busbw, **line.style)
        sizes = sorted({size for line in shown.lines for size in line.sizes})
        name = f"{shown.title}: " if shown.title else ""
        _label(time_axes, f"{name}time (us), lower is better", sizes)
        _label(bandwidth_axes, f"{name}busbw (GB/s), higher is better", sizes)
    figure.suptitle(title)
    figure.legend(list(known.values()), list(known), loc="outside right center", fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)


def _label(axes: Axes, title: str, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="size of each rank's tensor", title=title)
    axes.set_xticks(sizes[::-2], [format_bytes(size) for size in sizes[::-2]])
    axes.grid(True, which="major", alpha=0.3)
    axes.grid(True, which="minor", axis="y", alpha=0.1)
