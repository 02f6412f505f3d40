"""The rule through torch.compile: two fused passes over memory.

Flat buffers are matrices [tiles, TILE] already; a large separate tensor is read as one, less its
last few elements. So there is one function per pass, compiled once for any number of rows, and
every number that may change between steps is an element of a table: nothing recompiles.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .. import rule
from . import NO_GRADIENT, Block, Work, foreach, square_sum

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


def _moments(g: Tensor, x: Tensor, m: Tensor, v: Tensor, c: rule.Coefficients) -> Tensor:
    g = rule.gradient(g.to(x.dtype), x, c)
    m_new, v_new = rule.moments(g, m, v, c)
    u = rule.direction(x, m_new, v_new, c)
    m.copy_(m_new)
    v.copy_(v_new)
    return torch.stack([square_sum(x), square_sum(u)], dim=-1)


def _apply(
    x: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, c: rule.Coefficients, step: Tensor
) -> None:
    x.copy_(rule.apply(x, rule.direction(x, m, v, c), step))
    if copy is not None:
        copy.copy_(x)


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
    g: Tensor, x: Tensor, m: Tensor, v: Tensor, table: Tensor, index: Tensor
) -> Tensor:
    return _moments(g, x, m, v, _coefficients(table[index][:, None, :]))


@_compile
def _tiled_apply(
    x: Tensor, m: Tensor, v: Tensor, copy: Any, table: Tensor, step: Tensor, index: Tensor
) -> None:
    _apply(x, m, v, copy, _coefficients(table[index][:, None, :]), step[index][:, None])


def _call(compiled: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """Call with tensors that are no views: views guard on their base's shape, and recompile."""
    return compiled(*(None if t is None else t.detach() for t in tensors))


class _Cut:
    """Separate tensors cut into whole tiles, which are compiled, and the rest, for ``foreach``.

    ``tiled``: (block, its tensors but the gradient as matrices [tiles, ROW_NUMEL], the param of
    each tile); ``rest``: a Work of the remaining elements, without gradients too; ``rest_of``: the
    block each of its rows is from. Gradients are cut where they are read: they change.
    """

    def __init__(self, work: Work) -> None:
        self.tiled: list[tuple[int, Block, Tensor]] = []
        self.rest_of: list[int] = []
        self._rest_from: list[int] = []
        rest: list[Block] = []
        for b, _, _, k in work.rows.runs:
            block = work.blocks[b]
            numel = block.param.numel()
            whole = numel - numel % ROW_NUMEL if numel >= SMALL_NUMEL else 0
            if whole:
                tiles = [None if t is None else _tiles(t, whole) for t in block[1:]]
                index = torch.full((whole // ROW_NUMEL,), k, device=work.device)
                self.tiled.append((b, Block(NO_GRADIENT, *tiles), index))  # type: ignore[arg-type]
            if whole < numel:
                ends = [None if t is None else t[:, whole:] for t in block[1:]]
                rest.append(Block(NO_GRADIENT, *ends))  # type: ignore[arg-type]
                self.rest_of.append(b)
                self._rest_from.append(whole)
        self.rest = Work(rest, work.rows.subset(self.rest_of), work.dtype, tiled=False)

    def rest_with_gradients(self, work: Work) -> Work:
        rest = Work(self.rest.blocks, self.rest.rows, work.dtype, tiled=False)
        rest.take([work.blocks[b].grad[:, at:] for b, at in zip(self.rest_of, self._rest_from)])
        return rest


def _tiles(row: Tensor, numel: int) -> Tensor:
    return row[0, :numel].view(-1, ROW_NUMEL)


def _cut(work: Work) -> _Cut:
    """Made once for all passes of a step."""
    if "cut" not in work.scratch:
        work.scratch["cut"] = _Cut(work)
    cut: _Cut = work.scratch["cut"]
    return cut


def _zeros(work: Work, *columns: int) -> Tensor:
    rows = len(work.rows.index)
    return torch.zeros(rows, *columns, dtype=torch.float64, device=work.device)


def grad_sq(work: Work) -> Tensor:
    if work.tiled and work.blocks:
        return torch.cat([_call(_tiled_grad_sq, block.grad) for block in work.blocks])
    cut, out = _cut(work), _zeros(work)
    out[cut.rest_of] += foreach.grad_sq(cut.rest_with_gradients(work))
    for b, tiles, _ in cut.tiled:
        grad = _tiles(work.blocks[b].grad, tiles.param.numel())
        out[b] += _call(_tiled_grad_sq, grad).sum(0)
    return out


def moments(work: Work, c: rule.Coefficients) -> Tensor:
    table = _table(c)
    if work.tiled and work.blocks:
        return torch.cat(
            [
                _call(_tiled_moments, *block[:4], table, index)
                for block, index in zip(work.blocks, work.rows.indices)
            ]
        )
    cut, out = _cut(work), _zeros(work, 2)
    out[cut.rest_of] += foreach.moments(cut.rest_with_gradients(work), c)
    for b, tiles, index in cut.tiled:
        grad = _tiles(work.blocks[b].grad, tiles.param.numel())
        out[b] += _call(_tiled_moments, grad, *tiles[1:4], table, index).sum(0)
    return out


def apply(work: Work, c: rule.Coefficients, step_size: Tensor) -> None:
    table = _table(c)
    blocks = list(zip(work.blocks, work.rows.indices))
    if not work.tiled:
        cut = _cut(work)
        foreach.apply(cut.rest, c, step_size)
        blocks = [(tiles, index) for _, tiles, index in cut.tiled]
    for (_, x, m, v, copy), index in blocks:
        _call(_tiled_apply, x, m, v, copy, table, step_size, index)
