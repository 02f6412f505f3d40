"""Are these still the tensors that an Update was made from? All of them, in every step.

Between steps torch.optim allows anything: groups edited in place, state dropped, replaced or moved,
params with other memory. What a step keeps for the next is valid only while nothing of that has
happened, and no hint tells. So identity and address of every tensor that a step will touch are
looked at, by loops in C: 0.5 us a param.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, compress, repeat
from operator import attrgetter, call, is_, itemgetter
from typing import Any

from torch import Tensor

from . import _torch_private
from .sharding.comm import is_dtensor
from .sharding.dtensors import local_of, local_sharded_as
from .state import MASTER, REMAINDER, TENSOR_STATES

_DATA_PTR = Tensor.data_ptr
_GRAD, _PARAMS = attrgetter("grad"), itemgetter("params")


class Fingerprint:
    """The params of all groups, and of those that are ``stepped`` everything that a step touches.

    State is held by weak references: who moves it away between steps wants its memory back.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Any, Any],
        stepped: Sequence[Tensor],
        grads: Sequence[Tensor | None],
    ) -> None:
        own = set(map(id, stepped))
        self._groups = [list(group["params"]) for group in groups]
        self._stepped = list(stepped)
        self._others = [p for p in chain(*self._groups) if id(p) not in own]
        self._sharded = [(k, p) for k, p in enumerate(stepped) if is_dtensor(p)]
        self._keys = list(state)
        self._chosen = [id(key) in own for key in self._keys]
        entries = list(compress(state.values(), self._chosen))
        #: (reads a state from an entry, which entries have it: None if all do)
        self._reads: list[tuple[Callable[[Any], Any], list[bool] | None]] = []
        for name in ("step", *TENSOR_STATES):
            having = [name in entry for entry in entries]
            if any(having):
                self._reads.append((itemgetter(name), None if all(having) else having))
        held = self._states(state)
        #: step counts are views of counters that live as long as this: their address says all
        self._counts = sum("step" in entry for entry in entries)
        self._held = list(map(weakref.ref, held[self._counts :]))
        self._addresses = list(map(_DATA_PTR, self._memory(held)))
        # A gradient that is not there yet will come as its param is.
        like = [local_of(p) if g is None else g for p, g in zip(stepped, grads)]
        self._like = [(g.dtype, g.stride()) for g in like]
        self._same_grads = _torch_private.guard([g.detach() for g in like])
        #: params whose writes matter; the others are what the rule reads
        self._rounded = [p for p in stepped if {MASTER, REMAINDER} & state.get(p, {}).keys()]
        self.renew()

    def renew(self) -> None:
        """After the optimizer itself has written into the params."""
        self._versions = list(map(_torch_private.version, self._rounded))

    def edited(self) -> list[Tensor]:
        """Params with masters that were written to since :meth:`renew`."""
        versions = list(map(_torch_private.version, self._rounded))
        if versions == self._versions:
            return []
        return [p for p, a, b in zip(self._rounded, versions, self._versions) if a != b]

    def matches(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> bool:
        """Whether what was made from these tensors may be used on them."""
        params = list(map(_PARAMS, groups))
        if (
            list(map(len, params)) != list(map(len, self._groups))
            or not all(map(is_, chain(*params), chain(*self._groups)))
            or len(state) != len(self._keys)
            or not all(map(is_, state, self._keys))
        ):
            return False
        try:
            held = self._states(state)
            return (
                all(map(is_, map(call, self._held), held[self._counts :]))
                and list(map(_DATA_PTR, self._memory(held))) == self._addresses
            )
        except (KeyError, TypeError, AttributeError, RuntimeError):
            return False  # state that was emptied, or is none of ours

    def gradients(self) -> list[Any] | None:
        """Local gradients of the stepped params, None where there is none; None in place of all if
        one has another dtype or layout than at first, or is of a param that was not stepped."""
        if any(p.grad is not None for p in self._others):
            return None
        grads: list[Any] = list(map(_GRAD, self._stepped))
        for k, p in self._sharded:
            if grads[k] is not None:
                grads[k] = local_sharded_as(grads[k], p)
                if grads[k] is None:
                    return None
        if any(map(is_, grads, repeat(None))) or not self._same_grads(*grads):
            for g, (dtype, stride) in zip(grads, self._like):
                if g is not None and (
                    g.is_sparse or g.dtype != dtype or g.stride() != stride or g.is_neg()
                ):
                    return None
        return grads

    def _states(self, state: Mapping[Any, Any]) -> list[Tensor]:
        entries = list(compress(state.values(), self._chosen))
        states: list[Tensor] = []
        for read, having in self._reads:
            states += map(read, entries if having is None else compress(entries, having))
        return states

    def _memory(self, held: Sequence[Tensor]) -> list[Tensor]:
        """The local memory of params and state."""
        memory = [*self._stepped, *held]
        return list(map(local_of, memory)) if self._sharded else memory
