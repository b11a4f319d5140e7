"""The reference trainer's arithmetic, its settings, and what cannot be resumed; whole runs are in distributed/."""

import errno
import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter
from training import MODEL, SECONDS, TINY, differing, train_alone, train_here, write_text

from pycoll import checkpoint
from pycoll.checkpoint import CheckpointError
from pycoll.data import DataError
from pycoll.disk import alone_in
from pycoll.errors import Error
from pycoll.models import GPT, GPTConfig
from pycoll.models.hugging_face import ModelFolderError
from pycoll.testing import Processes, Rank
from pycoll.train import ConfigError, TrainConfig
from pycoll.train.main import alone, check, main, parse
from pycoll.train.optimization import adam_settings, learning_rate
from pycoll.train.progress import Reporter
from pycoll.train.stop import stop_requests


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data"))


def test_accumulated_gradients_are_those_of_a_larger_batch(text: Path, tmp_path: Path) -> None:
    config = replace(TINY, data=text)
    large = train_alone(replace(config, batch_size=4), tmp_path / "large")
    accumulated = train_alone(replace(config, batch_size=1, grad_accum=4), tmp_path / "accumulated")
    small = train_alone(replace(config, batch_size=1), tmp_path / "small")
    for name, weights in large.items():
        torch.testing.assert_close(accumulated[name], weights, rtol=1e-3, atol=1e-5)
    assert any((small[name] - weights).abs().max() > 1e-3 for name, weights in large.items())


def test_resumes_with_dropout_bit_for_bit(text: Path, tmp_path: Path) -> None:
    config = replace(TINY, data=text, model=replace(MODEL, dropout=0.3))
    straight = train_alone(config, tmp_path / "straight")
    halfway = tmp_path / "straight" / "checkpoint-00000003.safetensors"
    resumed = train_alone(replace(config, resume=halfway), tmp_path / "resumed")
    assert differing(resumed, straight) == []


def test_loss_that_is_no_number_ends_the_run(text: Path, tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"step \d failed \(loss .*nan.*\): start again, or resume, with a smaller --lr"):
        train_alone(replace(TINY, data=text, lr=1e30, warmup=0, steps=9), tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_noted_within_the_block_alone(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.received == number
    assert signal.getsignal(number) == before


def train_halfway_and_resume(rank: Rank, config: TrainConfig) -> list[str]:
    """The names of the weights that a resumed run ends with otherwise than a straight one."""
    store = dist.FileStore(str(rank.folder / "store"), rank.world_size)
    dist.init_process_group("gloo", store=store, rank=rank.rank, world_size=rank.world_size)
    straight = train_here(config, rank.folder / "straight")
    halfway = rank.folder / "straight" / "checkpoint-00000003.safetensors"
    resumed = train_here(replace(config, resume=halfway), rank.folder / "resumed")
    dist.destroy_process_group()
    return differing(resumed, straight)


def test_resumes_bit_for_bit_where_sums_depend_on_buckets(text: Path) -> None:
    """Gloo's ring adds in an order that follows from a gradient's place in its bucket, and DDP sorts its buckets anew
    after a process's first step; two megabytes of weights make two buckets of them."""
    config = replace(TINY, data=text, batch_size=1, model=GPTConfig(context=16, n_layer=3, n_head=2, d_model=128))
    with Processes(train_halfway_and_resume, 3, config) as ranks:
        assert ranks.results(SECONDS) == [[], [], []]


def test_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine() -> None:
    config = TrainConfig(steps=110, warmup=10, lr=1.0, min_lr_share=0.2)
    rates = [learning_rate(step, config) for step in range(config.steps)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.6)
    assert rates[-1] == pytest.approx(0.2, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_only_matrices_decay() -> None:
    model = GPT(MODEL)
    groups = adam_settings(model, TrainConfig(weight_decay=0.3))["params"]
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.3 if parameter.dim() == 2 else 0.0), name


def test_settings_survive_json() -> None:
    config = replace(TINY, data=Path("/text"), out=Path("runs/x"), lr=0.5)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match=r"of another version of pycoll .*'colour'"):
        TrainConfig.from_dict({**config.to_dict(), "colour": "red"})


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("steps", 0, "--steps is 0: give more than 0"),
        ("batch_size", -1, "--batch-size is -1: give more than 0"),
        ("lr", math.nan, "--lr is nan: give more than 0"),
        ("seed", -1, "--seed is -1: give at least 0"),
        ("beta2", 1.0, "--beta2 is 1.0: give at least 0 and less than 1"),
    ],
)
def test_impossible_settings_are_named(setting: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(TINY, **{setting: value})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps."""
    out = tmp_path_factory.mktemp("finished")
    train_alone(replace(TINY, data=text), out)
    return out


def test_resume_takes_the_settings_of_the_run(finished: Path, text: Path) -> None:
    config = parse(["--resume", str(finished), "--steps", "9"])
    # TINY was trained by one rank, whatever it says.
    assert config == replace(TINY, data=text, out=finished, resume=checkpoint.find(finished), steps=9, dp=1)


def test_checkpoint_of_another_model_is_refused(finished: Path) -> None:
    config = parse(["--resume", str(finished), "--steps", "9", "--model.n-layer", "2"])
    with pytest.raises(CheckpointError, match="is of another model: n_layer is 1 there, 2 here;"):
        check(config, finished)


def test_checkpoint_of_another_text_is_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("other text\n" * 100)
    config = parse(["--resume", str(finished), "--steps", "9", "--data", str(tmp_path / "other.txt")])
    with pytest.raises(CheckpointError, match="was trained on other data"):
        check(config, finished)


def test_a_finished_run_only_concludes(finished: Path, text: Path, tmp_path: Path) -> None:
    """As one that was stopped in its last step, or could not be exported."""
    config = parse(["--resume", str(finished), "--export", str(tmp_path / "exported")])
    weights = train_alone(config, tmp_path / "again")
    assert differing({f"model.{name}": w for name, w in weights.items()}, weights_in(checkpoint.find(finished))) == []
    assert (tmp_path / "exported" / "model.safetensors").exists()
    again, before = (json.loads((out / "summary.json").read_text()) for out in (tmp_path / "again", finished))
    assert again["final validation loss"] == before["final validation loss"]
    with pytest.raises(ConfigError, match="has done 6 steps, more than --steps 5"):
        check(parse(["--resume", str(finished), "--steps", "5"]), finished)


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "torch"}, {"sync": "diloco", "every": 3, "eval_every": 3}, {"sync": "async"}],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_finished_run_of_whatever_kind_only_concludes(settings: dict[str, Any], text: Path, tmp_path: Path) -> None:
    config = replace(TINY, dp=1, data=text, **settings)
    weights = train_alone(config, tmp_path)
    assert differing(train_alone(replace(config, resume=checkpoint.find(tmp_path)), tmp_path), weights) == []


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(path).items() if name.startswith("model.")}


def test_an_export_that_cannot_be_written_is_refused_before_the_run(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--export /proc/none cannot be made"):
        check(replace(TINY, data=text, export=Path("/proc/none")), tmp_path)


def test_a_torchrun_that_forgets_the_run_asks_for_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ConfigError, match="has no name for the run that outlives a restart: give --out a folder"):
        main(["--steps", "1"])


def test_folder_of_another_run_is_left_alone(finished: Path, text: Path) -> None:
    with pytest.raises(ConfigError, match="holds another run"):
        check(replace(TINY, data=text), finished)
    earlier = finished / "checkpoint-00000003.safetensors"
    with pytest.raises(ConfigError, match="or a later part of this one"):
        check(parse(["--resume", str(earlier)]), finished)


def test_folder_that_cannot_be_made_is_named(text: Path) -> None:
    with pytest.raises(ConfigError, match=r"text.txt/run cannot be made"):
        check(replace(TINY, data=text), text / "run")


def test_a_folder_has_one_run_at_a_time(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycoll.train.main.PATIENCE", 0.0)
    with alone_in(tmp_path, 0.0), pytest.raises(ConfigError, match=f"another run writes to {tmp_path}: wait for"):
        main(["--data", str(text), "--out", str(tmp_path)])
    with alone(tmp_path):
        assert [*tmp_path.iterdir()] == []
    with pytest.raises(DataError):
        main(["--data", str(tmp_path / "missing"), "--out", str(tmp_path / "new")])
    assert [*tmp_path.iterdir()] == [], "where no run is possible no folder is left"


def test_a_full_disk_ends_the_run_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    said = re.escape(f"{tmp_path} cannot be written to ([Errno 28] No space left") + ".*make room, and resume"
    with monkeypatch.context() as patch:
        patch.setattr(SummaryWriter, "__init__", full)
        with pytest.raises(Error, match=said):
            Reporter(tmp_path, first=0, last=4, tokens_per_step=10)
    reporter = Reporter(tmp_path, first=0, last=4, tokens_per_step=10)
    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(Error, match=said):
        reporter.step(1, 2.5, 0.1, 1.0)
    with pytest.raises(Error, match=said):
        reporter.summary({"loss": ("2.5", 2.5)})
    reporter.close()
    monkeypatch.setattr(SummaryWriter, "close", full)
    with pytest.raises(Error, match=said):
        reporter.close()


def test_terminal_shows_a_progress_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    reporter = Reporter(tmp_path, first=2, last=4, tokens_per_step=10)
    reporter.start()
    reporter.step(3, 2.5, 0.1, 1.0)
    reporter.close()
    shown = capsys.readouterr().out
    for said in ("3/4", "loss 2.500", "tokens/s", "left", "━"):
        assert said in shown


def test_a_run_begins_with_what_another_has_exported(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    weights = train_alone(replace(TINY, data=text, export=folder), tmp_path / "first")
    task = check(replace(TINY, data=text, init=folder, model=GPTConfig()), tmp_path / "second")
    assert task.config.model == TINY.model
    assert differing(dict(task.make_model().state_dict()), weights) == []
    with pytest.raises(ModelFolderError, match="is no GPT-2"):
        check(replace(TINY, data=text, init=tmp_path / "first"), tmp_path / "third")


def test_a_run_learns_byte_pairs(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="BPE needs the library tokenizers")
    config = replace(TINY, data=text, tokenizer="bpe:300", cache=tmp_path / "cache", export=tmp_path / "exported")
    weights = train_alone(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["final loss per byte"] < summary["final validation loss"], "a token is more than a byte"
    vocabulary = weights["embedding.token.weight"].shape[0]
    assert 256 < vocabulary <= 300
    tokenizer = str(tmp_path / "exported" / "tokenizer.json")
    task = check(replace(config, tokenizer=tokenizer, init=tmp_path / "exported"), tmp_path / "again")
    assert task.config.model.vocab_size == vocabulary
    train_alone(replace(TINY, data=text, export=tmp_path / "bytes"), tmp_path / "of bytes")
    with pytest.raises(ConfigError, match=r"--tokenizer bpe:300 has \d+ tokens, the model in .* 256: give its own"):
        check(replace(config, init=tmp_path / "bytes"), tmp_path / "other")
