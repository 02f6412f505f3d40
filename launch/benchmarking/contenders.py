"""The optimizers that are compared, each made from the same params."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_lamb import Lamb, ShardedLamb

LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-6, 0.01


class EagerLoop(torch.optim.Optimizer):
    """LAMB written directly: a Python loop over tensors, some ten eager ops for each.

    For scale, and what most published implementations are. Keeps no masters.
    """

    def __init__(self, params: list[Tensor], max_grad_norm: float | None) -> None:
        super().__init__(params, {"lr": LR})
        self._max_grad_norm = max_grad_norm
        self._t = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self._t += 1
        (beta1, beta2), t = BETAS, self._t
        clip = None
        if self._max_grad_norm is not None:
            norms = [p.grad.norm() for p in self.param_groups[0]["params"]]
            clip = (self._max_grad_norm / torch.stack(norms).norm()).clamp(max=1.0)
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
            m, v = state["m"], state["v"]
            grad = p.grad if clip is None else p.grad * clip
            m.mul_(beta1).add_(grad, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            u = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + EPS) + WEIGHT_DECAY * p
            x_norm, u_norm = p.norm(), u.norm()
            ratio = torch.where((x_norm > 0) & (u_norm > 0), x_norm / u_norm, 1.0)
            p.sub_(LR * ratio * u)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """``make(params, max_grad_norm)`` returns an optimizer, or raises why it cannot run here."""

    name: str
    make: Callable[[list[Tensor], float | None], Any]
    #: bytes a step must move per param in float32, without clip
    nbytes: int = 40
    is_lamb: bool = True
    rule: str = "lamb"  # whose reference it must agree with
    #: how it stores its states, and the reference too
    formats: Mapping[str, str] = field(default_factory=dict)
    needs: str | None = None  # a module
    only_cuda: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    clips: tuple[float | None, ...] = (None, 1.0)

    def why_not(self, device: str, dtype: torch.dtype, clip: float | None) -> str | None:
        """Why this contender has no row for these settings; None if it has."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.only_cuda and device == "cpu":
            return "runs on CUDA only"
        if dtype not in self.dtypes:
            return f"does not do {dtype} params with float32 masters"
        if clip not in self.clips:
            return f"does not do max_grad_norm={clip}"
        return None

    def floor_nbytes(self, dtype: torch.dtype, clip: float | None) -> int:
        """Bytes per param: with half params the gradient is half, and the copy is written too."""
        half = dtype != torch.float32
        # two-pass: g,x,m,v read and m,v written; x,m,v read and x (and its copy) written
        return self.nbytes + (0 if clip is None else 2 if half else 4)


def _ours(
    cls: Any, impl: str, rule: str = "lamb", **formats: str
) -> Callable[[list[Tensor], float | None], Any]:
    options: dict[str, Any] = {"stage": 1} if cls is ShardedLamb else {}
    options |= {"rule": rule, **formats}

    def make(params: list[Tensor], max_grad_norm: float | None) -> Any:
        return cls(
            params, LR, BETAS, EPS, WEIGHT_DECAY, impl=impl, **options, max_grad_norm=max_grad_norm
        )

    return make


def _adamw(params: list[Tensor], _: float | None) -> Any:
    return torch.optim.AdamW(params, LR, BETAS, EPS, WEIGHT_DECAY, fused=True)


def peer(module: str, name: str, **more: Any) -> Callable[[list[Tensor], float | None], Any]:
    """Makes the LAMB class ``name`` of ``module`` with the options that all contenders share."""

    def make(params: list[Tensor], max_grad_norm: float | None) -> Any:
        cls = getattr(importlib.import_module(module), name)
        common = {"betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
        return cls(params, LR, **common, max_grad_norm=max_grad_norm, **more)

    return make


FLOAT32 = (torch.float32,)
#: Bytes a param that a step of each other rule must move, in float32 without clip: what its passes
#: read and write of g, x and the states.
RULE_NBYTES = {
    "lamb_outside": 40,
    "lamb_adagrad": 32,
    "lans": 48,
    "lars": 28,
    "adamh": 40,
    "stable_adamw": 36,
    "adamw": 28,
    "adagrad": 20,
}
#: (name, formats, dtypes, bytes a param that a step must move without clip)
FORMATS: list[tuple[str, dict[str, str], tuple[torch.dtype, ...], int]] = [
    ("bf16 states", {"state_format": "bfloat16"}, (torch.float32, torch.bfloat16), 28),
    ("nearest states", {"state_format": "bfloat16-nearest"}, (torch.float32,), 28),
    ("remainders", {"master": "remainder"}, (torch.bfloat16,), 38),
    (
        "all narrow",
        {"state_format": "bfloat16", "master": "remainder"},
        (torch.bfloat16,),
        26,
    ),
]
CONTENDERS = (
    Contender(name="eager loop", make=EagerLoop, dtypes=FLOAT32, nbytes=136),
    Contender(name="Lamb reference", make=_ours(Lamb, "reference"), nbytes=136),
    Contender(name="Lamb foreach", make=_ours(Lamb, "foreach"), nbytes=136),
    Contender(name="Lamb compiled", make=_ours(Lamb, "compiled")),
    Contender(name="Lamb triton", make=_ours(Lamb, "triton"), only_cuda=True),
    *(
        Contender(
            name=f"Lamb triton, {name}",
            make=_ours(Lamb, "triton", **formats),
            only_cuda=True,
            dtypes=dtypes,
            nbytes=nbytes,
            formats=formats,
        )
        for name, formats, dtypes, nbytes in FORMATS
    ),
    Contender(name="ShardedLamb compiled", make=_ours(ShardedLamb, "compiled"), nbytes=48),
    Contender(
        name="ShardedLamb triton", make=_ours(ShardedLamb, "triton"), only_cuda=True, nbytes=48
    ),
    Contender(
        name="timm Lamb",
        make=peer("timm.optim", "Lamb", always_adapt=True),
        needs="timm",
        dtypes=FLOAT32,
        clips=(None, 1.0),
        nbytes=136,
    ),
    # With max_grad_norm=0 or None apex clips to zero or fails: it always clips.
    Contender(
        name="apex FusedLAMB",
        make=peer("apex.optimizers", "FusedLAMB", use_nvlamb=True),
        needs="apex",
        only_cuda=True,
        dtypes=FLOAT32,
        clips=(1.0,),
        nbytes=52,
    ),
    Contender(
        name="torch AdamW fused",
        make=_adamw,
        nbytes=28,
        is_lamb=False,
        dtypes=FLOAT32,
        clips=(None,),
    ),
    *(
        Contender(
            name=f"{rule} triton",
            make=_ours(Lamb, "triton", rule),
            only_cuda=True,
            nbytes=nbytes,
            rule=rule,
            dtypes=FLOAT32,
            clips=(None,),
        )
        for rule, nbytes in RULE_NBYTES.items()
    ),
)
