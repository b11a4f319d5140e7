"""The tables of the README, from JSON files that `pycoll bench all-reduce`, `collectives`, `step` and `training` wrote.

python -m pycoll.benchmarks.summary benchmarks/results/MACHINE/all_reduce-2-ranks-float32.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .report import CEILING, Report, Row, format_ratio, format_seconds, machine_line
from .timing import format_bytes

SIZES = tuple(kib * 1024 for kib in (1, 64, 1024, 4 * 1024, 64 * 1024, 256 * 1024))


def markdown(report: Report) -> str:
    """The table for what was timed, one of TABLES."""
    return TABLES[report.benchmark](report)


def collectives(report: Report) -> str:
    """A row a collective, a column a size: medians in us through torch, and how many times faster than Gloo."""
    rows = report.select(who="pycoll", call="torch.distributed")
    sizes = sorted({row.size for row in rows})
    names = dict.fromkeys(row.algorithm for row in report.rows if row.who == "pycoll")
    lines = [f"| through torch | {' | '.join(map(format_bytes, sizes))} |", f"|---{'|---' * len(sizes)}|"]
    for name in names:
        cells = [_beside_gloo(report, size, name) for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    times = f"Medians of one run, {report.world_size} ranks, {report.dtype}: {machine_line(report)}."
    return "\n".join([*lines, "", times]) + "\n"


def _beside_gloo(report: Report, size: int, name: str) -> str:
    mine, gloo = (
        report.select(who=who, size=size, algorithm=name, call="torch.distributed") for who in ("pycoll", "Gloo")
    )
    if not mine:  # a barrier has one size
        return ""
    return f"{_us(mine[0])} (**{format_ratio(gloo[0].timing.median / mine[0].timing.median)} x**)"


def all_reduce(report: Report) -> str:
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


def step(report: Report) -> str:
    """A row a contender, fastest first: median, how many times faster than DDP over Gloo, state of the optimizer."""
    lines = ["| a step | time | | state of the optimizer on a rank |", "|---|---|---|---|"]
    gloo = report.select(who="DDP over Gloo, torch fused")[0].timing.median
    for row in report.select():
        state = report.facts["step"]["state_bytes"][row.who]
        times = format_ratio(gloo / row.timing.median)
        cells = (row.who, f"{row.timing.median * 1e3:.1f} ms", f"**{times} x**", f"{state / 2**20:.0f} MiB")
        if "backward alone" not in row.who:
            lines.append(f"| {' | '.join(cells)} |")
    model = report.facts["model"]
    what = f"{model['parameters'] / 2**20:g} Mi parameters, {report.world_size} ranks, {report.dtype}"
    return "\n".join([*lines, "", f"Medians of one run, {what}: {machine_line(report)}."]) + "\n"


def training(report: Report) -> str:
    """A row a model and way to share it: medians of a whole step, and how many times faster than over Gloo."""
    lines = ["| a training step of | on each rank | over pycoll | over Gloo | |", "|---|---|---|---|---|"]
    for row in report.rows:
        if row.who != "pycoll":
            continue
        gloo = next(
            each
            for each in report.select(algorithm=row.algorithm, call=row.call)
            if each.who in ("DDP over Gloo", "Gloo")
        )
        times = [f"{each.timing.median * 1e3:.4g} ms" for each in (row, gloo)]
        ratio = format_ratio(gloo.timing.median / row.timing.median)
        lines.append(f"| {row.algorithm} | {row.call} | {' | '.join(times)} | **{ratio} x** |")
    times_of = f"Medians of one run, {report.world_size} ranks, {report.dtype}: {machine_line(report)}."
    return "\n".join([*lines, "", times_of]) + "\n"


def _fastest(report: Report, **wanted: object) -> Row:
    return report.select(**wanted)[0]


def _us(row: Row) -> str:
    return f"{format_seconds(row.timing.median)} us"


TABLES = {"all-reduce": all_reduce, "collectives": collectives, "step": step, "training": training}

if __name__ == "__main__":
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    if (benchmark := json.loads(text).get("benchmark")) not in TABLES:
        sys.exit(f"{sys.argv[1]}: no table is made of the benchmark {benchmark!r}, but of {', '.join(TABLES)}")
    print(markdown(Report.from_json(text)), end="")
