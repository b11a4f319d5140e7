"""pycoll.relaxed.ParameterServer: beside DataParallel, bounds of staleness, ends, checkpoints, misuse."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_net import distance, equal, loss_of, make_net, weights
from torch import Tensor, nn

import pycoll
from pycoll import Communicator, DataParallel, FusedAdam
from pycoll.relaxed import ParameterServer
from pycoll.testing import run_threads

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("leaves_nothing")]
LR = 0.02


def two_groups(net: nn.Module) -> list[dict[str, Any]]:
    params = list(net.parameters())
    return [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0}]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "fused": lambda net: FusedAdam(two_groups(net), lr=LR, weight_decay=0.1),
    "amsgrad": lambda net: FusedAdam(two_groups(net), lr=LR, amsgrad=True),
    "adamw": lambda net: torch.optim.AdamW(two_groups(net), lr=LR, weight_decay=0.1),
    "momentum": lambda net: torch.optim.SGD(two_groups(net), lr=LR, momentum=0.9, weight_decay=0.1),
}


def step_of(stepper: Any, net: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    """One step at the rate of a schedule."""
    for group in optimizer.param_groups:
        group["lr"] = LR / (1 + step / 7)
    optimizer.zero_grad()
    loss_of(net, rank, step).backward()
    stepper.step()


def synchronous(
    world_size: int, steps: range, make: Callable = OPTIMIZERS["fused"], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    def main(comm: Communicator) -> list[Tensor]:
        model = DataParallel(make_net(dtype), comm)
        optimizer = make(model.module)
        for step in steps:
            step_of(optimizer, model, optimizer, comm.rank, step)
        return weights(model.module)

    return run_threads(main, world_size)[0]


@pytest.mark.parametrize(
    ("world_size", "name", "dtype"),
    [
        *((world_size, "fused", torch.float32) for world_size in (1, 2, 3, 4)),
        *((3, name, torch.float32) for name in ("amsgrad", "adamw", "momentum")),
        (3, "fused", torch.bfloat16),
    ],
)
def test_without_staleness_it_is_data_parallel_bit_for_bit(world_size: int, name: str, dtype: torch.dtype) -> None:
    def main(comm: Communicator) -> tuple[list[Tensor], list[Tensor]]:
        net = make_net(dtype)
        if comm.rank:  # rank 0's count
            torch.nn.init.ones_(net[0].weight)
        optimizer = OPTIMIZERS[name](net)
        with ParameterServer(optimizer, comm, staleness=0) as server:
            for step in range(20):
                step_of(server, net, optimizer, comm.rank, step)
            last = weights(net)
        return last, weights(net)

    expected = synchronous(world_size, range(20), OPTIMIZERS[name], dtype)
    for last, gathered in run_threads(main, world_size):
        assert equal(last, expected) and equal(gathered, expected)
    assert distance(expected, weights(make_net())) > LR


@pytest.mark.parametrize(("world_size", "staleness"), [(2, 0), (2, 1), (3, 2), (3, 5)])
def test_no_rank_is_ever_further_ahead_than_allowed(world_size: int, staleness: int) -> None:
    """Rank 0 begins when the others can go no further. What ranks had pushed when another one began a step is recorded
    outside of the server."""
    steps = 25
    pushed = [0] * world_size
    leads: list[int] = []

    def main(comm: Communicator) -> list[int]:
        net = make_net()
        optimizer = OPTIMIZERS["fused"](net)
        with ParameterServer(optimizer, comm, staleness=staleness) as server:
            for step in range(steps):
                leads.append(step - min(pushed))
                while comm.rank == 0 and step == 0 and min(pushed[1:]) <= staleness:
                    time.sleep(0.001)
                pushed[comm.rank] += 1
                step_of(server, net, optimizer, comm.rank, step)
        return server.clocks

    assert run_threads(main, world_size) == [[steps] * world_size] * world_size
    assert max(leads) == staleness


@pytest.mark.parametrize("staleness", (0, 1, 6))
def test_every_gradient_counts_once_whoever_comes_when(staleness: int) -> None:
    """Plain SGD by gradients that do not depend on the weights: any order ends at the same sum."""
    world_size, steps = 3, 20
    gradients = torch.randn(world_size, steps, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def main(comm: Communicator) -> Tensor:
        param = nn.Parameter(torch.zeros(7))
        with ParameterServer(torch.optim.SGD([param], lr=0.5), comm, staleness=staleness) as server:
            for step in range(steps):
                param.grad = gradients[comm.rank, step].float()
                time.sleep(0.001 * ((step * (comm.rank + 1)) % 4))
                server.step()
        return param.detach()

    expected = -0.5 * gradients.mean(0).sum(0)
    results = run_threads(main, world_size)
    assert all(torch.equal(result, results[0]) for result in results)
    assert float((results[0].double() - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("staleness", (0, 2))
def test_ranks_may_end_earlier_than_others(staleness: int) -> None:
    """Who has ended no longer counts; one makes no step at all."""
    steps = (12, 0, 30)

    def main(comm: Communicator) -> tuple[list[Tensor], list[int]]:
        net = make_net()
        optimizer = OPTIMIZERS["fused"](net)
        with ParameterServer(optimizer, comm, staleness=staleness) as server:
            for step in range(steps[comm.rank]):
                step_of(server, net, optimizer, comm.rank, step)
            server.finish()
            server.finish()  # once is enough
            with pytest.raises(pycoll.UsageError, match="ended"):
                server.step()
        assert server.steps == steps[comm.rank]
        return weights(net), server.clocks

    results = run_threads(main, 3)
    assert all(equal(params, results[0][0]) and clocks == list(steps) for params, clocks in results)


def test_after_the_others_have_ended_a_rank_trains_alone() -> None:
    def main(comm: Communicator) -> list[Tensor]:
        net = make_net()
        optimizer = OPTIMIZERS["fused"](net)
        with ParameterServer(optimizer, comm, staleness=0) as server:
            for step in range(10 * comm.rank):
                step_of(server, net, optimizer, 0, step)
        return weights(net)

    assert equal(run_threads(main, 2)[0], synchronous(1, range(10)))


@pytest.mark.parametrize(
    ("name", "dtype"), [("fused", torch.float32), ("fused", torch.bfloat16), ("momentum", torch.float32)]
)
def test_a_run_goes_on_from_its_state_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """In a ParameterServer, where it did not even end there, and in the optimizer that it is made of."""
    states = []

    def begin(comm: Communicator) -> list[Tensor]:
        net = make_net(dtype)
        optimizer = OPTIMIZERS[name](net)
        with ParameterServer(optimizer, comm, staleness=0) as server:
            for step in range(18):
                if step == 8:
                    states.append((server.state_dict(), {key: x.clone() for key, x in net.state_dict().items()}))
                step_of(server, net, optimizer, comm.rank, step)
        return weights(net)

    def resume(comm: Communicator) -> list[Tensor]:
        net = make_net(dtype)
        optimizer = OPTIMIZERS[name](net)
        with ParameterServer(optimizer, comm, staleness=0) as server:
            net.load_state_dict(states[0][1])
            server.load_state_dict(states[0][0])
            for step in range(8, 18):
                step_of(server, net, optimizer, comm.rank, step)
        return weights(net)

    def resume_synchronous(comm: Communicator) -> list[Tensor]:
        model = DataParallel(make_net(dtype), comm)
        model.module.load_state_dict(states[0][1])
        optimizer = OPTIMIZERS[name](model.module)
        optimizer.load_state_dict(copy.deepcopy(states[0][0]))  # torch takes tensors over as they are
        for step in range(8, 18):
            step_of(optimizer, model, optimizer, comm.rank, step)
        return weights(model.module)

    for results in (run_threads(begin, 3), run_threads(resume, 3), run_threads(resume_synchronous, 3)):
        assert all(equal(each, results[0]) for each in results)
        assert equal(results[0], synchronous(3, range(18), OPTIMIZERS[name], dtype))
    assert equal(run_threads(resume, 1)[0], run_threads(resume_synchronous, 1)[0]), "in another world"


def test_what_travels_is_counted() -> None:
    def main(comm: Communicator) -> tuple[int, int]:
        with ParameterServer(OPTIMIZERS["fused"](make_net()), comm, staleness=0) as server:
            return server.bytes_sent, server.bytes_received

    # 102 weights in shards of 26; before each three numbers of 8 bytes: whether it is the end, and two rates.
    assert run_threads(main, 4)[0] == (3 * (24 + 4 * 26), 3 * 4 * 26)


def test_bad_arguments() -> None:
    def main(comm: Communicator) -> None:
        net = make_net()
        with pytest.raises(pycoll.UsageError, match="0 steps or more"):
            ParameterServer(OPTIMIZERS["fused"](net), comm, staleness=-1)
        with pytest.raises(pycoll.UsageError, match="no parameter"):
            ParameterServer(torch.optim.SGD([torch.zeros(3)]), comm, staleness=0)
        with pytest.raises(pycoll.UsageError, match="ShardedAdam"):
            ParameterServer(pycoll.ShardedAdam(net.parameters(), communicator=comm), comm, staleness=0)
        with pytest.raises(pycoll.UnsupportedError, match="float64"):
            ParameterServer(OPTIMIZERS["fused"](make_net(torch.float64)), comm, staleness=0)
        with pytest.raises(pycoll.UnsupportedError, match=r"Adafactor .* FusedAdam, SGD"):
            ParameterServer(torch.optim.Adafactor(net.parameters()), comm, staleness=0)
        param = nn.Parameter(torch.zeros(4, 3))
        with ParameterServer(torch.optim.SGD([param]), comm, staleness=0) as server:
            param.grad = torch.ones(4, 3).to_sparse()
            with pytest.raises(pycoll.UnsupportedError, match="sparse"):
                server.step()
        with pytest.raises(pycoll.UsageError, match="closed"):
            server.state_dict()
        with pytest.raises(pycoll.UsageError, match="ended"):
            server.load_state_dict({})

    run_threads(main, 1)
