"""What a norm over the whole of a parameter, or of the model, is: local sums of squares, added up
over the ranks that own pieces, in float64, with one all-reduce whatever the number of parameters.

Float64 sums of float32 squares carry 29 bits more than the float32 results they end in, so the
order of the ranks leaves no trace in the bits of a parameter.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .sharding.comm import Comm


class Norms(Protocol):
    """Adds local sums up over ranks, in place or not; every rank gets the same bits."""

    #: Whether there is nothing to add.
    local: bool

    def per_param(self, sums: Tensor) -> Tensor:
        """float64 [params, columns] of this rank -> of all ranks."""
        ...

    def over_all(self, sums: Tensor) -> Tensor:
        """float64 [columns] of this rank -> of all ranks."""
        ...


class LocalNorms:
    """Every tensor is whole on this device: nothing to add."""

    local = True

    def per_param(self, sums: Tensor) -> Tensor:
        return sums

    def over_all(self, sums: Tensor) -> Tensor:
        return sums


class FlatNorms:
    """Tensors are cut over the ranks of ``comm``, each element owned by one rank."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self.local = comm.world_size == 1

    def per_param(self, sums: Tensor) -> Tensor:
        return self._comm.all_reduce_sum(sums)

    def over_all(self, sums: Tensor) -> Tensor:
        return self._comm.all_reduce_sum(sums)
