"""FSDP2: Lamb on the DTensors of fully_shard, with the norms of the whole tensors.

torchrun --standalone --nproc-per-node 2 launch/examples/fsdp2.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dist_lamb import Lamb, param_groups


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def main(device: str, steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    teacher = torch.randn(32, 10, device=device)
    model = nn.Sequential(Block(32), Block(32), nn.Linear(32, 10)).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # After fully_shard: the optimizer is made of the sharded params.
    opt = Lamb(param_groups(model), lr=2e-2, max_grad_norm=1.0)

    losses = []
    for step in range(steps):
        torch.manual_seed(step * 100 + dist.get_rank())  # every rank has samples of its own
        x = torch.randn(64, 32, device=device)
        loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1))
        loss.backward()
        opt.step()
        opt.zero_grad()
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
