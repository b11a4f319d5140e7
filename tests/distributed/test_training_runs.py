"""Whole runs of `pycoll train` over pycoll: started, stopped, killed and resumed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import SECONDS, TINY, command, differing, finish, train_alone, train_here, write_text

from pycoll import checkpoint
from pycoll.data import load_corpus
from pycoll.testing import Processes, Rank
from pycoll.train import ConfigError, TrainConfig
from pycoll.train.launch import program
from pycoll.train.main import begin, parse


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two ranks over pycoll: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    result = finish(command("--data", text, "--out", out))
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_run_says_what_it_does_and_reached(finished: tuple[Path, str], text: Path) -> None:
    out, printed = finished
    assert "2 ranks of " in printed
    assert "gradients through pycoll; 64 tokens a step" in printed
    for said in ("step 1/6  loss 5.", "tokens/s", "s left", "step 2/6  validation loss", "a sample of generated text"):
        assert said in printed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["unigram cross-entropy"] == load_corpus(text, 16).unigram_cross_entropy()
    assert summary["first training loss"] == pytest.approx(math.log(256), abs=0.3)
    assert summary["final validation loss"] < summary["first training loss"]
    assert summary["tokens/s"] > 0
    assert "waiting for gradients" not in summary, "which torch's DistributedDataParallel alone tells"


def test_run_writes_curves_and_checkpoints(finished: tuple[Path, str]) -> None:
    out, _ = finished
    events = EventAccumulator(str(out))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("loss/validation")] == [2, 4, 6]
    assert set(events.Tags()["scalars"]) >= {"learning_rate", "gradient_norm", "tokens_per_s"}
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(out)] == [3, 6]
    header = checkpoint.read_header(checkpoint.find(out))
    assert header.step == 6
    assert header.first_loss == pytest.approx(events.Scalars("loss/train")[0].value)


def test_two_ranks_learn_what_one_does_from_both_their_batches(
    finished: tuple[Path, str], text: Path, tmp_path: Path
) -> None:
    one = train_alone(replace(TINY, data=text, batch_size=4), tmp_path)
    two = load_file(checkpoint.find(finished[0]))
    for name, weights in one.items():
        torch.testing.assert_close(two[f"model.{name}"], weights, rtol=1e-3, atol=1e-5)
    losses = [
        json.loads((out / "summary.json").read_text())["final validation loss"] for out in (finished[0], tmp_path)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), "over the same windows, shared out or not"


def test_resumed_run_ends_where_the_straight_one_did(finished: tuple[Path, str], tmp_path: Path) -> None:
    halfway = finished[0] / "checkpoint-00000003.safetensors"
    resume = [sys.executable, "-m", "pycoll.train", "--resume", str(halfway), "--out", str(tmp_path)]
    result = finish(resume)  # All other settings are the checkpoint's.
    assert result.returncode == 0, result.stderr
    assert "from step 3" in result.stdout
    assert differing(load_file(checkpoint.find(tmp_path)), load_file(checkpoint.find(finished[0]))) == []


def test_resuming_with_other_ranks_says_so(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    halfway = finished[0] / "checkpoint-00000003.safetensors"
    train_alone(parse(["--resume", str(halfway), "--out", str(tmp_path), "--dp", "1"]), tmp_path)
    assert "--dp differs from before" in capsys.readouterr().out
    assert checkpoint.read_header(checkpoint.find(tmp_path)).config["dp"] == 1


def _command_of(pid: str | int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return b""


class Running:
    """A run, by default too long to wait for, from its first checkpoint on, and the process ids of its ranks."""

    def __init__(
        self,
        text: Path,
        out: Path,
        *arguments: str,
        launcher: Sequence[str] = (),
        steps: int = 1000000,
        world_size: int = 2,
    ):
        python, *rest = command("--data", text, "--out", out, *arguments, steps=steps)
        self.process = subprocess.Popen(
            [python, *launcher, *rest], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.ranks: list[int] = []
        self.out, self.world_size = out, world_size

    def __enter__(self) -> "Running":
        deadline = time.monotonic() + SECONDS
        while not checkpoint.list_checkpoints(self.out):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.find_ranks()
        return self

    def find_ranks(self, deadline: float = 0.0) -> None:
        """As many as there are, none of them known yet; waits for them until the deadline."""
        known = {*self.ranks}
        while True:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            new = [int(pid) for pid in children if int(pid) not in known and b"pycoll.train" in _command_of(pid)]
            if len(new) == self.world_size:
                self.ranks = [*self.ranks, *new]
                return
            assert time.monotonic() < deadline, f"ranks: {new}"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)

    def __exit__(self, *error: object) -> None:
        for pid in self.ranks_left():
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def ranks_left(self) -> list[int]:
        """A process that has ended has no command line, also where nobody has asked yet how it ended."""
        return [pid for pid in self.ranks if _command_of(pid)]

    def wait(self) -> tuple[int, str, str]:
        """Exit status, output and errors; no rank may be left."""
        out, err = self.process.communicate(timeout=SECONDS)
        assert self.ranks_left() == []
        return self.process.returncode, out, err


def test_interrupt_saves_and_says_how_to_resume(text: Path, tmp_path: Path) -> None:
    with Running(text, tmp_path) as running:
        running.process.send_signal(signal.SIGINT)
        status, out, err = running.wait()
    assert (status, err) == (128 + signal.SIGINT, "")
    step = checkpoint.read_header(checkpoint.find(tmp_path)).step
    assert f"stopped after step {step}; continue with: {program()} --resume {tmp_path}" in out
    assert parse(["--resume", str(tmp_path)]).steps == 1000000


def test_signal_to_one_rank_stops_all(text: Path, tmp_path: Path) -> None:
    with Running(text, tmp_path) as running:
        os.kill(running.ranks[1], signal.SIGTERM)
        status, out, err = running.wait()
    assert (status, err) == (0, "")
    assert "stopped after step" in out


def test_ranks_stop_and_save_when_who_started_them_is_killed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # what a killed process cannot remove any more
    with Running(text, tmp_path) as running:
        running.process.kill()
        out, _ = running.process.communicate(
            timeout=SECONDS
        )  # which ends when the last rank has closed what it prints to
    assert running.ranks_left() == []
    newest = checkpoint.find(tmp_path)
    assert checkpoint.newest_whole(tmp_path) == newest
    assert f"stopped after step {checkpoint.read_header(newest).step};" in out


@pytest.mark.parametrize(
    ("mix", "world_size"),
    [
        ("--dp 2 --tp 2 --sequence-parallel", 4),
        ("--dp 1 --pp 2 --grad-accum 2 --model.n-layer 2", 2),
    ],
)
def test_signal_to_one_rank_stops_all_who_share_a_model(mix: str, world_size: int, text: Path, tmp_path: Path) -> None:
    with Running(text, tmp_path, *mix.split(), world_size=world_size) as running:
        os.kill(running.ranks[-1], signal.SIGTERM)
        status, out, err = running.wait()
    assert (status, err) == (0, "")
    newest = checkpoint.newest_whole(tmp_path)
    assert newest is not None
    assert f"stopped after step {checkpoint.read_header(newest).step};" in out


def test_killed_rank_is_named(text: Path, tmp_path: Path) -> None:
    with Running(text, tmp_path) as running:
        os.kill(running.ranks[1], signal.SIGKILL)
        status, _, err = running.wait()
    assert status == 1
    assert f"was killed by SIGKILL; continue from the last checkpoint: {program()} --resume {tmp_path}" in err
    assert "Traceback" not in err


STEPS = 150
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2")


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of STEPS steps that nothing has disturbed."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    result = finish(command("--data", text, "--out", out, steps=STEPS))
    assert result.returncode == 0, result.stderr
    return out


@pytest.mark.parametrize(
    ("arguments", "launcher", "victims"),
    [
        pytest.param(("--restarts", "2"), (), (1, 2), id="once they train, and while they start"),
        pytest.param(("--dp", "5"), TORCHRUN, (0,), id="torchrun, which sets --dp"),
    ],
)
def test_killed_ranks_come_back_and_end_where_an_undisturbed_run_does(
    arguments: tuple[str, ...],
    launcher: tuple[str, ...],
    victims: tuple[int, ...],
    straight: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    with Running(text, tmp_path, *arguments, launcher=launcher, steps=STEPS) as running:
        for victim in victims:
            os.kill(running.ranks[victim], signal.SIGKILL)
            running.find_ranks(time.monotonic() + SECONDS)
        status, printed, err = running.wait()
    assert status == 0, err
    assert ", from step " in printed, "it went on from a checkpoint"
    assert "2 ranks of " in printed
    assert differing(*(load_file(checkpoint.find(folder)) for folder in (straight, tmp_path))) == []
    losses = [json.loads((folder / "summary.json").read_text()) for folder in (straight, tmp_path)]
    assert losses[0]["final validation loss"] == losses[1]["final validation loss"]


@pytest.mark.parametrize(
    "mix",
    [
        "--dp 1 --tp 2 --sequence-parallel",
        "--dp 1 --pp 2 --schedule interleaved --grad-accum 2 --model.n-layer 4",
    ],
)
def test_ranks_that_share_a_model_come_back_too(
    mix: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as those that nothing disturbs
    with Running(text, tmp_path / "killed", *mix.split(), "--restarts", "1", steps=STEPS) as running:
        os.kill(running.ranks[1], signal.SIGKILL)
        running.find_ranks(time.monotonic() + SECONDS)
        status, printed, err = running.wait()
    assert status == 0, err
    assert ", from step " in printed, "it went on from a checkpoint"
    config = parse(command("--data", text, *mix.split(), steps=STEPS)[3:])
    with Processes(train_undisturbed, 2, config, tmp_path / "straight") as ranks:
        ranks.results(SECONDS)
    killed, straight = (load_file(checkpoint.find(tmp_path / name)) for name in ("killed", "straight"))
    assert differing(killed, straight) == []


def train_undisturbed(rank: Rank, config: TrainConfig, out: Path) -> None:
    torch.set_num_threads(1)
    rank.init_process_group()
    train_here(config, out)
    dist.destroy_process_group()


Environment = dict[str, str]


def decide(rank: Rank, config: TrainConfig, cases: Sequence[tuple[Path, Sequence[Environment]]]) -> list[object]:
    """From where a rank goes on in each case, of a folder and the ranks' environments; or why it ends."""
    decisions: list[object] = []
    for i, (out, environments) in enumerate(cases):
        os.environ.pop("TORCHELASTIC_RESTART_COUNT", None)
        os.environ.update({"TORCHELASTIC_RUN_ID": "none", "RANK": str(rank.rank), **environments[rank.rank]})
        rank.init_process_group(f"case {i}")
        try:
            with ExitStack() as stack:
                decisions.append(begin(config, out, stack).config.resume)
        except (ConfigError, SystemExit) as end:
            decisions.append(str(end))
        dist.destroy_process_group()
    return decisions


COUNTED = {"TORCHELASTIC_RESTART_COUNT": "1"}
NAMED, OTHER = {"TORCHELASTIC_RUN_ID": "named"}, {"TORCHELASTIC_RUN_ID": "other"}
BEGINNINGS: dict[str, tuple[str, list[Environment], bool]] = {
    "a node has not counted the restart": ("none", [{}, COUNTED], True),
    "a node has left, and nobody counted": ("named", [NAMED, NAMED], True),
    "a run without a name": ("none", [{}, {}], False),
    "another run": ("named", [OTHER, OTHER], False),
    "another run, started again": ("named", [OTHER | COUNTED, OTHER | COUNTED], False),
}
"""The run that has written to the folder, what the launcher tells each rank now, and whether they go on."""


@pytest.fixture(scope="module")
def decisions(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[object]]]:
    """The folder of each of BEGINNINGS, and what each rank decided."""
    folder, config = tmp_path_factory.mktemp("begun"), replace(TINY, dp=1, data=text)
    for name in ("none", "named"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCHELASTIC_RUN_ID", name)
            train_alone(config, folder / name)
    cases = [(folder / written_by, environments) for written_by, environments, _ in BEGINNINGS.values()]
    with Processes(decide, 2, config, cases) as ranks:
        of_ranks = ranks.results(SECONDS)
    return {name: (case[0], list(seen)) for name, case, *seen in zip(BEGINNINGS, cases, *of_ranks, strict=True)}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_all_ranks_go_on_from_the_same_checkpoint_or_none(
    name: str, decisions: dict[str, tuple[Path, list[object]]]
) -> None:
    out, (first, second) = decisions[name]
    if BEGINNINGS[name][2]:
        assert first == second == checkpoint.find(out)
    else:
        assert str(first).startswith(f"{out} holds another run") and second == "2", "one rank says why"


def test_a_damaged_checkpoint_is_not_what_ranks_come_back_to(text: Path, tmp_path: Path) -> None:
    config = replace(TINY, dp=1, data=text, out=tmp_path)
    straight = train_alone(config, tmp_path)
    newest = checkpoint.find(tmp_path)
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)
    with Processes(decide, 1, config, [(tmp_path, [COUNTED])]) as ranks:
        ((resume,),) = ranks.results(SECONDS)
    assert resume == tmp_path / "checkpoint-00000003.safetensors"
    assert differing(train_alone(replace(config, resume=resume), tmp_path), straight) == []
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [3, 6]
    assert newest.with_suffix(".damaged").exists(), "it is left for whoever wants to know"
