"""pycoll bench training: what it measures, how it tells right steps from wrong, its bars; bad options."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pycoll.benchmarks import report, timing, training, training_gpu, training_ways
from pycoll.benchmarks.step import StepReport
from pycoll.benchmarks.training import GAP, TrainingBench
from pycoll.benchmarks.training_ranks import (
    DATA,
    GLOO,
    GLOO_DDP,
    PYCOLL,
    PYCOLL_DDP,
    TENSOR,
    Case,
    SplitModel,
    WholeModel,
    ddp,
    parse_shape,
    sharded,
)
from pycoll.benchmarks.training_ways import NANO, OURS, SAME, SHARDED
from tensor_parallel_ranks import one_rank

from pycoll.models import GPTConfig

pytestmark = pytest.mark.timeout(100)

MACHINE = {"cpu": "a CPU", "cores": 2, "kernel": "6.1", "date": "2026-01-02T03:04:05"}


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainingBench(models=("64x1",), shapes=("128x1",), tokens=(16,), quick=True, output=tmp_path)
    assert training.main(config) == 0
    assert "FAILED" not in capsys.readouterr().out
    found = json.loads((tmp_path / "training-2-ranks.json").read_text())
    assert [(row["who"], row["call"]) for row in found["rows"]] == [
        (GLOO_DDP, "data 8 x 256"),
        (PYCOLL_DDP, "data 8 x 256"),
        (PYCOLL, "data 8 x 256"),
        (GLOO, "tensor 1 x 16"),
        (PYCOLL, "tensor 1 x 16"),
    ]
    noted = found["facts"]["training"]
    assert len(noted["gap"]) == len(noted["parts"]) == 5
    gaps: dict[str, float] = noted["gap"]
    assert all(0 <= gap < 1e-4 for gap in gaps.values()), gaps
    assert all(gap > 0 for key, gap in gaps.items() if key.startswith(f"{PYCOLL} ")), "compared with itself"
    assert all(seconds > 0 for parts in noted["parts"].values() for seconds in parts.values())
    assert (tmp_path / "training-2-ranks.png").stat().st_size > 5_000


def test_a_wrong_gradient_of_a_split_model_is_seen() -> None:
    with one_rank("pycoll"):
        contender = SplitModel(Case(TENSOR, "64x1", 1, 4), None)
        assert contender.gap(contender) < GAP
        with torch.no_grad():
            contender.model.embedding.position.weight *= 2
        assert contender.gap(contender) > GAP


def test_a_wrong_step_of_a_whole_model_is_seen() -> None:
    case = Case(DATA, "64x1", 2, 4)
    with one_rank("pycoll"):
        rival = WholeModel(case, partial(ddp, None))
        assert rival.gap(rival) == 0
        assert WholeModel(case, sharded).gap(rival) < GAP
        forgetful = WholeModel(case, sharded)
        forgetful._parts["clip"] = lambda: None
        assert forgetful.gap(rival) > GAP


Times = dict[tuple[str, Case], float]


def judged(seconds: Times, gap: float = 0.0) -> StepReport:
    keys = {place: place[1].key(place[0]) for place in seconds}
    gaps: dict[str, Any] = {" ".join(key): gap for key in keys.values()}
    found = StepReport("training", 2, "float32", MACHINE, {"training": {"gap": gaps}})
    found.rows = [report.Row(8, *keys[place], timing.summarize([value], 1), None) for place, value in seconds.items()]
    return found


def bars_by_case(found: report.Report) -> dict[str, bool | None]:
    return {bar.case: bar.passed for bar in training.bars_of(found)}


def test_bars_of_split_models() -> None:
    few = {shape: Case(TENSOR, shape, 1, 16) for shape in ("64x1", "128x1", "256x1")}
    many = Case(TENSOR, "64x1", 1, 512)
    seconds: Times = {(PYCOLL, case): 1.0 for case in (*few.values(), many)}
    seconds |= {(GLOO, few["64x1"]): 1.31, (GLOO, few["128x1"]): 1.29, (GLOO, many): 1.0}
    found = judged(seconds)
    assert bars_by_case(found) == {
        "64x1, tensor 1 x 16 tokens": True,
        "128x1, tensor 1 x 16 tokens": False,
        "256x1, tensor 1 x 16 tokens": None,
    }
    assert training.wrong(found) == []
    without = judged({(PYCOLL, many): 1.0, (GLOO, many): 2.0}, gap=float("nan"))
    assert bars_by_case(without) == {"tensor, 1 x 16 tokens": None}
    assert ["wrong gradients" in failure for failure in training.wrong(without)] == [True, True]


def test_bars_of_whole_models() -> None:
    nano, micro, large = Case(DATA, "nano", 8, 256), Case(DATA, "micro", 8, 256), Case(DATA, "30M", 1, 64)
    seconds = {(PYCOLL, case): 1.0 for case in (nano, micro)}
    seconds |= {(GLOO_DDP, nano): 1.01, (GLOO_DDP, micro): 0.99, (PYCOLL_DDP, micro): 2.0}
    rows = {"nano, data 8 x 256 tokens": True, "micro, data 8 x 256 tokens": False}
    assert bars_by_case(judged(seconds)) == {**rows, "data, 30M": None}
    slow = judged({**seconds, (PYCOLL, large): 1.0, (GLOO_DDP, large): 1.2}, gap=0.5)
    assert bars_by_case(slow) == {**rows, "30M, data 1 x 64 tokens": False}
    assert "nano, data 8 x 256: wrong weights, after a step 0.5 of its length" in training.wrong(slow)[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ranks": 1}, "2 ranks or more"),
        ({"ranks": 3}, "3 ranks do not divide the heads of 256x4"),
        ({"shapes": ("100x4",)}, "'100x4' is no shape"),
        ({"models": ("giant",)}, "'giant' is no shape"),
        ({"kinds": ()}, "nothing is measured"),
        ({"kinds": ("tensor",), "tokens": ()}, "nothing is measured"),
        ({"tokens": (0,)}, "nothing is measured"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert training.main(TrainingBench(output=tmp_path, **options)) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_three_ranks_train_whole_models() -> None:
    assert [case.model for case in training.cases_of(TrainingBench(ranks=3, kinds=("data",)))] == [*training.MODELS]


def test_shapes() -> None:
    assert parse_shape("512x4") == (512, 4)
    for text in ("512", "x4", "0x4", "64x0", "64 x 1", "-64x1"):
        with pytest.raises(ValueError, match="is no shape"):
            parse_shape(text)


# pycoll bench training --device cuda

SETTING = training_ways.Setting(
    torch.device("cpu"), "a GPU", GPTConfig(vocab_size=64, context=8, n_layer=1, n_head=2, d_model=16), 2, False
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model on the CPU in place of GPT-2 on a GPU."""
    monkeypatch.setattr(training_gpu, "find_setting", lambda: SETTING)


@pytest.mark.usefixtures("gpu")
def test_a_short_run_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert training.main(TrainingBench(device="cuda", quick=True, output=tmp_path)) == 0
    said = capsys.readouterr().out
    assert "at least 1.1 x nanoGPT's step" in said and "FAILED" not in said
    flops = 6 * (12 * 16**2 + 64 * 16) + 12 * 16 * 8
    assert f"MFU: tokens/s x {flops:,} FLOP a token" in said
    found = json.loads((tmp_path / "training-gpu.json").read_text())
    assert [row["who"] for row in found["rows"]] == [NANO, OURS, SHARDED, SAME]
    for row in found["rows"]:
        assert row["tokens_per_s"] == pytest.approx(16 / row["timing"]["median"])
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * flops / found["peak"])
        assert row["x_nanogpt"] == pytest.approx(found["rows"][0]["timing"]["median"] / row["timing"]["median"])
        assert row["loss"] == pytest.approx(found["rows"][0]["loss"], abs=0.01)
    assert found["failures"] == found["left_out"] == []


def no_step(module: torch.nn.Module) -> training_ways.Trained:
    """Learns nothing."""
    return module, lambda: None, torch.optim.SGD(module.parameters(), 0.0)


def no_memory(module: torch.nn.Module) -> training_ways.Trained:
    raise torch.OutOfMemoryError("none is left")


@pytest.mark.usefixtures("gpu")
def test_what_goes_wrong_on_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ways = {NANO: training_ways.WAYS[NANO]}
    ways |= {who: training_ways.Way(torch.bfloat16, how) for who, how in ((OURS, no_step), (SAME, no_memory))}
    monkeypatch.setattr(training_gpu, "WAYS", ways)
    assert training_gpu.main(training_gpu.GpuTrainingBench(quick=True, output=tmp_path)) == 1
    found = json.loads((tmp_path / "training-gpu.json").read_text())
    assert [row["who"] for row in found["rows"]] == [NANO, OURS]
    wrong, failed = found["failures"]
    assert wrong.startswith(f"{OURS}: wrong loss") and failed == f"{SAME}: OutOfMemoryError: none is left"
    late = training_gpu.GpuTrainingBench(quick=True, check=True, output=tmp_path, seconds=-1.0)
    assert training_gpu.main(late) == 1, "the bar was not measured"
    assert len(json.loads((tmp_path / "training-gpu.json").read_text())["left_out"]) == 3


def test_no_gpu_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training_gpu.main(training_gpu.GpuTrainingBench(output=tmp_path)) == 2
    assert capsys.readouterr().err == "pycoll bench training: there is no CUDA GPU\n"


def test_batches_fit_in_the_memory_that_is_free() -> None:
    assert [training_gpu.fitting_batch(gb * 10**9) for gb in (140, 34, 30, 12)] == [16, 16, 8, 1]
    with pytest.raises(ValueError, match=r"8.0 GB of the GPU's memory are free: a step takes 12 or more"):
        training_gpu.fitting_batch(8 * 10**9)


def test_make_gpu_can_call_it_without_tyro() -> None:
    code = "import sys; sys.modules['tyro'] = None; import pycoll.benchmarks.training_gpu"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
