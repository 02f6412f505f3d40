"""Adam's moments, on which most of the rules stand. arXiv 1412.6980; amsgrad arXiv 1904.09237.

::

    g   <- g + wd * x                              gradient()    where decay is L2
    m   <- b1 * m + b3 * g                         update()      b3 = 1 - b1, or 1
    v   <- b2 * v + (1 - b2) * g^2
    r    = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)       direction()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from .ops import Array, div, maximum, sqrt
from .rule import Rule
from .trust import adapts, bias_correction

#: Names of the states, and what they hold.
STATES = {"exp_avg": "mean of g", "exp_avg_sq": "mean of g^2"}
AMSGRAD_STATES = {**STATES, "max_exp_avg_sq": "maximum of exp_avg_sq"}
OPTIONS: dict[str, Any] = {
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.01,
    "bias_correction": True,
}
#: How the trust ratio is formed from two norms.
TRUST_OPTIONS: dict[str, Any] = {"adapt": "all", "trust_clip": None, "phi": None}


class Hyperparameters(NamedTuple):
    """The options as numbers: of one group, or float64 tensors, one number a param."""

    lr: Array
    beta1: Array
    log_beta1: Array
    beta2: Array
    log_beta2: Array
    beta3: Array
    eps: Array
    decay: Array  # weight decay where it is decoupled ...
    l2: Array  # ... or added to the gradient; the other one is 0
    corrected: Array  # 1 where the moments are bias-corrected
    adapt: Array  # 1 where the trust ratio is applied
    trust_lo: Array
    trust_hi: Array
    phi_lo: Array
    phi_hi: Array
    decay_first: Array  # 1 where the trust ratio sees the decayed param


class Coefficients(NamedTuple):
    """Per-parameter numbers of one step, in the dtype of the state."""

    l2: Array  # None where the host knows it to change nothing
    beta1: Array
    beta3: Array
    beta2: Array
    beta4: Array  # 1 - beta2
    correction1: Array  # 1 / (1 - beta1^t)
    correction2: Array  # 1 / (1 - beta2^t)
    eps: Array
    decay: Array


#: With a zero gradient these keep m and v bit for bit, and r finite even where eps is 0.
IDLE = Coefficients(0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0)


def log2(beta: float) -> float:
    return math.log2(beta) if beta else -math.inf  # then 1 - exp2(t * log) is 1


def hyperparameters(group: Mapping[str, Any]) -> Hyperparameters:
    """A parameter group as one row; a tensor lr on a device is filled in later."""
    inf = float("inf")
    beta1, beta2 = group["betas"]
    wd = group["weight_decay"]
    trust_lo, trust_hi = group["trust_clip"] or (0.0, inf)
    phi_lo, phi_hi = group["phi"] or (0.0, inf)
    return Hyperparameters(
        lr=group["lr"],
        beta1=beta1,
        log_beta1=log2(beta1),
        beta2=beta2,
        log_beta2=log2(beta2),
        beta3=1.0 - beta1 if group["grad_averaging"] else 1.0,
        # 0 / 0 must be 0: padding of a tile has no moments, and its NaN would spread by the norm.
        eps=group["eps"] or 1e-30,
        decay=wd if group["decoupled"] else 0.0,
        l2=0.0 if group["decoupled"] else wd,
        corrected=float(group["bias_correction"]),
        adapt=float(adapts(group)),
        trust_lo=trust_lo,
        trust_hi=trust_hi,
        phi_lo=phi_lo,
        phi_hi=phi_hi,
        decay_first=float(group.get("decay_first", False)),
    )


def coefficients(h: Hyperparameters, t: Array, early: Array) -> Coefficients:
    return Coefficients(
        l2=h.l2,
        beta1=h.beta1,
        beta3=h.beta3,
        beta2=h.beta2,
        beta4=1.0 - h.beta2,
        correction1=bias_correction(h.beta1, h.log_beta1, h.corrected, t),
        correction2=bias_correction(h.beta2, h.log_beta2, h.corrected, t),
        eps=h.eps,
        decay=h.decay,
    )


def gradient(g: Array, x: Array, c: Coefficients) -> Array:
    # g <- g + wd * x
    if c.l2 is not None:
        g = g + x * c.l2
    return g


def update(g: Array, x: Array, states: Array, c: Coefficients) -> Array:
    # m <- b1 * m + b3 * g
    m = states[0] * c.beta1 + g * c.beta3
    # v <- b2 * v + (1 - b2) * g^2
    v = states[1] * c.beta2 + g * g * c.beta4
    return m, v


def direction(m: Array, v: Array, c: Coefficients) -> Array:
    # r = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    return div(m * c.correction1, sqrt(v * c.correction2) + c.eps)


def amsgrad_update(g: Array, x: Array, states: Array, c: Coefficients) -> Array:
    m, v = update(g, x, states, c)
    return m, v, maximum(states[2], v)


def with_amsgrad(rule: Rule, directions: Callable[..., Array]) -> Rule:
    """``rule`` dividing by the largest v so far."""
    return replace(
        rule, states=AMSGRAD_STATES, update=amsgrad_update, directions=directions, amsgrad=None
    )


def directions(g: Array, x: Array, states: Array, c: Coefficients) -> Array:
    # u = r
    return (direction(states[0], states[1], c),)


def amsgrad_directions(g: Array, x: Array, states: Array, c: Coefficients) -> Array:
    return (direction(states[0], states[2], c),)
