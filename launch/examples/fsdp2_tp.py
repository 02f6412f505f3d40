"""FSDP2 x tensor parallel, 2 ways each: params are cut along two axes, norms are of the whole.

torchrun --standalone --nproc-per-node 4 launch/examples/fsdp2_tp.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dist_lamb import Lamb, param_groups


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def main(device: str, steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    teacher = torch.randn(32, 10, device=device)
    model = nn.Sequential(Block(32), Block(32), nn.Linear(32, 10)).to(device)
    mesh = init_device_mesh(device, (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model[:2]:  # first tensor parallel, then fully_shard
        parallelize_module(block, mesh["tensor"], plan)
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    opt = Lamb(param_groups(model), lr=2e-2, max_grad_norm=1.0)

    losses = []
    for step in range(steps):
        # The ranks of one tensor-parallel group see the same samples.
        torch.manual_seed(step * 100 + mesh["data"].get_local_rank())
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
