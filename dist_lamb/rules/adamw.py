"""AdamW, arXiv 1711.05101, as torch.optim.AdamW; with ``decoupled=False`` torch.optim.Adam.

Nothing is summed over a tensor, so a step is one pass::

    x <- x - lr * (r + wd * x)
"""

from __future__ import annotations

from dataclasses import replace

from . import adam
from .adam import Hyperparameters
from .ops import Array
from .rule import Rule


def scales(h: Hyperparameters, t: Array, early: Array, late: Array, numel: Array) -> Array:
    return 1.0, h.lr * h.decay, h.lr


ADAMW = Rule(
    name="adamw",
    states=adam.STATES,
    options={**adam.OPTIONS, "decoupled": True},
    hyperparameters=adam.hyperparameters,
    h=Hyperparameters,
    coefficients=adam.coefficients,
    idle=adam.IDLE,
    gradient=adam.gradient,
    update=adam.update,
    directions=adam.directions,
    scales=scales,
    shrinks=True,
)
ADAMW = replace(ADAMW, amsgrad=adam.with_amsgrad(ADAMW, adam.amsgrad_directions))
