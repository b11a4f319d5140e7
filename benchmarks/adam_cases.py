"""Who makes a step of AdamW: pycoll.FusedAdam, torch's optimizers, and the memory's ceiling, each in several cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pycoll import _C, FusedAdam

from .report import CEILING

TORCH = "torch fused"
STEP, SEQUENCE, BF16 = "step", "unscale, clip, step", "the same, bf16"
STEP_BYTES = 28
"""Of an fp32 element: read parameter, gradient and two moments, and write all but the gradient."""


@dataclass(frozen=True)
class Contender:
    """`prepare` makes the gradients anew, outside the time; `run` is what is timed."""

    who: str
    prepare: Callable[[], object]
    run: Callable[[], object]


class Model:
    """Parameters with gradients, and what the gradients are made from."""

    def __init__(self, parameters: int, tensors: int, device: str, dtype: torch.dtype) -> None:
        sizes = [parameters // tensors] * tensors
        make = torch.Generator(device).manual_seed(0)
        self.params = [nn.Parameter(torch.randn(n, generator=make, device=device).to(dtype)) for n in sizes]
        self.fresh = [torch.randn(n, generator=make, device=device).to(dtype) for n in sizes]
        for param in self.params:
            param.grad = torch.empty_like(param)
        self.make_gradients()
        self.scaler = torch.amp.GradScaler(device, init_scale=2.0, growth_interval=10**6)
        self.scaler.scale(torch.ones((), device=device))

    @property
    def grads(self) -> list[Tensor]:
        return [param.grad for param in self.params if param.grad is not None]

    def make_gradients(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.grads, self.fresh)


def steps(parameters: int, tensors: int, device: str) -> list[Contender]:
    """A step alone, fp32."""
    model = Model(parameters, tensors, device, torch.float32)
    made = {
        "pycoll": FusedAdam(model.params),
        TORCH: torch.optim.AdamW(model.params, fused=True),
        "torch foreach": torch.optim.AdamW(model.params, foreach=True),
    }
    found = [Contender(who, model.make_gradients, optimizer.step) for who, optimizer in made.items()]
    if device == "cpu":
        a, b, c = ([_beginning_at(1040 * k, len(param)) for param in model.params] for k in (1, 2, 3))
        return [*found, Contender(CEILING, model.make_gradients, lambda: _C.ceiling_adam(a, model.grads, b, c))]
    size = STEP_BYTES // 2 * parameters
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return [*found, Contender(CEILING, model.make_gradients, lambda: target.copy_(source))]


def _beginning_at(first: int, size: int) -> Tensor:
    """Zeros, so many elements into their memory: large arrays that all begin alike get into each other's way."""
    return torch.zeros(first + size)[first:]


def sequences(parameters: int, tensors: int, device: str) -> list[Contender]:
    """All that a trainer with a GradScaler does after the backward pass, fp32."""
    model = Model(parameters, tensors, device, torch.float32)
    ours, theirs = FusedAdam(model.params), torch.optim.AdamW(model.params, fused=True)

    def run_theirs() -> None:
        model.scaler.unscale_(theirs)
        nn.utils.clip_grad_norm_(model.params, 1.0)
        model.scaler.step(theirs)
        model.scaler.update()

    return [
        Contender("pycoll", model.make_gradients, lambda: _fused_sequence(model, ours)),
        Contender(TORCH, model.make_gradients, run_theirs),
    ]


def mixed_sequences(parameters: int, tensors: int, device: str) -> list[Contender]:
    """The same with bf16 parameters and fp32 masters, which torch's user keeps."""
    model = Model(parameters, tensors, device, torch.bfloat16)
    ours = FusedAdam(model.params)
    masters = [nn.Parameter(param.detach().float()) for param in model.params]
    for master in masters:
        master.grad = torch.zeros_like(master)
    theirs = torch.optim.AdamW(masters, fused=True)

    def run_theirs() -> None:
        with torch.no_grad():
            torch._foreach_copy_([master.grad for master in masters if master.grad is not None], model.grads)
            model.scaler.unscale_(theirs)
            nn.utils.clip_grad_norm_(masters, 1.0)
            model.scaler.step(theirs)
            torch._foreach_copy_([*model.params], [*masters])
        model.scaler.update()

    return [
        Contender("pycoll", model.make_gradients, lambda: _fused_sequence(model, ours)),
        Contender(TORCH, model.make_gradients, run_theirs),
    ]


def _fused_sequence(model: Model, optimizer: FusedAdam) -> None:
    optimizer.clip_grad_norm(1.0, scaler=model.scaler)
    model.scaler.step(optimizer)
    model.scaler.update()


CASES: dict[str, Callable[[int, int, str], list[Contender]]] = {
    STEP: steps,
    SEQUENCE: sequences,
    BF16: mixed_sequences,
}
"""What is timed, for elements in all, in so many tensors, on a device."""
