"""`pycoll train` from its arguments to its exit status: checks all there is to check, then launches ranks or is one."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import torch.distributed as dist
import tyro

from pycoll import checkpoint
from pycoll.data import Corpus, load_corpus
from pycoll.errors import Error
from pycoll.train.config import ConfigError, TrainConfig
from pycoll.train.launch import launch, program, rank
from pycoll.train.stop import stop_requests
from pycoll.train.trainer import Trainer


def main(arguments: Sequence[str]) -> int:
    """Trains as the command line `arguments` say and returns the exit status.

    Raises UsageError (ConfigError, DataError, CheckpointError) before any process starts where no run is possible.
    """
    config = parse(arguments)
    out = config.out or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    corpus = check(config, out)
    if rank() is None:
        del corpus  # The ranks load it; this process only waits for them.
        try:
            return launch([*arguments, *([] if config.out else ["--out", str(out)])], config.nproc)
        except Error as error:
            if not checkpoint.list_checkpoints(out):
                raise
            raise Error(f"{error}; continue from the last checkpoint: {program()} --resume {out}") from error
    dist.init_process_group(config.backend)  # Until all ranks have met there is nothing to save: a signal just ends it.
    try:
        with stop_requests() as stop:
            Trainer(config, corpus, out).run(stop)
    finally:
        dist.destroy_process_group()
    return 0


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The settings on the command line; with --resume, those of the checkpoint where the command line has none."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume", type=Path, nargs="?")
    path = finder.parse_known_args(arguments)[0].resume
    default = TrainConfig()
    if path is not None:
        path = checkpoint.find(path)
        default = replace(TrainConfig.from_dict(checkpoint.read_header(path).config), resume=path, out=path.parent)
    config = tyro.cli(TrainConfig, prog="pycoll train", args=arguments, default=default)
    return replace(config, resume=path, data=config.data and config.data.resolve())


def check(config: TrainConfig, out: Path) -> Corpus:
    """The text to train on, once text, checkpoint and output folder are found to fit the settings."""
    corpus = load_corpus(config.data, config.model.context)
    done = 0
    if config.resume is not None:
        header = checkpoint.read_header(config.resume)
        checkpoint.require_model(config.resume, header, asdict(config.model))
        done = header.step
        if header.data_digest != corpus.digest:
            raise checkpoint.CheckpointError(
                f"{config.resume} was trained on another text than {corpus.name}: restore it, or start a new run"
            )
        if done >= config.steps:
            raise ConfigError(f"{config.resume} has done all {done} steps: give --steps more of them to go on")
    if rank() in (None, 0):  # The others need no folder, and torchrun's have no common name for it.
        _check_out(out, done)
    return corpus


def _check_out(out: Path, done: int) -> None:
    """Makes the folder `out`, in which no checkpoint may have more than the `done` steps that the run begins with."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made ({error.strerror}): give another folder") from error
    if not os.access(out, os.W_OK):
        raise ConfigError(f"--out {out} cannot be written to: give another folder")
    if any(checkpoint.step_of(path) > done for path in checkpoint.list_checkpoints(out)):
        raise ConfigError(f"{out} holds another run, or a later part of this one: give --out another folder")
