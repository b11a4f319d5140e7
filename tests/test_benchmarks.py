"""Tests of the benchmarks: sizes, statistics, checks of results, ceilings, reports, groups of ranks; a small run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pycoll.benchmarks import (
    adam,
    all_reduce,
    bars,
    ceiling_ranks,
    convergence,
    gpu,
    gpu_calls,
    gpu_ranks,
    gpu_report,
    local_group,
    mpi,
    overhead,
    plot,
    ranks,
    report,
    summary,
    tensors,
    timing,
    values,
)
from pycoll.benchmarks.adam_cases import BF16, CASES, SEQUENCE, STEP, Model, mixed_sequences, sequences
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
    if dtype != "float64":
        assert tensors.sum_error(result, world) == pytest.approx(values.sum_error(raw, world, dtype))
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


# On GPUs; what is measured there is a CPU's here


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [1, values.PERIOD, 3 * values.PERIOD - 1, 10_000])
def test_tensors_hold_the_same_values(dtype: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_CHUNK", 2 * values.PERIOD)
    x = torch.empty(count, dtype=getattr(torch, dtype))
    buffer = np.empty(count, values.storage(dtype))
    for rank in range(2):
        tensors.load_pattern(x, rank)
        values.load_pattern(buffer, rank, dtype)
        assert (x.view(torch.uint16) if dtype == "bfloat16" else x).numpy().tobytes() == buffer.tobytes()
    assert tensors.sum_error(x, 1) > 0.1, "rank 1's values are not rank 0's"
    tensors.load_pattern(x, 0)
    assert tensors.sum_error(x, 1) == 0
    x[-1] = float("nan")
    assert tensors.sum_error(x, 1) == float("inf")


GPU_RANK = """
import os, sys, time
import torch, torch.distributed as dist
import pycoll
from functools import partial
from pycoll.benchmarks import gpu_calls, ranks

rank, world_size = int(os.environ[ranks.RANK_VARIABLE]), int(os.environ[ranks.WORLD_VARIABLE])
if sys.argv[1] == "absent":
    raise SystemExit("it is not there")
comm = pycoll.Communicator(dist.FileStore(sys.argv[2], world_size), rank, world_size, timeout=30.0)

def allocate(count, dtype):
    return torch.empty(count, dtype=getattr(torch, dtype))

def refuse(count, dtype):
    if rank == 1 and dtype == "bfloat16":
        raise ValueError("no\\nroom")
    return allocate(count, dtype)

def watch(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

def into_another(x):  # as torch's one-shot
    return lambda: comm.all_reduce(x, out=torch.empty_like(x))

def wrong(x):
    return lambda: comm.all_reduce(x).add_(1)

def unsupported(x):
    return lambda: comm.all_reduce(x, algorithm="odd")

in_place = lambda x: partial(comm.all_reduce, x)
contenders = {
    "pycoll": {("pycoll", "auto", "private", "eager"): gpu_calls.Contender(allocate, in_place),
               ("pycoll", "auto", "symmetric", "eager"): gpu_calls.Contender(allocate, into_another),
               ("pycoll", "odd", "private", "eager"): gpu_calls.Contender(allocate, unsupported)},
    "NCCL": {("NCCL", "default", "private", "eager"): gpu_calls.Contender(refuse, in_place)},
    "wrong": {("wrong", "default", "private", "eager"): gpu_calls.Contender(allocate, wrong)},
}
gpu_calls.GpuRank(rank, world_size, contenders[sys.argv[1]], lambda: {"torch": torch.__version__}, watch).serve()
"""
SETTING = gpu_report.Setting(ranks=2, gpus=1, gpu="a GPU", free_bytes=2**34)


@pytest.fixture
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries of the benchmark are ranks on the CPU, by their names."""

    def launches(config: gpu.GpuBench, setting: gpu_report.Setting, folder: Path) -> list[tuple[Launch, int]]:
        return [
            (Launch(name, [sys.executable, "-c", GPU_RANK, name, str(folder / name)]), setting.ranks)
            for name in config.contenders
        ]

    monkeypatch.setattr(gpu, "find_setting", lambda config: SETTING)
    monkeypatch.setattr(gpu, "launches", launches)


@pytest.mark.usefixtures("without_gpus")
def test_a_small_run_on_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = gpu.GpuBench(
        smallest="8B", largest="1KiB", factor=128, contenders=("pycoll", "NCCL", "absent"), output=tmp_path
    )
    assert gpu.main(config) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["size"] for row in found["rows"]] == [8] * 3 + [1024] * 3 + [8] * 2 + [1024] * 2
    assert {row["memory"] for row in found["rows"] if row["who"] == "pycoll"} == {"private", "symmetric"}
    for row in found["rows"]:
        assert (row["ranks"], row["mode"]) == (2, "eager") and row["error"] < 0.01
        assert row["busbw"] == row["algbw"] == pytest.approx(row["size"] / row["seconds"])  # for two ranks
        assert (row["x_nccl"] is None) == (row["dtype"] == "bfloat16")
    assert found["left_out"] == [
        "absent: it is not there",
        found["left_out"][1],
        "NCCL default private eager at 8 B, 1 KiB: ValueError: no room",
    ]
    assert found["left_out"][1].startswith("pycoll odd private eager at 8 B, 1 KiB: UsageError: pycoll: ")
    assert found["machine"]["gpu"] == "a GPU" and found["facts"]["NCCL"]["torch"] == torch.__version__
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "Left out: absent: it is not there" in shown and "x NCCL" in shown


@pytest.mark.usefixtures("without_gpus")
def test_a_wrong_result_and_a_missing_pycoll_fail_the_run(tmp_path: Path) -> None:
    config = gpu.GpuBench(smallest="8B", largest="8B", dtypes=("float32",), output=tmp_path)
    config.contenders = ("pycoll", "wrong")  # type: ignore[assignment]
    assert gpu.main(config) == 1
    assert "wrong result" in json.loads((tmp_path / "gpu.json").read_text())["failures"][0]
    config.contenders = ("absent",)  # type: ignore[assignment]
    assert gpu.main(config) == 1


@pytest.mark.usefixtures("without_gpus")
def test_no_size_is_begun_late_or_without_room(tmp_path: Path) -> None:
    config = gpu.GpuBench(smallest="8B", largest="4GiB", factor=2**29, seconds=-1.0, output=tmp_path)
    config.contenders = ("pycoll",)
    found = gpu.measure(config, SETTING)
    assert found.left_out == ["8 B: -1 s were over before", "4 GiB: the tensors do not fit in the memory that is free"]


@pytest.mark.usefixtures("without_gpus")
def test_what_was_found_on_gpus_is_kept_after_each_size() -> None:
    """A kernel that hangs must not cost what was measured before."""
    kept: list[list[int]] = []
    config = gpu.GpuBench(smallest="8B", largest="64B", factor=8, dtypes=("float32",), contenders=("pycoll",))
    gpu.measure(config, SETTING, lambda found: kept.append([row.size for row in found.reports[0].rows]))
    assert kept == [[], [8, 8], [8, 8, 64, 64]]


@pytest.mark.usefixtures("without_gpus")
def test_no_plot_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr("pycoll.benchmarks.plot", raising=False)
    monkeypatch.setitem(sys.modules, "pycoll.benchmarks.plot", None)  # type: ignore[arg-type]
    config = gpu.GpuBench(smallest="8B", largest="8B", dtypes=("float32",), contenders=("pycoll",), output=tmp_path)
    assert gpu.main(config) == 0
    assert "no plot: " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_a_machine_without_gpus_is_told_so(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(gpu.GpuBench()) == 2
    assert capfd.readouterr().err == "pycoll bench gpu: there is no CUDA GPU\n"


@pytest.mark.parametrize(
    ("gpus", "wanted", "ranks", "share", "modes"),
    [
        (1, 0, 2, 2, ("eager",)),
        (1, 3, 3, 3, ("eager",)),
        (8, 0, 8, 1, ("eager", "graph")),
        (8, 2, 2, 1, ("eager", "graph")),
        (2, 4, 4, 2, ("eager",)),
        (2, 3, 3, 2, ("eager",)),
    ],
)
def test_ranks_share_a_gpu_where_there_are_too_few(
    gpus: int, wanted: int, ranks: int, share: int, modes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, gpus)
    setting = gpu.find_setting(gpu.GpuBench(ranks=wanted))
    assert (setting.ranks, setting.share, setting.shared, setting.modes) == (ranks, share, share > 1, modes)
    launched = gpu.launches(gpu.GpuBench(algorithms=("auto", "ring")), setting, Path("meet"))
    assert [(launch.name, count) for launch, count in launched] == [
        (name, 1 if peer == "copy" else ranks) for peer, name in gpu_report.NAMES.items()
    ]
    assert launched[0][0].command[-5:] == ["pycoll", "meet/pycoll", ",".join(modes), "auto,ring", str(share)]
    assert all(("NCCL_MULTI_RANK_GPU_ENABLE" in launch.environment) == (share > 1) for launch, _ in launched)
    assert set(gpu_ranks.RANKS) == set(gpu_report.NAMES) and set(modes) <= set(gpu_calls.MODES)


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: int, built: bool = True) -> None:
    """That this machine has GPUs, and that pycoll was built for them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**31))
    monkeypatch.setattr(gpu, "build_info", lambda: {"cuda": {"built": built, "reason": "there is no nvcc"}})


@pytest.mark.parametrize(
    ("config", "built", "message"),
    [
        (gpu.GpuBench(), False, "built without CUDA: there is no nvcc"),
        (gpu.GpuBench(ranks=1), True, "2 ranks or more"),
        (gpu.GpuBench(contenders=()), True, "at least one"),
        (gpu.GpuBench(smallest="1MiB", largest="1KiB"), True, "rise"),
    ],
)
def test_bad_options_on_gpus_are_explained(
    config: gpu.GpuBench,
    built: bool,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pretend(monkeypatch, 1, built)
    assert gpu.main(config) == 2
    assert message in capfd.readouterr().err


def test_tensors_of_all_ranks_on_a_gpu_must_fit() -> None:
    assert SETTING.fits(2**29) and not SETTING.fits(2**30)


def seat(share: int) -> gpu_ranks.Seat:
    return gpu_ranks.Seat(torch.distributed.HashStore(), 0, 2, ("eager",), ("auto",), share)


def test_old_nccl_takes_one_rank_a_gpu() -> None:
    with pytest.raises(SystemExit, match=r"NCCL 2\.28\.9 takes one rank a GPU: 2\.30 or newer takes more"):
        gpu_ranks._check_sharing(seat(share=2), (2, 28, 9))
    gpu_ranks._check_sharing(seat(share=2), (2, 30, 4))
    gpu_ranks._check_sharing(seat(share=1), (2, 28, 9))


@pytest.mark.parametrize("share", [1, 3])
def test_the_copy_moves_the_bytes_of_all_ranks_on_a_gpu(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[gpu_calls.Contender] = []
    monkeypatch.setattr(gpu_ranks.Seat, "serve", lambda _, contenders, facts: served.extend(contenders.values()))
    gpu_ranks.copy_rank(seat(share))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda count, dtype, device: empty(count, dtype=dtype))
    x = served[0].allocate(100, "float32")
    x[: x.numel() // 2], x[x.numel() // 2 :] = 1, 0
    served[0].bind(x)()
    assert int((x == 1).sum()) == x.numel() == 2 * 100 * share


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        ("CuPy's NCCL: 0 of 2 ranks started, exit codes [1]\nit is not there\n", "CuPy's NCCL: it is not there"),
        (
            "NCCL: 0 of 2 ranks started, exit codes [1]\nTraceback (most recent call last):\n  File x\n"
            "torch.distributed.DistBackendError: NCCL error: invalid usage\nncclInvalidUsage: This is a bug.\n[W] bye",
            "NCCL: torch.distributed.DistBackendError: NCCL error: invalid usage",
        ),
        (
            "torch symm_mem: ranks did not reply to ('time',) within 90 s",
            "torch symm_mem: ranks did not reply to ('time',)",
        ),
        ("pycoll", "pycoll: no reason given"),
    ],
)
def test_a_failure_is_told_in_a_line(failure: str, line: str) -> None:
    assert gpu_report.brief(failure).startswith(line) and "\n" not in gpu_report.brief(failure)


def run_on_gpus(dtype: str) -> report.Report:
    found = report.Report("gpu", 4, dtype, MACHINE)
    for mode, seconds in (("eager", 2e-5), ("graph", 1e-5)):
        found.rows += [
            row(MIB, seconds, "pycoll", "auto", call=mode),
            row(MIB, seconds / 2, "pycoll", "auto", "symmetric", mode),
            row(MIB, seconds * 3, "NCCL", call=mode),
            row(MIB, seconds / 4, report.CEILING, "copy", call=mode),
        ]
    return found


def test_the_table_of_gpus_compares_with_nccl_in_the_same_mode(tmp_path: Path) -> None:
    setting = gpu_report.Setting(4, 4, "a GPU", 2**34)
    found = gpu_report.Found(
        setting, [run_on_gpus("float32"), run_on_gpus("bfloat16")], ["torch symm_mem: no peer access"]
    )
    assert gpu_report.table(found).row_count == 16
    assert gpu_report.caption(found).plain == "Left out: torch symm_mem: no peer access"
    measured = json.loads(gpu_report.to_json(found))["rows"]
    ratios = {(r["memory"], r["mode"]): r["x_nccl"] for r in measured if r["who"] == "pycoll"}
    expected = {"private": 3, "symmetric": 6}
    assert ratios == {(m, mode): pytest.approx(expected[m]) for m in expected for mode in ("eager", "graph")}
    assert measured[0]["busbw"] == pytest.approx(1.5 * MIB / 2e-5)
    gpu_report.draw(found, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert gpu_report.succeeded(found)
    found.reports[0].failures.append("NCCL: gone")
    assert gpu_report.succeeded(found)
    found.reports[1].failures.append("pycoll: gone")
    assert not gpu_report.succeeded(found)


def test_ranks_on_one_gpu_have_fewer_sizes_for_forced_algorithms() -> None:
    config = local_group.LocalGroupBench(
        ranks=(2,), smallest="1KiB", largest="1MiB", dtypes=("float32",), algorithms=("auto", "ring"), forced_factor=16
    )
    cases = local_group.cases_of(config, 2**30)
    both, auto = ("auto", "ring"), ("auto",)
    sizes = zip([KIB, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB], [both, both, auto, both, auto, both], strict=True)
    assert cases == [(2, size, "float32", algorithms) for size, algorithms in sizes]
    assert [size for _, size, _, _ in local_group.cases_of(config, 4 * MIB)] == [size for _, size, _, _ in cases][:-1]
    config.algorithms = ("ring",)
    assert [size for _, size, _, _ in local_group.cases_of(config, 2**30)] == [KIB, 4 * KIB, 64 * KIB, MIB]


def test_readme_shows_committed_results() -> None:
    """Its tables are what benchmarks/summary.py makes of the runs that they name."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"<!-- results: (.+?) -->\n(.*?)<!-- end of results -->", readme, re.DOTALL)
    shown = [report.Report.from_json((ROOT / path).read_text(encoding="utf-8")) for path, _ in tables]
    assert [each.benchmark for each in shown] == ["all-reduce", "collectives", "step", "training"]
    assert [text for _, text in tables] == [summary.markdown(each) for each in shown]
    assert all((ROOT / path).with_suffix(".png").exists() for path, _ in tables)


def test_what_overhead_leaves_out_is_there() -> None:
    """The edits apply to the sources as they are, each once; else it would compare equals."""
    for edits in overhead.VARIANTS.values():
        for name in {name for name, _, _ in edits}:
            source = (ROOT / name).read_text()
            assert overhead.edited(source, name, edits) != source
    with pytest.raises(ValueError, match="has changed"):
        overhead.edited("other code", "a.h", [("a.h", "code of then", "")])


def test_adam_benchmark_runs_and_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = adam.AdamBench(parameters=8192, tensors=(1, 7), output=tmp_path, quick=True)
    assert adam.main(config) == 0
    found = json.loads((tmp_path / "adam-cpu.json").read_text())
    cases = {(row["case"], row["tensors"], row["who"]) for row in found["rows"]}
    everybody = ("pycoll", "torch fused", "torch foreach", "ceiling")
    wanted = {(STEP, n, who) for n in (1, 7) for who in everybody}
    wanted |= {(case, n, who) for case in (SEQUENCE, BF16) for n in (1, 7) for who in everybody[:2]}
    assert cases == wanted and all(row["timing"]["median"] > 0 for row in found["rows"])
    assert (tmp_path / "adam-cpu.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert all(who in shown for who in everybody)


def test_adam_contenders_make_the_same_step() -> None:
    for make in (sequences, mixed_sequences):
        results = []
        for who in ("pycoll", "torch fused"):
            contenders = {contender.who: contender for contender in make(3000, 3, "cpu")}
            contenders[who].prepare()
            contenders[who].run()
            run = contenders[who].run
            model = next(cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, Model))  # type: ignore[attr-defined]
            results.append([param.detach().float() for param in model.params])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2 if make is mixed_sequences else 1e-5, atol=1e-6)


def test_adam_bars() -> None:
    seconds = {"pycoll": 1.0, "torch fused": 2.3, "ceiling": 0.91}
    rows = [
        adam.Row(case, n, who, timing.summarize([value], 1))
        for case in CASES
        for n in (1, 200)
        for who, value in seconds.items()
    ]
    assert all(bar.passed for bar in adam.bars_of(rows)) and len(adam.bars_of(rows)) == 8
    slower = [row for row in rows if (row.case, row.who) != (BF16, "torch fused")]
    assert [bar.passed for bar in adam.bars_of(slower)].count(None) == 2
    slower += [adam.Row(BF16, 1, "torch fused", timing.summarize([2.1], 1))]
    assert [bar.passed for bar in adam.bars_of(slower)].count(False) == 1


def test_adam_refuses_bad_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert adam.main(adam.AdamBench(parameters=10, tensors=(11,), output=tmp_path)) == 2
    assert "--tensors" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert adam.main(adam.AdamBench(device="cuda", output=tmp_path)) == 2
        assert "no CUDA GPU" in capsys.readouterr().err


def found_losses(finals: dict[str, list[float]]) -> convergence.Found:
    """Runs that end with these losses, a seed each; other cases as the reference."""
    reference = finals[convergence.REFERENCE]
    return convergence.Found(
        [
            convergence.Run(case, seed, [5, 10], [loss + 1, loss], 0)
            for case in convergence.CASES
            for seed, loss in enumerate(finals.get(case, reference))
        ]
    )


def test_convergence_verdicts() -> None:
    """The reference's finals have the standard deviation 0.1, a difference of such means the standard error 0.0816."""
    near, far = "sharded, bf16", "sharded, fp32, int8 wire"
    found = found_losses({convergence.REFERENCE: [2.0, 2.1, 1.9], near: [2.1, 2.3, 2.0], far: [2.2, 2.3, 2.1]})
    verdicts = {each.case: each for each in found.verdicts()}
    assert verdicts[near].difference == pytest.approx(0.4 / 3)
    assert verdicts[near].deviations == pytest.approx(4 / 3)
    assert verdicts[near].errors == pytest.approx(4 / 3 / (2 / 3) ** 0.5)
    assert verdicts[near].paired == pytest.approx(0.1 / 3)
    assert verdicts[near].within_noise and not verdicts[far].within_noise
    assert [each.within_noise for each in verdicts.values()].count(True) == len(convergence.CASES) - 1


def test_convergence_trains_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = convergence.ConvergenceBench(steps=20, ranks=1, batch_size=1, output=tmp_path, quick=True)
    assert convergence.main(config) in (0, 1)
    found = json.loads((tmp_path / "convergence.json").read_text())
    assert {(run["case"], run["seed"]) for run in found["runs"]} == {(c, s) for c in convergence.CASES for s in (0, 1)}
    assert all(run["steps"] == [1] and len(run["losses"]) == 1 for run in found["runs"])
    assert (tmp_path / "convergence.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert all(case in shown for case in convergence.CASES)
    assert convergence.main(convergence.ConvergenceBench(seeds=1, output=tmp_path)) == 2
