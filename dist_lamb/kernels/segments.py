"""What every backend works on: pieces of params, and numbers of a step that lie on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import GroupOptions

#: Last columns of the sums that ``moments`` makes, float64 [params, columns]: squares of the
#: gradient as it is; 1 where the step counts for the param. Before them stand the rule's late sums.
GRAD_SQ, UPDATED = -2, -1


class Segment(NamedTuple):
    """A param's local memory, or one piece of it: dense tensors of one shape and one layout."""

    param: int  # its position among the optimizer's params
    grad: Tensor | None  # any floating dtype, never written; None: there is none
    x: Tensor  # what the rule reads and writes, float32 or float64
    states: tuple[Tensor, ...]  # as the rule names them
    copy: Tensor | None  # the half-precision param, where x is its master

    def tensors(self) -> list[Tensor | None]:
        return [self.grad, self.x, *self.states, self.copy]

    def map(self, f: Callable[[Tensor], Tensor]) -> Segment:
        """The segment with ``f`` of each of its tensors."""
        grad = None if self.grad is None else f(self.grad)
        copy = None if self.copy is None else f(self.copy)
        return Segment(self.param, grad, f(self.x), tuple(map(f, self.states)), copy)


@dataclass
class Scalars:
    """What one step knows of all gradients together, and what the groups ask for."""

    options: GroupOptions
    #: whether ``moments`` adds up squares of the gradients: else that column of the sums is 0
    track_grad_norm: bool = False
    #: torch.amp.GradScaler's, tensors of one element: None without one
    loss_scale: Tensor | None = None
    found_inf: Tensor | None = None
    #: float64 0-d of all ranks: sum of squares of the gradients as they are, if it was asked for
    grad_sq: Tensor | None = None
    #: float64 [params, EARLY] of all ranks: x.x, x.g, g.g of gradients as they are, if asked for
    early: Tensor | None = None
    #: one number of any dtype, not 0 where the step must change nothing
    overflow: Tensor | None = None

    def inverse_scale(self, device: torch.device) -> Tensor | None:
        """float64 0-d: what unscales a gradient."""
        if self.loss_scale is None:
            return None
        return self.loss_scale.to(device, torch.float64).reciprocal().view(())
