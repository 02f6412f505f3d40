"""The wires: the only file that calls a collective, and the only one with torch-version shims."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

ProcessGroup = dist.ProcessGroup
__all__ = ["Comm", "DeviceMesh", "ProcessGroup", "is_dtensor"]


class Comm:
    """Collectives over one process group, all on contiguous tensors.

    Without torch.distributed initialised, or in a group of one rank, every operation is local.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self.group = group
        self.world_size: int = dist.get_world_size(group) if group is not None else 1
        self.rank: int = dist.get_rank(group) if group is not None else 0
        if self.rank < 0:
            raise ValueError("this process is not a member of the process group it was given")

    @staticmethod
    def of(group: ProcessGroup | None, mesh: DeviceMesh | None) -> Comm:
        """The comm meant by the ``process_group`` and ``mesh`` arguments of an optimizer."""
        if mesh is None:
            return Comm(group)
        if group is not None:
            raise ValueError("give either process_group or mesh, not both")
        if mesh.ndim != 1:
            raise ValueError(f"a mesh of one axis expected, got {mesh.ndim} axes: {mesh}")
        return Comm(mesh.get_group())

    def broadcast(self, t: Tensor) -> None:
        """In place, from the group's rank 0."""
        if self.world_size > 1:
            dist.broadcast(t, group=self.group, group_src=0)

    def all_reduce_sum(self, t: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(t, group=self.group)
        return t

    def reduce_scatter_sum(self, shard: Tensor, whole: Tensor) -> None:
        """``shard`` [n] <- this rank's n elements of the sum over ranks of ``whole`` [W * n]."""
        shard, whole = shard.view(-1), whole.view(-1)
        if self.world_size == 1:
            shard.copy_(whole)
        elif hasattr(dist, "reduce_scatter_single"):  # torch >= 2.13, where the other name warns
            dist.reduce_scatter_single(shard, whole, group=self.group)
        else:
            dist.reduce_scatter_tensor(shard, whole, group=self.group)

    def all_gather(self, whole: Tensor, shard: Tensor) -> None:
        """``whole`` [W * n] <- the ranks' ``shard`` [n], which may be a view into ``whole``."""
        whole, shard = whole.view(-1), shard.view(-1)
        if self.world_size == 1:
            if whole.data_ptr() != shard.data_ptr():
                whole.copy_(shard)
        elif hasattr(dist, "all_gather_single"):
            dist.all_gather_single(whole, shard, group=self.group)
        else:
            dist.all_gather_into_tensor(whole, shard, group=self.group)

    def require_same(self, what: str, items: list[Any], device: torch.device) -> None:
        """Raise the same ``ValueError`` on every rank if ``items`` differ between ranks.

        The error names the first item that differs. Only a digest travels when all is well.
        """
        if self.world_size == 1:
            return
        digest = hashlib.sha256(repr(items).encode()).digest()
        mine = torch.tensor(list(digest), dtype=torch.uint8, device=device)
        everyone = torch.empty(self.world_size * len(digest), dtype=torch.uint8, device=device)
        self.all_gather(everyone, mine)
        if bool((everyone.view(self.world_size, -1) == mine).all(dim=1).all()):
            # Every rank takes this branch or none does: equality with all is symmetric.
            return
        theirs: list[list[Any]] = [[] for _ in range(self.world_size)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist.all_gather_object(theirs, items, group=self.group)
        raise ValueError(f"{what} differ between ranks: {_first_difference(theirs)}")


def _first_difference(theirs: list[list[Any]]) -> str:
    for i in range(max(map(len, theirs))):
        items = [t[i] if i < len(t) else "nothing" for t in theirs]
        for rank, item in enumerate(items):
            if item != items[0]:
                return f"rank 0 has {items[0]}, rank {rank} has {item}"
    return "no item does, but their digests do"


def is_dtensor(t: Tensor) -> bool:
    return isinstance(t, DTensor)
