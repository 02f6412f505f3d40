"""torch's ``fully_shard`` with ``dist_lamb.Lamb``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from dist_lamb import Lamb
from pretraining.config import PretrainConfig
from pretraining.engine_base import PlainEngine, groups_of


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The encoder layers of a :class:`pretraining.model.PretrainBert`."""
    return list(model.get_submodule("bert.encoder.layer").children())


def shard_layers(model: nn.Module, bf16: bool) -> FSDPModule:
    """``fully_shard`` over all ranks: a unit for every encoder layer, and one for the rest, the
    embeddings and the head that is tied to them. ``bf16``: layers are gathered in bfloat16."""
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    sharded = fully_shard(model, mesh=mesh, mp_policy=policy)
    assert isinstance(sharded, FSDPModule)
    return sharded


class Fsdp2Engine(PlainEngine):
    """Parameters, gradients and state are sharded over all ranks, layer by layer.

    With ``train.autocast = "bf16"`` the layers' parameters are gathered in bfloat16; shards,
    gradients and state are float32 in any case.
    """

    def __init__(self, model: nn.Module, config: PretrainConfig, lr: float) -> None:
        self.model = model
        self._sharded = shard_layers(model, bf16=config.train.autocast == "bf16")
        self.optimizer = Lamb(
            groups_of(model, config.optim),
            lr=lr,
            track_grad_norm=config.track_grad_norm,
            **config.optim.options(),
        )

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        # Until the last one gradients stay whole on every rank, and are not communicated.
        self._sharded.set_requires_gradient_sync(last)
        return nullcontext()
