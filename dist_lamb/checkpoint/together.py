"""Steps that all ranks pass or none: an error on one rank alone would leave the others waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..sharding.comm import Comm
from .errors import CheckpointError

T = TypeVar("T")


def together(comm: Comm, step: Callable[[], T]) -> T:
    """This rank's ``step()``; a ``CheckpointError`` on every rank if it fails on any."""
    result, text, cause = None, None, None
    try:
        result = step()
    except Exception as error:
        kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
        text, cause = f"{kind}{error}", error
    texts = comm.gather_objects(text)
    for rank, theirs in enumerate(texts):
        if theirs is not None:
            alike = len(set(texts)) == 1
            raise CheckpointError(theirs if alike else f"{theirs} (on rank {rank})") from cause
    return result  # type: ignore[return-value]


def on_first(comm: Comm, step: Callable[[], T]) -> T:
    """Rank 0's ``step()``, on every rank; a ``CheckpointError`` on every rank if it fails."""
    found = together(comm, lambda: step() if comm.rank == 0 else None)
    first: T = comm.gather_objects(found)[0]
    return first
