"""What the programs beside this file learn, each with a trainer that others wrote, on ranks that torchrun starts."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

Learn = Callable[[str, Path], dict[str, float]]
"""(backend, folder) -> what was reached. It leaves a process group of that backend."""


def batches(*, shuffle: bool) -> DataLoader:
    torch.manual_seed(0)
    x = torch.randn(203, 8)  # so that the last batches are uneven
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16, shuffle=shuffle)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))


def main(learn: Learn) -> None:
    """Learns over pycoll and over Gloo; each rank writes what it has reached to the folder that the command names."""
    folder = Path(sys.argv[1])
    reached = {}
    for backend in ("pycoll", "gloo"):
        reached[backend] = learn(backend, folder / backend)
        assert dist.get_backend() == backend
        dist.destroy_process_group()
    (folder / f"reached-{os.environ['RANK']}.json").write_text(json.dumps(reached))
