"""Learning rates of Lamb: tensors, numpy numbers and torch's schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from lamb_cases import Params, assert_same, everything, gradients, make_params, train
from numpy_lamb import NumpyLamb, relative_error, to_numpy
from torch import nn
from torch.optim import AdamW, Optimizer, lr_scheduler

from dist_lamb import Lamb


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr(impl: str, shape: tuple[int, ...]) -> None:
    params, other = make_params(), make_params()
    lr = torch.full(shape, 0.25)
    opt = Lamb(params.values(), lr=lr, impl=impl)
    number = Lamb(other.values(), lr=0.25, impl=impl)
    train(opt, params, 2)
    train(number, other, 2)
    assert opt.param_groups[0]["lr"] is lr
    assert_same(everything(opt, params), everything(number, other))
    lr.fill_(0.5)
    number.param_groups[0]["lr"] = 0.5
    train(opt, params, 1, 2)
    train(number, other, 1, 2)
    assert_same(everything(opt, params), everything(number, other))


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_numpy_numbers(kind: Callable[[float], Any]) -> None:
    """As from np.linspace over learning rates; torch's optimizers take them."""
    params, other = make_params(), make_params()
    train(Lamb(params.values(), lr=kind(0.25), weight_decay=kind(0.5)), params, 2)
    train(Lamb(other.values(), lr=0.25, weight_decay=0.5), other, 2)
    assert_same(params, other)


def test_tensor_lr_of_one_group_of_two() -> None:
    params, other = make_params(), make_params()

    def groups(of: Params, lr: Any) -> list[dict[str, Any]]:
        return [
            {"params": [of["weight"], of["bias"]], "lr": 0.25},
            {"params": [of["scale"], of["conv"]], "lr": lr},
        ]

    train(Lamb(groups(params, torch.tensor(0.125))), params, 3)
    train(Lamb(groups(other, 0.125)), other, 3)
    assert_same(params, other)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: (n + 1) / 4),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.7),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], gamma=0.5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "WarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=7),
    "Sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.5, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[3],
    ),
    "Chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, tensor_lr: bool) -> None:
    """Against a float64 replay with the lr (and betas) that torch's AdamW is given."""
    params = make_params()
    start = torch.tensor(0.1) if tensor_lr else 0.1
    opt = Lamb(params.items(), lr=start, weight_decay=0.1)
    witness = AdamW([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, expected = SCHEDULERS[name](opt), SCHEDULERS[name](witness)
    oracle = NumpyLamb(to_numpy(params), [(list(params), {"weight_decay": 0.1})])
    lrs = []
    for step in range(6):
        lrs.append(witness.param_groups[0]["lr"])
        for options in oracle.options.values():
            options.update(lr=lrs[-1], betas=witness.param_groups[0]["betas"])
        train(opt, params, 1, step)
        oracle.step(to_numpy(gradients(params, step)))
        witness.step()
        for s in (scheduler, expected):
            s.step(*((1.0,) if name == "ReduceLROnPlateau" else ()))
    assert len(set(lrs)) > 1
    if tensor_lr:
        assert opt.param_groups[0]["lr"] is start
    for key, p in params.items():
        assert relative_error(p, oracle.x[key]) <= 1e-5
