"""`pycoll train --task classify`: several ranks learn, and count, as one does, also with uneven last steps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import train_alone, train_here

from pycoll import checkpoint
from pycoll.checkpoint import CheckpointError
from pycoll.models import GPTConfig
from pycoll.testing import Processes, Rank
from pycoll.train.config import CLASSIFY, ConfigError
from pycoll.train.main import check, parse

STEPS, SECONDS = 9, 100
CONFIG = replace(
    CLASSIFY,
    device="cpu",
    dp=1,
    steps=STEPS,
    batch_size=12,
    warmup=2,
    eval_every=STEPS,
    checkpoint_every=5,
    model=GPTConfig(context=24, n_layer=1, n_head=2, d_model=16),
)
"""An epoch of 40 texts is three steps of 12, and one of 4: of 3 ranks with 2 passes, two have an empty batch then."""
WAYS = {
    "fused, 2 passes": replace(CONFIG, dp=3, batch_size=2, grad_accum=2, optimizer="fused"),
    "sharded": replace(CONFIG, dp=3, batch_size=4),
    "torch": replace(CONFIG, dp=3, batch_size=4, optimizer="torch"),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.tsv"
    path.write_text("".join(f"{'even' if i % 2 == 0 else 'odd'} is what {i} is\t{i % 2 == 0}\n" for i in range(44)))
    return path


def train(rank: Rank, texts: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(rank.folder / "store"), rank.world_size)
    dist.init_process_group("pycoll", store=store, rank=rank.rank, world_size=rank.world_size)
    for name, config in WAYS.items():
        train_here(replace(config, data=texts), folder / name)
    dist.destroy_process_group()


def losses(folder: Path) -> list[float]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars("loss/train")]


@pytest.fixture(scope="module")
def one(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a rank alone."""
    out = tmp_path_factory.mktemp("one")
    train_alone(replace(CONFIG, data=texts), out)
    return out


def test_ranks_learn_and_count_as_one(one: Path, texts: Path, tmp_path: Path) -> None:
    with Processes(train, 3, texts, tmp_path) as ranks:
        ranks.results(SECONDS)
    expected = json.loads((one / "summary.json").read_text())
    assert expected["guessing accuracy"] == 0.5
    for way in WAYS:
        assert losses(tmp_path / way) == pytest.approx(losses(one), rel=1e-4), way
        summary = json.loads((tmp_path / way / "summary.json").read_text())
        for measure in ("validation loss", "accuracy", "macro precision", "macro recall", "macro F1", "F1 of True"):
            assert summary[f"final {measure}"] == pytest.approx(expected[f"final {measure}"], rel=1e-4), (way, measure)


def test_a_resumed_run_ends_where_the_straight_one_did(one: Path, texts: Path, tmp_path: Path) -> None:
    halfway = one / "checkpoint-00000005.safetensors"
    assert checkpoint.read_header(halfway).seen == 40 + 12
    train_alone(replace(CONFIG, data=texts, resume=halfway), tmp_path)
    assert losses(tmp_path) == losses(one)[5:]


def test_other_classes_are_another_model(one: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.tsv"
    path.write_text("".join(f"what {i} is	{i % 3}\n" for i in range(60)))
    with pytest.raises(CheckpointError, match=r"is of another model: classes is \['False', 'True'\] there"):
        check(replace(CONFIG, data=path, resume=checkpoint.find(one)), tmp_path / "out")


def test_settings() -> None:
    assert parse(["--task", "classify"]).model.d_model == CLASSIFY.model.d_model
    assert parse(["--task", "classify", "--model.d-model", "32"]).model == replace(CLASSIFY.model, d_model=32)
    for name, value in (("tp", 2), ("pp", 2), ("tokenizer", "bpe:300"), ("init", Path("x")), ("export", Path("x"))):
        with pytest.raises(ConfigError, match=rf"--{name} is .*, or --task language"):
            replace(CLASSIFY, **{name: value})
