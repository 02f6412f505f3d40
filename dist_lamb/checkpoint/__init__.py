"""Checkpoints: written atomically, and loaded at any number of ranks and into any sharding.

::

    checkpoint.save("run/checkpoints", step, model, optimizer, stateful={"lr": scheduler}, keep=3)
    checkpoint.load("run/checkpoints", model, optimizer, stateful={"lr": scheduler})

A checkpoint of 4 ranks loads into 3 ranks, into one, and into FSDP2 or back, bit by bit the same.
After a crash a checkpoint is complete or absent. Loading one never runs code from it.
"""

from .errors import CheckpointError
from .folder import checkpoints, latest
from .loading import load
from .owner import Owner, claim
from .reading import Checkpoint
from .saving import Pending, Stateful, save, save_async, wait

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Owner",
    "Pending",
    "Stateful",
    "checkpoints",
    "claim",
    "latest",
    "load",
    "save",
    "save_async",
    "wait",
]
