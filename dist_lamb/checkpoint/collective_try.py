"""Actions that succeed on all ranks or fail on all.

An error on one rank alone would leave the others waiting in their next collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..sharding.comm import Comm
from .errors import CheckpointError

T = TypeVar("T")


def collective_try(comm: Comm, action: Callable[[], T]) -> T:
    """This rank's ``action()``; a ``CheckpointError`` on every rank if it fails on any."""
    result, text, cause = None, None, None
    try:
        result = action()
    except Exception as error:
        prefix = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
        text, cause = f"{prefix}{error}", error
    texts = comm.gather_objects(text)
    for rank, failure in enumerate(texts):
        if failure is not None:
            same = len(set(texts)) == 1
            raise CheckpointError(failure if same else f"{failure} (on rank {rank})") from cause
    return result  # type: ignore[return-value]


def on_rank_zero(comm: Comm, action: Callable[[], T]) -> T:
    """Rank 0's ``action()``, on every rank; a ``CheckpointError`` on every rank if it fails."""
    own = collective_try(comm, lambda: action() if comm.rank == 0 else None)
    first: T = comm.gather_objects(own)[0]
    return first
