"""What `pycoll train --plan` says is what runs do: every call, every byte, and the tensors that they hold."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from training import TINY, write_text

import pycoll
from pycoll.adam_state import FLOAT_STATE
from pycoll.models import GPT, PRESETS, GPTConfig
from pycoll.sharded import ShardedAdam
from pycoll.testing import Processes, Rank, run_threads
from pycoll.train import ConfigError, TrainConfig
from pycoll.train.main import check, main
from pycoll.train.measure import resident
from pycoll.train.parallel import Parallel
from pycoll.train.plan import RankPlan, make_plan
from pycoll.train.planned_part import make_parts
from pycoll.train.stop import StopRequest
from pycoll.train.trainer import Trainer

CONFIG = replace(
    TINY,
    dp=1,
    steps=3,
    batch_size=2,
    grad_accum=4,
    eval_every=2,
    checkpoint_every=2,
    sample_bytes=0,
    model=GPTConfig(vocab_size=257, context=8, n_layer=5, n_head=4, d_model=16),
)
DROPOUT = replace(CONFIG.model, dropout=0.1)
# ranks -> settings of runs, by name
RUNS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dp": {"dp": 2},
        "fused": {"dp": 2, "optimizer": "fused", "dtype": "bfloat16", "wire_dtype": "bfloat16", "grad_accum": 1},
        "int8": {"dp": 2, "wire_dtype": "int8", "dtype": "bfloat16"},
        "tp": {"tp": 2},
        "tp again": {"tp": 2, "checkpoint_activations": True, "model": DROPOUT},
        "sequence": {"tp": 2, "sequence_parallel": True, "dtype": "bfloat16"},
        "sequence again": {"tp": 2, "sequence_parallel": True, "checkpoint_activations": True},
        "dropout again": {"tp": 2, "sequence_parallel": True, "checkpoint_activations": True, "model": DROPOUT},
        "1f1b": {"pp": 2, "dtype": "bfloat16"},
        "gpipe": {"pp": 2, "schedule": "gpipe"},
        "interleaved": {"pp": 2, "schedule": "interleaved"},
    },
    4: {
        "dp and tp": {"dp": 2, "tp": 2, "model": DROPOUT},
        "tp and pp": {"tp": 2, "pp": 2, "sequence_parallel": True},
        "pp": {"pp": 4},
    },
}
NAMES = [name for runs in RUNS.values() for name in runs]
SECONDS = 100

pytestmark = pytest.mark.timeout(2 * SECONDS)


def config_of(name: str) -> TrainConfig:
    return replace(CONFIG, **next(runs[name] for runs in RUNS.values() if name in runs))


def measure(rank: Rank, names: list[str], text: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """A rank's part in these runs: what it has measured in each."""
    store = dist.FileStore(str(rank.folder / "store"), rank.world_size)
    dist.init_process_group("pycoll", store=store, rank=rank.rank, world_size=rank.world_size)
    found = {}
    for name in names:
        config = replace(config_of(name), data=text)
        trainer = Trainer(check(config, folder / name), folder / name)
        trainer.run(StopRequest())
        totals, steps = trainer.meter.totals, trainer.meter.steps
        found[name] = {
            "pp_rank": trainer.mesh.pp_rank,
            "steps": steps,
            "totals": {
                call: tuple(totals[call, what] / steps for what in ("calls", "bytes"))
                for call, what in totals
                if what == "calls"
            },
            "memory": held(trainer.parallel),
            "saved": most_saved(trainer),
        }
    dist.destroy_process_group()
    return found


def held(parallel: Parallel) -> dict[str, int]:
    """Bytes of the tensors that there are after a run."""
    assert parallel.buckets is not None
    buckets, optimizer = parallel.buckets.buckets, parallel.optimizer
    others = [b._gradients for b in buckets if b._gradients is not None and b._gradients is not b.wire]
    if isinstance(optimizer, ShardedAdam):
        parameters = [shard.memory for shard in optimizer._shards]
        states = [tensor for shard in optimizer._shards for tensor in shard.state.values()]
    else:
        parameters = [parameter.data for module in parallel.modules for parameter in module.parameters()]
        states = [state[name] for state in optimizer.state.values() for name in FLOAT_STATE if name in state]
    return {
        "parameters": sum(tensor.nbytes for tensor in parameters),
        "gradients that travel": sum(b.wire.nbytes + (0 if b.residual is None else b.residual.nbytes) for b in buckets),
        "gradients added up": sum(tensor.nbytes for tensor in others),
        "optimizer": sum(tensor.nbytes for tensor in states),
    }


class Saved:
    """What autograd keeps, each memory once; that of parameters is not counted."""

    def __init__(self, parallel: Parallel) -> None:
        parameters = [parameter for module in parallel.modules for parameter in module.parameters()]
        self._left_out = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._users: dict[int, int] = {}
        self.now = self.most = 0

    def keep(self, tensor: Tensor) -> "Kept":
        return Kept(self, tensor)

    def count(self, tensor: Tensor, more: int) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place in self._left_out or not tensor.is_floating_point():  # of which there are a few bytes for each token
            return
        before = self._users.get(place, 0)
        self._users[place] = before + more
        if before == 0 or before + more == 0:
            self.now += more * storage.nbytes()
            self.most = max(self.most, self.now)


class Kept:
    """A tensor that autograd keeps as long as this."""

    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self._saved, self.tensor = saved, tensor
        saved.count(tensor, 1)

    def __del__(self) -> None:
        self._saved.count(self.tensor, -1)


def most_saved(trainer: Trainer) -> int:
    """Bytes that autograd keeps at the peak of a step's passes."""
    parallel, batches = trainer.parallel, trainer.task.batches(trainer.seen, trainer.mesh)
    saved = Saved(parallel)
    unpack: Callable[[Kept], Tensor] = lambda kept: kept.tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(saved.keep, unpack):
        parallel.accumulate(batches)
    parallel.optimizer.zero_grad()
    return saved.most


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def measured(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Of each run, what its ranks have measured."""
    folder = tmp_path_factory.mktemp("runs")
    found: dict[str, list[dict[str, Any]]] = {}
    for world, runs in RUNS.items():
        with Processes(measure, world, [*runs], text, folder) as ranks:
            of_ranks = ranks.results(SECONDS)
        found |= {name: [of_rank[name] for of_rank in of_ranks] for name in runs}
    for name in found:
        found[name][0]["summary"] = json.loads((folder / name / "summary.json").read_text())
    return found


def plan_of(name: str, of_rank: dict[str, Any]) -> RankPlan:
    return make_plan(config_of(name))[of_rank["pp_rank"]]


@pytest.mark.parametrize("name", NAMES)
def test_planned_calls_are_those_of_every_step(name: str, measured: dict[str, list[dict[str, Any]]]) -> None:
    for of_rank in measured[name]:
        assert of_rank["steps"] == CONFIG.steps - 1
        assert of_rank["totals"] == plan_of(name, of_rank).totals()


@pytest.mark.parametrize("name", NAMES)
def test_planned_memory_is_that_of_the_tensors(name: str, measured: dict[str, list[dict[str, Any]]]) -> None:
    for of_rank in measured[name]:
        planned = plan_of(name, of_rank).memory
        assert of_rank["memory"] == {what: planned[what] for what in of_rank["memory"]}


@pytest.mark.parametrize("name", [name for name in NAMES if not config_of(name).checkpoint_activations])
def test_planned_activations_are_what_autograd_keeps(name: str, measured: dict[str, list[dict[str, Any]]]) -> None:
    """But those computed again, which it keeps where hooks do not see them."""
    for of_rank in measured[name]:
        assert of_rank["saved"] == plan_of(name, of_rank).memory["activations"]


@pytest.mark.parametrize("name", NAMES)
def test_summaries_tell_both(name: str, measured: dict[str, list[dict[str, Any]]]) -> None:
    summary = measured[name][0]["summary"]
    assert summary["time in communication"] > 0
    for what in ("calls", "bytes"):
        assert summary[f"{what} a step"] == summary[f"planned {what} a step"]
        assert sum(summary[f"{what} a step"].values()) > 0
    assert summary["memory"] > summary["planned memory"] > 0


@pytest.mark.parametrize("backend", ["gloo", "pycoll"])
def test_what_torch_averages_is_measured_alone(backend: str, text: Path, tmp_path: Path) -> None:
    config = replace(TINY, data=text, dp=1, optimizer="torch")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        Trainer(check(config, tmp_path), tmp_path).run(StopRequest())
    finally:
        dist.destroy_process_group()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert ("calls a step" in summary) == (backend == "pycoll")
    assert "planned memory" not in summary


def test_a_plan_makes_no_model() -> None:
    """124 million weights are 500 MB; on machines of 256 ranks nobody has to start them."""
    before = resident("VmHWM")
    config = TrainConfig(dp=8, tp=4, pp=8, grad_accum=16, dtype="bfloat16", model=PRESETS["gpt2"])
    plans = make_plan(config)
    assert resident("VmHWM") - before < 100e6
    tied = PRESETS["gpt2"].d_model * math.ceil(PRESETS["gpt2"].vocab_size / 4)
    assert len(plans) == 8
    assert plans[0].part.n_parameters > tied > plans[1].part.n_parameters


def test_planned_buckets_of_a_large_model_are_those_it_gets() -> None:
    config = TrainConfig(dp=1, model=replace(PRESETS["nano"], n_layer=4, d_model=448, n_head=7))
    model = GPT(config.model)
    assert (
        sum(param.numel() for param in model.parameters()) > 9e6
    )  # so many that buckets are larger than of a small one

    def sizes(comm: pycoll.Communicator) -> list[int]:
        return [bucket.size for bucket in pycoll.GradientBuckets(model.parameters(), comm).buckets]

    [buckets] = run_threads(sizes, 1)
    assert buckets == make_parts(config)[0].buckets


def test_plan_is_printed_and_no_rank_started(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pycoll.train.main.launch", lambda *_: pytest.fail("ranks were started"))
    out = tmp_path / "run"
    settings = "--dp 3 --tp 2 --pp 3 --grad-accum 3 --model.context 16"
    assert main([*settings.split(), "--data", str(text), "--out", str(out), "--plan"]) == 0
    printed = capsys.readouterr().out
    assert "18 ranks: 3 data x 2 tensor x 3 pipeline parallel" in printed
    for part in ("first stage", "stage 2", "last stage", "optimizer", "update_bucket", "from other ranks"):
        assert part in printed
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp": 3}, "a divisor of --model.n-head"),
        ({"backend": "gloo"}, "--plan knows GPTs and pycoll's optimizers"),
        ({"optimizer": "torch"}, "give --task language --optimizer sharded"),
        ({"task": "classify"}, "give --task language --optimizer sharded"),
    ],
)
def test_what_cannot_be_planned_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, plan=True, **settings)
