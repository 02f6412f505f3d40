"""A step on tensors: what the backends ``reference``, ``foreach`` and ``compiled`` have in common.

Each of them is a module with one function, a pass over all elements of a :class:`Work`::

    sweep(work, what, numbers)       sums by row, float64 [rows, what.columns]; the rest in place

``what`` is a :class:`Sweep`, the elementwise equations; ``numbers`` holds the step's coefficients,
[params] in ``work.dtype``. ``work.rows.sum`` adds rows up to params.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..rules import EARLY, Rule
from ..rules.trust import clip_coefficient
from ..state import flat_row
from . import backend_for
from .device import int64, mask_of
from .groups import GroupTable, Row
from .segments import GRAD_SQ, UPDATED, Scalars, Segment, places_of
from .sweeps import SQUARES, Numbers, Sweep, early_sweep, only_where, rule_sweep


class RowMap:
    """Which param every row of a :class:`Work` belongs to; built once, never changed.

    ``blocks`` holds, for every block, the param index of each of its rows.
    """

    def __init__(
        self, blocks: Sequence[Sequence[int]], num_params: int, device: torch.device
    ) -> None:
        flat = int64([k for block in blocks for k in block])
        self.num_params = num_params
        #: int64 [rows], the param of each row
        self.index = flat.to(device)
        self.sizes = [len(block) for block in blocks]
        #: the same, block by block
        self.indices = list(torch.split(self.index, self.sizes))
        self._subsets: dict[tuple[int, ...], RowMap] = {}
        order = torch.argsort(flat, stable=True)
        sorted_already = bool((order == torch.arange(len(flat), device="cpu")).all())
        self._order = None if sorted_already else order.to(device)
        self._lengths = torch.bincount(flat, minlength=num_params).to(device)
        #: (block, first row, end row, param): maximal runs of rows of one param
        self.runs: list[tuple[int, int, int, int]] = []
        for b, block in enumerate(blocks):
            for i, k in enumerate(block):
                if i and block[i - 1] == k:
                    self.runs[-1] = (b, self.runs[-1][1], i + 1, k)
                else:
                    self.runs.append((b, i, i + 1, k))

    def sum(self, partials: Tensor) -> Tensor:
        """[rows, ...] -> [params, ...], added in the order of the rows.

        Not index_add_: on a GPU that uses atomics, and the bits would change from run to run.
        """
        if self._order is not None:
            partials = partials[self._order]
        if not len(partials):
            return partials.new_zeros(self.num_params, *partials.shape[1:])
        return torch.segment_reduce(
            partials, "sum", lengths=self._lengths, axis=0, unsafe=True, initial=0
        )

    def subset(self, blocks: Sequence[int]) -> RowMap:
        """The map of some of the blocks only."""
        key = tuple(blocks)
        if key not in self._subsets:
            params = self.index.tolist()
            starts = [0, *itertools.accumulate(self.sizes)]
            chosen = [params[starts[b] : starts[b + 1]] for b in key]
            self._subsets[key] = RowMap(chosen, self.num_params, self.index.device)
        return self._subsets[key]


@dataclass
class Work:
    """Segments of one dtype as blocks: matrices [rows, columns], every row one param's own.

    A block is a segment of a single row [1, numel], or several segments of tiles that follow each
    other in memory, joined: then its ``param`` is that of its first row.
    """

    blocks: list[Segment]
    rows: RowMap
    dtype: torch.dtype  # of all arithmetic but the sums of squares
    tiled: bool
    kind: tuple[Any, ...] = ()  # of its segments
    #: what a backend keeps between its passes over these same tensors
    scratch: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.rows.index.device

    @property
    def numel(self) -> int:
        return sum(block.x.numel() for block in self.blocks)


def works_of(segments: Sequence[Segment], num_params: int, tiled: bool) -> list[Work]:
    """One work for each dtype of x, of segments on one device."""
    works = []
    for kind in dict.fromkeys(s.kind for s in segments):
        chosen = [s for s in segments if s.kind == kind]
        blocks: list[Segment] = []
        owners: list[list[int]] = []
        for s in chosen:
            if tiled and blocks and _follows(blocks[-1], s):
                blocks[-1] = blocks[-1].map(_extended_by(len(s.x)))
                owners[-1] += [s.param] * len(s.x)
            else:
                blocks.append(s if tiled else s.map(flat_row))
                owners.append([s.param] * len(blocks[-1].x))
        rows = RowMap(owners, num_params, segments[0].x.device)
        if chosen[0].narrow and not chosen[0].nearest:
            blocks = list(_placed(blocks, chosen, tiled))
        works.append(Work(blocks, rows, chosen[0].dtype, tiled, kind))
    return works


def _placed(
    blocks: Sequence[Segment], segments: Sequence[Segment], tiled: bool
) -> Iterator[Segment]:
    """The blocks that were made of these segments, with the places of their rows."""
    dims = max(len(s.elements.strides) for s in segments)
    rest = iter(segments)
    for block in blocks:
        places: list[Tensor] = []
        while sum(map(len, places)) < len(block.x):
            s = next(rest)
            rows, columns = s.x.shape if tiled else (1, 0)
            places.append(places_of(s.elements, dims, rows, columns))
        yield block._replace(places=torch.cat(places).to(block.x.device))


def _follows(a: Segment, b: Segment) -> bool:
    """Whether all tensors of tiles ``b`` begin where those of ``a`` end."""
    pairs = [(s, t) for s, t in zip(a.tensors(), b.tensors()) if s is not None and t is not None]
    return all(
        t.data_ptr() == s.data_ptr() + s.numel() * s.element_size()
        and t.untyped_storage().data_ptr() == s.untyped_storage().data_ptr()
        for s, t in pairs
    )


def _extended_by(rows: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t.as_strided((len(t) + rows, t.shape[1]), t.stride())


class EagerUpdate:
    """:class:`dist_lamb.kernels.Update` by operations on tensors, which it keeps alive."""

    keeps_memory = True

    def __init__(
        self,
        segments: Sequence[Segment],
        counters: Tensor,
        groups: GroupTable,
        rule: Rule,
        *,
        impl: str,
        tiled: bool,
    ) -> None:
        self.device = counters.device
        self.counters = counters
        self.ratios = torch.full_like(counters, torch.nan)
        self.sums = counters.new_zeros(len(counters), groups.columns, dtype=torch.float64)
        self._segments = [s._replace(grad=None) for s in segments]
        self._narrow = any(s.narrow for s in segments)
        self._groups, self._rule, self._impl, self._tiled = groups, rule, impl, tiled
        own = [k for k, other in enumerate(groups.rules) if other is rule]
        #: which params are of this rule; None: all
        self._own: Tensor | None = None
        if len(own) < len(counters):
            self._own = mask_of(own, len(counters), self.device, keep=[])
        self._present: list[bool] | None = None
        self._masked = False
        self.set_gradients([s.grad for s in segments])

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        present = [g is not None for g in grads]
        if present != self._present:
            chosen = [s._replace(grad=g) for s, g in zip(self._segments, grads) if g is not None]
            self._works = works_of(chosen, len(self.counters), self._tiled)
            self._backends = [backend_for(self._impl, self.device, w.numel) for w in self._works]
            order = {kind: n for n, kind in enumerate(w.kind for w in self._works)}
            self._owners = [order.get(s.kind) for s in self._segments]
            params = [s.param for s in chosen]
            self._active = mask_of(params, len(self.counters), self.device, keep=[])
            self._present = present
            return
        taken: list[list[Tensor]] = [[] for _ in self._works]
        for g, owner in zip(grads, self._owners):
            if g is not None and owner is not None:
                taken[owner].append(flat_row(g))
        for work, these in zip(self._works, taken):
            work.blocks = [b._replace(grad=g) for b, g in zip(work.blocks, these, strict=True)]

    def set_active(self, active: Tensor) -> None:
        self._active, self._masked = self._mine(active), True

    def _mine(self, mask: Tensor) -> Tensor:
        return mask if self._own is None else mask & self._own

    def release(self) -> None:
        for work in self._works:
            work.blocks = [b._replace(grad=None) for b in work.blocks]

    def grad_sq(self, reduction_groups: Sequence[Tensor] | None) -> Tensor:
        count = 1 if reduction_groups is None else len(reduction_groups)
        total = torch.zeros(count + 1, dtype=torch.float64, device=self.device)
        for work, partials in self._swept(SQUARES, Numbers()):
            if reduction_groups is None:
                total[0] += partials.sum()
            else:
                each = work.rows.sum(partials[:, 0])
                masked = [torch.where(mask, each, 0.0).sum() for mask in reduction_groups]
                total[:-1] += torch.stack(masked)
        return total

    def early(self) -> Tensor:
        sums = self.sums.new_zeros(len(self.counters), len(EARLY))
        if self._rule.early:
            places = [EARLY.index(name) for name in self._rule.early]
            for work, partials in self._swept(early_sweep(self._rule.early), Numbers()):
                sums[:, places] += work.rows.sum(partials)
        return sums

    def _swept(self, what: Sweep, numbers: Numbers) -> Iterator[tuple[Work, Tensor]]:
        for work, backend in zip(self._works, self._backends):
            yield work, backend.sweep(work, what, numbers.to(work.dtype))

    def moments(self, scalars: Scalars, to_reduce: bool, settled: bool) -> Tensor:
        rule, options = self._rule, scalars.options
        row = self._groups.gathered(options, rule)
        t = self.counters + 1
        taking_part = self._active
        guard = scalars.overflow is not None
        if scalars.overflow is not None:
            taking_part = taking_part & ~(scalars.overflow.to(self.device) > 0).view(())
        scale = self._gradient_scale(row, scalars)
        early = self._early(scalars, scale)
        c = rule.coefficients(row.h, t.double(), early)
        if hasattr(c, "l2") and not options.l2:
            c = c._replace(l2=None)
        n = Numbers(None, scale, t.double() if self._narrow else None, c)
        if self._masked or guard or self._own is not None:
            n = only_where(taking_part, n, rule, guard)
        sums = torch.zeros_like(self.sums)
        sums[:, UPDATED] = self._counts(row.h, taking_part, options.lr_zero)
        once = settled and not rule.late and not options.lr_zero
        if once:
            ratio, moves = self._moves(row, t, early, (), taking_part)
            n = n._replace(shrink=moves.shrink, steps=moves.steps)
        else:
            ratio = None
        norm = scalars.track_grad_norm
        what = rule_sweep(rule, moments=True, apply=once, norm=norm)
        for work, partials in self._swept(what, n):
            if what.columns:
                each = work.rows.sum(partials)
                late = what.columns - norm
                sums[:, :late] += each[:, :late]
                if norm:
                    sums[:, GRAD_SQ] += each[:, -1]
        self._pending = (row, n, t, early, taking_part, options.lr_zero, once, ratio)
        return sums

    def apply(self, sums: Tensor) -> None:
        rule = self._rule
        row, n, t, early, taking_part, lr_zero, once, ratio = self._pending
        self.sums = sums
        updated = self._mine(sums[:, UPDATED] > 0)
        if not once:
            late = sums[:, : len(rule.late)].unbind(1)
            ratio, moves = self._moves(row, t, early, late, updated)
        self.counters.copy_(torch.where(updated, t, self.counters))
        # Rounded as the params are, so that the order of the ranks leaves no trace here either.
        self.ratios = torch.where(updated, ratio, torch.nan).float()
        if once:
            return
        if lr_zero:
            self._erase(taking_part & ~updated)
            n = only_where(updated, n, rule, guard=n.active is not None)
        n = n._replace(shrink=moves.shrink, steps=moves.steps)
        for _ in self._swept(rule_sweep(rule, moments=False, apply=True), n):
            pass

    def _moves(
        self, row: Row, t: Tensor, early: Any, late: Any, where: Tensor
    ) -> tuple[Any, Numbers]:
        """The trust ratio; and how far x goes, 0 where it does not take part."""
        ratio, shrink, *steps = self._rule.scales(
            row.h, t.double(), early, late, self._groups.numels
        )
        zero = torch.zeros_like(self._groups.numels)
        moves = [torch.where(where, v, zero) for v in (shrink, *steps)]
        return ratio, Numbers(
            shrink=moves[0] if self._rule.shrinks else None, steps=tuple(moves[1:])
        )

    def _early(self, scalars: Scalars, scale: Tensor | None) -> tuple[Tensor, ...]:
        """The rule's early sums, as of scaled gradients."""
        if not self._rule.early:
            return ()
        assert scalars.early is not None
        columns = scalars.early.to(self.device).unbind(1)
        found = []
        for name in self._rule.early:
            value = columns[EARLY.index(name)]
            if scale is not None:
                value = value * scale ** name.count("g")
            found.append(value)
        return tuple(found)

    def _gradient_scale(self, row: Row, scalars: Scalars) -> Tensor | None:
        """What a gradient is multiplied with, float64 [params]; None where it is 1."""
        sign: Any = row.sign
        limit: Any = row.max_grad_norm
        inverse = scalars.inverse_scale(self.device)
        scale: Tensor | None = sign if scalars.options.maximize else None
        if inverse is not None:
            scale = sign * inverse
        if scalars.options.clip:
            assert scalars.grad_sq is not None
            grad_sq = scalars.grad_sq.to(self.device)
            if inverse is not None:
                grad_sq = grad_sq * inverse * inverse
            scale = (sign if scale is None else scale) * clip_coefficient(grad_sq, limit)
        return scale

    def _counts(self, h: Any, taking_part: Tensor, lr_zero: bool) -> Tensor:
        """Which params' steps count: those that take part, float64 [params].

        torch.distributed.checkpoint makes optimizers create their state by a step with lr = 0 and
        zero gradients. That must leave no counter behind, or the first real step would be
        bias-corrected as the second; so at lr = 0 a param without history and gradient does not
        count.
        """
        counts = taking_part.double()
        if lr_zero:
            seen = torch.zeros_like(counts)
            for w in self._works:
                for b, index in zip(w.blocks, w.rows.indices):
                    nonzero = [(t != 0).any(dim=1) for t in (b.grad, *b.states) if t is not None]
                    # Whatever the order of these sums of zeros and ones: only > 0 matters.
                    seen.index_add_(0, index, torch.stack(nonzero).any(dim=0).double())
            counts = counts * ((h.lr != 0) | (seen > 0))
        return counts

    def _erase(self, which: Tensor) -> None:
        """Zero again the states of params whose step did not count: L2 decay has entered them."""
        for w in self._works:
            for b, index in zip(w.blocks, w.rows.indices):
                keep = ~which[index][:, None]
                for state in b.states:
                    state.mul_(keep)
