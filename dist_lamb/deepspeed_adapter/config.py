"""What a DeepSpeed config must say to take a DeepSpeedLamb, and to keep it exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .optimizer import DeepSpeedLamb


def recommended_config(
    stage: int,
    *,
    dtype: str = "bf16",
    gradient_clipping: float = 1.0,
    offload_optimizer: bool = False,
) -> dict[str, Any]:
    """The part of DeepSpeed's config that a DeepSpeedLamb wants; batch sizes are to be added, and
    "optimizer" if it is to be made by name.

    Args:
        stage: 0, 1, 2 or 3.
        dtype: "fp32", "bf16", or "fp16" with dynamic loss scaling.
        gradient_clipping: global norm, 0 for none; 1 is NVIDIA's recipe for LAMB.
        offload_optimizer: keep state and masters in CPU memory, and step there.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"Invalid stage: {stage!r}; 0, 1, 2 or 3 expected")
    if dtype not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"Invalid dtype: {dtype!r}; 'fp32', 'bf16' or 'fp16' expected")
    zero: dict[str, Any] = {"stage": stage}
    config: dict[str, Any] = {
        "zero_optimization": zero,
        # For an instance without register(), which puts the class on DeepSpeed's list.
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": gradient_clipping,
        # The sum over many ranks in bfloat16 would lose most of its 8 bits.
        "communication_data_type": "fp32",
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    if offload_optimizer:
        if not stage:
            raise ValueError("DeepSpeed offloads the optimizer from stage 1 on")
        zero["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    return config


#: as DeepSpeed spells it
_FLOAT16 = ("fp16", "float16", "half", "torch.float16", torch.float16)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section, or an empty one where it is none: DeepSpeed refuses that by itself."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def check_config(config: Mapping[str, Any]) -> list[str]:
    """What in a DeepSpeed config (its JSON as a dict) would change a DeepSpeedLamb without a word.

    What DeepSpeed or the optimizer refuse by themselves is not among it.
    """
    zero = _section(config, "zero_optimization")
    stage, found = zero.get("stage", 0), []
    named = _section(config, "optimizer").get("type")
    if named is not None and getattr(torch.optim, named, None) is not DeepSpeedLamb:
        found.append(
            f"'optimizer' names {named!r}, which is no DeepSpeedLamb (call register() first and "
            "take its name); if an optimizer is passed to deepspeed.initialize, that one is used, "
            "and these params are not"
        )
    offload = _section(zero, "offload_optimizer")
    on_host = offload.get("device", "none")
    if on_host != "none" and named is None and config.get("zero_force_ds_cpu_optimizer", True):
        found.append(
            "set zero_force_ds_cpu_optimizer = false: when offloading, Accelerate replaces an "
            "optimizer that the config does not name by DeepSpeed's CPU Adam"
        )
    if on_host == "nvme":
        found.append(
            "zero_optimization.offload_optimizer.device = nvme has not been tried: use cpu"
        )
    if stage == 3 and on_host != "none" and offload.get("ratio", 1.0) < 1:
        found.append(
            "remove zero_optimization.offload_optimizer.ratio: what DeepSpeed then keeps on the "
            "GPU (with sub-groups of the usual size all of it) is stepped by torch's AdamW"
        )
    half = [name for name in ("bf16", "fp16") if _section(config, name).get("enabled")]
    if "fp16" in half and not stage:
        found.append(
            "set zero_optimization.stage = 1 for fp16: at stage 0 deepspeed 0.19 divides gradients "
            "by a loss scale that it has not multiplied the loss by, for any optimizer"
        )
    autocast = _section(config, "torch_autocast")
    scaled = autocast.get("enabled") and autocast.get("dtype") in _FLOAT16
    if scaled and stage and config.get("gradient_clipping"):
        found.append(
            "remove gradient_clipping, and give max_grad_norm, or set torch_autocast.dtype = "
            "bfloat16: with float16 deepspeed 0.19 clips gradients at ZeRO-1 to 3 that are still "
            "multiplied by the loss scale, for any optimizer"
        )
    if half and config.get("communication_data_type") != "fp32":
        found.append(
            "set communication_data_type = 'fp32': gradients are summed over ranks in "
            f"{half[0]} otherwise (slower to send, more exact)"
        )
    if not (scaled or config.get("gradient_clipping")):
        found.append("set gradient_clipping (1.0 in NVIDIA's recipe), or give max_grad_norm")
    return found
