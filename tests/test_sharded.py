"""pycoll.ShardedAdam: bit for bit DataParallel with FusedAdam, near DDP with torch's AdamW; state, scaling, misuse."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import pycoll
from pycoll import _C, Communicator, DataParallel, FusedAdam, ShardedAdam
from pycoll.buckets import WIRES
from pycoll.testing import run_threads

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("leaves_nothing")]


class Net(nn.Module):
    """With a layer that is left out now and then, of sizes that fill no unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(11, 70)
        self.norm = nn.LayerNorm(70)
        self.sometimes = nn.Linear(70, 70)
        self.last = nn.Linear(70, 3)

    def forward(self, x: Tensor, use_all: bool = True) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.last(self.sometimes(x).relu() if use_all else x)


def make_nets(count: int, dtype: torch.dtype = torch.float32) -> list[Net]:
    torch.manual_seed(0)
    net = Net().to(dtype)
    return [copy.deepcopy(net) for _ in range(count)]


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [param for param in net.parameters() if param.dim() > 1], "weight_decay": 0.1, "lr": 2e-2},
        {"params": [param for param in net.parameters() if param.dim() < 2], "weight_decay": 0.0},
    ]


def loss_of(model: Callable[..., Tensor], rank: int, step: int, dtype: torch.dtype, use_all: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x, y = torch.randn(4, 11, generator=generator).to(dtype), torch.randn(4, 3, generator=generator)
    return (model(x, use_all).float() - y).square().mean()


def optimizer_for(kind: str, wrapped: DataParallel, **settings: Any) -> FusedAdam:
    if kind == "sharded":
        return ShardedAdam(groups_of(wrapped.module), buckets=wrapped.buckets, **settings)
    return FusedAdam(groups_of(wrapped.module), **settings)


def train(
    kind: str,
    world_size: int,
    *,
    steps: range = range(20),
    dtype: torch.dtype = torch.float32,
    wire: torch.dtype = torch.float32,
    nets: Sequence[Net] | None = None,
    state: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[list[Net], list[list[float]], list[dict[str, Any]]]:
    """Models, norms and state_dicts of all ranks after `steps`, some of two passes, some that leave out a layer."""
    models = nets or make_nets(world_size, dtype)

    def main(comm: Communicator) -> tuple[list[float], dict[str, Any]]:
        wrapped = DataParallel(models[comm.rank], comm, wire_dtype=wire, bucket_bytes=8000)
        optimizer = optimizer_for(kind, wrapped, lr=1e-2, **settings)
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))
        norms = []
        for step in steps:
            if step % 3 == 1:
                with wrapped.no_sync():
                    loss_of(wrapped, comm.rank, -step, dtype).backward()
            # On one rank only, or on none.
            use_all = step % 5 != 3 and not (step % 5 == 2 and comm.rank == 0)
            loss_of(wrapped, comm.rank, step, dtype, use_all).backward()
            norms.append(optimizer.clip_grad_norm(0.5).item())
            optimizer.step()
            optimizer.zero_grad()
        return norms, optimizer.state_dict()

    results = run_threads(main, world_size)
    return list(models), [norms for norms, _ in results], [state for _, state in results]


def weights(net: nn.Module) -> list[Tensor]:
    return [param.detach() for param in net.parameters()]


def assert_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["state"].keys() == other["state"].keys()
    for key, values in one["state"].items():
        assert values.keys() == other["state"][key].keys()
        assert all(torch.equal(value, other["state"][key][name]) for name, value in values.items())
    assert one["param_groups"] == other["param_groups"]


def assert_runs_agree(world_size: int, **how: Any) -> None:
    sharded, sharded_norms, sharded_states = train("sharded", world_size, **how)
    fused, fused_norms, fused_states = train("fused", world_size, **how)
    assert all(norms == fused_norms[0] for norms in [*sharded_norms, *fused_norms])
    for net in sharded:
        assert_equal(weights(net), weights(fused[0]))
    for state in sharded_states:
        assert_same_state(state, fused_states[0])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("world_size", (1, 2, 4))
def test_is_data_parallel_with_fused_adam_bit_for_bit_over_200_steps(world_size: int, dtype: torch.dtype) -> None:
    assert_runs_agree(world_size, dtype=dtype, steps=range(200))


@pytest.mark.parametrize("kind", ("sharded", "fused"))
@pytest.mark.parametrize("wire", (torch.float32, torch.bfloat16, torch.int8), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_step_past_the_caches_gives_the_same_bits(
    dtype: torch.dtype, wire: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, plain_norms, _ = train(kind, 2, dtype=dtype, wire=wire)
    monkeypatch.setattr(_C, "is_large_step", lambda elements: elements > 0)
    large, large_norms, _ = train(kind, 2, dtype=dtype, wire=wire)
    assert large_norms == plain_norms
    assert_equal(weights(large[0]), weights(plain[0]))


def test_a_large_step_is_one_that_no_cache_holds() -> None:
    assert not _C.is_large_step(1000)
    assert _C.is_large_step(1 << 40)


@pytest.mark.parametrize(
    "settings",
    [
        {"amsgrad": True},
        {"maximize": True, "betas": (0.8, 0.9), "eps": 1e-6},
        {"decoupled_weight_decay": False},
        {"dtype": torch.bfloat16, "stochastic_rounding": True},
        {"dtype": torch.bfloat16, "master_weights": False, "stochastic_rounding": True},
        {"dtype": torch.float16},
        *({"wire": wire} for wire in WIRES[1:]),
        {"dtype": torch.bfloat16, "wire": torch.int8},
        {"dtype": torch.bfloat16, "wire": torch.bfloat16},
    ],
    ids=str,
)
def test_every_setting_is_that_of_fused_adam(settings: dict[str, Any]) -> None:
    assert_runs_agree(3, **settings)


def test_is_near_torch_adamw_on_averaged_gradients() -> None:
    """Within 1e-4 of it relatively, or 1e-5 absolutely, after 20 steps in fp32, as its documentation says."""
    ours, norms, _ = train("sharded", 2)
    reference = make_nets(1)[0]
    optimizer = torch.optim.AdamW(groups_of(reference), lr=1e-2)
    for step in range(20):
        optimizer.zero_grad()
        for rank in range(2):
            if step % 3 == 1:
                (loss_of(reference, rank, -step, torch.float32) / 2).backward()
            use_all = step % 5 != 3 and not (step % 5 == 2 and rank == 0)
            (loss_of(reference, rank, step, torch.float32, use_all) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        assert norms[0][step] == pytest.approx(norm.item(), rel=1e-4)
        optimizer.step()
    for mine, theirs in zip(weights(ours[0]), weights(reference), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_state_is_divided_by_the_ranks(dtype: torch.dtype) -> None:
    def main(comm: Communicator) -> int:
        net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))).to(dtype)
        optimizer = ShardedAdam(net.parameters(), communicator=comm)
        net(torch.ones(1, 256, dtype=dtype)).sum().backward()
        optimizer.step()
        return sum(tensor.nbytes for shard in optimizer._shards for tensor in shard.state.values())

    whole = 4 * (256 * 256 + 256) * 4 * (2 if dtype == torch.float32 else 3)
    for world_size in (1, 2, 4):
        assert all(whole <= own * world_size <= whole * 1.02 for own in run_threads(main, world_size))


@pytest.mark.parametrize(("before", "after"), [(2, 3), (4, 1), (1, 2)])
def test_a_checkpoint_loads_in_another_world(before: int, after: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        nets, _, states = train("sharded", before, dtype=dtype, steps=range(7))
        for state in states:
            assert_same_state(state, states[0])
        begin = [copy.deepcopy(nets[0]) for _ in range(after)]
        sharded, _, _ = train(
            "sharded", after, dtype=dtype, steps=range(7, 14), nets=copy.deepcopy(begin), state=states[0]
        )
        fused, _, _ = train("fused", after, dtype=dtype, steps=range(7, 14), nets=begin, state=states[0])
        assert_equal(weights(sharded[0]), weights(fused[0]))


def test_a_resumed_run_is_the_uninterrupted_one_and_state_comes_from_torch() -> None:
    whole, _, _ = train("sharded", 2, steps=range(14))
    nets, _, states = train("sharded", 2, steps=range(7))
    resumed, _, _ = train("sharded", 2, steps=range(7, 14), nets=[copy.deepcopy(net) for net in nets], state=states[1])
    assert_equal(weights(whole[0]), weights(resumed[0]))

    theirs = torch.optim.AdamW(groups_of(nets[0]), lr=1e-2)
    theirs.load_state_dict(states[0])
    again = [copy.deepcopy(net) for net in nets]
    from_torch, _, _ = train("sharded", 2, steps=range(7, 14), nets=again, state=theirs.state_dict())
    assert_equal(weights(whole[0]), weights(from_torch[0]))


@pytest.mark.parametrize("kind", ("sharded", "fused"))
def test_an_overflow_on_one_rank_skips_the_step_on_all(kind: str) -> None:
    nets = make_nets(2, torch.float16)

    def main(comm: Communicator) -> tuple[list[float], list[bool], list[Tensor]]:
        wrapped = DataParallel(nets[comm.rank], comm, wire_dtype=torch.float16)
        optimizer = optimizer_for(kind, wrapped, lr=1e-2)
        scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        scales, changed = [], []
        for step in range(9):
            before = [weight.clone() for weight in weights(nets[comm.rank])]
            loss = loss_of(wrapped, comm.rank, step, torch.float16)
            if step == 4 and comm.rank == 1:
                loss = loss * 1e30
            scaler.scale(loss).backward()
            optimizer.clip_grad_norm(math.inf if step % 2 else 0.5, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            changed.append(not all(map(torch.equal, before, weights(nets[comm.rank]))))
        return scales, changed, [weight.clone() for weight in weights(nets[comm.rank])]

    one, other = run_threads(main, 2)
    assert one[0] == other[0] == [1024.0] * 2 + [2048.0] * 2 + [1024.0] * 3 + [2048.0] * 2
    assert one[1] == other[1] == [True] * 4 + [False] + [True] * 4
    assert_equal(one[2], other[2])
    assert all(weight.isfinite().all() for weight in one[2])


def test_alone_it_needs_no_wrapper() -> None:
    nets = [nn.Linear(5, 5) for _ in range(2)]

    def main(comm: Communicator) -> list[Tensor]:
        optimizer = ShardedAdam(nets[comm.rank].parameters(), lr=0.1, communicator=comm)
        for step in range(4):
            with optimizer.buckets.no_sync() if step % 2 else nullcontext():
                nets[comm.rank](torch.full((1, 5), step + comm.rank + 1.0)).sum().backward()
            if step % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()
        return weights(nets[comm.rank])

    one, other = run_threads(main, 2)
    assert_equal(one, other)


def test_schedulers_closures_and_a_rate_in_a_tensor() -> None:
    def run(comm: Communicator, net: nn.Module, lr: float | Tensor) -> list[Tensor]:
        wrapped = DataParallel(net, comm)
        optimizer = ShardedAdam(net.parameters(), lr=lr, buckets=wrapped.buckets)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (step + 1))

        def closure() -> float:
            optimizer.zero_grad()
            loss = wrapped(torch.full((2, 5), comm.rank + 1.0)).square().sum()
            loss.backward()
            return loss.item()

        losses = []
        for _ in range(4):
            losses.append(optimizer.step(closure))
            scheduler.step()
        assert losses == sorted(losses, reverse=True)
        return weights(net)

    torch.manual_seed(0)
    first = nn.Linear(5, 5)
    nets = [[copy.deepcopy(first) for _ in range(2)] for _ in range(2)]
    by_number = run_threads(lambda comm: run(comm, nets[0][comm.rank], 0.01), 2)
    by_tensor = run_threads(lambda comm: run(comm, nets[1][comm.rank], torch.tensor(0.01, dtype=torch.float64)), 2)
    assert_equal(by_number[0], by_tensor[1])


def test_without_gradients_nothing_moves() -> None:
    def main(comm: Communicator) -> None:
        net = nn.Linear(3, 3)
        optimizer = ShardedAdam(net.parameters(), communicator=comm)
        before = [weight.clone() for weight in weights(net)]
        optimizer.step()
        net(torch.ones(1, 3)).sum().backward()
        optimizer.zero_grad()
        optimizer.step()
        assert_equal(before, weights(net))
        assert optimizer.state_dict()["state"] == {}

    run_threads(main, 2)


def test_autograd_knows_that_parameters_have_changed() -> None:
    def main(comm: Communicator) -> None:
        net = nn.Linear(3, 3)
        optimizer = ShardedAdam(net.parameters(), communicator=comm)
        x = torch.ones(1, 3, requires_grad=True)
        loss = net(net(x)).sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    run_threads(main, 2)


def _after_no_sync(optimizer: ShardedAdam, net: nn.Module) -> None:
    with optimizer.buckets.no_sync():
        net(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def _replaced(optimizer: ShardedAdam, net: nn.Module) -> None:
    net(torch.ones(1, 3)).sum().backward()
    for param in net.parameters():
        param.grad = None if param.grad is None else param.grad * 2
    optimizer.step()


def _moved(optimizer: ShardedAdam, net: nn.Module) -> None:
    net(torch.ones(1, 3)).sum().backward()
    for param in net.parameters():
        param.data = param.data.clone()
    optimizer.step()


def _scaled(optimizer: ShardedAdam, net: nn.Module) -> None:
    scaler = GradScaler("cpu")
    scaler.scale(net(torch.ones(1, 3)).sum()).backward()
    scaler.step(optimizer)


def _scaled_after_others(optimizer: ShardedAdam, net: nn.Module) -> None:
    scaler = GradScaler("cpu")
    scaler.scale(net(torch.ones(1, 3)).sum()).backward()
    optimizer.clip_grad_norm(1.0, scaler=scaler)
    net.zero_grad()
    scaler.scale(net(torch.ones(1, 3)).sum()).backward()
    scaler.step(optimizer)


def _unscaled(optimizer: ShardedAdam, net: nn.Module) -> None:
    scaler = GradScaler("cpu")
    scaler.scale(net(torch.ones(1, 3)).sum()).backward()
    scaler.unscale_(optimizer)
    optimizer.clip_grad_norm(1.0, scaler=scaler)


@pytest.mark.parametrize(
    ("misuse", "text"),
    [
        (_after_no_sync, "the last backward pass was within no_sync"),
        (_replaced, "changed or replaced since backward"),
        (_moved, "lies elsewhere now"),
        (_scaled, r"clip_grad_norm\(max_norm, scaler=scaler\) before scaler.step"),
        (_scaled_after_others, r"clip_grad_norm\(max_norm, scaler=scaler\) before scaler.step"),
        (_unscaled, "before scaler.unscale_ could reach them"),
        (lambda optimizer, net: optimizer.add_param_group({"params": [torch.ones(1)]}), "takes no more groups"),
        (lambda optimizer, net: ShardedAdam(net.parameters(), buckets=optimizer.buckets), "another ShardedAdam's"),
        (lambda optimizer, net: ShardedAdam([net.weight], buckets=optimizer.buckets), "must be the same ones"),
    ],
)
def test_misuse_is_told(misuse: Callable[[ShardedAdam, nn.Module], Any], text: str) -> None:
    def main(comm: Communicator) -> None:
        net = nn.Linear(3, 3)
        optimizer = ShardedAdam(net.parameters(), communicator=comm)
        with pytest.raises((pycoll.UsageError, pycoll.UnsupportedError), match=text):
            misuse(optimizer, net)

    run_threads(main, 2)


def test_a_changed_gradient_counts_where_it_travels_as_it_is() -> None:
    def main(comm: Communicator) -> float:
        net = nn.Linear(3, 3)
        optimizer = ShardedAdam(net.parameters(), communicator=comm)
        net(torch.ones(1, 3)).sum().backward()
        assert optimizer.clip_grad_norm(1.0) == pytest.approx(12**0.5)
        for param in net.parameters():
            assert param.grad is not None
            param.grad.mul_(2)
        return optimizer.clip_grad_norm(1.0).item()

    assert run_threads(main, 2) == [pytest.approx(48**0.5)] * 2


def test_ranks_that_disagree_about_the_step_are_told() -> None:
    def main(comm: Communicator) -> str:
        net = nn.Linear(3, 3)
        optimizer = ShardedAdam(net.parameters(), lr=0.1 * (comm.rank + 1), communicator=comm)
        net(torch.ones(1, 3)).sum().backward()
        try:
            optimizer.step()
        except pycoll.MismatchError as error:
            return str(error)
        return ""

    assert all("update_bucket" in error for error in run_threads(main, 2))


def test_a_parameter_changed_before_its_first_step_keeps_the_change() -> None:
    """As with FusedAdam: masters are made when a parameter is first updated."""

    def main(comm: Communicator) -> list[float]:
        found = []
        for kind in ("sharded", "fused"):
            used, unused = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
            wrapped = DataParallel(nn.ParameterList([used, unused]), comm)
            both = [used, unused]
            optimizer: FusedAdam = (
                ShardedAdam(both, lr=1e-2, buckets=wrapped.buckets) if kind == "sharded" else FusedAdam(both, lr=1e-2)
            )
            used.float().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                unused.fill_(5.0)
            unused.float().sum().backward()
            optimizer.step()
            found.append(unused[0].item())
        return found

    for sharded, fused in run_threads(main, 2):
        assert sharded == fused > 4.5


def test_ranks_with_other_groups_or_states_are_told() -> None:
    def swapped(comm: Communicator) -> None:
        net = nn.Linear(3, 3)
        one, other = (net.weight, net.bias) if comm.rank else (net.bias, net.weight)
        optimizer = ShardedAdam([{"params": [one], "lr": 0.1}, {"params": [other], "lr": 0.0}], communicator=comm)
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    def loaded_on_one(comm: Communicator) -> None:
        net = nn.Linear(3, 3)
        optimizer = ShardedAdam(net.parameters(), communicator=comm)
        net(torch.ones(1, 3)).sum().backward()
        before = optimizer.state_dict()
        optimizer.step()
        if comm.rank == 0:
            optimizer.load_state_dict(before)
        optimizer.step()

    def told(main: Callable[[Communicator], None]) -> Callable[[Communicator], str]:
        def guarded(comm: Communicator) -> str:
            try:
                main(comm)
            except pycoll.Error as error:
                return str(error)
            return ""

        return guarded

    # Parameters lie in the order of the groups: there it is found when the buckets are made.
    assert all("differ from those of rank 0" in error for error in run_threads(told(swapped), 2))
    assert all("update_bucket" in error for error in run_threads(told(loaded_on_one), 2))


def test_a_misused_step_on_one_rank_leaves_none_waiting() -> None:
    def main(comm: Communicator) -> str:
        net = nn.Linear(3, 3)
        optimizer = ShardedAdam(net.parameters(), communicator=comm, wire_dtype=torch.bfloat16)
        net(torch.ones(1, 3)).sum().backward()
        if comm.rank == 1:
            assert net.weight.grad is not None
            net.weight.grad.data.zero_()
        try:
            optimizer.step()
        except pycoll.Error as error:
            return str(error)
        return ""

    assert all("changed or replaced since backward" in error for error in run_threads(main, 2, timeout=60.0))


def test_a_norm_holds_for_the_gradients_it_was_of() -> None:
    def main(comm: Communicator) -> float:
        net = nn.Linear(1, 1, bias=False)
        wrapped = DataParallel(net, comm)
        optimizer = ShardedAdam(net.parameters(), lr=0.1, eps=1.0, weight_decay=0.0, buckets=wrapped.buckets)
        wrapped(torch.ones(1, 1) * 1000).sum().backward()
        optimizer.clip_grad_norm(1e-3)
        net.zero_grad()
        wrapped(torch.ones(1, 1)).sum().backward()
        before = net.weight.item()
        optimizer.step()
        return before - net.weight.item()

    assert run_threads(main, 2) == [pytest.approx(0.05, rel=1e-3)] * 2


@pytest.mark.parametrize("kind", ("sharded", "fused"))
def test_clipping_twice_is_clipping_once(kind: str) -> None:
    def main(comm: Communicator) -> tuple[list[float], float]:
        net = nn.Linear(1, 1, bias=False)
        wrapped = DataParallel(net, comm)
        optimizer = optimizer_for(kind, wrapped, lr=0.1, eps=1.0)
        scaler = GradScaler("cpu", init_scale=1024.0)
        scaler.scale(wrapped(torch.ones(1, 1)).sum()).backward()
        norms = [optimizer.clip_grad_norm(10.0, scaler=scaler).item() for _ in range(2)]
        before = net.weight.item()
        scaler.step(optimizer)
        return norms, before - net.weight.item()

    for norms, step in run_threads(main, 2):
        assert norms == [1.0, 1.0]
        assert 0.005 < step < 0.02


def test_another_optimizer_may_follow_one_that_is_gone() -> None:
    def main(comm: Communicator) -> None:
        net = nn.Linear(3, 3)
        wrapped = DataParallel(net, comm)
        for _ in range(2):
            optimizer = ShardedAdam(net.parameters(), buckets=wrapped.buckets)
            wrapped(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            del optimizer
            gc.collect()

    run_threads(main, 2)
