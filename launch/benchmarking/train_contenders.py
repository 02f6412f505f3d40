"""Ways to train one model on several ranks: each makes a :class:`Training` of the same model."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from pretraining.engine_ddp import Ddp
from pretraining.engine_fsdp2 import shard_layers
from torch import Tensor, nn

from dist_lamb import Lamb, ShardedLamb

from .contenders import BETAS, EPS, WEIGHT_DECAY, peer

#: What a model computes in: its params' dtype, and whether the forward is under bf16 autocast.
PRECISIONS = {
    "fp32": (torch.float32, False),
    "autocast": (torch.float32, True),
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all contenders of one comparison share."""

    device: torch.device
    precision: str
    micro_batch: int
    lr: float
    impl: str = "auto"  # of Lamb and ShardedLamb
    compiled: bool = False  # the model's layers, one by one

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    @property
    def autocast(self) -> bool:
        return PRECISIONS[self.precision][1]

    def adam_options(self) -> dict[str, Any]:
        return {"lr": self.lr, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}

    def lamb_options(self) -> dict[str, Any]:
        return {**self.adam_options(), "impl": self.impl}


class Training:
    """A model and its optimizer on all ranks. Every method is called by every rank.

    ``module`` holds the params under the model's own names; ``model`` is what is called.
    """

    #: mixes precisions by itself, so no autocast around the forward
    own_autocast = False
    #: ``step()`` changes the params
    optimizes = True

    def __init__(self, module: nn.Module, optimizer: Any, model: nn.Module | None = None) -> None:
        self.module = module
        self.model: Callable[..., Any] = module if model is None else model
        self.optimizer = optimizer

    def forward(self, batch: tuple[Tensor, ...], setting: Setting) -> Tensor:
        """The mean loss of this rank's ``batch``, 0-d."""
        context: AbstractContextManager[Any] = nullcontext()
        if setting.autocast and not self.own_autocast:
            context = torch.autocast(setting.device.type, dtype=torch.bfloat16)
        with context:
            losses, _ = self.model(*batch)
        return losses.mean()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole_params(self) -> dict[str, Tensor]:
        """{name: a copy of the whole param}, the same on every rank; a collective."""
        synchronize = getattr(self.optimizer, "synchronize", None)
        if synchronize is not None:  # the gather of params may still run
            synchronize()
        return {n: _whole(p.detach()).clone() for n, p in self.module.named_parameters()}


class ForwardBackward(Training):
    """No optimizer, no other ranks: what every contender is compared with."""

    optimizes = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, None)

    def step(self) -> None:
        self.module.zero_grad()


class _Fsdp2(Training):
    own_autocast = True


class _Apex(Training):
    """apex's DistributedFusedLAMB, in the training loop of apex's own test."""

    def backward(self, loss: Tensor) -> None:
        self.optimizer._lazy_init_stage1()
        loss.backward()
        self.optimizer._lazy_init_stage2()
        self.optimizer.complete_reductions()


class _DeepSpeed(Training):
    def __init__(self, engine: Any) -> None:
        super().__init__(engine.module, None, engine)
        self._engine = engine

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()  # clears the gradients too

    def whole_params(self) -> dict[str, Tensor]:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            return super().whole_params()


def _whole(t: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return t.full_tensor() if isinstance(t, DTensor) else t


@dataclass(frozen=True, kw_only=True)
class Contender:
    """``make(module, setting)`` shards or wraps a module that is on its device, or raises."""

    name: str
    make: Callable[[nn.Module, Setting], Training]
    is_lamb: bool = True
    needs: str | None = None  # a module
    only_cuda: bool = False
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    #: computes layers by functions of its own, whose rounding in bf16 differs from other
    #: contenders' by more than the errors that the gate looks for: it is checked in float32
    own_layers: bool = False

    def why_not(self, setting: Setting) -> str | None:
        """Why this contender has no row for this setting; None if it has."""
        if self.needs and not _is_installed(self.needs):
            return f"{self.needs} is not installed"
        if self.only_cuda and setting.device.type != "cuda":
            return "runs on CUDA only"
        if setting.precision not in self.precisions:
            return f"not compared at {setting.precision}: only at {', '.join(self.precisions)}"
        return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of its parent
        return False


Maker = Callable[[nn.Module, Setting], Training]
MakeOptimizer = Callable[[nn.Module, Setting], Any]


def _lamb(module: nn.Module, setting: Setting) -> Any:
    return Lamb(module.named_parameters(), **setting.lamb_options())


def _adamw(module: nn.Module, setting: Setting) -> Any:
    return torch.optim.AdamW(module.parameters(), **setting.adam_options(), fused=True)


def _timm(module: nn.Module, setting: Setting) -> Any:
    group: Any = {"params": list(module.parameters()), "lr": setting.lr}
    return peer("timm.optim", "Lamb", always_adapt=True)([group], None)


def _zero_redundancy(module: nn.Module, setting: Setting) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(
        module.parameters(), optimizer_class=Lamb, **setting.lamb_options()
    )


def _ddp(make: MakeOptimizer) -> Maker:
    def made(module: nn.Module, setting: Setting) -> Training:
        return Training(module, make(module, setting), Ddp(module))

    return made


def _fsdp2(make: MakeOptimizer) -> Maker:
    def made(module: nn.Module, setting: Setting) -> Training:
        shard_layers(module, bf16=setting.autocast)
        return _Fsdp2(module, make(module, setting))

    return made


def _sharded(**options: Any) -> Maker:
    def made(module: nn.Module, setting: Setting) -> Training:
        return Training(module, ShardedLamb(module, **setting.lamb_options(), **options))

    return made


def _apex_distributed(module: nn.Module, setting: Setting) -> Training:
    cls = importlib.import_module("apex.contrib.optimizers.distributed_fused_lamb")
    optimizer = cls.DistributedFusedLAMB(
        module.parameters(),
        **setting.adam_options(),
        use_nvlamb=True,
        dwu_group_size=dist.get_world_size(),
        dwu_num_blocks=4,
        dwu_num_chunks=4,
        dwu_num_rs_pg=1,
        dwu_num_ar_pg=1,
        dwu_num_ag_pg=1,
    )
    optimizer._lr = torch.tensor(setting.lr, device=setting.device)
    optimizer.set_global_scale(torch.ones((), device=setting.device))
    return _Apex(module, optimizer)


def _deepspeed(stage: int, optimizer: str) -> Maker:
    def made(module: nn.Module, setting: Setting) -> Training:
        from .train_deepspeed import make_deepspeed

        engine = make_deepspeed(module, stage, optimizer, setting.micro_batch, lr=setting.lr)
        return _DeepSpeed(engine)

    return made


_FULL = ("fp32", "autocast")  # for optimizers that keep no float32 masters
CONTENDERS = (
    Contender(name="DDP + Lamb", make=_ddp(_lamb)),
    Contender(name="DDP + AdamW fused", make=_ddp(_adamw), is_lamb=False, precisions=_FULL),
    Contender(name="ZeroRedundancyOptimizer(Lamb)", make=_ddp(_zero_redundancy)),
    Contender(name="FSDP2 + Lamb", make=_fsdp2(_lamb)),
    Contender(name="FSDP2 + timm Lamb", make=_fsdp2(_timm), needs="timm", precisions=_FULL),
    Contender(name="FSDP2 + AdamW fused", make=_fsdp2(_adamw), is_lamb=False, precisions=_FULL),
    Contender(
        name="apex DistributedFusedLAMB",
        make=_apex_distributed,
        needs="apex.contrib.optimizers",
        only_cuda=True,
        precisions=("fp16",),  # its flat gradients are float16 whatever the params are
    ),
    *(
        Contender(
            name=f"ShardedLamb {stage}{'' if overlap else ' no overlap'}",
            make=_sharded(stage=stage, overlap=overlap, overlap_gather=overlap),
        )
        for stage in (1, 2)
        for overlap in (True, False)
    ),
    # Last: an engine does not free all of its memory.
    *(
        Contender(
            name=f"DeepSpeed ZeRO-{stage} + {label}",
            make=_deepspeed(stage, optimizer),
            is_lamb=optimizer == "lamb",
            needs="deepspeed",
            precisions=("fp32", "bf16"),
            own_layers=stage == 3,
        )
        for optimizer, label in (("lamb", "DeepSpeedLamb"), ("adam", "Adam"))
        for stage in (1, 2, 3)
    ),
)
