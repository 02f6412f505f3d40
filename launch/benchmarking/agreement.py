"""All ranks go on, or none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Failed(Exception):
    """Something raised on at least one rank; every rank gets the same message."""


def agreed(do: Callable[[], T]) -> T:
    """What ``do`` returns; a collective.

    A rank that raises while others wait for it in a collective of ``do`` leaves them there until
    the process group's timeout, which ends the run.

    Raises:
        Failed: on every rank, if ``do`` raises on any.
    """
    cause: Exception | None = None
    why = None
    try:
        value = do()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        why = lines[0] if isinstance(error, Failed) else f"{type(error).__name__}: {lines[0][:300]}"
        cause = error
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, why)
    for rank, reason in enumerate(reasons):
        if reason is not None:
            everywhere = len(set(reasons)) == 1
            raise Failed(reason if everywhere else f"rank {rank}: {reason}") from cause
    return value
