"""Engine ``sharded``: ``dist_lamb.ShardedLamb`` averages the gradients and shards the state."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from dist_lamb import ShardedLamb
from pretraining.config import PretrainConfig
from pretraining.engine_base import PlainEngine, groups_of


class ShardedEngine(PlainEngine):
    """Gradients are reduced inside backward, params gathered into the next forward."""

    optimizer: ShardedLamb

    def __init__(self, model: nn.Module, config: PretrainConfig, lr: float) -> None:
        self.model = model
        self.optimizer = ShardedLamb(
            groups_of(model, config.optim),
            lr=lr,
            stage=config.optim.stage,
            # Nothing in the training loop reads params between a step and the next forward.
            overlap_gather=True,
            track_grad_norm=config.track_grad_norm,
            **config.optim.options(),
        )

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self.optimizer.no_sync()
