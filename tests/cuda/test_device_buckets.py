"""GradientBuckets, DataParallel and ShardedAdam on GPUs: packing by one launch, beside the CPU's, and in graphs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from places import OWN, SHARED, needs
from test_device_communicator import SMALL, seat
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import pycoll
from pycoll import _C, Communicator, DataParallel, FusedAdam, GradientBuckets, ShardedAdam
from pycoll.buckets import WIRES, Bucket
from pycoll.testing import Processes, Rank, run_threads

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(240)]
SHAPES = ((), (0,), (1,), (255,), (33, 7), (3000,), (40_001,))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradients(rank: int, step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def firsts_of(grads: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where they lie in a bucket, and its elements."""
    firsts, end = [], 0
    for grad in grads:
        firsts.append(end)
        end += math.ceil(grad.numel() / 256) * 256
    return firsts, math.ceil(end / 1024) * 1024


def wire_memory(wire: torch.dtype, size: int) -> Tensor:
    return torch.zeros(size // 1024 * 1040, dtype=torch.uint8) if wire == torch.int8 else torch.zeros(size, dtype=wire)


@pytest.mark.parametrize("wire", WIRES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_has_the_bits_of_the_cpu(dtype: torch.dtype, wire: torch.dtype) -> None:
    grads: list[Tensor | None] = [*gradients(0, 0, dtype)]
    params = [grad for grad in grads if grad is not None]
    grads[3] = None
    there = [None if grad is None else grad.cuda() for grad in grads]
    assert there[5] is not None
    there[5] = torch.cat([torch.zeros(1, dtype=dtype), params[5]]).cuda()[1:]  # not aligned
    firsts, size = firsts_of(params)
    name = str(wire).removeprefix("torch.")
    here_wire, there_wire = wire_memory(wire, size), wire_memory(wire, size).cuda()
    residual = torch.zeros(size) if wire == torch.int8 else None
    there_residual = None if residual is None else residual.cuda()
    found_inf = torch.ones((), device="cuda")
    for _ in range(2):
        _C.pack(params, grads, firsts, name, here_wire, residual)
        _C.pack(params, there, firsts, name, there_wire, there_residual, None, found_inf)
        assert torch.equal(here_wire.view(torch.uint8), there_wire.cpu().view(torch.uint8))
        assert found_inf.item() == 0.0
        if residual is not None and there_residual is not None:
            assert residual.any() and torch.equal(residual, there_residual.cpu())
    if wire != torch.int8:
        for first, grad in zip(firsts, grads, strict=True):
            if grad is not None:
                assert torch.equal(there_wire.cpu()[first : first + grad.numel()], grad.flatten().to(wire))


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_factor_and_overflow(wire: torch.dtype) -> None:
    grads = gradients(0, 0)
    firsts, size = firsts_of(grads)
    name = str(wire).removeprefix("torch.")
    here, there = wire_memory(wire, size), wire_memory(wire, size).cuda()
    _C.pack(grads, [grad * 0.3 for grad in grads], firsts, name, here, None)
    factor, found_inf = torch.tensor(0.3).cuda(), torch.zeros(1, device="cuda")
    _C.pack(grads, [grad.cuda() for grad in grads], firsts, name, there, None, factor, found_inf)
    assert torch.equal(here.view(torch.uint8), there.cpu().view(torch.uint8)) and found_inf.item() == 0.0
    grads[6][40_000] = -math.inf
    _C.pack(grads, [grad.cuda() for grad in grads], firsts, name, there, None, factor, found_inf)
    assert found_inf.item() == 1.0
    _C.pack(grads, [None] * len(grads), firsts, name, there, None, factor, found_inf)
    assert found_inf.item() == 0.0, "what the launch before has left is cleared"
    with pytest.raises(pycoll.UnsupportedError, match="factor"):
        _C.pack(grads, [*grads], firsts, name, here, None, torch.ones(()))


def pack_thousands() -> None:
    grads = [*torch.randn(3000, 5).cuda().unbind()]
    firsts, size = firsts_of(grads)
    wire = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        _C.pack(grads, [*grads], firsts, "bfloat16", wire, None)
        torch.cuda.synchronize()
    expected = torch.zeros(size, dtype=torch.bfloat16)
    for first, grad in zip(firsts, grads, strict=True):
        expected[first : first + 5] = grad.cpu().to(torch.bfloat16)
    assert torch.equal(wire.cpu(), expected)
    print("kernels:", [event.name for event in seen.events() if "pack_kernel" in event.name])


def test_thousands_of_tensors_are_one_launch() -> None:
    """As the profiler sees it, or a pretended GPU, which tells of launches."""
    script = "from test_device_buckets import pack_thousands as pack; pack()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "FAKE_CUDA_VERBOSE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = [
        line for line in (done.stdout + done.stderr).splitlines() if "fake_cuda: launch" in line or "kernels:" in line
    ]
    assert "".join(told).count("pack_kernel") == 1, told


def test_graph_is_replayed() -> None:
    grads = [grad.cuda() for grad in gradients(0, 0)]
    firsts, size = firsts_of(grads)
    wire, found_inf = torch.zeros(size, dtype=torch.float16, device="cuda"), torch.zeros((), device="cuda")
    _C.pack(grads, [*grads], firsts, "float16", wire, None, None, found_inf)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _C.pack(grads, [*grads], firsts, "float16", wire, None, None, found_inf)
    for step in range(1, 4):
        given = gradients(0, step)
        if step == 2:
            given[5][17] = 1e6  # too much for a float16
        for grad, value in zip(grads, given, strict=True):
            grad.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        expected = torch.zeros(size, dtype=torch.float16)
        for first, grad in zip(firsts, given, strict=True):
            expected[first : first + grad.numel()] = grad.flatten().to(torch.float16)
        assert torch.equal(wire.cpu(), expected)
        assert found_inf.item() == (step == 2)


def make_params(device: str, dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype).to(device)) for shape in SHAPES]


class _Given(torch.autograd.Function):
    """A loss of zero, whose gradients are what it is given: pretended GPUs know no arithmetic."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, count: int, *both: Tensor) -> Tensor:
        ctx.grads = both[count:]  # type: ignore[attr-defined]
        return torch.zeros((), device=both[0].device)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.grads  # type: ignore[attr-defined]
        return (None, *(grad.clone() for grad in grads), *(None for _ in grads))


class Model(nn.Module):
    """Parameters that get the gradients it is called with."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.all = nn.ParameterList(make_params(device, dtype))

    def forward(self, grads: Sequence[Tensor]) -> Tensor:
        some = len(grads)
        loss: Tensor = _Given.apply(some, *[*self.all][:some], *(grad.to(self.all[0].device) for grad in grads))
        return loss


def trained(
    comm: Communicator, device: str, wire: torch.dtype, dtype: torch.dtype, sharded: bool, clips: bool
) -> list[Tensor]:
    """Parameters after some steps, on the CPU; of those a rank may lack a gradient."""
    model = Model(device, dtype)
    wrapped = DataParallel(model, comm, wire_dtype=wire, bucket_bytes=20_000)
    assert len(wrapped.buckets.buckets) > 1
    rounds = dtype != torch.float32  # by the index of an element, which shards must know
    optimizer = (
        ShardedAdam(model.parameters(), lr=1e-2, stochastic_rounding=rounds, buckets=wrapped.buckets)
        if sharded
        else FusedAdam(model.parameters(), lr=1e-2, stochastic_rounding=rounds)
    )
    for step in range(4):
        grads = gradients(comm.rank, step, dtype)
        if step == 2:
            grads = grads[: 6 - comm.rank % 2]  # of the last one no rank has a gradient
        if step == 3 and dtype == torch.float32:  # of other sums pretended GPUs know nothing
            with wrapped.no_sync():
                wrapped(grads).backward()
        wrapped(grads).backward()
        if step == 2 and not sharded:
            assert model.all[6].grad is None and model.all[5].grad is not None
        if clips:
            optimizer.clip_grad_norm(0.5)
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()["state"]
    assert [state[place]["step"].item() for place in sorted(state)] == [4.0] * 6 + [3.0]
    return [param.detach().cpu().clone() for param in model.parameters()]


def _beside_the_cpu(rank: Rank, where: str) -> list[bytes]:
    with seat(rank, where) as comm:
        results = []
        cases = [(wire, torch.float32) for wire in WIRES] + [(torch.float32, torch.bfloat16)]
        for number, (wire, dtype) in enumerate(cases):
            clips = number % 2 == 0
            fused, sharded = (trained(comm, "cuda", wire, dtype, way, clips) for way in (False, True))
            exact = wire in (torch.float32, torch.int8) or not clips
            for a, b in zip(fused, sharded, strict=True):
                if exact:
                    assert torch.equal(a, b), (wire, dtype)
                else:
                    torch.testing.assert_close(a, b)
            here = trained(comm, "cpu", wire, dtype, False, clips)
            for a, b in zip(fused, here, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)
            results += [param.flatten().view(torch.uint8).numpy().tobytes() for param in sharded]
        return results


@pytest.mark.parametrize("where", (SHARED, OWN))
@pytest.mark.parametrize("world_size", (2, 3))
def test_training_beside_the_cpu(where: str, world_size: int) -> None:
    needs(where, world_size)
    with Processes(_beside_the_cpu, world_size, where) as ranks:
        results = ranks.results(200)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_a_bucket_of_threads_that_share_a_gpu(wire: torch.dtype) -> None:
    """Its calls alone: autograd has one thread for a GPU, in which the ranks would wait for one another."""

    def rank(comm: Communicator) -> None:
        results = []
        for device in ("cpu", "cuda"):
            params = make_params(device, torch.float32)
            bucket = GradientBuckets(params, comm, wire_dtype=wire).buckets[0]
            assert type(bucket) is Bucket or device == "cuda"
            for param, grad in zip(params, gradients(comm.rank, 0), strict=True):
                param.grad = grad.to(device)
            bucket.pack()
            squares = torch.zeros(2, dtype=torch.float64, device=device)
            bucket.measure(squares[:1], 1, async_op=True).wait()
            bucket.reduce(squares[1:], 2, async_op=False)
            results.append(([view.cpu().clone() for view in bucket.gradient_views], squares.cpu()))
        (here, here_squares), (there, there_squares) = results
        exact = wire in (torch.float32, torch.int8)
        for a, b in zip(here, there, strict=True):
            torch.testing.assert_close(a, b, rtol=0.0 if exact else 2**-8, atol=0.0 if exact else 1e-6)
        torch.testing.assert_close(here_squares, there_squares, rtol=1e-12 if exact else 1e-2, atol=0)
        assert math.isclose(there_squares[0], there_squares[1], rel_tol=1e-12)

    run_threads(rank, 3, cuda_config=SMALL)


def _overflows(rank: Rank) -> None:
    with seat(rank, SHARED) as comm:
        params = make_params("cuda", torch.float32)
        optimizer = ShardedAdam(params, communicator=comm)
        before = [param.detach().cpu().clone() for param in params]
        for step, bad in enumerate((True, False)):
            grads = gradients(rank.rank, step)
            if bad and rank.rank == 1:
                grads[5][3] = math.nan
            _Given.apply(len(params), *params, *(grad.cuda() for grad in grads)).backward()
            assert math.isnan(optimizer.clip_grad_norm(1.0).item()) == bad
            optimizer.found_inf, optimizer._unscales = torch.tensor(float(bad)).cuda(), True  # as a GradScaler does
            optimizer.step()
            del optimizer.found_inf
            optimizer.zero_grad()
            same = [torch.equal(param.detach().cpu(), old) for param, old in zip(params, before, strict=True)]
            assert all(same) if bad else not any(same[2:])


def test_steps_that_are_skipped() -> None:
    with Processes(_overflows, 2) as ranks:
        ranks.results(120)


def test_one_device() -> None:
    def rank(comm: Communicator) -> None:
        with pytest.raises(pycoll.UnsupportedError, match="one device"):
            GradientBuckets([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3).cuda())], comm)

    run_threads(rank, 1)
