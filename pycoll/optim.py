"""Optimizers whose whole step is one pass over the parameters: `FusedAdam`.

A training step unscales, checks for overflow, measures the norm, clips, updates and casts. Elsewhere each of these
reads and writes all gradients or parameters; here the norm is one pass that reads, and all else is the update itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

from pycoll import _C
from pycoll.adam_state import Kept, empty_state, fitting, keep_precision
from pycoll.buckets import measured_squares
from pycoll.errors import UsageError
from pycoll.fused_step import fused_step


class FusedAdam(torch.optim.Optimizer):
    """Adam and AdamW, all parameters of a device in one pass; an update has the same bits on CPU and CUDA.

    Adam: Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015. AdamW: Loshchilov & Hutter, "Decoupled Weight
    Decay Regularization", 2019. AMSGrad: Reddi, Kale & Kumar, "On the Convergence of Adam and Beyond", 2018.

    Parameters are float32, bfloat16 or float16, of any shape, dense in memory (strides in any order), on CPU or CUDA.
    The arithmetic and the moments are fp32. A 16-bit parameter has an fp32 master weight, of which it is the rounding:
    whoever changes such a parameter by hand after the first step loads a state_dict, too, or the master wins.

    State of a parameter: "step" (), "exp_avg", "exp_avg_sq", with `amsgrad` "max_exp_avg_sq", and for 16-bit parameters
    "master_param", each of the parameter's shape, fp32, on its device. A state_dict goes to torch.optim.Adam and AdamW,
    and comes from there, unchanged; moments of 16 bits become fp32, and a missing master is made from the parameter.

    Gradients are neither unscaled nor clipped in place. `clip_grad_norm` measures them, and the next `step` applies the
    factor. With a GradScaler:

        scaler.scale(loss).backward()
        norm = optimizer.clip_grad_norm(1.0, scaler=scaler)  # instead of scaler.unscale_ and clip_grad_norm_
        scaler.step(optimizer)
        scaler.update()

    On CUDA a step is one launch, nothing waits for the GPU, and `clip_grad_norm` and `step` can be captured in a graph.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler sets grad_scale and found_inf, and leaves the rest to step
    _clip: Tensor | None = None  # of clip_grad_norm, for the next step
    _unscales = False  # whether _clip knows of the scaler, and holds its scale
    _scale: Tensor | None = None  # that it holds

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
        capturable: bool = False,
    ) -> None:
        """Takes no memory yet: state is made by the first step that finds a gradient.

        Args:
            params: tensors, or groups of them as dicts that may override any argument below.
            lr: learning rate, or a tensor of one element; one on the GPU may be changed between replays of a graph.
            betas: of the averages of gradients and of their squares, each in [0, 1).
            eps: added to the root of the second moment.
            weight_decay: with `decoupled_weight_decay` a parameter loses lr * weight_decay of itself a step (AdamW),
                else weight_decay times the parameter is added to its gradient (Adam).
            amsgrad: divide by the largest second moment so far.
            maximize: go up the gradient.
            master_weights: keep fp32 masters of 16-bit parameters; without, each step starts from the rounded value.
            stochastic_rounding: round 16-bit parameters up or down with the probability of how near each neighbour
                is, so that without masters small steps count on average. Chosen by step and index of the element:
                the same in every run and on every rank.
            capturable: as in torch.optim, where state_dicts carry it; a FusedAdam on CUDA is always capturable.

        Raises:
            UsageError: a number out of its range.
        """
        for name, number in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if isinstance(number, Tensor):
                if number.numel() != 1:
                    raise UsageError(f"pycoll: FusedAdam: {name} must have one element, not {number.numel()}")
            elif not 0 <= number < math.inf:
                raise UsageError(f"pycoll: FusedAdam: {name} must be a number from 0 on, not {number}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise UsageError(f"pycoll: FusedAdam: betas must be two numbers from 0 to less than 1, not {betas}")
        defaults = {
            "lr": lr,
            "betas": tuple(map(float, betas)),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "capturable": capturable,
            # What torch.optim.Adam looks for in a state_dict.
            "foreach": None,
            "fused": True,
            "differentiable": False,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient.

        Args:
            closure: evaluates the model anew and returns the loss.

        Returns:
            What `closure` has returned, or None.

        Raises:
            UnsupportedError: a gradient is sparse, a parameter is not dense, or of a dtype or device that it cannot do.
            UsageError: a state does not fit its parameter; or the norm was clipped without the scaler that steps.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if getattr(self, "grad_scale", None) is not None and self._clip is not None and not self._unscales:
            raise UsageError(
                "pycoll: FusedAdam: gradients are scaled, so clip_grad_norm needs the scaler: "
                "optimizer.clip_grad_norm(max_norm, scaler=scaler)"
            )
        first = 0
        for group in self.param_groups:
            by_device: dict[torch.device, list[tuple[Tensor, int]]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    by_device.setdefault(param.device, []).append((param, first))
                first += param.numel()
            for params in by_device.values():
                self._step_group(group, params)
        self._clip, self._unscales = None, False
        return loss

    def clip_grad_norm(self, max_norm: float, *, scaler: GradScaler | None = None) -> Tensor:
        """Measures the 2-norm of all gradients together; the next `step` scales them to `max_norm` where it is larger.

        One pass that reads the gradients, summed in fp64 in an order that does not depend on threads; none where
        GradientBuckets have measured them while they averaged them. It holds for the
        next `step` only, and `zero_grad` forgets it. Gradients keep their values.

        Args:
            max_norm: the largest norm, of unscaled gradients. math.inf: only measure and, with `scaler`, unscale.
            scaler: the GradScaler that has scaled the loss. It is then told whether all gradients are finite, so that
                `scaler.step(optimizer)` checks nothing again, and unscales within the update.

        Returns:
            The norm before clipping, of unscaled gradients, shape (), float32, on the first gradient's device. It is
            not finite where a gradient is not; the step then gives NaNs, as after torch's clip_grad_norm_, unless
            `scaler` is there to skip it.

        Raises:
            UnsupportedError: a gradient is sparse, or of a dtype or device that FusedAdam cannot do.
            UsageError: `max_norm` is not positive; or `scaler` has stepped since its last update().
        """
        if not max_norm > 0:
            raise UsageError(f"pycoll: clip_grad_norm: max_norm must be positive, not {max_norm}")
        total = self._sums_of_squares()
        where = total.device
        scale, checked = None, None
        if scaler is not None and scaler.is_enabled():
            checked = scaler._per_optimizer_states[id(self)]
            if checked["stage"] is OptState.STEPPED:
                raise UsageError("pycoll: clip_grad_norm: the scaler has stepped already: call scaler.update() first")
            if checked["stage"] is OptState.UNSCALED and self._unscales:
                scale = self._scale  # measured before
            elif checked["stage"] is OptState.READY:
                scale = scaler.scale(torch.ones((), device=where)).to(torch.float32)
        norm, factor, found_inf = _C.clip_to_norm(total, scale, max_norm)
        self._clip, self._unscales, self._scale = factor, checked is not None, scale
        if checked is not None and scale is not None:
            # As scaler.unscale_ leaves it: the gradients have been checked, and nothing remains to be unscaled.
            checked["found_inf_per_device"] = {where: found_inf}
            checked["stage"] = OptState.UNSCALED
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim.Optimizer.zero_grad; what clip_grad_norm measured is forgotten."""
        self._clip, self._unscales = None, False
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state_dict of a FusedAdam, or of torch.optim.Adam or AdamW for the same parameters.

        What FusedAdam alone has (`master_weights`, `stochastic_rounding`) stays as it is where the dict lacks it.

        Raises:
            ValueError: the groups do not match.
        """
        # torch would round all state to the parameter's dtype; what it does not know for a tensor it leaves alone. The
        # hook comes after those of others, which see tensors.
        keeps = self.register_load_state_dict_pre_hook(keep_precision)
        try:
            super().load_state_dict(state_dict)
        finally:
            keeps.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of unpickling, copying and load_state_dict."""
        before = [dict(group) for group in getattr(self, "param_groups", [])]
        super().__setstate__(state)
        for place, group in enumerate(self.param_groups):
            own = before[place] if place < len(before) else {}
            for name, value in self.defaults.items():
                group.setdefault(name, own.get(name, value))
            group["fused"], group["foreach"], group["differentiable"] = True, None, False
        for param, values in self.state.items():
            for name, value in values.items():
                if isinstance(value, Kept):
                    values[name] = fitting(name, value.tensor, param)
                elif name == "step" and not isinstance(value, Tensor):
                    values[name] = torch.tensor(float(value), dtype=torch.float32, device=param.device)

    def _sums_of_squares(self) -> Tensor:
        """Of all gradients: some numbers to be added, shape (n,), fp64, on the first gradient's device."""
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        if (measured := measured_squares(params)) is not None:
            return measured
        by_device: dict[torch.device, list[Tensor]] = {}
        for param in params:
            by_device.setdefault(param.grad.device, []).append(param.grad)
        where = next(iter(by_device), torch.device("cpu"))
        sums = [_C.sum_of_squares(grads).reshape(1).to(where) for grads in by_device.values()]
        return torch.cat(sums) if len(sums) > 1 else sums[0] if sums else torch.zeros(1, dtype=torch.float64)

    def _step_group(self, group: dict[str, Any], params: list[tuple[Tensor, int]]) -> None:
        """Those of a group that lie on one device; with each the index of its first element among all."""
        states = [self._state_of(param, group) for param, _ in params]
        fused_step(
            group,
            [param for param, _ in params],
            [param.grad for param, _ in params if param.grad is not None],
            states,
            [state["step"] for state in states],
            [first for _, first in params],
            grad_scale=getattr(self, "grad_scale", None),
            clip=self._clip,
            found_inf=getattr(self, "found_inf", None),
        )

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The parameter's state, with all that its group asks for."""
        state: dict[str, Any] = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        wanted = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
        for name in wanted:
            if name not in state:
                state[name] = empty_state(name, param).zero_()
        if group["master_weights"] and param.dtype in (torch.bfloat16, torch.float16) and "master_param" not in state:
            state["master_param"] = empty_state("master_param", param).copy_(param.detach())
        return state
