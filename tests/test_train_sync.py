"""`pycoll train --sync`: ranks that do not meet at every step learn, end together, stop together, and resume."""

import json
import signal
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from training import SECONDS, TINY, differing, digest, train_alone, train_here, weights_here, write_text

from pycoll import checkpoint
from pycoll.errors import Error
from pycoll.testing import Processes, Rank
from pycoll.train import ConfigError, TrainConfig
from pycoll.train.main import check
from pycoll.train.stop import StopRequest
from pycoll.train.trainer import Trainer

STEPS, HALF = 24, "checkpoint-00000012.safetensors"
CONFIG = replace(TINY, steps=STEPS, lr=1e-2, every=4, eval_every=8, checkpoint_every=12, keep=9, sample_bytes=0)
WAYS: dict[str, dict[str, Any]] = {
    "step": {"optimizer": "fused"},
    "local": {"sync": "local"},
    "diloco": {"sync": "diloco"},
    "diloco-int8": {"sync": "diloco", "wire_dtype": "int8"},
    "async": {"sync": "async"},
    "local-float16": {"sync": "local", "dtype": "float16"},
    "diloco-bfloat16": {"sync": "diloco", "dtype": "bfloat16"},
    "async-bfloat16": {"sync": "async", "dtype": "bfloat16"},
}
LOOSE = 1e6
"""No gradient is so long that it would be clipped."""
PAIRS = {
    "async of staleness 0": {"sync": "async", "staleness": 0, "clip": LOOSE},
    "step without clipping": {"optimizer": "fused", "clip": LOOSE},
}
UNEVEN = "each rank scales its loss otherwise"
EXACT = [*(name for name in WAYS if not name.startswith("async")), "async of staleness 0", UNEVEN]
"""What two ranks do the same way each time."""


@dataclass(frozen=True)
class Seen:
    """What one of two ranks has seen.

    Attributes:
        digests: of the weights at the end of each run.
        stopped: the step after which each run ended, of which rank 1 alone was asked to stop.
        servers: threads that are left of them at the end.
    """

    digests: dict[str, str]
    stopped: dict[str, int]
    servers: list[str]


def join(rank: Rank) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(rank.folder / "store"), rank.world_size)
    dist.init_process_group("pycoll", store=store, rank=rank.rank, world_size=rank.world_size)


def keep_moments(config: TrainConfig, out: Path) -> None:
    """A rank for which a run of another kind, which gradients of 8 bits have left something, has no moments."""
    trainer = Trainer(check(config, out), out)
    assert config.resume is not None
    loaded = trainer.parallel.optimizer.state_dict()["state"]
    trainer.parallel.take_up(checkpoint.Tensors(config.resume), {"residual.0": torch.ones(1024)}, 12)
    kept = trainer.parallel.optimizer.state_dict()["state"]
    assert len(loaded) > 3 and all(differing(kept[place], values) == [] for place, values in loaded.items())


def train_every_way(rank: Rank, config: TrainConfig, folder: Path) -> Seen:
    join(rank)
    digests = {name: digest(train_here(replace(config, **way), folder / name)) for name, way in (WAYS | PAIRS).items()}
    uneven = replace(config, sync="local", dtype="float16")
    trainer = Trainer(check(uneven, folder / UNEVEN), folder / UNEVEN)
    scaler = trainer.parallel.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0 ** (18 + rank.rank), "growth_interval": 3})
    trainer.run(StopRequest())
    digests[UNEVEN] = digest(weights_here(trainer))
    for name in EXACT:
        again = replace(config, **(WAYS | PAIRS | {UNEVEN: WAYS["local-float16"]})[name], resume=folder / name / HALF)
        digests[f"{name}, resumed"] = digest(train_here(again, rank.folder / name))
    keep_moments(replace(config, sync="local", resume=folder / "local" / HALF), rank.folder / "kept")
    stopped = {}
    for sync in ("local", "async"):
        out = folder / f"stopped {sync}"
        trainer = Trainer(check(replace(config, sync=sync), out), out)
        trainer.run(StopRequest(signal.SIGTERM if rank.rank == 1 else None))
        stopped[sync] = trainer.done
    dist.destroy_process_group()
    return Seen(digests, stopped, servers())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return replace(CONFIG, data=write_text(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run of two ranks for each of WAYS and PAIRS."""
    return tmp_path_factory.mktemp("sync")


@pytest.fixture(scope="module")
def seen(config: TrainConfig, runs: Path) -> list[Seen]:
    with Processes(train_every_way, 2, config, runs) as ranks:
        return ranks.results(SECONDS)


@pytest.mark.parametrize("name", WAYS)
def test_ranks_learn_and_end_with_the_weights_that_are_saved(name: str, seen: list[Seen], runs: Path) -> None:
    summary = json.loads((runs / name / "summary.json").read_text())
    assert summary["final validation loss"] < summary["first training loss"] - 1.0
    saved = load_file(checkpoint.find(runs / name))
    weights = {key.removeprefix("model."): value for key, value in saved.items() if key.startswith("model.")}
    assert [each.digests[name] for each in seen] == [digest(weights)] * 2


def test_each_way_ends_otherwise(seen: list[Seen]) -> None:
    """Else a setting would have been lost on the way."""
    assert len({seen[0].digests[name] for name in WAYS}) == len(WAYS)


def test_async_without_staleness_is_data_parallel_training(seen: list[Seen]) -> None:
    assert len({each.digests[name] for each in seen for name in PAIRS}) == 1


@pytest.mark.parametrize("name", EXACT)
def test_ranks_resume_bit_for_bit(name: str, seen: list[Seen]) -> None:
    """Also those with moments, and what int8 has rounded away, of their own."""
    assert {each.digests[f"{name}, resumed"] for each in seen} == {each.digests[name] for each in seen}


def test_ranks_stop_together_where_they_meet(seen: list[Seen], runs: Path) -> None:
    assert [each.stopped for each in seen] == [{"local": 4, "async": 8}] * 2
    for sync, step in seen[0].stopped.items():
        assert checkpoint.read_header(checkpoint.find(runs / f"stopped {sync}")).step == step


def servers() -> list[str]:
    """Threads of this process that serve weights."""
    return [thread.name for thread in threading.enumerate() if "pycoll server" in thread.name]


def test_no_server_is_left(seen: list[Seen]) -> None:
    assert [each.servers for each in seen] == [[], []]


def test_no_server_is_left_of_a_run_that_fails(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"step \d+ failed \(loss .*nan"):
        train_alone(replace(config, sync="async", lr=1e30, clip=LOOSE), tmp_path)
    assert servers() == []


@pytest.mark.parametrize("name", [name for name in WAYS if name != "step"])
def test_a_rank_resumes_bit_for_bit(name: str, config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, **WAYS[name])
    straight = train_alone(config, tmp_path / "straight")
    half = tmp_path / "straight" / HALF
    assert differing(train_alone(replace(config, resume=half), tmp_path / "resumed"), straight) == []
    kept = {name.split(".")[0] + name[-9:] for name in load_file(half) if name.startswith(("outer.", "own."))}
    assert kept == {"diloco": {"outer.momentum"}, "diloco-int8": {"outer.momentum", "own.residual"}}.get(
        name.removesuffix("-bfloat16"), set()
    )


def test_looking_more_often_changes_nothing(config: TrainConfig, tmp_path: Path) -> None:
    """Also where a run goes on from between two meetings."""
    train_alone(replace(config, steps=6), tmp_path / "first")
    config = replace(config, sync="diloco", eval_every=STEPS, checkpoint_every=STEPS)
    config = replace(config, resume=checkpoint.find(tmp_path / "first"))
    seldom = train_alone(config, tmp_path / "seldom")
    assert differing(train_alone(replace(config, eval_every=4, checkpoint_every=4), tmp_path / "often"), seldom) == []


@pytest.mark.parametrize("name", ["local", "diloco-int8", "async", "diloco-bfloat16"])
def test_runs_go_from_sync_to_sync(
    name: str, seen: list[Seen], config: TrainConfig, runs: Path, tmp_path: Path
) -> None:
    """With one step to go, of one rank, all ways but DiLoCo's outer step are one."""
    way, dtype = WAYS[name], WAYS[name].get("dtype", "float32")
    one = {"steps": 13, "clip": LOOSE, "dtype": dtype}
    by_step = train_alone(replace(config, resume=runs / name / HALF, **one), tmp_path / "by step")
    last = load_file(checkpoint.find(tmp_path / "by step"))
    assert not any(key.startswith("outer.") for key in last)
    assert not any(key.endswith(("momentum", "residual", "anchor")) for key in last), "nothing of DiLoCo's is kept"
    by_local = train_alone(replace(config, resume=runs / name / HALF, sync="local", **one), tmp_path / "by local")
    by_async = train_alone(replace(config, resume=runs / name / HALF, sync="async", **one), tmp_path / "by async")
    assert differing(by_local, by_step) == differing(by_async, by_step) == []
    if dtype == "float32":  # and back
        back = replace(config, resume=checkpoint.find(tmp_path / "by step"), **way)
        assert differing(train_alone(back, tmp_path / "back"), by_step), "it goes on"
        summary = json.loads((tmp_path / "back" / "summary.json").read_text())
        assert summary["final validation loss"] < summary["first training loss"] - 1.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sync": "local", "tp": 2}, "--tp is 2: give 1, or another --sync than local"),
        ({"sync": "async", "pp": 2}, "--pp is 2: give 1, or another --sync than async"),
        ({"sync": "diloco", "backend": "gloo"}, "--backend is gloo: give pycoll, or another --sync than diloco"),
        ({"sync": "local", "optimizer": "sharded"}, "--optimizer is sharded: give fused, or another --sync"),
        ({"sync": "async", "optimizer": "torch"}, "--optimizer is torch: give fused, or another --sync"),
        ({"sync": "async", "dtype": "float16"}, "--dtype is float16: give float32, or another --sync than async"),
        ({"sync": "local", "wire_dtype": "int8"}, "--wire-dtype is int8: give float32, or another --sync than local"),
        ({"sync": "async", "wire_dtype": "bfloat16"}, "--wire-dtype is bfloat16: give float32, or another --sync"),
        ({"sync": "local", "task": "classify"}, "--task is classify: give language, or another --sync than local"),
        ({"sync": "local", "eval_every": 75}, r"--eval-every is 75: give a multiple of --every \(50\), so that"),
        ({"sync": "diloco", "checkpoint_every": 99}, r"--checkpoint-every is 99: give a multiple of --every \(50\)"),
        ({"every": 0}, "--every is 0: give more than 0"),
        ({"staleness": -1}, "--staleness is -1: give at least 0"),
    ],
)
def test_what_does_not_go_together_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig(**settings)


def test_sync_chooses_the_optimizer() -> None:
    assert {TrainConfig(sync=sync).updater for sync in ("local", "diloco", "async")} == {"fused"}  # type: ignore[arg-type]
    assert TrainConfig(sync="local", optimizer="fused", dtype="float16").updater == "fused"
    assert TrainConfig(sync="async", eval_every=75).updater == "fused"
