"""Phases 2-6 of a step, for every optimizer and engine: what happens between gradients and params.

Nothing here waits for a device. Phase 1, gradients to their owners, and phase 7, params to every
rank, belong to :class:`dist_lamb.ShardedLamb`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._torch_private import phase
from .kernels import Update
from .kernels.segments import Scalars
from .norms import Norms


def prepare(
    updates: Sequence[Update],
    norms: Norms,
    scalars: Scalars,
    grad_sq: Callable[[], Tensor] | None = None,
) -> None:
    """Phase 2, which changes nothing: squared norm and overflow of all gradients, over ranks, and
    the sums by param that a rule wants before the states.

    ``grad_sq()`` is the sum of squares of this rank's gradients, float64 0-d, where known already.
    """
    flag = scalars.found_inf
    options = scalars.options
    if not options.squares_wanted and flag is None and not options.early:
        return
    with phase("2 gradient norm"):
        total = _squares(updates, norms, options.squares_wanted, grad_sq)
        early = None
        if options.early:
            each = [u.early().to(total.device) for u in updates]
            early = each[0] if len(each) == 1 else torch.stack(each).sum(0)
        if flag is not None:
            total[-1] = flag.to(total.device).view(())
        (square, flagged), scalars.early = norms.over_all(total, early)
        if options.squares_wanted:
            scalars.grad_sq = square
        if flag is not None or options.skip:
            scalars.overflow = flagged if flag is not None else torch.zeros_like(flagged)
            if options.squares_wanted:
                # Finite half-precision gradients of two ranks may have a sum that is not.
                scalars.overflow = torch.where(square.isfinite(), scalars.overflow, 1.0)


def update(updates: Sequence[Update], norms: Norms, scalars: Scalars) -> None:
    """Phases 3-6: states, norms, trust ratios, params."""
    # 3. states; the sums that the rules ask for   [params, columns]
    with phase("3 moments"):
        sums = [u.moments(scalars, not norms.local, norms.settled) for u in updates]
    # 4. over ranks: one all-reduce
    with phase("4 norms"):
        sums = [norms.per_param(s) for s in sums]
    # 5-6. scales from the sums;  x <- x - (shrink * x + sum of steps_k * u_k)
    with phase("5-6 apply"):
        for u, s in zip(updates, sums):
            u.apply(s)


def _squares(
    updates: Sequence[Update], norms: Norms, wanted: bool, known: Callable[[], Tensor] | None
) -> Tensor:
    """Of this rank's gradients, float64 [reduction groups + 1]; the last element is for a flag."""
    home = updates[0].device
    groups = norms.reduction_groups(home)
    if not wanted or known is not None:
        count = 1 if groups is None else len(groups)
        total = torch.zeros(count + 1, dtype=torch.float64, device=home)
        if known is not None and wanted:
            total[0] = known()
        return total
    total = updates[0].grad_sq(groups)
    for u in updates[1:]:
        total += u.grad_sq(norms.reduction_groups(u.device)).to(home)
    return total
