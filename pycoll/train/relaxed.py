"""Ranks that train one model together without waiting for one another at every step; `pycoll.relaxed` does the work."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from pycoll.adam_state import FLOAT_STATE
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
MOMENTUM, RESIDUAL = "momentum", "residual"
SCALER, SCALER_STATE = "scaler", ("scale", "_growth_tracker")


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

    They evaluate and save at meetings, when their weights are the same. Moments, scaler and residual are each rank's
    own; where another number of ranks goes on, all have rank 0's moments and scaler.
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
        """DiLoCo's outer momentum. Its anchors are the weights themselves, since ranks have just met."""
        return {f"{OUTER}{name}.{MOMENTUM}": values[MOMENTUM] for name, values in self._outer() if MOMENTUM in values}

    def own_state(self) -> dict[str, Tensor]:
        """What int8 has rounded away; and of all ranks but the first, whose are the run's, moments and scaler."""
        own = {f"{OUTER}{name}.{RESIDUAL}": values[RESIDUAL] for name, values in self._outer() if RESIDUAL in values}
        if self.mesh.dp_rank > 0:
            for place, values in self.optimizer.state_dict()["state"].items():
                moments = {key: value for key, value in values.items() if key != "master_param"}  # the same on all
                own |= {f"{place}.{key}": value for key, value in moments.items()}
            if self.scaler.is_enabled():
                scaler = self.scaler.state_dict()
                own[SCALER] = torch.tensor([scaler[key] for key in SCALER_STATE], dtype=torch.float64)
        return own

    def take_up(self, tensors: Tensors, own: Mapping[str, Tensor], step: int) -> None:
        """As Parallel.take_up; outer state begins anew where the checkpoint is of a run without."""
        if self.mesh.dp_rank > 0:
            self._take_up_moments(own)
        stored = set(tensors.names())
        parameters = state.named_parameters(self.modules)
        outer: dict[int, dict[str, Tensor]] = {}
        for place, name in enumerate(self._names()):
            parameter = parameters[name]
            outer[place] = {"anchor": self.optimizer.state.get(parameter, {}).get("master_param", parameter)}
            if (saved := f"{OUTER}{name}.{MOMENTUM}") in stored:
                outer[place][MOMENTUM] = tensors[saved]
            if (saved := f"{OUTER}{name}.{RESIDUAL}") in own:
                outer[place][RESIDUAL] = own[saved]
        self._meetings.load_state_dict({"steps": step, "met": step, "state": outer})

    def agrees(self, step: int) -> bool:
        """At meetings."""
        return step % self.task.config.every == 0 or step == self.task.config.steps

    def meet(self) -> None:
        """As Parallel.meet; between meetings only after the last step."""
        self._meetings.synchronize()

    def _take_up_moments(self, own: Mapping[str, Tensor]) -> None:
        """This rank's in place of rank 0's, which the checkpoint has as the run's; no other run has the former."""
        before = self.optimizer.state_dict()
        moments = {
            place: {key: own[f"{place}.{key}"] for key in ("step", *FLOAT_STATE) if f"{place}.{key}" in own}
            for place in range(len(self._names()))
        }
        if SCALER not in own and not any(moments.values()):
            return
        for place, values in before["state"].items():
            if "master_param" in values:
                moments[place]["master_param"] = values["master_param"]
        self.optimizer.load_state_dict({**before, "state": {place: some for place, some in moments.items() if some}})
        if SCALER in own and self.scaler.is_enabled():
            scaler = dict(zip(SCALER_STATE, own[SCALER].tolist(), strict=True))
            self.scaler.load_state_dict({**self.scaler.state_dict(), **scaler})

    def _outer(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What the outer optimizer keeps, with the name of the parameter."""
        names = self._names()
        for place, values in self._meetings.state_dict()["state"].items():
            yield names[place], values

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
