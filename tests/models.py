"""Parameter sets chosen to hurt, and gradients that every world size can average exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: Cut by every shard boundary at W = 2, 3, 4; single elements; an empty one; zero-initialised.
SHAPES: dict[str, tuple[int, ...]] = {
    "emb.weight": (97, 64),
    "wide.weight": (33, 331),
    "tile.weight": (32, 32),
    "fc.weight": (24, 16),
    "fc.bias": (24,),
    "norm.weight": (24,),
    "scale": (),
    "empty": (0, 3),
    "one": (1,),
}


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in SHAPES.items():
        t = torch.randn(shape, generator=generator) * 0.1
        if name.endswith("bias"):
            t = torch.zeros(shape)
        elif name.startswith("norm"):
            t = torch.ones(shape)
        params[name] = torch.nn.Parameter(t.to(dtype))
    return params


def groups_of(params: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Matrices decay, the rest does not: two groups with different options."""
    decayed = [(n, p) for n, p in params.items() if p.ndim > 1]
    plain = [(n, p) for n, p in params.items() if p.ndim < 2]
    return [
        {"params": decayed, "weight_decay": 0.05},
        {"params": plain, "weight_decay": 0.0, "trust_clip": (0.01, 5.0)},
    ]


def mean_gradients(
    params: Mapping[str, Tensor], step: int, absent: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Gradients to be averaged over ranks, multiples of a power of two below 1.

    Sums over up to 4 ranks of them, and of what :func:`rank_gradients` adds, are exact in the
    params' dtype.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    grads = {}
    for name, p in params.items():
        steps = 8 if p.dtype == torch.bfloat16 else 4096
        g = torch.randint(1 - steps, steps, p.shape, generator=generator) / (2.0 * steps)
        if name not in absent:
            grads[name] = g.to(p.dtype)
    return grads


def rank_gradients(
    mean: Mapping[str, Tensor], rank: int, world: int, step: int
) -> dict[str, Tensor]:
    """This rank's gradients: all different, with ``mean`` as their exact mean."""
    grads = {}
    for i, (name, g) in enumerate(mean.items()):
        generator = torch.Generator().manual_seed(7 * step + i)
        steps = 8 if g.dtype == torch.bfloat16 else 64
        noise = torch.randint(-steps, steps + 1, (world, *g.shape), generator=generator)
        noise = noise / (2.0 * steps)
        noise = noise - noise.roll(1, dims=0)  # sums to zero over the ranks, exactly
        grads[name] = (g.float() + noise[rank]).to(g.dtype)
    return grads


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Of the bits of all tensors."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        h.update(t.view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return h.hexdigest()
