"""Training and whole state of an optimizer, sharded or not: shared by tests on ranks."""

from __future__ import annotations

from typing import Any

import models
from torch import Tensor

OPTIONS: dict[str, Any] = {"lr": 0.02, "max_grad_norm": 1.0}
STEPS = 5
#: fc.weight is without gradient everywhere at step 1, tile.weight at every step.
ABSENT = {1: ("fc.weight", "tile.weight")}


def train(
    optimizer: Any, params: dict[str, Tensor], rank: int, world: int, steps: range = range(STEPS)
) -> None:
    for t in steps:
        mean = models.mean_gradients(params, t, ABSENT.get(t, ("tile.weight",)))
        for name, g in models.rank_gradients(mean, rank, world, t).items():
            params[name].grad = g
        # one rank alone has no gradient for norm.weight: it counts as zero there, so the others
        # must carry its share for the mean to stay what it is
        if world > 1 and "norm.weight" in mean:
            params["norm.weight"].grad = mean["norm.weight"] * world if rank == 1 else None
        optimizer.step()
        optimizer.zero_grad()


def state_of(optimizer: Any) -> dict[str, Tensor]:
    """Whole state tensors, by '<param> <state>'."""
    full = optimizer.full_optimizer_state_dict()
    names = [n for group in full["param_groups"] for n in group["param_names"]]
    ids = [i for group in full["param_groups"] for i in group["params"]]
    return {
        f"{name} {key}": value.clone()
        for name, i in zip(names, ids)
        for key, value in full["state"].get(i, {}).items()
    }
