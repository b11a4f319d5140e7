"""Checkpoints of a training run: one safetensors file each, with the weights, the optimizer's state and a JSON header.

What a run draws at random (windows, dropout) follows from its seed and the step: those two are the whole state of the
sampler and of the random generators. A file appears whole or not at all, also when the process dies while it writes.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pycoll.errors import Error, UsageError

FORMAT = "pycoll-checkpoint-1"
KEPT = 2
"""Checkpoints of a run that are kept: the newest, and the one before it."""


class CheckpointError(UsageError):
    """The checkpoint is missing, damaged, or belongs to another model or text."""


@dataclass(frozen=True)
class Header:
    """What a checkpoint says about itself."""

    step: int
    """Optimizer steps done."""
    model: Mapping[str, Any]
    """Fields of the model's configuration."""
    config: Mapping[str, Any]
    """Fields of the training configuration."""
    data_digest: str
    """Digest of the text, see pycoll.data.Corpus."""
    first_loss: float
    """Training loss of the run's first step, in nats a byte."""


def save(folder: Path, header: Header, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Writes `folder`/checkpoint-STEP.safetensors, drops the oldest beyond KEPT, and returns the new file's path.

    Raises Error where it cannot be written: a full disk, a folder that is read-only.
    """
    path = folder / f"checkpoint-{header.step:08d}.safetensors"
    unfinished = folder / "checkpoint.unfinished"  # One name: what a killed process left is overwritten.
    metadata = {"format": FORMAT, "header": json.dumps(asdict(header))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(model, optimizer), unfinished, metadata)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())  # The name must not reach the disk before the content.
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        raise Error(f"{path} cannot be written ({error}): the run ends; its earlier checkpoints are whole") from error
    for old in list_checkpoints(folder)[:-KEPT]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that runs wrote (a copy under another name is the user's), by ascending step."""
    named = (path for path in folder.glob("checkpoint-*.safetensors") if path.stem[len("checkpoint-") :].isdecimal())
    return sorted(named, key=step_of)


def step_of(path: Path) -> int:
    """The steps done according to the name of a checkpoint in `list_checkpoints`."""
    return int(path.stem.removeprefix("checkpoint-"))


def find(path: Path) -> Path:
    """The checkpoint at `path`: the file itself, or the newest of a run's folder. Raises CheckpointError if none."""
    if path.is_file():
        return path
    if checkpoints := list_checkpoints(path):
        return checkpoints[-1]
    what = "holds no checkpoint" if path.is_dir() else "does not exist"
    raise CheckpointError(f"{path} {what}: give --resume a run's folder or one of its checkpoint files")


def read_header(path: Path) -> Header:
    """The header of the checkpoint file. Raises CheckpointError where the file is damaged or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of `pycoll train` (format {metadata.get('format')})")
        return Header(**json.loads(metadata["header"]))
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint ({error}): resume from an earlier checkpoint of the run"
        ) from error


def require_model(path: Path, header: Header, model: Mapping[str, Any]) -> None:
    """Raises CheckpointError naming the fields in which the checkpoint's model differs from the configuration."""
    names = sorted({*header.model, *model})
    differing = [name for name in names if header.model.get(name) != model.get(name)]
    if differing:
        details = ", ".join(f"{name} is {header.model.get(name)} there, {model.get(name)} here" for name in differing)
        raise CheckpointError(f"{path} is of another model: {details}; leave these as they were, or start a new run")


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fills `model` and `optimizer` from the checkpoint file, whose model must be the same (`require_model`)."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        optimizer.state[parameter] = state


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
