"""The rule over lists of tensors (torch._foreach), in pieces that stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rule
from . import Work, square_sum

#: Elements worked on at a time. Bounds the temporaries, and on a CPU keeps them in its cache.
PIECE_NUMEL = {"cpu": 2**18}
PIECE_NUMEL_GPU = 2**24


class TensorList:
    """A list of tensors with the arithmetic that ``rule`` uses; ``other`` is a list too, or floats.

    Operands broadcast element by element of the list. What an operation returns belongs to the
    expression it stands in, so the next operation writes over it: fresh memory for each would
    cost more than the arithmetic. Keep a result that is used twice by :meth:`keep`.
    """

    def __init__(self, tensors: Sequence[Tensor], scratch: bool = False) -> None:
        self.tensors = list(tensors)
        self._scratch = scratch

    def keep(self) -> TensorList:
        return TensorList(self.tensors)

    def _binary(self, name: str, other: Any) -> TensorList:
        operand = getattr(other, "tensors", other)
        if self._scratch:
            getattr(torch, f"_foreach_{name}_")(self.tensors, operand)
            return self
        return TensorList(getattr(torch, f"_foreach_{name}")(self.tensors, operand), scratch=True)

    def __add__(self, other: Any) -> TensorList:
        return self._binary("add", other)

    def __sub__(self, other: Any) -> TensorList:
        return self._binary("sub", other)

    def __mul__(self, other: Any) -> TensorList:
        return self._binary("mul", other)

    def __truediv__(self, other: Any) -> TensorList:
        return self._binary("div", other)

    def sqrt(self) -> TensorList:
        if self._scratch:
            torch._foreach_sqrt_(self.tensors)
            return self
        return TensorList(torch._foreach_sqrt(self.tensors), scratch=True)

    def where(self, condition: Any, other: float) -> TensorList:
        conditions = getattr(condition, "tensors", condition)
        chosen = [torch.where(c, t, other) for c, t in zip(conditions, self.tensors)]
        return TensorList(chosen, scratch=True)


class _Piece(NamedTuple):
    """Some rows of some blocks, or parts of rows, that are worked on at once."""

    g: list[Tensor]
    x: list[Tensor]
    m: list[Tensor]
    v: list[Tensor]
    copies: list[Tensor | None]
    rows: list[slice]  # of the concatenated rows, one a tensor


def _pieces(work: Work) -> Iterator[_Piece]:
    limit = PIECE_NUMEL.get(work.device.type, PIECE_NUMEL_GPU)
    parts: list[Any] = []
    begin = numel = 0
    for block, size in zip(work.blocks, work.rows.sizes):
        cols = block.param.shape[1]
        # long rows are cut along their elements, matrices along their rows
        dim, length, step = (1, cols, limit) if size == 1 else (0, size, max(1, limit // cols))
        for at in range(0, length, step):
            n = min(step, length - at)
            part = [None if t is None else t.narrow(dim, at, n) for t in block]
            rows = slice(begin + at, begin + at + n) if dim == 0 else slice(begin, begin + 1)
            if parts and numel + n > limit:
                yield _collect(parts)
                parts, numel = [], 0
            parts.append((*part, rows))
            numel += n * (cols if dim == 0 else 1)
        begin += size
    if parts:
        yield _collect(parts)


def _collect(parts: list[Any]) -> _Piece:
    g, x, m, v, copies, rows = (list(column) for column in zip(*parts))
    return _Piece([a.to(b.dtype) for a, b in zip(g, x)], x, m, v, copies, rows)


class _Columns:
    """[params] vectors as what ``_foreach`` ops take beside the tensors of a piece."""

    def __init__(self, work: Work, *vectors: Tensor | None) -> None:
        # One value a row: [rows, 1] slices broadcast over tile matrices. Plain floats are faster
        # for single rows where reading them costs no device sync.
        self._floats = not work.tiled and work.device.type == "cpu"
        self._rows: list[Any] = [None if v is None else v[work.rows.index] for v in vectors]
        if self._floats:
            self._rows = [None if v is None else v.tolist() for v in self._rows]

    def at(self, rows: list[slice]) -> Iterator[Any]:
        for values in self._rows:
            if values is None:
                yield None
            elif self._floats:
                yield [values[r.start] for r in rows]
            else:
                yield TensorList([values[r, None] for r in rows])


def _add_squares(out: Tensor, rows: list[slice], tensors: Sequence[Tensor]) -> None:
    """out[rows] += sums of squares; a row may come in several pieces."""
    if len(tensors) == 1 or any(len(t) > 1 for t in tensors):
        for r, t in zip(rows, tensors):
            out[r] += square_sum(t)
        return
    # Many single rows: joined, since a few operations on each would cost more than the sums.
    lengths = torch.tensor([t.numel() for t in tensors], device=out.device)
    squares = torch.cat([t.flatten() for t in tensors]).double().square_()
    sums = torch.segment_reduce(squares, "sum", lengths=lengths, unsafe=True, initial=0)
    out[[r.start for r in rows]] += sums


def grad_sq(work: Work) -> Tensor:
    out = torch.zeros(len(work.rows.index), dtype=torch.float64, device=work.device)
    for piece in _pieces(work):
        _add_squares(out, piece.rows, piece.g)
    return out


def moments(work: Work, c: rule.Coefficients) -> Tensor:
    out = torch.zeros(len(work.rows.index), 2, dtype=torch.float64, device=work.device)
    columns = _Columns(work, *c)
    for piece in _pieces(work):
        cp = rule.Coefficients(*columns.at(piece.rows))
        x, m, v = TensorList(piece.x), TensorList(piece.m), TensorList(piece.v)
        g = rule.gradient(TensorList(piece.g), x, cp).keep()
        m, v = (new.keep() for new in rule.moments(g, m, v, cp))
        torch._foreach_copy_(piece.m, m.tensors)
        torch._foreach_copy_(piece.v, v.tensors)
        u = rule.direction(x, m, v, cp)
        _add_squares(out[:, 0], piece.rows, x.tensors)
        _add_squares(out[:, 1], piece.rows, u.tensors)
    return out


def apply(work: Work, c: rule.Coefficients, step_size: Tensor) -> None:
    columns = _Columns(work, *c, step_size)
    for piece in _pieces(work):
        *cp, step = columns.at(piece.rows)
        x, m, v = TensorList(piece.x), TensorList(piece.m), TensorList(piece.v)
        u = rule.direction(x, m, v, rule.Coefficients(*cp))
        torch._foreach_copy_(piece.x, rule.apply(x, u, step).tensors)
        for copy, new in zip(piece.copies, piece.x):
            if copy is not None:
                copy.copy_(new)
