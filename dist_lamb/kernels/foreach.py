"""The rule over lists of tensors (torch._foreach), in pieces that stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rule
from . import NO_GRADIENT, Block, Work, square_sum

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
        # on a CPU they are plain bools
        chosen = [
            torch.where(torch.as_tensor(c, device=t.device), t, other)
            for c, t in zip(conditions, self.tensors)
        ]
        return TensorList(chosen, scratch=True)


class _Piece(NamedTuple):
    """Some rows of some blocks, or parts of rows, that are worked on at once."""

    g: list[Tensor]
    x: list[Tensor]
    m: list[Tensor]
    v: list[Tensor]
    rows: list[slice]  # of the concatenated rows: one for each part
    parts: list[Block]
    #: elements of each part where they are joined into one row; None: the lists are the parts
    lengths: list[int] | None

    def write(self, name: str, new: list[Tensor]) -> None:
        """Into the tensors called ``name`` of the parts' blocks, where they have one."""
        if self.lengths is not None:
            new = list(torch.split(new[0], self.lengths, dim=1))
        pairs = [(getattr(part, name), t) for part, t in zip(self.parts, new)]
        pairs = [(own, t) for own, t in pairs if own is not None]
        if pairs:
            torch._foreach_copy_([own for own, _ in pairs], [t for _, t in pairs])


def _pieces(work: Work, with_gradients: bool = True) -> Iterator[_Piece]:
    limit = PIECE_NUMEL.get(work.device.type, PIECE_NUMEL_GPU)
    parts: list[tuple[Block, slice]] = []
    begin = numel = 0
    for block, size in zip(work.blocks, work.rows.sizes):
        cols = block.param.shape[1]
        # long rows are cut along their elements, matrices along their rows
        dim, length, step = (1, cols, limit) if size == 1 else (0, size, max(1, limit // cols))
        for at in range(0, length, step):
            n = min(step, length - at)
            part = block
            if n < length:
                narrowed = [None if t is None else t.narrow(dim, at, n) for t in block[1:]]
                grad = block.grad.narrow(dim, at, n) if with_gradients else NO_GRADIENT
                part = Block(grad, *narrowed)  # type: ignore[arg-type]
            rows = slice(begin + at, begin + at + n) if dim == 0 else slice(begin, begin + 1)
            size_of_part = n * (cols if dim == 0 else 1)
            if parts and numel + size_of_part > limit:
                yield _collect(work, parts, with_gradients)
                parts, numel = [], 0
            parts.append((part, rows))
            numel += size_of_part
        begin += size
    if parts:
        yield _collect(work, parts, with_gradients)


def _collect(work: Work, found: list[tuple[Block, slice]], with_gradients: bool) -> _Piece:
    parts, rows = [part for part, _ in found], [r for _, r in found]
    x = [part.param for part in parts]
    m, v = [part.exp_avg for part in parts], [part.exp_avg_sq for part in parts]
    g = [part.grad for part in parts] if with_gradients else []
    if any(t.dtype != work.dtype for t in g):  # asked first: doing nothing takes to() 3 us
        g = [t.to(work.dtype) for t in g]
    lengths = None
    if len(parts) > 1 and not work.tiled and work.device.type == "cpu":
        # A few operations on each of many small tensors would cost more than the arithmetic.
        lengths = [t.numel() for t in x]
        g, x, m, v = ([torch.cat(tensors, dim=1)] if tensors else [] for tensors in (g, x, m, v))
    return _Piece(g, x, m, v, rows, parts, lengths)


class _Columns:
    """[params] vectors as what ``_foreach`` ops take beside the tensors of a piece."""

    def __init__(self, work: Work, *vectors: Tensor | None) -> None:
        # One value a row: [rows, 1] slices broadcast over tile matrices. Plain floats are faster
        # for single rows where reading them costs no device sync.
        self._floats = not work.tiled and work.device.type == "cpu"
        self._rows: list[Any] = [None if v is None else v[work.rows.index] for v in vectors]
        self._values = self._rows
        if self._floats:
            self._values = [None if v is None else v.tolist() for v in self._rows]

    def at(self, piece: _Piece) -> Iterator[Any]:
        for values, tensor in zip(self._values, self._rows):
            if values is None:
                yield None
            elif not self._floats:
                yield TensorList([values[r, None] for r in piece.rows])
            elif piece.lengths is None:
                yield [values[r.start] for r in piece.rows]
            elif len(chosen := {values[r.start] for r in piece.rows}) == 1:
                yield list(chosen)
            else:
                each = tensor[[r.start for r in piece.rows]]
                yield TensorList([each.repeat_interleave(torch.tensor(piece.lengths))[None]])


def _add_squares(out: Tensor, piece: _Piece, tensors: Sequence[Tensor]) -> None:
    """out[rows] += sums of squares; a row may come in several pieces."""
    if piece.lengths is None:
        for r, t in zip(piece.rows, tensors):
            out[r] += square_sum(t)
    else:
        squares = tensors[0][0].to(torch.float64, copy=True).square_()
        lengths = torch.tensor(piece.lengths)
        sums = torch.segment_reduce(squares, "sum", lengths=lengths, unsafe=True, initial=0)
        out[[r.start for r in piece.rows]] += sums


def grad_sq(work: Work) -> Tensor:
    out = torch.zeros(len(work.rows.index), dtype=torch.float64, device=work.device)
    for piece in _pieces(work):
        _add_squares(out, piece, piece.g)
    return out


def moments(work: Work, c: rule.Coefficients) -> Tensor:
    out = torch.zeros(len(work.rows.index), 2, dtype=torch.float64, device=work.device)
    columns = _Columns(work, *c)
    for piece in _pieces(work):
        cp = rule.Coefficients(*columns.at(piece))
        x, m, v = TensorList(piece.x), TensorList(piece.m), TensorList(piece.v)
        g = rule.gradient(TensorList(piece.g), x, cp).keep()
        m, v = (new.keep() for new in rule.moments(g, m, v, cp))
        piece.write("exp_avg", m.tensors)
        piece.write("exp_avg_sq", v.tensors)
        u = rule.direction(x, m, v, cp)
        _add_squares(out[:, 0], piece, x.tensors)
        _add_squares(out[:, 1], piece, u.tensors)
    return out


def apply(work: Work, c: rule.Coefficients, step_size: Tensor) -> None:
    columns = _Columns(work, *c, step_size)
    for piece in _pieces(work, with_gradients=False):
        *cp, step = columns.at(piece)
        x, m, v = TensorList(piece.x), TensorList(piece.m), TensorList(piece.v)
        u = rule.direction(x, m, v, rule.Coefficients(*cp))
        new = rule.apply(x, u, step).tensors
        piece.write("param", new)
        piece.write("copy", new)
