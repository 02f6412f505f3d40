"""The passes of a step over all elements, put together from a rule's functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rules import Rule


class Numbers(NamedTuple):
    """What a pass multiplies with, by param. None where the host knows it to change nothing."""

    active: Any = None  # bool; False keeps a gradient out that may not even be finite
    grad_scale: Any = None  # sign * clip / loss scale
    t: Any = None  # the param's step, where states are rounded at random
    c: Any = ()  # the rule's coefficients
    shrink: Any = None
    steps: Any = ()

    def map(self, f: Callable[[Any], Any]) -> Numbers:
        """With ``f`` of each number."""
        return self.like([None if v is None else f(v) for v in self.flat()])

    def flat(self) -> list[Any]:
        return [self.active, self.grad_scale, self.t, self.shrink, *self.c, *self.steps]

    def like(self, flat: Sequence[Any]) -> Numbers:
        """The same with other numbers, in the order of :meth:`flat`."""
        end = 4 + len(self.c)
        c = self.c._make(flat[4:end]) if self.c else ()
        return Numbers(flat[0], flat[1], flat[2], c, flat[3], tuple(flat[end:]))

    def to(self, dtype: torch.dtype) -> Numbers:
        return self.map(lambda t: t if t.dtype == torch.bool else t.to(dtype))


class Sweep(NamedTuple):
    """One pass: ``run(g, x, states, numbers, put)`` gives the new x, or None, and pairs whose
    products are summed. ``put`` stores new states and gives back what was stored, which is what
    counts from there on."""

    name: str
    run: Callable[..., tuple[Any, Sequence[tuple[Any, Any]]]]
    reads_grad: bool
    columns: int


def _run_squares(g: Any, x: Any, states: Any, n: Numbers, put: Any) -> Any:
    return None, [(g, g)]


#: Squares of the gradient.
SQUARES = Sweep("squares", _run_squares, True, 1)


@functools.cache
def early_sweep(names: tuple[str, ...]) -> Sweep:
    """The sums that are wanted before the states are updated, of gradients as they are."""

    pairs = [name.split(".") for name in names]

    def run(g: Any, x: Any, states: Any, n: Numbers, put: Any) -> Any:
        return None, [(x if a == "x" else g, x if b == "x" else g) for a, b in pairs]

    return Sweep("early", run, True, len(names))


@functools.cache
def rule_sweep(rule: Rule, moments: bool, apply: bool, norm: bool = False) -> Sweep:
    """New states and their late sums, new params, or both in one pass."""

    def run(g: Any, x: Any, states: Any, n: Numbers, put: Any) -> Any:
        pairs: list[tuple[Any, Any]] = [(g, g)] if norm else []
        if moments or rule.reads_grad:
            if n.active is not None:
                g = g.where(n.active, 0.0)
            # g <- g * min(1, max_grad_norm / ||g_all||)
            if n.grad_scale is not None:
                g = g * n.grad_scale
            (g,) = kept((rule.gradient(g, x, n.c),))
        if moments:
            states = put(rule.update(g, x, states, n.c))
        if not apply and not rule.late:
            return None, pairs
        u = kept(rule.directions(g, x, states, n.c)) if not apply else None
        if u is not None:
            return None, [*rule.sums(g, x, states, u, n.c), *pairs]
        return moved(x, rule.directions(g, x, states, n.c), n), pairs

    columns = (0 if apply else len(rule.late)) + norm
    return Sweep(f"{rule.name} {moments}{apply}", run, moments or rule.reads_grad, columns)


def kept(arrays: Sequence[Any]) -> tuple[Any, ...]:
    """To be used more than once: see :meth:`dist_lamb.kernels.foreach.TensorList.keep`."""
    return tuple(a if isinstance(a, Tensor) else a.keep() for a in arrays)


def moved(x: Any, u: Sequence[Any], n: Numbers) -> Any:
    # x <- x - (shrink * x + sum of steps_k * u_k)
    change = u[0] * n.steps[0]
    for direction, step in zip(u[1:], n.steps[1:]):
        change = change + direction * step
    if n.shrink is not None:
        change = change + x * n.shrink
    return x - change


def only_where(active: Tensor, n: Numbers, rule: Rule, guard: bool) -> Numbers:
    """Numbers under which a parameter that is not ``active`` keeps its states bit for bit.

    ``guard`` replaces the gradient of an inactive parameter by zeros: needed where it may be
    anything (an overflow under loss scaling), since 0 * inf is NaN.
    """
    scale = None if n.grad_scale is None else torch.where(active, n.grad_scale, 1.0)
    c = [None if v is None else torch.where(active, v, idle) for v, idle in zip(n.c, rule.idle)]
    return n._replace(active=active if guard else None, grad_scale=scale, c=n.c._make(c))


def product_sum(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b over each row in float64, [rows, cols] -> [rows].

    The products themselves are float64: rounding them to float32 first would leave norms that
    depend on how the tensor was cut.
    """
    return products(a, b).sum(dim=-1)


def products(a: Tensor, b: Tensor) -> Tensor:
    wide = a.to(torch.float64, copy=True)
    return wide.square_() if a is b else wide.mul_(b)
