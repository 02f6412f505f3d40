"""How gradients and optimizer state are spread over ranks: one class an engine, one registry.

The training loop uses an engine only through ``engine_base.Engine``. A new one is a class in a
file of its own, a line in ``ENGINES`` and its name in ``OptimConfig.engine``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pretraining.config import PretrainConfig
from pretraining.engine_base import Engine
from pretraining.engine_ddp import DdpEngine
from pretraining.engine_deepspeed import DeepSpeedEngine
from pretraining.engine_fsdp2 import Fsdp2Engine
from pretraining.engine_sharded import ShardedEngine

ENGINES: dict[str, Callable[[nn.Module, PretrainConfig, float], Engine]] = {
    "sharded": ShardedEngine,
    "fsdp2": Fsdp2Engine,
    "ddp": DdpEngine,
    "deepspeed": DeepSpeedEngine,
}


def build_engine(model: nn.Module, config: PretrainConfig, lr: float) -> Engine:
    """The engine named by ``optim.engine``, around a model that is already on its device."""
    return ENGINES[config.optim.engine](model, config, lr)
