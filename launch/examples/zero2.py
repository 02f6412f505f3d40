"""ZeRO-2 under torchrun: ShardedLamb in the place of DistributedDataParallel and an optimizer.

torchrun --standalone --nproc-per-node 2 launch/examples/zero2.py runs/zero2

Started again with the same folder, and any number of ranks, it goes on from its last checkpoint.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn

from dist_lamb import ShardedLamb, checkpoint, param_groups, schedules


def main(device: str, folder: str, steps: int = 60, micro_batches: int = 2) -> list[float]:
    torch.manual_seed(0)
    teacher = torch.randn(32, 10, device=device)  # what is to be learned
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    # 2-D weights decay, biases do not; at stage 2 gradients are freed inside backward.
    opt = ShardedLamb(param_groups(model), lr=2e-2, stage=2, max_grad_norm=1.0)
    scheduler = schedules.warmup_linear_decay(opt, warmup_steps=6, total_steps=60)
    first = 0
    if checkpoint.latest(folder):
        first = checkpoint.load(folder, model, opt, stateful={"lr": scheduler}).step

    def backward(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)  # every rank has samples of its own
        x = torch.randn(64, 32, generator=generator).to(device)
        loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1)) / micro_batches
        loss.backward()  # gradients are averaged over the ranks here, bucket by bucket
        return loss.detach()

    losses = []
    for step in range(first, steps):
        seeds = [step * 1000 + i * 100 + dist.get_rank() for i in range(micro_batches)]
        with opt.no_sync():  # all micro-batches but the last
            loss = sum(backward(seed) for seed in seeds[:-1])
        loss += backward(seeds[-1])
        opt.step()
        opt.zero_grad()
        scheduler.step()
        losses.append(float(loss))
        if step % 20 == 19:
            checkpoint.save(folder, step + 1, model, opt, stateful={"lr": scheduler}, keep=2)
    ratios = {name: round(float(ratio), 3) for name, ratio in opt.trust_ratios().items()}
    if dist.get_rank() == 0 and losses:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, trust ratios {ratios}")
    return losses


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group()
    main(device, sys.argv[1])
    dist.destroy_process_group()
