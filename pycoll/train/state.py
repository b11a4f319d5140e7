"""What a checkpoint holds of a run: the whole model and the optimizer's state by the parameters' names, on one rank;
and what each rank alone knows, by its number.

However the model and the state are divided: each rank gives its part, and takes its part of what another mix of ranks
has written. The state is torch.optim.AdamW's with the fp32 masters of 16-bit weights; any of torch's AdamW, FusedAdam
and ShardedAdam takes it up.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pycoll.checkpoint import Tensors
from pycoll.tensor_parallel import merge_tensor, split_tensor
from pycoll.train.mesh import Mesh

MODEL, OPTIMIZER, OWN = "model.", "optimizer.", "own."


class Keeper(Protocol):
    """What keeps an optimizer's state: the optimizer, or a parameter server."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def gather(modules: Sequence[nn.Module], optimizer: Keeper, mesh: Mesh) -> dict[str, Tensor]:
    """The tensors of a run, by name, on the CPU; on rank 0, and nothing on the others. A collective call of all ranks.

    Args:
        modules: what this rank has of the model; parameters have the names of the whole model's.
    """
    parameters = named_parameters(modules)
    names = optimizer_names(parameters, optimizer)
    state = optimizer.state_dict()["state"]
    tensors = {MODEL + name: tensor for module in modules for name, tensor in module.state_dict().items()}
    owners = {MODEL + name: parameter for name, parameter in parameters.items()}
    for index, values in state.items():
        for key, value in values.items():
            name = f"{OPTIMIZER}{names[index]}.{key}"
            tensors[name], owners[name] = value, parameters[names[index]]
    keeps = mesh.dp_rank == mesh.tp_rank == 0
    merged: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = _merge(owners.get(name), tensor)
        if keeps:
            merged[name] = whole.cpu()  # one by one: a GPU need not have room for the whole model
    if mesh.pp > 1 and keeps:  # the tied matrix comes twice, the same
        merged = {name: tensor for stage in _on_first(merged, mesh.pp_group) for name, tensor in stage.items()}
    return merged if dist.get_rank() == 0 else {}


def load(tensors: Tensors, modules: Sequence[nn.Module], optimizer: Keeper) -> None:
    """Fills `modules` and `optimizer` with this rank's part of a run. With a ShardedAdam, or a parameter server, it is
    a collective call.

    Where the run was of another dtype, weights come from its masters, and masters from its weights.

    Raises:
        CheckpointError: a tensor is missing or damaged.
    """
    before = optimizer.state_dict()  # a parameter server's fills the modules with its own weights
    stored: dict[str, list[str]] = {}
    for name in tensors.names():
        if name.startswith(OPTIMIZER):
            owner, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
            stored.setdefault(owner, []).append(key)
    parameters = named_parameters(modules)
    weights = {name: tensors[MODEL + name] for module in modules for name in module.state_dict()}
    states: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(optimizer_names(parameters, optimizer)):
        parameter = parameters[name]
        state = {key: tensors[f"{OPTIMIZER}{name}.{key}"] for key in stored.get(name, [])}
        exact = state.pop("master_param", weights[name])
        if weights[name].dtype != parameter.dtype:
            weights[name] = exact
        if parameter.dtype != torch.float32 and exact.dtype == torch.float32:
            state["master_param"] = exact
        if state:
            states[index] = {key: _split(parameter, value) for key, value in state.items()}
    for module in modules:
        own = {name: _split(parameters.get(name), weights[name]) for name in module.state_dict()}
        module.load_state_dict(own)
    optimizer.load_state_dict({**before, "state": states})


def gather_own(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each rank alone knows, by rank and name, on the CPU; on rank 0, and nothing on the others. A collective call
    of all ranks."""
    of_all = _on_first({name: tensor.cpu() for name, tensor in own.items()}, dist.group.WORLD)
    return {f"{OWN}{rank}.{name}": tensor for rank, some in enumerate(of_all) for name, tensor in some.items()}


def load_own(tensors: Tensors) -> dict[str, Tensor]:
    """What this rank alone knew, in a run of the same mix of ranks; nothing where there was no such rank."""
    mine = f"{OWN}{dist.get_rank()}."
    return {name.removeprefix(mine): tensors[name] for name in tensors.names() if name.startswith(mine)}


def load_weights(tensors: Tensors, model: nn.Module) -> None:
    """Fills a whole model. Raises CheckpointError where a tensor is missing or damaged."""
    model.load_state_dict({name: tensors[MODEL + name] for name in model.state_dict()})


def named_parameters(modules: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Of all modules together, by their names in the whole model."""
    return {name: parameter for module in modules for name, parameter in module.named_parameters()}


def optimizer_names(parameters: dict[str, nn.Parameter], optimizer: Keeper) -> list[str]:
    """Of the optimizer's parameters, in the order in which its state_dict counts them."""
    names = {parameter: name for name, parameter in parameters.items()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _merge(parameter: nn.Parameter | None, tensor: Tensor) -> Tensor:
    """A weight, or a state of its shape, as it is in the whole model."""
    return tensor if parameter is None or tensor.dim() == 0 else merge_tensor(parameter, tensor)


def _split(parameter: nn.Parameter | None, whole: Tensor) -> Tensor:
    """This rank's part of a weight, or of a state of its shape."""
    return whole if parameter is None or whole.dim() == 0 else split_tensor(parameter, whole)


def _on_first(tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> list[dict[str, Tensor]]:
    """Those of each rank of a group, on the CPU, on its first rank; nothing on the others. A call of all of them."""
    about = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    of_all: list[list[tuple[str, torch.dtype, torch.Size]]] = [[]] * dist.get_world_size(group)
    dist.all_gather_object(of_all, about, group=group)
    if dist.get_rank(group) > 0:
        for tensor in tensors.values():
            dist.send(tensor.contiguous(), group=group, group_dst=0)
        return []
    brought = [tensors]
    for rank, theirs in enumerate(of_all[1:], start=1):
        brought.append({name: torch.empty(shape, dtype=dtype) for name, dtype, shape in theirs})
        for tensor in brought[-1].values():
            dist.recv(tensor, group=group, group_src=rank)
    return brought
