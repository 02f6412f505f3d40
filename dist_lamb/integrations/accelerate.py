"""Accelerate's ``save_state`` with a ShardedLamb."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..sharded import ShardedLamb


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside of what Accelerate, which Trainer uses too, makes of it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def consolidate_on_save(accelerator: Any, *optimizers: Any) -> None:
    """From now on ``accelerator.save_state()`` saves the whole state of each ShardedLamb.

    It asks every rank for the state dict, so every rank holds all of it, in host memory, until the
    next step. Params, which lie side by side in the buffers of a ShardedLamb, are saved from copies
    in host memory: of tensors that share a storage Accelerate saves only one. ``load_state()``
    loads at any number of ranks, before the first step: later Accelerate fails on params that share
    a storage.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        optimizers: before or after ``accelerator.prepare()``; others than ShardedLamb are left
            alone.
    """
    sharded = [opt for opt in map(unwrapped, optimizers) if isinstance(opt, ShardedLamb)]

    def consolidate(models: Any, weights: list[dict[str, Any]], output_dir: Any) -> None:
        for opt in sharded:
            opt.consolidate_state_dict(to=None)
        if accelerator.is_local_main_process:  # others write nothing
            for state in weights:
                state.update(_apart(state))

    if sharded:
        accelerator.register_save_state_pre_hook(consolidate)


def _apart(state: dict[str, Any]) -> dict[str, Tensor]:
    """Copies of the tensors that are part of a larger storage; one copy of one that has several
    names."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    found = {}
    for name, t in state.items():
        if isinstance(t, Tensor) and t.untyped_storage().nbytes() > t.nbytes:
            same = (t.data_ptr(), t.dtype, t.shape, t.stride())
            found[name] = copies.setdefault(same, t.to("cpu", copy=True))
    return found
