"""DeepSpeed's ZeRO as a contender: DeepSpeedLamb, and DeepSpeed's own Adam at the same stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dist_lamb import param_groups
from dist_lamb.deepspeed_adapter import DeepSpeedLamb, recommended_config

from .contenders import BETAS, EPS, LR, WEIGHT_DECAY

OPTIMIZERS = ("lamb", "adam")


def make_deepspeed(
    model: nn.Module,
    stage: int,
    optimizer: str,
    micro_batch: int,
    *,
    lr: float = LR,
) -> Any:
    """DeepSpeed's engine around ``model`` at ZeRO ``stage``, in float32 or bfloat16 as its params.

    Args:
        optimizer: "lamb", or "adam" for DeepSpeed's ``{"type": "AdamW"}``: its FusedAdam on a GPU
            (compiled by nvcc at first use), torch's where there is none.
        micro_batch: sequences a rank and step.

    Raises:
        ValueError: another optimizer or stage; params of another dtype. ImportError: no deepspeed.
    """
    import deepspeed

    if optimizer not in OPTIMIZERS:
        raise ValueError(f"Invalid optimizer: {optimizer!r}; one of {OPTIMIZERS} expected")
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    dtype = next(model.parameters()).dtype
    if dtype not in names:
        raise ValueError(f"params are {dtype}; float32 or bfloat16 expected")
    config = recommended_config(stage, dtype=names[dtype], gradient_clipping=0.0)
    config |= {
        "train_micro_batch_size_per_gpu": micro_batch,
        "steps_per_print": 2**31,
    }
    groups = param_groups(model, weight_decay=WEIGHT_DECAY, no_decay=())  # as other contenders
    made: Any = None
    if optimizer == "lamb":
        made = DeepSpeedLamb(groups, lr=lr, betas=BETAS, eps=EPS)
    else:
        config["optimizer"] = {
            "type": "AdamW",
            "params": {
                "lr": lr,
                "betas": list(BETAS),
                "eps": EPS,
                "torch_adam": not torch.cuda.is_available(),
            },
        }
        for group in groups:
            group["params"] = [p for _, p in group["params"]]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=made,
        model_parameters=None if made else groups,
        config=config,
    )
    return engine
