"""The flat buffers of one rank: whole buckets of params, and its shards of gradients and state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..elements import Elements
from ..kernels.device import int64
from ..kernels.segments import Segment, segment
from ..rules import RULES, Rule
from ..state import (
    MASTER,
    REMAINDER,
    Formats,
    as_laid_out,
    converted,
    flat_row,
    joined,
    refresh_master,
    refresh_remainder,
    split_into,
    state_dtype,
    states_of,
    to_be_held,
)
from .comm import Comm
from .layout import TILE, Extent, Layout
from .settings import Settings
from .shards import Bank, OwnedRange, Shard, Staging, flat_of, rows_of, spec_of

#: Fills the gradient of a param that has none on a rank. A sum of floats is -0.0 only if every
#: term is, so after the reduce-scatter a -0.0 in the first element of a tile says that no rank had
#: a gradient: presence travels with the gradient itself and costs no collective.
ABSENT = -0.0
#: What :meth:`FlatBuffers.gather_state` calls the gradients.
GRADS = "grads"
#: dtype of params, and names and dtypes of their states
_Kind: TypeAlias = tuple[torch.dtype, tuple[tuple[str, torch.dtype], ...]]
_GRAD, _LAYOUT = attrgetter("grad"), attrgetter("layout")


class FlatBuffers:
    """Moves params into flat buckets (their ``.data`` become views) and holds the rank's shards.

    Params are numbered as in ``layout``. Gradients travel in ``reduce_dtype``, default the
    params' own, and are kept in it, or in the dtype of the state if they are to be ``summed``.
    """

    def __init__(
        self,
        layout: Layout,
        params: Sequence[Tensor],
        comm: Comm,
        reduce_dtype: torch.dtype | None = None,
        summed: bool = False,
        rules: Sequence[Rule] | None = None,
        formats: Sequence[Formats] | None = None,
    ) -> None:
        self.layout = layout
        #: by param
        self.rules = list(rules or repeat(RULES["lamb"], len(params)))
        self.formats = list(formats or repeat(Formats(), len(params)))
        #: by param, {name of a state: its dtype}
        self._stored = [
            states_of(p.dtype, rule, own)
            for p, rule, own in zip(params, self.rules, self.formats, strict=True)
        ]
        self._extents = layout.extents(comm.rank)
        # At most one each: a param is in one bucket, and a shard of that is contiguous.
        self._extent_of = {extent.param: extent for extent in self._extents}
        self.params = list(params)
        self._comm = comm
        self._reduce_dtype = reduce_dtype
        self._summed = summed
        self.device = params[0].device
        self.buckets = [
            self._zeros(b.padded_numel(comm.world_size), params[b.params[0]].dtype)
            for b in layout.buckets
        ]
        self._slots: dict[int, Tensor] = {}
        for bucket, whole in zip(layout.buckets, self.buckets):
            for i, first in zip(bucket.params, bucket.first_tiles):
                spec = layout.params[i]
                self._slots[i] = whole.as_strided(spec.shape, spec.stride, first * TILE)
        self.shards: list[Shard] = []
        self.adopt_params()
        self.banks = self._make_banks()
        self.shards = list(self._make_shards())
        for s in self.shards:
            if MASTER in s.states:
                s.states[MASTER].copy_(s.params)
        self._staging: dict[int, Staging] = {}
        self._staging_memory: dict[tuple[torch.dtype, int], Tensor] = {}
        self._taken: list[tuple[Tensor, Tensor]] | None = None
        #: by dtype: params, the bank's gradients, the first tile there of each param
        self._first_tiles: list[tuple[Tensor, Tensor, Tensor]] | None = None
        #: params with elements here
        self.own = frozenset(self._extent_of)
        self.bucketed = [self.params[j] for bucket in layout.buckets for j in bucket.params]
        #: params without elements, which lie in no bucket
        self.empty = frozenset(j for j, spec in enumerate(layout.params) if not spec.numel)

    @staticmethod
    def of(
        named: Sequence[tuple[str, Tensor]],
        rule_of: Mapping[Tensor, Rule],
        formats_of: Mapping[Tensor, Formats],
        comm: Comm,
        settings: Settings,
    ) -> FlatBuffers:
        """Buffers of these params, bucketed from the last to the first."""
        params = [p for _, p in named]
        rules, formats = [rule_of[p] for p in params], [formats_of[p] for p in params]
        stored = map(states_of, (p.dtype for p in params), rules, formats)
        specs = [
            replace(spec_of(name, p), states=tuple(f"{n} {dtype}" for n, dtype in own.items()))
            for (name, p), own in zip(named, stored)
        ]
        layout = Layout.plan(specs, comm.world_size, settings.bucket_numel)
        summed = settings.accumulate == "sharded"
        return FlatBuffers(layout, params, comm, settings.reduce_dtype, summed, rules, formats)

    def _zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def _kind(self, n: int) -> _Kind:
        """What the params of bucket ``n`` have in common."""
        dtype = self.buckets[n].dtype
        return dtype, tuple(self._stored[self.layout.buckets[n].params[0]].items())

    def _make_banks(self) -> dict[_Kind, Bank]:
        tiles: dict[_Kind, int] = {}
        for n, b in enumerate(self.layout.buckets):
            kind = self._kind(n)
            tiles[kind] = tiles.get(kind, 0) + b.tiles_per_shard
        banks = {}
        for (dtype, stored), count in tiles.items():
            kept = state_dtype(dtype) if self._summed else self._travelling_dtype(dtype)
            grads = self._zeros(count * TILE, kept).view(-1, TILE)
            states = {name: self._zeros(count * TILE, own).view(-1, TILE) for name, own in stored}
            banks[dtype, stored] = Bank(grads, states)
        return banks

    def _travelling_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self._reduce_dtype is None else self._reduce_dtype

    def _make_shards(self) -> Iterator[Shard]:
        used: dict[_Kind, int] = {}
        for n, (b, whole) in enumerate(zip(self.layout.buckets, self.buckets)):
            kind = self._kind(n)
            start = used.get(kind, 0)
            mine = slice(start, start + b.tiles_per_shard)
            used[kind] = mine.stop
            bank, rank = self.banks[kind], self._comm.rank
            ends = [e.shard_start + e.numel for e in self._extents if e.bucket == n]
            yield Shard(
                params=whole.view(self._comm.world_size, b.tiles_per_shard, TILE)[rank],
                grads=bank.grads[mine],
                states={name: state[mine] for name, state in bank.states.items()},
                tiles=-(-max(ends, default=0) // TILE),
            )

    def segments(self, index_of: Sequence[int]) -> list[Segment]:
        """What this rank updates, as tiles; ``index_of`` numbers the params for the optimizer.

        Bucket after bucket, so that neighbours in memory are neighbours here.
        """
        found = []
        for e in self._extents:
            shard = self.shards[e.bucket]
            grad, params = rows_of(shard.grads, e), rows_of(shard.params, e)
            states = {name: rows_of(state, e) for name, state in shard.states.items()}
            spec, rule = self.layout.params[e.param], self.rules[e.param]
            elements = Elements.of(spec.shape, spec.stride).from_(e.param_start)
            of = index_of[e.param], grad, params, states, rule, self.formats[e.param], elements
            found.append(segment(*of))
        return found

    # --- params ----------------------------------------------------------------------------------

    def adopt_params(self) -> None:
        """Bring params whose memory someone replaced (``model.to()``, a loader) back into place.

        Raises ``RuntimeError`` naming a param that has become another tensor altogether.
        """
        moved = []
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
            moved.append((i, p, slot))
        for i, p, slot in moved:
            self._clear_remainder(i, p.detach())
            slot.copy_(p.detach())
            p.data = slot

    def release_params(self) -> None:
        """Give the params memory of their own again; the buffers are of no use afterwards."""
        for i, slot in self._slots.items():
            self.params[i].data = slot.clone()

    def _clear_remainder(self, i: int, new: Tensor) -> None:
        """Where param i's new values are not those that lie in its bucket."""
        remainder = self.local_state(i).get(REMAINDER) if self.shards else None
        if remainder is not None:
            refresh_remainder(remainder, self._own_part(i, new), self._own_part(i, self._slots[i]))

    def _own_part(self, i: int, whole: Tensor) -> Tensor:
        """This rank's elements of a tensor shaped like param i, 1-D in memory order."""
        extent, memory = self._extent_of.get(i), flat_row(as_laid_out(whole, self._slots[i]))[0]
        return memory[:0] if extent is None else memory[extent.param_start :][: extent.numel]

    def refresh_masters(self) -> None:
        """Take over what is no longer the masters' own rounding."""
        for s in self.shards:
            if MASTER in s.states:
                refresh_master(s.states[MASTER], s.params)
            if REMAINDER in s.states:
                refresh_remainder(s.states[REMAINDER], s.params)

    # --- gradients -------------------------------------------------------------------------------

    def stage(self, bucket: int, slot: int, nothing: bool = False) -> tuple[Tensor, Iterable[int]]:
        """A bucket's gradients put together in staging buffer ``slot``, and which params have one.

        ``nothing``: as if none had one.
        Raises ``RuntimeError`` naming a param whose gradient is sparse.
        """
        staging = self._staging.get(bucket)
        if staging is None:
            staging = self._staging[bucket] = self._make_staging(bucket, slot)
        # Backward waits for the host here: few operations, and loops in C where it is hundreds.
        grads: list[Any] = list(
            repeat(None, len(staging.params)) if nothing else map(_GRAD, staging.params)
        )
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

    def _make_staging(self, bucket: int, slot: int) -> Staging:
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
        return Staging(
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
            self._taken = [self._taking(extent) for extent in self._extents]
        into, taken = [], []
        for extent, (rows, to) in zip(self._extents, self._taken):
            grad = self.params[extent.param].grad
            if grad is None:
                rows.fill_(ABSENT)
                continue
            if extent.numel != grad.numel():
                memory = flat_row(as_laid_out(grad, self._slots[extent.param]))[0]
                grad = memory[extent.param_start :][: extent.numel]
            into.append(to)
            taken.append(grad)
        if into:
            torch._foreach_copy_(into, taken)
        return {j for j, p in enumerate(self.params) if p.grad is not None}

    def _taking(self, extent: Extent) -> tuple[Tensor, Tensor]:
        """The tiles of a extent's gradient, and these shaped as the gradient or its piece is."""
        rows = rows_of(self.shards[extent.bucket].grads, extent)
        spec, flat = self.layout.params[extent.param], rows.view(-1)[: extent.numel]
        if extent.numel != spec.numel:
            return rows, flat
        return rows, flat.as_strided(spec.shape, spec.stride, flat.storage_offset())

    def found_gradients(self) -> Tensor:
        """Which params have a gradient on any rank, bool [params], true of those with tiles here:
        read off the gradients that have been summed over ranks."""
        if self._first_tiles is None:
            self._first_tiles = []
            for kind, bank in self.banks.items():
                mine = [e for e in self._extents if self._kind(e.bucket) == kind]
                rows = [rows_of(self.shards[e.bucket].grads, e).storage_offset() for e in mine]
                of, row = (int64(v).to(self.device) for v in ([e.param for e in mine], rows))
                self._first_tiles.append((of, bank.grads, row // TILE))
        found = torch.zeros(len(self.params), dtype=torch.bool, device=self.device)
        for params, grads, at in self._first_tiles:
            first = grads[at, 0]
            found[params] = ~((first == 0) & torch.signbit(first))
        return found

    def load_gradients(self, means: Mapping[Tensor, Tensor]) -> None:
        """Take this rank's part of whole means over ranks; of other params there is no gradient."""
        for bank in self.banks.values():
            bank.grads.fill_(ABSENT)
        for e in self._extents:
            mean = means.get(self.params[e.param])
            if mean is not None:
                memory = flat_row(as_laid_out(mean, self._slots[e.param]))[0]
                flat_of(self.shards[e.bucket].grads, e).copy_(memory[e.param_start :][: e.numel])

    # --- state -----------------------------------------------------------------------------------

    def local_state(self, i: int) -> dict[str, Tensor]:
        """This rank's part of each state of param i, 1-D in memory order: views, maybe empty."""
        extent = self._extent_of.get(i)
        if extent is None:
            return {name: self._zeros(0, dtype) for name, dtype in self._stored[i].items()}
        states = self.shards[extent.bucket].states
        return {name: flat_of(states[name], extent) for name in self._stored[i]}

    def owned(self, i: int) -> OwnedRange:
        """This rank's part of param i itself and of its states."""
        extent, start, own = self._extent_of.get(i), 0, self._zeros(0, self.params[i].dtype)
        if extent is not None:
            start, own = extent.param_start, flat_of(self.shards[extent.bucket].params, extent)
        return OwnedRange(start, {"param": own, **self.local_state(i)}, self.layout.params[i])

    def load_state(self, i: int, whole: Mapping[str, Tensor]) -> None:
        """Take this rank's part of param i's state out of whole tensors, shaped like the param.

        Moments that are not given are zero, and a master is the param's present value. State in
        another format is converted; a param of full precision takes the bits of a master, on every
        rank. Masters and params are compared later, by :meth:`refresh_masters`: either may be
        loaded first.
        """
        if i not in self._slots:
            return
        slot, own = self._slots[i], self.local_state(i)
        as_bfloat16 = slot.dtype == torch.bfloat16
        if not as_bfloat16:
            for name in {MASTER, REMAINDER} & whole.keys() - own.keys():
                to_be_held(name, as_laid_out(whole[name].to(slot.device), slot), slot)
        if REMAINDER in own and REMAINDER not in whole and MASTER in whole:
            master = as_laid_out(whole[MASTER].to(slot.device), slot)
            whole = {**whole, REMAINDER: split_into(slot, master)}
        for name, part in own.items():
            value = whole.get(name)
            if value is None and name == MASTER:
                was_split = as_bfloat16 and REMAINDER in whole
                value = joined(slot, whole[REMAINDER].to(slot.device)) if was_split else slot
            if value is None:
                part.zero_()
            else:
                part.copy_(converted(self._own_part(i, value), part.dtype))

    def gather_state(self, name: str, keep: bool) -> dict[int, Tensor]:
        """Whole tensors of one state on the CPU, by param; a collective, bucket by bucket.

        Ranks that do not ``keep`` take part and get nothing.
        """
        found = {}
        for bucket, s in zip(self.layout.buckets, self.shards):
            shard = s.grads if name == GRADS else s.states.get(name)
            if shard is None:
                continue
            whole = self._zeros(shard.numel() * self._comm.world_size, shard.dtype)
            # gloo has no 16-bit integers
            as_sent = torch.uint8 if shard.dtype == torch.int16 else shard.dtype
            self._comm.all_gather(whole.view(as_sent), shard.contiguous().view(as_sent))
            for i in bucket.params if keep else ():
                slot = self._slots[i]
                at = whole.as_strided(slot.shape, slot.stride(), slot.storage_offset())
                found[i] = at.to("cpu", copy=True)
        return found
