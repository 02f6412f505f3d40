"""The rule through torch.compile: two fused passes over memory.

Flat buffers are matrices [tiles, TILE] already; a large separate tensor is read as one, less its
last few elements. So there is one function per pass, compiled once for any number of rows, and
every number that may change between steps is an element of a table: nothing recompiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from . import foreach, stored
from .eager import Work
from .segments import Segment
from .sweeps import Numbers, Sweep, product_sum

#: Separate tensors smaller than this go through ``foreach``: calling a compiled function costs
#: more than it saves on them.
SMALL_NUMEL = 2**15

#: Elements of a row that a separate tensor is cut into.
ROW_NUMEL = 1024


# Each row takes its own param's coefficients. Compiled once for any number of rows.
# The limit counts graphs for other dtypes, options left out and matrices of a single row: with
# torch's own limit of 8, a process with many unlike optimizers would end in an error.
_more: dict[str, Any] = (
    {"recompile_limit": 64} if "recompile_limit" in signature(torch.compile).parameters else {}
)
_compile = torch.compile(dynamic=True, fullgraph=True, **_more)


def _filled(numbers: Numbers) -> Numbers:
    """With what the host left out too: one graph."""
    like = numbers.c[-1]
    one, zero = torch.ones_like(like), torch.zeros_like(like)
    active = one if numbers.active is None else numbers.active.to(like.dtype)
    scale = one if numbers.grad_scale is None else numbers.grad_scale
    c = numbers.c._make(zero if v is None else v for v in numbers.c)
    return numbers._replace(active=active, grad_scale=scale, c=c)


@functools.cache
def _compiled(
    what: Sweep, empty: Numbers, dims: int, nearest: bool
) -> Callable[..., Tensor | None]:
    """``what`` on matrices [rows, columns]; ``empty`` has numbers where the tables have columns.

    ``dims`` are those of the places, 0 where there are none.
    """

    def swept(
        g: Tensor | None,
        x: Tensor,
        copy: Tensor | None,
        remainder: Tensor | None,
        places: Tensor | None,
        table: Tensor | None,
        index: Tensor,
        *states: Tensor,
    ) -> Tensor | None:
        s = Segment(0, g, x, states, copy, remainder, nearest=nearest)
        numbers = Numbers()
        if table is not None:
            found = iter(table[index][:, None, :].unbind(-1))
            numbers = empty.like([None if v is None else next(found) for v in empty.flat()])
            numbers = numbers._replace(active=numbers.active > 0)

        def put(new: Sequence[Tensor]) -> Sequence[Tensor]:
            random = None
            if places is not None and numbers.t is not None:
                elements = stored.element_numbers(places, x.shape[1], dims)
                random = stored.random_of(elements, numbers.t)
            return stored.put(s, new, random)

        value, own = stored.read_x(s), stored.read_states(s)
        g = value if g is None else g.to(value.dtype)
        new, pairs = what.run(g, value, own, numbers, put)
        sums = torch.stack([product_sum(a, b) for a, b in pairs], dim=-1) if pairs else None
        if new is not None:
            stored.write_x(s, new)
        return sums

    # torch.compile counts graphs by code object: each sweep has one of its own
    code = swept.__code__.replace(co_name=f"swept_{what.name}")
    own: Callable[..., Tensor | None] = FunctionType(code, globals(), None, None, swept.__closure__)
    compiled: Callable[..., Tensor | None] = _compile(own)  # type: ignore[no-untyped-call]
    return compiled


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
                index = torch.full((whole // ROW_NUMEL,), k, dtype=torch.int64, device=work.device)
                tiles = block.map(partial(_tiles, numel=whole))
                if block.places is not None:
                    places = block.places.repeat(len(index), 1)
                    places[:, 0] += torch.arange(len(index), device=work.device) * ROW_NUMEL
                    tiles = tiles._replace(places=places)
                self.tiled.append((b, tiles, index))
            if whole < numel:
                rest.append(block.cut(1, whole, numel - whole))
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


def _cut(work: Work) -> _Cut:
    """Made once for all passes of a step, and for the steps after it."""
    if "cut" not in work.scratch:
        work.scratch["cut"] = _Cut(work)
    cut: _Cut = work.scratch["cut"]
    return cut


def sweep(work: Work, what: Sweep, numbers: Numbers) -> Tensor:
    table, empty = None, Numbers()
    if numbers.c:
        full = _filled(numbers)
        empty = full.map(lambda _: 0)
        table = torch.stack([v for v in full.flat() if v is not None], dim=1)
    first = work.blocks[0] if work.blocks else None
    places = None if first is None else first.places
    dims = 0 if places is None else places.shape[1] // 2
    run = _compiled(what, empty, dims, first is not None and first.nearest)

    def tiles(s: Segment, grad: Tensor | None, index: Tensor) -> Tensor | None:
        g = grad if what.reads_grad else None
        return _call(  # type: ignore[no-any-return]
            run, g, s.x, s.copy, s.remainder, s.places, table, index, *s.states
        )

    out = torch.zeros(len(work.rows.index), what.columns, dtype=torch.float64, device=work.device)
    if work.tiled:
        sums = [tiles(s, s.grad, index) for s, index in zip(work.blocks, work.rows.indices)]
        return torch.cat([t for t in sums if t is not None]) if what.columns and sums else out
    cut = _cut(work)
    rest = cut.rest_with_gradients(work) if what.reads_grad else cut.rest
    out[cut.rest_of] += foreach.sweep(rest, what, numbers)
    for b, s, index in cut.tiled:
        grad = work.blocks[b].grad
        found = tiles(s, None if grad is None else _tiles(grad, s.x.numel()), index)
        if found is not None:
            out[b] += found.sum(0)
    return out
