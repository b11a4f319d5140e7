"""How the weights follow the gradients: AdamW's settings, warm-up and cosine decay of the learning rate."""

import math
from typing import Any

import torch
from torch import nn

from pycoll.train.config import TrainConfig

BETA1 = 0.9


def adam_settings(model: nn.Module, config: TrainConfig) -> dict[str, Any]:
    """What any AdamW (Loshchilov and Hutter, 2017) here is made with: its decay touches matrices alone.

    `set_learning_rate` gives its rate.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return {"params": groups, "lr": config.lr, "betas": (BETA1, config.beta2)}


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step 0, 1, ...: a line up to config.lr, then half a cosine down to its share min_lr_share."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / (config.steps - config.warmup)
    lowest = config.lr * config.min_lr_share
    return lowest + (config.lr - lowest) * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of all parameters from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate
