"""The rule over lists of tensors (torch._foreach), in batches that stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import storage_formats as formats
from . import stored
from .device import int64
from .eager import Work
from .segments import Segment
from .sweeps import Numbers, Sweep, product_sum, products

#: Elements worked on at a time. Bounds the temporaries, and on a CPU keeps them in its cache.
BATCH_NUMEL = {"cpu": 2**18}
BATCH_NUMEL_GPU = 2**24


class TensorList:
    """A list of tensors with the arithmetic that rules use; ``other`` is a list too, or floats.

    Operands broadcast element by element of the list. What an operation returns belongs to the
    expression it stands in, so the next operation writes over it: fresh memory for each would
    cost more than the arithmetic. Keep a result that is used twice by :meth:`keep`; on the right
    of an operator it may stand often.
    """

    def __init__(self, tensors: Sequence[Tensor], scratch: bool = False) -> None:
        self.tensors = list(tensors)
        self._scratch = scratch

    def keep(self) -> TensorList:
        return TensorList(self.tensors)

    def _made(self, name: str, *operands: Any) -> TensorList:
        operands = tuple(getattr(other, "tensors", other) for other in operands)
        if not self._scratch:
            return TensorList(getattr(torch, f"_foreach_{name}")(self.tensors, *operands), True)
        getattr(torch, f"_foreach_{name}_")(self.tensors, *operands)
        result = TensorList(self.tensors, True)
        del self.tensors  # written over: to use it once more is an error
        return result

    def __add__(self, other: Any) -> TensorList:
        return self._made("add", other)

    def __sub__(self, other: Any) -> TensorList:
        return self._made("sub", other)

    def __mul__(self, other: Any) -> TensorList:
        return self._made("mul", other)

    def __truediv__(self, other: Any) -> TensorList:
        return self._made("div", other)

    def sqrt(self) -> TensorList:
        return self._made("sqrt")

    def maximum(self, other: Any) -> TensorList:
        if isinstance(other, TensorList):
            other = [o.expand_as(t) for o, t in zip(other.tensors, self.tensors)]
        return self._made("maximum", other)

    def where(self, condition: Any, other: float) -> TensorList:
        conditions = getattr(condition, "tensors", condition)
        # on a CPU they are plain bools
        chosen = [
            torch.where(torch.as_tensor(c, device=t.device), t, other)
            for c, t in zip(conditions, self.tensors)
        ]
        return TensorList(chosen, scratch=True)


class _Batch(NamedTuple):
    """Some rows of some blocks, or parts of rows, that are worked on at once."""

    g: list[Tensor]
    x: list[Tensor]
    states: list[list[Tensor]]
    rows: list[slice]  # of the concatenated rows: one for each part
    parts: list[Segment]
    #: elements of each part where they are joined into one row; None: the lists are the parts
    lengths: list[int] | None

    def write(self, targets: Sequence[Tensor | None], new: list[Tensor]) -> None:
        """Into these tensors of the parts, where a part has one."""
        if self.lengths is not None:
            new = list(torch.split(new[0], self.lengths, dim=1))
        pairs = [(own, t) for own, t in zip(targets, new) if own is not None]
        if pairs:
            torch._foreach_copy_([own for own, _ in pairs], [t for _, t in pairs])

    def write_x(self, new: list[Tensor]) -> None:
        if self.parts[0].remainder is None:
            self.write([part.x for part in self.parts], new)
            self.write([part.copy for part in self.parts], new)
            return
        params = [formats.as_bfloat16(formats.param_of(t)) for t in new]
        self.write([part.x for part in self.parts], params)
        self.write([part.remainder for part in self.parts], list(map(formats.remainder_of, new)))


def _batches(work: Work, with_gradients: bool = True) -> Iterator[_Batch]:
    limit = BATCH_NUMEL.get(work.device.type, BATCH_NUMEL_GPU)
    parts: list[tuple[Segment, slice]] = []
    begin = numel = 0
    for block, size in zip(work.blocks, work.rows.sizes):
        cols = block.x.shape[1]
        # long rows are cut along their elements, matrices along their rows
        dim, length, step = (1, cols, limit) if size == 1 else (0, size, max(1, limit // cols))
        for at in range(0, length, step):
            n = min(step, length - at)
            part = block if n == length else block.cut(dim, at, n)
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


def _collect(work: Work, chosen: list[tuple[Segment, slice]], with_gradients: bool) -> _Batch:
    parts, rows = [part for part, _ in chosen], [r for _, r in chosen]
    x = [stored.read_x(part) for part in parts]
    states = [list(of_all) for of_all in zip(*map(stored.read_states, parts))]
    g: list[Any] = [part.grad for part in parts] if with_gradients else []
    if any(t.dtype != work.dtype for t in g):  # asked first: doing nothing takes to() 3 us
        g = [t.to(work.dtype) for t in g]
    lengths = None
    if len(parts) > 1 and not work.tiled and work.device.type == "cpu":
        # A few operations on each of many small tensors would cost more than the arithmetic.
        lengths = [t.numel() for t in x]
        g, x, *states = ([torch.cat(ts, dim=1)] if ts else [] for ts in (g, x, *states))
    return _Batch(g, x, states, rows, parts, lengths)


class _Columns:
    """[params] vectors as what ``_foreach`` ops take beside the tensors of a batch."""

    def __init__(self, work: Work, *vectors: Tensor | None) -> None:
        # One value a row: [rows, 1] slices broadcast over tile matrices. Plain floats are faster
        # for single rows where reading them costs no device sync.
        self._floats = not work.tiled and work.device.type == "cpu"
        self._rows: list[Any] = [None if v is None else v[work.rows.index] for v in vectors]
        self._values = self._rows
        if self._floats:
            self._values = [None if v is None else v.tolist() for v in self._rows]

    def at(self, batch: _Batch) -> Iterator[Any]:
        for values, tensor in zip(self._values, self._rows):
            if values is None:
                yield None
            elif not self._floats:
                yield TensorList([values[r, None] for r in batch.rows])
            elif batch.lengths is None:
                yield [values[r.start] for r in batch.rows]
            elif len(chosen := {values[r.start] for r in batch.rows}) == 1:
                yield list(chosen)
            else:
                each = tensor[[r.start for r in batch.rows]]
                yield TensorList([each.repeat_interleave(int64(batch.lengths))[None]])


def _add_products(
    out: Tensor, batch: _Batch, some: Sequence[Tensor], other: Sequence[Tensor]
) -> None:
    """out[rows] += sums of products; a row may come in several batches."""
    if batch.lengths is None:
        for r, a, b in zip(batch.rows, some, other):
            out[r] += product_sum(a, b)
    else:
        lengths = int64(batch.lengths)
        each = products(some[0], other[0])[0]
        sums = torch.segment_reduce(each, "sum", lengths=lengths, unsafe=True, initial=0)
        out[[r.start for r in batch.rows]] += sums


def _into(
    batch: _Batch, random: Sequence[Callable[[], Tensor]]
) -> Callable[[Sequence[TensorList]], list[TensorList]]:
    """What stores new states; ``random`` gives bits for each of the lists' tensors."""

    def put(new: Sequence[TensorList]) -> list[TensorList]:
        kept = []
        for k, state in enumerate(new):
            values, into = state.tensors, [part.states[k] for part in batch.parts]
            if values and into[0].dtype != values[0].dtype:
                nearest = batch.parts[0].nearest
                each: Sequence[Any] = random or [None] * len(values)
                patterns = [stored.rounded(v, k, nearest, r) for v, r in zip(values, each)]
                batch.write(into, list(map(formats.as_bfloat16, patterns)))
                kept.append(TensorList(list(map(formats.of_bfloat16, patterns))))
            else:
                batch.write(into, values)
                kept.append(state.keep())
        return kept

    return put


def _random(batch: _Batch, t: Tensor | None) -> list[Callable[[], Tensor]]:
    """Random bits for each of a batch's tensors; ``t`` are the steps of the work's rows."""
    if t is None or not batch.parts or batch.parts[0].places is None:
        return []
    numbers = [
        stored.element_numbers(part.places, part.x.shape[1])
        for part in batch.parts
        if part.places is not None
    ]
    if batch.lengths is None:
        steps = [t[r, None] for r in batch.rows]
        return [stored.random_of(n, own) for n, own in zip(numbers, steps)]
    of_each = t[[r.start for r in batch.rows]].repeat_interleave(int64(batch.lengths))
    return [stored.random_of(torch.cat(numbers, dim=1), of_each[None])]


def sweep(work: Work, what: Sweep, numbers: Numbers) -> Tensor:
    out = torch.zeros(len(work.rows.index), what.columns, dtype=torch.float64, device=work.device)
    columns = _Columns(work, *numbers.flat())
    t = None if numbers.t is None else numbers.t[work.rows.index]
    for batch in _batches(work, what.reads_grad):
        n = numbers.like(list(columns.at(batch)))
        x = TensorList(batch.x)
        g = TensorList(batch.g) if what.reads_grad else x
        states = [TensorList(state) for state in batch.states]
        new, pairs = what.run(g, x, states, n, _into(batch, _random(batch, t)))
        for k, (a, b) in enumerate(pairs):
            _add_products(out[:, k], batch, a.tensors, b.tensors)
        if new is not None:
            batch.write_x(new.tensors)
    return out
