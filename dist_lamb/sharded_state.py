"""What a ShardedLamb keeps between steps: buffers, and how groups and state refer to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import options, rules
from .base import count_here
from .fingerprint import Fingerprint
from .kernels import make_update
from .kernels.device import mask_of
from .kernels.groups import GroupTable
from .last_step import Members
from .sharding.buffers import FlatBuffers
from .sharding.shards import OwnedRange, spec_of
from .state import MASTER, REMAINDER, TENSOR_STATES, Formats

Groups = Sequence[Mapping[str, Any]]


def described_setup(named_groups: Sequence[Any], groups: Groups) -> list[str]:
    """What must be the same on all ranks, an item each: params, and the options of each group."""
    described = []
    for name, p in chain.from_iterable(named_groups):
        spec = spec_of(name, p)
        described.append(
            f"{name} {spec.shape} {spec.stride} {spec.dtype} requires_grad={p.requires_grad}"
        )
    for i, group in enumerate(groups):
        described.append(f"{len(group['params'])} params in group {i}")
        kept = {**compared_options(group), "lr": plain(float(group["lr"]))}
        described += [f"{name}={value!r} in group {i}" for name, value in kept.items()]
    return described


def compared_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a step reads of a group, and ranks must have alike: without an lr on a GPU, which the
    host would have to wait for. Equal values are equal, of whatever type they are; numbers to 7
    digits, since the cosine of a schedule differs between machines in its last bit."""
    lr = group["lr"]
    on_gpu = isinstance(lr, Tensor) and lr.device.type != "cpu"
    found = {name: plain(value) for name, value in options.owned(group).items()}
    return {**found, "lr": None if on_gpu else plain(float(lr))}


def plain(value: Any) -> Any:
    """As :func:`compared_options` compares it."""
    if isinstance(value, (list, tuple)):  # a copy: a list may be changed in place
        return tuple(map(plain, value))
    if isinstance(value, Real) and value is not True and value is not False:
        return float(f"{float(value):.7g}") + 0.0  # -0.0 is 0.0
    return value


def gradient_problem(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first param whose gradient cannot be taken, and why."""
    for name, p in named:
        if p.grad is not None and p.grad.layout != torch.strided:
            return f"{name}: sparse gradients are not supported"
    return None


class ShardedState:
    """Numbers the buffers' params as the param groups do, and shows their state in ``state``.

    Groups, state and params may be edited between steps: :meth:`settle` brings all in line. Nothing
    here is a collective but :meth:`whole`.
    """

    def __init__(
        self,
        buffers: FlatBuffers,
        groups: Groups,
        state: Any,
        *,
        impl: str,
        keep: list[Any],
    ) -> None:
        self.buffers = buffers
        self._impl, self._keep = impl, keep
        every = chain.from_iterable(group["params"] for group in groups)
        trained = set(map(id, buffers.params))
        #: masters were loaded, and have not been compared with the params since
        self._loaded = False
        #: params that did not require gradients when the buffers were made: not in them
        self.frozen = [p for p in every if id(p) not in trained]
        self.arrange(groups, state, adopt=False)

    def unfrozen(self) -> list[int]:
        """Which of the frozen params have become trainable since."""
        return [i for i, p in enumerate(self.frozen) if p.requires_grad]

    def settle(self, groups: Groups, state: Any) -> None:
        """Take over what was edited since the last step.

        Raises ``RuntimeError`` naming a param that was put into or taken out of the groups, or
        state of another size.
        """
        known = self._rules == list(map(rules.of, groups))
        known = known and self._formats == list(map(Formats.of, groups))
        if not known or not self._fingerprint.matches(groups, state):
            self.buffers.adopt_params()
            self.arrange(groups, state, adopt=True)
            self.buffers.refresh_masters()
        elif self._loaded or self._fingerprint.edited():
            self.buffers.refresh_masters()
        self._loaded = False

    def refresh_masters(self) -> None:
        """Take the params' values where they are no longer their masters' rounding."""
        self.buffers.adopt_params()
        self.buffers.refresh_masters()

    def renew(self) -> None:
        """After params were written to by the optimizer itself."""
        self._fingerprint.renew()

    def arrange(self, groups: Groups, state: Any, adopt: bool) -> None:
        """Make everything that depends on the order of params anew.

        ``adopt``: what lies in ``state`` in another place is taken over, and what is missing there
        begins anew; else what the buffers hold counts.
        """
        buffers = self.buffers
        every = list(chain.from_iterable(group["params"] for group in groups))
        index = {id(p): i for i, p in enumerate(every)}
        self._refuse_other_params(every, index)
        #: by param of the buffers, its position in the groups
        self.indices = [index[id(p)] for p in buffers.params]
        self.counters = torch.zeros(len(every), dtype=torch.float32, device=buffers.device)
        for j, p in enumerate(buffers.params):
            entry, own = state[p], buffers.local_state(j)
            if adopt:
                self._adopt(j, entry, own)
            count_here(self.counters, self.indices[j], entry)
            for name in {MASTER, REMAINDER} & entry.keys() - own.keys():
                del entry[name]
            entry.update(own)
        table = GroupTable.of_groups(buffers.device, groups, self._keep)
        self._rules, self._formats = list(map(rules.of, groups)), list(map(Formats.of, groups))
        of_each = [own for own, g in zip(self._formats, groups) for _ in g["params"]]
        for j, made_for in enumerate(buffers.formats):
            now, dtype = of_each[self.indices[j]], buffers.params[j].dtype
            if now.counting(dtype) != made_for.counting(dtype):
                raise RuntimeError(
                    f"{buffers.layout.params[j].name} has come under other formats than "
                    f"state_format={made_for.moments!r}, master={made_for.master!r}, which its "
                    "buffers were made for: make a new ShardedLamb of the same params first, then "
                    "load the state dict of this one into it"
                )
        self.refuse_other_rules(groups)
        self.members = Members(every, table.rules)
        segments = buffers.segments(self.indices)
        self.update = make_update(
            segments, self.counters, table, impl=self._impl, tiled=True, keep=self._keep
        )
        nothing = [None] * len(buffers.params)
        self._fingerprint = Fingerprint(groups, state, buffers.params, nothing)
        self._mask: tuple[frozenset[int], Tensor] | None = None

    def refuse_other_rules(self, groups: Groups) -> None:
        """Raise ``RuntimeError`` naming a param that has another rule in ``groups``."""
        of_each = {id(p): rules.of(group) for group in groups for p in group["params"]}
        specs = self.buffers.layout.params
        for spec, p, rule in zip(specs, self.buffers.params, self.buffers.rules):
            if of_each.get(id(p), rule) is not rule:
                raise RuntimeError(
                    f"{spec.name} has come under another rule than {rule.name!r}, which its "
                    "buffers were made for: make a new ShardedLamb"
                )

    def _refuse_other_params(self, every: Sequence[Tensor], index: Mapping[int, int]) -> None:
        known = set(map(id, chain(self.buffers.params, self.frozen)))
        specs = self.buffers.layout.params
        gone = [spec.name for spec, p in zip(specs, self.buffers.params) if id(p) not in index]
        new = [f"a param of shape {tuple(p.shape)}" for p in every if id(p) not in known]
        if gone or new:
            raise RuntimeError(
                f"{(gone + new)[0]} was {'taken out of' if gone else 'put into'} the param groups "
                "of this ShardedLamb: add params by add_param_group() on all ranks, and make a new "
                "optimizer to drop some. Params may move between groups"
            )

    def _adopt(self, j: int, entry: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
        """Take over this rank's part of a param's state from an entry of ``state``."""
        for name, memory in own.items():
            given = entry.get(name)
            if given is None and name == MASTER:
                memory.copy_(self.buffers.owned(j).views["param"])
            elif given is None:
                memory.zero_()
            elif given.numel() != memory.numel():
                raise RuntimeError(
                    f"ShardedLamb cannot step {self.buffers.layout.params[j].name}: its state "
                    f"{name} has {given.numel()} elements, this rank's part {memory.numel()}; load "
                    "whole tensors by load_state_dict()"
                )
            elif given.data_ptr() != memory.data_ptr():
                memory.copy_(given.reshape(-1))

    def active(self, present: set[int], everywhere: bool) -> Tensor:
        """bool [params]: which of the params with elements here have a gradient on any rank.

        ``present`` are those that have one on this rank, or, with ``everywhere``, all there are.
        """
        own, empty, device = self.buffers.own, self.buffers.empty, self.buffers.device
        # Params without elements have none to tell: the sums over ranks do, as they count steps.
        chosen = (own | empty) & present
        if not everywhere and not own <= present:
            mask = torch.zeros(len(self.counters), dtype=torch.bool, device=device)
            mask[self.indices] = self.buffers.found_gradients()
            if empty & present:
                mask[[self.indices[j] for j in empty & present]] = True
            return mask
        if self._mask is None or self._mask[0] != chosen:
            here = [self.indices[j] for j in chosen]
            self._mask = (chosen, mask_of(here, len(self.counters), device, self._keep))
        return self._mask[1]

    def owned(self) -> dict[Tensor, OwnedRange]:
        """What this rank holds of each param."""
        return {p: self.buffers.owned(j) for j, p in enumerate(self.buffers.params)}

    def whole(self, keep: bool) -> dict[int, dict[str, Tensor]]:
        """{position of the param: its state in whole tensors on the CPU}; a collective.

        Ranks that do not ``keep`` take part and get nothing of the large ones.
        """
        whole: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(self.counters))}
        for name in TENSOR_STATES:
            for j, value in self.buffers.gather_state(name, keep).items():
                whole[self.indices[j]][name] = value
        for i in self.indices:
            whole[i]["step"] = self.counters[i].to("cpu", copy=True)
        return whole

    def overwritten(self) -> None:
        """State and params came from elsewhere: a param may not be its master's rounding."""
        self._loaded = True

    def load(self, loaded: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """This rank's part of whole tensors; what is missing begins anew."""
        self.overwritten()
        for j, p in enumerate(self.buffers.params):
            self.buffers.load_state(j, loaded.get(p, {}))
