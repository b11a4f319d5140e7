"""The settings of a training run, and what they must satisfy."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pycoll.data import VOCAB_SIZE
from pycoll.errors import UsageError
from pycoll.models.gpt import GPTConfig


class ConfigError(UsageError):
    """A setting, or a combination of them, with which no run is possible."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT on text, on several processes whose gradients travel through pycoll.

    Without arguments: a small model learns the Python standard library's source, byte by byte, in a few minutes.
    """

    data: Path | None = None
    """UTF-8 file or folder to learn; by default the source of this Python's standard library."""
    out: Path | None = None
    """Folder for checkpoints, TensorBoard events and the summary; by default a new one in runs/."""
    resume: Path | None = None
    """Run folder, or one of its checkpoints, to continue; the other settings are then the run's own by default."""
    nproc: int = 2
    """Processes (ranks) to start on this machine; torchrun's own number where torchrun starts them."""
    backend: Literal["pycoll", "gloo"] = "pycoll"
    """What carries the gradients."""
    seed: int = 0
    """Start of everything random."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    batch_size: int = 8
    """Sequences of a rank in one forward pass."""
    grad_accum: int = 1
    """Forward and backward passes before an optimizer step."""
    lr: float = 2e-3
    """Learning rate at its peak."""
    min_lr_share: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    warmup: int = 50
    """Steps in which the learning rate rises to its peak."""
    weight_decay: float = 0.1
    """Decay of matrices; vectors (biases, norms) have none."""
    beta2: float = 0.99
    """AdamW's memory of squared gradients."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""

    eval_every: int = 100
    """Steps between evaluations."""
    eval_windows: int = 128
    """Windows of the validation text in an evaluation, spread over all of it."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    sample_bytes: int = 400
    """Length of the text generated at the end; 0 for none."""

    model: GPTConfig = field(default_factory=GPTConfig)
    """Shape of the model."""

    def __post_init__(self) -> None:
        positive = ("nproc", "steps", "batch_size", "grad_accum", "clip", "eval_every", "eval_windows")
        for name in (*positive, "lr", "checkpoint_every"):
            if not getattr(self, name) > 0:
                self._refuse(name, "more than 0")
        for name in ("seed", "warmup", "weight_decay", "sample_bytes"):
            if not getattr(self, name) >= 0:
                self._refuse(name, "at least 0")
        for name in ("beta2", "min_lr_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                self._refuse(name, "at least 0 and less than 1")
        if self.model.vocab_size < VOCAB_SIZE:
            self._refuse("model.vocab_size", f"at least {VOCAB_SIZE}, since tokens are bytes")

    def _refuse(self, name: str, allowed: str) -> None:
        value: Any = self
        for part in name.split("."):
            value = getattr(value, part)
        raise ConfigError(f"--{name.replace('_', '-')} is {value}: give {allowed}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        values = asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """The reverse of to_dict. Raises ConfigError where the settings are another version's."""
        paths = {name: Path(values[name]) for name in ("data", "out", "resume") if values.get(name) is not None}
        try:
            return cls(**{**values, **paths, "model": GPTConfig(**values["model"])})
        except (TypeError, KeyError) as error:
            raise ConfigError(f"the run is of another version of pycoll ({error}): start a new one") from error
