"""Accelerate: on CPUs it asks for Gloo by name, and takes the process group that is there."""

from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from task import batches, main, net
from torch.nn import functional as F


def learn(backend: str, folder: Path) -> dict[str, float]:
    dist.init_process_group(backend)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches(shuffle=True))
    for _ in range(3):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.mse_loss(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    accelerator.save_state(str(folder))
    accelerator.wait_for_everyone()
    accelerator.load_state(str(folder))
    squares = torch.cat([accelerator.gather_for_metrics((model(x) - y).square().detach()) for x, y in loader])
    mean = accelerator.reduce(torch.tensor([float(accelerator.process_index)]), "mean")
    ranks = gather_object([accelerator.process_index])
    AcceleratorState._reset_state(reset_partial_state=True)
    return {"judged": float(squares.mean()), "examples": len(squares), "mean": float(mean), "ranks": len(ranks)}


if __name__ == "__main__":
    main(learn)
