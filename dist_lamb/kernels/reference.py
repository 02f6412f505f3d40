"""The rule applied to one param's rows after another: plain, slow, obvious."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from . import stored
from .eager import Work
from .segments import Segment
from .sweeps import Numbers, Sweep, product_sum


def _runs(work: Work) -> Iterator[tuple[slice, Segment, int]]:
    """(rows of the sums, their tensors, param) of every run of rows of one param."""
    begin = end = 0
    for b, lo, hi, k in work.rows.runs:
        begin, end = end, end + hi - lo
        yield slice(begin, end), work.blocks[b].cut(0, lo, hi - lo), k


def sweep(work: Work, what: Sweep, numbers: Numbers) -> Tensor:
    out = torch.zeros(len(work.rows.index), what.columns, dtype=torch.float64, device=work.device)
    for rows, s, k in _runs(work):
        x, states = stored.read_x(s), stored.read_states(s)
        g = x if s.grad is None or not what.reads_grad else s.grad.to(work.dtype)
        of_param = numbers.map(itemgetter(k))
        random = None
        if s.places is not None and of_param.t is not None:
            elements = stored.element_numbers(s.places, x.shape[1])
            random = stored.random_of(elements, of_param.t)
        new, pairs = what.run(g, x, states, of_param, partial(stored.put, s, random=random))
        for column, (a, b) in enumerate(pairs):
            out[rows, column] = product_sum(a, b)
        if new is not None:
            stored.write_x(s, new)
    return out
