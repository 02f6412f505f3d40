"""What a ShardedLamb keeps on this rank, from its first use on, and how it is saved and loaded."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .base import LambBase
from .deepspeed_marks import refuse_deepspeed
from .sharded_state import ShardedState, compared_options, described_setup
from .sharding.buffers import FlatBuffers
from .sharding.comm import Comm, ProcessGroup, is_dtensor
from .sharding.comm_stream import CommStream
from .sharding.forward_order import ForwardOrder, Handles
from .sharding.lockstep import Lockstep
from .sharding.members import Members
from .sharding.overlap import GradientReducer, ParamGatherer
from .sharding.settings import Settings
from .sharding.shards import OwnedRange

#: by group: options, and which params
_Compared: TypeAlias = list[tuple[dict[str, Any], list[int]]]


class ShardedBase(LambBase):
    """Buffers that are made at first use, and made anew for other params; whole state."""

    _own_values_count = False
    stage: int
    _settings: Settings
    _members: Members
    _module: weakref.ref[nn.Module] | None
    _kept: ShardedState | None
    _reducer: GradientReducer | None
    _gatherer: ParamGatherer | None
    _order: ForwardOrder | None
    _consolidated: dict[str, Any] | None
    _handles: Handles
    #: params in the order of first arrival, for as long as there are no buffers
    _used: dict[int, None]
    _numbered: list[Tensor]
    #: what ranks have compared
    _agreed: _Compared
    #: whether a step has looked at params that it cannot take
    _looked: bool
    #: whether a newer optimizer has the params
    _replaced: bool

    # --- params ----------------------------------------------------------------------------------

    def _check_param(self, name: str, p: Tensor) -> None:
        super()._check_param(name, p)
        if p.device.type == "meta":
            raise RuntimeError(f"{name} is on the meta device; materialize the model first")
        if is_dtensor(p):
            raise RuntimeError(
                f"{name} is a DTensor, sharded already; ShardedLamb shards plain tensors itself"
            )
        device = next(p for group in self.param_groups for p in group["params"]).device
        if p.device != device:
            raise RuntimeError(
                f"all params must be on one device; {name} is on {p.device}, others on {device}"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; once built, a collective that moves all state to a new layout."""
        if self._ready and self._kept is not None:
            self._current()
        super().add_param_group(param_group)
        self._looked = False
        if not self._ready or self._members.lockstep is None:
            return
        try:
            self._members.lockstep.meet("add_param_group()")
            self._members.require_same(self._described(), self._all_params())
        except Exception:
            # A refused group must not stay behind half added.
            del self.param_groups[-1]
            raise
        self._agreed = list(map(_compared, self.param_groups))
        self._comm.broadcast_all(self.param_groups[-1]["params"])
        if self._kept is not None:
            self._lay_out_anew(self._kept)

    # --- ranks -----------------------------------------------------------------------------------

    def _described(self) -> list[str]:
        own = [*self._settings.described(), f"impl = {self.impl!r}"]
        return described_setup(self.named_groups(), self.param_groups) + own

    def _all_named(self) -> list[tuple[str, Tensor]]:
        return list(chain.from_iterable(self.named_groups()))

    def _join(self) -> Lockstep:
        """Find the other ranks, at first use if there was no process group before that."""
        members = self._members
        if members.lockstep is None:
            module = self._module and self._module()
            buffers = module.buffers() if module else ()
            members.join(self._described(), self._all_named(), buffers)
            self._agreed = list(map(_compared, self.param_groups))
            assert members.lockstep is not None
        return members.lockstep

    def _changed_groups(self) -> tuple[str, _Compared]:
        """What is not as it was when the ranks last compared their groups, and what they are."""
        if self._comm.num_ranks == 1:
            return "", self._agreed
        now = list(map(_compared, self.param_groups))
        number: dict[int, int] = {}
        changed: dict[str, list[int]] = {}
        for i, ((options, members), (before, others)) in enumerate(zip(now, self._agreed)):
            if members != others:
                number = number or {id(p): n for n, p in enumerate(self._numbered)}
                code = _code([number.get(member) for member in members])
                changed.setdefault(f"{len(members)} params ({code})", []).append(i)
            for name, value in options.items():
                if value != before.get(name):
                    changed.setdefault(f"{name}={value!r}", []).append(i)
        if len(now) != len(self._agreed):
            changed[f"{len(now)} groups"] = []
        return _listed(changed), now

    @property
    def _comm(self) -> Comm:
        return self._members.comm

    # --- buffers ---------------------------------------------------------------------------------

    @property
    def _reduces(self) -> bool:
        return self._settings.reduce_gradients and self._comm.num_ranks > 1

    @property
    def _overlaps(self) -> bool:
        return self.stage == 2 and self._settings.overlap and self._settings.reduce_gradients

    def _current(self) -> ShardedState:
        """What is kept, in line with what groups, params and state are now."""
        kept, _ = self._build()
        self.synchronize()
        if not self._replaced:
            kept.settle(self.param_groups, self.state)
        return kept

    def _build(self, also: frozenset[int] = frozenset()) -> tuple[ShardedState, ParamGatherer]:
        """The buffers, at first use: frameworks move params after making the optimizer.

        ``also``: ids of params that need not be trainable now.
        """
        if self._kept is None or self._gatherer is None:
            refuse_deepspeed("ShardedLamb", self._given, self._all_params())
            lockstep = self._join()
            named = {
                id(p): (name, p)
                for name, p in chain.from_iterable(self.named_groups())
                if p.requires_grad or id(p) in also
            }
            if not named:
                raise RuntimeError("ShardedLamb has no trainable params")
            # In the order of use, as far as a backward has shown it; the same on every rank.
            used = self._comm.from_first(list(self._used))
            last = [named.pop(key) for i in used if (key := id(self._numbered[i])) in named]
            ordered = [*named.values(), *reversed(last)]
            made_for = self.rule_of(), self.formats_of()
            buffers = FlatBuffers.of(ordered, *made_for, self._comm, self._settings)
            stream = CommStream(buffers.device)
            self._gatherer = ParamGatherer(buffers, self._comm, stream, self._order)
            if self._reduces:
                keep, bucketed = self.stage == 1, set(map(id, buffers.bucketed))
                others = [p for p in self._all_params() if id(p) not in bucketed]
                self._reducer = GradientReducer(
                    buffers, self._comm, stream, lockstep, self._overlaps, keep, others
                )
            self._handles.remove_all()
            self._kept = ShardedState(
                buffers, self.param_groups, self.state, impl=self.impl, keep=self._captured
            )
        return self._kept, self._gatherer

    def _lay_out_anew(self, kept: ShardedState) -> ShardedState:
        """Other buffers, of all that is trainable now and of what was, with the same state and the
        same gradients; a collective."""
        reducer, state = self._reducer, kept.whole(keep=True)
        reduced = {} if reducer is None else reducer.reduced()
        by_param = {kept.buffers.params[j]: state[i] for j, i in enumerate(kept.indices)}
        kept.buffers.release_params()
        self._kept = self._reducer = self._gatherer = None
        kept, _ = self._build(also=frozenset(map(id, by_param)))
        kept.load(by_param)
        resumed: GradientReducer | None = self._reducer
        if resumed is not None and reducer is not None:
            resumed.resume(reduced, reducer.rounds.count)
            reducer.let_go()
        return kept

    @property
    def process_group(self) -> ProcessGroup | None:
        """The shard axis."""
        return self._comm.group

    def refresh_masters(self) -> None:
        """As :meth:`dist_lamb.Lamb.refresh_masters`; call it on all ranks."""
        if self._kept is not None:
            self.synchronize()
            self._kept.refresh_masters()

    def synchronize(self) -> None:
        """Wait for the params of the last step; on GPUs the current stream does, not the host."""
        if self._gatherer is not None:
            self._gatherer.synchronize()

    # --- state -----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # A copy would share the process group and think it owns the params' memory.
        raise TypeError("a ShardedLamb cannot be copied or pickled; save its state dict instead")

    def full_optimizer_state_dict(self) -> dict[str, Any]:
        """A torch.optim state dict with whole tensors on the CPU, on every rank; a collective.

        It loads at any world size, and into :class:`dist_lamb.Lamb`.
        """
        return self._packed(keep=True) or {}

    def full_state_dict(self, to: int = 0) -> dict[str, Any]:
        """:meth:`full_optimizer_state_dict` on rank ``to`` alone, ``{}`` on others; a collective.

        Buckets are gathered one after the other, so no device ever holds more than one whole, and
        only rank ``to`` needs host memory for all.
        """
        return self._packed(keep=self._comm.rank == to) or {}

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Make ``state_dict()`` whole on rank ``to``, or on every rank if that is None, until the
        next step; a collective. :mod:`dist_lamb.integrations` calls it for trainers."""
        self._consolidated = self._packed(keep=to is None or self._comm.rank == to)

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors, or an error: never silently this rank's part.

        With several ranks call :meth:`consolidate_state_dict` on all of them first.
        """
        if self._kept is None:
            return dict(super().state_dict())
        if self._comm.world_size == 1:
            return self.full_optimizer_state_dict()
        whole, packed = self._consolidated, dict(super().state_dict())
        if whole is None or list(whole["state"]) != list(packed["state"]):
            raise RuntimeError(
                "the state is sharded: call consolidate_state_dict(to=rank) on all ranks before "
                "state_dict() on that rank (to=None: on every rank; dist_lamb.integrations does it "
                "in Trainer and Accelerate), or full_optimizer_state_dict() on all ranks"
            )
        # An lr may have been set since.
        return {**whole, "param_groups": packed["param_groups"]}

    def _packed(self, keep: bool) -> dict[str, Any] | None:
        if self._kept is not None:
            self._join().meet("a whole state dict")
        whole = self._whole_state(keep)
        if not keep:
            return None
        packed = dict(super().state_dict())
        return {**packed, "state": {i: whole.get(i, v) for i, v in packed["state"].items()}}

    def _whole_state(self, keep: bool) -> dict[int, dict[str, Tensor]]:
        """{position of the param: its state in whole tensors on the CPU}; a collective."""
        if self._kept is None:
            return {i: {} for i in range(len(self._all_params()))}
        return self._current().whole(keep)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load whole tensors (:meth:`full_optimizer_state_dict`, say) on all ranks.

        Raises ``ValueError`` naming a param whose saved state has another shape, or an option that
        is not valid; nothing is changed then.
        """
        super().load_state_dict(state_dict)
        self._consolidated = None

    def _tensors_by_param(self, saved: Mapping[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        if self._kept is not None:
            own = [group["params"] for group in self.param_groups]
            pairs = zip(saved["param_groups"], own)
            self._kept.refuse_other_rules([{**group, "params": params} for group, params in pairs])
        return super()._tensors_by_param(saved)

    def _load_tensors(self, loaded: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        if self._kept is None and not any(loaded.values()):
            return  # an empty state: trainers pass one through before the first step
        kept, _ = self._build(also=frozenset(id(p) for p, tensors in loaded.items() if tensors))
        self.synchronize()
        kept.arrange(self.param_groups, self.state, adopt=False)
        if kept.unfrozen():
            kept = self._lay_out_anew(kept)
        kept.load(loaded)

    # --- checkpoints -----------------------------------------------------------------------------

    def pieces(self, build: bool = False) -> dict[Tensor, OwnedRange]:
        """What this rank holds of each trainable param, memory to be read or to be overwritten.

        Empty before the first step, unless ``build``. After overwriting, :meth:`take_pieces`.
        """
        return self._current().owned() if self._kept or build else {}

    @torch.no_grad()
    def take_pieces(self, steps: Mapping[Tensor, Tensor]) -> None:
        """Go on from overwritten pieces, with these step counts (else 0); a collective."""
        kept, gatherer = self._build()
        for p in self.state:
            self.state[p]["step"] = steps.get(p, torch.zeros((), dtype=torch.float32, device="cpu"))
        kept.arrange(self.param_groups, self.state, adopt=False)
        kept.overwritten()
        gatherer.gather()
        self._consolidated = None
        self.state_loaded()


def _compared(group: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    return compared_options(group), list(map(id, group["params"]))


def _code(value: object) -> str:
    return f"{zlib.crc32(repr(value).encode()):08x}"


def _listed(changed: Mapping[str, list[int]]) -> str:
    """Short, for it is written at every step; a code stands for what is left out."""
    texts = []
    for what, groups in changed.items():
        few = ", ".join(map(str, groups[:4]))
        many = f" to {groups[-1]} ({_code(groups)})" if len(groups) > 4 else ""
        texts.append(f"{what} in group {few}{many}" if groups else what)
    more = f" and {len(texts) - 6} more ({_code(texts)})" if len(texts) > 6 else ""
    return f" with {', '.join(texts[:6])}{more}" if texts else ""
