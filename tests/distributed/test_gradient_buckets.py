"""DataParallel, ShardedAdam and ddp_hook among processes: beside torch's DDP, compiled, and with ranks that die."""

from __future__ import annotations

import copy
import signal
import time

import pytest
import torch
import torch.distributed as dist
from asleep import until_asleep
from groups import run
from leaks import held_segments
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pycoll
from distributed.side_by_side import Ranks
from pycoll.buckets import WIRES
from pycoll.testing import Processes, Rank

pytestmark = pytest.mark.timeout(120)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.int8: 5e-2}
"""Of a whole gradient, relatively: what a wire may take."""


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 130), nn.ReLU(), nn.Linear(130, 130), nn.ReLU(), nn.Linear(130, 5))


def example(rank: Rank, step: int) -> Tensor:
    return torch.randn(4, 20, generator=torch.Generator().manual_seed(100 * step + rank.rank))


def vector(net: nn.Module) -> Tensor:
    return torch.cat([param.grad.flatten() for param in net.parameters() if param.grad is not None])


def hooks_beside_ddp(rank: Rank, wire: torch.dtype) -> list[list[float]]:
    """By step: how far the averages are from DDP's own, for all the ways to have them."""
    nets = [make_net() for _ in range(3)]
    plain = DistributedDataParallel(nets[0])
    hooked = DistributedDataParallel(nets[1], bucket_cap_mb=0.05)
    hooked.register_comm_hook(pycoll.WireState(wire), pycoll.ddp_hook)
    wrapped = pycoll.DataParallel(nets[2], wire_dtype=wire, bucket_bytes=50000)
    found = []
    for step in range(4):
        for model in (plain, hooked, wrapped):
            model.zero_grad()
            model(example(rank, step)).square().sum().backward()
        wanted = vector(nets[0])
        found.append([((vector(net) - wanted).norm() / wanted.norm()).item() for net in nets[1:]])
    return found


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_averages_are_those_of_ddp(ranks: Ranks, wire: torch.dtype) -> None:
    for found in ranks.run(hooks_beside_ddp, wire):
        assert all(distance <= ROUNDING[wire] for step in found for distance in step), found


def saved_hooks(rank: Rank) -> None:
    """What int8 has rounded away goes from one WireState to the next."""
    ways: list[list[Tensor]] = []
    saved: dict[str, Tensor] = {}
    for begins in (0, 2, 2):
        net, state = make_net(), pycoll.WireState(torch.int8)
        state.load_state_dict(saved if len(ways) == 1 else {})
        assert state.state_dict().keys() == (saved.keys() if len(ways) == 1 else set())
        hooked = DistributedDataParallel(net, bucket_cap_mb=0.05)
        hooked(example(rank, 0)).square().sum().backward()  # after which DDP divides its buckets anew
        hooked.register_comm_hook(state, pycoll.ddp_hook)
        ways.append([])
        for step in range(begins, 4):
            if step == 2:
                saved = saved or {name: residual.clone() for name, residual in state.state_dict().items()}
            hooked.zero_grad()
            hooked(example(rank, step)).square().sum().backward()
            ways[-1].append(vector(net))
    straight, resumed, anew = ways
    assert len(saved) > 1 and all(residual.any() for residual in saved.values())
    assert all(map(torch.equal, resumed, straight[2:]))
    assert not torch.equal(anew[0], straight[2])


def test_what_rounding_takes_goes_with_a_hook(two_ranks: Ranks) -> None:
    two_ranks.run(saved_hooks)


def compiled(rank: Rank) -> None:
    """A compiled model's gradients are averaged as another's."""
    nets = [make_net(), make_net()]
    one = pycoll.DataParallel(nets[0])
    other = pycoll.DataParallel(torch.compile(nets[1], backend="aot_eager"))
    for step in range(3):
        for model in (one, other):
            model.zero_grad()
            model(example(rank, step)).square().sum().backward()
        torch.testing.assert_close(vector(nets[1]), vector(nets[0]))


def test_compiled_models(two_ranks: Ranks) -> None:
    two_ranks.run(compiled)


def in_a_subgroup(rank: Rank) -> list[float]:
    """Ranks 0 and 2, and 1 and 3, train a model each."""
    group = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank.rank % 2]
    net = nn.Linear(1, 1, bias=False)
    wrapped = pycoll.DataParallel(net, group)
    optimizer = pycoll.ShardedAdam(net.parameters(), buckets=wrapped.buckets)
    wrapped(torch.full((1, 1), float(rank.rank))).sum().backward()
    return [optimizer.clip_grad_norm(100.0).item(), wrapped.communicator.world_size]


def test_groups_of_some_ranks(four_ranks: Ranks) -> None:
    assert four_ranks.run(in_a_subgroup) == [[1.0, 2], [2.0, 2], [1.0, 2], [2.0, 2]]


def mixed_with_other_collectives(rank: Rank) -> list[float]:
    """Calls of the group's own between and during passes: the buckets have a communicator of their own."""
    net = make_net()
    wrapped = pycoll.DataParallel(net, bucket_bytes=20000)
    optimizer = pycoll.ShardedAdam(net.parameters(), lr=1e-2, buckets=wrapped.buckets)
    for step in range(5):
        work = dist.all_reduce(torch.ones(100000), async_op=True)
        loss = wrapped(example(rank, step)).square().sum()
        dist.all_reduce(loss.detach().clone())
        loss.backward()
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
        optimizer.zero_grad()
        work.wait()
    return torch.cat([param.detach().flatten() for param in net.parameters()]).tolist()


def test_other_collectives_meanwhile() -> None:
    results = run(mixed_with_other_collectives, 3)
    assert all(result == results[0] for result in results)


def trains_for_ever(rank: Rank, where: str) -> str:
    rank.init_process_group()
    net = make_net()
    wrapped = pycoll.DataParallel(net, bucket_bytes=20000)
    optimizer = pycoll.ShardedAdam(net.parameters(), buckets=wrapped.buckets) if where == "sharded" else None
    step = 0
    try:
        while True:
            if step == 3:
                rank.say("training")
            wrapped(example(rank, step % 7)).square().sum().backward()
            if optimizer is not None:
                optimizer.clip_grad_norm(1.0)
                optimizer.step()
            wrapped.zero_grad()
            step += 1
    except pycoll.PeerLostError as error:
        rank.say("lost")
        with pytest.raises(pycoll.PeerLostError):  # and for ever
            wrapped(example(rank, 0)).square().sum().backward()
        del wrapped, optimizer, net
        return str(error)


@pytest.mark.parametrize("where", ("sharded", "data parallel"))
def test_a_rank_that_dies_is_named_within_a_second_and_nothing_is_left(where: str) -> None:
    with Processes(trains_for_ever, 3, where) as ranks:
        for rank in range(3):
            assert ranks.hear(rank) == "training"
        ranks.kill(1, signal.SIGKILL)
        began = time.monotonic()
        for rank in (0, 2):
            assert ranks.hear(rank, 20.0) == "lost"
        assert time.monotonic() - began < 10.0  # a second is what is promised, where there are cores
        for rank in (0, 2):
            assert "rank 1" in ranks.result(rank)


def interrupted(rank: Rank) -> str | None:
    """Ctrl-C while the others are late."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background inherits it ignored
    rank.init_process_group()
    net = make_net()
    wrapped = pycoll.DataParallel(net)
    if rank.rank == 1:
        rank.listen()
        return None
    rank.say("waiting")
    try:
        wrapped(example(rank, 0)).square().sum().backward()
    except KeyboardInterrupt:
        return "interrupted"
    return None


def test_an_interrupt_ends_a_pass_that_waits() -> None:
    with Processes(interrupted, 2) as ranks:
        assert ranks.hear(0) == "waiting"
        until_asleep(ranks.pid(0))
        ranks.kill(0, signal.SIGINT)
        assert ranks.result(0, 20.0) == "interrupted"
        ranks.tell(1, None)
        ranks.result(1)


def saved_and_copied(rank: Rank) -> None:
    """A model whose parameters lie in the heap is saved as small as any, and copied as any."""
    net = make_net()
    optimizer = pycoll.ShardedAdam(net.parameters())
    folder = rank.folder / f"model {rank.rank}"
    torch.save(net[0].bias, folder)
    assert folder.stat().st_size < 5000
    net(example(rank, 0)).sum().backward()
    optimizer.step()
    twin = copy.deepcopy(net)
    twin.load_state_dict(net.state_dict())
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), twin.parameters(), strict=True))
    assert not {param.data_ptr() for param in net.parameters()} & {param.data_ptr() for param in twin.parameters()}


def test_saving_and_copying() -> None:
    run(saved_and_copied, 2)
    assert held_segments() == []
