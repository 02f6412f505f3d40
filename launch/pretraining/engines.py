"""How gradients and optimizer state are spread over ranks: one class an engine, one registry.

The training loop knows an engine only through ``Engine``. A new one is a class here, a line in
``ENGINES`` and its name in ``OptimConfig.engine``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from dist_lamb import ShardedLamb, param_groups
from pretraining.config import OptimConfig


class Engine(Protocol):
    """A model and its optimizer on all ranks. Every method is called by every rank."""

    model: nn.Module
    """To be called as ``model(input_ids, positions, labels)``."""
    optimizer: Optimizer
    """What the lr schedule drives."""

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one micro-batch; ``last`` of its step or not."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, a scalar that is this rank's share of the global mean
        times the number of ranks."""

    def step(self) -> None:
        """Update the parameters and clear the gradients."""

    def trust_ratios(self) -> dict[str, Tensor]:
        """Trust ratio of each adapted parameter in the last step, by name; 0-d, on the device."""

    def model_state_dict(self) -> dict[str, Any]:
        """The whole model, with the names of ``PretrainBert``."""

    def optimizer_state_dict(self) -> dict[str, Any]:
        """The whole optimizer state in torch's format, the same on every rank."""

    def load_state_dicts(self, model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
        """Take over what the two methods above returned, at any number of ranks."""


class ShardedEngine:
    """``dist_lamb.ShardedLamb``: gradients are averaged inside backward, state is sharded."""

    def __init__(self, model: nn.Module, optim: OptimConfig, lr: float) -> None:
        self.model = model
        self.optimizer = ShardedLamb(
            param_groups(model, weight_decay=optim.weight_decay),
            lr=lr,
            betas=optim.betas,
            eps=optim.eps,
            max_grad_norm=optim.max_grad_norm or None,
            adapt=optim.adapt,
            stage=optim.stage,
        )

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self.optimizer.no_sync()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def trust_ratios(self) -> dict[str, Tensor]:
        return self.optimizer.trust_ratios()

    def model_state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def optimizer_state_dict(self) -> dict[str, Any]:
        return self.optimizer.full_optimizer_state_dict()

    def load_state_dicts(self, model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(dict(optimizer))


ENGINES: dict[str, Callable[[nn.Module, OptimConfig, float], Engine]] = {
    "sharded": ShardedEngine,
}


def build_engine(model: nn.Module, optim: OptimConfig, lr: float) -> Engine:
    """The engine named by ``optim.engine``, around a model that is already on its device."""
    return ENGINES[optim.engine](model, optim, lr)
