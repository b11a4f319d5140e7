"""torch.distributed._functional_collectives, eager and compiled: over pycoll the numbers are those over Gloo."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from distributed.side_by_side import Ranks
from pycoll.testing import Rank

pytestmark = pytest.mark.timeout(120)


def values(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(source: int, target: int) -> int:
    return (2 * source + target) % 3 + 1


def splits(rank: Rank) -> tuple[list[int], list[int]]:
    everyone = range(rank.world_size)
    return [rows(rank.rank, r) for r in everyone], [rows(r, rank.rank) for r in everyone]


Call = Callable[[Tensor], Any]


def calls(rank: Rank) -> dict[str, Call]:
    """Of a tensor of (4 * world_size, 8)."""
    group, world = dist.group.WORLD, rank.world_size
    send, recv = splits(rank)

    def uneven(x: Tensor) -> Tensor:
        return functional.all_to_all_single(x[: sum(send)], recv, send, group)

    def even(x: Tensor) -> Tensor:
        return functional.all_to_all_single(x, None, None, group)

    def gathered(x: Tensor) -> list[Tensor]:
        return functional.all_gather_into_tensor_coalesced([x, x[:1] + 1], group)

    def scattered(x: Tensor) -> list[Tensor]:
        return functional.reduce_scatter_tensor_coalesced([x, x[:world] + 1], "sum", [0, 0], group)

    return {
        "all_reduce": lambda x: functional.all_reduce(x, "sum", group),
        "all_reduce max": lambda x: functional.all_reduce(x, "max", group),
        "broadcast": lambda x: functional.broadcast(x, world - 1, group),
        "all_gather 0": lambda x: functional.all_gather_tensor(x, 0, group),
        "all_gather 1": lambda x: functional.all_gather_tensor(x, 1, group),
        "reduce_scatter 0": lambda x: functional.reduce_scatter_tensor(x, "sum", 0, group),
        "reduce_scatter 1": lambda x: functional.reduce_scatter_tensor(x, "sum", 1, group),
        "all_to_all": even,
        "all_to_all uneven": uneven,
        "all_reduce coalesced": lambda x: functional.all_reduce_coalesced([x, x[:1] + 1], "sum", group),
        "all_gather coalesced": gathered,
        "reduce_scatter coalesced": scattered,
        "permute": lambda x: functional.permute_tensor(x.flatten(), [(r + 1) % world for r in range(world)], group),
    }


def _eager(rank: Rank) -> dict[str, Any]:
    x = values(rank.rank, 4 * rank.world_size, 8)
    results: dict[str, Any] = {}
    for name, call in calls(rank).items():
        y = call(x)
        results[name] = [functional.wait_tensor(part) for part in (y if isinstance(y, list) else [y])]
    return results


def test_eager(one_or_more: Ranks) -> None:
    one_or_more.compare(_eager)


def with_gradients(rank: Rank) -> dict[str, Call]:
    group = dist.group.WORLD
    send, recv = splits(rank)
    return {
        "all_gather": lambda x: functional.all_gather_tensor_autograd(x, 0, group),
        "reduce_scatter": lambda x: functional.reduce_scatter_tensor_autograd(x, "sum", 0, group),
        "all_to_all": lambda x: functional.all_to_all_single_autograd(x, None, None, group),
        "all_to_all uneven": lambda x: functional.all_to_all_single_autograd(x[: sum(send)], recv, send, group),
    }


def differentiated(call: Call, rank: Rank) -> list[Tensor | None]:
    x = values(rank.rank, 4 * rank.world_size, 8).requires_grad_()
    y = call(x)
    (y.square().sum() * (rank.rank + 1)).backward()
    return [functional.wait_tensor(y.detach()), x.grad]


def _autograd(rank: Rank, compiler: str | None) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, call in with_gradients(rank).items():
        if compiler is not None:
            torch._dynamo.reset()
            call = torch.compile(call, fullgraph=True, backend=compiler)
        results[name] = differentiated(call, rank)
    return results


def test_gradients(ranks: Ranks) -> None:
    ranks.compare(_autograd, None)


def test_gradients_are_compiled(two_ranks: Ranks) -> None:
    two_ranks.compare(_autograd, "aot_eager")


# torch.compile


def _compiled(rank: Rank) -> dict[str, Any]:
    x = values(rank.rank, 4 * rank.world_size, 8)
    results: dict[str, Any] = {}
    for name, call in calls(rank).items():

        def step(x: Tensor, call: Call = call) -> list[Tensor]:
            y = call(x * 2)
            return [part + 1 for part in (y if isinstance(y, list) else [y])]

        torch._dynamo.reset()
        results[name] = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    return results


def test_compiled(two_ranks: Ranks) -> None:
    two_ranks.compare(_compiled)


def in_place(x: Tensor, world: int) -> list[Tensor]:
    """Collectives of torch.distributed itself, which torch.compile replaces by functional ones."""
    total = x * 2
    dist.all_reduce(total)
    whole = x.new_empty(world * x.shape[0], x.shape[1])
    dist.all_gather_into_tensor(whole, total)
    part = torch.empty_like(x)
    dist.reduce_scatter_tensor(part, whole)
    exchanged = torch.empty_like(x)
    dist.all_to_all_single(exchanged, part)
    blocks = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(blocks, x)
    return [total, whole, part, exchanged, *blocks]


def _in_place(rank: Rank, compiler: str) -> list[Tensor]:
    torch._dynamo.reset()
    step = torch.compile(in_place, fullgraph=True, backend=compiler)
    x = values(rank.rank, 4 * rank.world_size, 8)
    compiled, eager = step(x, rank.world_size), in_place(x, rank.world_size)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)
    return compiled


def test_calls_of_torch_distributed_are_compiled(two_ranks: Ranks) -> None:
    two_ranks.compare(_in_place, "aot_eager")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def trained(model: nn.Module, x: Tensor, compiler: str) -> list[Tensor]:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=compiler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    losses = []
    for _ in range(3):
        loss = compiled(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


def _tensor_parallel(rank: Rank, compiler: str) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (rank.world_size,))
    model = parallelize_module(net(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return trained(model, values(0, 4, 8), compiler)


def _data_parallel(rank: Rank, compiler: str) -> list[Tensor]:
    return trained(DistributedDataParallel(net()), values(rank.rank, 4, 8), compiler)


def _sharded(rank: Rank, compiler: str) -> list[Tensor]:
    model = fully_shard(net(), mesh=init_device_mesh("cpu", (rank.world_size,)))
    return trained(model, values(rank.rank, 4, 8), compiler)


def _redistributed(rank: Rank, compiler: str) -> list[Tensor]:
    # A name for each backend: torch remembers by the mesh how to redistribute, and over which group, which may be gone.
    mesh = init_device_mesh("cpu", (rank.world_size,), mesh_dim_names=(dist.get_backend(),))

    def step(x: Tensor) -> Tensor:
        return (x * 2).redistribute(placements=[Shard(1)]).redistribute(placements=[Replicate()]).to_local() + 1

    torch._dynamo.reset()
    x = distribute_tensor(values(0, 5, 7), mesh, [Shard(0)])
    return [torch.compile(step, fullgraph=True, backend=compiler)(x)]


MODELS = {
    "tensor parallel": _tensor_parallel,
    "data parallel": _data_parallel,
    "sharded": _sharded,
    "DTensor": _redistributed,
}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_compiled(two_ranks: Ranks, name: str) -> None:
    two_ranks.compare(MODELS[name], "aot_eager")


def _inductor(rank: Rank) -> dict[str, Any]:
    """One graph, for one run of the C++ compiler, with every collective; and a model."""
    x = values(rank.rank, 4 * rank.world_size, 8)

    def step(x: Tensor) -> list[Tensor]:
        results = []
        for call in calls(rank).values():
            y = call(x * 2)
            results += [part + 1 for part in (y if isinstance(y, list) else [y])]
        return [*results, *in_place(x, rank.world_size)]

    torch._dynamo.reset()
    everything = torch.compile(step, fullgraph=True, backend="inductor")(x)
    for a, b in zip(everything, step(x), strict=True):
        torch.testing.assert_close(a, b)
    return {"everything": everything, "model": _tensor_parallel(rank, "inductor")}


def test_inductor(two_ranks: Ranks) -> None:
    two_ranks.compare(_inductor)
