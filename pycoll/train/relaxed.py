"""Ranks that train one model together without waiting for one another at every step; `pycoll.relaxed` does the work."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from pycoll.checkpoint import Tensors
from pycoll.optim import FusedAdam
from pycoll.relaxed import DiLoCo, LocalSGD, ParameterServer
from pycoll.train import state
from pycoll.train.config import DTYPES
from pycoll.train.mesh import Mesh
from pycoll.train.optimization import adam_settings
from pycoll.train.parallel import WholeModel, compile_blocks
from pycoll.train.task import Task

OUTER = "outer."
"""What the names of DiLoCo's tensors in a checkpoint begin with: whoever trains otherwise does not read them."""


class _BareModel(WholeModel):
    """The model itself with FusedAdam; 16-bit weights have fp32 masters."""

    optimizer: FusedAdam

    def __init__(self, model: nn.Module, task: Task, mesh: Mesh) -> None:
        super().__init__(task, mesh)
        model.to(DTYPES[task.config.dtype])
        compile_blocks(model, task.config)
        self.model, self.modules = model, [model]
        self.optimizer = FusedAdam(**adam_settings(model, task.config))


class PeriodicParallel(_BareModel):
    """Ranks clip and step alone, and meet every so many steps: local SGD, or DiLoCo.

    They evaluate and save at meetings, where rank 0's moments, scaler and residual stand for all.
    """

    def __init__(self, model: nn.Module, task: Task, mesh: Mesh) -> None:
        super().__init__(model, task, mesh)
        config = task.config
        self._meetings: LocalSGD | DiLoCo = (
            LocalSGD(self.optimizer, every=config.every)
            if config.sync == "local"
            else DiLoCo(self.optimizer, every=config.every, wire_dtype=DTYPES[config.wire_dtype])
        )

    def step(self, max_norm: float) -> float:
        """As Parallel.step, by this rank's gradients alone; then the ranks meet, where it is time."""
        norm = super().step(max_norm)
        self._meetings.step()
        return norm

    def extra_state(self) -> dict[str, Tensor]:
        """DiLoCo's outer momentum and residual. Its anchors are the weights themselves, since ranks have just met."""
        names = self._names()
        return {
            f"{OUTER}{names[place]}.{key}": value
            for place, values in self._meetings.state_dict()["state"].items()
            for key, value in values.items()
            if key != "anchor"
        }

    def take_up(self, tensors: Tensors, step: int) -> None:
        """As Parallel.take_up; outer state begins anew where the checkpoint is of a run without."""
        stored = set(tensors.names())
        parameters = state.named_parameters(self.modules)
        outer: dict[int, dict[str, Tensor]] = {}
        for place, name in enumerate(self._names()):
            parameter = parameters[name]
            outer[place] = {"anchor": self.optimizer.state.get(parameter, {}).get("master_param", parameter)}
            for key in ("momentum", "residual"):
                if (saved := f"{OUTER}{name}.{key}") in stored:
                    outer[place][key] = tensors[saved]
        self._meetings.load_state_dict({"steps": step, "met": step, "state": outer})

    def agrees(self, step: int) -> bool:
        """At meetings."""
        return step % self.task.config.every == 0 or step == self.task.config.steps

    def meet(self) -> None:
        """As Parallel.meet; between meetings only after the last step."""
        self._meetings.synchronize()

    def _names(self) -> list[str]:
        """Of the parameters, by their places."""
        return state.optimizer_names(state.named_parameters(self.modules), self.optimizer)


class AsyncParallel(_BareModel):
    """Ranks clip alone, and servers, one on each rank, step as gradients come."""

    def __init__(self, model: nn.Module, task: Task, mesh: Mesh) -> None:
        super().__init__(model, task, mesh)
        self._server = ParameterServer(self.optimizer, staleness=task.config.staleness)

    def step(self, max_norm: float) -> float:
        """As Parallel.step; a gradient that is not finite reaches no server, as it would spoil all ranks' weights."""
        norm = self._clip(max_norm)
        if torch.isfinite(norm):
            self._server.step()
        self.optimizer.zero_grad()
        return float(norm)

    @property
    def keeper(self) -> ParameterServer:
        return self._server

    def agrees(self, step: int) -> bool:
        """Where ranks evaluate or save, which they do together."""
        config = self.task.config
        return step % config.eval_every == 0 or step % config.checkpoint_every == 0 or step == config.steps

    def meet(self) -> None:
        self._server.synchronize()

    def running(self) -> AbstractContextManager[object]:
        return self._server

    def _clip(self, max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
