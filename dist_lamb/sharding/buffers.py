"""The flat buffers of one rank: whole buckets of params, and its shards of gradients and state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import Block, RowMap, Work
from ..state import as_laid_out, flat_row, is_dense, needs_master, state_dtype
from .comm import Comm
from .layout import TILE, Layout, ParamSpec, Segment

#: Fills the gradient of a param that has none on a rank. A sum of floats is -0.0 only if every
#: term is, so after the reduce-scatter a -0.0 in the first element of a tile says that no rank had
#: a gradient: presence travels with the gradient itself and costs no collective.
ABSENT = -0.0


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
class _Shard:
    """This rank's shard of one bucket: [tiles_per_shard, TILE] views."""

    params: Tensor  # a part of the whole bucket of params
    grads: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor  # what the rule updates: params itself, or its float32 original
    tiles: int  # how many of them are some param's; the rest is padding

    @property
    def copies_down(self) -> bool:
        return self.master is not self.params


class FlatBuffers:
    """Moves params into flat buckets (their ``.data`` become views) and holds the rank's shards.

    ``indices`` are the positions of ``params`` among all ``num_params`` params of the optimizer:
    what the rows of :attr:`works` refer to.
    """

    def __init__(
        self,
        layout: Layout,
        params: Sequence[Tensor],
        indices: Sequence[int],
        num_params: int,
        comm: Comm,
    ) -> None:
        self.layout = layout
        self.segments = layout.segments(comm.rank)
        self._params = list(params)
        self.indices = list(indices)
        self._num_params = num_params
        self._comm = comm
        self._device = params[0].device
        self._buckets = [
            self._zeros(b.padded_numel(comm.world_size), params[b.params[0]].dtype)
            for b in layout.buckets
        ]
        self._slots: dict[int, Tensor] = {}
        for bucket, whole in zip(layout.buckets, self._buckets):
            for i, first in zip(bucket.params, bucket.first_tiles):
                spec = layout.params[i]
                self._slots[i] = whole.as_strided(spec.shape, spec.stride, first * TILE)
        self.adopt_params()
        self.banks = self._make_banks()
        self._shards = list(self._make_shards())
        self.refresh_masters()
        self.works = list(self._make_works())
        self._staging: dict[torch.dtype, Tensor] = {}

    def _zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=self._device)

    def _make_banks(self) -> dict[torch.dtype, _Bank]:
        tiles: dict[torch.dtype, int] = {}
        for b, whole in zip(self.layout.buckets, self._buckets):
            tiles[whole.dtype] = tiles.get(whole.dtype, 0) + b.tiles_per_shard
        banks = {}
        for dtype, count in tiles.items():
            new = [
                self._zeros(count * TILE, state_dtype(dtype)).view(-1, TILE)
                for _ in range(4 if needs_master(dtype) else 3)
            ]
            banks[dtype] = _Bank(new[0], new[1], new[2], new[3] if len(new) > 3 else None)
        return banks

    def _make_shards(self) -> Iterator[_Shard]:
        used: dict[torch.dtype, int] = {}
        for n, (b, whole) in enumerate(zip(self.layout.buckets, self._buckets)):
            start = used.get(whole.dtype, 0)
            mine = slice(start, start + b.tiles_per_shard)
            used[whole.dtype] = mine.stop
            bank, rank = self.banks[whole.dtype], self._comm.rank
            params = whole.view(self._comm.world_size, b.tiles_per_shard, TILE)[rank]
            yield _Shard(
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
            for n, s in enumerate(self._shards):
                if s.params.dtype == dtype and s.tiles:
                    grads, master, m, v = (
                        t[: s.tiles] for t in (s.grads, s.master, s.exp_avg, s.exp_avg_sq)
                    )
                    copy = s.params[: s.tiles] if s.copies_down else None
                    blocks.append(Block(grads, master, m, v, copy))
                    owners.append([self.indices[i] for i in self.layout.shard_tiles(rank, n)])
            rows = RowMap(owners, self._num_params, self._device)
            yield Work(blocks, rows, state_dtype(dtype), tiled=True)

    # --- params ----------------------------------------------------------------------------------

    def adopt_params(self) -> None:
        """Bring params whose memory someone replaced (``model.to()``, a loader) back into place.

        Raises ``RuntimeError`` naming a param that has become another tensor altogether.
        """
        for i, slot in self._slots.items():
            p = self._params[i]
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

    def release_params(self) -> None:
        """Give the params memory of their own again; the buffers are of no use afterwards."""
        for i, slot in self._slots.items():
            self._params[i].data = slot.clone()

    def refresh_masters(self) -> None:
        """Take the params' present values as the masters'."""
        for s in self._shards:
            if s.copies_down:
                s.master.copy_(s.params)

    def gather_params(self) -> None:
        """Every rank's updated shards to every rank: one all-gather per bucket."""
        for whole, s in zip(self._buckets, self._shards):
            self._comm.all_gather(whole, s.params)

    # --- gradients -------------------------------------------------------------------------------

    def reduce_gradients(self, free: bool) -> None:
        """Mean over ranks of ``p.grad`` into the shards: one reduce-scatter per bucket.

        A rank without a gradient for a param adds nothing to it. ``free`` drops every ``p.grad``
        as soon as its bucket is reduced.
        """
        if self._comm.world_size == 1:
            self.take_gradients()  # their own mean: nothing to stage
            if free:
                for p in self._params:
                    p.grad = None
            return
        for bucket, whole, s in zip(self.layout.buckets, self._buckets, self._shards):
            staged = self._staged(whole)
            present = [i for i in bucket.params if self._params[i].grad is not None]
            for i in present:
                slot = self._slots[i]
                at = staged.as_strided(slot.shape, slot.stride(), slot.storage_offset())
                at.copy_(self._params[i].grad)  # type: ignore[arg-type]
            tiles = staged.view(-1, TILE)
            # A gradient that is there must not read as absent: this turns -0.0 into 0.0.
            tiles[:, 0].add_(0.0)
            for i, first in zip(bucket.params, bucket.first_tiles):
                if self._params[i].grad is None:
                    tiles[first : first + self.layout.params[i].tiles] = ABSENT
            if staged.dtype == s.grads.dtype:
                self._comm.reduce_scatter_sum(s.grads, staged)
            else:
                low = torch.empty_like(s.params)
                self._comm.reduce_scatter_sum(low, staged)
                s.grads.copy_(low)
            # Divided, not multiplied by 1/W: at 3 ranks a mean that is exact must come out exact.
            s.grads.div_(self._comm.world_size)
            if free:
                for i in present:
                    self._params[i].grad = None
        if free:
            for i in set(range(len(self._params))) - set(self._slots):
                self._params[i].grad = None  # empty params lie in no bucket

    def _staged(self, whole: Tensor) -> Tensor:
        """A buffer like ``whole``, with zeros wherever no param lies."""
        staging = self._staging.get(whole.dtype)
        if staging is None or staging.numel() < whole.numel():
            same = [b.numel() for b in self._buckets if b.dtype == whole.dtype]
            staging = self._staging[whole.dtype] = self._zeros(max(same), whole.dtype)
        # Padding must be zero, and a bucket's padding may be another bucket's params.
        return staging[: whole.numel()].zero_()

    def take_gradients(self) -> None:
        """``p.grad``, already averaged over ranks by somebody else, into the shards."""
        for segment in self.segments:
            p, shard = self._params[segment.param], self._shards[segment.bucket]
            rows = _rows(shard.grads, segment)
            if p.grad is None:
                rows.fill_(ABSENT)
                continue
            whole = flat_row(as_laid_out(p.grad, self._slots[segment.param]))[0]
            flat = rows.view(-1)[: segment.numel]
            flat.copy_(whole[segment.param_start : segment.param_start + segment.numel])
            rows[:, 0].add_(0.0)

    def present(self) -> Tensor:
        """bool [num_params]: which of the params with tiles here have a gradient on any rank."""
        found = torch.zeros(self._num_params, dtype=torch.float64, device=self._device)
        for work in self.works:
            if work.blocks:
                first = torch.cat([block.grad[:, 0] for block in work.blocks])
                absent = (first == 0) & torch.signbit(first)
                found += work.rows.sum((~absent).double())
        return found > 0

    # --- state -----------------------------------------------------------------------------------

    def state_names(self, i: int) -> list[str]:
        names = ["exp_avg", "exp_avg_sq"]
        return [*names, "master"] if needs_master(self._params[i].dtype) else names

    def local_state(self, i: int) -> dict[str, Tensor]:
        """This rank's piece of each state of param i, 1-D in memory order: views, maybe empty."""
        mine = [s for s in self.segments if s.param == i]
        if not mine:
            empty = self._zeros(0, state_dtype(self._params[i].dtype))
            return dict.fromkeys(self.state_names(i), empty)
        (segment,) = mine  # one bucket, and a shard is contiguous in it
        shard = self._shards[segment.bucket]
        return {
            name: _rows(getattr(shard, name), segment).view(-1)[: segment.numel]
            for name in self.state_names(i)
        }

    def load_state(self, i: int, whole: Mapping[str, Tensor]) -> None:
        """Take this rank's pieces of param i's state out of whole tensors, shaped like the param.

        Moments that are not given are zero, and a master is the param's present value.
        """
        for segment in (s for s in self.segments if s.param == i):
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
        for bucket, s in zip(self.layout.buckets, self._shards):
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
