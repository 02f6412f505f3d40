"""Lightning: Lamb from configure_optimizers, under DDP, with the schedule stepped every batch.

python launch/examples/lightning_module.py runs/lightning 2

Started again with the same folder, it goes on from its last checkpoint.
"""

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dist_lamb import Lamb, param_groups, schedules


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        # Under FSDP2 (ModelParallelStrategy) and DDP alike; gradients arrive averaged.
        opt = Lamb(param_groups(self), lr=2e-2, max_grad_norm=1.0)
        schedule = schedules.warmup_linear_decay(opt, warmup_steps=5, total_steps=128)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(folder: str, devices: int = 1, epochs: int = 2, **more: Any) -> lightning.Trainer:
    torch.manual_seed(0)
    x = torch.randn(2048, 32)
    data = TensorDataset(x, (x @ torch.randn(32, 10)).argmax(1))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        default_root_dir=folder,
        logger=False,
        **more,
    )
    last = max(
        Path(folder).glob("checkpoints/*.ckpt"), key=lambda p: p.stat().st_mtime, default=None
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=32, shuffle=True), ckpt_path=last)
    return trainer


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
