"""The call that FusedAdam and ShardedAdam make for a group of parameters on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pycoll import _C


def fused_step(
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    steps: Sequence[Tensor],
    firsts: Sequence[int],
    *,
    grad_scale: Tensor | None = None,
    clip: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """A step of Adam by the settings of `group`; numbers that lie on a GPU are read there.

    Args:
        group: of the optimizer's param_groups.
        params, grads: on one device.
        states: of each parameter, in its shape: "exp_avg" and so on, as FusedAdam has it.
        steps: made so far, one float each.
        firsts: of each parameter, the index of its first element among all.
        grad_scale, clip, found_inf: see FusedAdam; None where they do not apply.
    """
    device = params[0].device
    lr = group["lr"]
    lr_tensor = None
    if isinstance(lr, Tensor) and lr.is_cuda and device.type == "cuda":  # read there, at each replay of a graph
        lr_tensor = _on(lr.detach().reshape(()).to(torch.float32), device)
    _C.adam_step(
        params=params,
        grads=grads,
        masters=[state.get("master_param") if group["master_weights"] else None for state in states],
        exp_avgs=[state["exp_avg"] for state in states],
        exp_avg_sqs=[state["exp_avg_sq"] for state in states],
        max_exp_avg_sqs=[state["max_exp_avg_sq"] if group["amsgrad"] else None for state in states],
        steps=steps,
        firsts=firsts,
        lr_tensor=lr_tensor,
        lr=0.0 if lr_tensor is not None else float(lr),
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=group["decoupled_weight_decay"],
        maximize=group["maximize"],
        stochastic=group["stochastic_rounding"],
        grad_scale=_on(grad_scale, device),
        clip=_on(clip, device),
        found_inf=_on(found_inf, device),
    )


def _on(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    return None if scalar is None else scalar.to(device, non_blocking=True)
