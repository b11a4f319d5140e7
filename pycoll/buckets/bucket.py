"""A bucket: where gradients lie side by side, how they travel, and the calls that average and measure them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pycoll import _C
from pycoll.communicator import Communicator
from pycoll.errors import UnsupportedError, UsageError

UNIT = 1024
"""Elements that travel together: shards are whole units."""
ALIGNMENT = 256
"""Parameters begin at multiples of so many elements: those that share a scale in 8 bits."""
INT8_UNIT_BYTES = UNIT + 4 * (UNIT // ALIGNMENT)
"""A unit in 8 bits, with its scales."""
WIRES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""How gradients may travel."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Of parameters."""


class Waitable(Protocol):
    """A call that may be under way."""

    def wait(self) -> Any:
        """Until its result is there; on a GPU, for what the current stream does next."""


class Bucket:
    """Gradients of some parameters side by side: `size` elements, equal shards for all ranks.

    Attributes:
        params: in the order in which they lie, all on `device`.
        firsts: where each begins, in elements.
        size: elements, a multiple of 1024 * world size; what is not a parameter's is zero.
        own: this rank's shard.
        wire_name: the format in which gradients travel.
        wire: what peers read, in the heap; shape (size,), or bytes for int8.
        residual: what rounding to int8 took from the gradients so far, shape (size,), fp32; else None.
        streams: on the CPU, what is written without having been read goes past the caches: a whole step, of which this
            is a part, does not fit into them.
    """

    def __init__(self, params: Sequence[Tensor], communicator: Communicator, wire_dtype: torch.dtype) -> None:
        self.params, self.communicator, self.device = list(params), communicator, params[0].device
        self.wire_name = str(wire_dtype).removeprefix("torch.")
        self.firsts, self.size = places(params, communicator.world_size)
        shard = self.size // communicator.world_size
        self.own = slice(communicator.rank * shard, (communicator.rank + 1) * shard)
        in_bytes = wire_bytes(self.size, wire_dtype)
        shape, dtype = (in_bytes, torch.uint8) if wire_dtype == torch.int8 else (self.size, wire_dtype)
        self.wire = communicator.empty(shape, dtype, self.device).zero_()
        self.residual = (
            torch.zeros(self.size, dtype=torch.float32, device=self.device) if wire_dtype == torch.int8 else None
        )
        self.streams = _C.is_large_step(self.size)
        self._gradients = self.wire if wire_dtype == torch.float32 else None
        self._gradient_views: list[Tensor] = []
        self._shapes = [(param.shape, param.stride(), param.dtype) for param in params]

    @property
    def gradients(self) -> Tensor:
        """Where gradients are added in fp32, and where their average goes; shape (size,). The wire, if that is fp32."""
        if self._gradients is None:
            self._gradients = self.communicator.empty(self.size, device=self.device).zero_()
        return self._gradients

    @property
    def gradient_views(self) -> list[Tensor]:
        """`gradients` of each parameter, in its shape and strides."""
        if not self._gradient_views:
            self._gradient_views = self.views(self.gradients)
        return self._gradient_views

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of `flat`, shape (size,), that are the parameters', in their shapes and strides.

        Each counts as memory of its own: its version is its own, and saving it does not save all of `flat`.
        """
        memory = flat.view(torch.uint8).numpy()
        return [
            torch.frombuffer(memory, dtype=flat.dtype, count=param.numel(), offset=first * flat.itemsize).as_strided(
                param.shape, param.stride()
            )
            if param.numel()
            else flat.new_empty(param.shape)
            for param, first in zip(self.params, self.firsts, strict=True)
        ]

    def pack(self) -> list[Tensor | None]:
        """All gradients into the wire, where they do not lie there already; none counts as zeros.

        Returns:
            The gradients, which the parameters no longer have: what comes now is another one.
        """
        grads = [_gradient(param) for param in self.params]
        for param, about in zip(self.params, self._shapes, strict=True):
            if (param.shape, param.stride(), param.dtype) != about:
                raise UsageError(
                    f"pycoll: a parameter of {about[2]} and shape {tuple(about[0])} has been converted since its "
                    "buckets were made: convert the model before"
                )
        travels = [place for place, grad in enumerate(grads) if grad is None or not self._is_in_wire(place, grad)]
        _C.pack(
            [self.params[place] for place in travels],
            [grads[place] for place in travels],
            [self.firsts[place] for place in travels],
            self.wire_name,
            self.wire,
            self.residual,
            streams=self.streams,
        )
        for param in self.params:
            param.grad = None
        return [None if grad is None else self._kept(place, grad) for place, grad in enumerate(grads)]

    def add_up(self, place: int) -> None:
        """A gradient that is not to travel yet moves into `gradients`, where autograd adds the next ones, in fp32."""
        grad = _gradient(self.params[place])
        if grad is not None and not is_view(grad, self.gradient_views[place]):
            self.gradient_views[place].copy_(grad)
            self.params[place].grad = self.gradient_views[place]

    def reduce(self, squares: Tensor, tag: int, *, async_op: bool) -> Waitable:
        """The average of all ranks' wires into their `gradients`; the sum of squares of this rank's shard of it.

        Args:
            squares: where that sum goes, shape (1,), fp64.
            tag: must be the same on all ranks.
            async_op: return at once; `wait()` for the result.
        """
        return self._reduce(self.gradients, squares, tag, async_op)

    def measure(self, squares: Tensor, tag: int, *, async_op: bool) -> Waitable:
        """As `reduce`, but the average itself goes nowhere."""
        return self._reduce(None, squares, tag, async_op)

    def update(
        self,
        tag: int,
        params: Tensor,
        state: Mapping[str, Tensor],
        segments: Tensor,
        steps: Tensor,
        used: Tensor,
        groups: Sequence[Mapping[str, Any]],
        *,
        clip: Tensor | None,
        found_inf: Tensor | None,
        averaged: bool,
    ) -> None:
        """A step of Adam by the average of all ranks' wires, to the parameters of all ranks.

        Args:
            tag: must be the same on all ranks.
            params: in the heap, shape (size,).
            state: fp32, of this rank's shard: those of "master_param", "exp_avg" and so on that a group uses.
            segments: of each parameter its first element, elements, first element among all, and group; int64, on the
                CPU, shape (params, 4).
            steps: made so far, fp32, on the bucket's device, shape (params,).
            used: whether to update each parameter, bool, on the CPU, shape (params,).
            groups: the optimizer's param_groups.
            clip: what gradients are multiplied by, one float, or None.
            found_inf: on a GPU: not 0: nothing is to happen.
            averaged: whether the last `measure` or `reduce` has seen the same wires, on all ranks.
        """
        self.communicator._impl.update_bucket(
            self.wire_name,
            self.wire,
            tag,
            self.streams,
            params,
            state.get("master_param"),
            state["exp_avg"],
            state["exp_avg_sq"],
            state.get("max_exp_avg_sq"),
            segments,
            steps,
            used,
            [_settings(group) for group in groups],
            1.0 if clip is None else float(clip),
        )

    def _reduce(self, to: Tensor | None, squares: Tensor, tag: int, async_op: bool) -> Waitable:
        return self.communicator._impl.reduce_bucket(
            self.wire_name, self.wire, to, squares, tag, self.streams, async_op
        )

    def _is_in_wire(self, place: int, grad: Tensor) -> bool:
        return self.wire is self._gradients and is_view(grad, self.gradient_views[place])

    def _kept(self, place: int, grad: Tensor) -> Tensor:
        """A packed gradient: where the wire is fp32 it is there, and needs no other memory."""
        return self.gradient_views[place] if self.wire is self._gradients else grad


def _settings(group: Mapping[str, Any]) -> tuple[float, float, float, float, float, bool, bool, bool, bool, bool]:
    """A group of parameters as the native update takes it."""
    return (
        float(group["lr"]),
        float(group["betas"][0]),
        float(group["betas"][1]),
        float(group["eps"]),
        float(group["weight_decay"]),
        bool(group["decoupled_weight_decay"]),
        bool(group["maximize"]),
        bool(group["master_weights"]),
        bool(group["amsgrad"]),
        bool(group["stochastic_rounding"]),
    )


def places(params: Sequence[Tensor], world_size: int) -> tuple[list[int], int]:
    """Where each parameter begins in a bucket of `world_size` equal shards, in elements; and all that it has."""
    firsts: list[int] = []
    end = 0
    for param in params:
        firsts.append(end)
        end = _round_up(end + param.numel(), ALIGNMENT)
    return firsts, _round_up(max(end, 1), UNIT * world_size)


def wire_bytes(size: int, wire_dtype: torch.dtype) -> int:
    """Of a bucket of `size` elements, as its gradients travel."""
    return size // UNIT * INT8_UNIT_BYTES if wire_dtype == torch.int8 else size * wire_dtype.itemsize


def is_view(grad: Tensor, view: Tensor) -> bool:
    """Whether a gradient is that view of a bucket."""
    return grad.data_ptr() == view.data_ptr() and grad.dtype == view.dtype and grad.stride() == view.stride()


def _gradient(param: Tensor) -> Tensor | None:
    grad = param.grad
    if grad is None:
        return None
    if grad.layout != torch.strided:
        raise UnsupportedError("pycoll: a gradient is sparse: make it dense, for an embedding with sparse=False")
    if grad.requires_grad:
        raise UsageError(
            "pycoll: a gradient has a graph of its own: use torch.autograd.grad where create_graph is True"
        )
    return grad if grad.dtype in FLOATS else grad.float()


def _round_up(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit
