"""What DeepSpeed leaves on params that it takes over, and what an optimizer does that sees it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor


class GivenParams:
    """The params that an optimizer was given, whatever is put in their place afterwards."""

    def __init__(self) -> None:
        self._params: list[weakref.ref[Tensor]] = []

    def add(self, params: Iterable[Tensor]) -> None:
        self._params += map(weakref.ref, params)

    def refuse_deepspeed(self, name: str, held: Iterable[Tensor]) -> None:
        """Raise ``RuntimeError`` where ``held``, the tensors to be stepped by the optimizer class
        ``name``, are DeepSpeed's slices of the params: their norms are not the params'."""
        here = set(map(id, held))
        given = [p for ref in self._params if (p := ref()) is not None]
        if any(id(p) not in here and taken_by_zero(p) for p in given):
            raise RuntimeError(
                f"{name} was given to DeepSpeed, whose ZeRO (or BF16_Optimizer) hands it flat "
                "slices of many joined params: another algorithm than LAMB. Use "
                "dist_lamb.deepspeed_adapter.DeepSpeedLamb instead, with the same arguments"
            )


def taken_by_zero(p: Tensor) -> bool:
    """Whether DeepSpeed cuts ``p``: by ZeRO-1, 2, 3 or BF16_Optimizer."""
    return hasattr(p, "_hp_mapping") or hasattr(p, "ds_id")
