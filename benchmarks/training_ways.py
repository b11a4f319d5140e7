"""Who takes part in `pycoll bench training --device cuda`: GPT-2 with its loss, and what trains it.

A step is forward, loss, backward, clipping, AdamW and the end of the gradients; its batch is on the GPU before it
begins. The model's code and shapes are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pycoll
from pycoll.models import GPT, GPTConfig

NANO = "nanoGPT: fp32, bf16 autocast"
OURS = "FusedAdam: bf16, fp32 masters"
SHARDED = "ShardedAdam: bf16, fp32 masters"
SAME = "FusedAdam: fp32, bf16 autocast"
STEPS = 8
"""Before anything is timed, from the same weights on the same batch."""
MAX_NORM = 1.0


@dataclass(frozen=True)
class Setting:
    """What is trained, and where."""

    device: torch.device
    processor: str
    """Its name."""
    model: GPTConfig
    batch: int
    compiled: bool = True

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.model.context


class WithLoss(nn.Module):
    """A model that returns its loss, as nanoGPT's does."""

    def __init__(self, model: GPT, autocast: bool) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(B, T), (B, T) -> ()."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            scores = self.model(tokens)
        return F.cross_entropy(scores.flatten(0, 1).float(), targets.flatten())


class Contender:
    """A model with its optimizer; `step` learns one batch and returns its loss, which nobody has waited for."""

    def __init__(self, setting: Setting, way: Way) -> None:
        torch.manual_seed(1)
        model = GPT(setting.model).to(setting.device, way.weights)
        drawn = torch.randint(setting.model.vocab_size, (setting.batch, setting.model.context + 1))
        drawn = drawn.to(setting.device)
        self._batch = drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
        module = WithLoss(model, autocast=way.weights == torch.float32)
        if setting.compiled:
            module.compile()
        self._loss, self._clip, self._optimizer = way.train(module)
        self.losses = [float(self.step()) for _ in range(STEPS)]

    def step(self) -> Tensor:
        loss: Tensor = self._loss(*self._batch)
        loss.backward()
        self._clip()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()


Trained = tuple[nn.Module, Callable[[], object], torch.optim.Optimizer]


@dataclass(frozen=True)
class Way:
    """How a contender trains."""

    weights: torch.dtype
    train: Callable[[nn.Module], Trained]
    """A module that returns a loss -> what to call for it, what clips, and the optimizer."""


def settings(module: nn.Module) -> dict[str, Any]:
    """Of any AdamW: nanoGPT's for GPT-2; matrices decay."""
    groups = [
        {"params": [p for p in module.parameters() if (p.dim() >= 2) == decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]
    return {"params": groups, "lr": 6e-4, "betas": (0.9, 0.95)}


def by_torch(module: nn.Module) -> Trained:
    """clip_grad_norm_ and torch's fused AdamW."""
    optimizer = torch.optim.AdamW(**settings(module), fused=True)
    return module, lambda: nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM), optimizer


def by_fused(module: nn.Module) -> Trained:
    """pycoll.FusedAdam alone."""
    optimizer = pycoll.FusedAdam(**settings(module))
    return module, lambda: optimizer.clip_grad_norm(MAX_NORM), optimizer


def by_sharded(module: nn.Module) -> Trained:
    """What `pycoll train` does on however many ranks: here one."""
    parallel = pycoll.DataParallel(module)
    optimizer = pycoll.ShardedAdam(**settings(module), buckets=parallel.buckets)
    return parallel, lambda: optimizer.clip_grad_norm(MAX_NORM), optimizer


WAYS: Mapping[str, Way] = {
    NANO: Way(torch.float32, by_torch),
    OURS: Way(torch.bfloat16, by_fused),
    SHARDED: Way(torch.bfloat16, by_sharded),
    SAME: Way(torch.float32, by_fused),
}
"""The rival first; the last ones are left out first where time is short."""
