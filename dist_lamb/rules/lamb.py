"""LAMB, arXiv 1904.00962 version 5, Algorithm 2, and LAMB with decay outside of the ratio.

With r from :mod:`dist_lamb.rules.adam`::

    u    = r + wd * x                                directions()
    rho  = phi(||x||) / ||u||                        scales()     1 where either norm is 0
    x   <- x - lr * rho * u

``lamb_outside``, an AdamW update under the trust ratio (optax's chain of scale_by_trust_ratio and
add_decayed_weights)::

    u    = r
    x   <- x - lr * (rho * r + wd * x)

timm's ``decoupled_decay`` decays first, so that ||x|| is that of the decayed param
(``decay_first=True``).
"""

from __future__ import annotations

from dataclasses import replace

from . import adam
from .adam import Coefficients, Hyperparameters, direction
from .ops import Array, where
from .rule import Rule
from .trust import trust_ratio


def directions(g: Array, x: Array, states: Array, c: Coefficients) -> Array:
    # u = r + wd * x
    return (direction(states[0], states[1], c) + x * c.decay,)


def amsgrad_directions(g: Array, x: Array, states: Array, c: Coefficients) -> Array:
    return (direction(states[0], states[2], c) + x * c.decay,)


def sums(g: Array, x: Array, states: Array, u: Array, c: Coefficients) -> Array:
    return (x, x), (u[0], u[0])


def scales(h: Hyperparameters, t: Array, early: Array, late: Array, numel: Array) -> Array:
    # x <- x - lr * rho * u
    rho = trust_ratio(late[0], late[1], h)
    return rho, 0.0, h.lr * rho


LAMB = Rule(
    name="lamb",
    states=adam.STATES,
    options={**adam.OPTIONS, **adam.TRUST_OPTIONS, "grad_averaging": True, "decoupled": True},
    hyperparameters=adam.hyperparameters,
    h=Hyperparameters,
    coefficients=adam.coefficients,
    idle=adam.IDLE,
    gradient=adam.gradient,
    update=adam.update,
    directions=directions,
    late=("x.x", "u.u"),
    sums=sums,
    scales=scales,
)
LAMB = replace(LAMB, amsgrad=adam.with_amsgrad(LAMB, amsgrad_directions))


def outside_scales(h: Hyperparameters, t: Array, early: Array, late: Array, numel: Array) -> Array:
    # x <- x - lr * (rho * r + wd * x), or with y = (1 - lr * wd) * x:  x <- y - lr * rho(y) * r
    shrink = h.lr * h.decay
    kept = where(h.decay_first > 0, 1.0 - shrink, 1.0)
    rho = trust_ratio(late[0] * kept * kept, late[1], h)
    return rho, shrink, h.lr * rho


LAMB_OUTSIDE = replace(
    LAMB,
    name="lamb_outside",
    options={
        **adam.OPTIONS,
        **adam.TRUST_OPTIONS,
        "grad_averaging": True,
        "decay_first": False,
    },
    directions=adam.directions,
    scales=outside_scales,
    shrinks=True,
)
LAMB_OUTSIDE = replace(
    LAMB_OUTSIDE, amsgrad=adam.with_amsgrad(LAMB_OUTSIDE, adam.amsgrad_directions)
)
