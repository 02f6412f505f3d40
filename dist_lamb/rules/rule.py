"""What a rule is: a frozen record of small pure functions, the same for every backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .ops import Array

#: Sums over a whole tensor that may be asked for before the states are updated, in this order; g is
#: the gradient as the rule gets it: scaled, signed, clipped.
EARLY = ("x.x", "x.g", "g.g")


def as_it_is(g: Array, x: Array, c: Array) -> Array:
    return g


def no_sums(g: Array, x: Array, states: Array, u: Array, c: Array) -> Array:
    return ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Rule:
    """One optimizer's equations. A step of a tensor is, with ``t`` its own step, 1-based::

        early               sums over the whole tensor, over ranks         where ``early`` names any
        c      = coefficients(h, t, early)                                 float64 by param, rounded
        g      = gradient(g, x, c)                                         elementwise from here
        states = update(g, x, states, c)                                   stored, then used
        u      = directions(g, x, states, c)                               a tuple
        late   = sums of a * b for (a, b) in late(g, x, states, u, c)      over ranks
        ratio, shrink, *steps = scales(h, t, early, late, numel)                 float64 by param
        x     <- x - (shrink * x + sum of steps_k * u_k)

    The functions may use ``+ - *``, comparisons and the names in :mod:`dist_lamb.rules.ops`, which
    every backend brings: tensors, lists of tensors, torch.compile and Triton run this same source.
    They know no rank, no group and no memory; ``numel`` is the whole tensor's. An intermediate
    result stands at most once on the left of an operator (lists of tensors write over it there).

    ``idle`` are coefficients under which a zero gradient leaves the states as they are, bit for
    bit, and gives finite directions. States begin as zeros.
    """

    name: str
    #: name -> what it holds: a saved state is taken over only where both agree
    states: Mapping[str, str]
    #: the options that it reads; the values of those that the constructors name are theirs
    options: Mapping[str, Any]
    #: a param group as numbers, a NamedTuple that begins with ``lr``; and that type
    hyperparameters: Callable[[Mapping[str, Any]], Any]
    h: type
    coefficients: Callable[[Any, Array, Array], Any]
    idle: Any  # a NamedTuple of the type that coefficients gives
    update: Callable[[Array, Array, Array, Any], Array]
    directions: Callable[[Array, Array, Array, Any], Array]
    scales: Callable[[Any, Array, Array, Array, Array], Any]
    gradient: Callable[[Array, Array, Any], Array] = as_it_is
    early: tuple[str, ...] = ()
    #: names of the sums that ``sums`` forms; without any, a step is one pass
    late: tuple[str, ...] = ()
    sums: Callable[[Array, Array, Array, Array, Any], Array] = no_sums
    num_directions: int = 1
    #: whether ``shrink`` may be other than 0
    shrinks: bool = False
    #: whether ``directions`` reads g: then the second pass does too
    reads_grad: bool = False
    #: what is wrong with a group's options together, or None
    problem: Callable[[Mapping[str, Any]], str | None] = lambda group: None
    #: why a tensor of zeros is refused, if it is, and the way out
    zeros: str | None = None
    #: the same rule under ``amsgrad=True``, which has one state more
    amsgrad: Rule | None = None

    @property
    def columns(self) -> int:
        """Of the sums by param: the late ones, the gradient's squares, whether the step counts."""
        return len(self.late) + 2
