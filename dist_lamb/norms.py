"""What a norm over the whole of a parameter, or of the model, is: local sums of squares, added up
over the ranks that own pieces, in float64, with one all-reduce whatever the number of parameters.

Float64 sums of float32 squares carry 29 bits more than the float32 results they end in, so the
order of the ranks leaves no trace in the bits of a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .sharding.comm import Comm
from .sharding.dtensors import Axis, cut_axes


class Norms(Protocol):
    """Adds local sums up over ranks, in place or not; every rank gets the same bits."""

    #: Whether there is nothing to add.
    local: bool

    def reduction_groups(self, device: torch.device) -> Sequence[Tensor] | None:
        """bool [params] each, on ``device``: params whose sums are added up over the same ranks.

        None: all params' are.
        """
        ...

    def per_param(self, sums: Tensor) -> Tensor:
        """float64 [params, columns] of this rank -> of all ranks."""
        ...

    def over_all(self, sums: Tensor) -> Tensor:
        """float64 [reduction groups + 1], the last one a flag, of this rank -> [2] of all ranks:
        sum and flag."""
        ...


class LocalNorms:
    """Every tensor is whole on this device: nothing to add."""

    local = True

    def reduction_groups(self, device: torch.device) -> None:
        return None

    def per_param(self, sums: Tensor) -> Tensor:
        return sums

    def over_all(self, sums: Tensor) -> Tensor:
        return sums


class FlatNorms:
    """Tensors are cut over the ranks of ``comm``, each element owned by one rank."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self.local = comm.world_size == 1

    def reduction_groups(self, device: torch.device) -> None:
        return None

    def per_param(self, sums: Tensor) -> Tensor:
        return self._comm.all_reduce_sum(sums)

    def over_all(self, sums: Tensor) -> Tensor:
        return self._comm.all_reduce_sum(sums)


class DTensorNorms:
    """Params are DTensors, or plain tensors that every rank has alike: one collective an axis.

    A param's sums are added up along the mesh axes that cut it, and along no others: replicas
    have the same sums already. All params cut along an axis travel together. The axes take turns
    in the order in which ``params``, the same on all ranks, lead to them.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._axes: list[_AxisSum] = []
        cuts = [tuple(self._enter(axis) for axis in cut_axes(p)) for p in params]
        groups = list(dict.fromkeys(cuts))
        self.local = not self._axes
        self._masks = [torch.tensor([cut == group for cut in cuts]) for group in groups]
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
            if known.group is axis.group:
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
            sums = axis.add_up(sums, axis.params)
        return sums

    def over_all(self, sums: Tensor) -> Tensor:
        for axis in self._axes:
            sums = axis.add_up(sums, axis.groups)
        return sums if len(sums) == 2 else torch.stack([sums[:-1].sum(), sums[-1]])


class _Rows:
    """Some of ``count`` rows, as an index on any device; None where it is all of them."""

    def __init__(self, rows: list[int], count: int) -> None:
        self._all = len(rows) == count
        self._rows = torch.tensor(rows, dtype=torch.int64)
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
        self.group, self._device_type = axis.group, axis.device_type
        self._comm = Comm.along(axis.group)

    def add_up(self, sums: Tensor, rows: _Rows) -> Tensor:
        """The chosen rows of ``sums`` added up over the ranks, the others as they are."""
        index = rows.on(sums.device)
        total = self._sum(sums if index is None else sums[index])
        if index is None:
            return total
        sums[index] = total
        return sums

    def _sum(self, mine: Tensor) -> Tensor:
        home = mine.device
        if home.type != self._device_type:
            # Offloaded params are on the CPU, and NCCL adds up on the GPU only.
            mine = mine.to(self._device_type)
        return self._comm.all_reduce_sum(mine).to(home)
