"""A model for fully_shard, and Lamb for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    fully_shard,
)
from torch.utils.checkpoint import checkpoint

from dist_lamb import Lamb, param_groups

VOCABULARY, WIDTH, HIDDEN = 33, 8, 13  # no number of rows divides evenly
OPTIONS: dict[str, Any] = {"lr": 0.02, "max_grad_norm": 1.0}


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.gate = nn.Parameter(torch.zeros(1))
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self._forward, x, use_reentrant=False)  # type: ignore[no-any-return]
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        return x + (1.0 + self.gate) * self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Embedding tied to the output, blocks, zero-initialised gates, a param without gradient."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        torch.manual_seed(3)
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(3))
        self.unused = nn.Parameter(torch.ones(5))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def batch(t: int, rank: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + t)
    return torch.randint(VOCABULARY, (4, 6), generator=generator)


def sharded(mesh: DeviceMesh, net: Net | None = None, **policies: Any) -> Net:
    net = net or Net()
    for block in net.blocks:
        fully_shard(block, mesh=mesh, **policies)
    fully_shard(net, mesh=mesh, **policies)
    return net


def lamb(net: nn.Module) -> Lamb:
    return Lamb(param_groups(net, weight_decay=0.05), **OPTIONS)
