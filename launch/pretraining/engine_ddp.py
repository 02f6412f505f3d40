"""Engine ``ddp``: DistributedDataParallel averages the gradients, every rank steps all of Lamb."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_lamb import Lamb
from pretraining.config import PretrainConfig
from pretraining.engine_base import PlainEngine, groups_of


class Ddp(DistributedDataParallel):
    """With the names of the module inside, which are those of every other engine.

    Buffers are not sent at every forward: BERT's are constants, and ranks that evaluate different
    numbers of batches would wait for each other.
    """

    def __init__(self, module: nn.Module) -> None:
        device = next(module.parameters()).device
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        # torch >= 2.13 warns of the older name
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        super().__init__(
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **{name: False},
        )

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters(*args, **kwargs)


class DdpEngine(PlainEngine):
    """``DistributedDataParallel`` and ``dist_lamb.Lamb``: nothing is sharded, so ``optim.stage``
    has no meaning here."""

    def __init__(self, model: nn.Module, config: PretrainConfig, lr: float) -> None:
        self._ddp = self.model = Ddp(model)
        self.optimizer = Lamb(
            groups_of(model, config.optim),
            lr=lr,
            track_grad_norm=config.track_grad_norm,
            **config.optim.options(),
        )

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._ddp.no_sync()
