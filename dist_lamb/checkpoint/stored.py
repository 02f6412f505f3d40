"""A param's state as it was saved: under which key, and made into the format that it has here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..state import MASTER, REMAINDER, TENSOR_STATES, converted, joined, scalar_of, split_into
from .reading import Checkpoint


def has_state(checkpoint: Checkpoint, name: str) -> bool:
    """Whether there is any state of this param."""
    return any(f"optimizer.{name}.{s}" in checkpoint.tensors for s in ("step", *TENSOR_STATES))


def saved_key(checkpoint: Checkpoint, name: str, state_name: str) -> str:
    """The key of a param's state; of a master's remainder where that was saved, and the reverse."""
    keys = [f"optimizer.{name}.{state_name}"]
    if state_name in (MASTER, REMAINDER):
        keys += [f"optimizer.{name}.{other}" for other in (MASTER, REMAINDER)]
    return next((key for key in keys if key in checkpoint.tensors), keys[0])


def take_converted(views: Mapping[str, Tensor], name: str, given: Tensor) -> None:
    """A piece's state from elements that were saved in another format."""
    if name == REMAINDER:
        views[name].copy_(split_into(views["param"], given))
    elif name == MASTER:
        views[name].copy_(joined(views["param"], given))
    else:
        views[name].copy_(converted(given, views[name].dtype))


def equal(a: Any, b: Any) -> bool:
    """Whether two values of an option are the same."""
    try:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return bool(torch.equal(scalar_of(a).cpu(), scalar_of(b).cpu()))
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return tuple(a) == tuple(b)
        return bool(a == b)
    except (TypeError, ValueError, RuntimeError):  # of kinds that cannot be compared
        return False
