"""The rule applied to one param's rows after another: plain, slow, obvious."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter

import torch
from torch import Tensor

from .. import rule
from .eager import Work, square_sum
from .segments import Segment


def _runs(work: Work) -> Iterator[tuple[slice, Segment, int]]:
    """(rows of the sums, their tensors, param) of every run of rows of one param."""
    begin = end = 0
    for b, lo, hi, k in work.rows.runs:
        begin, end = end, end + hi - lo
        yield slice(begin, end), work.blocks[b].map(itemgetter(slice(lo, hi))), k


def grad_sq(work: Work) -> Tensor:
    out = torch.zeros(len(work.rows.index), dtype=torch.float64, device=work.device)
    for rows, s, _ in _runs(work):
        assert s.grad is not None
        out[rows] = square_sum(s.grad.to(s.x.dtype))
    return out


def moments(work: Work, c: rule.Coefficients, norm: bool) -> Tensor:
    out = torch.zeros(
        len(work.rows.index), 3 if norm else 2, dtype=torch.float64, device=work.device
    )
    for rows, s, k in _runs(work):
        assert s.grad is not None
        g, ck = s.grad.to(s.x.dtype), c.of_param(k)
        if norm:
            out[rows, 2] = square_sum(g)
        new = rule.moments(rule.gradient(g, s.x, ck), s.states, ck)
        for state, value in zip(s.states, new):
            state.copy_(value)
        out[rows, 0] = square_sum(s.x)
        out[rows, 1] = square_sum(rule.direction(s.x, s.states, ck))
    return out


def apply(work: Work, c: rule.Coefficients, step_size: Tensor) -> None:
    for _, s, k in _runs(work):
        u = rule.direction(s.x, s.states, c.of_param(k))
        s.x.copy_(rule.apply(s.x, u, step_size[k]))
        if s.copy is not None:
            s.copy.copy_(s.x)
