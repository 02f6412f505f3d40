"""The params of one device under several rules: one Update each, which seem to be one.

Every param is of one rule, so that rows of the others' sums are zero: all travel in one table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from ..rules import Rule
from . import Update
from .groups import GroupTable
from .segments import Scalars, Segment


class SeveralRules:
    """:class:`dist_lamb.kernels.Update` over the Updates of each rule."""

    def __init__(
        self,
        segments: Sequence[Segment],
        groups: GroupTable,
        makers: Sequence[tuple[Rule, Callable[[Sequence[Segment]], Update]]],
    ) -> None:
        #: (an Update, the positions of its segments)
        self._parts: list[tuple[Update, list[int]]] = []
        for rule, make in makers:
            chosen = [i for i, s in enumerate(segments) if groups.rules[s.param] is rule]
            self._parts.append((make([segments[i] for i in chosen]), chosen))
        self._updates = [update for update, _ in self._parts]
        self.device = self._updates[0].device
        self.counters = self._updates[0].counters
        self.keeps_memory = any(update.keeps_memory for update in self._updates)
        #: of each rule, where they are not added up over ranks
        self._own_sums: list[Tensor] | None = None

    @property
    def ratios(self) -> Tensor:
        return reduce(lambda a, b: torch.where(a.isnan(), b, a), [u.ratios for u in self._updates])

    @property
    def sums(self) -> Tensor:
        sums = [update.sums for update in self._updates]
        return sums[0] if self._own_sums is None else reduce(add, sums)

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        for update, chosen in self._parts:
            update.set_gradients([grads[i] for i in chosen])

    def set_active(self, active: Tensor) -> None:
        for update in self._updates:
            update.set_active(active)

    def release(self) -> None:
        for update in self._updates:
            update.release()

    def grad_sq(self, reduction_groups: Sequence[Tensor] | None) -> Tensor:
        return reduce(add, [update.grad_sq(reduction_groups) for update in self._updates])

    def early(self) -> Tensor:
        return reduce(add, [update.early() for update in self._updates])

    def moments(self, scalars: Scalars, to_reduce: bool, settled: bool) -> Tensor:
        sums = [update.moments(scalars, to_reduce, settled) for update in self._updates]
        self._own_sums = None if to_reduce else sums
        return reduce(add, sums) if to_reduce else sums[0]

    def apply(self, sums: Tensor) -> None:
        for k, update in enumerate(self._updates):
            update.apply(sums if self._own_sums is None else self._own_sums[k])
