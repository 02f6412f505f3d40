"""What every backend works on: pieces of params, and numbers of a step that lie on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..elements import Elements
from ..rules import Rule
from ..state import MASTER, REMAINDER, Formats
from .device import int64
from .groups import GroupOptions

#: Last columns of the sums that ``moments`` makes, float64 [params, columns]: squares of the
#: gradient as it is; 1 where the step counts for the param. Before them stand the rule's late sums.
GRAD_SQ, UPDATED = -2, -1


class Segment(NamedTuple):
    """A param's local memory, or one piece of it: dense tensors of one shape and one layout."""

    param: int  # its position among the optimizer's params
    grad: Tensor | None  # any floating dtype, never written; None: there is none
    x: Tensor  # what the rule reads and writes, float32 or float64
    states: tuple[Tensor, ...]  # as the rule names them; bfloat16 where so stored
    copy: Tensor | None  # the half-precision param, where x is its master
    #: int16, where x is the bfloat16 param: what its float32 master has more
    remainder: Tensor | None = None
    #: which elements of the whole param these are
    elements: Elements = Elements()
    #: whether bfloat16 states are rounded to nearest, not at random
    nearest: bool = False
    #: int64 [rows, 2 * dims + 1], where x is a matrix: Elements.row of each of its rows; None where
    #: no state asks for it
    places: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return self.x.dtype if self.remainder is None else torch.float32

    @property
    def narrow(self) -> bool:
        """Whether some state is stored in fewer bits."""
        return any(t.dtype != self.dtype for t in self.states)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What is the same of all that are worked on together."""
        return self.dtype, tuple(t.dtype for t in self.states), self.remainder is None, self.nearest

    def tensors(self) -> list[Tensor | None]:
        return [self.grad, self.x, *self.states, self.copy, self.remainder]

    def map(self, f: Callable[[Tensor], Tensor]) -> Segment:
        """The segment with ``f`` of each of its tensors."""
        grad = None if self.grad is None else f(self.grad)
        copy = None if self.copy is None else f(self.copy)
        remainder = None if self.remainder is None else f(self.remainder)
        return self._replace(
            grad=grad, x=f(self.x), states=tuple(map(f, self.states)), copy=copy,
            remainder=remainder,
        )  # fmt: skip

    def cut(self, dim: int, at: int, n: int) -> Segment:
        """Some of a matrix's rows (dim 0) or columns."""
        cut = self.map(lambda t: t.narrow(dim, at, n))
        return cut if self.places is None else cut._replace(places=moved(self.places, dim, at, n))


def segment(
    param: int,
    grad: Tensor | None,
    p: Tensor,
    states: Mapping[str, Tensor],
    rule: Rule,
    formats: Formats,
    elements: Elements,
) -> Segment:
    """Of a param's memory ``p`` and its states by name."""
    master = states.get(MASTER)
    x, copy = (p, None) if master is None else (master, p)
    own = tuple(states[name] for name in rule.states)
    remainder = states.get(REMAINDER)
    return Segment(param, grad, x, own, copy, remainder, elements, formats.nearest)


def moved(places: Tensor, dim: int, at: int, n: int) -> Tensor:
    """The places of ``n`` rows or columns of a matrix from ``at`` on."""
    if dim == 0:
        return places.narrow(0, at, n)
    places = places.clone()
    places[:, 0] += at
    return places


def places_of(elements: Elements, dims: int, rows: int, columns: int) -> Tensor:
    """Of a piece's memory as a matrix [rows, columns]."""
    places = int64([elements.row(dims)]).repeat(rows, 1)
    places[:, 0] += torch.arange(rows, device="cpu") * columns
    return places


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
