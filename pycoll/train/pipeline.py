"""Pipeline parallel: each rank has one stage of the model, or two, and micro-batches go through all of them.

torch.distributed.pipelining runs the schedules: GPipe (Huang et al., 2019), 1F1B (Narayanan et al., PipeDream, 2019)
and interleaved 1F1B (Narayanan et al., Megatron-LM, 2021). Activations and their gradients travel through the process
group's send and recv; weights' gradients are added up over the micro-batches and then averaged over the data-parallel
ranks of the stage.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.distributed.pipelining.stage import _PipelineStageBase

from pycoll.buckets import GradientBuckets
from pycoll.communicator import Communicator
from pycoll.models.gpt import GPT
from pycoll.models.stage import GPTStage
from pycoll.sharded import ShardedAdam
from pycoll.tensor_parallel import is_split
from pycoll.train.config import DTYPES
from pycoll.train.mesh import Mesh
from pycoll.train.optimization import adam_settings
from pycoll.train.parallel import Parallel, compile_blocks, divide
from pycoll.train.task import Batch, Task

SINGLE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class Pipeline:
    """The stages of this rank, and their schedule."""

    def __init__(
        self,
        model: GPT,
        mesh: Mesh,
        *,
        schedule: str,
        stages_per_rank: int,
        micro_batches: int,
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Divides `model`; `loss` is that of a micro-batch's scores and targets, of which the gradients are added up.

        A call that all ranks make.
        """
        self._mesh, self._group = mesh, mesh.pp_group
        self._count = mesh.pp * stages_per_rank
        own = range(mesh.pp_rank, self._count, mesh.pp)
        self._stages = {index: GPTStage(model, index, self._count).to(mesh.device) for index in own}
        self.modules = nn.ModuleList(self._stages.values())
        """The stages of this rank, in order."""
        stages: list[_PipelineStageBase] = [
            PipelineStage(stage, index, self._count, mesh.device, group=self._group)
            for index, stage in self._stages.items()
        ]
        self._schedule: PipelineScheduleSingle | PipelineScheduleMulti = (
            SINGLE[schedule](stages[0], micro_batches, loss, scale_grads=False)
            if schedule in SINGLE
            else ScheduleInterleaved1F1B(stages, micro_batches, loss, scale_grads=False)
        )

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first stage, which takes the tokens."""
        return self._mesh.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage, which knows the loss."""
        return self._mesh.pp_rank == self._mesh.pp - 1

    @property
    def tied(self) -> nn.Parameter | None:
        """The matrix that the first and the last stage share, where this rank has it."""
        for stage in self._stages.values():
            if stage.is_first or stage.is_last:
                return stage.tied
        return None

    def run(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward passes of all micro-batches: (M * B, T), (M * B, T) -> the sum of the losses, ().

        It is zero on ranks other than the last stage's. Gradients are added up, those of the tied matrix over its two
        stages too.
        """
        losses: list[Tensor] = []
        arguments = (inputs,) if self.is_first else ()
        target = targets if self.is_last else None
        self._schedule.step(*arguments, target=target, losses=losses, return_outputs=False)
        self._add_tied_up()
        if not losses:
            return torch.zeros((), device=self._mesh.device)
        return torch.stack([loss.detach() for loss in losses]).sum()

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor | None:
        """Scores of one batch, of whatever size, on the last stage's ranks: (B, T) -> (B, T, V); elsewhere None."""
        x = inputs
        for index in range(self._count):
            owner = index % self._mesh.pp
            if owner == self._mesh.pp_rank:
                x = self._stages[index](x)
            x = self._pass_on(x, owner, (owner + 1) % self._mesh.pp) if index < self._count - 1 else x
        return x if self.is_last else None

    def _pass_on(self, x: Tensor, source: int, target: int) -> Tensor:
        if self._mesh.pp_rank == source:
            shape = torch.tensor(x.shape)  # on the CPU, where it is read
            dist.send(shape, group=self._group, group_dst=target)
            dist.send(x.contiguous(), group=self._group, group_dst=target)
        elif self._mesh.pp_rank == target:
            shape = torch.empty(3, dtype=torch.int64)
            dist.recv(shape, group=self._group, group_src=source)
            sizes, dtype = tuple(shape.tolist()), next(self.modules.parameters()).dtype
            x = torch.empty(sizes, dtype=dtype, device=self._mesh.device)
            dist.recv(x, group=self._group, group_src=source)
        return x

    def _add_tied_up(self) -> None:
        """The first and the last stage are left with the same gradient of the matrix that both have."""
        if self.tied is None:
            return
        grad = self.tied.grad
        assert grad is not None
        if self.is_first:
            others = torch.empty_like(grad)
            dist.recv(others, group=self._group, group_src=self._mesh.pp - 1)
            grad.add_(others)
            dist.send(grad, group=self._group, group_dst=self._mesh.pp - 1)
        else:
            dist.send(grad, group=self._group, group_dst=0)
            dist.recv(grad, group=self._group, group_src=0)


class PipelineParallel(Parallel):
    """Stages of the model on different ranks, each data-parallel with pycoll.ShardedAdam."""

    buckets: GradientBuckets

    def __init__(self, model: nn.Module, task: Task, mesh: Mesh) -> None:
        super().__init__(task, mesh)
        config = task.config
        assert isinstance(model, GPT)
        divide(model.to(DTYPES[config.dtype]), config, mesh)
        compile_blocks(model, config)
        self._pipeline = Pipeline(
            model,
            mesh,
            schedule=config.schedule,
            stages_per_rank=config.stages_per_rank,
            micro_batches=config.grad_accum,
            loss=self._micro_loss,
        )
        self.modules = [*self._pipeline.modules]
        self.knows_loss = self._pipeline.is_last
        tied = self._pipeline.tied

        def copies(parameter: Tensor) -> int:
            of_stages = 2 if parameter is tied else 1
            return of_stages * (1 if is_split(parameter) else mesh.tp)

        communicator = Communicator.from_group(mesh.dp_group)
        self.buckets = GradientBuckets(
            self._pipeline.modules.parameters(),
            communicator,
            wire_dtype=DTYPES[config.wire_dtype],
            parts=mesh.parts(copies),
        )
        settings = adam_settings(self._pipeline.modules, config)
        self.optimizer: ShardedAdam = ShardedAdam(**settings, buckets=self.buckets)

    def accumulate(self, batches: Sequence[Batch]) -> Tensor:
        """As Parallel.accumulate; the batches are the pipeline's micro-batches."""
        total = self._run(batches)
        self.buckets.average()
        return total / self.scaler.get_scale()

    def scores(self, batch: Batch) -> Tensor | None:
        return self._pipeline.forward(batch.inputs[0])

    def settle(self, batch: Batch) -> None:
        """Lets the stages learn the shapes that they pass on, from passes of which nothing is kept."""
        self._run([batch] * self.task.config.grad_accum)
        self.optimizer.zero_grad()

    def _run(self, batches: Sequence[Batch]) -> Tensor:
        inputs = torch.cat([batch.inputs[0] for batch in batches])
        targets = torch.cat([batch.targets for batch in batches])
        with self.buckets.no_sync():
            return self._pipeline.run(inputs, targets)

    def _micro_loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        loss = self.task.loss(scores, targets, self.mesh) / self.task.config.grad_accum
        return self.scaler.scale(loss)
