"""The rule applied to one param's rows after another: plain, slow, obvious."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import rule
from . import Work, square_sum


def _runs(work: Work, c: rule.Coefficients | None) -> Iterator[Any]:
    """(rows of the partials, g, x, m, v, copy, coefficients, param) of every run of rows."""
    begin = end = 0
    for b, lo, hi, k in work.rows.runs:
        begin, end = end, end + hi - lo
        g, x, m, v, copy = (None if t is None else t[lo:hi] for t in work.blocks[b])
        ck = None if c is None else c.of_param(k)
        yield slice(begin, end), g.to(x.dtype), x, m, v, copy, ck, k  # type: ignore[union-attr]


def _partials(work: Work, *columns: int) -> Tensor:
    rows = len(work.rows.index)
    return torch.zeros(rows, *columns, dtype=torch.float64, device=work.device)


def grad_sq(work: Work) -> Tensor:
    out = _partials(work)
    for rows, g, *_ in _runs(work, None):
        out[rows] = square_sum(g)
    return out


def moments(work: Work, c: rule.Coefficients) -> Tensor:
    out = _partials(work, 2)
    for rows, g, x, m, v, _, ck, _ in _runs(work, c):
        g = rule.gradient(g, x, ck)
        m_new, v_new = rule.moments(g, m, v, ck)
        m.copy_(m_new)
        v.copy_(v_new)
        out[rows, 0] = square_sum(x)
        out[rows, 1] = square_sum(rule.direction(x, m, v, ck))
    return out


def apply(work: Work, c: rule.Coefficients, step_size: Tensor) -> None:
    for _, _, x, m, v, copy, ck, k in _runs(work, c):
        u = rule.direction(x, m, v, ck)
        x.copy_(rule.apply(x, u, step_size[k]))
        if copy is not None:
            copy.copy_(x)
