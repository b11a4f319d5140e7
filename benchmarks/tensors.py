"""What values.py does, for torch tensors of 32 and 16 bits on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import values

_CHUNK = values.PERIOD * 2048  # elements; what is compared at a time is held in float64 too


def dtype_name(x: Tensor) -> str:
    """Such as "float32"."""
    return str(x.dtype).removeprefix("torch.")


def load_pattern(x: Tensor, rank: int) -> None:
    """Fills `x`, of one dimension, with the period of `rank`, again and again."""
    raw = torch.from_numpy(values.pattern(rank, dtype_name(x)))
    period = raw.view(x.dtype).to(x.device)
    chunk = period.repeat(min(_CHUNK, x.numel() + values.PERIOD - 1) // values.PERIOD)
    for part in x.split(chunk.numel()):
        part.copy_(chunk[: part.numel()])


def sum_error(x: Tensor, world_size: int) -> float:
    """See values.sum_error."""
    exact, scale = (torch.from_numpy(a).to(x.device) for a in values.expected(world_size, dtype_name(x)))
    worst = 0.0
    for chunk in x.split(_CHUNK):
        rest = -chunk.numel() % values.PERIOD  # completed by right values, so that all periods are compared at once
        got = torch.cat([chunk.double(), exact[values.PERIOD - rest :]]).view(-1, values.PERIOD)
        error = float(((got - exact).abs() / scale).max())
        worst = max(worst, error if error < float("inf") else float("inf"))  # of a NaN nothing is true
    return worst
