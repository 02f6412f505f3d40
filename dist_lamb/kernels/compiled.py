"""The rule through torch.compile: two fused passes over memory.

Flat buffers are matrices [tiles, TILE] already; a large separate tensor is read as one, less its
last few elements. So there is one function per pass, compiled once for any number of rows, and
every number that may change between steps is an element of a table: nothing recompiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .. import rule
from . import foreach
from .eager import Work, square_sum
from .segments import Segment

#: Separate tensors smaller than this go through ``foreach``: calling a compiled function costs
#: more than it saves on them.
SMALL_NUMEL = 2**15

#: Elements of a row that a separate tensor is cut into.
ROW_NUMEL = 1024


def _table(c: rule.Coefficients) -> Tensor:
    """All coefficients, [params, len(c)]; what the host left out is there too: one shape."""
    one = torch.ones_like(c.beta1)
    full = c._replace(
        active=one if c.active is None else c.active.to(one.dtype),
        grad_scale=one if c.grad_scale is None else c.grad_scale,
        l2=torch.zeros_like(one) if c.l2 is None else c.l2,
    )
    return torch.stack(list(full), dim=1)


def _coefficients(rows: Tensor) -> rule.Coefficients:
    c = rule.Coefficients(*rows.unbind(-1))
    return c._replace(active=c.active > 0)


# Each row takes its own param's coefficients. Compiled once for any number of rows.
# The limit counts graphs for other dtypes, options left out and matrices of a single row: with
# torch's own limit of 8, a process with many unlike optimizers would end in an error.
_more: dict[str, Any] = (
    {"recompile_limit": 64} if "recompile_limit" in signature(torch.compile).parameters else {}
)
_compile = torch.compile(dynamic=True, fullgraph=True, **_more)


@_compile
def _tiled_grad_sq(g: Tensor) -> Tensor:
    return square_sum(g)


@_compile
def _tiled_moments(
    g: Tensor, x: Tensor, table: Tensor, index: Tensor, norm: bool, *states: Tensor
) -> Tensor:
    c = _coefficients(table[index][:, None, :])
    g = g.to(x.dtype)
    new = rule.moments(rule.gradient(g, x, c), states, c)
    u = rule.direction(x, new, c)
    for state, value in zip(states, new):
        state.copy_(value)
    squared = [x, u, g] if norm else [x, u]
    return torch.stack([square_sum(t) for t in squared], dim=-1)


@_compile
def _tiled_apply(
    x: Tensor, copy: Tensor | None, table: Tensor, step: Tensor, index: Tensor, *states: Tensor
) -> None:
    c = _coefficients(table[index][:, None, :])
    x.copy_(rule.apply(x, rule.direction(x, states, c), step[index][:, None]))
    if copy is not None:
        copy.copy_(x)


def _call(compiled: Callable[..., Any], *tensors: Tensor | bool | None) -> Any:
    """Call with tensors that are no views: views guard on their base's shape, and recompile."""
    return compiled(*(t.detach() if isinstance(t, Tensor) else t for t in tensors))


class _Cut:
    """Separate tensors cut into whole tiles, which are compiled, and the rest, for ``foreach``.

    ``tiled``: (block, the same as matrices [tiles, ROW_NUMEL] without a gradient, the param of each
    tile); ``rest``: a Work of the remaining elements, without gradients too; ``rest_of``: the block
    each of its rows is from. Gradients are cut where they are read: they change.
    """

    def __init__(self, work: Work) -> None:
        self.tiled: list[tuple[int, Segment, Tensor]] = []
        self.rest_of: list[int] = []
        self._rest_from: list[int] = []
        rest: list[Segment] = []
        for b, _, _, k in work.rows.runs:
            block = work.blocks[b]._replace(grad=None)
            numel = block.x.numel()
            whole = numel - numel % ROW_NUMEL if numel >= SMALL_NUMEL else 0
            if whole:
                index = torch.full((whole // ROW_NUMEL,), k, device=work.device)
                self.tiled.append((b, block.map(partial(_tiles, numel=whole)), index))
            if whole < numel:
                rest.append(block.map(partial(_from, at=whole)))
                self.rest_of.append(b)
                self._rest_from.append(whole)
        self.rest = Work(rest, work.rows.subset(self.rest_of), work.dtype, tiled=False)

    def rest_with_gradients(self, work: Work) -> Work:
        grads: list[Any] = [work.blocks[b].grad for b in self.rest_of]
        cut = [grad[:, at:] for grad, at in zip(grads, self._rest_from)]
        blocks = [s._replace(grad=g) for s, g in zip(self.rest.blocks, cut)]
        return Work(blocks, self.rest.rows, work.dtype, tiled=False)


def _tiles(row: Tensor, numel: int) -> Tensor:
    return row[0, :numel].view(-1, ROW_NUMEL)


def _from(row: Tensor, at: int) -> Tensor:
    return row[:, at:]


def _cut(work: Work) -> _Cut:
    """Made once for all passes of a step, and for the steps after it."""
    if "cut" not in work.scratch:
        work.scratch["cut"] = _Cut(work)
    cut: _Cut = work.scratch["cut"]
    return cut


def _zeros(work: Work, *columns: int) -> Tensor:
    rows = len(work.rows.index)
    return torch.zeros(rows, *columns, dtype=torch.float64, device=work.device)


def grad_sq(work: Work) -> Tensor:
    if work.tiled:
        return torch.cat([_call(_tiled_grad_sq, block.grad) for block in work.blocks])
    cut, out = _cut(work), _zeros(work)
    out[cut.rest_of] += foreach.grad_sq(cut.rest_with_gradients(work))
    for b, tiles, _ in cut.tiled:
        out[b] += _call(_tiled_grad_sq, _gradient_tiles(work, b, tiles)).sum(0)
    return out


def _gradient_tiles(work: Work, b: int, tiles: Segment) -> Tensor:
    grad = work.blocks[b].grad
    assert grad is not None
    return _tiles(grad, tiles.x.numel())


def moments(work: Work, c: rule.Coefficients, norm: bool) -> Tensor:
    table = _table(c)
    if work.tiled:
        blocks = zip(work.blocks, work.rows.indices)
        return torch.cat(
            [
                _call(_tiled_moments, s.grad, s.x, table, index, norm, *s.states)
                for s, index in blocks
            ]
        )
    cut, out = _cut(work), _zeros(work, 3 if norm else 2)
    out[cut.rest_of] += foreach.moments(cut.rest_with_gradients(work), c, norm)
    for b, s, index in cut.tiled:
        g = _gradient_tiles(work, b, s)
        out[b] += _call(_tiled_moments, g, s.x, table, index, norm, *s.states).sum(0)
    return out


def apply(work: Work, c: rule.Coefficients, step_size: Tensor) -> None:
    table = _table(c)
    blocks = list(zip(work.blocks, work.rows.indices))
    if not work.tiled:
        cut = _cut(work)
        foreach.apply(cut.rest, c, step_size)
        blocks = [(tiles, index) for _, tiles, index in cut.tiled]
    for s, index in blocks:
        _call(_tiled_apply, s.x, s.copy, table, step_size, index, *s.states)
