"""A step on tensors: what the backends ``reference``, ``foreach`` and ``compiled`` have in common.

Each of them is a module with three functions on a :class:`Work`::

    grad_sq(work)                    squares of the gradient, float64 [rows]
    moments(work, c, norm)           new states; squares of x, u and (``norm``) of the gradient,
                                     float64 [rows, 2 or 3]
    apply(work, c, step_size)        x <- x - step_size * u, and the half-precision copies

``c`` is a :class:`dist_lamb.rule.Coefficients` of [params] tensors, ``step_size`` is [params]; both
in ``work.dtype``. ``work.rows.sum`` adds rows up to params.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import rule
from ..state import flat_row
from . import backend_for
from .device import mask_of
from .groups import GroupTable
from .segments import COLUMNS, U_SQ, UPDATED, X_SQ, Scalars, Segment


class RowMap:
    """Which param every row of a :class:`Work` belongs to; built once, never changed.

    ``blocks`` holds, for every block, the param index of each of its rows.
    """

    def __init__(
        self, blocks: Sequence[Sequence[int]], num_params: int, device: torch.device
    ) -> None:
        flat = torch.tensor([k for block in blocks for k in block], dtype=torch.int64)
        self.num_params = num_params
        #: int64 [rows], the param of each row
        self.index = flat.to(device)
        self.sizes = [len(block) for block in blocks]
        #: the same, block by block
        self.indices = list(torch.split(self.index, self.sizes))
        self._subsets: dict[tuple[int, ...], RowMap] = {}
        order = torch.argsort(flat, stable=True)
        sorted_already = bool((order == torch.arange(len(flat))).all())
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
    dtype: torch.dtype  # of x and of all arithmetic but the sums of squares
    tiled: bool
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
    for dtype in dict.fromkeys(s.x.dtype for s in segments):
        blocks: list[Segment] = []
        owners: list[list[int]] = []
        for s in segments:
            if s.x.dtype != dtype:
                continue
            if tiled and blocks and _follows(blocks[-1], s):
                blocks[-1] = blocks[-1].map(_extended_by(len(s.x)))
                owners[-1] += [s.param] * len(s.x)
            else:
                blocks.append(s if tiled else s.map(flat_row))
                owners.append([s.param] * len(blocks[-1].x))
        rows = RowMap(owners, num_params, segments[0].x.device)
        works.append(Work(blocks, rows, dtype, tiled))
    return works


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


def square_sum(t: Tensor) -> Tensor:
    """Sum of squares of each row in float64, [rows, cols] -> [rows].

    The squares themselves are float64: rounding them to float32 first would leave norms that
    depend on how the tensor was cut.
    """
    return t.to(torch.float64, copy=True).square_().sum(dim=-1)


class EagerUpdate:
    """:class:`dist_lamb.kernels.Update` by operations on tensors, which it keeps alive."""

    keeps_memory = True

    def __init__(
        self,
        segments: Sequence[Segment],
        counters: Tensor,
        groups: GroupTable,
        *,
        impl: str,
        tiled: bool,
    ) -> None:
        self.device = counters.device
        self.counters = counters
        self.ratios = torch.full_like(counters, torch.nan)
        self.sums = torch.zeros(len(counters), COLUMNS, dtype=torch.float64, device=self.device)
        self._segments = [s._replace(grad=None) for s in segments]
        self._groups, self._impl, self._tiled = groups, impl, tiled
        self._present: list[bool] | None = None
        self._masked = False
        self.set_gradients([s.grad for s in segments])

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        present = [g is not None for g in grads]
        if present != self._present:
            chosen = [s._replace(grad=g) for s, g in zip(self._segments, grads) if g is not None]
            self._works = works_of(chosen, len(self.counters), self._tiled)
            self._backends = [backend_for(self._impl, self.device, w.numel) for w in self._works]
            order = {dtype: n for n, dtype in enumerate(w.dtype for w in self._works)}
            self._owners = [order.get(s.x.dtype) for s in self._segments]
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
        self._active, self._masked = active, True

    def release(self) -> None:
        for work in self._works:
            work.blocks = [b._replace(grad=None) for b in work.blocks]

    def grad_sq(self, reduction_groups: Sequence[Tensor] | None) -> Tensor:
        count = 1 if reduction_groups is None else len(reduction_groups)
        total = torch.zeros(count + 1, dtype=torch.float64, device=self.device)
        for work, backend in zip(self._works, self._backends):
            partials = backend.grad_sq(work)
            if reduction_groups is None:
                total[0] += partials.sum()
            else:
                each = work.rows.sum(partials)
                masked = [torch.where(mask, each, 0.0).sum() for mask in reduction_groups]
                total[:-1] += torch.stack(masked)
        return total

    def moments(self, scalars: Scalars, to_reduce: bool) -> Tensor:
        h = self._groups.gathered(scalars.options)
        t = self.counters + 1
        taking_part = self._active
        guard = scalars.overflow is not None
        if scalars.overflow is not None:
            taking_part = taking_part & ~(scalars.overflow.to(self.device) > 0).view(())
        c = rule.coefficients(h, t.double(), self._gradient_scale(h, scalars), scalars.options.l2)
        if self._masked or guard:
            c = rule.only_where(taking_part, c, guard)
        sums = torch.zeros_like(self.sums)
        sums[:, UPDATED] = self._counts(h, taking_part, scalars.options.lr_zero)
        for work, backend in zip(self._works, self._backends):
            each = work.rows.sum(backend.moments(work, c.to(work.dtype), scalars.track_grad_norm))
            sums[:, : each.shape[1]] += each
        self._pending = (h, c, t, taking_part, scalars.options.lr_zero)
        return sums

    def apply(self, sums: Tensor) -> None:
        h, c, t, taking_part, lr_zero = self._pending
        self.sums = sums
        updated = sums[:, UPDATED] > 0
        rho = rule.trust_ratio(sums[:, X_SQ], sums[:, U_SQ], h)
        self.counters.copy_(torch.where(updated, t, self.counters))
        # Rounded as the params are, so that the order of the ranks leaves no trace here either.
        self.ratios = torch.where(updated, rho, torch.nan).float()
        if lr_zero:
            self._erase(taking_part & ~updated)
            c = rule.only_where(updated, c, guard=False)
        step_size = torch.where(updated, h.lr * rho, 0.0)
        for work, backend in zip(self._works, self._backends):
            backend.apply(work, c.to(work.dtype), step_size.to(work.dtype))

    def _gradient_scale(self, h: rule.Hyperparameters, scalars: Scalars) -> Tensor | None:
        """What a gradient is multiplied with, float64 [params]; None where it is 1."""
        inverse = scalars.inverse_scale(self.device)
        scale = h.sign if scalars.options.maximize else None
        if inverse is not None:
            scale = h.sign * inverse
        if scalars.options.clip:
            assert scalars.grad_sq is not None
            grad_sq = scalars.grad_sq.to(self.device)
            if inverse is not None:
                grad_sq = grad_sq * inverse * inverse
            clip = rule.clip_coefficient(grad_sq, h.max_grad_norm)
            scale = (h.sign if scale is None else scale) * clip
        return scale

    def _counts(self, h: rule.Hyperparameters, taking_part: Tensor, lr_zero: bool) -> Tensor:
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
