"""The wires: the only file that calls a collective, and the only one with torch-version shims."""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
import weakref
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter

from .. import _torch_private

if TYPE_CHECKING:
    # With sympy behind it, this import would take longer than all else of this package.
    from torch.distributed.tensor import DTensor as DTensor
    from typing_extensions import TypeIs

ProcessGroup = dist.ProcessGroup
#: "self": this rank alone, as MPI_COMM_SELF is.
Group: TypeAlias = ProcessGroup | Literal["self"]
__all__ = ["Comm", "DeviceMesh", "Group", "ProcessGroup", "host_comm", "is_dtensor"]


class Comm:
    """Collectives over the ranks that share out a model, all on contiguous tensors.

    ``group`` is the shard axis: each of its ``world_size`` ranks owns a shard. With ``across``, the
    replicate axis, there are ``replicas`` such groups, which own the same shards once more.
    Without torch.distributed initialised, or on an axis of one rank, every operation is local.
    """

    def __init__(self, group: Group | None = None, across: ProcessGroup | None = None) -> None:
        if group is None and _initialized():
            group = dist.group.WORLD
        elif group == "self":
            group = None
        given: object = group
        if given == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this process is not a member of the process group it was given")
        if not isinstance(group, ProcessGroup | None):
            raise ValueError(
                f"Invalid process_group: {group!r}; a ProcessGroup, None or 'self' expected"
            )
        self._group, self._across = WeakGroup(group), WeakGroup(across)
        self.world_size: int = dist.get_world_size(group) if group is not None else 1
        self.rank: int = dist.get_rank(group) if group is not None else 0
        self.replicas: int = dist.get_world_size(across) if across is not None else 1
        #: whether another group of ranks may compute the same sums
        self.replicated = self.replicas > 1
        self._nccl = group is not None and _torch_private.gpu_backend(group) == "nccl"

    @property
    def group(self) -> ProcessGroup | None:
        """The shard axis; None where that is this rank alone."""
        return self._group.get()

    @property
    def across(self) -> ProcessGroup | None:
        """The replicate axis, if there is one."""
        return self._across.get()

    @staticmethod
    def of(group: Group | None, mesh: DeviceMesh | None) -> Comm:
        """The comm meant by the ``process_group`` and ``mesh`` arguments of an optimizer."""
        if mesh is None:
            return Comm(group)
        if group is not None:
            raise ValueError("give either process_group or mesh, not both")
        if mesh.ndim == 1:
            return Comm(mesh.get_group())
        if mesh.ndim == 2:
            return Comm(mesh.get_group(1), across=mesh.get_group(0))
        raise ValueError(
            f"a mesh of one axis (shard) or two (replicate, shard) expected, got {mesh.ndim} axes"
        )

    @staticmethod
    def along(axis: ProcessGroup) -> Comm:
        """One axis of a mesh: if there are other ranks, they may hold replicas."""
        comm = Comm(axis)
        comm.replicated = comm.world_size < Comm().world_size
        return comm

    @staticmethod
    def of_all() -> Comm:
        """All ranks, once it must be known which there are.

        Raises ``RuntimeError`` where others were started and cannot be reached.
        """
        world = os.environ.get("WORLD_SIZE", "1")
        if world != "1" and not _initialized():
            raise RuntimeError(
                f"WORLD_SIZE is {world}, but there is no process group, and every rank would train "
                "on its own: call torch.distributed.init_process_group() before the optimizer is "
                "first used. If that is meant, make it with process_group='self'"
            )
        return Comm()

    @staticmethod
    def known() -> bool:
        """Whether there is a process group already."""
        return _initialized()

    @property
    def me(self) -> int:
        """This rank among those of all groups, as messages name it."""
        return dist.get_rank() if _initialized() else 0

    def store(self, name: str) -> Any:
        """Where ranks can leave words for each other, under a name of their own; another client
        than the one that backends use, for a wait on it keeps others from it."""
        store = _torch_private.default_store().clone()
        return dist.distributed_c10d.PrefixStore(f"dist_lamb {name}", store)

    def timeout(self) -> timedelta:
        """After how long a collective fails."""
        return _torch_private.timeout_of(self.group)

    @property
    def num_ranks(self) -> int:
        """Ranks on both axes together."""
        return self.world_size * self.replicas

    def broadcast(self, t: Tensor) -> None:
        """In place, from rank 0 of both axes."""
        if self.replicas > 1:
            dist.broadcast(t, group=self.across, group_src=0)
        if self.world_size > 1:
            dist.broadcast(t, group=self.group, group_src=0)

    @torch.no_grad()
    def broadcast_all(self, tensors: Iterable[Tensor]) -> None:
        """The same, of tensors in any memory format."""
        for t in tensors:
            whole = t.detach().contiguous()
            self.broadcast(whole)
            if whole.data_ptr() != t.data_ptr():
                t.copy_(whole)

    def from_first(self, value: Any) -> Any:
        """A picklable ``value`` of rank 0 of both axes, on every rank."""
        box = [value]
        for size, group in self._axes():
            if size > 1:
                dist.broadcast_object_list(box, group=group, group_src=0)
        return box[0]

    def everyone(self, item: Any) -> list[Any]:
        """A picklable ``item`` of every rank on both axes, in order, on every rank."""
        found = [item]
        for size, group in reversed(self._axes()):
            if size > 1:
                several: list[list[Any]] = [[] for _ in range(size)]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    dist.all_gather_object(several, found, group=group)
                found = [one for some in several for one in some]
        return found

    def _axes(self) -> list[tuple[int, ProcessGroup | None]]:
        return [(self.replicas, self.across), (self.world_size, self.group)]

    def all_reduce_sum(self, t: Tensor) -> Tensor:
        """Over the shard axis, in place or not; the same bits in all of its replicas."""
        if self.replicated and self.world_size > 2:
            # Another group's all-reduce may add in another order, and a trust ratio that differs
            # in one bit lets replicas drift apart. So the order is fixed here: that of the ranks.
            whole = t.new_empty(self.world_size, *t.shape)
            self.all_gather(whole, t.contiguous())
            return whole.sum(dim=0)
        if self.world_size > 1:
            dist.all_reduce(t, group=self.group)
        return t

    def sum_over_all(self, t: Tensor) -> Tensor:
        """In place, over both axes."""
        for size, group in self._axes():
            if size > 1:
                dist.all_reduce(t, group=group)
        return t

    def all_reduce_across(self, t: Tensor) -> Tensor:
        """In place, over the replicate axis: the sum, or the mean if it :attr:`averages`."""
        if self.replicas > 1:
            dist.all_reduce(t, op=self._op(t), group=self.across)
        return t

    def averages(self, device: torch.device) -> bool:
        """Whether reductions of gradients divide by the number of ranks too."""
        # NCCL multiplies with the reciprocal, which is exact for powers of two alone.
        exact = self.num_ranks & (self.num_ranks - 1) == 0
        return exact and device.type == "cuda" and self._nccl

    def _op(self, t: Tensor) -> Any:
        return dist.ReduceOp.AVG if self.averages(t.device) else dist.ReduceOp.SUM

    def reduce_scatter(self, shard: Tensor, whole: Tensor, async_op: bool = False) -> Any:
        """``shard`` [n] <- this rank's part of the sum over the shard axis of ``whole`` [W * n].

        The mean, if it :attr:`averages`.
        With ``async_op`` it is there after ``wait()`` of the ``Work`` returned, if there is one.
        """
        shard, whole = shard.view(-1), whole.view(-1)
        if self.world_size == 1:
            shard.copy_(whole)
            return None
        if hasattr(dist, "reduce_scatter_single"):  # torch >= 2.13, where the other name warns
            return dist.reduce_scatter_single(
                shard, whole, op=self._op(whole), group=self.group, async_op=async_op
            )
        return dist.reduce_scatter_tensor(
            shard, whole, op=self._op(whole), group=self.group, async_op=async_op
        )

    def all_gather(self, whole: Tensor, shard: Tensor, async_op: bool = False) -> Any:
        """``whole`` [W * n] <- the ranks' ``shard`` [n], which may be a view into ``whole``.

        ``async_op`` as in :meth:`reduce_scatter`.
        """
        whole, shard = whole.view(-1), shard.view(-1)
        if self.world_size == 1:
            if whole.data_ptr() != shard.data_ptr():
                whole.copy_(shard)
            return None
        if hasattr(dist, "all_gather_single"):
            return dist.all_gather_single(whole, shard, group=self.group, async_op=async_op)
        return dist.all_gather_into_tensor(whole, shard, group=self.group, async_op=async_op)

    def require_same(self, what: str, items: list[Any], device: torch.device) -> None:
        """Raise the same ``ValueError`` on every rank if ``items`` differ between ranks.

        The error names the first item that differs. Only a digest travels when all is well.
        """
        digest = list(hashlib.sha256(repr(items).encode()).digest())
        same = True
        for size, group in self._axes():
            if size > 1:
                # A difference on the first axis reaches all ranks by the second: its flag travels.
                mine = torch.tensor([*digest, same], dtype=torch.uint8, device=device)
                everyone = [torch.empty_like(mine) for _ in range(size)]
                dist.all_gather(everyone, mine, group=group)
                same = same and all(torch.equal(mine, other) for other in everyone)
        if not same:
            theirs = self.everyone(items)
            raise ValueError(f"{what} differ between ranks: {_first_difference(theirs)}")

    def gather_objects(self, item: Any) -> list[Any]:
        """Every rank's ``item``, in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return [item]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, item, group=self.group)
        return found


class WeakGroup:
    """A process group, or None, without keeping it alive.

    Else ``destroy_process_group()`` would leave gloo's threads running. One that still lets go of
    a tensor when Python ends aborts the process (pytorch/pytorch#190489).
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self._ref = None if group is None else weakref.ref(group)

    def get(self) -> ProcessGroup | None:
        group = None if self._ref is None else self._ref()
        if group is None and self._ref is not None:
            raise RuntimeError(
                "the process group was destroyed by torch.distributed.destroy_process_group(): "
                "call this before, or make the optimizer anew in a new one"
            )
        return group


#: {a default group: a second one of the same ranks}
_host_groups: weakref.WeakKeyDictionary[ProcessGroup, weakref.ref[ProcessGroup]]
_host_groups = weakref.WeakKeyDictionary()


def host_comm(group: ProcessGroup | None = None) -> Comm:
    """``group``, or all ranks through a gloo group apart: for host data, from any thread.

    Two threads must not use one group, or the ranks would pair up different operations. The group
    apart is made at the first call, by all ranks; only they can make one, so for other sets of
    ranks the caller does.
    """
    world = dist.group.WORLD if group is None and _initialized() else None
    if world is None:
        return Comm(group)
    known = _host_groups.get(world)
    second = known() if known is not None else None
    if second is None:
        second = dist.new_group(backend="gloo")
        _host_groups[world] = weakref.ref(second)
    return Comm(second)


def _first_difference(theirs: list[list[Any]]) -> str:
    for i in range(max(map(len, theirs))):
        items = [t[i] if i < len(t) else "nothing" for t in theirs]
        for rank, item in enumerate(items):
            if item != items[0]:
                return f"rank 0 has {items[0]}, rank {rank} has {item}"
    return "no item does, but their digests do"


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_dtensor(t: Tensor) -> TypeIs[DTensor]:
    kind = type(t)
    if kind is Tensor or kind is Parameter:
        return False
    # Nothing is a DTensor before the module was imported.
    known = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return known is not None and isinstance(t, known)
