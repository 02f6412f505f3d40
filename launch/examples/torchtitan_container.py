"""torchtitan: an OptimizersContainer that knows Lamb, for models under FSDP2, HSDP and TP.

In a torchtitan config registry, ``optimizer=lamb(lr=2e-3)`` in the place of ``default_adamw(...)``.
Gradient clipping stays torchtitan's (``training.max_norm``), which looks at all model parts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from dist_lamb import Lamb


class LambContainer(OptimizersContainer):
    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        return Lamb if name == "Lamb" else OptimizersContainer._resolve_optimizer_factory(name)


def lamb(lr: float, weight_decay: float = 0.01, **options: Any) -> LambContainer.Config:
    """Biases and norm weights do not decay; the first pattern that a name matches counts."""
    decays = {r"(norm[^.]*\.weight|bias)$": 0.0, r".*": weight_decay}
    groups = [
        ParamGroupConfig(
            pattern=pattern,
            optimizer_name="Lamb",
            optimizer_kwargs={"lr": lr, "weight_decay": decay, **options},
        )
        for pattern, decay in decays.items()
    ]
    return LambContainer.Config(param_groups=groups)


def main(steps: int = 40) -> tuple[list[float], OptimizersContainer]:
    """As torchtitan's trainer calls it, without the rest of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    teacher, losses = torch.randn(32, 10), []
    optimizers = lamb(lr=2e-2).build(model_parts=[model])
    for _ in range(steps):
        optimizers.zero_grad()
        x = torch.randn(64, 32)
        loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1))
        loss.backward()
        optimizers.step()
        losses.append(loss.item())
    return losses, optimizers
