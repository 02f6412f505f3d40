"""What ``Lamb`` keeps from a step for the next ones: what it found in order, ready for use.

A step first makes sure that nothing is out of the ordinary: which params have gradients, how they
and the state are laid out, and where. Mostly all of it is as it was.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .base import LambBase
from .kernels import Work
from .kernels.tables import Segment, Table
from .norms import Norms
from .sharding.comm import is_dtensor
from .sharding.dtensors import local_of, local_of_param, local_sharded_as, sharding_of
from .state import TENSOR_STATES, flat_row

_GRAD = attrgetter("grad")
_PARAMS = itemgetter("params")
_DATA_PTR = Tensor.data_ptr
#: State tensors whose addresses are looked at in every step. Whoever moves state behind the same
#: tensor objects (``t.data = ...``, to the host and back) moves all of it.
_WATCHED = 16

#: (reads a state from an entry, the entries that have it, ids of the tensors there)
_Held: TypeAlias = tuple[Callable[[Any], Tensor], list[dict[str, Tensor]], list[int]]


def in_place(params: list[Tensor], segments: Sequence[Segment]) -> bool:
    """Whether gradients are read where they are, not from copies laid out as the params are."""
    return all(
        s.grad is None or s.grad.data_ptr() == local_of(params[s.param].grad).data_ptr()  # type: ignore[arg-type]
        for s in segments
    )


class Plan(ABC):
    """What a step found in order, and the quickest way to see that it still is.

    With a thousand small tensors the host is what a step waits for, so every check is a loop in C:
    0.3 us a tensor for all of them.
    """

    def __init__(
        self,
        norms: Norms,
        params: list[Tensor],
        segments: Sequence[Segment],
        state: Mapping[Tensor, dict[str, Tensor]],
    ) -> None:
        self._norms = norms
        self._params = params
        chosen = {s.param for s in segments}
        self._own = [params[s.param] for s in segments]
        self._others = [p for i, p in enumerate(params) if i not in chosen]
        #: (position, sharding of its gradient) of the DTensors among them
        self._sharded = [
            (k, sharding_of(p if p.grad is None else p.grad))
            for k, p in enumerate(self._own)
            if is_dtensor(p)
        ]
        self._entries = list(state.values())
        entries = [state[p] for p in self._own]
        # Not the tensors: who moves state away wants their memory back. An id may come again, but
        # hardly all of them for tensors that lie elsewhere.
        self._held: list[_Held] = []
        large = []
        for name in ("step", *TENSOR_STATES):
            having = [entry for entry in entries if name in entry]
            self._held.append((itemgetter(name), having, [id(entry[name]) for entry in having]))
            large += [(entry, name) for entry in having if name in TENSOR_STATES]
        self._watched = large[:: math.ceil(len(large) / _WATCHED)]
        self._addresses = list(map(_DATA_PTR, self._memory()))
        like = [p if s.grad is None else s.grad for s, p in zip(segments, self._memory())]
        self._kinds = [(g.dtype, g.stride()) for g in like]
        self._guard = _guard(like)

    def fits(
        self,
        groups: list[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Tensor]],
        state_seen: bool,
    ) -> bool:
        """Whether it holds for this step too, whose gradients it has taken then.

        ``state_seen``: somebody may have replaced any of the state.
        """
        params = list(map(_PARAMS, groups))
        try:
            return (
                sum(map(len, params)) == len(self._params)
                and all(map(is_, chain.from_iterable(params), self._params))
                and (not state_seen or self._knows(state))
                # memory that was replaced: by model.to(), a loader, offloading
                and list(map(_DATA_PTR, self._memory())) == self._addresses
                and self._takes_gradients()
            )
        except KeyError:
            return False  # state that was emptied

    def _memory(self) -> list[Tensor]:
        """The params' local memory, and some of the state's."""
        memory = self._own + [entry[name] for entry, name in self._watched]
        if self._sharded:
            for k, _ in self._sharded:
                memory[k] = local_of_param(memory[k])
            memory[len(self._own) :] = map(local_of, memory[len(self._own) :])
        return memory

    def _knows(self, state: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Whether all state is what it was."""
        return (
            len(state) == len(self._entries)
            and all(map(is_, state.values(), self._entries))
            and all(list(map(id, map(get, have))) == ids for get, have, ids in self._held)
        )

    def _takes_gradients(self) -> bool:
        if any(p.grad is not None for p in self._others):
            return False
        grads: list[Any] = list(map(_GRAD, self._own))
        for k, sharding in self._sharded:
            if grads[k] is not None:
                grads[k] = local_sharded_as(grads[k], sharding)
                if grads[k] is None:
                    return False
        present = None
        try:
            addresses = list(map(_DATA_PTR, grads))
        except TypeError:
            present = [g is not None for g in grads]
            if not any(present):
                return False
            addresses = [0 if g is None else g.data_ptr() for g in grads]
        except RuntimeError:
            return False  # a sparse gradient
        if present is not None or self._guard is None or not self._guard(*grads):
            # A gradient may have another dtype or memory format at the same address as before.
            for g, kind in zip(grads, self._kinds):
                if g is not None and (g.dtype, g.stride()) != kind:
                    return False
        return self._take(grads, addresses, present)

    @abstractmethod
    def _take(self, grads: list[Any], addresses: list[int], present: list[bool] | None) -> bool:
        """``grads``: local ones, or None; ``present``: which are not None, None if all are."""

    @abstractmethod
    def step(self, optimizer: LambBase) -> None:
        """The step, on the gradients that have been taken."""


class FusedPlan(Plan):
    """The table of addresses; it keeps no tensor alive."""

    def __init__(self, table: Table, *found: Any) -> None:
        super().__init__(*found)
        self._table = table

    def _take(self, grads: list[Any], addresses: list[int], present: list[bool] | None) -> bool:
        self._table.set_gradients(addresses, present)
        return True

    def step(self, optimizer: LambBase) -> None:
        optimizer._update_fused(self._table, self._norms, active=None)


class WorksPlan(Plan):
    """The works, without their gradients between steps."""

    def __init__(self, works: list[Work], active: dict[torch.device, Tensor], *found: Any) -> None:
        super().__init__(*found)
        self._works, self._active = works, active
        position = {id(p): k for k, p in enumerate(self._own)}
        #: where in _own the blocks of each work are
        self._blocks = [
            [position[id(self._params[i])] for _, _, _, i in work.rows.runs] for work in works
        ]
        self._release()

    def _take(self, grads: list[Any], addresses: list[int], present: list[bool] | None) -> bool:
        if present is not None:
            return False
        for work, blocks in zip(self._works, self._blocks):
            work.take([flat_row(grads[k]) for k in blocks])
        return True

    @torch.no_grad()
    def step(self, optimizer: LambBase) -> None:
        try:
            optimizer._update(self._works, self._active, self._norms, masked=False)
        finally:
            self._release()

    def _release(self) -> None:
        for work in self._works:
            work.release()


def _guard(tensors: list[Tensor]) -> Callable[..., bool] | None:
    """``check(*others)``: the same dtypes, sizes and strides? 0.1 us a tensor; False is no proof.

    torch.compile's own check, five times as fast as a loop over dtypes and strides in Python.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes: Any = [list(t.shape) for t in tensors]
        strides: Any = [list(t.stride()) for t in tensors]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        check: Callable[..., bool] = guards.check
        return check if check(*tensors) else None
    except Exception:  # private: it may change in any way
        return None
