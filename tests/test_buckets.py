"""pycoll.GradientBuckets and DataParallel: averages beside fp64, what models and trainers do, and failures."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pycoll
from pycoll import Communicator, DataParallel, FusedAdam, GradientBuckets, tuning
from pycoll.buckets import WIRES
from pycoll.testing import run_threads

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("leaves_nothing")]
SHAPES = ((), (0,), (1,), (255,), (33, 7), (3000,), (9000,))
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.int8: 0.5001 / 127}
"""What a wire may take from an element, as a share of the largest in its block."""


def make_params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]


def local_gradients(rank: int, step: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def backward(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """A pass in which each parameter gets this gradient."""
    sum((param * grad).float().sum() for param, grad in zip(params, grads, strict=True)).backward()


def same_on_all_ranks(results: Sequence[Sequence[Tensor | None]]) -> bool:
    def equal(one: Tensor | None, other: Tensor | None) -> bool:
        return one is other if one is None or other is None else torch.equal(one, other)

    return all(equal(*pair) for result in results for pair in zip(result, results[0], strict=True))


def grads_of(params: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if param.grad is None else param.grad.clone() for param in params]


class Net(nn.Module):
    """Two branches, in either order, of which one may be left out, and a parameter that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x: Tensor, branches: str = "lr", how: Callable[..., Tensor] = lambda f, x: f(x)) -> Tensor:
        for branch in branches:
            x = how(self.left if branch == "l" else self.right, x).tanh()
        return self.last(self.tied(how(self.tied, x)).tanh() * self.frozen)


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


def example(rank: int, step: int = 0) -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(100 * step + rank))


def averaged(nets: Sequence[Net], run: Callable[[Net, int], None]) -> list[Tensor | None]:
    """What each rank computes alone, averaged in fp64."""
    alone = [copy.deepcopy(net) for net in nets]
    for rank, net in enumerate(alone):
        run(net, rank)
    result: list[Tensor | None] = []
    for same in zip(*(net.parameters() for net in alone), strict=True):
        grads = [param.grad for param in same]
        if all(grad is None for grad in grads):
            result.append(None)
        else:
            result.append(sum(0.0 if grad is None else grad.double() for grad in grads) / len(nets))
    return result


def check_net(
    world_size: int, run: Callable[[nn.Module, int], None], communicate: Callable[..., Any] = DataParallel
) -> list[Any]:
    """Trains one pass as each rank, and compares with each rank alone. Returns what each rank's `communicate` made."""
    nets = [make_net() for _ in range(world_size)]
    expected = averaged(nets, run)

    def main(comm: Communicator) -> list[Tensor | None]:
        wrapped = communicate(nets[comm.rank], comm, bucket_bytes=300)
        run(wrapped, comm.rank)
        return grads_of([*nets[comm.rank].parameters()])

    results = run_threads(main, world_size)
    assert same_on_all_ranks(results)
    for grad, wanted in zip(results[0], expected, strict=True):
        assert (grad is None) == (wanted is None)
        if grad is not None:
            torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-6)
    return results


@pytest.mark.parametrize("world_size", (1, 2, 3, 4, 7))
@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_averages(world_size: int, wire: torch.dtype) -> None:
    for dtype in PARAM_DTYPES:

        def main(comm: Communicator, dtype: torch.dtype = dtype) -> tuple[list[Tensor | None], Tensor]:
            params = make_params(dtype)
            buckets = GradientBuckets(params, comm, wire_dtype=wire, bucket_bytes=10000)
            assert len(buckets.buckets) > 2
            backward(params, local_gradients(comm.rank, 0, dtype))
            assert buckets.squares is not None
            return grads_of(params), buckets.squares.sum()

        results = run_threads(main, world_size)
        assert same_on_all_ranks([grads for grads, _ in results])
        for place, grad in enumerate(results[0][0]):
            assert grad is not None and grad.dtype == torch.float32
            ranks = [local_gradients(rank, 0, dtype)[place].double() for rank in range(world_size)]
            wanted = sum(ranks) / world_size
            largest = max((rank.abs().max().item() for rank in ranks if rank.numel()), default=0.0)
            assert torch.all((grad.double() - wanted).abs() <= (TOLERANCE[wire] + 1e-6) * largest)
        squares = sum(grad.double().square().sum() for grad in results[0][0] if grad is not None)
        assert results[0][1] == pytest.approx(float(squares), rel=1e-12)


def test_adds_up_in_fp32_without_synchronizing() -> None:
    """128 gradients of 1 and one of 256: in bfloat16 the ones would be lost."""

    def main(comm: Communicator) -> list[float]:
        seen = []
        for wire in (torch.float32, torch.bfloat16):
            param = nn.Parameter(torch.zeros(300, dtype=torch.bfloat16))
            buckets = GradientBuckets([param], comm, wire_dtype=wire)
            for step in range(129):
                with buckets.no_sync() if step < 128 else nullcontext():
                    (param * (256.0 if step == 0 else 1.0)).sum().backward()
            assert param.grad is not None and bool((param.grad == param.grad[0]).all())
            seen.append(param.grad[0].item())
        return seen

    assert run_threads(main, 2) == [[384.0, 384.0]] * 2


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda net, rank: net(example(rank)).square().sum().backward(), id="plain"),
        pytest.param(
            lambda net, rank: net(example(rank), "lr" if rank % 2 else "rl").square().sum().backward(), id="other order"
        ),
        pytest.param(
            lambda net, rank: net(example(rank), "l" if rank else "lr").square().sum().backward(), id="unused on one"
        ),
        pytest.param(lambda net, rank: net(example(rank), "l").square().sum().backward(), id="unused on all"),
        pytest.param(
            lambda net, rank: [net(example(rank, step)).square().sum().backward() for step in range(2)], id="two passes"
        ),
        pytest.param(
            lambda net, rank: (
                torch.autograd.grad(
                    net(example(rank, 1)).sum(), [param for param in net.parameters() if param.requires_grad]
                ),
                net(example(rank)).square().sum().backward(),
            ),
            id="autograd.grad",
        ),
        pytest.param(
            lambda net, rank: (
                net(example(rank), "lr", lambda f, x: checkpoint(f, x, use_reentrant=False)).square().sum().backward()
            ),
            id="checkpoint",
        ),
        pytest.param(
            lambda net, rank: (
                net(example(rank)).sum().backward(),
                net.zero_grad(set_to_none=bool(rank)),
                net(example(rank, 1)).square().sum().backward(),
            ),
            id="zero_grad",
        ),
    ],
)
def test_what_models_and_trainers_do(run: Callable[[nn.Module, int], None]) -> None:
    check_net(3, run)


def test_checkpoints_that_nest_passes() -> None:
    class Deep(Net):
        def forward(self, x: Tensor, *_: Any) -> Tensor:
            x = checkpoint(self.left, x.requires_grad_(), use_reentrant=True).tanh()
            return self.last(self.tied(checkpoint(self.right, x, use_reentrant=True).tanh()))

    def run(net: nn.Module, rank: int) -> None:
        net(example(rank)).square().sum().backward()

    torch.manual_seed(0)
    nets = [Deep()] * 2
    expected = averaged(nets, run)
    nets = [copy.deepcopy(nets[0]) for _ in nets]

    def main(comm: Communicator) -> tuple[list[Tensor | None], int]:
        net = nets[comm.rank]
        wrapped = DataParallel(net, comm, bucket_bytes=300)
        before = len(comm.trace()["ranks"][comm.rank]["calls"])
        run(wrapped, comm.rank)
        made = [call["call"] for call in comm.trace()["ranks"][comm.rank]["calls"][before:]]
        return grads_of([*net.parameters()]), made.count("reduce_bucket") - len(wrapped.buckets.buckets)

    results = run_threads(main, 2)
    for grads, surplus in results:
        assert surplus == 0, "the nested passes averaged for themselves"
        for grad, wanted in zip(grads, expected, strict=True):
            assert (grad is None) == (wanted is None)
            if grad is not None:
                torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-6)


def test_buckets_travel_while_the_pass_goes_on() -> None:
    def main(comm: Communicator) -> list[int]:
        layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
        wrapped = DataParallel(layers, comm, bucket_bytes=4 * 64 * 64)
        launched: list[int] = []
        for layer in layers:
            layer.register_full_backward_hook(lambda *_: launched.append(wrapped.buckets._passes.last.launched))
        wrapped(torch.randn(2, 64).requires_grad_()).sum().backward()
        return launched

    for launched in run_threads(main, 2):
        assert launched == sorted(launched) and launched[-1] >= 3, launched


def test_what_rounding_takes_is_added_to_the_next() -> None:
    """With int8 an average over steps is right however coarse a step is."""

    def main(comm: Communicator) -> Tensor:
        param = nn.Parameter(torch.zeros(512))
        buckets = GradientBuckets([param], comm, wire_dtype=torch.int8)
        grad = torch.linspace(-1, 1, 512) * (comm.rank + 1)
        total = torch.zeros(512)
        for _ in range(100):
            buckets.forget()
            (param * grad).sum().backward()
            assert param.grad is not None
            total += param.grad
        return total / 100 - torch.linspace(-1, 1, 512) * 1.5

    for error in run_threads(main, 2):
        assert error.abs().max() < 1.5 / 127 / 100


def test_what_rounding_takes_goes_with_a_state_dict() -> None:
    def main(comm: Communicator) -> None:
        param = nn.Parameter(torch.zeros(512))
        grad = torch.linspace(-1, 1, 512) * (comm.rank + 1)

        def averages(buckets: GradientBuckets, steps: int) -> list[Tensor]:
            found = []
            for _ in range(steps):
                buckets.forget()
                (param * grad).sum().backward()
                assert param.grad is not None
                found.append(param.grad.clone())
            buckets.close()
            return found

        straight = averages(GradientBuckets([param], comm, wire_dtype=torch.int8), 6)
        saved = GradientBuckets([param], comm, wire_dtype=torch.int8)
        averages(saved, 3)
        state = {name: residual.clone() for name, residual in saved.state_dict().items()}
        assert [(name, residual.shape) for name, residual in state.items()] == [
            ("residual.0", (1024 * comm.world_size,))
        ]
        for loaded, begins in ((state, 3), ({}, 0), ({"residual.0": torch.ones(3)}, 0)):
            again = GradientBuckets([param], comm, wire_dtype=torch.int8)
            again.state_dict()["residual.0"].fill_(9.0)
            again.load_state_dict(loaded)
            assert all(map(torch.equal, averages(again, 3), straight[begins : begins + 3]))
        assert not torch.equal(straight[0], straight[3]), "else this shows nothing"
        assert GradientBuckets([param], comm).state_dict() == {}

    run_threads(main, 2)


def test_norm_is_measured_while_averaging() -> None:
    def main(comm: Communicator) -> None:
        net = make_net()
        wrapped = DataParallel(net, comm)
        optimizer = FusedAdam(net.parameters())
        wrapped(example(comm.rank)).square().sum().backward()
        grads = [param.grad for param in net.parameters() if param.grad is not None]
        squares = wrapped.buckets.squares
        assert squares is not None
        wanted = torch.nn.utils.get_total_norm(grads)
        torch.testing.assert_close(optimizer.clip_grad_norm(1.0), wanted)
        squares.fill_(16.0)  # so that one sees whether they are used
        assert optimizer.clip_grad_norm(1.0) == 4.0 * len(wrapped.buckets.buckets) ** 0.5
        grads[0].mul_(2.0)
        assert wrapped.buckets.squares is None
        torch.testing.assert_close(optimizer.clip_grad_norm(1.0), torch.nn.utils.get_total_norm(grads))

    run_threads(main, 2)


def test_data_parallel_begins_as_rank_0_and_follows_its_buffers() -> None:
    def main(comm: Communicator) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(comm.rank)
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        wrapped = DataParallel(net, comm)
        began = [tensor.clone() for tensor in wrapped.module.state_dict().values()]
        for step in range(3):
            wrapped(torch.randn(8, 4) + comm.rank).sum().backward()
            if step == 1:
                net.eval()
                wrapped.eval()
                wrapped(torch.randn(8, 4) + comm.rank)
                wrapped.train()
        wrapped._broadcast_buffers()
        return began, [tensor.clone() for tensor in net.state_dict().values()]

    results = run_threads(main, 2)
    for states in zip(*results, strict=True):
        assert same_on_all_ranks(states)


def test_no_sync_is_that_of_the_forward_pass() -> None:
    """As in torch's DDP; and nanoGPT sets the flag by hand."""

    def main(comm: Communicator) -> list[float]:
        net = nn.Linear(1, 1, bias=False)
        wrapped = DataParallel(net, comm)
        seen = []
        for by_hand in (False, True):
            wrapped.zero_grad()
            with nullcontext() if by_hand else wrapped.no_sync():
                wrapped.require_backward_grad_sync = False
                loss = wrapped(torch.full((1, 1), comm.rank + 1.0)).sum()
                wrapped.require_backward_grad_sync = not by_hand
            loss.backward()
            wrapped.require_backward_grad_sync = True
            assert net.weight.grad is not None
            seen.append(net.weight.grad.item())
            wrapped(torch.full((1, 1), comm.rank + 1.0)).sum().backward()
            seen.append(net.weight.grad.item())
        return seen

    assert run_threads(main, 2) == [[1.0, 3.0] * 2, [2.0, 3.0] * 2]


def errors_of(main: Callable[[Communicator], Any], world_size: int = 2, timeout: float = 20.0) -> list[str]:
    """What each rank raises, which must be pycoll's."""

    def guarded(comm: Communicator) -> str:
        try:
            main(comm)
        except pycoll.Error as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return run_threads(guarded, world_size, timeout=timeout)


def test_a_gradient_that_comes_late_is_an_error() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.layer, x.requires_grad_(), use_reentrant=True)
            return checkpoint(self.layer, x, use_reentrant=True)

    def main(comm: Communicator) -> None:
        DataParallel(Twice(), comm)(example(comm.rank)).sum().backward()

    for error in errors_of(main):
        assert "another gradient after its bucket was on its way" in error


def test_a_pass_that_raises_on_all_ranks_is_forgotten() -> None:
    nets = [make_net() for _ in range(2)]
    expected = averaged(nets, lambda net, rank: net(example(rank)).square().sum().backward())

    def main(comm: Communicator) -> list[Tensor | None]:
        net = nets[comm.rank]
        wrapped = DataParallel(net, comm, bucket_bytes=300)
        handle = net.left.weight.register_hook(lambda grad: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                wrapped(example(comm.rank)).square().sum().backward()
        handle.remove()
        wrapped.zero_grad()
        wrapped(example(comm.rank)).square().sum().backward()
        return grads_of([*net.parameters()])

    for grads in run_threads(main, 2):
        for grad, wanted in zip(grads, expected, strict=True):
            assert (grad is None) == (wanted is None)
            if grad is not None:
                torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bucket_bytes", (300, 1 << 20), ids=("many buckets", "one bucket"))
def test_ranks_in_different_passes_never_share_an_average(bucket_bytes: int) -> None:
    def main(comm: Communicator) -> None:
        net = make_net()
        wrapped = DataParallel(net, comm, bucket_bytes=bucket_bytes)
        if comm.rank == 0:  # skips a batch
            handle = net.left.weight.register_hook(lambda grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                wrapped(example(0)).square().sum().backward()
            handle.remove()
        wrapped(example(comm.rank)).square().sum().backward()

    for error in errors_of(main):
        assert error.startswith("MismatchError: "), error


def test_an_error_in_a_pass_is_told_to_all_ranks() -> None:
    def main(comm: Communicator) -> None:
        table = nn.Embedding(10, 4, sparse=comm.rank == 1)
        wrapped = DataParallel(table, comm)
        wrapped(torch.tensor([1, 2])).sum().backward()

    for error in errors_of(main):
        assert "sparse=False" in error


def test_ranks_with_other_models_are_told_so() -> None:
    for other in (nn.Linear(3, 5), nn.Linear(3, 4, bias=False), nn.Linear(3, 4).bfloat16()):

        def main(comm: Communicator, other: nn.Module = other) -> None:
            DataParallel(other if comm.rank == 2 else nn.Linear(3, 4), comm)

        assert all("UsageError: pycoll: the parameters of ranks [2] differ" in error for error in errors_of(main, 3))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda comm: GradientBuckets([], comm), pycoll.UsageError, "no parameter requires a gradient"),
        (lambda comm: DataParallel(nn.Linear(2, 2).double(), comm), pycoll.UnsupportedError, "float64"),
        (lambda comm: DataParallel(nn.Linear(2, 2, device="meta"), comm), pycoll.UnsupportedError, "on meta"),
        (
            lambda comm: DataParallel(nn.Linear(2, 2), comm, wire_dtype=torch.int16),
            pycoll.UsageError,
            "not as torch.int16",
        ),
        (lambda comm: DataParallel(nn.Linear(2, 2), comm, bucket_bytes=0), pycoll.UsageError, "must be positive"),
        (
            lambda comm: GradientBuckets([nn.Parameter(torch.ones(4, 4)[:, ::2])], comm),
            pycoll.UnsupportedError,
            "gaps or overlaps",
        ),
        (lambda comm: DataParallel(nn.LazyLinear(2), comm), pycoll.UnsupportedError, "lazy modules"),
        (lambda comm: copy.deepcopy(DataParallel(nn.Linear(2, 2), comm)), pycoll.UsageError, r"copy its \.module"),
        (lambda comm: pickle.dumps(DataParallel(nn.Linear(2, 2), comm)), pycoll.UsageError, r"save its state_dict"),
    ],
)
def test_refuses_what_it_cannot_do(make: Callable[[Communicator], Any], error: type, text: str) -> None:
    def main(comm: Communicator) -> None:
        with pytest.raises(error, match=text):
            make(comm)

    run_threads(main, 1)


def test_refuses_a_graph_of_gradients_and_a_converted_model() -> None:
    def graph(comm: Communicator) -> None:
        net = nn.Linear(2, 2)
        wrapped = DataParallel(net, comm)
        try:
            wrapped(torch.ones(1, 2)).square().sum().backward(create_graph=True)
        finally:
            net.zero_grad()  # its graph holds the parameters, which hold it

    def converted(comm: Communicator) -> None:
        net = nn.Linear(2, 2)
        wrapped = DataParallel(net, comm)
        net.bfloat16()
        wrapped(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()

    assert "use torch.autograd.grad" in errors_of(graph, 1)[0]
    assert "convert the model before" in errors_of(converted, 1)[0]


def test_memory_formats_and_strange_gradients() -> None:
    """Gradients that are expanded, transposed, or the same for two parameters."""

    def main(comm: Communicator) -> list[Tensor | None]:
        image = nn.Parameter(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last))
        turned, one, other = (
            nn.Parameter(torch.ones(7, 3).t()),
            nn.Parameter(torch.ones(6)),
            nn.Parameter(torch.ones(6)),
        )
        buckets = GradientBuckets([image, turned, one, other], comm)
        weights = torch.arange(120.0).view(2, 3, 4, 5) * (comm.rank + 1)
        ((image * weights).sum() + (turned * torch.arange(21.0).view(3, 7)).sum() + (one + other).sum()).backward()
        assert buckets.squares is not None
        return grads_of([image, turned, one, other])

    for image, turned, one, other in run_threads(main, 2):
        assert torch.equal(image, torch.arange(120.0).view(2, 3, 4, 5) * 1.5)
        assert torch.equal(turned, torch.arange(21.0).view(3, 7))
        assert torch.equal(one, torch.ones(6)) and torch.equal(other, torch.ones(6))


def test_the_end_of_a_model_ends_its_hooks() -> None:
    def main(comm: Communicator) -> None:
        net = nn.Linear(4, 4)
        wrapped = DataParallel(net, comm)
        wrapped(torch.ones(1, 4)).sum().backward()
        net.zero_grad()
        del wrapped
        gc.collect()
        net(torch.full((1, 4), float(comm.rank))).sum().backward()
        assert net.weight.grad is not None and net.weight.grad[0, 0] == comm.rank  # nobody averages any more

    run_threads(main, 2)


def test_a_norm_is_measured_anew_where_gradients_have_changed_unseen() -> None:
    """A scaler that unscales, and `.data`, leave versions as they are."""

    def main(comm: Communicator) -> None:
        net = nn.Linear(4, 4)
        wrapped = DataParallel(net, comm)
        optimizer = FusedAdam(net.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(wrapped(torch.ones(1, 4)).sum()).backward()
        scaler.unscale_(optimizer)
        assert optimizer.clip_grad_norm(1.0, scaler=scaler) == pytest.approx(20**0.5)
        assert optimizer.clip_grad_norm(1.0) == pytest.approx(20**0.5)
        for param in net.parameters():
            assert param.grad is not None
            param.grad.data.mul_(10)
        assert optimizer.clip_grad_norm(1.0) == pytest.approx(10 * 20**0.5)

    run_threads(main, 2)


def test_a_parameter_among_the_outputs_decides_nothing() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(1, 1, bias=False), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.scale

    def main(comm: Communicator) -> float:
        net = Returns()
        wrapped = DataParallel(net, comm)
        x = torch.full((1, 1), comm.rank + 1.0)
        with wrapped.no_sync():
            wrapped(x)
        out, scale = wrapped(x)
        (out * scale).sum().backward()
        assert net.layer.weight.grad is not None
        return net.layer.weight.grad.item()

    assert run_threads(main, 2) == [1.5] * 2


def test_outputs_in_a_dataclass() -> None:
    @dataclass
    class Out:
        loss: Tensor

    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Out:
            return Out(self.layer(x).sum())

    def main(comm: Communicator) -> float:
        net = Wraps()
        wrapped = DataParallel(net, comm)
        with wrapped.no_sync():
            loss = wrapped(torch.full((1, 1), comm.rank + 1.0)).loss
        loss.backward()
        assert net.layer.weight.grad is not None
        return net.layer.weight.grad.item()

    assert run_threads(main, 2) == [1.0, 2.0]


def test_ranks_must_divide_parameters_alike() -> None:
    def main(comm: Communicator) -> None:
        DataParallel(nn.Linear(300, 3), comm, bucket_bytes=800 + 200 * comm.rank)

    assert all("bucket_bytes" in error for error in errors_of(main))


def test_large_models_have_large_buckets() -> None:
    mib = 2**20
    assert [tuning.bucket_bytes(size * mib) // mib for size in (0, 1, 32, 48, 256, 5000)] == [4, 4, 4, 6, 32, 32]


@pytest.mark.parametrize(
    ("net", "why"), [(lambda: nn.Linear(3, 3).double(), "float64"), (lambda: nn.LazyLinear(3), "lazy modules")]
)
def test_a_rank_that_cannot_is_told_why_and_leaves_none_waiting(net: Callable[[], nn.Module], why: str) -> None:
    def main(comm: Communicator) -> None:
        DataParallel(net() if comm.rank else nn.Linear(3, 3), comm)

    first, second = errors_of(main)
    assert "the parameters of ranks [1] differ" in first and why in second


def test_autograd_grad_on_one_rank_alone_is_no_pass() -> None:
    def main(comm: Communicator) -> Tensor:
        net = nn.Linear(4, 1)
        wrapped = DataParallel(net, comm)
        if comm.rank == 0:
            x = torch.ones(1, 4, requires_grad=True)
            torch.autograd.grad(wrapped(x).sum(), x)
        wrapped(torch.full((1, 4), comm.rank + 1.0)).sum().backward()
        assert net.weight.grad is not None
        return net.weight.grad.clone()

    assert all(torch.equal(grad, torch.full((1, 4), 1.5)) for grad in run_threads(main, 2))


def test_defaults_of_dtype_and_empty_parameters_do_no_harm() -> None:
    def main(comm: Communicator) -> None:
        net = nn.ParameterList([nn.Parameter(torch.ones(0, dtype=torch.bfloat16)), nn.Parameter(torch.ones(3))])
        wrapped = DataParallel(net, comm, wire_dtype=torch.int8)
        optimizer = pycoll.ShardedAdam(net.parameters(), buckets=wrapped.buckets)
        net[1].float().sum().backward()
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
        assert optimizer.state_dict()["state"][1]["exp_avg"].dtype == torch.float32

    torch.set_default_dtype(torch.bfloat16)
    try:
        run_threads(main, 2)
    finally:
        torch.set_default_dtype(torch.float32)


def test_nothing_keeps_gradients_that_were_dropped_or_hooks_that_were_replaced() -> None:
    def main(comm: Communicator) -> None:
        net = nn.Linear(64, 64)
        wrapped = DataParallel(net, comm, wire_dtype=torch.bfloat16)
        seen: list[weakref.ref[Tensor]] = []
        net.weight.register_hook(lambda grad: seen.append(weakref.ref(grad)))
        wrapped(torch.ones(1, 64)).sum().backward()
        wrapped.zero_grad()
        gc.collect()
        assert seen and seen[0]() is None
        for _ in range(3):
            wrapped = DataParallel(net, comm)
        gc.collect()
        hooks = net.weight._post_accumulate_grad_hooks  # type: ignore[attr-defined]
        assert len(hooks) == 1

    run_threads(main, 2)
