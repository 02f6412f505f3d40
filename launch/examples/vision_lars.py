"""A convolutional network with LARS in large batches: rule="lars", biases and norms by plain SGD.

torchrun --standalone --nproc-per-node 2 launch/examples/vision_lars.py
"""

import torch
import torch.distributed as dist
from torch import nn

from dist_lamb import ShardedLamb, param_groups, preset, schedules


def conv(inputs: int, outputs: int) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def main(device: str, steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    patterns = torch.randn(10, 3, 16, 16, device=device)  # a class is a pattern below noise
    model = nn.Sequential(conv(3, 16), conv(16, 32), nn.Flatten(), nn.Linear(512, 10)).to(device)
    # Statistics over all ranks, where there is a kernel for it: the batch norm of the whole batch.
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if device == "cuda" else model
    # Biases and norms, tensors of one dim, neither decay nor get a ratio: preset's "decayed".
    opt = ShardedLamb(param_groups(model, weight_decay=5e-4), lr=5.0, **preset("lars"))
    scheduler = schedules.warmup_linear_decay(opt, warmup_steps=10, total_steps=steps)

    losses = []
    for step in range(steps):
        torch.manual_seed(step * 100 + dist.get_rank())  # every rank has samples of its own
        labels = torch.randint(10, (64,), device=device)
        images = patterns[labels] + 2.0 * torch.randn(64, 3, 16, 16, device=device)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        opt.step()
        opt.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group()
    main(device)
    dist.destroy_process_group()
