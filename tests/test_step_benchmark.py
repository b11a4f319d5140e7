"""pycoll bench step: what it measures, how it tells right parameters from wrong, its bars, its ceiling; bad options."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pycoll.benchmarks import memory, report, step, step_models, step_ranks, timing
from pycoll.benchmarks.step import StepBench, StepReport
from pycoll.benchmarks.step_ranks import CEILING, DEEPSPEED, FUSED, GLOO_DDP, PYCOLL_DDP, SHARDED, Workload

pytestmark = pytest.mark.timeout(100)

MACHINE = {"cpu": "a CPU", "cores": 2, "kernel": "6.1", "date": "2026-01-02T03:04:05"}


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = StepBench(parameters=2**20, tensors=6, quick=True, output=tmp_path)
    assert step.main(config) == 0
    said = capsys.readouterr().out
    assert "FAILED" not in said
    found = json.loads((tmp_path / "step-2-ranks-float32.json").read_text())
    noted, rows = found["facts"]["step"], {row["who"]: row for row in found["rows"]}
    everybody = {*step_ranks.contenders(0, dist.group.WORLD)}
    assert {*rows} | {DEEPSPEED} == everybody and all(row["timing"]["median"] > 0 for row in rows.values())
    assert DEEPSPEED in rows or f"{DEEPSPEED} default private step at 1 MiB: not installed" in said
    assert noted["state_bytes"][FUSED] == noted["state_bytes"][GLOO_DDP] == 2 * 4 * 2**18
    assert noted["state_bytes"][SHARDED["float32"]] == pytest.approx(4 * 2**18, rel=0.02)
    assert {*noted["parts"]} == {*rows} and noted["distance"][CEILING] is None
    assert 0 < noted["distance"][GLOO_DDP] < 1e-3 and noted["distance"][SHARDED["int8"]] < 0.1
    assert (tmp_path / "step-2-ranks-float32.png").stat().st_size > 10_000


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    """A default group of pycoll, with this rank alone; the group over Gloo."""
    dist.init_process_group("pycoll", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.new_group(backend="gloo")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contenders_make_the_same_step(
    dtype: torch.dtype, alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = Workload(5000, 6, dtype, 0, alone)
    found = report.Report("step", 1, str(dtype).removeprefix("torch."), MACHINE, {"step": {"distance": {}}})
    for name, make in step_ranks.contenders(0, alone).items():
        if name in (step_ranks.ALONE, CEILING, step_ranks.PACKED_CEILING, DEEPSPEED):
            continue
        trainer = make(workload.grads)
        found.facts["step"]["distance"][name] = workload.distance(trainer)
        found.rows.append(report.Row(8, name, "default", "private", "step", timing.summarize([1.0], 1), None))
        exact = 4 * 5000 * (3 if dtype == torch.bfloat16 else 2)
        assert exact <= trainer.state_bytes() <= exact * (1.3 if name in SHARDED.values() else 1)
    assert step.wrong(found) == []
    unclipped = step_models.fused(workload.grads)
    unclipped.clip = step_models.nothing
    found.facts["step"]["distance"] = {FUSED: workload.distance(unclipped)}
    assert len(step.wrong(found)) == 1
    # As if the ranks had not averaged: what another rank's gradients make of the parameters.
    other = Workload(5000, 6, dtype, 1, alone)
    monkeypatch.setattr(workload, "restore", other.restore)
    found.facts["step"]["distance"] = {FUSED: workload.distance(step_models.fused(other.grads))}
    assert len(step.wrong(found)) == 1


def test_each_rank_has_gradients_of_its_own(alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Averaging them for the check leaves them as they are."""
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: x.mul_(2))
    first, second = (Workload(5000, 6, torch.float32, rank, alone) for rank in range(2))
    for workload in (first, second):
        workload.restore()
    expected = torch.randn(len(first.grads[0]), generator=torch.Generator().manual_seed(1))
    assert torch.equal(first.grads[0], expected) and not torch.equal(first.grads[0], second.grads[0])


def test_autograd_takes_gradients_as_they_are(alone: dist.ProcessGroup) -> None:
    workload = Workload(5000, 6, torch.float32, 0, alone)
    workload.restore()
    trainer = step_models.backward_alone(workload.grads)
    trainer.backward(trainer.forward())
    assert trainer.model is not None
    for param, grad in zip(trainer.model.weights, workload.grads, strict=True):
        assert param.grad is not None and param.grad.data_ptr() == grad.data_ptr()


def test_sizes_add_up() -> None:
    for parameters, tensors in ((1, 1), (100, 7), (2**20, 96), (97, 97)):
        found = step_models.sizes(parameters, tensors)
        assert sum(found) == parameters and len(found) == tensors and min(found) > 0


def test_the_ceiling_covers_all() -> None:
    count = 1000
    maps = [mmap.mmap(-1, memory.SLOT_BYTES + 8 * count) for _ in range(2)]
    floats = [torch.frombuffer(m, dtype=torch.float32, offset=memory.SLOT_BYTES) for m in maps]
    grads = [torch.full((600,), 2.0), torch.full((400,), 3.0)]
    for each in floats:
        each.fill_(1)
    for rank in range(2):
        trainer = step_ranks.Ceiling(maps, rank, count, packs=True).trainer(grads)
        assert len(list(step_ranks.steps_of(trainer))) == len(step_ranks.PARTS)
        assert trainer.state_bytes() == 4 * count
        assert torch.equal(floats[rank][:count], torch.cat(grads))
    for each in floats:
        assert torch.equal(each[count:], torch.zeros(count)), "each rank has written its shard of all parameters"


def judged(seconds: dict[str, float], state: dict[str, int]) -> list[bool | None]:
    found = StepReport("step", 2, "float32", MACHINE, {"step": {"state_bytes": state}})
    found.rows = [
        report.Row(8, who, "default", "private", "step", timing.summarize([value], 1), None)
        for who, value in seconds.items()
    ]
    return [bar.passed for bar in step.bars_of(found)]


def test_bars() -> None:
    own = SHARDED["float32"]
    seconds, state = {own: 1.0, GLOO_DDP: 5.1, PYCOLL_DDP: 1.6}, {own: 504, FUSED: 1000}
    assert judged(seconds, state) == [True] * 3
    assert judged({**seconds, GLOO_DDP + step_ranks.COPIES: 4.9}, state)[0] is False, "its faster setting counts"
    assert judged({**seconds, own: 1.1}, {**state, own: 506}) == [False] * 3
    assert judged({own: 1.0}, {own: 504}) == [None] * 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ranks": 1}, "2 ranks or more"),
        ({"parameters": 5, "tensors": 6}, "--tensors must be"),
        ({"parameters": 10**12}, "more than is free"),
    ],
)
def test_bad_options(options: dict[str, int], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(partial(StepBench, output=tmp_path)(**options)) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
