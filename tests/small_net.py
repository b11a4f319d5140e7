"""A small model, its losses, and what tests of training compare."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

torch.manual_seed(0)
_NET = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4), nn.LayerNorm(4))


def make_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same on every rank, also where ranks are threads: 102 weights."""
    return copy.deepcopy(_NET).to(dtype)


def loss_of(net: nn.Module, rank: int, step: int) -> Tensor:
    """Of a batch of its own for each rank and step."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(4, 5, generator=generator)
    dtype = next(net.parameters()).dtype
    return (net(x.to(dtype)) - torch.sin(x[:, :4])).square().mean()


def weights(net: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in net.parameters()]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Bit for bit."""
    return len(one) == len(other) and all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Of the two elements that differ most."""
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(one, other, strict=True))
