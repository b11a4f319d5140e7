"""What a run learns, as the trainer sees it: batches, a model, a loss, and how to judge the result."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pycoll.train.config import TrainConfig
from pycoll.train.mesh import Mesh

Rows = dict[str, tuple[str, Any]]
"""Of a summary: name -> (what is shown, the value itself, as JSON has it)."""


@dataclass(frozen=True)
class Batch:
    """What a rank computes in one forward pass: `model(*inputs)` gives scores for `targets`."""

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`. The host does not wait for a GPU to have taken it."""
        if device.type == "cpu":
            return self
        *inputs, targets = (x.pin_memory().to(device, non_blocking=True) for x in (*self.inputs, self.targets))
        return Batch(tuple(inputs), targets)


class Task(ABC):
    """Everything random follows from the seed, and from how much has been seen. A rank gives what its place in the mesh
    asks for: the ranks that hold the parts of one model get the same batches."""

    name: str
    """Of the data."""
    digest: str
    """Tells whether two runs learn from the same data."""
    description: str
    """Of the data, for people."""
    unit: str
    """Of the loss."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @abstractmethod
    def make_model(self) -> nn.Module:
        """A new one, its weights drawn from torch's generator."""

    @abstractmethod
    def count(self, seen: int, mesh: Mesh) -> int:
        """Examples of all ranks in the step that begins after `seen` of them."""

    @abstractmethod
    def batches(self, seen: int, mesh: Mesh) -> list[Batch]:
        """This rank's for a step, after `seen` examples of all ranks: one for each of the passes that it adds up. They
        lie on the CPU, as those of `validation` do."""

    @abstractmethod
    def tokens_per_step(self, mesh: Mesh) -> int:
        """Of all ranks, on average."""

    @abstractmethod
    def loss(self, scores: Tensor, targets: Tensor, mesh: Mesh) -> Tensor:
        """Of a batch, (), fp32: averaged over passes and data-parallel ranks, it is the mean over all examples."""

    @abstractmethod
    def validation(self, mesh: Mesh) -> Iterator[Batch]:
        """This rank's share of what is judged."""

    @abstractmethod
    def shape(self) -> dict[str, Any]:
        """Of the model: settings that a checkpoint and what goes on from it must have in common."""

    @abstractmethod
    def no_tally(self) -> Tensor:
        """What tallies are added to: zeros, on the CPU."""

    @abstractmethod
    def tally(self, scores: Tensor, targets: Tensor, mesh: Mesh) -> Tensor:
        """Numbers, (n,) fp64, that are added over batches and ranks for the `verdict`, where the scores are."""

    @abstractmethod
    def verdict(self, totals: Tensor) -> dict[str, float]:
        """The names of measures and their values; "loss" is among them."""

    def reference(self) -> Rows:
        """What is reached without a model."""
        return {}

    def utilization(self, tokens_per_s: float, processors: int, device: torch.device) -> Rows:
        """How much of the machine the run has used: of so many processors like `device`, of which rank 0 computes on
        one."""
        return {}

    def finish(self, model: nn.Module) -> str | None:
        """What is to be done with the whole model at the end of a run, wherever it lies; returns text to show, if
        any."""
        return None
