"""pycoll.ShardedAdam: the optimizer's state divided by the ranks, and the update between reduce-scatter and all-gather.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020 (stage 1). There the
three are passes of their own; here each rank reads its shard of all ranks' gradients, averages and updates it, and
writes the new parameters to all ranks, in one pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

from pycoll.buckets import GradientBuckets
from pycoll.communicator import Communicator
from pycoll.errors import UnsupportedError, UsageError
from pycoll.optim import FusedAdam
from pycoll.sharded_state import Shard


class ShardedAdam(FusedAdam):
    """Adam and AdamW as FusedAdam, with moments and masters divided by the ranks.

        model = pycoll.DataParallel(model)
        optimizer = pycoll.ShardedAdam(model.parameters(), lr=3e-4, buckets=model.buckets)
        ...
        loss.backward()
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
        optimizer.zero_grad()

    `step` averages the gradients of all ranks, updates, and leaves all ranks with the new parameters: bit for bit those
    of DataParallel with FusedAdam; after 20 steps in fp32 within 1e-4 relatively, or 1e-5 absolutely, of torch's DDP
    with torch.optim.AdamW. Before it, `grad` is what this rank has computed. Parameters lie in the heap from
    then on, where peers write them: keep the tensors (no `model.to()`, no `param.data = ...`).

    On a GPU that is a reduce-scatter, FusedAdam's step of this rank's shard, and an all-gather; the host waits for
    nothing but which parameters other ranks have gradients for, where this rank lacks one. There the bits are
    FusedAdam's, too, unless the norm is clipped and gradients travel in 16 bits.

    Where FusedAdam's method is one rank's affair these are collective calls: `clip_grad_norm`, `step`, `state_dict`.
    A failed `step` leaves parameters undefined, as every failed collective.
    """

    _clipped = -1  # the pass whose gradients clip_grad_norm has measured

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = True,
        master_weights: bool = True,
        stochastic_rounding: bool = False,
        buckets: GradientBuckets | None = None,
        communicator: Communicator | dist.ProcessGroup | None = None,
        wire_dtype: torch.dtype = torch.float32,
        bucket_bytes: int | None = None,
    ) -> None:
        """A call that all ranks make. State is made by the first step.

        Args:
            params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay, master_weights,
            stochastic_rounding: as FusedAdam's.
            buckets: those of the parameters, from a pycoll.DataParallel; None: new ones, and parameters begin as rank
                0's.
            communicator, wire_dtype, bucket_bytes: of new buckets, as DataParallel's.

        Raises:
            UsageError: a number out of its range; the buckets are not of these parameters; the ranks' models differ.
            UnsupportedError: a parameter of another dtype, device or layout.
        """
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
        )
        own = [param for group in self.param_groups for param in group["params"] if param.requires_grad]
        if buckets is None:
            if not isinstance(communicator, Communicator):
                communicator = Communicator.from_group(communicator)
            buckets = GradientBuckets(own, communicator, wire_dtype=wire_dtype, bucket_bytes=bucket_bytes)
            with torch.no_grad():
                for param in own:
                    communicator.broadcast(param)
        elif {*own} != {*buckets.params}:
            raise UsageError(
                f"pycoll: ShardedAdam: the buckets hold {len(buckets.params)} parameters, the groups {len({*own})} "
                "that require a gradient: they must be the same ones"
            )
        with_memory = [param for param in own if param.numel()]
        if len({param.data_ptr() for param in with_memory}) < len(with_memory):
            raise UsageError(
                "pycoll: ShardedAdam: two parameters share memory: make them one, the same tensor in both places"
            )
        self.buckets = buckets
        """Where the gradients are; `buckets.no_sync()` is for passes that only add them up."""
        buckets.divide(self)
        self._shards = [Shard(bucket) for bucket in buckets.buckets]
        self._segments = self._make_segments()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters for which some rank has a gradient, on all ranks. A collective call.

        Args:
            closure: evaluates the model anew and returns the loss.

        Returns:
            What `closure` has returned, or None.

        Raises:
            UsageError: the last backward pass was within no_sync(); parameters have been moved to other memory; or
                gradients are scaled and clip_grad_norm was not called with the scaler.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._clipped != self.buckets.passes:
            self._clip, self._unscales = None, False  # of gradients that are gone
        if getattr(self, "found_inf", None) is not None and not self._unscales:
            raise UsageError(
                "pycoll: ShardedAdam: only all ranks together know whether scaled gradients are finite: call "
                "optimizer.clip_grad_norm(max_norm, scaler=scaler) before scaler.step(optimizer); max_norm may be "
                "math.inf"
            )
        found_inf = getattr(self, "found_inf", None)  # the same on all ranks, as clip_grad_norm has left it
        with self.buckets.telling():
            self.buckets.require_packed()
            if found_inf is None or found_inf.is_cuda or float(found_inf) == 0:  # a GPU looks at it itself
                self._update(found_inf)
        self._clip, self._unscales = None, False
        return loss

    def clip_grad_norm(self, max_norm: float, *, scaler: GradScaler | None = None) -> Tensor:
        """As FusedAdam.clip_grad_norm, of the averages over all ranks. A collective call.

        From the first call on, backward passes measure the norm while they go on.

        Raises:
            UsageError: as `FusedAdam.clip_grad_norm` and `step`; or the scaler has unscaled the gradients already.
        """
        stage = scaler._per_optimizer_states[id(self)]["stage"] if scaler is not None and scaler.is_enabled() else None
        if stage is OptState.UNSCALED and not self._unscales:
            raise UsageError(
                "pycoll: ShardedAdam: gradients travel before scaler.unscale_ could reach them: leave it out, "
                "clip_grad_norm(max_norm, scaler=scaler) unscales"
            )
        norm = super().clip_grad_norm(max_norm, scaler=scaler)
        self._clipped = self.buckets.passes
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim.Optimizer.zero_grad."""
        if set_to_none:
            self.buckets.forget()
        super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as FusedAdam's, on every rank; it loads in any world size, FusedAdam and torch's AdamW.

        A collective call: all ranks make it, also where one alone saves it.
        """
        try:
            for shard in self._shards:
                for param, state in zip(shard.bucket.params, shard.gathered(), strict=True):
                    if state:
                        self._drop_unasked(param, state)
                        self.state[param] = state
            return super().state_dict()
        finally:
            self.state.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes this rank's part of a state_dict: of ShardedAdam in any world size, FusedAdam, torch's Adam or AdamW.

        Raises:
            ValueError: the groups do not match.
        """
        super().load_state_dict(state_dict)
        try:
            for shard in self._shards:
                shard.load([self.state.get(param, {}) for param in shard.bucket.params])
        finally:
            self.state.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only at the beginning: a new group needs new buckets.

        Raises:
            UnsupportedError: the optimizer has been made.
        """
        if hasattr(self, "_shards"):
            raise UnsupportedError("pycoll: ShardedAdam takes no more groups: make a new one of all parameters")
        super().add_param_group(param_group)

    def _sums_of_squares(self) -> Tensor:
        self.buckets.measures = True  # the next passes measure while they go on
        with self.buckets.telling():
            return self.buckets.measure()

    def _make_segments(self) -> list[Tensor]:
        """Of each bucket, for each parameter: first element, elements, first element among all, group."""
        about: dict[Tensor, tuple[int, int]] = {}
        first = 0
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                about[param] = (first, number)
                first += param.numel()
        return [
            torch.tensor(
                [
                    (begin, param.numel(), *about[param])
                    for param, begin in zip(bucket.params, bucket.firsts, strict=True)
                ],
                dtype=torch.int64,
            )
            for bucket in self.buckets.buckets
        ]

    def _update(self, found_inf: Tensor | None) -> None:
        """One call a bucket."""
        any_amsgrad, any_master = (
            any(group[name] for group in self.param_groups) for name in ("amsgrad", "master_weights")
        )
        averaged = self.buckets.squares is not None
        for index, (shard, segments) in enumerate(zip(self._shards, self._segments, strict=True)):
            used = self.buckets.used(index)
            if not bool(used.any()):
                continue
            bucket = shard.bucket
            for param, view in zip(bucket.params, shard.views, strict=True):
                if param.data_ptr() != view.data_ptr():
                    raise UsageError(
                        f"pycoll: ShardedAdam: a parameter of shape {tuple(param.shape)} lies elsewhere now: move or "
                        "convert the model before the optimizer is made"
                    )
            needs_master = any_master and shard.memory.dtype != torch.float32
            names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * any_amsgrad + ["master_param"] * needs_master
            bucket.update(
                self.buckets.tag(index),
                shard.memory,
                {name: shard.masters(used) if name == "master_param" else shard.need(name) for name in names},
                segments,
                shard.steps,
                used,
                self.param_groups,
                clip=self._clip,
                found_inf=found_inf,
                averaged=averaged,
            )
            torch.autograd.graph.increment_version(bucket.params)  # of which autograd may have saved the old values

    def _drop_unasked(self, param: Tensor, values: dict[str, Any]) -> None:
        """Of a parameter's state what its group does not use, and another one of its bucket does."""
        group = next(g for g in self.param_groups if any(param is each for each in g["params"]))
        if not group["amsgrad"]:
            values.pop("max_exp_avg_sq", None)
        if not group["master_weights"]:
            values.pop("master_param", None)
