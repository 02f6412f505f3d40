"""What flat buffers consist of: a rank's shards, and a param's part of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..state import is_dense
from .layout import TILE, Extent, ParamSpec


def spec_of(name: str, p: Tensor) -> ParamSpec:
    """Params keep their memory format in the buffer (channels_last stays so); gaps are closed."""
    stride = (
        p.stride() if is_dense(p) else torch.empty(p.shape, dtype=p.dtype, device="meta").stride()
    )
    return ParamSpec(name=name, shape=tuple(p.shape), stride=tuple(stride), dtype=str(p.dtype))


@dataclass(frozen=True)
class Bank:
    """This rank's shards of all buckets of one dtype and one set of states, one after the other:
    [tiles, TILE] each."""

    grads: Tensor
    states: dict[str, Tensor]  # by name; a master only where the params have less precision


@dataclass(frozen=True)
class Shard:
    """This rank's shard of one bucket: [tiles_per_shard, TILE] views."""

    params: Tensor  # a part of the whole bucket of params
    grads: Tensor  # the mean over ranks, in the dtype it is kept in
    states: dict[str, Tensor]
    tiles: int  # how many of them are some param's; the rest is padding


@dataclass(frozen=True)
class Staging:
    """Where a bucket's gradients are put together to be sent."""

    members: tuple[int, ...]  # the bucket's params
    params: list[Tensor]  # these
    tiles: Tensor  # [tiles, TILE], padded to all ranks' shards
    first: Tensor  # the first element of each tile
    slots: list[Tensor]  # of each param: a view shaped and strided as it is
    rows: list[Tensor]  # its tiles
    padding: list[Tensor]  # what belongs to no param
    zeros: list[Tensor]  # as much of them as there is padding


@dataclass(frozen=True)
class OwnedRange:
    """What a rank holds of a param: elements from ``start`` on, in the param's memory order."""

    start: int
    views: dict[str, Tensor]  # "param" and its states: 1-D views, all of one length
    whole: ParamSpec


def rows_of(shard: Tensor, extent: Extent) -> Tensor:
    """The tiles of a shard that an extent fills, the last one perhaps in part."""
    first = extent.shard_start // TILE
    return shard[first : first + -(-extent.numel // TILE)]


def flat_of(shard: Tensor, extent: Extent) -> Tensor:
    """The elements of a shard that are an extent's."""
    return rows_of(shard, extent).view(-1)[: extent.numel]
