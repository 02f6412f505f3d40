"""What an optimizer remembers of params, also of such as have left its groups."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

_Note = TypeVar("_Note")


class ParamNotes(Generic[_Note]):
    """Notes by param, that is, by identity.

    Params are held weakly: their memory is not the optimizer's once they have left its groups. But
    not those whose contents torch exchanges where a model is moved or converted (DTensors;
    ``torch.utils.swap_tensors``), which it refuses for tensors with weak references.
    """

    def __init__(self) -> None:
        self._notes: dict[int, tuple[Tensor | weakref.ref[Tensor], _Note]] = {}

    def __setitem__(self, p: Tensor, note: _Note) -> None:
        self._notes[id(p)] = (p if _swapped(p) else weakref.ref(p)), note

    def __iter__(self) -> Iterator[Tensor]:
        """Those that live."""
        return (p for held, _ in self._notes.values() if (p := _param(held)) is not None)

    def get(self, p: Tensor, default: _Note) -> _Note:
        # Another tensor may have the id of one that is gone.
        held, note = self._notes.get(id(p), (None, default))
        return note if held is not None and _param(held) is p else default


def _param(held: Tensor | weakref.ref[Tensor]) -> Tensor | None:
    return held() if isinstance(held, weakref.ref) else held


def _swapped(p: Tensor) -> bool:
    """As ``nn.Module._apply`` decides it: wrappers of other tensors, or where it is told to."""
    swap = torch.__future__.get_swap_module_params_on_conversion()
    return swap or hasattr(p, "__tensor_flatten__")
