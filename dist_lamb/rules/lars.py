"""LARS, arXiv 1708.03888, momentum SGD with one learning rate a tensor.

As in timm 1.0 (``lars``), whose denominator is the paper's::

    rho  = tc * ||x|| / (||g|| + wd * ||x|| + eps)         1 where ||x|| = 0 or ||g|| = 0
    B   <- mu * B + rho * (g + wd * x)
    x   <- x - lr * B                                      nesterov: rho * (g + wd * x) + mu * B

As in optax 0.2 (``lars_optax``), where lr enters the momentum, as in the paper. They part as soon
as lr changes::

    rho  = tc * ||x|| / (||g + wd * x|| + eps)             1 where ||x|| = 0 or the other norm is
    B   <- mu * B + lr * rho * (g + wd * x)
    x   <- x - B

All norms are known before the momentum is updated, so there are no late sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from .ops import Array, sqrt, where
from .rule import EARLY, Rule
from .trust import adapts


class Hyperparameters(NamedTuple):
    lr: Array
    momentum: Array
    nesterov: Array
    trust_coefficient: Array
    eps: Array
    decay: Array
    adapt: Array
    larc: Array


class Coefficients(NamedTuple):
    decay: Array
    rate: Array  # rho, with lr where it enters the momentum
    momentum: Array
    kept: Array  # what the direction has of B ...
    new: Array  # ... and of the last term of B


def hyperparameters(group: Mapping[str, Any]) -> Hyperparameters:
    return Hyperparameters(
        lr=group["lr"],
        momentum=group["momentum"],
        nesterov=float(group["nesterov"]),
        trust_coefficient=group["trust_coefficient"],
        eps=group["eps"],
        decay=group["weight_decay"],
        adapt=float(adapts(group)),
        larc=float(group.get("larc", False)),
    )


def problem(group: Mapping[str, Any]) -> str | None:
    if not 0.0 <= group["momentum"] < 1.0:
        return f"Invalid momentum value: {group['momentum']!r}"
    if not group["trust_coefficient"] > 0.0:
        return f"Invalid trust_coefficient value: {group['trust_coefficient']!r}"
    if group["nesterov"] and not group["momentum"]:
        return "Nesterov momentum requires a momentum"
    return None


def adapted_ratio(h: Hyperparameters, x_norm: Array, denominator: Array, zero: Array) -> Array:
    rho = h.trust_coefficient * x_norm / (denominator + h.eps)
    rho = where((x_norm == 0) | zero, 1.0, rho)
    # LARC: the step of no tensor is longer than lr alone would make it
    clipped = rho / where(h.lr == 0, 1.0, h.lr)
    rho = where(h.larc > 0, where(clipped > 1.0, 1.0, clipped), rho)
    return where(h.adapt == 0, 1.0, rho)


def timm_ratio(h: Hyperparameters, early: Array) -> Array:
    x_norm, g_norm = sqrt(early[0]), sqrt(early[2])
    return adapted_ratio(h, x_norm, g_norm + h.decay * x_norm, g_norm == 0)


def optax_ratio(h: Hyperparameters, early: Array) -> Array:
    x_sq, xg, g_sq = early
    # ||g + wd * x||^2
    u_sq = g_sq + 2.0 * h.decay * xg + h.decay * h.decay * x_sq
    u_norm = sqrt(where(u_sq < 0.0, 0.0, u_sq))
    return adapted_ratio(h, sqrt(x_sq), u_norm, u_norm == 0)


def with_rate(h: Hyperparameters, rate: Array) -> Coefficients:
    return Coefficients(
        decay=h.decay,
        rate=rate,
        momentum=h.momentum,
        kept=where(h.nesterov > 0, h.momentum, 1.0),
        new=h.nesterov,
    )


def coefficients(h: Hyperparameters, t: Array, early: Array) -> Coefficients:
    return with_rate(h, timm_ratio(h, early))


def optax_coefficients(h: Hyperparameters, t: Array, early: Array) -> Coefficients:
    return with_rate(h, h.lr * optax_ratio(h, early))


def gradient(g: Array, x: Array, c: Coefficients) -> Array:
    # rho * (g + wd * x)
    return (x * c.decay + g) * c.rate


def update(g: Array, x: Array, states: Array, c: Coefficients) -> Array:
    # B <- mu * B + rho * (g + wd * x)
    return (states[0] * c.momentum + g,)


def directions(g: Array, x: Array, states: Array, c: Coefficients) -> Array:
    return (states[0] * c.kept + g * c.new,)


def scales(h: Hyperparameters, t: Array, early: Array, late: Array, numel: Array) -> Array:
    return timm_ratio(h, early), 0.0, h.lr


def optax_scales(h: Hyperparameters, t: Array, early: Array, late: Array, numel: Array) -> Array:
    return optax_ratio(h, early), 0.0, 1.0


LARS = Rule(
    name="lars",
    states={"momentum_buffer": "sum of rho * (g + wd * x)"},
    options={
        "eps": 1e-6,
        "weight_decay": 0.01,
        "momentum": 0.9,
        "nesterov": False,
        "trust_coefficient": 0.001,
        "adapt": "all",
        "larc": False,
    },
    hyperparameters=hyperparameters,
    h=Hyperparameters,
    coefficients=coefficients,
    idle=Coefficients(decay=0.0, rate=0.0, momentum=1.0, kept=1.0, new=0.0),
    gradient=gradient,
    update=update,
    directions=directions,
    early=EARLY,
    scales=scales,
    reads_grad=True,
    problem=problem,
)
LARS_OPTAX = replace(
    LARS,
    name="lars_optax",
    states={"momentum_buffer": "sum of lr * rho * (g + wd * x)"},
    options={name: value for name, value in LARS.options.items() if name != "larc"},
    coefficients=optax_coefficients,
    scales=optax_scales,
)
