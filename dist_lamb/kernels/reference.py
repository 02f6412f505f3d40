"""The rule applied to one param's rows after another: plain, slow, obvious."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from .eager import Work
from .segments import Segment
from .sweeps import Numbers, Sweep, product_sum


def _runs(work: Work) -> Iterator[tuple[slice, Segment, int]]:
    """(rows of the sums, their tensors, param) of every run of rows of one param."""
    begin = end = 0
    for b, lo, hi, k in work.rows.runs:
        begin, end = end, end + hi - lo
        yield slice(begin, end), work.blocks[b].map(itemgetter(slice(lo, hi))), k


def _into(states: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    def put(new: Sequence[Tensor]) -> Sequence[Tensor]:
        for state, value in zip(states, new):
            state.copy_(value)
        return states

    return put


def sweep(work: Work, what: Sweep, numbers: Numbers) -> Tensor:
    out = torch.zeros(len(work.rows.index), what.columns, dtype=torch.float64, device=work.device)
    for rows, s, k in _runs(work):
        g = s.x if s.grad is None or not what.reads_grad else s.grad.to(s.x.dtype)
        of_param = numbers.map(itemgetter(k))
        new, pairs = what.run(g, s.x, s.states, of_param, _into(s.states))
        for column, (a, b) in enumerate(pairs):
            out[rows, column] = product_sum(a, b)
        if new is not None:
            s.x.copy_(new)
            if s.copy is not None:
                s.copy.copy_(s.x)
    return out
