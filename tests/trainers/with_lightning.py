"""Lightning: the backend is a name that its strategy is given."""

from pathlib import Path

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from task import batches, main, net
from torch import Tensor
from torch.nn import functional as F


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("judged", F.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def learn(backend: str, folder: Path) -> dict[str, float]:
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend=backend),
        max_epochs=3,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), batches(shuffle=True), batches(shuffle=False))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    main(learn)
