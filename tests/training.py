"""Runs of the trainer that take seconds: their settings and their text, in this process or as a command."""

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from pycoll.models import GPTConfig
from pycoll.train import TrainConfig
from pycoll.train.main import check
from pycoll.train.stop import StopRequest
from pycoll.train.trainer import Trainer

MODEL = GPTConfig(context=16, n_layer=1, n_head=2, d_model=16)
TINY = TrainConfig(
    device="cpu", steps=6, warmup=2, batch_size=2, eval_examples=4, checkpoint_every=3, sample_bytes=20, model=MODEL
)
FLAGS = "--device cpu --warmup 2 --batch-size 2 --eval-every 2 --eval-examples 4 --checkpoint-every 3 --sample-bytes 20"
MODEL_FLAGS = "--model.context 16 --model.n-layer 1 --model.n-head 2 --model.d-model 16"
SECONDS = 100
"""How long a run may take at most before its test fails."""


def write_text(folder: Path) -> Path:
    """A file to learn."""
    path = folder / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(500)))
    return path


def command(*arguments: str | Path, steps: int = 6) -> list[str]:
    """`pycoll train` with the settings of TINY, but steps and `arguments`."""
    settings = ["--steps", str(steps), *FLAGS.split(), *MODEL_FLAGS.split()]
    return [sys.executable, "-m", "pycoll.train", *settings, *map(str, arguments)]


def finish(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    return subprocess.run(arguments, capture_output=True, text=True, timeout=SECONDS, check=False)


def train_here(config: TrainConfig, out: Path) -> dict[str, torch.Tensor]:
    """Trains as a rank of this process's group; the weights afterwards."""
    trainer = Trainer(check(config, out), out)
    trainer.run(StopRequest())
    return weights_here(trainer)


def weights_here(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of what this rank has of the model, by name."""
    modules = trainer.parallel.modules
    return {name: tensor.clone() for module in modules for name, tensor in module.state_dict().items()}


def train_alone(config: TrainConfig, out: Path) -> dict[str, torch.Tensor]:
    """Trains in this process as the only rank of a group over pycoll; the weights afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("pycoll", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return train_here(config, out)
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that are not the same bit for bit."""
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def digest(weights: dict[str, torch.Tensor]) -> str:
    """Of weights by name: the same for the same bits."""
    said = b"".join(weights[name].view(torch.uint8).numpy().tobytes() for name in sorted(weights))
    return hashlib.sha256(said).hexdigest()
