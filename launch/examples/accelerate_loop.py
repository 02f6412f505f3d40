"""A loop of one's own with Accelerate: state is saved, and resumed by a second start.

torchrun --standalone --nproc-per-node 2 launch/examples/accelerate_loop.py runs/accelerate
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dist_lamb import Lamb, param_groups, schedules


def main(folder: str, epochs: int = 2) -> list[float]:
    # Seedable: the order of an epoch depends on its number alone, so a resumed run has the same.
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(gradient_accumulation_steps=2, dataloader_config=order, cpu=cpu)
    torch.manual_seed(0)
    x = torch.randn(2048, 32)
    data = TensorDataset(x, (x @ torch.randn(32, 10)).argmax(1))
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    # Before prepare(): with FSDP2, it puts the sharded params in the place of these.
    opt = Lamb(param_groups(model), lr=5e-2, max_grad_norm=1.0)
    # In steps of one process: prepare() takes as many at a time as there are processes.
    scheduler = schedules.warmup_linear_decay(opt, warmup_steps=5, total_steps=64)
    loader = DataLoader(data, batch_size=32, shuffle=True)
    model, opt, loader, scheduler = accelerator.prepare(model, opt, loader, scheduler)
    first = max([int(saved.name[6:]) for saved in Path(folder).glob("epoch-*")], default=0)
    if first:
        accelerator.load_state(f"{folder}/epoch-{first}")

    losses = []
    for epoch in range(first, epochs):
        loader.set_epoch(epoch)
        for inputs, labels in loader:
            with accelerator.accumulate(model):  # every second batch is a step
                loss = nn.functional.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                opt.step()
                scheduler.step()
                opt.zero_grad()
            losses.append(loss.item())
        accelerator.save_state(f"{folder}/epoch-{epoch + 1}")
    accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else "nothing to do")
    return losses


if __name__ == "__main__":
    main(sys.argv[1])
