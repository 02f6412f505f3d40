"""What DeepSpeed leaves on params that it takes over, and what an optimizer does that sees it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def refuse_deepspeed(name: str, given: Iterable[Tensor], held: Iterable[Tensor]) -> None:
    """Raise ``RuntimeError`` where ``held``, the tensors to be stepped by the optimizer class
    ``name``, are DeepSpeed's slices of the params that it was ``given``: their norms are not the
    params'."""
    here = set(map(id, held))
    if any(id(p) not in here and taken_by_zero(p) for p in given):
        raise RuntimeError(
            f"{name} was given to DeepSpeed, whose ZeRO (or BF16_Optimizer) hands it flat "
            "slices of many joined params: another algorithm than LAMB. Use "
            "dist_lamb.deepspeed_adapter.DeepSpeedLamb instead, with the same arguments"
        )


def taken_by_zero(p: Tensor) -> bool:
    """Whether DeepSpeed cuts ``p``: by ZeRO-1, 2, 3 or BF16_Optimizer."""
    return hasattr(p, "_hp_mapping") or hasattr(p, "ds_id")
