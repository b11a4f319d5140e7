"""FSDP, FSDP2, tensor parallelism, and distributed checkpoints: over pycoll the numbers are those over Gloo."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from distributed.side_by_side import Ranks, Tolerance
from pycoll.testing import Rank

pytestmark = pytest.mark.timeout(120)
STEPS = 3
SINGLE = Tolerance(rtol=1e-4, atol=1e-5)
HALF = Tolerance(rtol=3e-2, atol=3e-3)  # what travels in bfloat16 is rounded after each of three additions


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width + 3)  # no multiple of the ranks
        self.down = nn.Linear(2 * width + 3, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def examples(part: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + part)
    return torch.randn(4, 8, generator=generator).double(), torch.randint(4, (4,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, part: int, clip: bool = False) -> Iterator[Tensor]:
    for step in range(STEPS):
        x, y = examples(part, step)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        yield loss
        if clip:
            yield whole(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        optimizer.step()


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def wholes(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in model.state_dict().items()}


# FSDP


def _fsdp(rank: Rank, options: dict[str, Any]) -> dict[str, Any]:
    """In fp32: FSDP does not clip other gradients."""
    model = FullyShardedDataParallel(
        net().float(), auto_wrap_policy=ModuleWrapPolicy({Block}), device_id=torch.device("cpu"), **options
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(STEPS):
        x, y = examples(rank.rank, step)
        x = x.float()
        if step == 1:
            with model.no_sync():
                nn.functional.cross_entropy(model(x), y).backward()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses += [loss, model.clip_grad_norm_(0.1)]
        optimizer.step()
        optimizer.zero_grad()
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        parameters = model.state_dict()
    moments = FullyShardedDataParallel.optim_state_dict(model, optimizer)["state"]
    return {"losses": losses, "parameters": parameters, "moments": moments}


@pytest.mark.parametrize(
    ("strategy", "use_orig_params"),
    (("FULL_SHARD", True), ("FULL_SHARD", False), ("SHARD_GRAD_OP", True), ("NO_SHARD", True)),
)
def test_fsdp(two_ranks: Ranks, strategy: str, use_orig_params: bool) -> None:
    options = {"sharding_strategy": ShardingStrategy[strategy], "use_orig_params": use_orig_params}
    two_ranks.compare(_fsdp, options, tolerance=SINGLE)


def _fsdp_mixed(rank: Rank) -> dict[str, Any]:
    return _fsdp(rank, {"mixed_precision": MixedPrecision(reduce_dtype=torch.bfloat16), "use_orig_params": True})


def test_fsdp_reduces_in_bfloat16(two_ranks: Ranks) -> None:
    two_ranks.compare(_fsdp_mixed, tolerance=HALF)


def _fsdp_hybrid(rank: Rank, strategy: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, rank.world_size // 2), mesh_dim_names=("replicas", "shards"))
    return _fsdp(rank, {"sharding_strategy": ShardingStrategy[strategy], "device_mesh": mesh})


@pytest.mark.parametrize("strategy", ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"))
def test_fsdp_hybrid(four_ranks: Ranks, strategy: str) -> None:
    four_ranks.compare(_fsdp_hybrid, strategy, tolerance=SINGLE)


# FSDP2


def fsdp2(mesh: DeviceMesh, **options: Any) -> Net:
    model = net()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _fsdp2(rank: Rank, options: dict[str, Any]) -> dict[str, Any]:
    model = fsdp2(init_device_mesh("cpu", (rank.world_size,)), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = list(train(model, optimizer, rank.rank, clip=True))
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": losses, "parameters": wholes(model), "gradients": gradients}


@pytest.mark.parametrize(
    "options",
    ({}, {"reshard_after_forward": False}, {"reshard_after_forward": 1}),
    ids=("plain", "kept whole", "reshard to 1"),
)
def test_fsdp2(ranks: Ranks, options: dict[str, Any]) -> None:
    ranks.compare(_fsdp2, options)


def test_fsdp2_in_bfloat16(four_ranks: Ranks) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, cast_forward_inputs=True)
    four_ranks.compare(_fsdp2, {"mp_policy": policy}, tolerance=HALF)


def _accumulated(rank: Rank) -> dict[str, Any]:
    model = fsdp2(init_device_mesh("cpu", (rank.world_size,)))
    for step in range(STEPS):
        model.set_requires_gradient_sync(step == STEPS - 1)
        x, y = examples(rank.rank, step)
        nn.functional.cross_entropy(model(x), y).backward()
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def test_fsdp2_accumulates_gradients(ranks: Ranks) -> None:
    ranks.compare(_accumulated)


def _hybrid2(rank: Rank) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, rank.world_size // 2), mesh_dim_names=("replicas", "shards"))
    model = fsdp2(mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = list(train(model, optimizer, rank.rank))
    return {"losses": losses, "parameters": wholes(model)}


def test_fsdp2_hybrid(four_ranks: Ranks) -> None:
    four_ranks.compare(_hybrid2)


# Tensor parallelism


PLANS: dict[str, dict[str, Any]] = {
    # The output between them stays a DTensor: the ranks' parts of it differ in size.
    "columns and rows": {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()},
    "sequence": {
        "norm": SequenceParallel(sequence_dim=0, use_local_output=False),
        "up": ColwiseParallel(input_layouts=Shard(0), use_local_output=False),
        "down": RowwiseParallel(output_layouts=Replicate()),
    },
    "rows first": {
        "up": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        "down": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
    },
}


def tensor_parallel(mesh: DeviceMesh, plan: str) -> Net:
    model = net()
    for block in model.blocks:
        steps = dict(PLANS[plan])
        if plan == "sequence":
            inputs = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(0))
            parallelize_module(block, mesh, {"norm": inputs})
        parallelize_module(block, mesh, steps)
    return model


def _tensor_parallel(rank: Rank, plan: str) -> dict[str, Any]:
    model = tensor_parallel(init_device_mesh("cpu", (rank.world_size,)), plan)
    losses = list(train(model, torch.optim.SGD(model.parameters(), lr=0.1, foreach=False), part=0))
    return {"losses": losses, "parameters": wholes(model)}


@pytest.mark.parametrize("plan", PLANS)
def test_tensor_parallel(ranks: Ranks, plan: str) -> None:
    ranks.compare(_tensor_parallel, plan)


def _loss_parallel(rank: Rank) -> dict[str, Any]:
    model = parallelize_module(
        net(),
        init_device_mesh("cpu", (rank.world_size,)),
        {"out": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)},
    )
    x, y = examples(0, 0)
    with loss_parallel():
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
    return {"loss": whole(loss), **{name: whole(p.grad) for name, p in model.named_parameters()}}


def test_loss_parallel(ranks: Ranks) -> None:
    ranks.compare(_loss_parallel)


def _two_dimensions(rank: Rank) -> dict[str, Any]:
    """Sharded over one dimension of the mesh, tensor-parallel over the other."""
    mesh = init_device_mesh("cpu", (2, rank.world_size // 2), mesh_dim_names=("data", "tensor"))
    model = tensor_parallel(mesh["tensor"], "columns and rows")
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    losses = list(train(model, optimizer, mesh["data"].get_local_rank()))
    return {"losses": losses, "parameters": wholes(model)}


def test_fsdp2_and_tensor_parallel(four_ranks: Ranks) -> None:
    four_ranks.compare(_two_dimensions)


# The checkpoint


def _trained(rank: Rank) -> tuple[Net, torch.optim.Optimizer]:
    model = fsdp2(init_device_mesh("cpu", (rank.world_size,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in train(model, optimizer, rank.rank):
        pass
    return model, optimizer


def _saved_and_loaded(rank: Rank, asynchronous: bool) -> dict[str, Any]:
    folder = rank.folder / f"checkpoint {dist.get_backend()} {asynchronous}"
    model, optimizer = _trained(rank)
    parameters, moments = get_state_dict(model, optimizer)
    if asynchronous:
        dcp.async_save({"model": parameters, "optimizer": moments}, checkpoint_id=folder).result()
    else:
        dcp.save({"model": parameters, "optimizer": moments}, checkpoint_id=folder)
    saved = wholes(model)
    other, other_optimizer = fsdp2(init_device_mesh("cpu", (rank.world_size,))), None
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.5)
    parameters, moments = get_state_dict(other, other_optimizer)
    dcp.load({"model": parameters, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(other, other_optimizer, model_state_dict=parameters, optim_state_dict=moments)
    loaded = wholes(other)
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    return {"loaded": loaded, "goes on": list(train(other, other_optimizer, rank.rank))}


@pytest.mark.parametrize("asynchronous", (False, True))
def test_checkpoint(ranks: Ranks, asynchronous: bool) -> None:
    ranks.compare(_saved_and_loaded, asynchronous)


def _resharded(rank: Rank) -> dict[str, Any]:
    """Saved sharded along the first dimension, loaded along the last, and by each rank whole."""
    folder = rank.folder / f"resharded {dist.get_backend()}"
    mesh = init_device_mesh("cpu", (rank.world_size,))
    tensor = torch.arange(35.0).view(5, 7)
    dcp.save({"x": dist.tensor.distribute_tensor(tensor, mesh, [Shard(0)])}, checkpoint_id=folder)
    columns = dist.tensor.distribute_tensor(torch.zeros(5, 7), mesh, [Shard(1)])
    dcp.load({"x": columns}, checkpoint_id=folder)
    plain = torch.zeros(5, 7)
    dcp.load({"x": plain}, checkpoint_id=folder)
    assert torch.equal(columns.full_tensor(), tensor) and torch.equal(plain, tensor)
    return {"columns": columns.to_local(), "files": sorted(path.name for path in Path(folder).iterdir())}


def test_checkpoint_is_loaded_otherwise_than_it_was_saved(four_ranks: Ranks) -> None:
    four_ranks.compare(_resharded)


def _whole_state(rank: Rank) -> dict[str, Any]:
    """All of the parameters to rank 0, and from there to a new model."""
    model, _ = _trained(rank)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(model, options=options)
    other = fsdp2(init_device_mesh("cpu", (rank.world_size,)))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    given = dict(gathered) if rank.rank == 0 else {}  # what is loaded takes the place of what is given
    set_model_state_dict(other, given, options=options)
    return {"gathered": gathered, "scattered": wholes(other)}


def test_whole_state_dict(ranks: Ranks) -> None:
    ranks.compare(_whole_state)
