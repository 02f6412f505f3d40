"""Which tile belongs to which parameter and which rank: pure integers, frozen once computed.

Inside a bucket every param starts on a tile boundary, and the bucket is padded to ``world_size``
equal shards of whole tiles, so every tile belongs to at most one param and exactly one rank::

    bucket   | p2 p2 p2 : p1 | p1 : p0 p0 : -- |      ":" tile boundary of a param, "--" padding
    shards   |    rank 0     |     rank 1      |

A rank's shards of all buckets of one dtype lie one after the other in one matrix [tiles, TILE].
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

#: Consecutive elements of a flat buffer that are summed together; the unit of ownership.
TILE = 1024


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """What the layout needs to know of a param. All ranks must agree on all of it."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    states: tuple[str, ...] = ()  # params of one bucket have the same

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.stride) or min(self.shape, default=0) < 0:
            raise ValueError(f"{self.name}: shape {self.shape} with stride {self.stride}")

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def tiles(self) -> int:
        return -(-self.numel // TILE)


@dataclass(frozen=True, kw_only=True)
class Extent:
    """One param's piece of one shard: ``numel`` elements."""

    param: int
    bucket: int
    rank: int
    param_start: int  # first element, in the param's memory order
    shard_start: int  # first element, in the rank's shard of the bucket: a multiple of TILE
    numel: int


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Params of one dtype and one set of states, flattened together: the unit of communication."""

    dtype: str
    params: tuple[int, ...]
    first_tiles: tuple[int, ...]  # where each of the params starts, in tiles
    tiles: int  # without padding
    tiles_per_shard: int

    def padded_numel(self, world_size: int) -> int:
        return self.tiles_per_shard * world_size * TILE


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where every element of every param lies. Equal on all ranks, which compare ``digest``."""

    params: tuple[ParamSpec, ...]
    buckets: tuple[Bucket, ...]
    world_size: int

    @staticmethod
    def plan(params: Sequence[ParamSpec], world_size: int, bucket_numel: int) -> Layout:
        """Buckets of about ``bucket_numel`` elements in reverse order of ``params``.

        Reverse, because backward makes the gradients of the last params first. A param is never
        split over buckets; empty params lie in none.
        """
        if world_size < 1 or bucket_numel < 1:
            raise ValueError(f"world_size {world_size} and bucket_numel {bucket_numel} must be > 0")
        buckets: list[Bucket] = []
        for kind in dict.fromkeys((p.dtype, p.states) for p in reversed(params)):
            pending: list[int] = []
            tiles = 0
            for i in reversed(range(len(params))):
                if (params[i].dtype, params[i].states) != kind or not params[i].numel:
                    continue
                if pending and (tiles + params[i].tiles) * TILE > bucket_numel:
                    buckets.append(_bucket(params, pending, world_size))
                    pending, tiles = [], 0
                pending.append(i)
                tiles += params[i].tiles
            if pending:
                buckets.append(_bucket(params, pending, world_size))
        return Layout(params=tuple(params), buckets=tuple(buckets), world_size=world_size)

    def __post_init__(self) -> None:
        placed = [i for b in self.buckets for i in b.params]
        expected = [i for i, p in enumerate(self.params) if p.numel]
        if sorted(placed) != expected:
            raise ValueError(f"params {expected} must lie in exactly one bucket each, got {placed}")
        for n, b in enumerate(self.buckets):
            at = 0
            for i, first in zip(b.params, b.first_tiles, strict=True):
                if first != at or self.params[i].dtype != b.dtype:
                    raise ValueError(f"bucket {n}: {self.params[i].name} is misplaced")
                at += self.params[i].tiles
            if at != b.tiles or b.tiles_per_shard != -(-b.tiles // self.world_size):
                raise ValueError(f"bucket {n}: {at} tiles over {self.world_size} ranks expected")

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def extents(self, rank: int) -> tuple[Extent, ...]:
        """The pieces that ``rank`` owns, bucket by bucket in the order of the shard."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} of {self.world_size}")
        extents = []
        for n, b in enumerate(self.buckets):
            shard_numel = b.tiles_per_shard * TILE
            begin, end = rank * shard_numel, (rank + 1) * shard_numel
            for i, first in zip(b.params, b.first_tiles):
                lo = max(begin, first * TILE)
                hi = min(end, first * TILE + self.params[i].numel)
                if lo < hi:
                    extent = Extent(
                        param=i,
                        bucket=n,
                        rank=rank,
                        param_start=lo - first * TILE,
                        shard_start=lo - begin,
                        numel=hi - lo,
                    )
                    extents.append(extent)
        return tuple(extents)


def _bucket(params: Sequence[ParamSpec], indices: Sequence[int], world_size: int) -> Bucket:
    first_tiles, tiles = [], 0
    for i in indices:
        first_tiles.append(tiles)
        tiles += params[i].tiles
    return Bucket(
        dtype=params[indices[0]].dtype,
        params=tuple(indices),
        first_tiles=tuple(first_tiles),
        tiles=tiles,
        tiles_per_shard=-(-tiles // world_size),
    )
