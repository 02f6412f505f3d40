"""LAMB for PyTorch that stays LAMB however the model is sharded."""

from . import schedules
from .lamb import Lamb
from .options import preset
from .param_groups import param_groups
from .sharded import ShardedLamb

__all__ = ["Lamb", "ShardedLamb", "param_groups", "preset", "schedules"]
__version__ = "0.1.0"
