"""Engine ``sharded``: ``dist_lamb.ShardedLamb`` averages the gradients and shards the state."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from dist_lamb import ShardedLamb, param_groups
from pretraining.config import PretrainConfig
from pretraining.engine_base import PlainEngine


class ShardedEngine(PlainEngine):
    """Gradients are reduced inside backward, params gathered into the next forward."""

    optimizer: ShardedLamb

    def __init__(self, model: nn.Module, config: PretrainConfig, lr: float) -> None:
        self.model = model
        self.optimizer = ShardedLamb(
            param_groups(model, weight_decay=config.optim.weight_decay),
            lr=lr,
            stage=config.optim.stage,
            # Nothing in the training loop reads params between a step and the next forward.
            overlap_gather=True,
            **config.optim.lamb_options(),
        )

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self.optimizer.no_sync()
