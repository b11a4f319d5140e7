"""Which way to train together the settings ask for."""

from torch import nn

from pycoll.train.mesh import Mesh
from pycoll.train.parallel import Parallel, PycollParallel, TorchParallel
from pycoll.train.pipeline import PipelineParallel
from pycoll.train.relaxed import AsyncParallel, PeriodicParallel
from pycoll.train.task import Task


def make_parallel(model: nn.Module, task: Task, mesh: Mesh) -> Parallel:
    """Around `model`, which is converted and divided in place. A call of all ranks."""
    if task.config.sync != "step":
        return AsyncParallel(model, task, mesh) if task.config.sync == "async" else PeriodicParallel(model, task, mesh)
    if task.config.updater == "torch":
        return TorchParallel(model, task, mesh)
    return PycollParallel(model, task, mesh) if mesh.pp == 1 else PipelineParallel(model, task, mesh)
