"""DeepSpeedLamb by its name in DeepSpeed's JSON config."""

from __future__ import annotations

from typing import Any

import torch

from .optimizer import DeepSpeedLamb


def register(name: str = "DeepSpeedLamb") -> None:
    """Let DeepSpeed's config name the optimizer: ``"optimizer": {"type": name, "params": {...}}``.

    To be called on every rank before ``deepspeed.initialize``; again is no harm. Then neither
    ``zero_allow_untested_optimizer`` nor ``zero_force_ds_cpu_optimizer`` is needed, and an instance
    that is passed needs the second one only. ``params`` are DeepSpeedLamb's arguments, with lists
    where it takes tuples; ``"no_decay_1d": true`` among them keeps biases and norm weights from
    decaying where nobody passes groups. DeepSpeed looks a name up in ``torch.optim``, so that is
    where the class goes.

    Raises:
        ValueError: a name that DeepSpeed or torch.optim give to something else (``"Lamb"`` is
            DeepSpeed's own: CUDA only, without ZeRO, another rule). ImportError: no deepspeed.
    """
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"Invalid name: {name!r}; an identifier like 'DeepSpeedLamb' expected")
    # DeepSpeed compares in lower case, and branches on "muon" within names.
    if name.lower() in DEEPSPEED_OPTIMIZERS or "muon" in name.lower():
        raise ValueError(f"{name!r} is an optimizer of DeepSpeed's own; take another name")
    optimizers: Any = torch.optim
    if getattr(optimizers, name, DeepSpeedLamb) is not DeepSpeedLamb:
        raise ValueError(f"torch.optim.{name} is something else; take another name")
    setattr(optimizers, name, DeepSpeedLamb)
    if DeepSpeedLamb not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(DeepSpeedLamb)
