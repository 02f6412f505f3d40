"""The rule through torch.compile: two fused passes over memory.

Flat buffers are one matrix [tiles, TILE] and separate tensors are flat vectors; each has one
function per pass, compiled once for any size. Every number that may change between steps is an
element of a table, so nothing recompiles when one does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import rule
from . import Work, foreach, square_sum

#: Separate tensors smaller than this go through ``foreach``: calling a compiled function costs
#: more than it saves on them.
SMALL_NUMEL = 2**15


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


_compile = torch.compile(dynamic=True, fullgraph=True)

# --- tile matrices: each row takes its own param's coefficients ----------------------------------


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


# --- separate tensors: flat vectors with the coefficients of one param ---------------------------


@_compile
def _flat_grad_sq(g: Tensor) -> Tensor:
    return square_sum(g)


@_compile
def _flat_moments(g: Tensor, x: Tensor, m: Tensor, v: Tensor, row: Tensor) -> Tensor:
    return _moments(g, x, m, v, _coefficients(row))


@_compile
def _flat_apply(x: Tensor, m: Tensor, v: Tensor, copy: Any, row: Tensor, step: Tensor) -> None:
    _apply(x, m, v, copy, _coefficients(row), step)


def _call(compiled: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """Call with tensors that are no views: views guard on their base's shape, and recompile."""
    return compiled(*(None if t is None else t.detach() for t in tensors))


# --- the backend ---------------------------------------------------------------------------------


def _split(work: Work) -> tuple[list[tuple[int, int]], list[int], Work]:
    """Separate tensors as ([(block, param)] of the large ones, small blocks, their own Work)."""
    large, small = [], []
    for b, _, _, k in work.rows.runs:
        if work.blocks[b].param.numel() < SMALL_NUMEL:
            small.append(b)
        else:
            large.append((b, k))
    return large, small, work.subset(small)


def grad_sq(work: Work) -> Tensor:
    if work.tiled and work.blocks:
        return torch.cat([_call(_tiled_grad_sq, block.grad) for block in work.blocks])
    large, small, rest = _split(work)
    out = torch.empty(len(work.rows.index), dtype=torch.float64, device=work.device)
    out[small] = foreach.grad_sq(rest)
    for b, _ in large:
        out[b] = _call(_flat_grad_sq, work.blocks[b].grad[0])
    return out


def moments(work: Work, c: rule.Coefficients) -> Tensor:
    table = _table(c)
    if work.tiled and work.blocks:
        return torch.cat(
            [
                _call(_tiled_moments, g, x, m, v, table, i)
                for (g, x, m, v, _), i in zip(work.blocks, work.rows.indices)
            ]
        )
    large, small, rest = _split(work)
    out = torch.empty(len(work.rows.index), 2, dtype=torch.float64, device=work.device)
    out[small] = foreach.moments(rest, c)
    for b, k in large:
        g, x, m, v, _ = work.blocks[b]
        out[b] = _call(_flat_moments, g[0], x[0], m[0], v[0], table[k])
    return out


def apply(work: Work, c: rule.Coefficients, step_size: Tensor) -> None:
    table = _table(c)
    if work.tiled:
        for (_, x, m, v, copy), i in zip(work.blocks, work.rows.indices):
            _call(_tiled_apply, x, m, v, copy, table, step_size, i)
        return
    large, _, rest = _split(work)
    foreach.apply(rest, c, step_size)
    for b, k in large:
        _, x, m, v, copy = work.blocks[b]
        low = None if copy is None else copy[0]
        _call(_flat_apply, x[0], m[0], v[0], low, table[k], step_size[k])
