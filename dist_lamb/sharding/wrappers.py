"""Wrappers of torch around the params of an optimizer that reduces gradients itself."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def wrapper_problem(params: Sequence[Tensor], arrived: bool) -> str | None:
    """Why gradients of these params must not be averaged, or will never come; None if all is well.

    Frameworks wrap a model long after its optimizer was made, so all living objects are looked at.
    ``arrived``: whether some of these params had a gradient: then none stands in their place.
    """
    problem = _found(params, arrived)
    if problem is not None:
        gc.collect()  # it may be of a wrapper that nobody uses any more
        problem = _found(params, arrived)
    return problem


def _found(params: Sequence[Tensor], arrived: bool) -> str | None:
    own, shapes = set(map(id, params)), {tuple(p.shape) for p in params}
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharders = () if fsdp is None else (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)
    wrappers = (DistributedDataParallel, *sharders)
    living = gc.get_objects()
    # Half a million objects: types first, by loops in C; most programs have none of these.
    kinds = {kind for kind in set(map(type, living)) if issubclass(kind, wrappers)}
    for thing in living if kinds else ():
        kind = type(thing)
        if kind not in kinds or "_modules" not in thing.__dict__:
            continue  # or one that was never finished
        if issubclass(kind, DistributedDataParallel):
            if not own.isdisjoint(map(id, thing.parameters())):
                return (
                    "params that are in a DistributedDataParallel, which averages their gradients: "
                    "make it with reduce_gradients=False"
                )
        else:
            theirs = list(thing.parameters())
            held = {tuple(s) for q in theirs for s in getattr(q, "_shapes", None) or [q.shape]}
            # FSDP puts others in the place of the params that it was given.
            replaced = not arrived and shapes <= held
            if replaced or not own.isdisjoint(map(id, theirs)):
                return (
                    "params that are in an FSDP module, which shards them and averages their "
                    "gradients (reduce_gradients=False is for DistributedDataParallel): use "
                    "dist_lamb.Lamb, made of the params that fully_shard() left in the module"
                )
    return None
