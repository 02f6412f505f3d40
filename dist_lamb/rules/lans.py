"""LANS, arXiv 2006.13484, as its authors' program in NVIDIA/apex PR 1362.

::

    g   <- g / (||g|| + eps)                         gradient()   each tensor by itself
    m, v from g as in Adam
    d    = sqrt(v / (1 - b2^t)) + eps
    p    = (m / (1 - b1^t)) / d + wd * x             directions()
    q    = g / d + wd * x
    x   <- x - lr * (b1 * ||x|| / ||p|| * p + b3 * ||x|| / ||q|| * q)
"""

from __future__ import annotations

from typing import NamedTuple

from . import adam
from .adam import Hyperparameters
from .ops import Array, div, sqrt
from .rule import Rule
from .trust import bias_correction, trust_ratio


class Coefficients(NamedTuple):
    factor: Array  # 1 / (||g|| + eps)
    beta1: Array
    beta3: Array
    beta2: Array
    beta4: Array  # 1 - beta2
    correction1: Array  # 1 / (1 - beta1^t)
    correction2: Array  # 1 / (1 - beta2^t)
    eps: Array
    decay: Array


def coefficients(h: Hyperparameters, t: Array, early: Array) -> Coefficients:
    return Coefficients(
        factor=1.0 / (sqrt(early[0]) + h.eps),
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
    # g <- g / (||g|| + eps)
    return g * c.factor


def directions(g: Array, x: Array, states: Array, c: Coefficients) -> Array:
    # d = sqrt(v / (1 - b2^t)) + eps
    d = sqrt(states[1] * c.correction2) + c.eps
    decay = x * c.decay
    # p = (m / (1 - b1^t)) / d + wd * x;  q = g / d + wd * x
    return div(states[0] * c.correction1, d) + decay, div(g, d) + decay


def sums(g: Array, x: Array, states: Array, u: Array, c: Coefficients) -> Array:
    return (x, x), (u[0], u[0]), (u[1], u[1])


def scales(h: Hyperparameters, t: Array, early: Array, late: Array, numel: Array) -> Array:
    p_ratio = trust_ratio(late[0], late[1], h)
    q_ratio = trust_ratio(late[0], late[2], h)
    return p_ratio, 0.0, h.lr * h.beta1 * p_ratio, h.lr * h.beta3 * q_ratio


LANS = Rule(
    name="lans",
    states={"exp_avg": "mean of g / ||g||", "exp_avg_sq": "mean of (g / ||g||)^2"},
    options={**adam.OPTIONS, **adam.TRUST_OPTIONS, "grad_averaging": True},
    hyperparameters=adam.hyperparameters,
    h=Hyperparameters,
    coefficients=coefficients,
    idle=Coefficients(1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0),
    gradient=gradient,
    update=adam.update,
    directions=directions,
    num_directions=2,
    early=("g.g",),
    late=("x.x", "p.p", "q.q"),
    sums=sums,
    scales=scales,
    reads_grad=True,
)
