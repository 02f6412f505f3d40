"""What a norm over the whole of a parameter, or of the model, is: local sums of squares, added up
over the ranks that own pieces, in float64, with one all-reduce whatever the number of parameters.

Float64 sums of float32 squares carry 29 bits more than the float32 results they end in, so the
order of the ranks leaves no trace in the bits of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .kernels.device import int64
from .sharding.comm import Comm
from .sharding.dtensors import Axis, cut_axes


class Norms(Protocol):
    """Adds local sums up over ranks, in place or not; every rank gets the same bits."""

    #: Whether there is nothing to add.
    local: bool
    #: Whether it is known before ``per_param`` which params step.
    settled: bool

    def reduction_groups(self, device: torch.device) -> Sequence[Tensor] | None:
        """bool [params] each, on ``device``: params whose sums are added up over the same ranks.

        None: all params' are.
        """
        ...

    def per_param(self, sums: Tensor) -> Tensor:
        """float64 [params, columns] of this rank -> of all ranks."""
        ...

    def over_all(self, sums: Tensor, early: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """float64 [reduction groups + 1], the last one a flag, of this rank -> [2] of all ranks:
        sum and flag. ``early``, [params, columns], is added up by the same collectives."""
        ...


def add_up(
    collective: Callable[[Tensor], Tensor], some: Tensor, other: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Two tensors over ranks, by one collective."""
    if other is None:
        return collective(some), None
    both = collective(torch.cat([some.reshape(-1), other.reshape(-1)]))
    return both[: some.numel()].view_as(some), both[some.numel() :].view_as(other)


class FlatNorms:
    """Tensors are cut over the ranks of ``comm``, each element owned by one rank."""

    settled = True

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self.local = comm.world_size == 1

    def reduction_groups(self, device: torch.device) -> None:
        return None

    def per_param(self, sums: Tensor) -> Tensor:
        return self._comm.all_reduce_sum(sums)

    def over_all(self, sums: Tensor, early: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return add_up(self._comm.all_reduce_sum, sums, early)


class DTensorNorms:
    """Params are DTensors, or plain tensors that every rank has alike: one collective an axis.

    A param's sums are added up along the mesh axes that cut it, and along no others: replicas
    have the same sums already. All params cut along an axis travel together. The axes take turns
    in the order in which ``params``, the same on all ranks, lead to them.
    """

    settled = True

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._axes: list[_AxisSum] = []
        cuts = [tuple(self._enter(axis) for axis in cut_axes(p)) for p in params]
        groups = list(dict.fromkeys(cuts))
        self.local = not self._axes
        self._masks = [
            torch.tensor([cut == group for cut in cuts], dtype=torch.bool, device="cpu")
            for group in groups
        ]
        self._masks_on: dict[torch.device, list[Tensor]] = {}
        for a, axis in enumerate(self._axes):
            axis.params = _Rows([i for i, cut in enumerate(cuts) if a in cut], len(cuts))
            # The flag goes along every axis: it must reach all.
            axis.groups = _Rows(
                [k for k, group in enumerate(groups) if a in group] + [len(groups)],
                len(groups) + 1,
            )

    def _enter(self, axis: Axis) -> int:
        for a, known in enumerate(self._axes):
            if known.comm.group is axis.group:
                return a
        self._axes.append(_AxisSum(axis))
        return len(self._axes) - 1

    def reduction_groups(self, device: torch.device) -> Sequence[Tensor] | None:
        if len(self._masks) < 2:
            return None
        if device not in self._masks_on:
            self._masks_on[device] = [mask.to(device) for mask in self._masks]
        return self._masks_on[device]

    def per_param(self, sums: Tensor) -> Tensor:
        for axis in self._axes:
            sums, _ = axis.add_up(sums, axis.params)
        return sums

    def over_all(self, sums: Tensor, early: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for axis in self._axes:
            sums, early = axis.add_up(sums, axis.groups, early)
        if len(sums) > 2:
            sums = torch.stack([sums[:-1].sum(), sums[-1]])
        return sums, early


class _Rows:
    """Some of ``count`` rows, as an index on any device; None where it is all of them."""

    def __init__(self, rows: list[int], count: int) -> None:
        self._all = len(rows) == count
        self._rows = int64(rows)
        self._on: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor | None:
        if self._all:
            return None
        if device not in self._on:
            self._on[device] = self._rows.to(device)
        return self._on[device]


class _AxisSum:
    """Adds rows up along one mesh axis."""

    params: _Rows  # that are cut along the axis
    groups: _Rows  # reduction groups of such params, and the flag

    def __init__(self, axis: Axis) -> None:
        self.comm, self._device_type = Comm.along(axis.group), axis.device_type

    def add_up(
        self, sums: Tensor, rows: _Rows, early: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The chosen rows of ``sums`` added up over the ranks, the others as they are; by the same
        collective the rows of ``early`` of params that are cut along the axis."""
        index = rows.on(sums.device)
        of_params = None if early is None else self.params.on(early.device)
        total, early_total = add_up(
            self._sum,
            sums if index is None else sums[index],
            early if early is None or of_params is None else early[of_params],
        )
        if index is not None:
            sums[index] = total
            total = sums
        if early is not None and early_total is not None and of_params is not None:
            early[of_params] = early_total
            early_total = early
        return total, early_total

    def _sum(self, mine: Tensor) -> Tensor:
        home = mine.device
        if home.type != self._device_type:
            # Offloaded params are on the CPU, and NCCL adds up on the GPU only.
            mine = mine.to(self._device_type)
        return self.comm.all_reduce_sum(mine).to(home)
