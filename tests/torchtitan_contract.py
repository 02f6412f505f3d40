"""What torchtitan's OptimizersContainer (0.3) asks of an optimizer, for where it is not installed.

Groups with ``params``, ``param_names``, ``fused`` and ``foreach``; ``step()`` without a closure;
state made by a step of zero gradients at lr 0; state dicts of flat keys, by names of params.
"""

from __future__ import annotations

import re
import sys
import types
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn


@dataclass(kw_only=True)
class ParamGroupConfig:
    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)


class OptimizersContainer(torch.optim.Optimizer):
    @dataclass(kw_only=True, slots=True)
    class Config:
        param_groups: list[ParamGroupConfig] = field(default_factory=list)
        _owner: ClassVar[Any] = None

        def build(self, **kwargs: Any) -> Any:
            return self._owner(config=self, **kwargs)

    def __init_subclass__(cls) -> None:
        cls.Config._owner = cls

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        return getattr(torch.optim, name)

    def __init__(self, config: Any, *, model_parts: list[nn.Module]) -> None:
        self.optimizers = []
        for part in model_parts:
            left = dict(part.named_parameters())
            groups = []
            for wanted in config.param_groups:
                names = [name for name in left if re.search(wanted.pattern, name)]
                assert names, wanted.pattern
                group = {"params": [left.pop(n) for n in names], "param_names": names}
                group |= {"fused": True, "foreach": False, **wanted.optimizer_kwargs}
                groups.append(group)
            assert not left
            factory = self._resolve_optimizer_factory(config.param_groups[0].optimizer_name)
            self.optimizers.append(factory(groups))
        super().__init__([p for part in model_parts for p in part.parameters()], {})

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    @staticmethod
    def _make_state(optimizer: torch.optim.Optimizer) -> None:
        if optimizer.state:
            return
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step(closure=None)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        flat = {}
        for optimizer in self.optimizers:
            self._make_state(optimizer)
            saved = optimizer.state_dict()
            for group in saved["param_groups"]:
                for key, name in zip(group["params"], group["param_names"]):
                    flat |= {f"state.{name}.{k}": v for k, v in saved["state"][key].items()}
                    rest = {k: v for k, v in group.items() if k not in ("params", "param_names")}
                    flat |= {f"param_groups.{name}.{k}": v for k, v in rest.items()}
        return flat

    def load_state_dict(self, flat: dict[str, Any]) -> None:
        for optimizer in self.optimizers:
            self._make_state(optimizer)
            saved: dict[str, Any] = {"state": {}, "param_groups": []}
            for group in optimizer.param_groups:
                keys = range(len(saved["state"]), len(saved["state"]) + len(group["params"]))
                for key, name, p in zip(keys, group["param_names"], group["params"]):
                    saved["state"][key] = {k: flat[f"state.{name}.{k}"] for k in optimizer.state[p]}
                first = group["param_names"][0]
                rest = {k: flat[f"param_groups.{first}.{k}"] for k in group if "param" not in k}
                saved["param_groups"].append({"params": list(keys), **rest})
            optimizer.load_state_dict(saved)


def install() -> None:
    """Let ``import torchtitan.components.optimizer`` find this."""
    for name in ("torchtitan", "torchtitan.components", "torchtitan.components.optimizer"):
        sys.modules[name] = types.ModuleType(name)
    found: Any = sys.modules["torchtitan.components.optimizer"]
    found.OptimizersContainer, found.ParamGroupConfig = OptimizersContainer, ParamGroupConfig
