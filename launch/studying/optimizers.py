"""The optimizers of a study, by name: each clips the whole gradient itself, and reads its lr from a
tensor, so that a captured CUDA graph follows the schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dist_lamb import Lamb, param_groups


@dataclass(frozen=True)
class OptimizerOptions:
    """What every optimizer of a study is made with; ``lr`` is a 0-d tensor beside the params."""

    lr: Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_grad_norm: float


class ClippedAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW``, fused, after ``clip_grad_norm_``; no sync with the device."""

    def __init__(self, groups: Any, options: OptimizerOptions) -> None:
        super().__init__(
            groups,
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            fused=True,
            capturable=options.lr.is_cuda,
        )
        self._max_grad_norm = options.max_grad_norm

    def step(self, closure: Any = None) -> Any:
        params = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(params, self._max_grad_norm, foreach=True)
        return super().step(closure)


def _adamw(named: Sequence[tuple[str, Tensor]], options: OptimizerOptions) -> ClippedAdamW:
    # The same groups as LAMB's: biases and normalisation weights do not decay.
    groups = [
        {**group, "params": [p for _, p in group["params"]]}
        for group in param_groups(named, options.weight_decay)
    ]
    return ClippedAdamW(groups, options)


def _lamb(named: Sequence[tuple[str, Tensor]], options: OptimizerOptions, **more: Any) -> Lamb:
    """``adapt="decayed"`` is NVIDIA's recipe: biases and normalisation weights take Adam's step."""
    groups = param_groups(named, options.weight_decay)
    return _made(groups, options, adapt="decayed", **more)


def _adamh(named: Sequence[tuple[str, Tensor]], options: OptimizerOptions) -> Lamb:
    """No decay; biases and normalisation weights take Adam's step at the same lr, as LAMB's do."""
    groups = param_groups(named, weight_decay=1.0)
    for group in groups:
        group["rule"] = "adamh" if group["weight_decay"] else "adamw"
        group["weight_decay"] = 0.0
    return _made(groups, options)


def _made(groups: list[dict[str, Any]], options: OptimizerOptions, **more: Any) -> Lamb:
    return Lamb(
        groups,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        max_grad_norm=options.max_grad_norm,
        capturable=options.lr.is_cuda,
        # Compiling takes longer than a small model's whole run on a CPU.
        impl="auto" if options.lr.is_cuda else "foreach",
        **more,
    )


Factory = Callable[[Sequence[tuple[str, Tensor]], OptimizerOptions], torch.optim.Optimizer]

#: name in a study's file -> factory; another rule is one more line
OPTIMIZERS: dict[str, Factory] = {
    "adamw": _adamw,
    "lamb": _lamb,
    "adamh": _adamh,
    "lamb-bfloat16": partial(_lamb, state_format="bfloat16"),
    "lamb-nearest": partial(_lamb, state_format="bfloat16-nearest"),
    "lamb-remainder": partial(_lamb, state_format="bfloat16", master="remainder"),
}
#: those whose weights are bfloat16; all others' are float32
BFLOAT16_WEIGHTS = {"lamb-remainder"}
