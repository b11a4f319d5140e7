"""pycoll.relaxed.LocalSGD and DiLoCo: beside one process that plays all ranks in fp64; wires, checkpoints, misuse."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from small_net import distance, equal, loss_of, make_net, weights
from torch import Tensor, nn

import pycoll
from pycoll import Communicator, DataParallel, FusedAdam
from pycoll.relaxed import DiLoCo, LocalSGD
from pycoll.testing import run_threads

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("leaves_nothing")]
LR = 0.05
ROUNDING = 2e-6
"""Between weights of about 1 after some steps in fp32, added in other orders."""


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=LR)


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return FusedAdam(net.parameters(), lr=LR, weight_decay=0.1)


def inner_step(net: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    optimizer.zero_grad()
    loss_of(net, rank, step).backward()
    optimizer.step()


Make = Callable[[torch.optim.Optimizer, Communicator], LocalSGD | DiLoCo]


def train(make: Make, world_size: int, steps: int, optimizer: Callable = sgd, dtype: torch.dtype = torch.float32):
    """The weights of all ranks."""

    def main(comm: Communicator) -> list[Tensor]:
        net = make_net(dtype)
        if comm.rank:  # rank 0's count
            torch.nn.init.ones_(net[0].weight)
        inner = optimizer(net)
        periodic = make(inner, comm)
        met = []
        for step in range(steps):
            inner_step(net, inner, comm.rank, step)
            met.append(periodic.step())
        assert met == [(step + 1) % periodic.every == 0 for step in range(steps)]
        return weights(net)

    return run_threads(main, world_size)


def reference(
    world_size: int, steps: int, every: int, outer: Callable[[Tensor, Tensor, int], Tensor], optimizer: Callable = sgd
) -> list[Tensor]:
    """One process plays all ranks in fp64; `outer` makes new weights of the old ones and the mean of the new ones."""
    nets = [make_net().double() for _ in range(world_size)]
    inners = [optimizer(net) for net in nets]
    anchors = weights(nets[0])
    for step in range(steps):
        for rank, net in enumerate(nets):
            inners[rank].zero_grad()
            generator = torch.Generator().manual_seed(1000 * rank + step)
            x = torch.randn(4, 5, generator=generator)
            (net(x.double()) - torch.sin(x[:, :4]).double()).square().mean().backward()
            inners[rank].step()
        if (step + 1) % every == 0:
            means = [torch.stack(ranks).mean(0) for ranks in zip(*map(weights, nets), strict=True)]
            anchors = [outer(*pair, place) for place, pair in enumerate(zip(anchors, means, strict=True))]
            with torch.no_grad():
                for net in nets:
                    torch._foreach_copy_(list(net.parameters()), anchors)
    return anchors


@pytest.mark.parametrize("world_size", (1, 2, 3))
def test_local_sgd_at_every_step_is_synchronous_sgd(world_size: int) -> None:
    def synchronous(comm: Communicator) -> list[Tensor]:
        model = DataParallel(make_net(), comm)
        optimizer = sgd(model)
        for step in range(12):
            inner_step(model, optimizer, comm.rank, step)
        return weights(model.module)

    local = train(lambda inner, comm: LocalSGD(inner, comm, every=1), world_size, 12)
    assert all(equal(ranks, local[0]) for ranks in local)
    assert distance(local[0], run_threads(synchronous, world_size)[0]) < ROUNDING
    assert distance(local[0], weights(make_net())) > 100 * ROUNDING, "it has learned something"


@pytest.mark.parametrize("world_size", (2, 3))
def test_local_sgd_averages_what_ranks_have_learned_alone(world_size: int) -> None:
    local = train(lambda inner, comm: LocalSGD(inner, comm, every=4), world_size, 12)
    assert all(equal(ranks, local[0]) for ranks in local)
    assert distance(local[0], reference(world_size, 12, 4, lambda old, mean, _: mean)) < ROUNDING


def test_diloco_with_plain_steps_is_local_sgd() -> None:
    diloco = train(lambda inner, comm: DiLoCo(inner, comm, every=4, outer_lr=1.0, outer_momentum=0.0), 2, 12, adam)
    local = train(lambda inner, comm: LocalSGD(inner, comm, every=4), 2, 12, adam)
    assert distance(diloco[0], local[0]) < ROUNDING
    assert distance(local[0], weights(make_net())) > 100 * ROUNDING


@pytest.mark.parametrize("world_size", (1, 3))
def test_diloco_is_nesterov_momentum_of_outer_gradients(world_size: int) -> None:
    momenta: dict[int, Tensor] = {}

    def nesterov(old: Tensor, mean: Tensor, place: int) -> Tensor:
        """Sutskever et al., 2013, in the form of the paper's code: the step looks ahead by the new momentum."""
        momenta[place] = 0.9 * momenta.get(place, torch.zeros_like(old)) + (old - mean)
        return old - 0.7 * ((old - mean) + 0.9 * momenta[place])

    diloco = train(lambda inner, comm: DiLoCo(inner, comm, every=3), world_size, 15)
    assert all(equal(ranks, diloco[0]) for ranks in diloco)
    assert distance(diloco[0], reference(world_size, 15, 3, nesterov)) < 5 * ROUNDING


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_on_every_wire_ranks_have_the_same_bits_and_learn_the_same(dtype: torch.dtype) -> None:
    def loss(net: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(loss_of(net, 7, step)) for step in range(50)) / 50

    def main(comm: Communicator, wire: torch.dtype) -> tuple[list[Tensor], list[Tensor], float]:
        net = make_net(dtype)
        inner = FusedAdam(net.parameters(), lr=0.01)
        diloco = DiLoCo(inner, comm, every=5, wire_dtype=wire)
        for step in range(60):
            inner_step(net, inner, comm.rank, step)
            diloco.step()
        masters = [inner.state[param].get("master_param", param).detach().clone() for param in net.parameters()]
        return weights(net), masters, loss(net)

    learned = {}
    for wire in pycoll.buckets.WIRES:
        results = run_threads(partial(main, wire=wire), 3)
        for params, masters, _ in results:
            assert equal(params, results[0][0]) and equal(masters, results[0][1])
            assert equal(params, [master.to(dtype) for master in masters])
        learned[wire] = loss(make_net()) - results[0][2]
    exact = learned[torch.float32]
    assert exact > 0.3 and all(abs(each - exact) < 0.05 * exact for each in learned.values()), learned


def test_error_feedback_brings_all_of_a_gradient_over_in_time() -> None:
    """Every round each rank comes equally far, by steps that 8 bits cannot say: what is lost is made good later."""
    rounds = 64
    moves = [torch.randn(600, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    moves[0][0] = 50.0  # so that most others are a step of the scale or less

    def main(comm: Communicator) -> list[float]:
        param = nn.Parameter(torch.zeros(600))
        inner = torch.optim.SGD([param], lr=1.0)
        diloco = DiLoCo(inner, comm, every=1, outer_lr=1.0, outer_momentum=0.0, wire_dtype=torch.int8)
        errors = []
        for step in range(rounds):
            param.grad = -moves[comm.rank]
            inner.step()
            diloco.step()
            exact = (step + 1) * (moves[0].double() + moves[1].double()) / 2
            errors.append(float((param.detach().double() - exact).abs().max()))
        return errors

    quantum = 51.0 / 127  # of the coarsest block of either rank
    for errors in run_threads(main, 2):
        assert errors[0] > 0.05 * quantum, "8 bits do lose something"
        assert max(errors) < quantum, "and no more of many rounds than of one"
        assert errors[-1] / rounds < errors[0] / 10


@pytest.mark.parametrize("half", (4, 6))
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (lambda inner, comm: LocalSGD(inner, comm, every=3), torch.float32),
        (lambda inner, comm: DiLoCo(inner, comm, every=3), torch.bfloat16),
        (lambda inner, comm: DiLoCo(inner, comm, every=3, wire_dtype=torch.int8), torch.float32),
        (lambda inner, comm: DiLoCo(inner, comm, every=3, outer_momentum=0.0), torch.float32),
    ],
    ids=("local", "diloco-bfloat16", "diloco-int8", "diloco-plain"),
)
def test_a_run_goes_on_from_its_state_bit_for_bit(make: Make, dtype: torch.dtype, half: int) -> None:
    def straight(comm: Communicator) -> tuple[list[Tensor], Any]:
        net = make_net(dtype)
        inner = adam(net)
        periodic = make(inner, comm)
        for step in range(11):
            if step == half:
                saved = copy.deepcopy((net.state_dict(), inner.state_dict(), periodic.state_dict()))
            inner_step(net, inner, comm.rank, step)
            periodic.step()
        periodic.synchronize()
        return weights(net), saved

    results = run_threads(straight, 2)

    def resumed(comm: Communicator) -> list[Tensor]:
        saved = results[comm.rank][1]
        net = make_net(dtype)
        inner = adam(net)
        periodic = make(inner, comm)
        net.load_state_dict(saved[0])
        inner.load_state_dict(saved[1])
        periodic.load_state_dict(saved[2])
        for step in range(half, 11):
            inner_step(net, inner, comm.rank, step)
            periodic.step()
        periodic.synchronize()
        return weights(net)

    assert all(equal(again, results[0][0]) for again in run_threads(resumed, 2))


def test_a_meeting_ahead_of_time_is_one_meeting() -> None:
    """synchronize() meets only where steps have been made since, and leaves gradients alone."""

    def main(comm: Communicator) -> None:
        net = make_net()
        inner = sgd(net)
        diloco = DiLoCo(inner, comm, every=4)
        for step in range(3):
            inner_step(net, inner, comm.rank, step)
            assert not diloco.step()
        grads = [param.grad for param in net.parameters()]
        diloco.synchronize()
        met = weights(net)
        diloco.synchronize()
        assert equal(weights(net), met)
        assert all(param.grad is grad for param, grad in zip(net.parameters(), grads, strict=True))
        assert diloco.step(), "the fourth is in its place"

    run_threads(main, 2)


@pytest.mark.parametrize("kind", (LocalSGD, DiLoCo))
def test_ranks_that_meet_at_different_steps_are_told(kind: type[LocalSGD | DiLoCo]) -> None:
    def main(comm: Communicator) -> None:
        net = make_net()
        periodic = kind(sgd(net), comm, every=2 + comm.rank)
        for _ in range(6):
            periodic.step()

    with pytest.raises(pycoll.MismatchError):
        run_threads(main, 2)


def test_ranks_with_other_models_are_told() -> None:
    with pytest.raises(pycoll.MismatchError):
        run_threads(lambda comm: LocalSGD(sgd(nn.Linear(4, 3 + comm.rank)), comm, every=1), 2)


def test_what_travels_is_counted() -> None:
    def main(comm: Communicator) -> Sequence[tuple[int, int]]:
        made = [LocalSGD(sgd(make_net()), comm, every=1), DiLoCo(sgd(make_net()), comm, every=1)]
        made.append(DiLoCo(sgd(make_net()), comm, every=1, wire_dtype=torch.int8))
        return [(each.bytes_sent, each.bytes_received) for each in made]

    # 6 parameters in blocks of 256, to a multiple of 1024 * 2; int8 has 4 scales of 4 bytes for 1024 elements.
    assert run_threads(main, 2)[0] == [(4096, 4096), (4096, 4096), (1040, 4096)]


def test_bad_arguments() -> None:
    def main(comm: Communicator) -> None:
        net = make_net()
        for wrong in (
            lambda: LocalSGD(sgd(net), comm, every=0),
            lambda: DiLoCo(sgd(net), comm, every=1, outer_lr=0.0),
            lambda: DiLoCo(sgd(net), comm, every=1, outer_momentum=1.0),
            lambda: DiLoCo(sgd(net), comm, every=1, wire_dtype=torch.float64),
            lambda: LocalSGD(torch.optim.SGD([torch.zeros(3)]), comm, every=1),
            lambda: LocalSGD(pycoll.ShardedAdam(net.parameters(), communicator=comm), comm, every=1),
            lambda: DiLoCo(sgd(net), comm, every=1).load_state_dict({"steps": 1, "met": 0, "state": {}}),
        ):
            with pytest.raises(pycoll.UsageError):
                wrong()
        with pytest.raises(pycoll.UnsupportedError, match="float64"):
            LocalSGD(sgd(make_net(torch.float64)), comm, every=1)
        comm.barrier()

    run_threads(main, 1)
