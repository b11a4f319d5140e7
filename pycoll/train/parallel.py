"""How ranks train one model together: who has which part, who averages and updates, and in which dtypes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from pycoll.buckets import GradientBuckets
from pycoll.checkpoint import Tensors
from pycoll.data_parallel import DataParallel
from pycoll.ddp_hook import WireState, ddp_hook
from pycoll.models.gpt import GPT, Transformer
from pycoll.optim import FusedAdam
from pycoll.sharded import ShardedAdam
from pycoll.tensor_parallel import is_split, parallelize_gpt
from pycoll.train.config import DTYPES, TrainConfig
from pycoll.train.mesh import Mesh
from pycoll.train.optimization import adam_settings
from pycoll.train.state import Keeper
from pycoll.train.task import Batch, Task

LEAST_SCALE = 1.0
"""Gradients that overflow although the loss is not scaled up have another reason than the scale."""


class Parallel(ABC):
    """A model on all ranks and its optimizer: passes over batches, and steps of what they have left."""

    modules: Sequence[nn.Module]
    """What this rank has of the model, with the whole model's names."""
    optimizer: torch.optim.Optimizer
    buckets: GradientBuckets | None = None
    """Which average gradients, where torch does not."""
    knows_loss = True
    """Whether this rank computes the loss, as all do but those of a pipeline's first stages."""

    def __init__(self, task: Task, mesh: Mesh) -> None:
        self.task, self.mesh = task, mesh
        self.scaler = GradScaler(mesh.device.type, enabled=task.config.dtype == "float16")
        """Of the loss; the others' gradients have no need of it."""

    @abstractmethod
    def accumulate(self, batches: Sequence[Batch]) -> Tensor:
        """Gradients of all batches, for the next step; returns the mean of their losses, (), or 0 where not known."""

    @abstractmethod
    def scores(self, batch: Batch) -> Tensor | None:
        """Of a batch, without gradients, where this rank knows the loss. Ranks that share a model call it together."""

    def step(self, max_norm: float) -> float:
        """Clips the averages to `max_norm`, updates the weights and drops the gradients.

        Returns the norm before; where it is not finite and `may_skip`, the weights stay as they are.
        """
        norm = self._clip(max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return float(norm)

    def may_skip(self) -> bool:
        """Whether gradients that overflow have only been scaled too much, so that the next step may do better."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= LEAST_SCALE

    def settle(self, batch: Batch) -> None:
        """Before the first step, with some batch: what must not change after it."""
        return

    @property
    def keeper(self) -> Keeper:
        """What a checkpoint's optimizer state is taken from, and given to."""
        return self.optimizer

    def extra_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the weights and the optimizer's state, by name; no collective call."""
        return {}

    def own_state(self) -> dict[str, Tensor]:
        """What this rank alone knows, by name, for a run that goes on with the same mix and dtype."""
        return {} if self.buckets is None else self.buckets.state_dict()

    def take_up(self, tensors: Tensors, own: Mapping[str, Tensor], step: int) -> None:
        """From a checkpoint after `step` steps, whose weights and optimizer's state are loaded: the rest.

        Args:
            own: what `own_state` was, where it is still of use.
        """
        if self.buckets is not None:
            self.buckets.load_state_dict(own)

    def agrees(self, step: int) -> bool:
        """Whether the ranks tell one another, after so many steps, their losses and whether to stop."""
        return True

    def meet(self) -> None:
        """All ranks get the weights of all, to evaluate or to save them. A call of all ranks after the same step."""
        return

    def running(self) -> AbstractContextManager[object]:
        """To be entered for the run: ends in order what serves the other ranks, and after an error at once."""
        return nullcontext()

    def waiting_share(self) -> float | None:
        """Share of the steps in which this rank had its gradients and waited for their average; None: unknown."""
        return None

    def _clip(self, max_norm: float) -> Tensor:
        assert isinstance(self.optimizer, FusedAdam)
        return self.optimizer.clip_grad_norm(max_norm, scaler=self.scaler)


class WholeModel(Parallel):
    """Forward passes go through all blocks on one rank, also where tensor-parallel ranks share each of them."""

    model: nn.Module
    """As the ranks share it: gradients are averaged where its forward pass began, if they are."""
    autocast: torch.dtype | None = None
    """Dtype of the activations, where it is not the weights'."""

    def accumulate(self, batches: Sequence[Batch]) -> Tensor:
        """As Parallel.accumulate; all but the last pass add up gradients on each rank, the last one averages them."""
        total = torch.zeros((), device=self.mesh.device)
        for i, batch in enumerate(batches):
            with nullcontext() if i == len(batches) - 1 else self._no_sync():
                loss = self._loss(batch) / len(batches)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        return self._scores(self.modules[0], batch)

    def _no_sync(self) -> AbstractContextManager[None]:
        """Around a forward pass whose gradients are only added up."""
        return nullcontext()

    def _loss(self, batch: Batch) -> Tensor:
        return self.task.loss(self._scores(self.model, batch), batch.targets, self.mesh)

    def _scores(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(self.mesh.device.type, self.autocast, enabled=self.autocast is not None):
            scores: Tensor = model(*batch.inputs)
        return scores


class PycollParallel(WholeModel):
    """pycoll.DataParallel with ShardedAdam or FusedAdam; 16-bit weights have fp32 masters."""

    model: DataParallel

    def __init__(self, model: nn.Module, task: Task, mesh: Mesh) -> None:
        super().__init__(task, mesh)
        config = task.config
        divide(model.to(DTYPES[config.dtype]), config, mesh)
        compile_blocks(model.to(mesh.device), config)
        self.modules = [model]
        parts = mesh.parts(lambda parameter: 1 if is_split(parameter) else mesh.tp)
        self.model = DataParallel(model, mesh.dp_group, wire_dtype=DTYPES[config.wire_dtype], parts=parts)
        self.buckets = self.model.buckets
        settings = adam_settings(model, config)
        self.optimizer: FusedAdam = (
            ShardedAdam(**settings, buckets=self.buckets) if config.updater == "sharded" else FusedAdam(**settings)
        )

    def _no_sync(self) -> AbstractContextManager[None]:
        return self.model.no_sync()


class TorchParallel(WholeModel):
    """torch's DistributedDataParallel and fused AdamW: fp32 weights, and 16-bit activations by autocast."""

    model: DistributedDataParallel

    def __init__(self, model: nn.Module, task: Task, mesh: Mesh) -> None:
        super().__init__(task, mesh)
        config = task.config
        compile_blocks(model.to(mesh.device), config)
        self.modules = [model]
        self.model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(**adam_settings(model, config), fused=True)
        self.autocast = DTYPES[config.dtype] if config.dtype != "float32" else None
        wire = DTYPES[config.wire_dtype]
        self._hook = WireState(wire) if wire != torch.float32 else None

    def settle(self, batch: Batch) -> None:
        """Lets DDP sort its buckets before the first step rather than after it.

        It does so after the first backward pass of a process, which changes the order in which a ring adds: a resumed
        run would differ from one that never stopped. The hook comes later: it must keep nothing of this pass.
        """
        self._loss(batch).backward()
        self.optimizer.zero_grad()
        if self._hook is not None:
            self.model.register_comm_hook(self._hook, ddp_hook)

    def own_state(self) -> dict[str, Tensor]:
        return {} if self._hook is None else self._hook.state_dict()

    def take_up(self, tensors: Tensors, own: Mapping[str, Tensor], step: int) -> None:
        if self._hook is not None:
            self._hook.load_state_dict(own)

    def waiting_share(self) -> float | None:
        """As DDP samples it."""
        times = self.model._get_ddp_logging_data()  # in ns, averages over the first steps and then every 100th
        if "avg_backward_comm_time" not in times:  # no step, where a run goes on from its last one
            return None
        waited = times["avg_backward_comm_time"] - times["avg_backward_compute_comm_overlap_time"]
        computed = times["avg_forward_compute_time"] + times["avg_backward_compute_time"]
        return waited / max(1, computed + waited)

    def _no_sync(self) -> AbstractContextManager[None]:
        return self.model.no_sync()

    def _clip(self, max_norm: float) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)


def divide(model: nn.Module, config: TrainConfig, mesh: Mesh) -> None:
    """By the tensor-parallel ranks, if there are several."""
    if mesh.tp > 1:
        assert isinstance(model, GPT)
        parallelize_gpt(model, mesh.tp_group, sequence_parallel=config.sequence_parallel)


def compile_blocks(model: nn.Module, config: TrainConfig) -> None:
    """Block by block: the whole takes longer to compile, and runs no faster."""
    if config.compile:
        assert isinstance(model, Transformer)
        for block in model.blocks:
            block.compile()
