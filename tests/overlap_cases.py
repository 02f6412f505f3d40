"""A model that uses its params in every way, its training, and collectives that come late."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import models
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_lamb import ShardedLamb, param_groups
from dist_lamb.sharding.comm import Comm

OPTIONS: dict[str, Any] = {"lr": 0.05, "max_grad_norm": 1.0, "bucket_numel": 2**11}
STEPS = 3


class Late:
    """A collective that takes place only when somebody waits for it."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run

    def wait(self) -> None:
        time.sleep(random.uniform(0, 2e-3))
        self._run()


@contextmanager
def wrapped_collectives(wrap: Callable[[Any], Any]) -> Iterator[None]:
    """``wrap`` around what moves gradients and params."""
    originals = Comm.reduce_scatter, Comm.all_gather
    Comm.reduce_scatter, Comm.all_gather = map(wrap, originals)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Comm.reduce_scatter, Comm.all_gather = originals  # type: ignore[method-assign]


def late_collectives() -> AbstractContextManager[None]:
    """Whoever reads a result without waiting for it reads what was there before."""

    def wrap(original: Any) -> Any:
        def late(self: Comm, out: Tensor, given: Tensor, async_op: bool = False) -> Any:
            if async_op and self.world_size > 1:
                return Late(lambda: original(self, out, given))
            return original(self, out, given)

        return late

    return wrapped_collectives(wrap)


class Net(nn.Module):
    """Tied weights, a layer used twice, one that no rank uses, one that some ranks do, a layer
    whose params its parent reads, and checkpoints."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        # reads out_proj.weight; no biases: that of the key has a gradient of rounding noise alone
        self.attend = nn.MultiheadAttention(32, 4, bias=False, batch_first=True)
        self.twice = nn.Linear(32, 32)
        self.sometimes = nn.Linear(32, 32)
        self.never = nn.Linear(32, 7)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight
        self.reentrant = reentrant

    def block(self, x: Tensor) -> Tensor:
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return torch.tanh(self.twice(self.norm(x)))

    def forward(self, ids: Tensor, sometimes: bool) -> Tensor:
        x = self.embed(ids)
        for _ in range(2):
            if self.reentrant is None:
                x = self.block(x)
            else:
                x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        if sometimes:
            x = x + self.sometimes(x)
        return self.head(x)


def batch(t: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * t + rank)
    return torch.randint(40, (4, 6), generator=generator)


def loss_of(model: nn.Module, t: int, rank: int) -> Tensor:
    ids = batch(t, rank).to(next(model.parameters()).device)
    return nn.functional.cross_entropy(
        model(ids, rank == 1)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )


def make_net(
    dtype: torch.dtype = torch.float32, reentrant: bool | None = None, device: str = "cpu"
) -> Net:
    torch.manual_seed(0)
    return Net(reentrant).to(device, dtype)


def run(
    rank: int,
    group: Any,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> str:
    model = make_net(dtype, device=device)
    optimizer = ShardedLamb(param_groups(model), process_group=group, **{**OPTIONS, **options})
    for t in range(STEPS):
        loss_of(model, t, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.synchronize()
    assert float(optimizer.state[model.never.weight]["step"]) == 0
    return models.digest({n: p.detach() for n, p in model.named_parameters()})


VARIANTS: list[dict[str, Any]] = [
    {"overlap": overlap, "overlap_gather": gather, "stage": stage}
    for stage in (1, 2)
    for overlap in (False, True)
    for gather in (False, True)
]


def averaged(model: nn.Module, losses: Callable[[nn.Module], list[Tensor]], world: int) -> None:
    """The params' gradients, averaged over ranks in the plainest way."""
    for loss in losses(model):
        loss.backward()
    for p in model.parameters():
        here = torch.tensor(float(p.grad is not None))
        dist.all_reduce(here)
        if here:
            total = torch.zeros_like(p) if p.grad is None else p.grad.clone()
            dist.all_reduce(total)
            p.grad = total / world
