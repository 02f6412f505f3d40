"""The interface of an engine, and the part that most engines share."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from dist_lamb import Lamb, ShardedLamb, param_groups
from dist_lamb.param_groups import ParamGroups
from pretraining.config import OptimConfig


def groups_of(model: nn.Module, optim: OptimConfig) -> ParamGroups:
    """The matrices of a model, and its biases and normalization weights, which do not decay."""
    groups = param_groups(model, weight_decay=1.0)
    for group in groups:
        matrices = group["weight_decay"] > 0
        group["weight_decay"] = optim.weight_decay * matrices
        if optim.rule == "adamh":
            # It keeps norms as they are: a bias that is 0 would stay 0.
            group.update({"rule": "adamh", "weight_decay": 0.0} if matrices else {"rule": "adamw"})
        elif "weight_decay" in optim.unused():
            del group["weight_decay"]
    return groups


class Engine(Protocol):
    """A model and its optimizer on all ranks. Every method is called by every rank."""

    model: nn.Module
    """To be called as ``model(input_ids, positions, labels)``."""
    optimizer: Optimizer
    """Its lr is set by the schedule."""

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of one micro-batch; ``last`` of its step or not."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, a scalar that is this rank's share of the global mean
        times the number of ranks."""

    def step(self) -> None:
        """Update the parameters and clear the gradients."""

    def trust_ratios(self) -> dict[str, Tensor]:
        """Trust ratio of each adapted parameter in the last step, by name; 0-d, on the device."""

    def grad_norm(self) -> Tensor | None:
        """Global L2 norm of the last step's gradients before clipping, a new 0-d tensor on the
        device; None where it is not known."""

    def skipped_steps(self) -> Tensor:
        """How many steps were skipped so far, the same on all ranks; a new 0-d tensor, on the
        device."""

    def checkpointed(self) -> tuple[nn.Module, Lamb | ShardedLamb]:
        """What ``dist_lamb.checkpoint`` saves, or loads into."""

    def before_save(self) -> None:
        """Bring :meth:`checkpointed` up to date."""

    def after_load(self) -> None:
        """Take over what was loaded into :meth:`checkpointed`."""


class PlainEngine:
    """An engine whose optimizer is dist_lamb's and is stepped directly."""

    model: nn.Module
    optimizer: Lamb | ShardedLamb

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def trust_ratios(self) -> dict[str, Tensor]:
        return self.optimizer.trust_ratios()

    def grad_norm(self) -> Tensor | None:
        return self.optimizer.grad_norm()

    def skipped_steps(self) -> Tensor:
        return self.optimizer.skipped_steps()

    def checkpointed(self) -> tuple[nn.Module, Lamb | ShardedLamb]:
        return self.model, self.optimizer

    def before_save(self) -> None:
        pass

    def after_load(self) -> None:
        pass
