"""AdamH (Hyperball), arXiv 2606.16899: matrices keep their Frobenius norm, lr is a relative step.

::

    y  = x - lr * R / ||r|| * r                    R = ||x||, as it is now
    x <- R * y / ||y||

No weight decay. From sums over x and r alone::

    ||y||^2 = x.x - 2 s x.r + s^2 r.r              s = lr * R / ||r||
"""

from __future__ import annotations

from . import adam
from .adam import Coefficients, Hyperparameters
from .ops import Array, sqrt, where
from .rule import Rule


def sums(g: Array, x: Array, states: Array, u: Array, c: Coefficients) -> Array:
    return (x, x), (u[0], u[0]), (x, u[0])


def scales(h: Hyperparameters, t: Array, early: Array, late: Array, numel: Array) -> Array:
    x_sq, u_sq, xu = late
    radius, u_norm = sqrt(x_sq), sqrt(u_sq)
    ratio = radius / where(u_norm < 1e-10, 1e-10, u_norm)
    s = h.lr * ratio
    y_sq = x_sq - 2.0 * s * xu + s * s * u_sq
    # A zero tensor would give NaN: it could never move, and is refused before its first step.
    kept = radius / sqrt(y_sq)
    return ratio, 1.0 - kept, s * kept


ADAMH = Rule(
    name="adamh",
    states=adam.STATES,
    options={n: v for n, v in adam.OPTIONS.items() if n != "weight_decay"},
    hyperparameters=adam.hyperparameters,
    h=Hyperparameters,
    coefficients=adam.coefficients,
    idle=adam.IDLE,
    update=adam.update,
    directions=adam.directions,
    late=("x.x", "u.u", "x.u"),
    sums=sums,
    scales=scales,
    shrinks=True,
    zeros=(
        "under this rule a tensor keeps its norm and could never move; put it into a group with "
        "rule='adamw', or initialize it"
    ),
)
