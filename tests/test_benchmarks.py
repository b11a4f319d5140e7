"""Tests of the benchmarks: sizes, statistics, checks of results, ceilings, reports, groups of ranks; a small run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pycoll.benchmarks import all_reduce, bars, ceiling_ranks, mpi, plot, ranks, report, summary, timing, values
from pycoll.benchmarks.driver import Contest
from pycoll.benchmarks.groups import GroupFailed, Launch, RankGroup

ROOT = Path(__file__).parent.parent
KIB, MIB = 2**10, 2**20
MACHINE = {"cpu": "a CPU", "cores": 2, "kernel": "6.1", "date": "2026-01-02T03:04:05"}


def row(
    size: int, seconds: float, who: str, algorithm: str = "default", memory: str = "private", call: str = "native"
) -> report.Row:
    return report.Row(
        size, who, algorithm, memory, call, timing.summarize([seconds], 1), None if who == report.CEILING else 1e-8
    )


def perfect_report() -> report.Report:
    """A run of two ranks that reaches every bar, with a little to spare."""
    found = report.Report("all-reduce", 2, "float32", MACHINE, {"pycoll": {"footprint": 10 * MIB}})
    found.rows = [
        row(KIB, 2.9e-6, "pycoll", "auto"),
        row(KIB, 5.8e-6, "pycoll", "auto", call="torch.distributed"),
        row(KIB, 2.9e-6 * 71, "Gloo", call="torch.distributed"),
    ]
    for size in (4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB):
        seconds = size / 20e9
        found.rows += [
            row(size, seconds, "pycoll", "auto"),
            row(size, seconds * 0.5, "pycoll", "auto", "symmetric"),
            row(size, seconds * 13, "Gloo", call="torch.distributed"),
            row(size, seconds * 1.6, "Open MPI 5.0.11", call="mpi4py"),
            row(size, seconds * 2.5, "MPICH 5.0.2", call="mpi4py"),
            row(size, seconds * 0.45, report.CEILING, "torch", "symmetric"),
            row(size, seconds * 0.48, report.CEILING, "kernels", "symmetric"),
        ]
    return found


@pytest.mark.parametrize(
    ("text", "size"), [("8", 8), ("8B", 8), ("1KiB", KIB), ("1 kib", KIB), ("256MiB", 256 * MIB), ("1GiB", 2**30)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert timing.parse_bytes(text) == size
    assert timing.parse_bytes(timing.format_bytes(size)) == size


@pytest.mark.parametrize("text", ["", "MiB", "1.5MiB", "-8", "8 bits"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no size"):
        timing.parse_bytes(text)


def test_default_sizes_hold_those_that_have_bars() -> None:
    sizes = timing.sizes(8, 256 * MIB, 4, 4)
    assert sizes == sorted(sizes) and sizes[0] == 8 and sizes[-1] == 256 * MIB
    assert {KIB, 4 * MIB, 16 * MIB, 64 * MIB} <= set(sizes)
    assert timing.sizes(10, 30, 2, 4) == [8, 12, 28]


@pytest.mark.parametrize(("low", "high", "factor"), [(8, 64, 1), (64, 8, 2), (2, 8, 2)])
def test_bad_bounds_are_refused(low: int, high: int, factor: int) -> None:
    with pytest.raises(ValueError, match=r"factor|rise"):
        timing.sizes(low, high, factor, 4)


def test_samples_last_long_enough_and_no_longer() -> None:
    assert timing.calls_per_sample(1.0) == 1
    assert timing.calls_per_sample(timing.SAMPLE_SECONDS / 100) == 100
    assert timing.calls_per_sample(0.0) == timing.MAX_CALLS


@pytest.mark.parametrize(("seconds_a_round", "rounds"), [(0.0, 10), (0.24, 5), (9.0, 3)])
def test_rounds_fit_the_time_within_bounds(seconds_a_round: float, rounds: int) -> None:
    effort = timing.Effort(seconds=1.0, min_rounds=3, max_rounds=10)
    parts = [effort.part(n, n * seconds_a_round) for n in range(rounds + 1)]
    assert parts == sorted(parts) and parts[0] == 0
    assert [effort.enough(n, n * seconds_a_round) for n in range(rounds + 1)] == [False] * rounds + [True]


def test_statistics() -> None:
    found = timing.summarize([5.0, 1.0, 2.0, 4.0, 3.0], 7)
    assert found == timing.Timing(median=3.0, minimum=1.0, quartile_1=2.0, quartile_3=4.0, samples=5, calls=7)


@pytest.mark.parametrize("dtype", values.ITEMSIZE)
def test_error_tells_right_from_wrong(dtype: str) -> None:
    count, world = 10_000, 3
    inputs = np.zeros((world, count), values.storage(dtype))
    for rank in range(world):
        values.load_pattern(inputs[rank], rank, dtype)
    exact = np.sum([values.decode(x, dtype) for x in inputs], axis=0)
    result = torch.from_numpy(exact).to(getattr(torch, dtype))
    raw = (result.view(torch.uint16) if dtype == "bfloat16" else result).numpy()
    limit = values.tolerance(world, dtype)
    assert 0 < values.sum_error(raw, world, dtype) <= limit
    assert values.sum_error(np.roll(raw, 1), world, dtype) > limit, "data at a wrong place"
    raw[-1] = inputs[0][-1]
    assert values.sum_error(raw, world, dtype) > limit, "one element that was not reduced"


def test_not_a_number_is_an_error_without_bounds() -> None:
    assert values.sum_error(np.full(5, np.nan, np.float32), 2, "float32") == float("inf")


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("make", [ceiling_ranks.torch_symmetric, ceiling_ranks.kernel_symmetric])
def test_symmetric_ceiling_is_an_all_reduce(make: ceiling_ranks.Symmetric, world: int) -> None:
    inputs = torch.randn(world, 1001)
    tensors = list(inputs.clone())
    for rank in range(world):
        make(tensors, rank)()
    for tensor in tensors:
        torch.testing.assert_close(tensor, inputs.sum(0))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("make", [ceiling_ranks.torch_staged, ceiling_ranks.kernel_staged])
def test_staged_ceiling_is_an_all_reduce(make: ceiling_ranks.Staged, world: int) -> None:
    inputs = torch.randn(world, 1001)
    slots = list(torch.zeros(world, 3 * 400))
    for _ in ("publish", "combine what all have published", "collect what all have combined"):
        tensors = list(inputs.clone())
        for rank in range(world):
            make(tensors[rank], slots, rank)()
    for tensor in tensors:
        torch.testing.assert_close(tensor, inputs.sum(0))


def test_bandwidths() -> None:
    found = perfect_report()
    gloo = found.select(size=4 * MIB, who="Gloo")[0]
    assert gloo.algbw == pytest.approx(20e9 / 13)
    content = json.loads(found.to_json())
    assert report.Report.from_json(found.to_json()) == found
    assert content["rows"][2]["busbw"] == pytest.approx(found.rows[2].algbw)  # 2 (n - 1) / n is 1 for two ranks
    found.world_size = 4
    assert json.loads(found.to_json())["rows"][2]["busbw"] == pytest.approx(1.5 * found.rows[2].algbw)
    assert len(content["rows"]) == len(found.rows) == report.table(found).row_count


def test_every_bar_passes_and_fails() -> None:
    found = perfect_report()
    passing = bars.evaluate(found)
    assert len(passing) == 14 and all(bar.passed for bar in passing)
    found.rows = [
        row(r.size, r.timing.median * 1.2, r.who, r.algorithm, r.memory, r.call) if r.who == "pycoll" else r
        for r in found.rows
    ]
    found.facts["pycoll"]["footprint"] = 64 * MIB
    failing = bars.evaluate(found)
    assert [bar.passed for bar in failing] == [False] * 14
    assert bars.table(failing).row_count == 14


def test_bars_of_four_ranks() -> None:
    found = perfect_report()
    found.world_size = 4
    assert [bar.passed for bar in bars.evaluate(found)] == [True, True, True]


def test_a_bar_that_was_not_measured_is_not_passed() -> None:
    found = perfect_report()
    found.rows = [r for r in found.rows if r.call != "mpi4py"]
    unknown = [bar for bar in bars.evaluate(found) if bar.passed is None]
    assert [bar.reached for bar in unknown] == ["not measured: the better MPI"] * 4


def test_plot_shows_the_better_ceiling(tmp_path: Path) -> None:
    found = perfect_report()
    lines = plot.series(found)
    assert {r.algorithm for r in lines["ceiling symmetric"]} == {"torch"}
    assert {"pycoll auto private", "pycoll via torch auto private", "Gloo via torch", "Open MPI 5.0.11"} <= set(lines)
    plot.draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_ranks_that_do_not_start_say_why() -> None:
    with pytest.raises(GroupFailed, match=r"0 of 2 ranks started(.|\n)*no such library"):
        RankGroup(Launch("broken", [sys.executable, "-c", "raise SystemExit('no such library')"]), 2)


RANK = """
import os, sys
from benchmarks import ranks
def make(count, dtype):
    if sys.argv[1] == "raises": raise RuntimeError("out of luck")
    os._exit(3)
ranks.Rank(int(os.environ[ranks.RANK_VARIABLE]), 2, {("x", "y", "private", "z"): make}, lambda: None, dict).serve()
"""


@pytest.mark.parametrize(("how", "message"), [("raises", "out of luck"), ("exits", "ended")])
def test_a_group_that_fails_is_reported_and_left_out(how: str, message: str) -> None:
    found = report.Report("all-reduce", 2, "float32", MACHINE)
    folder = Path(ranks.__file__).parent.parent  # as MPI's ranks, without importing pycoll
    launch = Launch("unlucky", [sys.executable, "-c", RANK, how], environment={"PYTHONPATH": str(folder)})
    with RankGroup(launch, 2) as group:
        contest = Contest([group], found)
        for size in (8, 16):
            contest.measure(size, timing.Effort(1.0, 1, 1), lambda _: None)
    assert len(found.failures) == 1 and message in found.failures[0]
    assert not found.rows


def test_an_environment_without_mpi_is_refused(tmp_path: Path) -> None:
    with pytest.raises(mpi.MpiMissing, match="no bin/mpirun"):
        mpi.find(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (all_reduce.AllReduceBench(ranks=1), "2 ranks or more"),
        (all_reduce.AllReduceBench(contenders=()), "at least one"),
        (all_reduce.AllReduceBench(largest="much"), "no size"),
        (all_reduce.AllReduceBench(smallest="1MiB", largest="1KiB"), "rise"),
        (all_reduce.AllReduceBench(largest="100000GiB"), "lower --max"),
        (all_reduce.AllReduceBench(mpi=(Path("nowhere"),)), "no bin/mpirun"),
    ],
)
def test_bad_options_are_explained(
    config: all_reduce.AllReduceBench, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert all_reduce.main(config) == 2
    assert message in capfd.readouterr().err


def test_a_small_run(tmp_path: Path) -> None:
    """pycoll, Gloo and the ceiling, and the MPIs where PYCOLL_BENCH_MPI names some."""
    config = all_reduce.AllReduceBench(smallest="8", largest="4KiB", factor=512, quick=True, output=tmp_path)
    assert all_reduce.main(config) == 0
    found = json.loads((tmp_path / "all_reduce-2-ranks-float32.json").read_text())
    assert {row["size"] for row in found["rows"]} == {8, 4096}
    assert {"pycoll", "Gloo", report.CEILING} <= {row["who"] for row in found["rows"]}
    for measured in found["rows"]:
        assert measured["timing"]["median"] >= measured["timing"]["minimum"] > 0
        assert (measured["error"] is None) == (measured["who"] == report.CEILING)
    assert found["machine"]["cores"] > 0 and found["facts"]["pycoll"]["footprint"] > 0
    assert (tmp_path / "all_reduce-2-ranks-float32.png").stat().st_size > 10_000


def test_readme_shows_committed_results() -> None:
    """Its table is what benchmarks/summary.py makes of the run that it names."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- results: (.+) -->\n(.*)<!-- end of results -->", readme, re.DOTALL)
    assert found is not None
    shown = report.Report.from_json((ROOT / found[1]).read_text(encoding="utf-8"))
    assert found[2] == summary.markdown(shown)
    assert (ROOT / found[1]).with_suffix(".png").exists()
