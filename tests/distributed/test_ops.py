"""torch.ops.pycoll: what the operators give, their gradients, torch's own checks of operators, and torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pycoll
from pycoll import Communicator
from pycoll.testing import Processes, Rank, run_threads

pytestmark = pytest.mark.timeout(120)
NAME = "operators"
ROOT = 1


def values(rank: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def inputs(world_size: int, *shape: int) -> list[Tensor]:
    return [values(r, *shape) for r in range(world_size)]


def rows(source: int, target: int) -> int:
    return (2 * source + target) % 3


def splits(rank: int, world_size: int) -> tuple[list[int], list[int]]:
    return [rows(rank, r) for r in range(world_size)], [rows(r, rank) for r in range(world_size)]


def calls(rank: int, world: int) -> dict[str, tuple[Tensor, Callable[[Tensor], Tensor], Callable[[list[Tensor]], Any]]]:
    """Name -> this rank's input, the call, and what it gives, from all ranks' inputs. Its derivative is exact, too."""
    ops = torch.ops.pycoll
    send, recv = splits(rank, world)

    def scattered(xs: list[Tensor]) -> Tensor:
        return xs[ROOT].chunk(world)[rank]

    def exchanged(xs: list[Tensor]) -> Tensor:
        return torch.cat([x.split(splits(r, world)[0])[rank] for r, x in enumerate(xs)])

    square = values(rank, 2 * world, 3)
    at_root = square if rank == ROOT else torch.empty(0, 3, dtype=torch.float64)
    nothing = torch.zeros_like(square)
    return {
        "all_reduce": (square, lambda x: ops.all_reduce(x, "sum", NAME), lambda xs: sum(xs)),
        "all_reduce avg": (square, lambda x: ops.all_reduce(x, "avg", NAME), lambda xs: sum(xs) / world),
        "reduce": (square, lambda x: ops.reduce(x, "sum", ROOT, NAME), lambda xs: sum(xs) if rank == ROOT else nothing),
        "broadcast": (square, lambda x: ops.broadcast(x, ROOT, NAME), lambda xs: xs[ROOT]),
        "all_gather": (square, lambda x: ops.all_gather(x, NAME), lambda xs: torch.cat(xs)),
        "all_gather of scalars": (square[0, 0], lambda x: ops.all_gather(x, NAME), lambda xs: torch.stack(xs)),
        "gather": (
            square,
            lambda x: ops.gather(x, ROOT, NAME),
            lambda xs: torch.cat(xs) if rank == ROOT else square[:0],
        ),
        "reduce_scatter": (square, lambda x: ops.reduce_scatter(x, "sum", NAME), lambda xs: sum(xs).chunk(world)[rank]),
        "reduce_scatter avg": (
            square,
            lambda x: ops.reduce_scatter(x, "avg", NAME),
            lambda xs: sum(xs).chunk(world)[rank] / world,
        ),
        "scatter": (at_root, lambda x: ops.scatter(x, 2, ROOT, NAME), scattered),
        "all_to_all": (
            square,
            lambda x: ops.all_to_all(x, [], [], NAME),
            lambda xs: torch.cat([x.chunk(world)[rank] for x in xs]),
        ),
        "all_to_all uneven": (
            values(rank, sum(send), 3),
            lambda x: ops.all_to_all(x, send, recv, NAME),
            exchanged,
        ),
        "strided": (values(rank, 3, 2 * world).t(), lambda x: ops.all_reduce(x, "sum", NAME), lambda xs: sum(xs)),
    }


def weighted(y: Tensor, rank: int) -> Tensor:
    """A loss of this rank alone: its gradient tells ranks and elements apart."""
    return (y * torch.arange(1.0, y.numel() + 1, dtype=y.dtype).view(y.shape) * (rank + 1)).sum()


def expected(rank: int, world: int, name: str) -> tuple[Tensor, Tensor]:
    """The result on `rank` and the gradient of its input: all ranks' losses in one process, with torch's autograd."""
    xs = [calls(r, world)[name][0].clone().requires_grad_() for r in range(world)]
    ys = [torch.as_tensor(calls(r, world)[name][2](xs)) for r in range(world)]
    sum(weighted(y, r) for r, y in enumerate(ys)).backward()  # type: ignore[union-attr]
    gradient = xs[rank].grad
    return ys[rank].detach(), torch.zeros_like(xs[rank]) if gradient is None else gradient


def _eager(comm: Communicator) -> None:
    for name, (x, call, _) in calls(comm.rank, comm.world_size).items():
        result, gradient = expected(comm.rank, comm.world_size, name)
        x = x.clone().requires_grad_()
        before = x.detach().clone()
        y = call(x)
        torch.testing.assert_close(y, result, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(x, before), name
        weighted(y, comm.rank).backward()
        torch.testing.assert_close(x.grad, gradient, msg=lambda m, name=name: f"gradient of {name}: {m}")


def _no_derivative(comm: Communicator) -> None:
    x = torch.ones(3, requires_grad=True)
    y = torch.ops.pycoll.all_reduce(x, "max", NAME)
    assert y.tolist() == [1.0] * 3
    with pytest.raises(pycoll.UnsupportedError, match="max among ranks has no derivative"):
        y.sum().backward()
    with pytest.raises(pycoll.UsageError, match="no communicators of this process are called 'nobody'"):
        torch.ops.pycoll.all_reduce(x, "sum", "nobody")
    with pytest.raises(pycoll.UsageError, match="root 7"):
        torch.ops.pycoll.broadcast(x, 7, NAME)


def _checked(comm: Communicator) -> None:
    """torch.library.opcheck: schema, fake kernels, autograd, AOT dispatch with static and dynamic shapes."""
    for name, (x, call, _) in calls(comm.rank, comm.world_size).items():
        recorded: list[Any] = []
        with Recorder(recorded):
            call(x.clone())
        (operator, arguments) = recorded[0]
        for requires_grad in (False, True):
            tensor = arguments[0].detach().clone().requires_grad_(requires_grad)
            passed = torch.library.opcheck(operator, (tensor, *arguments[1:]))
            assert set(passed.values()) == {"SUCCESS"}, (name, passed)


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Which operators of pycoll are called, and with what."""

    def __init__(self, into: list[Any]) -> None:
        super().__init__()
        self.into = into

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pycoll":
            self.into.append((func, args))
        return func(*args, **(kwargs or {}))


def _compiled(comm: Communicator, backend: str) -> None:
    for name, (x, call, _) in calls(comm.rank, comm.world_size).items():
        result, _ = expected(comm.rank, comm.world_size, name)
        x = x.clone().requires_grad_()
        compiled = torch.compile(lambda x, call=call: call(x * 2).tanh(), fullgraph=True, backend=backend)
        y = compiled(x)
        torch.testing.assert_close(y, (2 * result).tanh(), msg=lambda m, name=name: f"{name}: {m}")
        (y.atanh() * (comm.rank + 1)).sum().backward()
        eager = x.detach().clone().requires_grad_()
        (call(eager * 2).tanh().atanh() * (comm.rank + 1)).sum().backward()
        torch.testing.assert_close(x.grad, eager.grad, msg=lambda m, name=name: f"gradient of {name}: {m}")
        torch._dynamo.reset()


def _kept(comm: Communicator, backend: str, user: int) -> None:
    """What a rank does not use is not left out: the others wait for it. Nor is it put elsewhere, by most compilers."""

    def fn(x: Tensor) -> Tensor:
        gathered = torch.ops.pycoll.gather(x, ROOT, NAME)
        first = torch.ops.pycoll.all_reduce(x[:1], "max", NAME)
        torch.ops.pycoll.broadcast(x, 0, NAME)
        if comm.rank == user:
            first = first + gathered.sum()
        return first + torch.ops.pycoll.all_reduce(x, "sum", NAME).sum()

    x = torch.full((1, 2), comm.rank + 1.0)
    torch.testing.assert_close(torch.compile(fn, fullgraph=True, backend=backend)(x), fn(x))


def _dynamic_shapes(comm: Communicator) -> None:
    compiled = torch.compile(
        lambda x: torch.ops.pycoll.all_gather(torch.ops.pycoll.reduce_scatter(x, "sum", NAME), NAME) * 2,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for n in (2, 3, 5, 40):
        x = values(comm.rank, n * comm.world_size, 3)
        torch.testing.assert_close(compiled(x), 2 * sum(inputs(comm.world_size, n * comm.world_size, 3)))
    with pytest.raises(RuntimeError, match="equal blocks"):
        compiled(values(0, 3 * comm.world_size + 1, 3))


class Column(torch.nn.Module):
    """A layer that each rank has a part of: the columns, of a matrix that is the same for all."""

    def __init__(self, comm: Communicator) -> None:
        super().__init__()
        whole = values(0, 4 * comm.world_size, 8)
        self.weight = torch.nn.Parameter(whole.chunk(comm.world_size, 0)[comm.rank].clone())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.pycoll.all_reduce(x, "avg", NAME)  # which does nothing but add up the gradients of the parts
        return torch.ops.pycoll.all_gather((x @ self.weight.t()).t(), NAME).t()


def _trained(comm: Communicator, backend: str) -> list[float]:
    model = Column(comm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    losses = []
    for step in range(3):
        loss = compiled(values(step, 4, 8)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch._dynamo.reset()
    return losses


def _trains(comm: Communicator, backend: str) -> None:
    assert _trained(comm, backend) == pytest.approx(_trained(comm, "eager"), rel=1e-12)


CASES: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
    (_eager, ()),
    (_no_derivative, ()),
    (_dynamic_shapes, ()),
    (_compiled, ("aot_eager",)),
    (_kept, ("aot_eager", ROOT)),
    (_trains, ("aot_eager",)),
]
INDUCTOR: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
    (_kept, ("inductor", -1)),  # it reorders what is independent, on all ranks alike if they do the same
    (_trains, ("inductor",)),
]


def _cases(rank: Rank, cases: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
    assert pycoll.ops is not None  # which registers them
    with rank.communicator(name=NAME) as comm:
        for case, arguments in cases:
            torch._dynamo.reset()
            try:
                case(comm, *arguments)
            except Exception as e:
                raise AssertionError(f"{case.__name__}{arguments} failed") from e


@pytest.mark.parametrize("world_size", (2, 3))
def test_operators(world_size: int) -> None:
    with Processes(_cases, world_size, CASES) as ranks:
        ranks.results(110)


def test_opcheck() -> None:
    with Processes(_cases, 2, [(_checked, ())]) as ranks:
        ranks.results(110)


def test_operators_under_inductor() -> None:
    with Processes(_cases, 2, INDUCTOR) as ranks:
        ranks.results(110)


# Names


def test_names() -> None:
    store = torch.distributed.HashStore()
    assert pycoll.ops is not None
    with Communicator(store, 0, 1, name="mine") as comm:
        assert comm.name == "mine"
        assert torch.ops.pycoll.all_reduce(torch.ones(2), "sum", "mine").tolist() == [1.0, 1.0]
    with pytest.raises(pycoll.Error, match="closed"):
        torch.ops.pycoll.all_reduce(torch.ones(2), "sum", "mine")
    with Communicator(store, 0, 1) as first, Communicator(store, 0, 1) as second:
        assert int(second.name) == int(first.name) + 1
    del comm, first, second
    with pytest.raises(pycoll.UsageError, match="no communicators"):
        torch.ops.pycoll.all_reduce(torch.ones(2), "sum", "mine")


def test_a_name_that_two_ranks_of_a_process_have() -> None:
    """Ranks that are threads: which one is meant cannot be told."""
    assert pycoll.ops is not None

    def fn(comm: Communicator) -> None:
        comm.barrier()
        with pytest.raises(pycoll.UsageError, match="2 communicators of this process are called 'threads'"):
            torch.ops.pycoll.all_reduce(torch.ones(2), "sum", comm.name)
        comm.barrier()

    run_threads(fn, 2)
