"""The state of Adam for a parameter: what it is, the memory it lies in, and how a checkpoint brings it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOAT_STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param")
"""State of an element, which is fp32 whatever its parameter is."""


class Kept:
    """A tensor of a state_dict that torch is not to cast."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def keep_precision(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state_dict with its tensors hidden from torch."""
    hidden = {
        key: {name: Kept(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        if isinstance(values, dict)
        else values
        for key, values in state_dict["state"].items()
    }
    return {**state_dict, "state": hidden}


def fitting(name: str, value: Tensor, param: Tensor) -> Tensor:
    """A copy of a state as its parameter's step wants it: fp32, on its device, in its strides."""
    if name not in FLOAT_STATE:
        return value.detach().to(param.device, torch.float32 if name == "step" else None, copy=True)
    return empty_state(name, param).copy_(value.detach())


def empty_state(name: str, param: Tensor) -> Tensor:
    """Memory for a parameter's state, one of FLOAT_STATE: fp32, in its shape and strides, on its device.

    Large arrays that begin at the same place of a page, or a few lines of the cache apart, get into each other's way in
    a CPU's caches, where a step reads them side by side; so each state begins at a place of its own.
    """
    page, apart = 1024, 208  # floats: `apart` is a fifth of a page, in whole lines of the cache
    if param.device.type != "cpu" or param.numel() < 16 * page:
        return torch.empty_like(param, dtype=torch.float32, memory_format=torch.preserve_format)
    memory = torch.empty(param.numel() + page, dtype=torch.float32, device=param.device)
    before = (apart * (1 + FLOAT_STATE.index(name)) - memory.data_ptr() // 4) % page
    strides = torch.empty_like(param, device="meta", memory_format=torch.preserve_format).stride()
    return memory.as_strided(param.size(), strides, before)
