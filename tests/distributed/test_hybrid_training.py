"""Any mix of data, tensor and pipeline parallel ranks gives one rank's curve, and goes on from any checkpoint."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import differing, train_alone, train_here, write_text

from pycoll import checkpoint
from pycoll.errors import UsageError
from pycoll.models import GPTConfig
from pycoll.testing import Processes, Rank
from pycoll.train import TrainConfig
from pycoll.train.config import ConfigError
from pycoll.train.main import check
from pycoll.train.mesh import Mesh
from pycoll.train.stop import StopRequest
from pycoll.train.trainer import Trainer

GOLDEN = Path(__file__).with_name("golden_curve.json")
"""Losses and gradient norms of one rank, fp32: `python tests/distributed/test_hybrid_training.py` writes them anew."""
WINDOWS = 4
"""Of a step, however ranks and micro-batches share them."""
STEPS, HALF = 100, 50
CONFIG = TrainConfig(
    device="cpu",
    dp=1,
    steps=STEPS,
    warmup=10,
    batch_size=1,
    grad_accum=WINDOWS,
    eval_every=STEPS,
    eval_examples=5,
    checkpoint_every=HALF,
    sample_bytes=5,
    model=GPTConfig(context=16, n_layer=4, n_head=4, d_model=32),
)
# ranks -> what they do
MIXES = {
    2: ["dp2", "tp2", "tp2-sequence", "pp2-interleaved"],
    4: ["dp2-tp2", "dp2-pp2-gpipe", "tp2-pp2-sequence", "pp4"],
    8: ["dp2-tp2-pp2"],
}
SECONDS = 240

pytestmark = pytest.mark.timeout(2 * SECONDS)


def config_of(mix: str) -> TrainConfig:
    """Of a name such as "dp2-tp2-sequence": the same windows a step as CONFIG's."""
    config = CONFIG
    for part in mix.split("-"):
        if part == "sequence":
            config = replace(config, sequence_parallel=True)
        elif part in ("gpipe", "interleaved"):
            config = replace(config, schedule=part)
        else:
            config = replace(config, **{part[:2]: int(part[2:])})
    return replace(config, grad_accum=WINDOWS // config.dp)


def train(rank: Rank, mixes: list[str], resume: Path | None, text: Path, folder: Path) -> None:
    """A rank's part in a run of each mix, in a folder of its name."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(rank.folder / "store"), rank.world_size)
    dist.init_process_group("pycoll", store=store, rank=rank.rank, world_size=rank.world_size)
    for mix in mixes:
        train_here(replace(config_of(mix), data=text, resume=resume), folder / mix)
    dist.destroy_process_group()


def curve(folder: Path) -> dict[str, list[float]]:
    """What a run has told of its steps: losses, and norms of the gradient."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in ("loss/train", "gradient_norm")}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def one(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a rank alone."""
    out = tmp_path_factory.mktemp("one")
    train_alone(replace(CONFIG, data=text), out)
    return out


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run for each of MIXES."""
    folder = tmp_path_factory.mktemp("mixes")
    for world, mixes in MIXES.items():
        with Processes(train, world, mixes, None, text, folder) as ranks:
            ranks.results(SECONDS)
    return folder


def test_one_rank_gives_the_golden_curve(one: Path) -> None:
    """Of another machine, whose matrix products may round differently."""
    golden = json.loads(GOLDEN.read_text())
    for name, values in curve(one).items():
        assert values == pytest.approx(golden[name], rel=1e-3), name


@pytest.mark.parametrize("mix", [mix for mixes in MIXES.values() for mix in mixes])
def test_any_mix_gives_the_curve_of_one_rank(mix: str, one: Path, runs: Path) -> None:
    expected = curve(one)
    for name, values in curve(runs / mix).items():
        assert len(values) == STEPS
        assert values == pytest.approx(expected[name], rel=2e-5), name
    losses = [json.loads((out / "summary.json").read_text())["final validation loss"] for out in (one, runs / mix)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)


@pytest.mark.parametrize("mix", [mix for mixes in MIXES.values() for mix in mixes])
def test_any_mix_writes_the_whole_model(mix: str, one: Path, runs: Path) -> None:
    expected, found = (load_file(checkpoint.find(folder)) for folder in (one, runs / mix))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "qkv.bias" in name:  # keys' biases change no score: their gradient is rounding, which Adam enlarges
            expected[name], found[name] = (
                torch.cat((t.chunk(3)[0], t.chunk(3)[2])) if t.dim() else t for t in (tensor, found[name])
            )
        assert (found[name] - expected[name]).norm() <= 1e-3 * expected[name].norm(), name


@pytest.mark.parametrize("mix", ["tp2-sequence", "pp2-interleaved", "dp2-tp2-pp2"])
def test_one_rank_goes_on_from_any_mix(mix: str, one: Path, runs: Path, text: Path, tmp_path: Path) -> None:
    halfway = runs / mix / f"checkpoint-{HALF:08d}.safetensors"
    train_alone(replace(CONFIG, data=text, resume=halfway), tmp_path)
    assert curve(tmp_path)["loss/train"] == pytest.approx(curve(one)["loss/train"][HALF:], rel=2e-5)


def test_any_mix_goes_on_from_another(one: Path, runs: Path, text: Path, tmp_path: Path) -> None:
    halfway = runs / "dp2-pp2-gpipe" / f"checkpoint-{HALF:08d}.safetensors"
    mixes = ["tp2-pp2-sequence", "dp2-tp2"]
    with Processes(train, 4, mixes, halfway, text, tmp_path) as ranks:
        ranks.results(SECONDS)
    for mix in mixes:
        assert curve(tmp_path / mix)["loss/train"] == pytest.approx(curve(one)["loss/train"][HALF:], rel=2e-5), mix


def train_in_16_bits(rank: Rank, text: Path, folder: Path) -> tuple[int, int]:
    """Steps that were skipped, as the scaled loss overflows at first; and how often stages drop the same."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(rank.folder / "store"), rank.world_size)
    dist.init_process_group("pycoll", store=store, rank=rank.rank, world_size=rank.world_size)
    common = replace(CONFIG, data=text, steps=24, eval_every=24, checkpoint_every=12, eval_examples=3, grad_accum=2)
    scaled = replace(common, tp=2, pp=2, dtype="float16")
    trainer = Trainer(check(scaled, folder / "scaled"), folder / "scaled")
    scaler = trainer.parallel.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**24})
    trainer.run(StopRequest())
    torch.manual_seed(0)
    narrow = replace(common, pp=2, dtype="bfloat16", wire_dtype="int8", model=replace(CONFIG.model, dropout=0.2))
    train_here(narrow, folder / "narrow")
    train_here(replace(narrow, resume=folder / "narrow" / "checkpoint-00000012.safetensors"), folder / "resumed")
    dist.destroy_process_group()
    return trainer.skipped, trainer.done


def test_parts_in_16_bits(text: Path, tmp_path: Path) -> None:
    with Processes(train_in_16_bits, 4, text, tmp_path) as ranks:
        seen = ranks.results(SECONDS)
    assert {*seen} == {seen[0]} and 0 < seen[0][0] < seen[0][1] == 24, "all ranks skip the same steps, and not all"
    for run in ("scaled", "narrow", "resumed"):
        summary = json.loads((tmp_path / run / "summary.json").read_text())
        assert summary["final validation loss"] < summary["first training loss"], run
    straight, resumed = (load_file(checkpoint.find(tmp_path / run)) for run in ("narrow", "resumed"))
    assert differing(resumed, straight) == [], "also what int8 has rounded away on each rank"
    assert {name.split(".")[1] for name in straight if name.startswith("own.")} == set("0123")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp": 3}, "--tp is 3: give a divisor of --model.n-head"),
        ({"pp": 8}, "--pp is 8: give fewer: each of the 8 stages"),
        ({"pp": 2, "grad_accum": 1}, "--grad-accum is 1: give at least --pp"),
        ({"pp": 2, "grad_accum": 3, "schedule": "interleaved"}, "--grad-accum is 3: give a multiple of --pp"),
        ({"sequence_parallel": True}, "--tp is 1: give more than 1"),
        ({"tp": 2, "optimizer": "fused"}, "--tp is 2: give 1, or --optimizer sharded"),
        ({"pp": 2, "backend": "gloo"}, "--pp is 2: give 1, or --optimizer sharded"),
    ],
)
def test_what_cannot_be_divided_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **settings)


def test_ranks_that_the_parts_do_not_divide_are_refused() -> None:
    dist.init_process_group("pycoll", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UsageError, match=r"1 ranks cannot be divided by --tp 2 x --pp 1: start a multiple of 2"):
            Mesh(2, 1)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        train_alone(replace(CONFIG, data=write_text(Path(name))), Path(name) / "run")
        GOLDEN.write_text(json.dumps(curve(Path(name) / "run"), indent=1) + "\n")
