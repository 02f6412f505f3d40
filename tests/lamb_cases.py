"""Params, gradients and comparisons that the tests of Lamb share (test_lamb_*.py)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.optim import Optimizer

Params = dict[str, Tensor]

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)
OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}


def make_params(dtype: torch.dtype = torch.float32) -> Params:
    """In multiples of 1/64 below 2: exact in every dtype."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"weight": (6, 5), "bias": (5,), "scale": (), "conv": (2, 3, 2, 2)}
    params: Params = {
        name: nn.Parameter((torch.randint(-127, 128, s, generator=generator) / 64).to(dtype))
        for name, s in shapes.items()
    }
    with torch.no_grad():
        params["bias"].zero_()
        params["weight"][0, 0] = -0.0
    return params


def bystander() -> Tensor:
    """Never has a gradient. With it there are two params, for which the same code is compiled."""
    return nn.Parameter(torch.ones(1))


def gradients(params: Mapping[str, Tensor], step: int) -> Params:
    """In multiples of 1/64 below 2, so that powers of two scale them exactly."""
    generator = torch.Generator().manual_seed(50 + step)
    return {
        name: (torch.randint(-127, 128, p.shape, generator=generator) / 64).to(p.dtype)
        for name, p in params.items()
    }


def train(opt: Optimizer, params: Mapping[str, Tensor], steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        for name, g in gradients(params, step).items():
            params[name].grad = g
        opt.step()
        opt.zero_grad()


def params_of(opt: Optimizer) -> Params:
    return {f"{i}": p for i, p in enumerate(p for g in opt.param_groups for p in g["params"])}


def everything(opt: Optimizer, params: Mapping[str, Tensor] | None = None) -> Params:
    """Copies of the params and of all their state."""
    found: Params = {}
    for name, p in (params_of(opt) if params is None else params).items():
        found[name] = p.detach().clone()
        for key, value in opt.state.get(p, {}).items():
            found[f"{name}.{key}"] = value.clone()
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also of NaNs and of the sign of zeros."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(x, y)


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert same_bits(got[name], want[name]), name


def through_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
