"""DistributedDataParallel with all it offers, and its optimizers: over pycoll the numbers are those over Gloo."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import (
    ddp_zero_hook,
    debugging_hooks,
    default_hooks,
    post_localSGD_hook,
    powerSGD_hook,
)
from torch.distributed.algorithms.join import Join
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.algorithms.model_averaging.hierarchical_model_averager import HierarchicalModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from distributed.side_by_side import Ranks, Tolerance
from pycoll.testing import Rank

pytestmark = pytest.mark.timeout(120)
STEPS = 4
HALF = Tolerance(rtol=2e-2, atol=2e-3)  # gradients travel in 16 bits: a different order of adding, a different rounding


class Net(nn.Module):
    """Three layers, one of them not always used, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.sometimes = nn.Linear(16, 16)
        self.last = nn.Linear(16, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, use_all: bool = True) -> Tensor:
        self.calls.add_(1)
        x = torch.tanh(self.first(x))
        return self.last(self.sometimes(x) if use_all else x)


def net(rank: Rank) -> Net:
    """Other parameters on every rank: DDP has to take rank 0's."""
    torch.manual_seed(rank.rank)
    return Net().double()


def examples(rank: Rank, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank.rank)
    return torch.randn(4, 6, generator=generator).double(), torch.randn(4, 3, generator=generator).double()


def loss_of(model: nn.Module, rank: Rank, step: int, use_all: bool = True) -> Tensor:
    x, y = examples(rank, step)
    return nn.functional.mse_loss(model(x, use_all), y)


def state(model: nn.Module) -> dict[str, Any]:
    gradients = {f"grad {name}": p.grad for name, p in model.named_parameters()}
    return {**model.state_dict(), **gradients}


def train(
    model: nn.Module, rank: Rank, use_all: Callable[[int], bool] = lambda _: True, steps: int = STEPS
) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, rank, step, use_all(step))
        loss.backward()
        optimizer.step()
        losses.append(loss)
    return {"losses": losses, **state(model)}


def ddp(rank: Rank, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(net(rank), **{"bucket_cap_mb": 0.001, **options})  # a bucket a layer


def _options(rank: Rank, options: dict[str, Any]) -> dict[str, Any]:
    return train(ddp(rank, **options), rank)


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"broadcast_buffers": False},
        {"init_sync": True, "find_unused_parameters": True},
        {"static_graph": True, "gradient_as_bucket_view": True},
    ),
    ids=lambda options: " ".join(options) or "plain",
)
def test_options(ranks: Ranks, options: dict[str, Any]) -> None:
    ranks.compare(_options, options)


def _unused(rank: Rank, view: bool) -> dict[str, Any]:
    """A layer that some ranks use in some steps."""
    model = ddp(rank, find_unused_parameters=True, gradient_as_bucket_view=view)
    return train(model, rank, use_all=lambda step: (step + rank.rank) % 3 == 0)


@pytest.mark.parametrize("view", (False, True))
def test_layers_that_some_ranks_do_not_use(two_ranks: Ranks, view: bool) -> None:
    two_ranks.compare(_unused, view)


def _no_sync(rank: Rank, options: dict[str, Any]) -> dict[str, Any]:
    model = ddp(rank, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        with model.no_sync() if step % 3 else nullcontext():
            loss_of(model, rank, step).backward()
        if step % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
    return state(model)


@pytest.mark.parametrize("options", ({}, {"gradient_as_bucket_view": True}), ids=("copied", "views"))
def test_no_sync(two_ranks: Ranks, options: dict[str, Any]) -> None:
    two_ranks.compare(_no_sync, options)


def _join(rank: Rank, divide_by_initial_world_size: bool) -> dict[str, Any]:
    """Rank r has r more batches than rank 0."""
    model = ddp(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with model.join(divide_by_initial_world_size=divide_by_initial_world_size):
        for step in range(2 + rank.rank):
            optimizer.zero_grad()
            loss_of(model, rank, step).backward()
            optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("divide_by_initial_world_size", (True, False))
def test_join_when_inputs_are_uneven(ranks: Ranks, divide_by_initial_world_size: bool) -> None:
    ranks.compare(_join, divide_by_initial_world_size)


def _join_throws(rank: Rank) -> str:
    model = ddp(rank)
    try:
        with model.join(throw_on_early_termination=True):
            for step in range(2 + rank.rank):
                loss_of(model, rank, step).backward()
    except RuntimeError as e:
        return str(e)
    return "no error"


def test_join_that_ends_early(ranks: Ranks) -> None:
    ranks.compare(_join_throws)


def _power_sgd(approximation_rank: int, model: DistributedDataParallel) -> None:
    """Its callbacks make collectives, and wait for them."""
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=approximation_rank, start_powerSGD_iter=2, min_compression_rate=0.5
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def _registered(hook: Callable[..., Any], model: DistributedDataParallel) -> None:
    def renamed(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        return hook(state, bucket)  # by name torch lets NCCL alone compress to bfloat16

    model.register_comm_hook(None, renamed)


def _builtin(kind: str, model: DistributedDataParallel) -> None:
    model._register_builtin_comm_hook(getattr(dist.BuiltinCommHookType, kind))


def _fused(model: DistributedDataParallel) -> None:
    model._register_fused_optim(torch.optim.SGD, lr=0.05)


HOOKS: dict[str, Callable[[DistributedDataParallel], None]] = {
    "allreduce": partial(_registered, default_hooks.allreduce_hook),
    "fp16": partial(_registered, default_hooks.fp16_compress_hook),
    "bf16": partial(_registered, default_hooks.bf16_compress_hook),
    "fp16 around allreduce": partial(_registered, default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook)),
    "bf16 around allreduce": partial(_registered, default_hooks.bf16_compress_wrapper(default_hooks.allreduce_hook)),
    "noop": partial(_registered, debugging_hooks.noop_hook),
    "PowerSGD": partial(_power_sgd, 1),
    "PowerSGD of rank 2": partial(_power_sgd, 2),
    "optimizer in the hook": _fused,
    "built-in allreduce": partial(_builtin, "ALLREDUCE"),
    "built-in fp16": partial(_builtin, "FP16_COMPRESS"),
}


def _hooked(rank: Rank, name: str) -> dict[str, Any]:
    # One bucket: over Gloo the callbacks of two wait for each other.
    buckets = {"bucket_cap_mb": 25} if "PowerSGD" in name else {}
    model = ddp(rank, **buckets)
    HOOKS[name](model)
    return train(model, rank)


@pytest.mark.parametrize("name", HOOKS)
def test_communication_hooks(two_ranks: Ranks, name: str) -> None:
    two_ranks.compare(_hooked, name, tolerance=HALF if "16" in name else Tolerance())


def _zero(rank: Rank, options: dict[str, Any]) -> dict[str, Any]:
    model = ddp(rank)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.05, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()
    optimizer.consolidate_state_dict(to=0)
    whole = optimizer.state_dict()["state"] if rank.rank == 0 else {}
    return {**state(model), "optimizer": whole}


@pytest.mark.parametrize("options", ({}, {"parameters_as_bucket_view": True}), ids=("plain", "views"))
def test_zero_redundancy_optimizer(ranks: Ranks, options: dict[str, Any]) -> None:
    ranks.compare(_zero, options)


def _zero_overlapped(rank: Rank, interleaved: bool, static_graph: bool) -> None:
    """The optimizer steps in the gradients' callbacks, broadcasts there, and waits. torch refuses it over Gloo."""
    # Interleaved, it broadcasts when a bucket is there, which is sooner or later than the next one's all-reduce.
    buckets = {"bucket_cap_mb": 25} if interleaved else {}
    model = ddp(rank, static_graph=static_graph, **buckets)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.1)
    make = ddp_zero_hook.hook_with_zero_step_interleaved if interleaved else ddp_zero_hook.hook_with_zero_step
    model.register_comm_hook(None, make(default_hooks.allreduce_hook, model, optimizer))
    plain = ddp(rank)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(6):
        loss_of(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(plain, rank, step).backward()
        if step >= (3 if static_graph else 2):  # it begins to step when it knows the buckets
            plain_optimizer.step()
        plain_optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("interleaved", (False, True), ids=("after", "interleaved"))
@pytest.mark.parametrize("static_graph", (False, True), ids=("", "static graph"))
def test_zero_redundancy_optimizer_overlaps(two_ranks: Ranks, interleaved: bool, static_graph: bool) -> None:
    two_ranks.run(_zero_overlapped, interleaved, static_graph)


def _zero_groups(rank: Rank) -> dict[str, Any]:
    model = ddp(rank)
    optimizer = ZeroRedundancyOptimizer(model.module.first.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    optimizer.add_param_group({"params": list(model.module.last.parameters()), "lr": 0.01})
    for step in range(STEPS):
        loss_of(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def test_zero_redundancy_optimizer_of_several_groups(ranks: Ranks) -> None:
    ranks.compare(_zero_groups)


def _zero_join(rank: Rank) -> dict[str, Any]:
    model = ddp(rank)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with Join([model, optimizer]):
        for step in range(1 + rank.rank):
            optimizer.zero_grad()
            loss_of(model, rank, step).backward()
            optimizer.step()
    return model.state_dict()


def test_zero_redundancy_optimizer_when_inputs_are_uneven(ranks: Ranks) -> None:
    ranks.compare(_zero_join)


def _post_local_sgd(rank: Rank, hierarchical: bool) -> dict[str, Any]:
    model = ddp(rank)
    sub_group = dist.new_subgroups(1)[0]
    hook_state = post_localSGD_hook.PostLocalSGDState(process_group=None, subgroup=sub_group, start_localSGD_iter=2)
    model.register_comm_hook(hook_state, post_localSGD_hook.post_localSGD_hook)
    if hierarchical:
        periods = {2: rank.world_size} if rank.world_size <= 2 else {2: 2, 4: rank.world_size}
        averager: Any = HierarchicalModelAverager(period_group_size_dict=periods, warmup_steps=2)
    else:
        averager = PeriodicModelAverager(period=3, warmup_steps=2)
    optimizer = PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), averager)
    for step in range(9):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()
    return {**model.state_dict(), "step": optimizer.state_dict()["step"]}


def test_post_local_sgd(ranks: Ranks) -> None:
    ranks.compare(_post_local_sgd, False)


def test_post_local_sgd_with_a_hierarchy_of_groups(ranks: Ranks) -> None:
    ranks.compare(_post_local_sgd, True)
