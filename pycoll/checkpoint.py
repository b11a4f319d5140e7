"""Checkpoints of a training run: one safetensors file each, with the weights, the optimizer's state and a JSON header.

The state is torch.optim.AdamW's with the fp32 masters of 16-bit weights, by the parameters' names: any of torch's
AdamW, FusedAdam and ShardedAdam takes it up in any world size, in the same dtype or another.
What a run draws at random follows from its seed, the step and the examples seen: these are the whole state of sampler
and random generators. A file appears whole or not at all, also when the process dies while it writes.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pycoll.disk import sync
from pycoll.errors import Error, UsageError

FORMAT = "pycoll-checkpoint-2"
KEPT = 2
"""Checkpoints of a run that are kept: the newest, and the one before it."""


class CheckpointError(UsageError):
    """The checkpoint is missing, damaged, or belongs to another model or text."""


@dataclass(frozen=True)
class Header:
    """What a checkpoint says about itself."""

    step: int
    """Optimizer steps done."""
    seen: int
    """Examples that all ranks have learned from, those of all epochs."""
    model: Mapping[str, Any]
    """Fields of the model's configuration."""
    config: Mapping[str, Any]
    """Fields of the training configuration."""
    data_digest: str
    """Digest of what is learned from."""
    first_loss: float
    """Training loss of the run's first step, in its task's unit."""
    scaler: Mapping[str, Any] = field(default_factory=dict)
    """State of the GradScaler; empty where the loss is not scaled."""
    run_id: str | None = None
    """The name that the launcher has for the run, the same after restarts; None where it has none."""


def save(folder: Path, header: Header, tensors: Mapping[str, Tensor], *, keep: int = KEPT) -> Path:
    """Writes `folder`/checkpoint-STEP.safetensors, drops the oldest beyond `keep`, and returns the new file's path.

    Raises Error where it cannot be written: a full disk, a folder that is read-only.
    """
    path = folder / f"checkpoint-{header.step:08d}.safetensors"
    unfinished = folder / "checkpoint.unfinished"  # One name: what a killed process left is overwritten.
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    sums = {name: _checksum(tensor) for name, tensor in content.items()}
    said = {"header": json.dumps(asdict(header)), "checksums": json.dumps(sums)}
    metadata = {"format": FORMAT, **said, "checksum": _checksum_of(said)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(content, unfinished, metadata)
        sync(unfinished)  # The name must not reach the disk before the content.
        unfinished.replace(path)
        sync(folder)
    except (OSError, SafetensorError) as error:
        raise Error(f"{path} cannot be written ({error}): the run ends; its earlier checkpoints are whole") from error
    for old in list_checkpoints(folder)[:-keep]:
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
        if metadata["checksum"] != _checksum_of(metadata):
            raise KeyError("its header has changed since it was written")
        return Header(**json.loads(metadata["header"]))
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint ({error}): resume from an earlier checkpoint of the run"
        ) from error


def is_of_run(path: Path, run_id: str | None) -> bool:
    """Whether the run to which its launcher gave this name wrote the checkpoint; of a damaged one nobody knows."""
    try:
        return read_header(path).run_id == run_id
    except CheckpointError:
        return False


def require_model(path: Path, header: Header, model: Mapping[str, Any]) -> None:
    """Raises CheckpointError naming the fields in which the checkpoint's model differs from the configuration."""
    names = sorted({*header.model, *model})
    differing = [name for name in names if header.model.get(name) != model.get(name)]
    if differing:
        details = ", ".join(f"{name} is {header.model.get(name)} there, {model.get(name)} here" for name in differing)
        raise CheckpointError(f"{path} is of another model: {details}; leave these as they were, or start a new run")


class Tensors:
    """The tensors of a checkpoint file, read one by one when they are asked for, each against its checksum."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where the file is damaged or something else."""
        read_header(path)
        self._path = path
        self._file = safe_open(path, framework="pt").__enter__()
        self._sums = json.loads(self._file.metadata()["checksums"])

    def names(self) -> list[str]:
        """Of all tensors."""
        return sorted(self._sums)

    def __getitem__(self, name: str) -> Tensor:
        """Raises CheckpointError where it is missing, or not what was written."""
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise self._damaged(str(error)) from error
        if _checksum(tensor) != self._sums[name]:
            raise self._damaged(f"{name} has another checksum than when it was written")
        return tensor

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is damaged ({why}): resume from an earlier checkpoint of the run")


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` whose tensors are all as they were written; None where there is none."""
    for path in reversed(list_checkpoints(folder)):
        try:
            tensors = Tensors(path)
            for name in tensors.names():
                _ = tensors[name]
        except CheckpointError:
            continue
        return path
    return None


def _checksum_of(said: Mapping[str, str]) -> str:
    """Of what a file says of itself."""
    return str(zlib.crc32((said["header"] + said["checksums"]).encode()))


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)
