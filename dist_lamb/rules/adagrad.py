"""Adagrad (Duchi et al., JMLR 12, 2011) as torch.optim.Adagrad, and under LAMB's trust ratio.

::

    g   <- g + wd * x                                gradient()    adagrad alone
    s   <- s + g^2                                   update()      s starts at the option
    r    = g / (sqrt(s) + eps)                       directions()  g is read in both passes
    x   <- x - lr / (1 + (t - 1) * lr_decay) * r                   adagrad
    x   <- x - lr * ||x|| / ||u|| * u,  u = r + wd * x             lamb_adagrad
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from . import adam, lamb
from .ops import Array, div, sqrt, where
from .rule import Rule
from .trust import adapts, trust_ratio


class Hyperparameters(NamedTuple):
    lr: Array
    eps: Array
    l2: Array  # weight decay of adagrad ...
    decay: Array  # ... and of lamb_adagrad
    start: Array
    lr_decay: Array
    adapt: Array
    trust_lo: Array
    trust_hi: Array
    phi_lo: Array
    phi_hi: Array


class Coefficients(NamedTuple):
    l2: Array
    decay: Array
    start: Array  # what s begins with, at the first step
    eps: Array


def hyperparameters(group: Mapping[str, Any]) -> Hyperparameters:
    inside = group["rule"] == "lamb_adagrad"
    trust_lo, trust_hi = group["trust_clip"] or (0.0, float("inf"))
    phi_lo, phi_hi = group["phi"] or (0.0, float("inf"))
    return Hyperparameters(
        lr=group["lr"],
        eps=group["eps"] or 1e-30,
        l2=0.0 if inside else group["weight_decay"],
        decay=group["weight_decay"] if inside else 0.0,
        start=group["initial_accumulator_value"],
        lr_decay=group.get("lr_decay", 0.0),
        adapt=float(adapts(group)),
        trust_lo=trust_lo,
        trust_hi=trust_hi,
        phi_lo=phi_lo,
        phi_hi=phi_hi,
    )


def problem(group: Mapping[str, Any]) -> str | None:
    for name in ("initial_accumulator_value", "lr_decay"):
        if group.get(name, 0.0) < 0.0:
            return f"Invalid {name} value: {group[name]!r}"
    return None


def coefficients(h: Hyperparameters, t: Array, early: Array) -> Coefficients:
    return Coefficients(l2=h.l2, decay=h.decay, start=where(t == 1.0, h.start, 0.0), eps=h.eps)


def update(g: Array, x: Array, states: Array, c: Coefficients) -> Array:
    # s <- s + g^2
    return (states[0] + c.start + g * g,)


def directions(g: Array, x: Array, states: Array, c: Coefficients) -> Array:
    # r = g / (sqrt(s) + eps)
    return (div(g, sqrt(states[0]) + c.eps),)


def scales(h: Hyperparameters, t: Array, early: Array, late: Array, numel: Array) -> Array:
    return 1.0, 0.0, h.lr / (1.0 + (t - 1.0) * h.lr_decay)


ADAGRAD = Rule(
    name="adagrad",
    states={"sum": "sum of g^2"},
    options={
        "eps": 1e-6,
        "weight_decay": 0.01,
        "lr_decay": 0.0,
        "initial_accumulator_value": 0.0,
    },
    hyperparameters=hyperparameters,
    h=Hyperparameters,
    coefficients=coefficients,
    idle=Coefficients(l2=0.0, decay=0.0, start=0.0, eps=1.0),
    gradient=adam.gradient,
    update=update,
    directions=directions,
    scales=scales,
    reads_grad=True,
    problem=problem,
)


def decayed_directions(g: Array, x: Array, states: Array, c: Coefficients) -> Array:
    # u = g / (sqrt(s) + eps) + wd * x
    return (div(g, sqrt(states[0]) + c.eps) + x * c.decay,)


def trust_scales(h: Hyperparameters, t: Array, early: Array, late: Array, numel: Array) -> Array:
    rho = trust_ratio(late[0], late[1], h)
    return rho, 0.0, h.lr * rho


LAMB_ADAGRAD = replace(
    ADAGRAD,
    name="lamb_adagrad",
    options={
        "eps": 1e-6,
        "weight_decay": 0.01,
        "initial_accumulator_value": 0.0,
        **adam.TRUST_OPTIONS,
    },
    directions=decayed_directions,
    late=("x.x", "u.u"),
    sums=lamb.sums,
    scales=trust_scales,
)
