"""Device meshes, DTensor, groups of every make, and pipelines: over pycoll the numbers are those over Gloo."""

import itertools
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as autograd_collectives
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from distributed.side_by_side import Ranks
from pycoll.testing import Rank

pytestmark = pytest.mark.timeout(120)
PLACEMENTS: Sequence[Placement] = (Replicate(), Shard(0), Shard(1), Partial("sum"))


# DTensor


def values(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dtensor(rank: Rank, mesh: DeviceMesh, placements: Sequence[Placement], shape: tuple[int, ...]) -> DTensor:
    """Sharded from a tensor that all have; where it is partial, every rank's part is its own."""
    plain = [Replicate() if isinstance(p, Partial) else p for p in placements]
    sharded = distribute_tensor(values(0, *shape), mesh, plain)
    if not any(isinstance(p, Partial) for p in placements):
        return sharded
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    part = sum((c + 1) * 10**i for i, (c, p) in enumerate(zip(coordinate, placements, strict=True)) if p.is_partial())
    local = sharded.to_local() * part
    return DTensor.from_local(local, mesh, placements, shape=sharded.shape, stride=sharded.stride())


def redistributed(source: DTensor, placements: Sequence[Placement]) -> Any:
    try:
        return source.redistribute(placements=placements).to_local()
    except (RuntimeError, ValueError) as e:
        return f"{type(e).__name__}: {e}"


def _one_dimension(rank: Rank, shape: tuple[int, ...]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (rank.world_size,))
    sources = (*PLACEMENTS, *(Partial(op) for op in ("avg", "min", "max", "product")))
    results: dict[str, Any] = {}
    for source, target in itertools.product(sources, PLACEMENTS):
        results[f"{source} {target}"] = redistributed(dtensor(rank, mesh, [source], shape), [target])
    return results


@pytest.mark.parametrize("shape", ((8, 4), (5, 7), (1, 3)), ids=str)
def test_redistribute(ranks: Ranks, shape: tuple[int, ...]) -> None:
    """Also where the ranks' shards differ, and some are empty."""
    ranks.compare(_one_dimension, shape)


def _two_dimensions(rank: Rank) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, rank.world_size // 2), mesh_dim_names=("rows", "columns"))
    pairs = list(itertools.product(PLACEMENTS, PLACEMENTS))
    return {
        f"{source} {target}": redistributed(dtensor(rank, mesh, source, (6, 5)), target)
        for source, target in itertools.product(pairs, pairs)
    }


def test_redistribute_on_two_dimensions(four_ranks: Ranks) -> None:
    four_ranks.compare(_two_dimensions)


def _with_gradients(rank: Rank) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (rank.world_size,))
    results: dict[str, Any] = {}
    for source, target in itertools.product(PLACEMENTS[:3], PLACEMENTS[:3]):
        x = dtensor(rank, mesh, [source], (6, 5)).detach().requires_grad_()
        y = x.redistribute(placements=[target], async_op=True) * 2
        (y.to_local() * (rank.rank + 1)).square().sum().backward()
        assert x.grad is not None
        results[f"{source} {target}"] = x.grad.to_local()
    return results


def test_redistribute_has_gradients(ranks: Ranks) -> None:
    ranks.compare(_with_gradients)


def _operations(rank: Rank) -> dict[str, Any]:
    """Operations of torch that communicate when their arguments are sharded. Some want every part to have a row."""
    mesh = init_device_mesh("cpu", (rank.world_size,))
    a = distribute_tensor(values(1, 7, 5), mesh, [Shard(0)])
    b = distribute_tensor(values(2, 5, 7), mesh, [Shard(0)])
    table = distribute_tensor(values(3, 10, 4), mesh, [Shard(0)])
    indices = distribute_tensor(torch.tensor([[0, 8, 3], [4, 4, 7]]), mesh, [Replicate()])
    found = nn.functional.embedding(indices, table)
    results = [a @ b, a.softmax(0), a.sum(), a.mean(0), a.var(0), a.max(), a.t() @ a, torch.cat([a, a], 0), found]
    results += [a.norm(), nn.functional.layer_norm(a, (5,)), torch.topk(b, 2, dim=0).values, (b > 0).all()]
    return {str(i): x.full_tensor() for i, x in enumerate(results)}


def test_operations_on_dtensors(ranks: Ranks) -> None:
    ranks.compare(_operations)


# Meshes and groups


def _meshes(rank: Rank) -> dict[str, Any]:
    world = rank.world_size
    rows = 2 if world > 1 else 1
    mesh = init_device_mesh("cpu", (rows, world // rows), mesh_dim_names=("rows", "columns"))
    meshes = {"rows": mesh["rows"], "columns": mesh["columns"], "all": mesh._flatten("all")}
    results: dict[str, Any] = {"where": mesh.get_coordinate()}
    for name, one in meshes.items():
        x = values(rank.rank, 100)
        dist.all_reduce(x, group=one.get_group())
        results[name] = [x, one.mesh.tolist(), one.get_local_rank(), one.size()]
    ranks = torch.arange(world).flip(0)
    backwards = DeviceMesh("cpu", ranks)
    results["backwards"] = distribute_tensor(values(0, 5, 3), backwards, [Shard(0)]).to_local()
    from_group = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    results["from a group"] = distribute_tensor(values(0, 5, 3), from_group, [Shard(0)]).to_local()
    return results


def test_meshes(one_or_more: Ranks) -> None:
    one_or_more.compare(_meshes)


def used(group: Any, rank: Rank) -> list[Any]:
    """A few collectives of one group; nothing on ranks that are not in it."""
    if group is None or dist.get_rank(group) < 0:
        return []
    x, size, me = values(rank.rank, 33), dist.get_world_size(group), dist.get_rank(group)
    total, gathered, first = x.clone(), [torch.empty_like(x) for _ in range(size)], x.clone()
    dist.all_reduce(total, group=group)
    dist.all_gather(gathered, x, group=group)
    dist.broadcast(first, group=group, group_src=size - 1)
    said: list[Any] = [None] * size
    dist.all_gather_object(said, f"rank {rank.rank}", group=group)
    dist.barrier(group=group)
    return [total, gathered, first, said, me]


def _new_groups(rank: Rank) -> dict[str, Any]:
    world = rank.world_size
    groups = {
        "all": dist.new_group(),
        "even": dist.new_group(list(range(0, world, 2))),
        "alone": dist.new_group([world - 1]),
        "sub": dist.new_subgroups(max(1, world // 2))[0],
        "listed": dist.new_subgroups_by_enumeration([[r] for r in range(world)])[0],
        "described": dist.new_group(group_desc="a description", timeout=timedelta(seconds=20)),
    }
    half = list(range(world // 2, world))
    if rank.rank in half:
        groups["of members only"] = dist.new_group(half, use_local_synchronization=True)
    return {name: used(group, rank) for name, group in groups.items()}


def test_new_groups(one_or_more: Ranks) -> None:
    one_or_more.compare(_new_groups)


def part_of(parent: dist.ProcessGroup, ranks: list[int], **options: Any) -> dist.ProcessGroup | None:
    """ProcessGroup.split_group; with Gloo new_group, since its split reads global ranks that it was never told."""
    if dist.get_backend() == "pycoll":
        return parent.split_group(ranks, **options)
    in_world = [dist.get_global_rank(parent, r) for r in ranks]
    part = dist.new_group(in_world, timeout=options.get("timeout"), use_local_synchronization=True)
    return None if dist.get_rank(part) < 0 else part


def _split(rank: Rank) -> dict[str, Any]:
    """ProcessGroup.split_group, to which torch.distributed.split_group and DeviceMesh come on accelerators."""
    world, group = rank.world_size, dist.group.WORLD
    assert group is not None
    half = max(1, world // 2)
    mine = [r for r in range(world) if r // half == rank.rank // half]
    names = {"half": f"half {mine}", "again": f"again {mine}", "first": "first", "of a part": f"of a part {mine}"}
    parts = {"half": part_of(group, mine, timeout=timedelta(seconds=20), group_name=names["half"])}
    parts["again"] = part_of(group, mine, group_name=names["again"], group_desc="described")
    parts["first"] = part_of(group, [0], group_name=names["first"])
    assert parts["half"] is not None and parts["again"] is not None
    parts["of a part"] = part_of(parts["half"], [0], group_name=names["of a part"])
    results: dict[str, Any] = {}
    for name, part in parts.items():
        results[name] = None
        if part is not None:
            x = values(rank.rank, 50)
            part.allreduce([x]).wait()
            results[name] = [x, part.rank(), part.size()]
    if dist.get_backend() == "pycoll":
        assert all(part is None or part.group_name == names[name] for name, part in parts.items())
        assert parts["again"].group_desc == "described"
        timeouts = [parts[name]._get_backend(torch.device("cpu")).options._timeout for name in ("half", "again")]
        assert timeouts == [timedelta(seconds=20), timedelta(seconds=60)]
    return results


def test_split_groups(one_or_more: Ranks) -> None:
    one_or_more.compare(_split)


def _split_by_torch(rank: Rank) -> None:
    """split_group, for which torch wants an accelerator, and options that can be copied: not Gloo's."""
    world, group = rank.world_size, dist.group.WORLD
    assert group is not None
    half = max(1, world // 2)
    halves = [list(range(half)), list(range(half, world))] if world > 1 else [[0]]
    compared = dist.new_subgroups_by_enumeration(halves)[0]
    with (
        mock.patch.object(torch.accelerator, "is_available", return_value=True),
        mock.patch.object(torch.accelerator, "current_accelerator", return_value=torch.device("cpu")),
    ):
        group.bound_device_id = torch.device("cpu", 0)
        ours = used(dist.split_group(split_ranks=halves), rank)
        # Before a split that leaves ranks out: torch's names of groups count those that a rank is in.
        mesh = init_device_mesh("cpu", (len(halves), half), mesh_dim_names=("rows", "columns"))
        first = dist.split_group(split_ranks=[[0]], timeout=timedelta(seconds=20), group_desc="the first")
        assert (first is None) == (rank.rank != 0)
        if first is None:  # torch tells so whom a new_group leaves out, if the groups lie on an accelerator
            group._get_backend(torch.device("cpu")).perform_nocolor_split(group.bound_device_id)
    for a, b in zip(ours, used(compared, rank), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else str(a) == str(b)
    assert len(used(first, rank)) == (5 if rank.rank == 0 else 0)
    x = torch.full((3,), rank.rank + 1.0)
    dist.all_reduce(x, group=mesh["columns"].get_group())
    assert x[0].item() == sum(r + 1 for r in halves[rank.rank // half])


def test_split_group_of_torch(one_or_more: Ranks) -> None:
    one_or_more.run(_split_by_torch)


def _merged(rank: Rank) -> None:
    """Groups of one become one again. Gloo has it, too, but over a file store it does not end."""
    alone = dist.new_subgroups(1)[0]
    store = dist.PrefixStore("merge", dist.distributed_c10d._get_default_store())
    group = alone.merge_remote_group(store, rank.world_size, timedelta(seconds=20), "merged", "described")
    x = torch.full((50,), rank.rank + 1.0)
    group.allreduce([x]).wait()
    assert x[0].item() == sum(range(rank.world_size + 1))
    assert (group.size(), group.group_name, group.group_desc) == (rank.world_size, "merged", "described")


def test_merged_groups(one_or_more: Ranks) -> None:
    one_or_more.run(_merged)


def _options(rank: Rank) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    backend = group._get_backend(torch.device("cpu"))
    half_minute = backend.options._timeout
    group.set_timeout(timedelta(seconds=7))  # dist._set_pg_timeout knows Gloo and NCCL alone, by their classes
    return {
        "splits": backend.supports_splitting,
        "timeout": [half_minute.total_seconds(), backend.options._timeout.total_seconds()],
        "name": [backend.options.backend == dist.get_backend(), backend.options.group_name],
        "ranks": backend.options.global_ranks_in_group,
    }


def test_options_of_a_group(ranks: Ranks) -> None:
    ranks.compare(_options)


def _detail(rank: Rank) -> dict[str, Any]:
    """TORCH_DISTRIBUTED_DEBUG=DETAIL puts a wrapper around the backend, which compares what the ranks call."""
    before = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        results: dict[str, Any] = {"used": used(dist.new_group(), rank)}
    finally:
        dist.set_debug_level(before)
    return results


def test_debug_level_detail(ranks: Ranks) -> None:
    ranks.compare(_detail)


def _with_autograd(rank: Rank) -> dict[str, Any]:
    """torch.distributed.nn.functional."""
    world, me = rank.world_size, rank.rank
    x = values(me, world, 4).requires_grad_()
    last = world - 1
    calls = {
        "all_reduce": lambda: autograd_collectives.all_reduce(x * 1),
        "broadcast": lambda: autograd_collectives.broadcast(x * 1, last),
        "reduce": lambda: autograd_collectives.reduce(x * 1, last),
        "all_gather": lambda: torch.stack(autograd_collectives.all_gather(x * 1)),
        "gather": lambda: torch.stack(autograd_collectives.gather(x * 1, last)),
        "scatter": lambda: autograd_collectives.scatter(list((x * 1).unbind()), last),
        "reduce_scatter": lambda: autograd_collectives.reduce_scatter(torch.empty(4).double(), list((x * 1).unbind())),
        "all_to_all": lambda: torch.stack(
            autograd_collectives.all_to_all([torch.empty(4).double() for _ in range(world)], list((x * 1).unbind()))
        ),
        "all_to_all_single": lambda: autograd_collectives.all_to_all_single(torch.empty_like(x), x * 1),
    }
    results: dict[str, Any] = {}
    for name, call in calls.items():
        x.grad = None
        y = call()
        (y.square().sum() * (me + 1)).backward()
        of_root_alone = name == "reduce" and me != last
        results[name] = [None if of_root_alone else y, x.grad]
    return results


def test_collectives_with_gradients(one_or_more: Ranks) -> None:
    one_or_more.compare(_with_autograd)


def _batch(rank: Rank) -> list[Tensor]:
    """Round the ring, in both directions at once."""
    world, me = rank.world_size, rank.rank
    received = [torch.empty(1000).double(), torch.empty(70_000).double()]
    operations = [
        dist.P2POp(dist.irecv, received[0], (me - 1) % world),
        dist.P2POp(dist.isend, values(me, 1000), (me + 1) % world),
        dist.P2POp(dist.irecv, received[1], (me + 1) % world),
        dist.P2POp(dist.isend, values(me, 70_000), (me - 1) % world),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


def test_batches_of_messages(ranks: Ranks) -> None:
    ranks.compare(_batch)


# Pipelines

# Schedule -> stages a rank.
SCHEDULES = {
    "GPipe": 1,
    "1F1B": 1,
    "Interleaved1F1B": 2,
    "LoopedBFS": 2,
    "InterleavedZeroBubble": 2,
    "ZBVZeroBubble": 2,
    "DualPipeV": 2,
}
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")  # the second half of the stages runs back from the last rank to the first


def _pipeline(rank: Rank, name: str) -> dict[str, Any]:
    world, each = rank.world_size, SCHEDULES[name]
    count = world * each
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double() for _ in range(count)]
    mine = [rank.rank, count - 1 - rank.rank] if name in V_SHAPED else [rank.rank + world * i for i in range(each)]
    stages = [pipelining.PipelineStage(layers[i], i, count, torch.device("cpu")) for i in mine]
    schedule_class = pipelining.schedules.get_schedule_class(name)
    schedule = schedule_class(
        stages if each > 1 else stages[0], n_microbatches=2 * world, loss_fn=nn.functional.mse_loss
    )
    x, y = values(1, 4 * world, 6), values(2, 4 * world, 6)
    losses: list[Tensor] = []
    outputs = []
    for _ in range(2):
        arguments = (x,) if 0 in mine else ()
        last = {"target": y, "losses": losses} if count - 1 in mine else {}
        outputs.append(schedule.step(*arguments, **last))
    gradients = {i: [p.grad for p in layers[i].parameters()] for i in mine}
    return {"outputs": outputs, "losses": losses, "gradients": gradients}


@pytest.mark.parametrize("name", SCHEDULES)
def test_pipelines(four_ranks: Ranks, name: str) -> None:
    four_ranks.compare(_pipeline, name)
