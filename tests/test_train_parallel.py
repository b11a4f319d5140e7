"""The trainer's optimizers, dtypes and wire formats: they learn, agree, resume, and load one another's checkpoints."""

import contextlib
import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from training import SECONDS, TINY, differing, digest, train_alone, train_here, weights_here, write_text

import pycoll
from pycoll import checkpoint
from pycoll.errors import Error
from pycoll.testing import Processes, Rank
from pycoll.train import ConfigError, TrainConfig, state
from pycoll.train.main import check
from pycoll.train.stop import StopRequest
from pycoll.train.trainer import Trainer

OPTIMIZERS, DTYPES, WIRES = ("sharded", "fused", "torch"), ("float32", "bfloat16", "float16"), ("bfloat16", "int8")
WAYS = [(o, d, "float32") for o in OPTIMIZERS for d in DTYPES] + [(o, "float32", w) for o in OPTIMIZERS for w in WIRES]
"""Optimizer, dtype, wire_dtype."""
STEPS, HALF = 8, "checkpoint-00000004.safetensors"
CONFIG = replace(TINY, steps=STEPS, checkpoint_every=STEPS // 2, lr=1e-2, sample_bytes=0)
Way = tuple[str, str, str]


@dataclass(frozen=True)
class Trained:
    """A run of two ranks, as one of them saw it."""

    digest: str
    """Of the weights."""
    differing: list[str]
    """Weights that another run ends with, resumed halfway."""


def way_of(config: TrainConfig, way: Way) -> TrainConfig:
    optimizer, dtype, wire = way
    return replace(config, optimizer=optimizer, dtype=dtype, wire_dtype=wire)  # type: ignore[arg-type]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint."""
    return {name.removeprefix("model."): x for name, x in load_file(path).items() if name.startswith("model.")}


def train_every_way(rank: Rank, config: TrainConfig, folder: Path) -> dict[Way, Trained]:
    torch.set_num_threads(1)
    store = dist.FileStore(str(rank.folder / "store"), rank.world_size)
    dist.init_process_group("pycoll", store=store, rank=rank.rank, world_size=rank.world_size)
    trained = {}
    for way in WAYS:
        out, resume = folder / "-".join(way), folder / "-".join(way) / HALF
        straight = train_here(way_of(config, way), out)
        resumed = train_here(way_of(replace(config, resume=resume), way), rank.folder / "-".join(way))
        trained[way] = Trained(digest(straight), differing(resumed, straight))
    dist.destroy_process_group()
    return trained


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run for each of WAYS."""
    return tmp_path_factory.mktemp("ways")


@pytest.fixture(scope="module")
def trained(text: Path, runs: Path) -> list[dict[Way, Trained]]:
    """Each way to train, by two ranks."""
    with Processes(train_every_way, 2, replace(CONFIG, data=text), runs) as ranks:
        return ranks.results(SECONDS)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_every_way_learns(way: Way, trained: list[dict[Way, Trained]], runs: Path) -> None:
    summary = json.loads((runs / "-".join(way) / "summary.json").read_text())
    assert summary["final validation loss"] < summary["first training loss"] - 1.0
    reference = json.loads((runs / "torch-float32-float32" / "summary.json").read_text())
    assert summary["final validation loss"] == pytest.approx(reference["final validation loss"], abs=0.05)
    assert (0 <= summary.get("waiting for gradients", -1) < 1) == (way[0] == "torch")
    weights = weights_of(checkpoint.find(runs / "-".join(way)))
    assert [each[way].digest for each in trained] == [digest(weights)] * 2, "all ranks have the weights that are saved"
    expected = getattr(torch, way[1]) if way[0] != "torch" else torch.float32
    assert {tensor.dtype for tensor in weights.values()} == {expected}


@pytest.mark.parametrize("way", [way[1:] for way in WAYS if way[0] == "fused"], ids="-".join)
def test_sharded_and_fused_end_with_the_same_bits(way: tuple[str, str], trained: list[dict[Way, Trained]]) -> None:
    for each in trained:
        assert each[("sharded", *way)].digest == each[("fused", *way)].digest


def test_what_scaled_gradients_have_left_goes_to_scaled_ones_alone(text: Path, tmp_path: Path) -> None:
    """In 8 bits, and scaled up by 65536, what rounding takes is larger than gradients that are not."""
    config = way_of(replace(CONFIG, data=text), ("fused", "float16", "int8"))
    straight = train_alone(config, tmp_path / "straight")
    again = replace(config, resume=tmp_path / "straight" / HALF)
    assert differing(train_alone(again, tmp_path / "again"), straight) == []
    left = {}
    for dtype in ("float16", "bfloat16", "float32"):
        dist.init_process_group("pycoll", store=dist.HashStore(), rank=0, world_size=1)
        trainer = Trainer(check(replace(again, dtype=dtype), tmp_path / dtype), tmp_path / dtype)
        left[dtype] = max(float(residual.abs().max()) for residual in trainer.parallel.own_state().values())
        dist.destroy_process_group()
    assert left["float16"] > 1 and left["bfloat16"] == left["float32"] == 0


def test_resumed_runs_end_where_straight_ones_did(trained: list[dict[Way, Trained]]) -> None:
    """Those with int8 also need what each rank had rounded away."""
    assert [way for each in trained for way in WAYS if each[way].differing] == []


@pytest.mark.parametrize("resumed_by", OPTIMIZERS)
def test_other_optimizers_and_world_sizes_take_it_up(
    resumed_by: str, trained: list[dict[Way, Trained]], text: Path, runs: Path, tmp_path: Path
) -> None:
    """A rank alone draws the windows of two with half its batch."""
    way = ("sharded", "float32", "float32")
    config = replace(CONFIG, data=text, batch_size=4, resume=runs / "-".join(way) / HALF)
    weights = train_alone(way_of(config, (resumed_by, *way[1:])), tmp_path)
    for name, straight in weights_of(checkpoint.find(runs / "-".join(way))).items():
        torch.testing.assert_close(weights[name], straight, rtol=1e-3, atol=1e-4)


def saved_again(config: TrainConfig, folder: Path) -> dict[str, torch.Tensor]:
    """What a rank alone writes after it has loaded `config.resume`."""
    dist.init_process_group("pycoll", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trainer = Trainer(check(config, folder), folder)
        assert config.resume is not None
        header = checkpoint.read_header(config.resume)
        tensors = state.gather(trainer.parallel.modules, trainer.parallel.optimizer, trainer.mesh)
        return load_file(checkpoint.save(folder, header, tensors))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (("sharded", "float32"), ("sharded", "float32")),
        (("sharded", "float32"), ("fused", "float32")),
        (("sharded", "float32"), ("torch", "float32")),
        (("torch", "float32"), ("sharded", "float32")),
        (("torch", "float32"), ("torch", "bfloat16")),
        (("sharded", "bfloat16"), ("sharded", "bfloat16")),
        (("sharded", "bfloat16"), ("fused", "bfloat16")),
        (("fused", "float16"), ("sharded", "float16")),
    ],
)
def test_checkpoints_keep_their_bits_from_hand_to_hand(
    source: tuple[str, str],
    target: tuple[str, str],
    trained: list[dict[Way, Trained]],
    text: Path,
    runs: Path,
    tmp_path: Path,
) -> None:
    path = runs / "-".join((*source, "float32")) / HALF
    config = way_of(replace(CONFIG, data=text, resume=path), (*target, "float32"))
    assert differing(saved_again(config, tmp_path), load_file(path)) == []


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_other_dtypes_go_on_from_the_masters(
    optimizer: str, trained: list[dict[Way, Trained]], text: Path, runs: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, data=text, resume=runs / "sharded-bfloat16-float32" / HALF)
    before = load_file(runs / "sharded-bfloat16-float32" / HALF)
    whole = saved_again(way_of(config, (optimizer, "float32", "float32")), tmp_path / "whole")
    assert not any("master" in name for name in whole)
    names = [name.removeprefix("model.") for name in whole if name.startswith("model.")]
    for name in names:
        assert torch.equal(whole[f"model.{name}"], before[f"optimizer.{name}.master_param"])
    resume = next((tmp_path / "whole").glob("*.safetensors"))
    config = replace(config, resume=resume)
    again = saved_again(way_of(config, ("fused", "float16", "float32")), tmp_path / "again")
    for name in names:
        assert torch.equal(again[f"optimizer.{name}.master_param"], whole[f"model.{name}"])
        assert torch.equal(again[f"model.{name}"], whole[f"model.{name}"].half())


class Scaled:
    """A run in float16 by one rank whose loss is scaled by 2 ** `exponent` at first."""

    def __init__(self, config: TrainConfig, out: Path, exponent: int) -> None:
        dist.init_process_group("pycoll", store=dist.HashStore(), rank=0, world_size=1)
        self.trainer = Trainer(check(config, out), out)
        scaler = self.trainer.parallel.scaler
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**exponent, "growth_interval": 4})

    def __enter__(self) -> Trainer:
        return self.trainer

    def __exit__(self, *error: object) -> None:
        dist.destroy_process_group()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_overflow_skips_steps_and_the_scale_is_saved(optimizer: str, text: Path, tmp_path: Path) -> None:
    config = way_of(replace(CONFIG, data=text), (optimizer, "float16", "float32"))
    with Scaled(config, tmp_path / "straight", 22) as trainer:
        fresh = weights_here(trainer)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.run(StopRequest())
        straight = weights_here(trainer)
        scaler = trainer.parallel.scaler.state_dict()
    assert differing(straight, fresh), "some steps were taken"
    skipped = json.loads((tmp_path / "straight" / "summary.json").read_text())["skipped steps"]
    assert 0 < skipped < STEPS - 2 and scaler["scale"] < 2.0**22
    assert checkpoint.read_header(checkpoint.find(tmp_path / "straight")).scaler == scaler
    halfway = tmp_path / "straight" / HALF
    resumed = train_alone(replace(config, resume=halfway), tmp_path / "resumed")
    assert checkpoint.read_header(checkpoint.find(tmp_path / "resumed")).scaler == scaler
    assert differing(resumed, straight) == []


@pytest.mark.parametrize(("exponent", "goes_on"), [(4, True), (-1, False)])
def test_overflow_of_what_is_not_scaled_up_ends_the_run(
    exponent: int, goes_on: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = way_of(replace(CONFIG, data=text, steps=1), ("fused", "float16", "float32"))
    with Scaled(config, tmp_path, exponent) as trainer:
        monkeypatch.setattr(trainer.parallel, "step", lambda max_norm: math.inf)
        if goes_on:
            trainer.run(StopRequest())
            assert trainer.skipped == 1
        else:
            with pytest.raises(Error, match=r"step 1 failed \(loss 5.*, norm of the gradient inf\)"):
                trainer.run(StopRequest())
            assert checkpoint.list_checkpoints(tmp_path) == []


def test_the_backend_chooses_the_optimizer() -> None:
    assert (TrainConfig().updater, TrainConfig(backend="gloo").updater) == ("sharded", "torch")
    assert TrainConfig(backend="gloo", optimizer="torch", dtype="bfloat16").updater == "torch"
    assert TrainConfig(optimizer="fused").updater == "fused"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": "sharded"}, "--optimizer is sharded: give torch, since --backend gloo is what others do, or"),
        ({"optimizer": "fused"}, "--optimizer is fused: give torch, .* or --backend pycoll"),
        ({"wire_dtype": "int8"}, "--wire-dtype is int8: give float32, .* or --backend pycoll"),
        ({"wire_dtype": "bfloat16", "optimizer": "torch"}, "--wire-dtype is bfloat16: give float32"),
    ],
)
def test_gloo_carries_what_torch_does_by_itself(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig(backend="gloo", **settings)


def test_settings_of_a_run_without_them_are_todays_defaults() -> None:
    """A run that was begun before there was a choice."""
    names = ("optimizer", "dtype", "wire_dtype")
    values = {name: value for name, value in TINY.to_dict().items() if name not in names}
    assert TrainConfig.from_dict(values) == TINY


def test_wires_are_those_of_the_buckets() -> None:
    wires = {f"torch.{name}" for name in ("float32", "bfloat16", "float16", "int8")}
    assert {str(dtype) for dtype in pycoll.buckets.WIRES} == wires
