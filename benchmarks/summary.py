"""The table of the README: what an all-reduce takes, from a JSON file that `pycoll bench all-reduce` wrote.

python -m pycoll.benchmarks.summary benchmarks/results/MACHINE/all_reduce-2-ranks-float32.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from .report import CEILING, Report, Row, format_ratio, format_seconds, machine_line
from .timing import format_bytes

SIZES = tuple(kib * 1024 for kib in (1, 64, 1024, 4 * 1024, 64 * 1024, 256 * 1024))


def markdown(report: Report) -> str:
    """A row a size: medians in us, the faster MPI (any setting), and how many times faster than Gloo through torch."""
    lines = [
        "| all-reduce of | pycoll | on symmetric memory | the machine's ceiling there | through torch "
        "| Gloo through torch | the fastest MPI |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        native = {"who": "pycoll", "algorithm": "auto", "call": "native", "size": size}
        gloo = _fastest(report, size=size, who="Gloo")
        via_torch = _fastest(report, size=size, who="pycoll", call="torch.distributed")
        peers = [row for row in report.select(size=size) if row.who not in ("pycoll", "Gloo", CEILING)]
        cells = [
            format_bytes(size),
            _us(_fastest(report, **native, memory="private")),
            _us(_fastest(report, **native, memory="symmetric")),
            _us(_fastest(report, size=size, who=CEILING, memory="symmetric")),
            f"{_us(via_torch)} (**{format_ratio(gloo.timing.median / via_torch.timing.median)} x**)",
            _us(gloo),
            f"{_us(peers[0])} ({peers[0].who})" if peers else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    times = f"Medians of one run, {report.world_size} ranks, {report.dtype}, in place: {machine_line(report)}."
    return "\n".join([*lines, "", times]) + "\n"


def _fastest(report: Report, **wanted: object) -> Row:
    return report.select(**wanted)[0]


def _us(row: Row) -> str:
    return f"{format_seconds(row.timing.median)} us"


if __name__ == "__main__":
    print(markdown(Report.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
