"""`pycoll train` from its arguments to its exit status: checks all there is to check, then launches ranks or is one."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist
import tyro
from rich.console import Console

from pycoll import checkpoint
from pycoll.disk import alone_in
from pycoll.errors import Error, UsageError
from pycoll.models import PRESETS
from pycoll.train.classify import Classify
from pycoll.train.config import CLASSIFY, ConfigError, TrainConfig
from pycoll.train.device import check_device, take_device
from pycoll.train.language import Language
from pycoll.train.launch import end_with_launcher, launch, may_restart, program, rank, restarted, run_id
from pycoll.train.plan import show_plan
from pycoll.train.stop import stop_requests
from pycoll.train.task import Task

PATIENCE = 10.0
"""Seconds in which a run that is being stopped leaves its folder, usually."""
PATHS = ("data", "init", "export")
"""Settings that mean the same where a run goes on from another folder."""


def main(arguments: Sequence[str]) -> int:
    """Trains as the command line `arguments` say and returns the exit status.

    Raises UsageError (ConfigError, DataError, CheckpointError) before any process starts where no run is possible.
    """
    config = parse(arguments)
    if config.plan:
        show_plan(Language(config).config, Console())
        return 0
    if config.out is None and run_id() is None and may_restart():
        raise ConfigError("this torchrun has no name for the run that outlives a restart: give --out a folder")
    out = config.out or Path("runs") / (run_id() or datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    if rank() is None:
        with alone(out):
            config = parse(arguments)  # Again: a run that was still being stopped has saved once more.
            check(config, out)  # The ranks load the data; this process only waits for them.
        try:
            nproc = config.dp * config.tp * config.pp
            return launch([*arguments, *([] if config.out else ["--out", str(out)])], nproc, config.restarts)
        except Error as error:
            if not checkpoint.list_checkpoints(out):
                raise
            raise Error(f"{error}; continue from the last checkpoint: {program()} --resume {out}") from error
    from pycoll.train.trainer import Trainer  # a second, for torch's compiler, which who launches ranks does not need

    end_with_launcher()
    check_device(config, launches=False)
    dist.init_process_group(config.backend)
    try:
        with ExitStack() as stack:
            task = begin(config, out, stack)
            with stop_requests() as stop:  # Until here there is nothing to save: a signal just ends it.
                Trainer(task, out).run(stop)
    finally:
        dist.destroy_process_group()
    return 0


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The settings on the command line; where it has none, those of the checkpoint or preset that it names."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume", type=Path, nargs="?")
    finder.add_argument("--task")
    finder.add_argument("--preset", choices=PRESETS)
    found, _ = finder.parse_known_args(arguments)
    path = found.resume
    default = CLASSIFY if found.task == "classify" else TrainConfig()
    if found.preset is not None:
        default = replace(default, model=PRESETS[found.preset])
    if path is not None:
        path = checkpoint.find(path)
        default = replace(TrainConfig.from_dict(checkpoint.read_header(path).config), resume=path, out=path.parent)
        if default.device == "cuda":  # which this machine may lack: how a run is carried out is not what it is
            default = replace(default, device="auto")
    config = tyro.cli(TrainConfig, prog="pycoll train", args=arguments, default=default)
    absolute = {name: value.resolve() for name in PATHS if (value := getattr(config, name)) is not None}
    if Path(config.tokenizer).is_file():
        absolute["tokenizer"] = str(Path(config.tokenizer).resolve())
    return replace(config, resume=path, **absolute)


def begin(config: TrainConfig, out: Path, stack: ExitStack) -> Task:
    """What this run learns, and from where, as rank 0 decides for all; it is alone in `out` until `stack` ends.

    A call of all ranks. Where rank 0 finds that no run is possible it says why, and the others end with it.
    """
    take_device(config)  # which NCCL's collectives have to know
    counted: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(counted, restarted())
    task: Task | None = None
    problem: UsageError | None = None
    if dist.get_rank() == 0:
        try:
            stack.enter_context(alone(out))
            config = go_on(config, out, any(counted))
            task = check(config, out)
        except UsageError as error:
            problem = error
    decided: list[Any] = [config.resume, problem is None]
    dist.broadcast_object_list(decided)
    if problem is not None:
        raise problem
    if not decided[1]:
        raise SystemExit(2)
    return task or check(replace(config, resume=decided[0]), out)


def go_on(config: TrainConfig, out: Path, counted: bool) -> TrainConfig:
    """The settings, to go on from the newest whole checkpoint in `out` where this run has begun before.

    Args:
        counted: whether a launcher has counted a restart. torchrun's nodes do so each for themselves, and what a node
            that leaves or joins makes them do they do not count at all: then the run's name tells.
    """
    name, written = run_id(), checkpoint.list_checkpoints(out)
    if not counted and (name is None or not any(checkpoint.is_of_run(path, name) for path in written)):
        return config
    newest = checkpoint.newest_whole(out)
    if newest is not None and newest != config.resume and not checkpoint.is_of_run(newest, name):
        return config  # another run's
    for path in written:  # what is damaged does not count among the newest
        if newest is None or checkpoint.step_of(path) > checkpoint.step_of(newest):
            path.rename(path.with_suffix(".damaged"))
    return config if newest is None else replace(config, resume=newest)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Within the block no other run is in `out`, which is made, and goes again if nothing comes of it.

    Raises ConfigError where another stays there, as one that is being stopped would not.
    """
    is_new = not out.exists()
    _check_folder("--out", out)
    with ExitStack() as stack:
        try:
            stack.enter_context(alone_in(out, PATIENCE))
        except BlockingIOError as error:
            raise ConfigError(f"another run writes to {out}: wait for its end, or give --out another folder") from error
        try:
            yield
        except UsageError:
            if is_new:
                with suppress(OSError):  # not empty
                    out.rmdir()
            raise


def check(config: TrainConfig, out: Path) -> Task:
    """What to learn, once data, checkpoint and output folder are found to fit the settings."""
    check_device(config, launches=rank() is None)
    task: Task = Language(config) if config.task == "language" else Classify(config)
    done = 0
    if config.resume is not None:
        header = checkpoint.read_header(config.resume)
        checkpoint.require_model(config.resume, header, task.shape())
        done = header.step
        if header.data_digest != task.digest:
            raise checkpoint.CheckpointError(
                f"{config.resume} was trained on other data than {task.name}: restore it, or start a new run"
            )
        if done > config.steps:
            raise ConfigError(f"{config.resume} has done {done} steps, more than --steps {config.steps}")
    if rank() in (None, 0):  # The others need no folder, and torchrun's have no common name for it.
        _check_folder("--out", out)
        if config.export is not None:
            _check_folder("--export", config.export)
        if any(checkpoint.step_of(path) > done for path in checkpoint.list_checkpoints(out)):
            raise ConfigError(f"{out} holds another run, or a later part of this one: give --out another folder")
    return task


def _check_folder(name: str, folder: Path) -> None:
    """Makes it, where it is not there, and sees whether it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{name} {folder} cannot be made ({error.strerror}): give another folder") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{name} {folder} cannot be written to: give another folder")
