"""Random models for the fused backend, and what it must do on them: shared by the interpreter's
tests on the CPU and the tests on a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dist_lamb import Lamb, ShardedLamb

#: Around a block (512), a tile (1024) and a chunk (2048), and what no vector access fits.
NUMELS = (0, 1, 2, 7, 64, 511, 513, 1023, 1024, 1025, 2048, 5000)
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
OPTIONS: dict[str, tuple[Any, ...]] = {
    "lr": (0.0, 0.01, 0.05),
    "betas": ((0.9, 0.999), (0.8, 0.95), (0.0, 0.9)),
    # Smaller ones make the update jump with the sign of a gradient that rounding decides.
    "eps": (1e-3, 1e-2),
    "weight_decay": (0.0, 0.05),
    "grad_averaging": (True, False),
    "bias_correction": (True, False),
    "decoupled": (True, True, False),
    "max_grad_norm": (None, 1.0, 1e6),
    "adapt": ("all", "decayed", False),
    "trust_clip": (None, (0.01, 0.9)),
    "phi": (None, (0.1, 2.0)),
    "maximize": (False, False, True),
}
STEPS = 4


class Case:
    """A model drawn from ``seed``: dtypes, sizes, views, groups and their options, gradients."""

    def __init__(self, seed: int, device: str, numels: tuple[int, ...] = NUMELS) -> None:
        self.seed, self.device = seed, device
        self._numels = numels
        draw = random.Random(seed)
        self.same_dtype = draw.random() < 0.5
        self.groups = draw.randint(1, 3)
        self.options = [
            {name: draw.choice(values) for name, values in OPTIONS.items()}
            for _ in range(self.groups)
        ]
        self.clip_everywhere = draw.random() < 0.5
        self.tensor_lr = draw.random() < 0.3
        self.loss_scale = 2.0 ** draw.randint(1, 4) if draw.random() < 0.4 else None
        self.skipped = draw.randrange(STEPS) if self.loss_scale else None

    def params(self, views: bool = True) -> list[torch.nn.Parameter]:
        """The same at every call; with ``views``, some are not aligned to 16 bytes."""
        draw = random.Random(self.seed + 1)
        generator = torch.Generator().manual_seed(self.seed)
        dtype = draw.choice(DTYPES)
        params = []
        for k in range(draw.randint(2, 9)):
            n = draw.choice(self._numels)
            if not self.same_dtype:
                dtype = draw.choice(DTYPES)
            offset = draw.choice((0, 0, 1, 3)) if views else 0
            memory = torch.randn(n + offset, generator=generator) * draw.choice((0.0, 0.1, 1.0))
            t = memory.to(self.device, dtype)[offset:]
            if n % 4 == 0 and draw.random() < 0.5:
                t = t.view(4, n // 4) if k % 2 else t.view(n // 4, 4).t()
            params.append(torch.nn.Parameter(t))
        return params

    def lamb(self, cls: Any, params: list[torch.nn.Parameter], impl: str, **more: Any) -> Any:
        groups: list[dict[str, Any]] = [
            {"params": params[i :: self.groups], **options}
            for i, options in enumerate(self.options)
        ]
        for group in groups:
            if self.clip_everywhere:
                group["max_grad_norm"] = 0.7
            if self.tensor_lr:
                group["lr"] = torch.tensor(group["lr"], device=self.device)
        return cls(groups, impl=impl, **more)

    def run(self, cls: Any, impl: str, views: bool = True, **more: Any) -> dict[str, Tensor]:
        """Everything that is there after the last step, by name."""
        params = self.params(views)
        optimizer = self.lamb(cls, params, impl, **more)
        found = {}
        for t in range(STEPS):
            self._gradients(params, t)
            if self.loss_scale is not None:
                optimizer.grad_scale = torch.tensor(self.loss_scale, device=self.device)
                flag = float(t == self.skipped)
                optimizer.found_inf = torch.tensor([flag], device=self.device)
            optimizer.step()
            for name, ratio in optimizer.trust_ratios().items():
                found[f"{t} {name} ratio"] = ratio.clone()
        full = optimizer.full_optimizer_state_dict()
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            found[f"{i} param"] = p.detach().clone()
            for name, value in full["state"].get(i, {}).items():
                found[f"{i} {name}"] = torch.as_tensor(value).clone()
        return found

    def _gradients(self, params: list[torch.nn.Parameter], t: int) -> None:
        draw = random.Random(self.seed * 100 + t)
        generator = torch.Generator().manual_seed(self.seed * 100 + t)
        for p in params:
            g = torch.randn(p.shape, generator=generator) * (self.loss_scale or 1.0)
            if t == self.skipped:
                g.fill_(float("inf"))
            if draw.random() < 0.2 and p is not params[0]:
                p.grad = None
            else:
                p.grad = torch.empty_like(p.detach()).copy_(g)


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> Iterable[tuple[str, float]]:
    """(name, largest difference of max|want|, in units of what its dtype rounds)."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    for name, b in want.items():
        a, b = got[name].double().cpu(), b.double().cpu()
        assert a.shape == b.shape, name
        assert torch.equal(a.isnan(), b.isnan()), name
        a, b = a.nan_to_num(), b.nan_to_num()
        scale = b.abs().max().clamp(min=1e-30) if b.numel() else torch.ones(())
        rounding = torch.finfo(want[name].dtype).eps
        yield name, float(((a - b).abs().max() if a.numel() else a.sum()) / scale / rounding)


def check(seed: int, device: str, **options: Any) -> float:
    """Lamb and ShardedLamb through Triton against the reference; the worst error."""
    case = Case(seed, device, **options)
    worst = 0.0
    for cls in (Lamb, ShardedLamb):
        found = errors(case.run(cls, "triton"), case.run(cls, "reference"))
        for name, error in found:
            # a float32 trust ratio of a small tensor is a quotient of small differences
            bound = 400 if name.endswith("ratio") else 40
            if "param" in name or "master" in name or "exp" in name:
                worst = max(worst, error)
            assert error <= bound, (seed, cls.__name__, name, error)
    return worst
