"""Checkpoints that outlive crashes and resharding.

::

    checkpoint.save("run/checkpoints", step, model, optimizer, stateful={"lr": scheduler}, keep=3)
    checkpoint.load("run/checkpoints", model, optimizer, stateful={"lr": scheduler})

What 4 ranks saved loads into 3, into one, into FSDP2 and back, bit by bit the same. A checkpoint is
there whole or not at all; loading one never runs code from it.
"""

from .errors import CheckpointError
from .files import Checkpoint
from .folder import checkpoints, latest
from .loading import load
from .saving import Pending, Stateful, save, save_async, wait

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Pending",
    "Stateful",
    "checkpoints",
    "latest",
    "load",
    "save",
    "save_async",
    "wait",
]
