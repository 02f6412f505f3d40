"""The flat buffers of one rank: whole buckets of params, and its shards of gradients and state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ..kernels import Block, RowMap, Work
from ..state import TENSOR_STATES, as_laid_out, flat_row, is_dense, needs_master, state_dtype
from .comm import Comm
from .layout import TILE, Layout, ParamSpec, Segment

#: Fills the gradient of a param that has none on a rank. A sum of floats is -0.0 only if every
#: term is, so after the reduce-scatter a -0.0 in the first element of a tile says that no rank had
#: a gradient: presence travels with the gradient itself and costs no collective.
ABSENT = -0.0
#: Params that stand for all, where all would take too long.
_LOOKED_AT = 16
_GRAD, _LAYOUT = attrgetter("grad"), attrgetter("layout")


def spec_of(name: str, p: Tensor) -> ParamSpec:
    """Params keep their memory format in the buffer (channels_last stays so); gaps are closed."""
    stride = p.stride() if is_dense(p) else torch.empty(p.shape, device="meta").stride()
    return ParamSpec(name=name, shape=tuple(p.shape), stride=tuple(stride), dtype=str(p.dtype))


@dataclass(frozen=True)
class _Bank:
    """This rank's shards of all buckets of one dtype, one after the other: [tiles, TILE] each."""

    grads: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None  # None where the params have full precision and are their own masters


@dataclass(frozen=True)
class Shard:
    """This rank's shard of one bucket: [tiles_per_shard, TILE] views."""

    params: Tensor  # a part of the whole bucket of params
    grads: Tensor  # the mean over ranks, in the dtype it is kept in
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor  # what the rule updates: params itself, or its float32 original
    tiles: int  # how many of them are some param's; the rest is padding

    @property
    def copies_down(self) -> bool:
        return self.master is not self.params


@dataclass(frozen=True)
class _Staging:
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
class Piece:
    """What a rank holds of a param: elements from ``start`` on, in the param's memory order."""

    start: int
    views: dict[str, Tensor]  # "param" and its states: 1-D views, all of one length
    whole: ParamSpec


class FlatBuffers:
    """Moves params into flat buckets (their ``.data`` become views) and holds the rank's shards.

    ``indices`` are the positions of ``params`` among all ``num_params`` params of the optimizer:
    what the rows of :attr:`works` refer to. Gradients travel in ``reduce_dtype``, default the
    params' own, and are kept in it, or in the dtype of the state if they are to be ``summed``.
    """

    def __init__(
        self,
        layout: Layout,
        params: Sequence[Tensor],
        indices: Sequence[int],
        num_params: int,
        comm: Comm,
        reduce_dtype: torch.dtype | None = None,
        summed: bool = False,
    ) -> None:
        self.layout = layout
        self.segments = layout.segments(comm.rank)
        # At most one each: a param is in one bucket, and a shard of that is contiguous.
        self._segment_of = {segment.param: segment for segment in self.segments}
        self.params = list(params)
        self.indices = list(indices)
        self._num_params = num_params
        self._comm = comm
        self._reduce_dtype = reduce_dtype
        self._summed = summed
        self.device = params[0].device
        self.buckets = [
            self._zeros(b.padded_numel(comm.world_size), params[b.params[0]].dtype)
            for b in layout.buckets
        ]
        self._slots: dict[int, Tensor] = {}
        self._addresses: list[int] = []
        for bucket, whole in zip(layout.buckets, self.buckets):
            for i, first in zip(bucket.params, bucket.first_tiles):
                spec = layout.params[i]
                self._slots[i] = whole.as_strided(spec.shape, spec.stride, first * TILE)
        self.adopt_params()
        self.banks = self._make_banks()
        self.shards = list(self._make_shards())
        self.refresh_masters()
        self.works = list(self._make_works())
        self._staging: dict[int, _Staging] = {}
        self._staging_memory: dict[tuple[torch.dtype, int], Tensor] = {}
        self._taken: list[tuple[Tensor, Tensor]] | None = None
        self._active: tuple[frozenset[int], Tensor] | None = None
        self._own = frozenset(self._segment_of)

    def _zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def _make_banks(self) -> dict[torch.dtype, _Bank]:
        tiles: dict[torch.dtype, int] = {}
        for b, whole in zip(self.layout.buckets, self.buckets):
            tiles[whole.dtype] = tiles.get(whole.dtype, 0) + b.tiles_per_shard
        banks = {}
        for dtype, count in tiles.items():
            kept = state_dtype(dtype) if self._summed else self._travelling_dtype(dtype)
            grads = self._zeros(count * TILE, kept).view(-1, TILE)
            m, v, master = (
                self._zeros(count * TILE, state_dtype(dtype)).view(-1, TILE)
                if name != "master" or needs_master(dtype)
                else None
                for name in TENSOR_STATES
            )
            assert m is not None
            assert v is not None
            banks[dtype] = _Bank(grads, m, v, master)
        return banks

    def _travelling_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self._reduce_dtype is None else self._reduce_dtype

    def _make_shards(self) -> Iterator[Shard]:
        used: dict[torch.dtype, int] = {}
        for n, (b, whole) in enumerate(zip(self.layout.buckets, self.buckets)):
            start = used.get(whole.dtype, 0)
            mine = slice(start, start + b.tiles_per_shard)
            used[whole.dtype] = mine.stop
            bank, rank = self.banks[whole.dtype], self._comm.rank
            params = whole.view(self._comm.world_size, b.tiles_per_shard, TILE)[rank]
            yield Shard(
                params=params,
                grads=bank.grads[mine],
                exp_avg=bank.exp_avg[mine],
                exp_avg_sq=bank.exp_avg_sq[mine],
                master=params if bank.master is None else bank.master[mine],
                tiles=len(self.layout.shard_tiles(rank, n)),
            )

    def _make_works(self) -> Iterator[Work]:
        """One Work per dtype of params; shards that are all padding have nothing to compute."""
        rank = self._comm.rank
        for dtype in self.banks:
            blocks, owners = [], []
            for n, s in enumerate(self.shards):
                if s.params.dtype == dtype and s.tiles:
                    grads, master, m, v = (
                        t[: s.tiles] for t in (s.grads, s.master, s.exp_avg, s.exp_avg_sq)
                    )
                    copy = s.params[: s.tiles] if s.copies_down else None
                    blocks.append(Block(grads, master, m, v, copy))
                    owners.append([self.indices[i] for i in self.layout.shard_tiles(rank, n)])
            rows = RowMap(owners, self._num_params, self.device)
            yield Work(blocks, rows, state_dtype(dtype), tiled=True)

    # --- params ----------------------------------------------------------------------------------

    def may_adopt_late(self) -> bool:
        """Whether :meth:`adopt_params` may come after the moments, which take a device some time.

        They are computed from masters, not from the params; and a few of these, of which most ways
        to replace memory leave none alone, are in place. Looking at all takes the host 0.2 ms.
        """
        few = slice(None, None, -(-len(self.params) // _LOOKED_AT))
        return (
            all(bank.master is not None for bank in self.banks.values())
            and list(map(Tensor.data_ptr, self.params[few])) == self._addresses[few]
        )

    def adopt_params(self) -> None:
        """Bring params whose memory someone replaced (``model.to()``, a loader) back into place.

        Raises ``RuntimeError`` naming a param that has become another tensor altogether.
        """
        if list(map(Tensor.data_ptr, self.params)) == self._addresses:
            return
        for i, slot in self._slots.items():
            p = self.params[i]
            if p.data_ptr() == slot.data_ptr() and p.stride() == slot.stride():
                continue
            if (p.shape, p.dtype, p.device) != (slot.shape, slot.dtype, slot.device):
                raise RuntimeError(
                    f"{self.layout.params[i].name} was {tuple(slot.shape)} {slot.dtype} on "
                    f"{slot.device} and is now {tuple(p.shape)} {p.dtype} on {p.device}; make a "
                    "new optimizer after changing the model"
                )
            slot.copy_(p.detach())
            p.data = slot
        self._addresses = list(map(Tensor.data_ptr, self.params))

    def release_params(self) -> None:
        """Give the params memory of their own again; the buffers are of no use afterwards."""
        for i, slot in self._slots.items():
            self.params[i].data = slot.clone()

    def refresh_masters(self) -> None:
        """Take the params' present values as the masters'."""
        for s in self.shards:
            if s.copies_down:
                s.master.copy_(s.params)

    # --- gradients -------------------------------------------------------------------------------

    def stage(self, bucket: int, slot: int) -> tuple[Tensor, Iterable[int]]:
        """A bucket's gradients put together in staging buffer ``slot``, and which params have one.

        Raises ``RuntimeError`` naming a param whose gradient is sparse.
        """
        staging = self._staging.get(bucket)
        if staging is None:
            staging = self._staging[bucket] = self._make_staging(bucket, slot)
        # Backward waits for the host here: few operations, and loops in C where it is hundreds.
        grads: list[Any] = list(map(_GRAD, staging.params))
        slots, present, absent = staging.slots, staging.members, []
        if any(map(is_, grads, repeat(None))):
            having = [k for k, g in enumerate(grads) if g is not None]
            absent = [staging.rows[k] for k, g in enumerate(grads) if g is None]
            grads, slots = [grads[k] for k in having], [slots[k] for k in having]
            present = tuple(staging.members[k] for k in having)
        for j, layout in zip(present, map(_LAYOUT, grads)):
            if layout != torch.strided:
                raise RuntimeError(
                    f"{self.layout.params[j].name} has a sparse gradient: not supported"
                )
        if slots or staging.padding:
            torch._foreach_copy_(slots + staging.padding, grads + staging.zeros)
        # A gradient that is there must not read as absent: this turns -0.0 into 0.0.
        staging.first.add_(0.0)
        for row in absent:
            row.fill_(ABSENT)
        return staging.tiles, present

    def _make_staging(self, bucket: int, slot: int) -> _Staging:
        """The buckets that take turns in a slot share its memory."""
        whole, b = self.buckets[bucket], self.layout.buckets[bucket]
        dtype = self._travelling_dtype(whole.dtype)
        memory = self._staging_memory.get((dtype, slot))
        if memory is None or memory.numel() < whole.numel():
            kinds = [t for t in self.buckets if self._travelling_dtype(t.dtype) == dtype]
            memory = self._zeros(max(t.numel() for t in kinds), dtype)
            self._staging_memory[dtype, slot] = memory
        flat = memory[: whole.numel()]
        slots, rows, padding = [], [], []
        for j, first in zip(b.params, b.first_tiles):
            spec, start = self.layout.params[j], first * TILE
            end = start + spec.tiles * TILE
            slots.append(flat.as_strided(spec.shape, spec.stride, start))
            rows.append(flat[start:end])
            padding.append(flat[start + spec.numel : end])
        padding.append(flat[b.tiles * TILE :])
        padding = [t for t in padding if t.numel()]
        # in the dtype of the gradients: all are copied at once
        zero = self._zeros(max(map(len, padding), default=0), whole.dtype)
        tiles = flat.view(-1, TILE)
        return _Staging(
            tuple(b.params),
            [self.params[j] for j in b.params],
            tiles,
            tiles[:, 0],
            slots,
            rows,
            padding,
            [zero[: len(t)] for t in padding],
        )

    def take_gradients(self) -> set[int]:
        """``p.grad``, already averaged over ranks, into the shards; the params that had one."""
        if self._taken is None:
            self._taken = [self._taking(segment) for segment in self.segments]
        into, taken = [], []
        for segment, (rows, to) in zip(self.segments, self._taken):
            grad = self.params[segment.param].grad
            if grad is None:
                rows.fill_(ABSENT)
                continue
            if segment.numel != grad.numel():
                memory = flat_row(as_laid_out(grad, self._slots[segment.param]))[0]
                grad = memory[segment.param_start :][: segment.numel]
            into.append(to)
            taken.append(grad)
        if into:
            torch._foreach_copy_(into, taken)
        return {j for j, p in enumerate(self.params) if p.grad is not None}

    def _taking(self, segment: Segment) -> tuple[Tensor, Tensor]:
        """The tiles of a segment's gradient, and these shaped as the gradient or its piece is."""
        rows = _rows(self.shards[segment.bucket].grads, segment)
        spec, flat = self.layout.params[segment.param], rows.view(-1)[: segment.numel]
        if segment.numel != spec.numel:
            return rows, flat
        return rows, flat.as_strided(spec.shape, spec.stride, flat.storage_offset())

    def active(self, present: set[int], everywhere: bool) -> Tensor:
        """bool [num_params]: which of the params with tiles here have a gradient on any rank.

        ``present`` are those that have one on this rank, or, with ``everywhere``, all there are.
        """
        if len(present) == len(self.params):  # in most steps; sets of hundreds take the host 20 us
            chosen = self._own
        elif everywhere or self._own <= present:
            chosen = self._own & present
        else:
            return self._found_active()
        if self._active is None or self._active[0] != chosen:
            mask = torch.zeros(self._num_params, dtype=torch.bool)
            mask[[self.indices[j] for j in chosen]] = True
            self._active = (chosen, mask.to(self.device))
        return self._active[1]

    def _found_active(self) -> Tensor:
        """The same from the gradients that have been summed over ranks."""
        found = torch.zeros(self._num_params, dtype=torch.float64, device=self.device)
        for work in self.works:
            if work.blocks:
                first = torch.cat([block.grad[:, 0] for block in work.blocks])
                absent = (first == 0) & torch.signbit(first)
                found += work.rows.sum((~absent).double())
        return found > 0

    # --- state -----------------------------------------------------------------------------------

    def state_names(self, i: int) -> list[str]:
        names = ["exp_avg", "exp_avg_sq"]
        return [*names, "master"] if needs_master(self.params[i].dtype) else names

    def local_state(self, i: int) -> dict[str, Tensor]:
        """This rank's piece of each state of param i, 1-D in memory order: views, maybe empty."""
        segment = self._segment_of.get(i)
        if segment is None:
            empty = self._zeros(0, state_dtype(self.params[i].dtype))
            return dict.fromkeys(self.state_names(i), empty)
        shard = self.shards[segment.bucket]
        return {
            name: _rows(getattr(shard, name), segment).view(-1)[: segment.numel]
            for name in self.state_names(i)
        }

    def piece(self, i: int) -> Piece:
        """This rank's piece of param i itself and of its states."""
        segment, start, own = self._segment_of.get(i), 0, self._zeros(0, self.params[i].dtype)
        if segment is not None:
            start = segment.param_start
            own = _rows(self.shards[segment.bucket].params, segment).view(-1)[: segment.numel]
        return Piece(start, {"param": own, **self.local_state(i)}, self.layout.params[i])

    def load_state(self, i: int, whole: Mapping[str, Tensor]) -> None:
        """Take this rank's pieces of param i's state out of whole tensors, shaped like the param.

        Moments that are not given are zero, and a master is the param's present value.
        """
        segment = self._segment_of.get(i)
        if segment is None:
            return
        for name, piece in self.local_state(i).items():
            value = whole.get(name, self._slots[i] if name == "master" else None)
            if value is None:
                piece.zero_()
            else:
                memory = flat_row(as_laid_out(value, self._slots[i]))[0]
                piece.copy_(memory[segment.param_start :][: segment.numel])

    def gather_state(self, name: str, keep: bool) -> dict[int, Tensor]:
        """Whole tensors of one state on the CPU, by param; a collective, bucket by bucket.

        Ranks that do not ``keep`` take part and get nothing.
        """
        found = {}
        for bucket, s in zip(self.layout.buckets, self.shards):
            if name == "master" and not s.copies_down:
                continue
            shard = getattr(s, name)
            whole = self._zeros(shard.numel() * self._comm.world_size, shard.dtype)
            self._comm.all_gather(whole, shard.contiguous())
            for i in bucket.params if keep else ():
                slot = self._slots[i]
                at = whole.as_strided(slot.shape, slot.stride(), slot.storage_offset())
                found[i] = at.to("cpu", copy=True)
        return found


def _rows(shard: Tensor, segment: Segment) -> Tensor:
    """The tiles of a shard that a segment fills, the last one perhaps in part."""
    first = segment.shard_start // TILE
    return shard[first : first + -(-segment.numel // TILE)]
