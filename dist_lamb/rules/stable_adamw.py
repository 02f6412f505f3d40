"""StableAdamW, arXiv 2304.13013: AdamW whose lr is clipped by the tensor's update RMS.

::

    rms = sqrt(mean(g^2 / max(v / (1 - b2^t), eps^2)))         v with this step's g
    l   = lr / max(1, rms)
    x  <- x - l * (r + wd * x)
"""

from __future__ import annotations

from . import adam
from .adam import Coefficients, Hyperparameters
from .ops import Array, div, maximum, sqrt, where
from .rule import Rule


def sums(g: Array, x: Array, states: Array, u: Array, c: Coefficients) -> Array:
    ratio = div(g, maximum(sqrt(states[1] * c.correction2), c.eps))
    return ((ratio, ratio),)


def scales(h: Hyperparameters, t: Array, early: Array, late: Array, numel: Array) -> Array:
    rms = sqrt(late[0] / numel)
    ratio = 1.0 / where(rms < 1.0, 1.0, rms)
    return ratio, h.lr * ratio * h.decay, h.lr * ratio


STABLE_ADAMW = Rule(
    name="stable_adamw",
    states=adam.STATES,
    options=adam.OPTIONS,
    hyperparameters=adam.hyperparameters,
    h=Hyperparameters,
    coefficients=adam.coefficients,
    idle=adam.IDLE,
    update=adam.update,
    directions=adam.directions,
    late=("rms",),
    sums=sums,
    scales=scales,
    shrinks=True,
)
