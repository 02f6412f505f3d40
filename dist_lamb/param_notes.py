"""What an optimizer remembers of params, also of such as have left its groups."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from torch import Tensor

_Note = TypeVar("_Note")


class ParamNotes(Generic[_Note]):
    """Notes by param, that is, by identity.

    Params of the groups are held strongly, and DTensors as long as the optimizer lives: where a
    model is moved or converted, torch exchanges their contents (``torch.utils.swap_tensors``), and
    refuses that for tensors with weak references. Other params that have left the groups are held
    weakly: their memory is not the optimizer's.
    """

    def __init__(self) -> None:
        self._notes: dict[int, tuple[Tensor | weakref.ref[Tensor], _Note]] = {}

    def __setitem__(self, p: Tensor, note: _Note) -> None:
        self._notes[id(p)] = p, note

    def __iter__(self) -> Iterator[Tensor]:
        """Those that live."""
        return (p for held, _ in self._notes.values() if (p := _param(held)) is not None)

    def get(self, p: Tensor, default: _Note) -> _Note:
        # Another tensor may have the id of one that is gone.
        held, note = self._notes.get(id(p), (None, default))
        return note if held is not None and _param(held) is p else default

    def hold(self, params: Iterable[Tensor]) -> None:
        """``params`` are those of the groups now."""
        own = set(map(id, params))
        for key, (held, note) in list(self._notes.items()):
            p = _param(held)
            if p is None:
                del self._notes[key]
            else:
                # a wrapper around other tensors
                swapped = hasattr(p, "__tensor_flatten__")
                self._notes[key] = (p if swapped or key in own else weakref.ref(p)), note


def _param(held: Tensor | weakref.ref[Tensor]) -> Tensor | None:
    return held() if isinstance(held, weakref.ref) else held
