"""pycoll.FusedAdam on a GPU: the bits of the CPU's step, norms, GradScaler's inputs, and CUDA graphs."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycoll
from pycoll import FusedAdam

pytestmark = pytest.mark.cuda
SHAPES = ((), (0,), (1,), (33, 7), (5000,), (40_001,))


def make_params(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The same values on the CPU and on the GPU."""
    values = [torch.randn(shape).to(dtype) for shape in SHAPES]
    return [nn.Parameter(v.clone()) for v in values], [nn.Parameter(v.cuda()) for v in values]


def give_gradients(here: list[nn.Parameter], there: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for mine, other in zip(here, there, strict=True):
        grad = (torch.randn(mine.shape, generator=generator) * scale).to(mine.dtype)
        mine.grad, other.grad = grad, grad.cuda()


def assert_same(here: list[nn.Parameter], there: list[nn.Parameter], mine: FusedAdam, other: FusedAdam) -> None:
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.detach(), b.detach().cpu())
        assert mine.state[a].keys() == other.state[b].keys()
        for name, value in mine.state[a].items():
            assert other.state[b][name].is_cuda
            assert torch.equal(value, other.state[b][name].cpu()), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_the_same_bits_as_on_a_cpu(dtype: torch.dtype) -> None:
    for amsgrad, decoupled, maximize, low in itertools.product((False, True), repeat=4):
        here, there = make_params(dtype)
        rules: dict[str, Any] = {"lr": 1e-2, "amsgrad": amsgrad, "maximize": maximize}
        rules |= {"decoupled_weight_decay": decoupled, "master_weights": not low, "stochastic_rounding": low}
        mine, other = FusedAdam(here, **rules), FusedAdam(there, **rules)
        for step in range(3):
            give_gradients(here, there, step)
            mine.step()
            other.step()
        assert_same(here, there, mine, other)


@pytest.mark.parametrize("offset", (1, 2, 3))
def test_parameters_that_are_not_aligned(offset: int) -> None:
    values = torch.randn(5000)
    here = nn.Parameter(values[offset:].clone())
    there = nn.Parameter(values.cuda()[offset:])
    mine, other = FusedAdam([here]), FusedAdam([there])
    give_gradients([here], [there], 0)
    mine.step()
    other.step()
    assert torch.equal(here.detach(), there.detach().cpu())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_clipping(dtype: torch.dtype) -> None:
    here, there = make_params(dtype)
    mine, other = FusedAdam(here), FusedAdam(there)
    for step in range(2):
        give_gradients(here, there, step)
        norm, there_norm = mine.clip_grad_norm(0.5), other.clip_grad_norm(0.5)
        assert there_norm.is_cuda and there_norm.shape == ()
        torch.testing.assert_close(norm, there_norm.cpu(), rtol=1e-6, atol=0)
        assert there_norm.item() == other.clip_grad_norm(0.5).item(), "the same every time"
        mine.step()
        other.step()
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(mine.state[a]["exp_avg"], other.state[b]["exp_avg"].cpu(), rtol=1e-5, atol=1e-9)
    there[4].grad = torch.full_like(there[4], math.inf)
    assert other.clip_grad_norm(0.5).item() == math.inf


def test_scale_and_overflow_are_read_on_the_device() -> None:
    """What GradScaler leaves on an optimizer."""
    here, there = make_params()
    mine, other = FusedAdam(here), FusedAdam(there)
    for step, overflow in enumerate((0.0, 1.0, 0.0)):
        give_gradients(here, there, step, 64.0)
        mine.grad_scale, mine.found_inf = torch.tensor(64.0), torch.tensor(overflow)
        other.grad_scale, other.found_inf = torch.tensor(64.0).cuda(), torch.tensor(overflow).cuda()
        before = [p.detach().cpu() for p in there]
        mine.step()
        other.step()
        if overflow:
            assert all(torch.equal(p.detach().cpu(), old) for p, old in zip(there, before, strict=True))
    assert_same(here, there, mine, other)
    assert other.state[there[4]]["step"].item() == 2


def test_rate_as_a_tensor_on_the_device() -> None:
    here, there = make_params()
    mine = FusedAdam(here, lr=torch.tensor(1e-2))
    other = FusedAdam(there, lr=torch.tensor(1e-2).cuda())
    give_gradients(here, there, 0)
    mine.step()
    other.step()
    assert_same(here, there, mine, other)


def test_graph_is_replayed() -> None:
    here, there = make_params()
    mine, other = FusedAdam(here, lr=1e-2), FusedAdam(there, lr=1e-2, capturable=True)
    give_gradients(here, there, 0)
    mine.clip_grad_norm(math.inf)
    other.clip_grad_norm(math.inf)
    mine.step()
    other.step()  # makes the state
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = other.clip_grad_norm(math.inf)
        other.step()
    for step in range(1, 5):
        fixed = [p.grad for p in there]
        give_gradients(here, there, step)
        for p, kept in zip(there, fixed, strict=True):
            assert kept is not None and p.grad is not None
            kept.copy_(p.grad)
            p.grad = kept
        mine_norm = mine.clip_grad_norm(math.inf)
        mine.step()
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(norm.cpu(), mine_norm, rtol=1e-6, atol=0)
    assert_same(here, there, mine, other)


def test_thousands_of_tensors() -> None:
    values = torch.randn(3000, 5)
    here, there = [nn.Parameter(v.clone()) for v in values], [nn.Parameter(v) for v in values.cuda()]
    mine, other = FusedAdam(here), FusedAdam(there)
    give_gradients(here, there, 0)
    mine.step()
    other.step()
    assert torch.equal(torch.stack([p.detach() for p in here]), torch.stack([p.detach().cpu() for p in there]))


def test_state_moves_between_devices() -> None:
    here, there = make_params(torch.bfloat16)
    mine, other = FusedAdam(here), FusedAdam(there)
    give_gradients(here, there, 0)
    mine.step()
    other.load_state_dict(mine.state_dict())
    for a, b in zip(here, there, strict=True):
        b.data.copy_(a.data)
    give_gradients(here, there, 1)
    mine.step()
    other.step()
    assert_same(here, there, mine, other)


def test_devices_that_are_mixed() -> None:
    here, there = make_params()
    give_gradients(here, there, 0)
    both = FusedAdam([*here, *there])
    both.step()
    assert all(torch.equal(a.detach(), b.detach().cpu()) for a, b in zip(here, there, strict=True))
    there[4].grad = None
    state: dict[str, Tensor] = both.state[there[5]]
    state["exp_avg"] = state["exp_avg"].cpu()
    with pytest.raises(pycoll.UsageError, match="exp_avg"):
        both.step()
