"""Two towers trained contrastively: negatives from all ranks, with the whole batch's gradient.

torchrun --standalone --nproc-per-node 2 launch/examples/contrastive.py
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dist_lamb import ShardedLamb, param_groups


class Gather(torch.autograd.Function):
    """[n, d] of each rank -> [W * n, d]; backward adds up all ranks' gradients of these rows."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        dist.all_reduce(gradient := gradient.clone(memory_format=torch.contiguous_format))
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def main(device: str, steps: int = 40) -> tuple[list[float], nn.Module]:
    torch.manual_seed(0)
    to_image, to_text = torch.randn(8, 48).to(device), torch.randn(8, 24).to(device)
    model = nn.ModuleDict({"image": nn.Linear(48, 16), "text": nn.Linear(24, 16)}).to(device)
    # log(1 / temperature); its norm says nothing about its step: no trust ratio for it.
    model.log_scale = nn.Parameter(torch.tensor(10.0, device=device).log())
    opt = ShardedLamb(param_groups(model, no_adapt=["log_scale"]), lr=2e-2)

    losses = []
    for step in range(steps):
        whole = torch.randn(64, 8, generator=torch.Generator().manual_seed(step)).to(device)
        meaning = whole.chunk(dist.get_world_size())[dist.get_rank()]  # of this rank's pairs
        image = F.normalize(model["image"]((meaning @ to_image).tanh()), dim=1)
        text = F.normalize(model["text"]((meaning @ to_text).tanh()), dim=1)
        labels = torch.arange(len(meaning), device=device) + dist.get_rank() * len(meaning)
        both = [(image, Gather.apply(text)), (text, Gather.apply(image))]
        loss = sum(F.cross_entropy(model.log_scale.exp() * a @ b.T, labels) for a, b in both) / 2
        loss.backward()  # of this rank's pairs; ShardedLamb averages over the ranks
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses, model


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group()
    print(main(device)[0][::10])
    dist.destroy_process_group()
