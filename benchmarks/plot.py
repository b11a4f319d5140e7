"""One picture of a benchmark: time and bus bandwidth against size, for every contender."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from .report import CEILING, Report, Row, machine_line
from .timing import format_bytes

_ALGORITHM_COLORS = {
    "auto": "#08306b",
    "ring": "#41ab5d",
    "tree": "#78c679",
    "one_shot": "#9e9ac8",
    "two_shot": "#4292c6",
}
_PEER_COLORS = ("#a50f15", "#ec7014", "#dd3497", "#8c510a", "#fe9929", "#7a0177", "#525252", "#c51b7d")


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
    if row.call != "native":
        return {"color": "#00b0d8", "linestyle": line, "linewidth": 1.6, "marker": "o", "markersize": 3}
    width = 2.4 if row.algorithm == "auto" else 0.9
    return {"color": _ALGORITHM_COLORS[row.algorithm], "linestyle": line, "linewidth": width}


def draw(report: Report, path: Path) -> None:
    """Writes the picture to `path` (PNG)."""
    figure = Figure(figsize=(15, 7), layout="constrained")
    time_axes, bandwidth_axes = figure.subplots(1, 2)
    peers: dict[str, int] = {}
    for label, rows in series(report).items():
        peer = peers.setdefault(label, len(peers)) if rows[0].who not in ("pycoll", CEILING) else 0
        style = _style(rows[0], peer)
        at = [row.size for row in rows]
        time_axes.plot(at, [row.timing.median * 1e6 for row in rows], label=label, **style)
        bandwidth_axes.plot(at, [row.algbw * report.busbw_factor() / 1e9 for row in rows], **style)
    sizes = sorted({row.size for row in report.rows})
    for axes, title in ((time_axes, "time (us), lower is better"), (bandwidth_axes, "busbw (GB/s), higher is better")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(xlabel="size of each rank's tensor", title=title)
        axes.set_xticks(sizes[::-2], [format_bytes(size) for size in sizes[::-2]])
        axes.grid(True, which="major", alpha=0.3)
        axes.grid(True, which="minor", axis="y", alpha=0.1)
    figure.suptitle(f"{report.benchmark}, {report.world_size} ranks, {report.dtype}: {machine_line(report)}")
    figure.legend(loc="outside right center", fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)
