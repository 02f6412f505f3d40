"""What a DTensor is made of: this rank's piece of it, and the mesh axes along which it is cut.

Every function takes a plain tensor too, and then has nothing to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch_private
from ..elements import Elements
from .comm import DeviceMesh, ProcessGroup, is_dtensor

if TYPE_CHECKING:
    from .comm import DTensor


def local_of(t: Tensor) -> Tensor:
    """This rank's piece of a DTensor, the memory itself; any other tensor as it is."""
    if not is_dtensor(t):
        return t
    local = _torch_private.local_tensor(t)
    # What a functional collective returns has no address until it was waited for.
    wait = getattr(local, "wait", None)
    return local if wait is None else wait()  # type: ignore[no-any-return]


def local_sharded_as(t: Tensor, like: Tensor) -> Tensor | None:
    """This rank's piece of ``t`` if that is a DTensor sharded as ``like`` is, with an address."""
    if not is_dtensor(t):
        return None
    spec, other = _torch_private.spec(t), _torch_private.spec(like)
    same = spec is other or (spec.placements, spec.mesh) == (other.placements, other.mesh)
    local: Tensor = _torch_private.local_tensor(t)
    return local if same and type(local) is Tensor else None


def wrapped(local: Tensor, like: Tensor) -> Tensor:
    """``local`` as this rank's piece of a tensor that is sharded as ``like`` is."""
    if not is_dtensor(like):
        return local
    whole = torch.empty_like(like.detach(), dtype=local.dtype)
    return _torch_private.wrap_local(whole, local)  # type: ignore[no-any-return]


def full_of(value: Tensor) -> Tensor:
    """The whole tensor, on every rank; a collective. No backend sends 16-bit integers as such."""
    if not is_dtensor(value):
        return value
    if value.dtype != torch.int16:
        return value.full_tensor()
    as_sent: Any = wrapped(local_of(value).view(torch.bfloat16), value)
    return as_sent.full_tensor().view(torch.int16)  # type: ignore[no-any-return]


def piece_of(value: Tensor, like: Tensor) -> Tensor:
    """This rank's piece of ``value``, a whole tensor or a DTensor, were it sharded as ``like`` is.

    A collective if ``value`` is a DTensor that is sharded in another way.
    """
    if is_dtensor(value) and is_dtensor(like) and _same_sharding(value, like):
        return local_of(value)
    value = full_of(value)
    if is_dtensor(like):
        # What DTensor tells torch.distributed.checkpoint: right for FSDP over TP as well, where
        # the placements alone do not say which axis cuts first.
        for chunk in like.__create_chunk_list__():  # type: ignore[no-untyped-call]
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes)):
                value = value.narrow(dim, min(offset, value.shape[dim]), size)
    return value


def elements_of(p: Tensor, local: Tensor) -> Elements:
    """Which elements of ``p`` its local memory holds, as ``local`` lays them out."""
    if not is_dtensor(p) or not local.numel():
        return Elements.of(local.shape, local.stride())
    # as in piece_of: right for FSDP over TP as well
    (chunk,) = p.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return Elements.of(local.shape, local.stride(), p.shape, chunk.offsets)


def placed_as(grad: Tensor, like: Tensor) -> Tensor:
    """A gradient with the placements of its param; a collective where they differ."""
    if not is_dtensor(grad) or not is_dtensor(like):
        return grad
    if grad.placements == like.placements:
        return grad
    return grad.redistribute(placements=like.placements)


def _same_sharding(a: DTensor, b: DTensor) -> bool:
    return a.placements == b.placements and a.device_mesh == b.device_mesh


class Axis(NamedTuple):
    """A mesh axis along which a tensor is cut."""

    group: ProcessGroup  # of this rank, along the axis
    device_type: str  # of the mesh: what the group's backend takes


def elsewhere(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor on a mesh of other ranks: this one has no piece of it."""
    return is_dtensor(t) and t.device_mesh.get_coordinate() is None


def cut_axes(t: Tensor) -> Iterator[Axis]:
    """The axes over which sums over this rank's piece of ``t`` must be added up."""
    for axis, mesh in _cuts(t):
        yield Axis(mesh.get_group(axis), mesh.device_type)


def num_pieces(t: Tensor) -> int:
    """Over how many ranks ``t`` is cut."""
    return math.prod(mesh.size(axis) for axis, mesh in _cuts(t))


def _cuts(t: Tensor) -> Iterator[tuple[int, DeviceMesh]]:
    if not is_dtensor(t) or elsewhere(t):
        return
    mesh = t.device_mesh
    for axis, placement in enumerate(t.placements):
        # Not is_shard(): false for the strided shards of FSDP over TP.
        if not placement.is_replicate() and mesh.size(axis) > 1:
            yield axis, mesh


def refusal(p: Tensor) -> str | None:
    """Why the norm of the logical param cannot be known from ``p``; None where it can."""
    # Flat params, and with use_orig_params=True the params that are views into them.
    if _torch_private.fsdp_flattened(p):
        return (
            "it belongs to FSDP1 (FullyShardedDataParallel), which flattens params and leaves "
            "each rank pieces without shape; shard with torch.distributed.fsdp.fully_shard, whose "
            "DTensors Lamb updates exactly"
        )
    if hasattr(p, "local_shards") or (is_dtensor(p) and hasattr(local_of(p), "local_shards")):
        return (
            f"it is a {type(p).__name__} made of several local shards; use a DTensor with a plain "
            "local tensor (torch.distributed.tensor.distribute_tensor, or fully_shard)"
        )
    if is_dtensor(p) and any(placement.is_partial() for placement in p.placements):
        return (
            f"it is a DTensor with placements {p.placements}: no rank has its values before they "
            "are added up; redistribute it to Shard or Replicate"
        )
    return None


def mismatch(grad: Tensor, p: Tensor) -> str | None:
    """Why ``grad`` cannot be a gradient of ``p``, if they are sharded so; None where it can."""
    if is_dtensor(grad) != is_dtensor(p):
        return f"the param is a {type(p).__name__}, its gradient a {type(grad).__name__}"
    if is_dtensor(grad) and is_dtensor(p) and grad.device_mesh != p.device_mesh:
        return f"the param is on {p.device_mesh}, its gradient on {grad.device_mesh}"
    return None
